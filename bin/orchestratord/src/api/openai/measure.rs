//! How long and how deep a JSON body is, in one pass over its bytes.
//!
//! The text in a body ends up in the engine's tokeniser and must be bounded as a
//! native prompt is. Images and sounds ride in the same body as base64 and are
//! large by nature: a string that holds nothing else does not count as text. The
//! depth is bounded for the engine's sake, which walks schemas by recursion.

/// Deepest nesting, and bytes that may be text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Measure {
    pub(super) depth: usize,
    pub(super) text_bytes: usize,
}

/// A shorter string counts as text, whatever it holds.
const SHORTEST_BASE64: usize = 1024;

/// Measures JSON; of anything else it says something, too, and nothing wrong
/// comes of that.
pub(super) fn measure(body: &[u8]) -> Measure {
    let mut measure = Measure {
        depth: 0,
        text_bytes: body.len(),
    };
    let mut depth = 0_usize;
    let mut rest = body;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'{' | b'[' => {
                depth += 1;
                measure.depth = measure.depth.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => {
                let length = string_length(rest);
                let (string, after) = rest.split_at(length);
                if is_base64(string) {
                    measure.text_bytes -= length;
                }
                // Past its closing mark, if there is one.
                rest = after.get(1..).unwrap_or_default();
            }
            _ => {}
        }
    }
    measure
}

/// Bytes up to the closing mark, or to the end.
fn string_length(string: &[u8]) -> usize {
    let mut length = 0;
    while let Some(byte) = string.get(length) {
        match byte {
            b'"' => return length,
            b'\\' => length += 2,
            _ => length += 1,
        }
    }
    string.len()
}

fn is_base64(string: &[u8]) -> bool {
    /// `data:image/png;base64,` and the like are shorter.
    const LONGEST_PREFIX: usize = 128;
    if string.len() < SHORTEST_BASE64 {
        return false;
    }
    let payload = if string.starts_with(b"data:") {
        let comma = string
            .iter()
            .take(LONGEST_PREFIX)
            .position(|byte| *byte == b',');
        comma.map_or(string, |comma| &string[comma + 1..])
    } else {
        string
    };
    // A slash may be written with a backslash before it.
    payload
        .iter()
        .all(|byte| byte.is_ascii_alphanumeric() || b"+/=-_\\".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn depth_of(value: &Value) -> usize {
        let inner = |depth: Option<usize>| 1 + depth.unwrap_or(0);
        match value {
            Value::Array(all) => inner(all.iter().map(depth_of).max()),
            Value::Object(all) => inner(all.values().map(depth_of).max()),
            _ => 0,
        }
    }

    #[test]
    fn an_image_does_not_count_as_text() {
        let image = "iVBORw0KGgo/".repeat(1000);
        let text = |url: &str| {
            let body = json!({"messages": [{"content": [{"image_url": {"url": url}}]}]});
            measure(body.to_string().as_bytes()).text_bytes
        };
        assert!(text(&format!("data:image/png;base64,{image}")) < 100);
        assert!(text(&image) < 100, "as Anthropic's clients send it");
        assert!(text(&image.replace('/', " ")) > 12_000, "words are text");
        assert!(text("short") < 100);
        let body = json!({ "prompt": "x".repeat(1000) }).to_string();
        assert_eq!(measure(body.as_bytes()).text_bytes, body.len());
    }

    #[test]
    fn brackets_in_strings_are_no_depth() {
        assert_eq!(measure(br#"{"a":"[[[\"[[","b":[1]}"#).depth, 2);
        assert_eq!(measure(b"[[[[").depth, 4);
        assert_eq!(measure(br#"["\"#).depth, 1);
        assert_eq!(measure(b"").depth, 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_measured(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let measured = measure(&body);
            prop_assert!(measured.depth <= body.len());
            prop_assert!(measured.text_bytes <= body.len());
        }

        #[test]
        fn the_depth_is_that_of_the_tree(words in prop::collection::vec("[\\[\\]{}\"\\\\a]{0,5}", 0..8)) {
            let value = words.into_iter().fold(json!(0), |inner, word| {
                if word.len() % 2 == 0 { json!({ word: inner }) } else { json!([word, inner]) }
            });
            prop_assert_eq!(measure(value.to_string().as_bytes()).depth, depth_of(&value));
        }
    }
}
