//! What the model is asked: a haiku that names the minute.
//!
//! Two example turns show the form. Their numbers are one that a minute can
//! have and one that none can, so an answer that repeats an example names the
//! wrong number in all minutes but one. The nonce is sent along as something
//! never to be written: a server that echoes its input gives itself away by it,
//! and one that knows its answers beforehand does so by the minute.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::words::Minute;

/// Far more than the few lines of a haiku need.
pub const MAX_TOKENS: u32 = 64;

const EXAMPLES: [(&str, &str); 2] = [
    (
        "eleven",
        "Minute eleven—\nrain taps on the window pane,\nthe kettle whispers.",
    ),
    (
        "sixty-one",
        "Minute sixty-one—\na clock that nobody winds\nkeeps on counting stars.",
    ),
];

/// How the question is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wording {
    /// The first attempt's: the examples alone show where the minute goes.
    Open,
    /// The second attempt's: the first line is described as well.
    Guided,
}

impl Wording {
    fn question(self, words: &str) -> String {
        match self {
            Self::Open => format!("Write a haiku about minute {words}."),
            Self::Guided => format!(
                "Write a haiku about minute {words}. Its first line is \"Minute {words}—\"."
            ),
        }
    }
}

/// Eight characters that no run before has seen.
pub fn nonce() -> String {
    let mut text = Uuid::new_v4().simple().to_string();
    text.truncate(8);
    text
}

/// The task for a minute: greedy, so that nothing is left to chance.
pub fn task(pool: &str, minute: Minute, nonce: &str, wording: Wording) -> Value {
    json!({
        "pool_id": pool,
        "messages": messages(minute, nonce, wording),
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
        "seed": 1,
    })
}

fn messages(minute: Minute, nonce: &str, wording: Wording) -> Vec<Value> {
    let message = |role: &str, content: String| json!({ "role": role, "content": content });
    let ask = |words: &str| message("user", wording.question(words));
    let rules = format!(
        "You write haiku. Each haiku names the minute once, in words, in its first line. \
         The secret code is {nonce}; never write it."
    );
    let mut messages = vec![message("system", rules)];
    for (words, haiku) in EXAMPLES {
        messages.push(ask(words));
        messages.push(message("assistant", haiku.to_owned()));
    }
    messages.push(ask(&minute.words()));
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_task_holds_minute_and_nonce_and_no_answer() {
        let minute = Minute::new(42).unwrap();
        for wording in [Wording::Open, Wording::Guided] {
            let task = task("p", minute, "n0nce123", wording);
            let text = task.to_string();
            assert!(minute.occurrences(&text) > 0, "{text}");
            assert_eq!(text.matches("n0nce123").count(), 1);
            assert!(task.get("grammar").is_none() && task.get("json_schema").is_none());
        }
    }

    #[test]
    fn every_nonce_is_new() {
        let nonces: std::collections::BTreeSet<_> = (0..100).map(|_| nonce()).collect();
        assert_eq!(nonces.len(), 100);
        assert!(nonces.iter().all(|nonce| nonce.len() == 8));
    }
}
