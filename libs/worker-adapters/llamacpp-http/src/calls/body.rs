//! The body of a call, with what we ask for added to it.
//!
//! What the client wrote stays as it is, byte for byte: numbers, the order of keys,
//! and whatever the engine understands and we do not. Ours goes before the closing
//! brace. What the client says itself is left to it.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, de};
use worker_adapters_adapter_api::WorkerError;

const PROGRESS: &str = "return_progress";
const TAG: &str = "dynatemp_exponent";
/// Where a client turns the dynamic temperature on, its exponent matters.
const TAGS_MEANING: &str = "dynatemp_range";

/// What is to be added.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wanted {
    pub(crate) progress: bool,
    pub(crate) tag: Option<u32>,
}

/// A body to send.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) body: Bytes,
    pub(crate) tagged: bool,
    /// Whether the client wants to see the progress itself.
    pub(crate) progress_wanted: bool,
}

/// Fails if the body is no JSON object.
pub(crate) fn prepare(body: &Bytes, wanted: Wanted) -> Result<Prepared, WorkerError> {
    let keys: Keys = serde_json::from_slice(body).map_err(|error| WorkerError::InvalidParams {
        message: format!("the body is no JSON object: {error}"),
    })?;
    let mut added = Vec::new();
    if wanted.progress && keys.progress.is_none() {
        added.push(format!("\"{PROGRESS}\":true"));
    }
    let tag = wanted.tag.filter(|_| !keys.tag);
    if let Some(tag) = tag {
        added.push(format!("\"{TAG}\":{tag}"));
    }
    Ok(Prepared {
        body: if added.is_empty() {
            body.clone()
        } else {
            splice(body, keys.any, &added.join(","))
        },
        tagged: tag.is_some(),
        progress_wanted: keys.progress == Some(true),
    })
}

/// Puts members before the closing brace of what is known to be an object.
fn splice(object: &[u8], has_members: bool, members: &str) -> Bytes {
    let end = object.iter().rposition(|&byte| byte == b'}');
    let (head, tail) = object.split_at(end.unwrap_or(object.len()));
    let mut spliced = Vec::with_capacity(object.len() + members.len() + 1);
    spliced.extend_from_slice(head);
    if has_members {
        spliced.push(b',');
    }
    spliced.extend_from_slice(members.as_bytes());
    spliced.extend_from_slice(tail);
    spliced.into()
}

/// Which of the keys that matter an object has.
#[derive(Debug, Default)]
struct Keys {
    any: bool,
    /// Whether its value is `true`, if there is one.
    progress: Option<bool>,
    tag: bool,
}

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(KeysVisitor)
    }
}

struct KeysVisitor;

impl<'de> Visitor<'de> for KeysVisitor {
    type Value = Keys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
        let mut keys = Keys::default();
        while let Some(Key(key)) = map.next_key()? {
            keys.any = true;
            match &*key {
                PROGRESS => {
                    let value: serde_json::Value = map.next_value()?;
                    keys.progress = Some(value == true);
                    continue;
                }
                TAG | TAGS_MEANING => keys.tag = true,
                _ => {}
            }
            let _: IgnoredAny = map.next_value()?;
        }
        Ok(keys)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Keys, E> {
        Err(Error::invalid_type(de::Unexpected::Unit, &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const ALL: Wanted = Wanted {
        progress: true,
        tag: Some(7),
    };

    fn prepared(body: &str) -> (String, Prepared) {
        let prepared = prepare(&Bytes::from(body.to_owned()), ALL).unwrap();
        let text = String::from_utf8(prepared.body.to_vec()).unwrap();
        (text, prepared)
    }

    #[test]
    fn ours_goes_before_the_closing_brace_and_nothing_else_changes() {
        let body = "{ \"b\": 1.0e0, \"a\": {\"}\": \"}\"},\n \"seed\": 12345678901234567890.10 }\n";
        let (text, told) = prepared(body);
        assert_eq!(
            text,
            "{ \"b\": 1.0e0, \"a\": {\"}\": \"}\"},\n \"seed\": 12345678901234567890.10 \
             ,\"return_progress\":true,\"dynatemp_exponent\":7}\n"
        );
        assert!(told.tagged && !told.progress_wanted);
        let (text, _) = prepared("{}");
        assert_eq!(text, "{\"return_progress\":true,\"dynatemp_exponent\":7}");
    }

    #[test]
    fn what_the_client_says_itself_is_left_to_it() {
        let (text, told) = prepared(r#"{"return_progress":true,"dynatemp\u005fexponent":2}"#);
        assert_eq!(
            text,
            r#"{"return_progress":true,"dynatemp\u005fexponent":2}"#
        );
        assert!(told.progress_wanted && !told.tagged);
        let (text, told) = prepared(r#"{"return_progress":false,"dynatemp_range":0.5}"#);
        assert_eq!(text, r#"{"return_progress":false,"dynatemp_range":0.5}"#);
        assert!(!told.progress_wanted && !told.tagged);
        // What is deeper down is not meant.
        let (text, _) = prepared(r#"{"x":{"return_progress":false}}"#);
        assert!(text.contains("},\"return_progress\":true"));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "[]", "null", "7", "{", "{}{}", "{\"a\":}", "\"{}\""] {
            let refused = prepare(&Bytes::from(body), ALL);
            assert!(
                matches!(refused, Err(WorkerError::InvalidParams { .. })),
                "{body}"
            );
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[{}\",\\\\a\u{e9}\n]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map("[{}\"a-c]{0,3}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_object_keeps_its_bytes_and_gains_only_ours(
            members in prop::collection::hash_map("[{}\"a-c]{0,4}", json(), 0..5),
            pretty: bool,
            spaces in "[ \n\t]{0,3}",
        ) {
            let mut object = Value::Object(members.into_iter().collect());
            let text = if pretty {
                serde_json::to_string_pretty(&object).unwrap()
            } else {
                object.to_string()
            };
            let text = format!("{spaces}{text}{spaces}");
            let (spliced, _) = prepared(&text);
            let head = text.trim_end().len() - 1;
            prop_assert_eq!(&spliced[..head], &text[..head]);
            prop_assert!(spliced.ends_with(&text[head..]));
            object["return_progress"] = json!(true);
            object["dynatemp_exponent"] = json!(7);
            let read: Value = serde_json::from_str(&spliced).unwrap();
            prop_assert_eq!(read, object);
        }

        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = prepare(&Bytes::from(bytes), ALL);
        }
    }
}
