//! Calls through the adapter, against a fake engine in a process of its own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use support::{Outcome, adapter, adapter_with, failure, task, until};
use test_harness_fake_engine::{FakeEngine, Fault, Script};
use worker_adapters_adapter_api::{
    CallAnswer, CallApi, CallChunk, CancelReport, EngineCall, EngineTask, FinishReason, TaskInput,
    TimeoutPhase, TokenEvent, WorkerAdapter, WorkerError,
};
use worker_adapters_llamacpp_http::LlamaCppAdapter;

const GENERATING: [CallApi; 4] = [
    CallApi::ChatCompletions,
    CallApi::Completions,
    CallApi::Responses,
    CallApi::Messages,
];

/// A request of few words, as each API has it.
fn request(api: CallApi, stream: bool) -> Value {
    let messages = json!([{"role": "user", "content": "count for me"}]);
    match api {
        CallApi::ChatCompletions => json!({"messages": messages, "stream": stream}),
        CallApi::Completions => json!({"prompt": "count for me", "stream": stream}),
        CallApi::Responses => json!({"input": messages, "stream": stream}),
        CallApi::Messages => json!({"messages": messages, "max_tokens": 5000, "stream": stream}),
        CallApi::CountTokens => json!({"messages": messages}),
        CallApi::Embeddings => json!({"input": ["one", "two words"]}),
        CallApi::Rerank => json!({"query": "a", "documents": ["one", "two"]}),
        CallApi::Tokenize => json!({"content": "a b c"}),
        CallApi::Detokenize => json!({"tokens": [1, 2]}),
    }
}

fn call_of(api: CallApi, body: &Value, stream: bool) -> EngineTask {
    let call = EngineCall {
        api,
        body: body.to_string().into(),
        stream,
    };
    EngineTask {
        input: TaskInput::Call(call),
        ..task(1)
    }
}

fn call(api: CallApi, stream: bool) -> EngineTask {
    call_of(api, &request(api, stream), stream)
}

fn chunks(outcome: &Outcome) -> Vec<&CallChunk> {
    let chunks = outcome.events.iter().filter_map(|event| match event {
        TokenEvent::Chunk(chunk) => Some(chunk),
        _ => None,
    });
    chunks.collect()
}

fn text(outcome: &Outcome) -> String {
    chunks(outcome).iter().map(|chunk| &*chunk.text).collect()
}

async fn run(adapter: &LlamaCppAdapter, task: EngineTask) -> Outcome {
    Outcome::of(adapter.submit(task).await.unwrap()).await
}

async fn answer(adapter: &LlamaCppAdapter, task: EngineTask) -> (CallAnswer, Outcome) {
    let outcome = run(adapter, task).await;
    assert!(outcome.error.is_none(), "{:?}", outcome.error);
    let [
        TokenEvent::Started,
        TokenEvent::Answer(answer),
        TokenEvent::End(_),
    ] = &outcome.events[..]
    else {
        panic!("{:?}", outcome.events)
    };
    (answer.clone(), outcome)
}

#[tokio::test]
async fn every_stream_is_handed_on_event_by_event() {
    let script = Script {
        progress_events: 3,
        // Through the middle of characters and of event names.
        chunk_bytes: 7,
        ..Script::with_pieces(&["Hä", "llo ", "\"you\"\n"])
    };
    let engine = FakeEngine::start_with(&script, &["--parallel", "2"]);
    let adapter = adapter(&engine);
    for api in GENERATING {
        let outcome = run(&adapter, call(api, true)).await;
        assert_eq!(outcome.events[0], TokenEvent::Started);
        let end = outcome.end();
        assert_eq!(
            (end.tokens_in, end.tokens_out, end.finish_reason),
            (3, 3, FinishReason::Stop),
            "{api:?}"
        );
        assert_eq!(text(&outcome), "Hällo \"you\"\n", "{api:?}");
        let chunks = chunks(&outcome);
        for chunk in &chunks {
            let data: Value = serde_json::from_str(&chunk.data).unwrap();
            assert!(data.get("prompt_progress").is_none(), "{api:?}: {data}");
            let kind = data.get("type").and_then(Value::as_str);
            assert_eq!(chunk.name.as_deref(), kind, "{api:?}");
        }
        let names: Vec<_> = chunks
            .iter()
            .filter_map(|chunk| chunk.name.as_deref())
            .collect();
        match api {
            CallApi::Responses => {
                assert_eq!(
                    names[..3],
                    [
                        "response.created",
                        "response.in_progress",
                        "response.output_item.added"
                    ]
                );
                assert_eq!(names.last(), Some(&"response.completed"));
            }
            CallApi::Messages => {
                assert_eq!(names.first(), Some(&"message_start"));
                assert_eq!(names.last(), Some(&"message_stop"));
            }
            _ => assert_eq!(names, [""; 0]),
        }
        assert_eq!(adapter.running(), 0);
    }
}

#[tokio::test]
async fn a_body_gets_there_with_no_more_than_ours_added() {
    let engine = FakeEngine::start_with(&Script::default(), &["--parallel", "2"]);
    let adapter = adapter(&engine);
    for api in GENERATING {
        let mut body = request(api, true);
        body["max_tokens"] = json!(2);
        body["max_output_tokens"] = json!(2);
        body["unheard_of"] = json!({"a": [1.5, null]});
        let outcome = run(&adapter, call_of(api, &body, true)).await;
        assert_eq!(
            outcome.end().finish_reason,
            if api == CallApi::Responses {
                // Its last event does not say.
                FinishReason::Stop
            } else {
                FinishReason::Length
            }
        );
        let mut sent = engine.requests().pop().unwrap();
        if api != CallApi::Messages {
            let sent = sent.as_object_mut().unwrap();
            assert_eq!(sent.remove("return_progress"), Some(json!(true)));
            assert!(sent.remove("dynatemp_exponent").unwrap().as_u64() > Some(1));
        }
        assert_eq!(sent, body, "{api:?}");
    }
}

#[tokio::test]
async fn who_asks_for_progress_sees_it() {
    let script = Script {
        progress_events: 3,
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let adapter = adapter(&engine);
    for api in [CallApi::ChatCompletions, CallApi::Responses] {
        let mut body = request(api, true);
        body["return_progress"] = json!(true);
        let outcome = run(&adapter, call_of(api, &body, true)).await;
        let shown = chunks(&outcome)
            .iter()
            .filter(|chunk| chunk.data.contains("prompt_progress"))
            .count();
        assert_eq!(shown, 3, "{api:?}");
    }
}

#[tokio::test]
async fn usage_is_handed_on_where_it_was_asked_for() {
    let engine = FakeEngine::start(&Script::default());
    let adapter = adapter(&engine);
    let mut body = request(CallApi::ChatCompletions, true);
    body["stream_options"] = json!({"include_usage": true});
    body["max_tokens"] = json!(4);
    let outcome = run(&adapter, call_of(CallApi::ChatCompletions, &body, true)).await;
    let last: Value = serde_json::from_str(&chunks(&outcome).last().unwrap().data).unwrap();
    assert_eq!(last["usage"]["completion_tokens"], 4);
    let end = outcome.end();
    assert_eq!((end.tokens_in, end.tokens_out), (3, 4));
    assert_eq!(end.finish_reason, FinishReason::Length);
}

#[tokio::test]
async fn an_answer_in_one_piece_comes_as_the_engine_wrote_it() {
    let engine = FakeEngine::start_with(
        &Script::with_pieces(&["Hä", "llo"]),
        &["--reranking", "--parallel", "2"],
    );
    let adapter = adapter(&engine);
    for api in GENERATING {
        let (answer, outcome) = answer(&adapter, call(api, false)).await;
        assert_eq!(answer.text, "Hällo", "{api:?}");
        let end = outcome.end();
        assert_eq!((end.tokens_in, end.tokens_out), (3, 2), "{api:?}");
    }
    for (api, holds) in [
        (CallApi::CountTokens, "input_tokens"),
        (CallApi::Embeddings, "embedding"),
        (CallApi::Rerank, "relevance_score"),
        (CallApi::Tokenize, "tokens"),
        (CallApi::Detokenize, "content"),
    ] {
        // Whether it streams is asked of what generates text only.
        let (answer, outcome) = answer(&adapter, call_of(api, &request(api, false), true)).await;
        let body = String::from_utf8(answer.body.to_vec()).unwrap();
        assert!(body.contains(holds) && answer.text.is_empty(), "{body}");
        assert_eq!(outcome.end().tokens_out, 0);
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_the_engines_words() {
    let engine = FakeEngine::start_with(&Script::default(), &["--ctx-size", "16"]);
    let adapter = adapter(&engine);
    let mut body = request(CallApi::ChatCompletions, true);
    body["grammar"] = json!("(");
    let error = failure(&adapter, call_of(CallApi::ChatCompletions, &body, true)).await;
    let WorkerError::InvalidParams { message } = error else {
        panic!("{error:?}")
    };
    assert!(message.contains("failed to parse grammar"), "{message}");
    let long = json!({"prompt": "a ".repeat(20)});
    let error = failure(&adapter, call_of(CallApi::Completions, &long, false)).await;
    assert!(
        matches!(
            error,
            WorkerError::ContextLengthExceeded {
                prompt_tokens: 20,
                ctx: 16
            }
        ),
        "{error:?}"
    );
    let error = failure(&adapter, call(CallApi::Embeddings, false)).await;
    assert!(
        matches!(error, WorkerError::InvalidParams { .. }),
        "{error:?}"
    );
    let nothing = EngineCall {
        api: CallApi::ChatCompletions,
        body: "[]".into(),
        stream: true,
    };
    let task = EngineTask {
        input: TaskInput::Call(nothing),
        ..task(1)
    };
    let error = failure(&adapter, task).await;
    assert!(
        matches!(error, WorkerError::InvalidParams { .. }),
        "{error:?}"
    );
    assert_eq!(adapter.running(), 0);
}

#[tokio::test]
async fn a_clients_mistake_is_not_the_engines_fault_whatever_the_engine_says() {
    let engine = FakeEngine::start(&Script::default());
    let adapter = adapter(&engine);
    // This engine answers 500 to it, as the real one does.
    let without = json!({"max_tokens": 1});
    let error = failure(&adapter, call_of(CallApi::Messages, &without, false)).await;
    let WorkerError::InvalidParams { message } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(message, "'messages' is required");
    assert!(!error.casts_doubt());
    // An engine that fails its probe as well is to blame.
    let broken = FakeEngine::start(&Script {
        fault: Some(Fault::Status500),
        ..Script::default()
    });
    let adapter = support::adapter(&broken);
    let error = failure(&adapter, call(CallApi::ChatCompletions, true)).await;
    assert!(matches!(error, WorkerError::Reset { .. }), "{error:?}");
}

#[tokio::test]
async fn a_stream_that_breaks_off_never_looks_whole() {
    for fault in [
        Fault::Crash {
            after_tokens: 3,
            exit_code: 1,
        },
        Fault::Cut { after_tokens: 3 },
        Fault::EndWithoutFinal { after_tokens: 3 },
        Fault::ErrorEvent { after_tokens: 3 },
        Fault::Garbage { after_tokens: 3 },
    ] {
        for api in GENERATING {
            let engine = FakeEngine::start(&Script {
                fault: Some(fault.clone()),
                ..Script::default()
            });
            let adapter = adapter(&engine);
            let outcome = run(&adapter, call(api, true)).await;
            assert_eq!(text(&outcome), "A fake engine ", "{fault:?} {api:?}");
            let error = outcome.error.expect("it fails");
            let expected = match fault {
                Fault::Garbage { .. } => matches!(error, WorkerError::Protocol { .. }),
                _ => matches!(error, WorkerError::Reset { .. }),
            };
            assert!(expected, "{fault:?} {api:?}: {error:?}");
            assert_eq!(adapter.running(), 0);
        }
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_never_looks_whole() {
    for fault in [
        Fault::Crash {
            after_tokens: 1,
            exit_code: 1,
        },
        Fault::Cut { after_tokens: 1 },
        Fault::EndWithoutFinal { after_tokens: 1 },
        Fault::Garbage { after_tokens: 1 },
    ] {
        let engine = FakeEngine::start(&Script {
            fault: Some(fault.clone()),
            ..Script::default()
        });
        let error = failure(&adapter(&engine), call(CallApi::ChatCompletions, false)).await;
        assert!(error.casts_doubt(), "{fault:?}: {error:?}");
    }
}

/// Waits a moment only, and looks often.
fn impatient(engine: &FakeEngine) -> LlamaCppAdapter {
    adapter_with(engine, |settings| {
        settings.first_token_timeout = Duration::from_millis(700);
        settings.next_token_timeout = Duration::from_millis(700);
        settings.look_interval = Duration::from_millis(50);
    })
}

#[tokio::test]
async fn a_slow_engine_is_waited_for() {
    // Its own slot is known by its tag where there are several.
    let waits = ["1", "2"].map(async |slots| {
        let engine = FakeEngine::start_with(&Script::endless(100), &["--parallel", slots]);
        let adapter = impatient(&engine);
        let mut body = request(CallApi::ChatCompletions, false);
        // Three times as long as it would be waited for without a sign of life.
        body["max_tokens"] = json!(21);
        let task = call_of(CallApi::ChatCompletions, &body, false);
        let (_, outcome) = answer(&adapter, task).await;
        assert_eq!(outcome.end().tokens_out, 21);
    });
    futures::future::join_all(waits).await;
}

#[tokio::test]
async fn a_hung_engine_is_noticed() {
    let hung = Script {
        fault: Some(Fault::Hang { after_tokens: 2 }),
        ..Script::default()
    };
    let engine = FakeEngine::start_with(&hung, &["--parallel", "4"]);
    let adapter = impatient(&engine);
    let waits = [true, false].map(async |stream| {
        let error = failure(&adapter, call(CallApi::ChatCompletions, stream)).await;
        let WorkerError::Timeout { phase, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(phase, TimeoutPhase::NextToken, "{stream}");
    });
    futures::future::join_all(waits).await;
}

#[tokio::test]
async fn a_cancelled_call_frees_its_slot() {
    let engine = FakeEngine::start_with(&Script::endless(5), &["--parallel", "3"]);
    let adapter = adapter(&engine);
    let mut other = adapter
        .submit(call(CallApi::ChatCompletions, true))
        .await
        .unwrap();
    let mut busy = 1;
    for api in GENERATING {
        // The engine takes a second to see who waits for a whole answer go.
        let known = [CallApi::ChatCompletions, CallApi::Messages].contains(&api);
        for stream in [true, false].into_iter().filter(|stream| *stream || known) {
            let task = call(api, stream);
            let id = task.id;
            let mut events = adapter.submit(task).await.unwrap();
            if stream {
                while !matches!(events.next().await, Some(Ok(TokenEvent::Chunk(_)))) {}
            }
            until("it is in its slot", || engine.busy_slots() == busy + 1).await;
            let drained = async {
                let mut last = None;
                while let Some(event) = events.next().await {
                    last = Some(event);
                }
                last
            };
            // The other goes on all the while.
            let (report, last) = tokio::join!(adapter.cancel(id), drained);
            assert!(
                matches!(last, Some(Err(WorkerError::Cancelled))),
                "{last:?}"
            );
            assert!(
                matches!(report.unwrap(), CancelReport::Freed { .. }),
                "{api:?} {stream}"
            );
            until("the slot is free", || engine.busy_slots() == busy).await;
        }
    }
    while !matches!(other.next().await, Some(Ok(TokenEvent::Chunk(_)))) {}
    drop(other);
    busy = 0;
    until("all is free", || engine.busy_slots() == busy).await;
}
