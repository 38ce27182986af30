//! Messages of a conversation, in the words of `OpenAI`'s API.
//!
//! They differ in where images stand, in tool calls, whose arguments are an object
//! here and a text there, and in ids: here a tool's result may name the tool alone,
//! and there it must name the call.

use std::collections::VecDeque;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::options::invalid;
use crate::services::event_log::Failure;

/// One message. Keys that are not known are passed over: clients send back what
/// they were answered, and add what they need themselves.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Message {
    pub(super) role: String,
    pub(super) content: Option<String>,
    thinking: Option<String>,
    /// Base64.
    pub(super) images: Option<Vec<String>>,
    tool_calls: Option<Vec<ToolCall>>,
    /// Of a tool's result: which tool.
    #[serde(alias = "name")]
    tool_name: Option<String>,
    /// Of a tool's result: which call.
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ToolCall {
    #[serde(default)]
    id: Option<String>,
    function: Function,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    arguments: Value,
}

impl Message {
    pub(super) fn new(role: &str, content: String, images: Option<Vec<String>>) -> Self {
        Self {
            role: role.to_owned(),
            content: Some(content),
            images,
            ..Self::default()
        }
    }
}

/// Calls that were not answered yet: their ids and tools.
type Unanswered = VecDeque<(String, String)>;

/// A conversation in `OpenAI`'s words.
///
/// # Errors
/// `INVALID_PARAMS`, naming the message by its place, which counts from 0.
pub(super) fn conversation(messages: Vec<Message>) -> Result<Vec<Value>, Failure> {
    let mut unanswered = Unanswered::new();
    let messages = messages.into_iter().enumerate();
    messages
        .map(|(place, message)| translated(place, message, &mut unanswered))
        .collect()
}

fn translated(
    place: usize,
    message: Message,
    unanswered: &mut Unanswered,
) -> Result<Value, Failure> {
    if message.role.is_empty() {
        return Err(invalid(format!("`messages[{place}]` has no `role`")));
    }
    let mut written = Map::new();
    let text = message.content.unwrap_or_default();
    let images = message.images.unwrap_or_default();
    written.insert("content".to_owned(), content(text, images));
    if let Some(thinking) = message.thinking.filter(|thinking| !thinking.is_empty()) {
        written.insert("reasoning_content".to_owned(), thinking.into());
    }
    if let Some(calls) = message.tool_calls.filter(|calls| !calls.is_empty()) {
        unanswered.clear();
        let calls = calls.into_iter().enumerate();
        let calls = calls
            .map(|(nth, call)| call.written(place, nth, unanswered))
            .collect::<Result<Vec<_>, _>>()?;
        written.insert("tool_calls".to_owned(), calls.into());
    }
    if message.role == "tool" {
        let (id, tool) = answered(
            message.tool_call_id,
            message.tool_name.as_deref(),
            unanswered,
        )
        .unwrap_or_else(|| (format!("call_{place}"), String::new()));
        written.insert("tool_call_id".to_owned(), id.into());
        let tool = message.tool_name.unwrap_or(tool);
        if !tool.is_empty() {
            written.insert("name".to_owned(), tool.into());
        }
    }
    written.insert("role".to_owned(), message.role.into());
    Ok(Value::Object(written))
}

fn content(text: String, images: Vec<String>) -> Value {
    if images.is_empty() {
        return text.into();
    }
    let mut parts = Vec::with_capacity(images.len() + 1);
    if !text.is_empty() {
        parts.push(json!({"type": "text", "text": text}));
    }
    let image = |image| json!({"type": "image_url", "image_url": {"url": data_url(image)}});
    parts.extend(images.into_iter().map(image));
    parts.into()
}

/// An image as an address that holds it. Its kind is told by how the file begins.
fn data_url(image: String) -> String {
    if image.starts_with("data:") {
        return image;
    }
    let kind = match image.as_bytes() {
        [b'/', b'9', b'j', ..] => "jpeg",
        [b'R', b'0', b'l', b'G', ..] => "gif",
        [b'U', b'k', b'l', b'G', ..] => "webp",
        _ => "png",
    };
    format!("data:image/{kind};base64,{image}")
}

impl ToolCall {
    fn written(
        self,
        place: usize,
        nth: usize,
        unanswered: &mut Unanswered,
    ) -> Result<Value, Failure> {
        let Function { name, arguments } = self.function;
        let arguments = match arguments {
            Value::Null => "{}".to_owned(),
            // As OpenAI's API has it, which some clients send here as well.
            Value::String(text) => text,
            object @ Value::Object(_) => object.to_string(),
            _ => {
                return Err(invalid(format!(
                    "`messages[{place}].tool_calls[{nth}].function.arguments` must be an object"
                )));
            }
        };
        let id = self.id.filter(|id| !id.is_empty());
        let id = id.unwrap_or_else(|| format!("call_{place}_{nth}"));
        unanswered.push_back((id.clone(), name.clone()));
        Ok(json!({
            "id": id, "type": "function",
            "function": {"name": name, "arguments": arguments},
        }))
    }
}

/// The call that a tool's result belongs to: the one it names, else the first open
/// one of the tool that it names, else the first open one.
fn answered(
    id: Option<String>,
    tool: Option<&str>,
    unanswered: &mut Unanswered,
) -> Option<(String, String)> {
    if let Some(id) = id.filter(|id| !id.is_empty()) {
        let found = unanswered.iter().position(|(open, _)| *open == id);
        let found = found.and_then(|place| unanswered.remove(place));
        return Some(found.unwrap_or((id, String::new())));
    }
    let of_tool = tool.and_then(|tool| unanswered.iter().position(|(_, open)| open == tool));
    unanswered.remove(of_tool.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(messages: Value) -> Value {
        let messages = serde_json::from_value(messages).unwrap();
        conversation(messages).unwrap().into()
    }

    #[test]
    fn plain_messages_stay_as_they_are() {
        let plain = json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
        ]);
        assert_eq!(translated(plain.clone()), plain);
        assert!(conversation(vec![Message::default()]).is_err(), "no role");
    }

    #[test]
    fn an_image_becomes_a_part_of_the_content() {
        let messages = translated(json!([
            {"role": "user", "content": "what is it?", "images": ["/9j/4AAQ", "iVBORw0K"]},
        ]));
        let parts = &messages[0]["content"];
        assert_eq!(parts[0], json!({"type": "text", "text": "what is it?"}));
        assert_eq!(
            parts[1]["image_url"]["url"],
            "data:image/jpeg;base64,/9j/4AAQ"
        );
        assert_eq!(
            parts[2]["image_url"]["url"],
            "data:image/png;base64,iVBORw0K"
        );
    }

    #[test]
    fn results_find_the_calls_that_they_answer() {
        let messages = translated(json!([
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
                {"function": {"name": "time", "arguments": {}}},
                {"function": {"name": "weather", "arguments": {"city": "Oslo"}}},
                {"id": "mine", "function": {"name": "weather", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_name": "weather", "content": "rain"},
            {"role": "tool", "tool_call_id": "mine", "content": "sun"},
            {"role": "tool", "content": "noon"},
            {"role": "tool", "content": "one too many"},
        ]));
        let calls = &messages[0]["tool_calls"];
        assert_eq!(calls[1]["function"]["arguments"], r#"{"city":"Oslo"}"#);
        assert_eq!(messages[0]["reasoning_content"], "hm");
        let ids: Vec<&Value> = (1..5).map(|i| &messages[i]["tool_call_id"]).collect();
        assert_eq!(ids, ["call_0_1", "mine", "call_0_0", "call_4"]);
        assert_eq!(messages[1]["name"], "weather");
        assert_eq!(messages[3]["name"], "time", "as its call said");
    }

    #[test]
    fn arguments_that_are_no_object_are_refused() {
        let messages = json!([{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": [1]}},
        ]}]);
        let failure = conversation(serde_json::from_value(messages).unwrap()).unwrap_err();
        assert!(failure.message.contains("messages[0].tool_calls[0]"));
    }
}
