//! How tasks fail, against a fake engine in a process of its own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use futures::StreamExt;
use llama_orch_types::{ErrorCode, TaskId};
use support::{Outcome, adapter, adapter_with, failure, task};
use test_harness_fake_engine::{FakeEngine, Fault, Script};
use worker_adapters_adapter_api::{
    EngineHealth, TaskInput, TimeoutPhase, TokenEvent, WorkerAdapter, WorkerError,
};
use worker_adapters_llamacpp_http::{AdapterSettings, LlamaCppAdapter};

/// Long enough for a busy machine, short enough to wait for.
const NEXT_TOKEN_TIMEOUT: Duration = Duration::from_millis(1500);

fn faulty(fault: Fault) -> Script {
    Script {
        fault: Some(fault),
        ..Script::default()
    }
}

/// Runs a task into a fault after three tokens, and checks that exactly these
/// three came before the error.
async fn after_three_tokens(fault: Fault) -> WorkerError {
    let engine = FakeEngine::start(&faulty(fault));
    let adapter = adapter_with(&engine, |settings| {
        settings.next_token_timeout = NEXT_TOKEN_TIMEOUT;
    });
    let outcome = Outcome::of(adapter.submit(task(9)).await.unwrap()).await;
    assert_eq!(outcome.text(), "A fake engine ");
    assert!(
        !outcome
            .events
            .iter()
            .any(|event| matches!(event, TokenEvent::End(_)))
    );
    assert_eq!(adapter.running(), 0);
    outcome.error.expect("the task fails")
}

#[tokio::test]
async fn a_crash_in_mid_stream_is_a_reset() {
    let error = after_three_tokens(Fault::Crash {
        after_tokens: 3,
        exit_code: 139,
    })
    .await;
    assert!(matches!(error, WorkerError::Reset { .. }), "{error:?}");
    assert!(error.retriable());
}

#[tokio::test]
async fn a_cut_connection_is_a_reset() {
    let error = after_three_tokens(Fault::Cut { after_tokens: 3 }).await;
    assert!(matches!(error, WorkerError::Reset { .. }), "{error:?}");
}

#[tokio::test]
async fn a_clean_end_without_the_last_event_is_a_reset() {
    let error = after_three_tokens(Fault::EndWithoutFinal { after_tokens: 3 }).await;
    assert!(matches!(error, WorkerError::Reset { .. }), "{error:?}");
}

#[tokio::test]
async fn an_error_event_says_what_the_engine_says() {
    let error = after_three_tokens(Fault::ErrorEvent { after_tokens: 3 }).await;
    assert_eq!(error.code(), ErrorCode::WorkerReset);
    assert!(
        error.to_string().contains("failed to get logits"),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_no_json_is_not_the_protocol() {
    let error = after_three_tokens(Fault::Garbage { after_tokens: 3 }).await;
    assert!(matches!(error, WorkerError::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn a_hang_in_mid_stream_is_a_timeout_for_the_next_token() {
    let error = after_three_tokens(Fault::Hang { after_tokens: 3 }).await;
    let WorkerError::Timeout { phase, after } = error else {
        panic!("{error:?}")
    };
    assert_eq!(
        (phase, after),
        (TimeoutPhase::NextToken, NEXT_TOKEN_TIMEOUT)
    );
}

#[tokio::test]
async fn a_hang_is_noticed_soon_after_another_tasks_prompt_is_over() {
    let engine = FakeEngine::start_with(
        &Script {
            first_token_ms: 500,
            fault: Some(Fault::Hang { after_tokens: 1 }),
            faulty_completions: Some(1),
            ..Script::default()
        },
        &["--parallel", "2"],
    );
    let adapter = adapter_with(&engine, |settings| {
        settings.next_token_timeout = NEXT_TOKEN_TIMEOUT;
    });
    let hangs = adapter.submit(task(5)).await.unwrap();
    // Still in its prompt when the one token of the other comes; at the speed that is
    // assumed before one was measured such a prompt takes minutes.
    let mut long = task(1);
    long.input = TaskInput::Prompt("long ".repeat(1_000));
    let other = adapter.submit(long).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), async {
        tokio::join!(Outcome::of(hangs), Outcome::of(other))
    });
    let (hung, other) = ended.await.expect("the hang is noticed");
    other.end();
    assert!(matches!(
        hung.error,
        Some(WorkerError::Timeout {
            phase: TimeoutPhase::NextToken,
            ..
        })
    ));
}

/// Reads one request, and whether it is a completion.
fn reads_completion(stream: &mut TcpStream) -> bool {
    let (mut request, mut scratch) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        let read = stream.read(&mut scratch).unwrap();
        request.extend_from_slice(&scratch[..read]);
        let text = String::from_utf8_lossy(&request);
        if text.starts_with("GET ") {
            return false;
        }
        if read == 0 || text.ends_with('}') {
            return true;
        }
    }
}

/// An engine that writes the whole of its answer to a completion at once, in events of
/// some three kilobytes.
fn hasty_engine(tokens: usize) -> (String, mpsc::Receiver<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (told, written) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if !reads_completion(&mut stream) {
                let answer = b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                stream.write_all(answer).unwrap();
                continue;
            }
            let token = format!("data: {{\"content\":\"{}\"}}\n\n", "x".repeat(3000));
            let mut answer = "HTTP/1.1 200 OK\r\n\r\n".to_owned() + &token.repeat(tokens);
            answer += "data: {\"content\":\"\",\"stop\":true}\n\n";
            stream.write_all(answer.as_bytes()).unwrap();
            told.send(()).unwrap();
            // Until the client has gone.
            while stream.read(&mut [0]).is_ok_and(|read| read > 0) {}
        }
    });
    (url, written)
}

#[tokio::test]
async fn an_engine_is_not_late_for_a_reader_that_was_away() {
    let (url, written) = hasty_engine(12);
    let mut settings = AdapterSettings::new(url);
    settings.next_token_timeout = Duration::from_millis(50);
    let adapter = LlamaCppAdapter::new(settings).unwrap();
    let mut stream = adapter.submit(task(12)).await.unwrap();
    written.recv().unwrap();
    let mut tokens = 0;
    while let Some(event) = stream.next().await {
        tokens += usize::from(matches!(event.unwrap(), TokenEvent::Token { .. }));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(tokens, 12);
}

#[tokio::test]
async fn no_first_token_is_a_timeout_and_frees_the_slot() {
    for late_headers in [false, true] {
        let script = Script {
            first_token_ms: 60_000,
            late_headers,
            ..Script::default()
        };
        let engine = FakeEngine::start(&script);
        let adapter = adapter_with(&engine, |settings| {
            settings.first_token_timeout = Duration::from_millis(400);
        });
        let error = failure(&adapter, task(3)).await;
        let WorkerError::Timeout { phase, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(phase, TimeoutPhase::FirstToken);
        support::until("the slot is free", || engine.busy_slots() == 0).await;
    }
}

#[tokio::test]
async fn a_crash_before_the_first_token_is_a_reset_and_not_tried_again() {
    for late_headers in [false, true] {
        let script = Script {
            late_headers,
            ..faulty(Fault::Cut { after_tokens: 0 })
        };
        let engine = FakeEngine::start(&script);
        let error = failure(&adapter(&engine), task(3)).await;
        assert!(matches!(error, WorkerError::Reset { .. }), "{error:?}");
        assert_eq!(engine.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_500_of_a_healthy_engine_is_a_reset_and_not_tried_again() {
    let engine = FakeEngine::start(&faulty(Fault::Status500));
    let adapter = adapter(&engine);
    let error = adapter.submit(task(3)).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::WorkerReset);
    assert_eq!(adapter.health().await.unwrap(), EngineHealth::Ready);
    assert_eq!(engine.requests().len(), 1);
    assert_eq!(adapter.running(), 0);
}

#[tokio::test]
async fn a_loading_engine_is_an_answer_for_health_and_an_error_for_tasks() {
    let engine = FakeEngine::launch(
        &Script {
            load_hang: true,
            ..Script::default()
        },
        &[],
    );
    let adapter = adapter(&engine);
    assert_eq!(adapter.health().await.unwrap(), EngineHealth::Loading);
    assert_eq!(
        adapter.props().await.unwrap_err().code(),
        ErrorCode::PoolUnready
    );
    let error = failure(&adapter, task(3)).await;
    assert!(matches!(error, WorkerError::Loading { .. }), "{error:?}");
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_unreachable() {
    let mut engine = FakeEngine::start(&Script::default());
    let adapter = adapter(&engine);
    engine.kill();
    for error in [
        failure(&adapter, task(3)).await,
        adapter.health().await.unwrap_err(),
        adapter
            .count_tokens(&TaskInput::Prompt("x".into()))
            .await
            .unwrap_err(),
    ] {
        assert!(
            matches!(error, WorkerError::Unreachable { .. }),
            "{error:?}"
        );
        assert!(std::error::Error::source(&error).is_some());
    }
}

#[tokio::test]
async fn an_engine_that_never_answers_is_a_timeout() {
    // The system accepts the connection; nobody ever reads from it.
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut settings = AdapterSettings::new(format!("http://{}/", listener.local_addr().unwrap()));
    settings.response_timeout = Duration::from_millis(100);
    let adapter = LlamaCppAdapter::new(settings).unwrap();
    let error = adapter.health().await.unwrap_err();
    let WorkerError::Timeout { phase, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(phase, TimeoutPhase::Response);
}

#[tokio::test]
async fn too_long_a_prompt_is_told_with_its_figures() {
    let engine = FakeEngine::start_with(&Script::default(), &["-c", "3"]);
    let error = adapter(&engine).submit(task(3)).await.err().unwrap();
    let WorkerError::ContextLengthExceeded { prompt_tokens, ctx } = error else {
        panic!("{error:?}")
    };
    assert_eq!((prompt_tokens, ctx), (3, 3));
}

#[tokio::test]
async fn grammar_and_schema_together_are_refused() {
    let engine = FakeEngine::start(&Script::default());
    let mut task = task(3);
    task.sampling.grammar = Some("root ::= \"a\"".into());
    task.sampling.json_schema = Some(serde_json::json!({}));
    let error = adapter(&engine).submit(task).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::InvalidParams);
    assert!(engine.requests().is_empty());
}

#[tokio::test]
async fn one_task_runs_only_once_at_a_time() {
    let engine = FakeEngine::start_with(&Script::endless(5), &["--parallel", "2"]);
    let adapter = adapter(&engine);
    let mut task = task(1000);
    task.id = TaskId::generate();
    let first = adapter.submit(task.clone()).await.unwrap();
    let error = adapter.submit(task.clone()).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::InvalidParams);
    drop(first);
    drop(adapter.submit(task).await.unwrap());
}

#[tokio::test]
async fn a_probe_fails_where_the_engine_answers_nobody() {
    let limit = Duration::from_millis(300);
    let hung = FakeEngine::start(&Script {
        first_token_ms: 60_000,
        ..Script::default()
    });
    let error = adapter(&hung).probe(limit).await.unwrap_err();
    assert!(matches!(error, WorkerError::Timeout { .. }), "{error:?}");
    let failing = FakeEngine::start(&faulty(Fault::Status500));
    let error = adapter(&failing).probe(limit).await.unwrap_err();
    assert!(error.casts_doubt(), "{error:?}");
}

#[tokio::test]
async fn more_text_than_was_asked_for_is_not_the_protocol() {
    let long = "x".repeat(100_000);
    let engine = FakeEngine::start(&Script::with_pieces(&[&long]));
    let error = failure(&adapter(&engine), task(1)).await;
    assert!(matches!(error, WorkerError::Protocol { .. }), "{error:?}");
}
