//! An answer that came in one piece, as far as it is understood.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;
use worker_adapters_adapter_api::{CallApi, FinishReason};

use super::account::{Costs, Usage};
use super::events::{Text, finish_reason};
use crate::wire::Timings;

/// What an answer tells.
#[derive(Debug, Default)]
pub(crate) struct Read {
    /// Its text, the first choice's if there are several; empty where it has none.
    pub(crate) text: String,
    pub(crate) finish: Option<FinishReason>,
    pub(crate) costs: Costs,
}

/// Reads an answer. Fails if it is no JSON; what is, and is not as expected, tells
/// nothing.
pub(crate) fn read(api: CallApi, body: &[u8]) -> Result<Read, serde_json::Error> {
    if let Ok(answer) = serde_json::from_slice::<Answer<'_>>(body) {
        return Ok(answer.read(api));
    }
    let _: IgnoredAny = serde_json::from_slice(body)?;
    Ok(Read::default())
}

/// What the APIs' answers hold, all in one: their names do not clash.
#[derive(Debug, Deserialize)]
struct Answer<'a> {
    /// Chats and completions.
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    /// Responses.
    #[serde(borrow, default)]
    output: Vec<Item<'a>>,
    #[serde(borrow)]
    status: Option<Text<'a>>,
    /// Messages.
    #[serde(borrow, default)]
    content: Vec<Part<'a>>,
    #[serde(borrow)]
    stop_reason: Option<Text<'a>>,
    usage: Option<Usage>,
    timings: Option<Timings>,
}

#[derive(Debug, Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
    #[serde(borrow)]
    message: Option<Message<'a>>,
    #[serde(borrow)]
    text: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    content: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct Item<'a> {
    #[serde(borrow, default)]
    content: Vec<Part<'a>>,
}

#[derive(Debug, Deserialize)]
struct Part<'a> {
    #[serde(borrow, default)]
    r#type: Cow<'a, str>,
    #[serde(borrow)]
    text: Option<Text<'a>>,
}

impl Answer<'_> {
    fn read(self, api: CallApi) -> Read {
        let costs = Costs {
            usage: self.usage,
            timings: self.timings,
            of_choice: true,
        };
        let (text, finish) = match api {
            CallApi::Responses => {
                let parts = self.output.iter().flat_map(|item| &item.content);
                (text_of(parts, "output_text"), self.status)
            }
            CallApi::Messages => (text_of(&self.content, "text"), self.stop_reason),
            _ => match self.choices.into_iter().next() {
                Some(choice) => {
                    let content = choice.message.and_then(|message| message.content);
                    let text = content.or(choice.text);
                    let text = text.map_or_else(String::new, |text| text.0.into_owned());
                    (text, choice.finish_reason)
                }
                None => (String::new(), None),
            },
        };
        Read {
            text,
            finish: finish.map(|reason| finish_reason(&reason.0)),
            costs,
        }
    }
}

fn text_of<'a>(parts: impl IntoIterator<Item = &'a Part<'a>>, kind: &str) -> String {
    let parts = parts.into_iter().filter(|part| part.r#type == kind);
    parts
        .filter_map(|part| part.text.as_ref())
        .map(|text| &*text.0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_every_recorded_answer_is_found() {
        let chat = r#"{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant","content":"Hello! How"}},{"finish_reason":"stop","index":1,"message":{"content":"no"}}],"usage":{"completion_tokens":3,"prompt_tokens":31,"total_tokens":34,"prompt_tokens_details":{"cached_tokens":30}},"timings":{"cache_n":30,"prompt_n":1,"prompt_ms":15.179,"predicted_n":3,"predicted_ms":20.936}}"#;
        let completion = r#"{"choices":[{"text":"Hello! How","index":0,"logprobs":null,"finish_reason":"length"}],"usage":{"completion_tokens":3,"prompt_tokens":2}}"#;
        let response = r#"{"id":"resp_1","object":"response","output":[{"type":"reasoning","summary":[]},{"content":[{"type":"output_text","annotations":[],"logprobs":[],"text":"Hello!"},{"type":"output_text","text":" How"}],"role":"assistant","type":"message"}],"status":"incomplete","usage":{"input_tokens":31,"output_tokens":3}}"#;
        let message = r#"{"id":"x","type":"message","role":"assistant","content":[{"type":"thinking","thinking":"Hm"},{"type":"text","text":"Hello! How"}],"stop_reason":"max_tokens","stop_sequence":null,"usage":{"cache_read_input_tokens":30,"input_tokens":1,"output_tokens":3}}"#;
        for (api, body) in [
            (CallApi::ChatCompletions, chat),
            (CallApi::Completions, completion),
            (CallApi::Responses, response),
            (CallApi::Messages, message),
        ] {
            let answer = read(api, body.as_bytes()).unwrap();
            assert_eq!(answer.text, "Hello! How", "{api:?}");
            assert_eq!(answer.finish, Some(FinishReason::Length), "{api:?}");
        }
    }

    #[test]
    fn an_answer_without_text_has_none() {
        let tool = r#"{"choices":[{"finish_reason":"tool_calls","message":{"role":"assistant","content":null,"tool_calls":[{"id":"1"}]}}]}"#;
        let answer = read(CallApi::ChatCompletions, tool.as_bytes()).unwrap();
        assert_eq!(
            (answer.text.as_str(), answer.finish),
            ("", Some(FinishReason::Stop))
        );
        let vectors = r#"{"object":"list","data":[{"embedding":[0.5]}],"usage":{"prompt_tokens":1,"total_tokens":1}}"#;
        assert!(
            read(CallApi::Embeddings, vectors.as_bytes())
                .unwrap()
                .text
                .is_empty()
        );
        assert!(read(CallApi::Tokenize, br#"{"tokens":[1]}"#).is_ok());
        assert!(read(CallApi::Tokenize, b"{\"tokens\":oops").is_err());
        assert!(read(CallApi::ChatCompletions, b"[1]x").is_err());
        assert!(read(CallApi::Detokenize, br#"{"content":"a"}"#).is_ok());
    }
}
