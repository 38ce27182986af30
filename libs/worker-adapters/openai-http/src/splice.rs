//! What a call's body is changed in: the model's name, and that the tokens are to
//! be counted. Every other byte stays as the client sent it, so that an option that
//! nobody here knows arrives as it was meant.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// A body for the server.
#[derive(Debug, PartialEq)]
pub(crate) struct Spliced {
    pub(crate) body: Bytes,
    /// The client did not ask for the tokens' count, so the event that holds it is
    /// not for it.
    pub(crate) usage_is_ours: bool,
}

/// Names the server's model, and with `count` asks for the tokens' count at the
/// stream's end. Fails if the body is not a JSON object.
pub(crate) fn splice(body: &Bytes, model: &str, count: bool) -> Result<Spliced, serde_json::Error> {
    let members: Members<'_> = serde_json::from_slice(body)?;
    let mut edits = Edits {
        whole: body,
        edits: Vec::new(),
    };
    let model = serde_json::to_string(model)?;
    let (mut has_model, mut has_options, mut asked) = (false, false, false);
    for (key, value) in &members.0 {
        match key.as_str() {
            "model" => {
                has_model = true;
                edits.replace(value, model.clone());
            }
            "stream_options" if count => {
                has_options = true;
                asked = edits.ask_for_usage(value);
            }
            _ => {}
        }
    }
    let mut added = Vec::new();
    if !has_model {
        added.push(format!(r#""model":{model}"#));
    }
    if count && !has_options {
        added.push(r#""stream_options":{"include_usage":true}"#.to_owned());
    }
    edits.add(body, &added, members.0.is_empty());
    Ok(Spliced {
        body: edits.apply(),
        usage_is_ours: count && !asked,
    })
}

/// What is replaced, by its place in the whole body. The places do not overlap.
struct Edits<'a> {
    whole: &'a [u8],
    edits: Vec<(Range<usize>, String)>,
}

impl Edits<'_> {
    /// Where a part of the body lies in it.
    fn place(&self, part: &[u8]) -> Range<usize> {
        let start = part.as_ptr().addr() - self.whole.as_ptr().addr();
        start..start + part.len()
    }

    fn replace(&mut self, value: &RawValue, text: String) {
        let place = self.place(value.get().as_bytes());
        self.edits.push((place, text));
    }

    /// Adds members to an object, before those that it has.
    fn add(&mut self, object: &[u8], members: &[String], is_empty: bool) {
        let Some(open) = object.iter().position(|&byte| byte == b'{') else {
            return;
        };
        if members.is_empty() {
            return;
        }
        let start = self.place(object).start + open + 1;
        let comma = if is_empty { "" } else { "," };
        let text = format!("{}{comma}", members.join(","));
        self.edits.push((start..start, text));
    }

    /// Says whether the client had asked itself.
    fn ask_for_usage(&mut self, options: &RawValue) -> bool {
        if options.get() == "null" {
            self.replace(options, r#"{"include_usage":true}"#.to_owned());
            return false;
        }
        // Anything else than an object is the server's to refuse.
        let Ok(members) = serde_json::from_str::<Members<'_>>(options.get()) else {
            return true;
        };
        let named = members
            .0
            .iter()
            .rev()
            .find(|(key, _)| key == "include_usage");
        match named {
            Some((_, value)) if value.get() == "true" => true,
            Some((_, value)) => {
                self.replace(value, "true".to_owned());
                false
            }
            None => {
                let members_are_none = members.0.is_empty();
                let asked = [r#""include_usage":true"#.to_owned()];
                self.add(options.get().as_bytes(), &asked, members_are_none);
                false
            }
        }
    }

    fn apply(mut self) -> Bytes {
        self.edits.sort_by_key(|(place, _)| place.start);
        let mut body = Vec::with_capacity(self.whole.len() + 128);
        let mut done = 0;
        for (place, text) in &self.edits {
            body.extend_from_slice(&self.whole[done..place.start]);
            body.extend_from_slice(text.as_bytes());
            done = place.end;
        }
        body.extend_from_slice(&self.whole[done..]);
        body.into()
    }
}

/// An object's members in their order, with their values as they stand there.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Collect).map(Members)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn spliced(body: &str, count: bool) -> (String, bool) {
        let body = Bytes::from(body.to_owned());
        let spliced = splice(&body, "m\"x", count).unwrap();
        let text = String::from_utf8(spliced.body.to_vec()).unwrap();
        (text, spliced.usage_is_ours)
    }

    #[test]
    fn only_the_model_is_replaced() {
        let (body, ours) = spliced(
            "{ \"a\" : 1.00, \"model\" :\"old\",\n\"model\":7, \"x\":{\"model\":\"kept\"}}",
            false,
        );
        assert_eq!(
            body,
            "{ \"a\" : 1.00, \"model\" :\"m\\\"x\",\n\"model\":\"m\\\"x\", \"x\":{\"model\":\"kept\"}}"
        );
        assert!(!ours);
        assert_eq!(spliced(" {}", false).0, r#" {"model":"m\"x"}"#);
        assert_eq!(
            spliced(r#"{"a":[]}"#, false).0,
            r#"{"model":"m\"x","a":[]}"#
        );
    }

    #[test]
    fn tokens_are_counted_and_the_client_sees_it_if_it_asked() {
        let options = |options: &str| {
            let (body, ours) = spliced(
                &format!(r#"{{"model":"","stream_options":{options}}}"#),
                true,
            );
            let body: Value = serde_json::from_str(&body).unwrap();
            (body["stream_options"].clone(), ours)
        };
        let counted = json!({ "include_usage": true });
        assert_eq!(options("null"), (counted.clone(), true));
        assert_eq!(options("{ }"), (counted.clone(), true));
        assert_eq!(
            options(r#"{"include_usage":false}"#),
            (counted.clone(), true)
        );
        assert_eq!(options(r#"{"include_usage": true}"#), (counted, false));
        assert_eq!(
            options(r#"{"other":1}"#),
            (json!({ "include_usage": true, "other": 1 }), true)
        );
        assert_eq!(options("3"), (json!(3), false), "the server's to refuse");
        let (body, ours) = spliced("{}", true);
        assert_eq!(
            body,
            r#"{"model":"m\"x","stream_options":{"include_usage":true}}"#
        );
        assert!(ours);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["[]", "", "{", "\"x\"", "{}{}"] {
            assert!(
                splice(&Bytes::from_static(body.as_bytes()), "m", true).is_err(),
                "{body}"
            );
        }
    }

    proptest! {
        #[test]
        fn everything_else_stays(
            members in prop::collection::btree_map("[a-z\"\\\\é]{0,4}", "[a-z{}\",:\\\\]{0,8}", 0..6),
            count: bool,
        ) {
            let before = json!(members);
            let body = Bytes::from(serde_json::to_string_pretty(&before).unwrap());
            let spliced = splice(&body, "m", count).unwrap();
            let mut after: Value = serde_json::from_slice(&spliced.body).unwrap();
            prop_assert_eq!(&after["model"], "m");
            let after = after.as_object_mut().unwrap();
            after.remove("model");
            after.remove("stream_options");
            let mut before = before;
            before.as_object_mut().unwrap().remove("model");
            before.as_object_mut().unwrap().remove("stream_options");
            prop_assert_eq!(&Value::Object(after.clone()), &before);
        }
    }
}
