//! One event of a streamed answer, as far as it is understood: read once, from
//! the text itself, with what does not matter passed over.
//!
//! As recorded from llama-server b11434:
//!
//! - chats and completions have unnamed events and end in `[DONE]`. The event with
//!   `finish_reason` holds `timings`, or, where usage was asked for, one without
//!   choices after it. With `n: 2` each of the two choices has both. Several
//!   prompts at once begin with an event that is just `null`.
//! - progress in the prompt is an event more, a chunk with `prompt_progress`; but
//!   for responses it is in the one `response.in_progress` that would come anyway,
//!   and in repetitions of it.
//! - responses end with `response.completed`, messages with `message_stop`; neither
//!   has a `[DONE]`. Messages tell no progress.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;
use worker_adapters_adapter_api::{CallApi, FinishReason};

use super::account::{Costs, Usage};
use crate::wire::{EngineError, PromptProgress, Timings};

/// What one event tells.
#[derive(Debug, Default)]
pub(crate) struct Heard<'a> {
    pub(crate) progress: Option<Progress<'a>>,
    /// What it adds to the answer's text, the first choice's if there are several.
    pub(crate) text: Cow<'a, str>,
    /// Whether it stands for a token, of text or of anything else.
    pub(crate) token: bool,
    pub(crate) finish: Option<FinishReason>,
    pub(crate) costs: Option<Costs>,
    pub(crate) error: Option<EngineError>,
    /// Whether it is the stream's proper last event.
    pub(crate) last: bool,
    /// Whether it is none at all.
    pub(crate) nothing: bool,
}

impl<'a> Heard<'a> {
    /// The text of an event that tells of nothing else, written without escapes.
    fn plain_token(&self) -> Option<&'a str> {
        let alone = self.progress.is_none()
            && self.finish.is_none()
            && self.costs.is_none()
            && self.error.is_none()
            && !self.last
            && !self.nothing;
        match self.text {
            Cow::Borrowed(text) if alone && self.token && !text.is_empty() => Some(text),
            _ => None,
        }
    }
}

/// A word about the prompt.
#[derive(Debug)]
pub(crate) struct Progress<'a> {
    pub(crate) prompt: PromptProgress,
    /// As written, to take it out again.
    pub(crate) raw: &'a str,
}

/// Reads an event of a stream. What is JSON and not as expected tells nothing, and
/// is passed on all the same.
pub(crate) fn read(api: CallApi, data: &str) -> Result<Heard<'_>, serde_json::Error> {
    understand(api, data).or_else(|_| {
        let _: IgnoredAny = serde_json::from_str(data)?;
        Ok(Heard::default())
    })
}

/// Reads the events of one stream, most of which differ in their text alone: what is
/// before and after it is then known, and is not read again.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// Of the latest event that was a plain token: up to its text, and from there on.
    before: String,
    after: String,
}

impl Reader {
    /// The same as [`read`].
    pub(crate) fn read<'a>(
        &mut self,
        api: CallApi,
        data: &'a str,
    ) -> Result<Heard<'a>, serde_json::Error> {
        if let Some(text) = self.text_of_one_like_the_last(data) {
            return Ok(Heard {
                text: Cow::Borrowed(text),
                token: true,
                ..Heard::default()
            });
        }
        let heard = read(api, data)?;
        self.remember(data, &heard);
        Ok(heard)
    }

    /// JSON that is the same but for what stands between the quotes of one text is
    /// read the same but for that text, so long as it is one text still.
    fn text_of_one_like_the_last<'a>(&self, data: &'a str) -> Option<&'a str> {
        if self.before.is_empty() {
            return None;
        }
        let text = data.strip_prefix(self.before.as_str())?;
        let text = text.strip_suffix(self.after.as_str())?;
        let plain = |byte| byte >= b' ' && byte != b'"' && byte != b'\\';
        (!text.is_empty() && text.bytes().all(plain)).then_some(text)
    }

    fn remember(&mut self, data: &str, heard: &Heard<'_>) {
        self.before.clear();
        self.after.clear();
        let Some(text) = heard.plain_token() else {
            return;
        };
        let start = (text.as_ptr() as usize).wrapping_sub(data.as_ptr() as usize);
        if let (Some(before), Some(after)) = (
            data.get(..start),
            data.get(start.saturating_add(text.len())..),
        ) && before.ends_with('"')
            && after.starts_with('"')
        {
            self.before.push_str(before);
            self.after.push_str(after);
        }
    }
}

fn understand(api: CallApi, data: &str) -> Result<Heard<'_>, serde_json::Error> {
    if data == "null" {
        return Ok(Heard {
            nothing: true,
            ..Heard::default()
        });
    }
    match api {
        CallApi::Responses => serde_json::from_str::<ResponseEvent<'_>>(data)?.heard(),
        CallApi::Messages => Ok(serde_json::from_str::<MessageEvent<'_>>(data)?.heard()),
        _ => serde_json::from_str::<OpenAiChunk<'_>>(data)?.heard(),
    }
}

/// Why an answer ended, in the words of any of the APIs.
pub(crate) fn finish_reason(word: &str) -> FinishReason {
    match word {
        "length" | "max_tokens" | "max_output_tokens" | "incomplete" => FinishReason::Length,
        _ => FinishReason::Stop,
    }
}

/// A text that borrows where it can, also as a part of something else.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

/// A chunk of a chat or a completion.
#[derive(Debug, Deserialize)]
struct OpenAiChunk<'a> {
    #[serde(borrow, default)]
    choices: Choices<'a>,
    usage: Option<Usage>,
    timings: Option<Timings>,
    #[serde(borrow)]
    prompt_progress: Option<&'a RawValue>,
    error: Option<EngineError>,
}

impl<'a> OpenAiChunk<'a> {
    fn heard(self) -> Result<Heard<'a>, serde_json::Error> {
        // A client may have asked for timings with each token; only the last matter.
        let costs = (self.choices.finish.is_some() || self.choices.none).then_some(Costs {
            usage: self.usage,
            timings: self.timings,
            // Where it comes by itself, it repeats what came with a choice, or
            // comes instead.
            of_choice: !self.choices.none,
        });
        Ok(Heard {
            progress: progress(self.prompt_progress)?,
            text: self.choices.text,
            token: self.choices.token,
            finish: self.choices.finish,
            costs,
            error: self.error,
            ..Heard::default()
        })
    }
}

/// All choices of a chunk in one; none of them is kept.
#[derive(Debug)]
struct Choices<'a> {
    none: bool,
    text: Cow<'a, str>,
    token: bool,
    finish: Option<FinishReason>,
}

impl Default for Choices<'_> {
    fn default() -> Self {
        Self {
            none: true,
            text: Cow::Borrowed(""),
            token: false,
            finish: None,
        }
    }
}

#[derive(Debug, Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: u64,
    #[serde(borrow)]
    finish_reason: Option<Text<'a>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    text: Option<Text<'a>>,
}

#[derive(Debug, Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Text<'a>>,
    #[serde(borrow)]
    reasoning_content: Option<Text<'a>>,
    tool_calls: Option<IgnoredAny>,
}

impl<'a> Choices<'a> {
    fn add(&mut self, choice: Choice<'a>) {
        self.none = false;
        if let Some(Text(reason)) = choice.finish_reason {
            self.finish = Some(finish_reason(&reason));
        }
        let mut text = choice.text;
        if let Some(delta) = choice.delta {
            let thought = delta.reasoning_content;
            self.token |=
                delta.tool_calls.is_some() || thought.is_some_and(|text| !text.0.is_empty());
            text = text.or(delta.content);
        }
        if let Some(Text(text)) = text.filter(|text| !text.0.is_empty()) {
            self.token = true;
            if choice.index == 0 {
                if self.text.is_empty() {
                    self.text = text;
                } else {
                    self.text.to_mut().push_str(&text);
                }
            }
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Choices<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoicesVisitor;
        impl<'de> Visitor<'de> for ChoicesVisitor {
            type Value = Choices<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of choices")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut choices = Choices::default();
                while let Some(choice) = list.next_element()? {
                    choices.add(choice);
                }
                Ok(choices)
            }
        }
        deserializer.deserialize_seq(ChoicesVisitor)
    }
}

/// An event of OpenAI's responses.
#[derive(Debug, Deserialize)]
struct ResponseEvent<'a> {
    #[serde(borrow, default)]
    r#type: Cow<'a, str>,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    response: Option<Response>,
    timings: Option<Timings>,
    #[serde(borrow)]
    prompt_progress: Option<&'a RawValue>,
    error: Option<EngineError>,
}

#[derive(Debug, Deserialize)]
struct Response {
    usage: Option<Usage>,
}

impl<'a> ResponseEvent<'a> {
    fn heard(self) -> Result<Heard<'a>, serde_json::Error> {
        let (last, finish) = match &*self.r#type {
            "response.completed" => (true, Some(FinishReason::Stop)),
            "response.incomplete" => (true, Some(FinishReason::Length)),
            "response.failed" => (true, None),
            _ => (false, None),
        };
        let text = match self.delta {
            Some(delta) if self.r#type == "response.output_text.delta" => {
                serde_json::from_str::<Text<'_>>(delta.get())?.0
            }
            _ => Cow::Borrowed(""),
        };
        Ok(Heard {
            progress: progress(self.prompt_progress)?,
            text,
            token: self.delta.is_some(),
            finish,
            costs: last.then(|| Costs {
                usage: self.response.and_then(|response| response.usage),
                timings: self.timings,
                of_choice: true,
            }),
            error: self.error,
            last,
            nothing: false,
        })
    }
}

fn progress(raw: Option<&RawValue>) -> Result<Option<Progress<'_>>, serde_json::Error> {
    let Some(raw) = raw.map(RawValue::get).filter(|raw| *raw != "null") else {
        return Ok(None);
    };
    let prompt = serde_json::from_str(raw)?;
    Ok(Some(Progress { prompt, raw }))
}

/// An event of Anthropic's messages.
#[derive(Debug, Deserialize)]
struct MessageEvent<'a> {
    #[serde(borrow, default)]
    r#type: Cow<'a, str>,
    #[serde(borrow)]
    delta: Option<MessageDelta<'a>>,
    message: Option<Response>,
    usage: Option<Usage>,
    error: Option<EngineError>,
}

#[derive(Debug, Deserialize)]
struct MessageDelta<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    stop_reason: Option<Text<'a>>,
}

impl<'a> MessageEvent<'a> {
    fn heard(self) -> Heard<'a> {
        let token = self.r#type == "content_block_delta";
        let (mut text, mut finish) = (None, None);
        if let Some(delta) = self.delta {
            text = delta.text.filter(|_| token);
            finish = delta.stop_reason.map(|reason| finish_reason(&reason.0));
        }
        let usage = self
            .usage
            .or_else(|| self.message.and_then(|message| message.usage));
        Heard {
            text: text.unwrap_or_default().0,
            token,
            finish,
            costs: usage.map(|usage| Costs {
                usage: Some(usage),
                timings: None,
                of_choice: true,
            }),
            error: self.error,
            last: self.r#type == "message_stop",
            ..Heard::default()
        }
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
