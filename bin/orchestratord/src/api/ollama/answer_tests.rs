use bytestring::ByteString;

use super::*;
use crate::services::event_log::{Chunk, EngineSays, Receipt, Started, TaskEvent, Token};
use serde_json::json;

pub(in super::super) fn chunk(data: &Value) -> TaskEvent {
    TaskEvent::Chunk(Chunk {
        name: None,
        data: data.to_string().into(),
        token: Token {
            t: ByteString::new(),
            i: 0,
        },
    })
}

pub(in super::super) fn delta(delta: &Value) -> TaskEvent {
    chunk(&json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null}]}))
}

pub(in super::super) fn end(finish_reason: FinishReason) -> TaskEvent {
    TaskEvent::End(Box::new(End {
        tokens_in: Some(5),
        tokens_out: 2,
        decode_time_ms: 12.5,
        finish_reason,
        resumed: 0,
        receipt: Some(Receipt {
            engine: "llamacpp".to_owned(),
            engine_version: "b1".to_owned(),
            engine_digest: None,
            provisioning_mode: "cache".to_owned(),
            model: None,
            model_digest: None,
            replica: None,
            engine_says: Some(EngineSays {
                tokens_cached: 0,
                prompt_time_ms: 3.0,
                effective: Value::Null,
            }),
        }),
    }))
}

pub(in super::super) fn started(waited_ms: u64) -> TaskEvent {
    TaskEvent::Started(Started {
        queue_position: 0,
        predicted_start_ms: 0,
        waited_ms,
    })
}

/// What comes of the last event.
fn last(events: &[TaskEvent]) -> Step<'static> {
    let mut reading = Reading::default();
    let steps = events.iter().map(|event| reading.step(event.view()));
    match steps.last().unwrap() {
        Step::Piece(piece) => {
            let mut kept = Piece::default();
            kept.extend(piece);
            Step::Piece(kept)
        }
        Step::Nothing => Step::Nothing,
        Step::Done(held_back, figures) => Step::Done(held_back, figures),
        Step::Failed(failure) => Step::Failed(failure),
    }
}

#[test]
fn figures_come_from_the_log() {
    let done = last(&[
        started(40),
        delta(&json!({"content": "a"})),
        end(FinishReason::Stop),
    ]);
    let expected = Figures {
        done_reason: "stop",
        load: Duration::from_millis(40),
        prompt_tokens: 5,
        prompt: Duration::from_millis(3),
        tokens: 2,
        decode: Duration::from_micros(12_500),
    };
    assert_eq!(done, Step::Done(Piece::default(), expected));
}

#[test]
fn a_tool_call_is_put_together_and_told_before_the_end() {
    let call = |index: u64, rest: Value| {
        let mut call = rest;
        call["index"] = index.into();
        delta(&json!({"tool_calls": [call]}))
    };
    let done = last(&[
        call(
            0,
            json!({"id": "x", "function": {"name": "f", "arguments": ""}}),
        ),
        call(1, json!({"id": "y", "function": {"name": "g"}})),
        call(0, json!({"function": {"arguments": "{\"city\":"}})),
        call(0, json!({"function": {"arguments": "\"Oslo\"}"}})),
        end(FinishReason::Stop),
    ]);
    let Step::Done(piece, _) = done else {
        panic!("{done:?}")
    };
    let expected = json!([
        {"id": "x", "function": {"index": 0, "name": "f", "arguments": {"city": "Oslo"}}},
        {"id": "y", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]);
    assert_eq!(serde_json::to_value(piece.tool_calls).unwrap(), expected);
}

#[test]
fn a_call_that_was_cut_is_an_error() {
    let cut = json!({"tool_calls": [{"function": {"name": "f", "arguments": "{\"ci"}}]});
    let failed = last(&[delta(&cut), end(FinishReason::Length)]);
    let Step::Failed(failure) = failed else {
        panic!("{failed:?}")
    };
    assert!(failure.message.contains("`f`"), "{failure:?}");
    assert!(failure.hint.unwrap().contains("num_predict"));
}

#[test]
fn thoughts_and_log_probabilities_are_told_apart() {
    let thought = last(&[delta(&json!({"content": null, "reasoning_content": "hm"}))]);
    let Step::Piece(piece) = thought else {
        panic!("{thought:?}")
    };
    assert_eq!((&*piece.thinking, &*piece.text), ("hm", ""));
    let logprobs = json!({"content": [{"token": "a", "logprob": -1.0}]});
    let text = last(&[chunk(
        &json!({"choices": [{"text": "a", "logprobs": logprobs}]}),
    )]);
    let Step::Piece(piece) = text else {
        panic!("{text:?}")
    };
    assert_eq!(piece.text, "a");
    assert_eq!(piece.logprobs[0]["token"], "a");
}

#[test]
fn what_is_no_answer_is_an_error() {
    for data in [json!("x"), json!({"error": {"message": "no"}})] {
        assert!(matches!(last(&[chunk(&data)]), Step::Failed(_)), "{data}");
    }
    assert!(matches!(
        last(&[end(FinishReason::Cancelled)]),
        Step::Failed(failure) if failure.code == ErrorCode::Cancelled
    ));
    let usage = json!({"choices": [], "usage": {"completion_tokens": 2}});
    assert_eq!(last(&[chunk(&usage)]), Step::Nothing);
}
