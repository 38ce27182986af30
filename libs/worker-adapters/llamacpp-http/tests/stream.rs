//! Tasks that go well, against a fake engine in a process of its own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;

use serde_json::json;
use support::{adapter, adapter_with, run, task};
use test_harness_fake_engine::{FakeEngine, Fault, Script};
use worker_adapters_adapter_api::{
    ChatMessage, EngineHealth, FinishReason, SamplingParams, TaskInput, TokenEvent, WorkerAdapter,
};
use worker_adapters_llamacpp_http::Secret;

fn messages() -> TaskInput {
    let message = |role: &str, content: &str| ChatMessage {
        role: role.into(),
        content: content.into(),
    };
    TaskInput::Messages(vec![
        message("system", "Be brief."),
        message("user", "Hello there"),
    ])
}

#[tokio::test]
async fn a_task_starts_gives_tokens_and_ends() {
    let engine = FakeEngine::start(&Script::with_pieces(&["one", " two", " three"]));
    let outcome = run(&adapter(&engine), task(10)).await;
    assert_eq!(outcome.events.first(), Some(&TokenEvent::Started));
    assert_eq!(outcome.pieces(), ["one", " two", " three"]);
    let end = outcome.end();
    assert_eq!(
        (end.tokens_in, end.tokens_out, end.finish_reason),
        (3, 3, FinishReason::Stop)
    );
    assert_eq!(end.effective["n_predict"], 10);
    assert!(end.effective.get("prompt").is_none());
}

#[tokio::test]
async fn max_tokens_ends_it_as_length() {
    let engine = FakeEngine::start(&Script::endless(0));
    let outcome = run(&adapter(&engine), task(20)).await;
    assert_eq!(outcome.pieces().len(), 20);
    assert_eq!(
        (outcome.end().finish_reason, outcome.end().tokens_out),
        (FinishReason::Length, 20)
    );
}

#[tokio::test]
async fn sampling_reaches_the_engine_and_comes_back_as_effective() {
    let engine = FakeEngine::start(&Script::default());
    let mut task = task(4);
    task.stop = vec!["\n\n".to_owned()];
    task.sampling = SamplingParams {
        seed: Some(42),
        temperature: Some(0.25),
        top_p: Some(0.5),
        top_k: Some(7),
        min_p: Some(0.125),
        repeat_penalty: Some(1.5),
        grammar: None,
        json_schema: Some(json!({"type": "object"})),
    };
    let outcome = run(&adapter(&engine), task).await;
    let sent = engine.requests().remove(0);
    let expected = json!({
        "seed": 42, "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repeat_penalty": 1.5,
        "json_schema": {"type": "object"}, "stop": ["\n\n"], "n_predict": 4, "stream": true,
        "cache_prompt": true, "prompt": "count for me",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&sent[key], value, "{key}");
    }
    assert!(sent.get("grammar").is_none());
    assert_eq!(outcome.end().effective["seed"], 42);
    assert_eq!(outcome.end().effective["temperature"], 0.25);
}

#[tokio::test]
async fn a_conversation_goes_through_the_engines_own_template() {
    let engine = FakeEngine::start(&Script::default());
    let adapter = adapter(&engine);
    let mut task = task(2);
    task.input = messages();
    run(&adapter, task).await.end();
    let prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(engine.requests()[0]["prompt"], prompt);
    let words = prompt.split_whitespace().count();
    assert_eq!(
        adapter.count_tokens(&messages()).await.unwrap() as usize,
        words
    );
    let plain = TaskInput::Prompt("a b c".to_owned());
    assert_eq!(adapter.count_tokens(&plain).await.unwrap(), 3);
}

#[tokio::test]
async fn characters_cut_by_tcp_writes_arrive_whole() {
    let pieces = ["日本語", " Grüße", " 👩‍🚀", " naïve", " \u{1F1EF}\u{1F1F5}"];
    for chunk_bytes in [1, 7] {
        let script = Script {
            chunk_bytes,
            ..Script::with_pieces(&pieces)
        };
        let engine = FakeEngine::start(&script);
        let outcome = run(&adapter(&engine), task(9)).await;
        assert_eq!(outcome.pieces(), pieces);
        outcome.end();
    }
}

#[tokio::test]
async fn empty_pieces_make_no_token() {
    let engine = FakeEngine::start(&Script::with_pieces(&["", "a", "", "", "b", ""]));
    let outcome = run(&adapter(&engine), task(9)).await;
    assert_eq!(outcome.pieces(), ["a", "b"]);
    assert_eq!(outcome.end().tokens_out, 6, "the engine's own count");
}

#[tokio::test]
async fn metrics_come_between_tokens_but_not_more_often_than_asked() {
    let engine = FakeEngine::start(&Script::endless(5));
    let interval = Duration::from_millis(40);
    let adapter = adapter_with(&engine, |settings| settings.metrics_interval = interval);
    let outcome = run(&adapter, task(40)).await;
    let told: Vec<_> = outcome
        .events
        .iter()
        .filter_map(|event| match event {
            TokenEvent::Metrics(snapshot) => Some(*snapshot),
            _ => None,
        })
        .collect();
    assert!(told.len() >= 2, "{told:?}");
    assert!(told.iter().all(|snapshot| snapshot.tokens_in == 3));
    assert!(
        told.windows(2)
            .all(|pair| pair[0].tokens_out < pair[1].tokens_out)
    );
    // Milliseconds are cut off, so two may seem one closer than they were.
    assert!(
        told.windows(2)
            .all(|pair| pair[1].elapsed_ms - pair[0].elapsed_ms >= 39),
        "{told:?}"
    );
}

#[tokio::test]
async fn questions_share_a_connection_and_streams_have_their_own() {
    let engine = FakeEngine::start(&Script::default());
    let adapter = adapter(&engine);
    let before = engine.connections();
    for _ in 0..5 {
        adapter.engine_version().await.unwrap();
    }
    // One of ours, and the question about it.
    let between = engine.connections();
    assert_eq!(between - before, 2);
    // The real engine closes a connection after a stream without a word. The
    // first stream may take over the questions' connection.
    for _ in 0..5 {
        run(&adapter, task(4)).await.end();
    }
    assert!(engine.connections() - between >= 5);
}

#[tokio::test]
async fn a_long_prompt_counts_as_taken_before_its_first_token() {
    for late_headers in [false, true] {
        let script = Script {
            first_token_ms: 60_000,
            late_headers,
            ..Script::default()
        };
        let engine = FakeEngine::start(&script);
        let limit = Duration::from_secs(20);
        let mut stream = tokio::time::timeout(limit, adapter(&engine).submit(task(3)))
            .await
            .expect("submit does not wait for the first token")
            .unwrap();
        let started = futures::StreamExt::next(&mut stream).await.unwrap();
        assert_eq!(started.unwrap(), TokenEvent::Started);
        assert_eq!(engine.busy_slots(), 1);
    }
}

#[tokio::test]
async fn the_engine_says_what_it_is() {
    let engine = FakeEngine::start_with(
        &Script::default(),
        &["--parallel", "4", "-c", "4096", "-m", "/models/a.gguf"],
    );
    let adapter = adapter(&engine);
    assert_eq!(adapter.health().await.unwrap(), EngineHealth::Ready);
    assert_eq!(adapter.engine_version().await.unwrap(), "b11434");
    let props = adapter.props().await.unwrap();
    assert_eq!((props.ctx, props.slots), (1024, 4));
    assert_eq!(props.model_path.as_deref(), Some("/models/a.gguf"));
}

#[tokio::test]
async fn an_engine_that_has_just_finished_loading_is_waited_for() {
    let script = Script {
        fault: Some(Fault::Status503),
        faulty_completions: Some(2),
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    run(&adapter(&engine), task(2)).await.end();
    assert_eq!(engine.requests().len(), 3);
}

#[tokio::test]
async fn the_key_is_sent_but_never_shown() {
    let engine = FakeEngine::start_with(&Script::default(), &["--api-key", "s3cret-key"]);
    let adapter = adapter_with(&engine, |settings| {
        settings.bearer = Some(Secret::new("s3cret-key"));
    });
    run(&adapter, task(2)).await.end();
    assert!(!format!("{adapter:?}").contains("s3cret"));
    let without = support::adapter(&engine);
    let error = support::failure(&without, task(2)).await;
    assert!(
        error.to_string().contains("authentication_error"),
        "{error}"
    );
}

#[tokio::test]
async fn words_about_the_prompt_are_no_tokens_and_keep_the_task_alive() {
    let script = Script {
        first_token_ms: 1500,
        progress_events: 15,
        ..Script::with_pieces(&["a", "b"])
    };
    let engine = FakeEngine::start(&script);
    // Less than the prompt takes, and more than one word to the next.
    let adapter = adapter_with(&engine, |settings| {
        settings.first_token_timeout = Duration::from_secs(1);
    });
    let outcome = run(&adapter, task(9)).await;
    assert_eq!(outcome.pieces(), ["a", "b"]);
    let started = |event: &&TokenEvent| **event == TokenEvent::Started;
    assert_eq!(outcome.events.iter().filter(started).count(), 1);
    outcome.end();
}

#[tokio::test]
async fn an_answer_is_gone_on_with_from_what_was_sent() {
    let engine = FakeEngine::start(&Script {
        continues: true,
        ..Script::with_pieces(&["one", " two", " three"])
    });
    let adapter = adapter(&engine);
    let mut task = task(10);
    task.input = messages();
    task.answered = "one two".to_owned();
    assert_eq!(run(&adapter, task).await.pieces(), [" three"]);
    let prompt = engine.requests()[0]["prompt"].as_str().unwrap().to_owned();
    assert!(prompt.ends_with("assistant\none two"), "{prompt}");
}

#[tokio::test]
async fn a_piece_says_how_many_tokens_it_took() {
    let engine = FakeEngine::start(&Script::with_pieces(&["a", "", "b"]));
    let outcome = run(&adapter(&engine), task(9)).await;
    let counted: Vec<(u64, u64)> = outcome
        .events
        .iter()
        .filter_map(|event| match event {
            TokenEvent::Token {
                tokens_in,
                tokens_out,
                ..
            } => Some((*tokens_in, *tokens_out)),
            _ => None,
        })
        .collect();
    assert_eq!(counted, [(3, 1), (3, 3)]);
}

#[tokio::test]
async fn a_probe_takes_one_token_past_the_cache() {
    let engine = FakeEngine::start(&Script::default());
    adapter(&engine)
        .probe(Duration::from_secs(20))
        .await
        .unwrap();
    let sent = engine.requests().remove(0);
    assert_eq!(sent["n_predict"], 1);
    assert_eq!(sent["cache_prompt"], false);
}
