//! The mock keeps the trait's promises, with paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use futures::StreamExt;
use llama_orch_types::TaskId;
use tokio::time::Instant;
use worker_adapters_adapter_api::{
    CallApi, CancelReport, EngineCall, EngineTask, FinishReason, SamplingParams, TaskInput,
    TokenEvent, WorkerAdapter, WorkerError,
};
use worker_adapters_mock::{MockAdapter, MockFault, MockScript};

fn task(max_tokens: u32) -> EngineTask {
    EngineTask {
        id: TaskId::generate(),
        input: TaskInput::Prompt("three short words".into()),
        answered: String::new(),
        max_tokens,
        stop: vec![],
        sampling: SamplingParams::default(),
    }
}

#[tokio::test(start_paused = true)]
async fn it_plays_its_script_in_its_own_time() {
    let script = MockScript {
        first_token_after: Duration::from_mins(1),
        next_token_after: Duration::from_secs(1),
        ..MockScript::with_pieces(&["a", "b", "c"])
    };
    let mock = MockAdapter::new(script);
    let begun = Instant::now();
    let stream = mock.submit(task(2)).await.unwrap();
    assert_eq!(mock.running(), 1);
    let events: Vec<_> = stream.map(Result::unwrap).collect().await;
    assert_eq!(begun.elapsed(), Duration::from_secs(61));
    assert_eq!(events[0], TokenEvent::Started);
    assert_eq!(
        events[2],
        TokenEvent::Token {
            text: "b".into(),
            index: 1,
            tokens_in: 3,
            tokens_out: 2,
        }
    );
    let TokenEvent::End(end) = &events[3] else {
        panic!("{events:?}")
    };
    assert_eq!(
        (end.tokens_in, end.tokens_out, end.finish_reason),
        (3, 2, FinishReason::Length)
    );
    assert_eq!(
        (events.len(), mock.running(), mock.tasks().len()),
        (4, 0, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_hang_ends_with_a_cancel() {
    let fault = Some(MockFault::Hang { after_tokens: 1 });
    let mock = MockAdapter::new(MockScript {
        fault,
        ..MockScript::default()
    });
    let task = task(9);
    let id = task.id;
    let mut stream = mock.submit(task).await.unwrap();
    assert!(matches!(stream.next().await, Some(Ok(TokenEvent::Started))));
    assert!(matches!(
        stream.next().await,
        Some(Ok(TokenEvent::Token { .. }))
    ));
    assert!(
        tokio::time::timeout(Duration::from_hours(1), stream.next())
            .await
            .is_err()
    );
    assert!(matches!(
        mock.cancel(id).await.unwrap(),
        CancelReport::Freed { .. }
    ));
    assert!(matches!(
        stream.next().await,
        Some(Err(WorkerError::Cancelled))
    ));
    assert!(stream.next().await.is_none());
    assert_eq!(mock.cancel(id).await.unwrap(), CancelReport::NotRunning);
}

#[tokio::test(start_paused = true)]
async fn faults_strike_where_the_script_says() {
    let mock = MockAdapter::new(MockScript::default());
    let with = |fault| MockScript {
        fault: Some(fault),
        ..MockScript::default()
    };
    mock.set_script(with(MockFault::Refuse));
    assert!(matches!(
        mock.submit(task(1)).await.err(),
        Some(WorkerError::InvalidParams { .. })
    ));
    mock.set_script(with(MockFault::Unreachable));
    assert!(matches!(
        mock.submit(task(1)).await.err(),
        Some(WorkerError::Unreachable { .. })
    ));
    mock.set_script(with(MockFault::Cut { after_tokens: 2 }));
    let items: Vec<_> = mock.submit(task(9)).await.unwrap().collect().await;
    assert_eq!(items.len(), 4);
    assert!(matches!(items[3], Err(WorkerError::Reset { .. })));
    assert_eq!(mock.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_probe_waits_no_longer_than_it_is_told() {
    let limit = Duration::from_secs(1);
    let slow = MockAdapter::new(MockScript {
        first_token_after: Duration::from_secs(2),
        ..MockScript::default()
    });
    assert!(matches!(
        slow.probe(limit).await,
        Err(WorkerError::Timeout { .. })
    ));
    slow.probe(3 * limit).await.unwrap();
    let hung = MockAdapter::new(MockScript {
        fault: Some(MockFault::Hang { after_tokens: 0 }),
        ..MockScript::default()
    });
    assert!(hung.probe(limit).await.is_err());
}

fn call(api: CallApi, stream: bool) -> EngineTask {
    EngineTask {
        input: TaskInput::Call(EngineCall {
            api,
            body: "{}".into(),
            stream,
        }),
        ..task(10)
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_is_answered_in_chunks_or_as_a_whole() {
    let mock = MockAdapter::new(MockScript::with_pieces(&["a", "b"]));
    let stream = mock
        .submit(call(CallApi::ChatCompletions, true))
        .await
        .unwrap();
    let events: Vec<_> = stream.map(Result::unwrap).collect().await;
    let text: String = events
        .iter()
        .filter_map(|event| match event {
            TokenEvent::Chunk(chunk) => Some(&*chunk.text),
            _ => None,
        })
        .collect();
    assert_eq!((events.len(), text.as_str()), (5, "ab"), "{events:?}");
    assert!(matches!(events[4], TokenEvent::End(_)));

    let stream = mock
        .submit(call(CallApi::Completions, false))
        .await
        .unwrap();
    let events: Vec<_> = stream.map(Result::unwrap).collect().await;
    let [
        TokenEvent::Started,
        TokenEvent::Answer(answer),
        TokenEvent::End(end),
    ] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!((answer.text.as_str(), end.tokens_out), ("ab", 2));
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body["choices"][0]["text"], "ab");

    let refused = mock.submit(call(CallApi::Rerank, false)).await;
    assert!(matches!(refused, Err(WorkerError::NotOffered { .. })));
}
