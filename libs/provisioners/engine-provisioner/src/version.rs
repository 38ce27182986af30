//! Reading what an engine says about its version.

use std::path::Path;

use provision_kit::process::{self, CommandSpec};

use crate::error::EngineError;
use crate::machine::VERSION_LIMIT;
use crate::run::environment::scrub;

/// Runs `<binary> --version` and returns the version in llama.cpp's own way of naming it: `b` and
/// the build's number, or the plain version where the build has no number.
pub(crate) async fn ask(binary: &Path) -> Result<String, EngineError> {
    // A release keeps its libraries beside the binary and finds them there by itself.
    let spec = scrub(CommandSpec::new(binary).arg("--version"));
    let output = process::output(spec, VERSION_LIMIT)
        .await
        .map_err(|source| EngineError::VersionCommand {
            path: binary.to_owned(),
            source,
        })?;
    // Older ones say it on standard error.
    parse(&output.stdout)
        .or_else(|| parse(&output.stderr))
        .ok_or_else(|| EngineError::VersionUnknown {
            path: binary.to_owned(),
            said: first_words(&format!("{} {}", output.stderr, output.stdout)),
        })
}

/// Knows `version: 0.6.0-dev (build 11434, commit abc)` and `version: 5321 (abc)`.
fn parse(text: &str) -> Option<String> {
    let rest = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("version:"))?
        .trim();
    let build = rest.split_once("(build ").and_then(|(_, after)| {
        let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok()
    });
    let word = rest.split_whitespace().next()?;
    Some(match (build, word.parse::<u64>()) {
        (Some(number), _) | (None, Ok(number)) if number > 0 => format!("b{number}"),
        _ => word.to_owned(),
    })
}

/// The build number in a tag such as `b11434`.
pub(crate) fn build_number(version: &str) -> Option<u32> {
    version.strip_prefix('b')?.parse().ok()
}

/// The version in `/props`' `build_info`, such as `b11434-abc123`. A build without a number has
/// none.
pub(crate) fn from_build_info(build_info: &str) -> Option<String> {
    let tag = build_info.split('-').next()?;
    (build_number(tag)? > 0).then(|| tag.to_owned())
}

fn first_words(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().take(12).collect();
    if words.is_empty() {
        "nothing".to_owned()
    } else {
        format!("`{}`", words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_forms_are_read() {
        for (text, version) in [
            (
                "version: 0.6.0-dev (build 11434, commit abc)\nbuilt with GNU",
                Some("b11434"),
            ),
            (
                "version: 0.6.0-dev (build 0, commit unknown)\n",
                Some("0.6.0-dev"),
            ),
            (
                "ggml: found a device\nversion: 5321 (9ecf3e66)\n",
                Some("b5321"),
            ),
            ("version: 0 (unknown)\n", Some("0")),
            ("version:\n", None),
            ("hello\n", None),
        ] {
            assert_eq!(parse(text).as_deref(), version, "{text}");
        }
    }

    #[test]
    fn build_info_is_read() {
        assert_eq!(from_build_info("b11434-abc").as_deref(), Some("b11434"));
        assert_eq!(from_build_info("b0-unknown"), None);
        assert_eq!(from_build_info("mine"), None);
        assert_eq!(build_number("b11434"), Some(11434));
        assert_eq!(build_number("v1"), None);
    }
}
