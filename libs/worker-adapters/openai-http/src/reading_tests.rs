use super::*;

fn call(api: CallApi, usage_is_ours: bool) -> Reader {
    Reader::new(Kind::Call { api, usage_is_ours })
}

fn read(reader: &mut Reader, events: &[&str]) -> Vec<TokenEvent> {
    let mut out = VecDeque::new();
    for event in events {
        reader.take(event, &mut out).unwrap();
    }
    out.into()
}

fn texts(events: &[TokenEvent]) -> String {
    let text = |event: &TokenEvent| match event {
        TokenEvent::Token { text, .. } => text.to_string(),
        TokenEvent::Chunk(chunk) => chunk.text.to_string(),
        _ => String::new(),
    };
    events.iter().map(text).collect()
}

const CHAT: [&str; 5] = [
    r#"{"id":"c","model":"far","choices":[{"index":0,"delta":{"role":"assistant","content":null}}],"usage":null}"#,
    r#"{"choices":[{"index":0,"delta":{"content":"Hä"}},{"index":1,"delta":{"content":"no"}}],"usage":null}"#,
    r#"{"choices":[{"index":0,"delta":{"content":"llo"},"finish_reason":"length"}]}"#,
    r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":2}}}"#,
    "[DONE]",
];

#[test]
fn an_answer_without_an_end_is_given_up() {
    let mut reader = call(CallApi::ChatCompletions, false);
    let mut out = VecDeque::new();
    reader.event_bytes = STREAM_LIMIT - EVENT_COST - 2;
    reader.take("{}", &mut out).unwrap();
    let refused = reader.take("{}", &mut out);
    assert!(matches!(refused, Err(WorkerError::Protocol { .. })));
    assert_eq!(out.len(), 1);
}

#[test]
fn a_native_task_gets_tokens_and_the_servers_count() {
    let mut reader = Reader::new(Kind::Native { max_tokens: 9 });
    let events = read(&mut reader, &CHAT);
    assert_eq!(texts(&events), "Hällo");
    assert_eq!(events.len(), 2);
    assert!(reader.is_over());
    let end = reader.summary(1.0, 2.0);
    assert_eq!(
        (end.tokens_in, end.tokens_cached, end.tokens_out),
        (5, 2, 9)
    );
    assert_eq!(end.finish_reason, FinishReason::Length);
    assert_eq!(end.effective["model"], "far");
}

#[test]
fn the_count_reaches_only_clients_that_asked() {
    for (ours, chunks) in [(true, 3), (false, 4)] {
        let mut reader = call(CallApi::ChatCompletions, ours);
        let events = read(&mut reader, &CHAT);
        assert_eq!(events.len(), chunks);
        assert_eq!(reader.summary(0.0, 0.0).tokens_out, 9);
    }
}

#[test]
fn completions_are_text() {
    let mut reader = call(CallApi::Completions, true);
    let events = read(
        &mut reader,
        &[r#"{"choices":[{"text":"x","index":0,"finish_reason":null}]}"#],
    );
    assert_eq!(texts(&events), "x");
    assert!(!reader.may_end());
}

#[test]
fn named_events_keep_their_names() {
    let mut reader = call(CallApi::Messages, false);
    let events = read(
        &mut reader,
        &[
            r#"{"type":"message_start","message":{"model":"m","usage":{"input_tokens":4,"output_tokens":0}}}"#,
            r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"hi"}}"#,
            r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{"}}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":6}}"#,
            r#"{"type":"message_stop"}"#,
        ],
    );
    assert_eq!((events.len(), texts(&events)), (5, "hi".to_owned()));
    assert!(
        matches!(&events[4], TokenEvent::Chunk(chunk) if chunk.name.as_deref() == Some("message_stop"))
    );
    let end = reader.summary(0.0, 0.0);
    assert_eq!((end.tokens_in, end.tokens_out), (4, 6));
    assert_eq!(end.finish_reason, FinishReason::Length);

    let mut reader = call(CallApi::Responses, false);
    let events = read(
        &mut reader,
        &[
            r#"{"type":"response.created","response":{"model":"m","usage":null}}"#,
            r#"{"type":"response.output_text.delta","delta":"yo"}"#,
            r#"{"type":"response.completed","response":{"usage":{"input_tokens":1,"output_tokens":2}}}"#,
        ],
    );
    assert_eq!(texts(&events), "yo");
    assert!(reader.is_over());
    assert_eq!(reader.summary(0.0, 0.0).tokens_out, 2);
}

#[test]
fn whole_answers_of_every_api_give_their_text() {
    let whole = |body: &str| {
        let mut reader = call(CallApi::ChatCompletions, false);
        let answer = reader.take_whole(body.as_bytes().to_vec()).unwrap();
        assert_eq!(&answer.body[..], body.as_bytes());
        (answer.text, reader.summary(0.0, 0.0).tokens_out)
    };
    let chat = r#"{"choices":[{"message":{"content":"a"}}],"usage":{"completion_tokens":3}}"#;
    assert_eq!(whole(chat), ("a".to_owned(), 3));
    assert_eq!(whole(r#"{"choices":[{"text":"b"}]}"#).0, "b");
    assert_eq!(whole(r#"{"content":[{"type":"text","text":"c"}]}"#).0, "c");
    assert_eq!(
        whole(r#"{"output":[{"type":"message","content":[{"text":"d"}]}]}"#).0,
        "d"
    );
    assert_eq!(whole(r#"{"data":[{"embedding":[1.0]}]}"#).0, "");
    assert_eq!(whole(r#"{"choices":[{"message":{"content":null}}]}"#).0, "");
    assert_eq!(whole("[1]").0, "");
    let mut reader = call(CallApi::Embeddings, false);
    assert!(reader.take_whole(b"<html>".to_vec()).is_err());
}

#[test]
fn an_error_event_is_the_servers_failure() {
    let mut reader = Reader::new(Kind::Native { max_tokens: 1 });
    let mut out = VecDeque::new();
    let error = reader.take(r#"{"error":{"message":"boom","code":500}}"#, &mut out);
    assert!(matches!(error, Err(WorkerError::Reset { reason }) if reason == "boom"));
    assert!(reader.take("nonsense", &mut out).is_err());
}

#[test]
fn a_server_that_never_stops_is_stopped() {
    let mut reader = Reader::new(Kind::Native { max_tokens: 2 });
    let mut out = VecDeque::new();
    let piece = r#"{"choices":[{"text":"x"}]}"#;
    let taken = (0..10).find_map(|_| reader.take(piece, &mut out).err());
    assert!(matches!(taken, Some(WorkerError::Protocol { .. })));
    assert_eq!(out.len(), 3);
}
