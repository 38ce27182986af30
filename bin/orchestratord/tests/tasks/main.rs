//! Tasks over HTTP: admission, streams, resume, cancel. The daemon is a real
//! process, and so is the (fake) engine.

#[path = "../support/mod.rs"]
mod support;

mod cancel;
mod queue;
mod refused;
mod running;

use serde_json::{Value, json};

fn prompt() -> Value {
    json!({ "prompt": "one two three" })
}
