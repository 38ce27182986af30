//! For clients that speak Ollama's API only.
//!
//! A request is translated into one of `OpenAI`'s, which the engine knows, and goes
//! the way of every call: queue, event log, cancel. The log is translated back,
//! piece by piece. What has no counterpart is refused with what to do instead, and
//! nothing is made up: an engine is not reconfigured by a request, no conversation
//! is cut, and no model is fetched.
//!
//! - [`calls`]: `/api/chat` and `/api/generate`
//! - [`embed`]: `/api/embed` and `/api/embeddings`
//! - [`models`]: `/api/tags`, `/api/show` and `/api/ps`
//! - [`routes`]: the version, and what is not offered
//! - [`request`], [`messages`], [`options`], [`keep_alive`]: requests, in the
//!   engine's words
//! - [`answer`], [`lines`], [`errors`]: answers, in the client's
//! - [`loading`]: into memory and out of it

mod answer;
pub mod calls;
pub mod embed;
pub mod errors;
mod keep_alive;
mod lines;
mod loading;
mod messages;
pub mod models;
mod options;
mod request;
pub mod routes;

/// The tag that stands for none.
const LATEST: &str = ":latest";

/// A name without the tag that stands for none.
fn plain_name(name: &str) -> &str {
    name.strip_suffix(LATEST).unwrap_or(name)
}

/// A name as these clients list it: with a tag.
fn tagged_name(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or(name);
    if last.contains(':') {
        name.to_owned()
    } else {
        format!("{name}{LATEST}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_listed_with_a_tag_and_found_without() {
        for (name, tagged) in [
            ("haiku", "haiku:latest"),
            ("llama3.2:1b", "llama3.2:1b"),
            ("host:5000/haiku", "host:5000/haiku:latest"),
        ] {
            assert_eq!(tagged_name(name), tagged);
            assert_eq!(plain_name(tagged), name);
        }
    }
}
