//! An error and its causes, for a line of progress or a log.

use std::error::Error;

/// An error and its causes in one line.
pub fn one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some libraries repeat their cause.
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layer(&'static str, #[source] Option<Box<Layer>>);

    #[test]
    fn causes_follow_and_nothing_is_said_twice() {
        let inner = Layer("no route\nto host", None);
        let middle = Layer("no route\nto host", Some(Box::new(inner)));
        let outer = Layer("cannot connect", Some(Box::new(middle)));
        assert_eq!(one_line(&outer), "cannot connect: no route to host");
    }
}
