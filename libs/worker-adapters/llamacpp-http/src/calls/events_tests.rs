use super::*;
use proptest::prelude::*;
use serde_json::json;

fn text(api: CallApi, data: &str) -> String {
    read(api, data).unwrap().text.into_owned()
}

const CHAT: &str = r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" How"}}],"created":1795536637,"id":"chatcmpl-1","model":"m","system_fingerprint":"b11434-unknown","object":"chat.completion.chunk"}"#;
const CHAT_ROLE: &str = r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"object":"chat.completion.chunk"}"#;
const CHAT_PROGRESS: &str = r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"object":"chat.completion.chunk","prompt_progress":{"total":400,"cache":0,"processed":128,"time_ms":603}}"#;
const CHAT_LAST: &str = r#"{"choices":[{"finish_reason":"length","index":0,"delta":{}}],"object":"chat.completion.chunk","timings":{"cache_n":30,"prompt_n":1,"prompt_ms":11.5,"predicted_n":3,"predicted_ms":33.24}}"#;
const TOOL: &str = r#"{"choices":[{"finish_reason":null,"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}}]}"#;
const DELTA: &str = r#"{"type":"response.output_text.delta","item_id":"msg_1","delta":"He\nllo"}"#;
const BLOCK: &str =
    r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}"#;

#[test]
fn the_text_of_every_recorded_event_is_found_without_copying() {
    let heard = read(CallApi::ChatCompletions, CHAT).unwrap();
    assert!(matches!(heard.text, Cow::Borrowed(" How")) && heard.token);
    let heard = read(CallApi::Messages, BLOCK).unwrap();
    assert!(matches!(heard.text, Cow::Borrowed("Hello")) && heard.token);
    assert_eq!(text(CallApi::Responses, DELTA), "He\nllo");
    let completion = r#"{"choices":[{"text":" of","index":0,"logprobs":null,"finish_reason":null}],"object":"text_completion"}"#;
    assert_eq!(text(CallApi::Completions, completion), " of");
    assert!(!read(CallApi::ChatCompletions, CHAT_ROLE).unwrap().token);
}

#[test]
fn progress_is_told_from_tokens() {
    let heard = read(CallApi::ChatCompletions, CHAT_PROGRESS).unwrap();
    let progress = heard.progress.unwrap();
    assert_eq!(
        (progress.prompt.processed, progress.prompt.total),
        (128, 400)
    );
    assert!(!heard.token);
    let event = r#"{"type":"response.in_progress","response":{"id":"r"},"prompt_progress":{"total":31,"cache":30,"processed":30,"time_ms":0}}"#;
    let heard = read(CallApi::Responses, event).unwrap();
    assert_eq!(heard.progress.unwrap().prompt.left(), 1);
    assert!(read(CallApi::Completions, CHAT).unwrap().progress.is_none());
}

#[test]
fn the_last_events_tell_why_and_what_it_cost() {
    let heard = read(CallApi::ChatCompletions, CHAT_LAST).unwrap();
    assert_eq!(heard.finish, Some(FinishReason::Length));
    assert_eq!(heard.costs.unwrap().timings.unwrap().predicted_n, 3);
    assert!(!heard.last, "[DONE] is the last of a chat");
    // With timings for each token, only the last are for the whole.
    let each = CHAT.replace("\"object\"", "\"timings\":{\"predicted_n\":1},\"object\"");
    assert!(
        read(CallApi::ChatCompletions, &each)
            .unwrap()
            .costs
            .is_none()
    );
    let completed = r#"{"type":"response.completed","response":{"id":"r","usage":{"input_tokens":31,"output_tokens":3}},"timings":{"predicted_n":3}}"#;
    let heard = read(CallApi::Responses, completed).unwrap();
    assert!(heard.last && heard.costs.is_some());
    let delta = r#"{"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},"usage":{"output_tokens":3}}"#;
    let heard = read(CallApi::Messages, delta).unwrap();
    assert_eq!(heard.finish, Some(FinishReason::Length));
    assert!(heard.text.is_empty() && !heard.last);
    assert!(
        read(CallApi::Messages, r#"{"type":"message_stop"}"#)
            .unwrap()
            .last
    );
}

#[test]
fn tool_calls_and_thoughts_are_tokens_without_text() {
    let heard = read(CallApi::ChatCompletions, TOOL).unwrap();
    assert!(heard.token && heard.text.is_empty());
    let thought = CHAT.replace("content", "reasoning_content");
    let heard = read(CallApi::ChatCompletions, &thought).unwrap();
    assert!(heard.token && heard.text.is_empty());
    let arguments = r#"{"type":"response.function_call_arguments.delta","delta":"{"}"#;
    let heard = read(CallApi::Responses, arguments).unwrap();
    assert!(heard.token && heard.text.is_empty());
    let thinking =
        r#"{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"Hm"}}"#;
    assert!(text(CallApi::Messages, thinking).is_empty());
}

#[test]
fn only_the_first_choice_is_the_text() {
    let second = CHAT.replace("\"index\":0", "\"index\":1");
    let heard = read(CallApi::ChatCompletions, &second).unwrap();
    assert!(heard.token && heard.text.is_empty());
}

#[test]
fn an_error_in_mid_stream_is_found() {
    let error = r#"{"error":{"code":500,"message":"failed","type":"server_error"}}"#;
    for api in [
        CallApi::ChatCompletions,
        CallApi::Responses,
        CallApi::Messages,
    ] {
        assert!(read(api, error).unwrap().error.is_some(), "{api:?}");
    }
}

#[test]
fn what_is_not_understood_tells_nothing_and_what_is_no_json_is_an_error() {
    for data in ["7", "[]", r#"{"choices":5}"#, r#"{"usage":"no"}"#] {
        let heard = read(CallApi::ChatCompletions, data).unwrap();
        assert!(heard.text.is_empty() && !heard.last && !heard.nothing);
    }
    assert!(read(CallApi::Completions, "null").unwrap().nothing);
    assert!(read(CallApi::ChatCompletions, "{\"choices\": oops").is_err());
}

proptest! {
    #[test]
    fn any_text_comes_back_from_every_form(word in "\\PC{0,20}[\"\\\\\n\u{1F600}]?\\PC{0,5}") {
        let chat = json!({"choices": [{"index": 0, "delta": {"content": word}}]}).to_string();
        prop_assert_eq!(text(CallApi::ChatCompletions, &chat), word.as_str());
        let completion = json!({"choices": [{"index": 0, "text": word}]}).to_string();
        prop_assert_eq!(text(CallApi::Completions, &completion), word.as_str());
        let response = json!({"type": "response.output_text.delta", "delta": word}).to_string();
        prop_assert_eq!(text(CallApi::Responses, &response), word.as_str());
        let message = json!({"type": "content_block_delta", "delta": {"text": word}}).to_string();
        prop_assert_eq!(text(CallApi::Messages, &message), word.as_str());
    }

    #[test]
    fn any_data_is_read_or_refused(data in "[{}\\[\\]:,\"a-z0-9 ]{0,40}") {
        for api in [CallApi::ChatCompletions, CallApi::Responses, CallApi::Messages] {
            let _ = read(api, &data);
        }
    }
}

/// Everything that an event tells, to be compared.
fn told(heard: Result<Heard<'_>, serde_json::Error>) -> String {
    format!("{:?}", heard.map_err(|error| error.to_string()))
}

#[test]
fn an_event_like_the_last_is_told_from_its_text() {
    let mut reader = Reader::default();
    reader.read(CallApi::ChatCompletions, CHAT).unwrap();
    let next = CHAT.replace(" How", " are");
    assert_eq!(reader.text_of_one_like_the_last(&next), Some(" are"));
    let quoted = CHAT.replace(" How", r#"","role":""#);
    assert_eq!(reader.text_of_one_like_the_last(&quoted), None);
    reader.read(CallApi::ChatCompletions, CHAT_LAST).unwrap();
    assert_eq!(reader.text_of_one_like_the_last(&next), None);
}

proptest! {
    #[test]
    fn a_reader_of_a_stream_reads_every_event_as_it_is(
        events in prop::collection::vec(
            (0..8usize, prop_oneof!["[ -~é]{0,6}", r#"(\\n|\\"|","|\\u0041|\t| x|\}|:0){0,4}"#], any::<bool>()),
            1..12,
        ),
        api in prop::sample::select(vec![
            CallApi::ChatCompletions, CallApi::Completions, CallApi::Responses, CallApi::Messages,
        ]),
    ) {
        let mut reader = Reader::default();
        for (form, text, escaped) in events {
            let text = if escaped {
                let text = serde_json::to_string(&text).unwrap();
                text[1..text.len() - 1].to_owned()
            } else {
                text
            };
            let data = match form {
                0 => CHAT.replace(" How", &text),
                1 => CHAT.replace("\"index\":0", "\"index\":1").replace(" How", &text),
                2 => DELTA.replace("He\\nllo", &text),
                3 => BLOCK.replace("Hello", &text),
                4 => format!(r#"{{"choices":[{{"text":"{text}","index":0}}]}}"#),
                5 => format!(r#"{{"choices":[{{"index":0,"delta":{{"reasoning_content":"{text}"}}}}]}}"#),
                6 => CHAT_LAST.to_owned(),
                _ => CHAT_PROGRESS.to_owned(),
            };
            prop_assert_eq!(told(reader.read(api, &data)), told(read(api, &data)), "{}", data);
        }
    }
}
