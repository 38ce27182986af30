//! Errors as people see them: what failed, why, and the next thing to try.

use std::error::Error;
use std::fmt::Write;

use llama_orch_types::Hinted;

/// Prints an error, its causes and its hint.
pub fn print<E: Hinted>(error: &E) {
    print_with(error, error.hint());
}

/// Prints an error whose hint is known apart from it.
pub fn print_with(error: &dyn Error, hint: Option<String>) {
    crate::say(render(error, hint).trim_end());
}

fn render(error: &dyn Error, hint: Option<String>) -> String {
    let mut text = String::new();
    let mut label = "error";
    let mut next = Some(error);
    let mut said = String::new();
    while let Some(error) = next {
        let message = error.to_string();
        // A wrapper may repeat its cause's words; once is enough.
        if !said.contains(message.trim()) {
            let indented = message.trim_end().replace('\n', "\n    ");
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{label}: {indented}");
            label = "  because";
            said.push_str(&message);
        }
        next = error.source();
    }
    if let Some(hint) = hint {
        let _ = writeln!(text, "hint: {}", hint.replace('\n', "\n      "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(&'static str, std::io::Error);

    impl std::fmt::Display for Outer {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.1)
        }
    }

    #[test]
    fn what_why_and_what_to_try() {
        let error = Outer("could not start", std::io::Error::other("no room\nat all"));
        assert_eq!(
            render(&error, Some("free some".to_owned())),
            "error: could not start\n  because: no room\n    at all\nhint: free some\n"
        );
    }

    #[test]
    fn nothing_is_said_twice() {
        let error = Outer("could not start: no room", std::io::Error::other("no room"));
        assert_eq!(render(&error, None), "error: could not start: no room\n");
    }
}
