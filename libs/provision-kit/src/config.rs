//! Configuration files, read strictly.
//!
//! YAML, and with it JSON. An unknown key is an error that names the file, the
//! line, the key and the nearest key that exists: a misspelt setting that is
//! silently ignored costs hours.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use llama_orch_types::Hinted;
use serde::de::DeserializeOwned;
use serde_saphyr::Error as YamlError;

/// Why a configuration was not read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// `place` is `file:line:column`.
    #[error("{place}: unknown key `{key}`")]
    UnknownKey {
        place: String,
        key: String,
        known: Vec<&'static str>,
    },
    #[error("{place}: unknown value `{value}`")]
    UnknownValue {
        place: String,
        value: String,
        known: Vec<&'static str>,
    },
    #[error("{place}: {message}")]
    Invalid { place: String, message: String },
}

impl Hinted for ConfigError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Read { path, source } if source.kind() == io::ErrorKind::NotFound => {
                Some(format!(
                    "there is no {}: check the path given with --config",
                    path.display()
                ))
            }
            Self::UnknownKey {
                key: word, known, ..
            }
            | Self::UnknownValue {
                value: word, known, ..
            } => Some(match nearest(word, known.iter().copied()) {
                Some(near) => format!("did you mean `{near}`? Known here: {}", known.join(", ")),
                None if known.is_empty() => "nothing may stand here".to_owned(),
                None => format!("known here: {}", known.join(", ")),
            }),
            Self::Read { .. } | Self::Invalid { .. } => None,
        }
    }
}

/// Longest configuration that is read, in bytes. Nobody writes so much by hand.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// Reads a configuration file of at most 4 MiB.
pub fn read_strict<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = fs::File::open(path).map_err(failed)?;
    let read = file.take(MAX_FILE + 1).read_to_string(&mut text);
    if read.map_err(failed)? as u64 > MAX_FILE {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    parse_strict(&text, path)
}

/// Reads a configuration from text; `origin` is what errors call it. Types
/// must carry `deny_unknown_fields`. An empty text stands for an empty mapping.
pub fn parse_strict<T: DeserializeOwned>(text: &str, origin: &Path) -> Result<T, ConfigError> {
    let holds_something = text.lines().any(|line| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with('#') && line != "---"
    });
    let text = if holds_something { text } else { "{}" };
    serde_saphyr::from_str(text).map_err(|error| explain(&error, text, origin))
}

fn explain(error: &YamlError, text: &str, origin: &Path) -> ConfigError {
    let error = error.without_snippet();
    let place = match error.location() {
        Some(at) if at.line() > 0 => format!("{}:{}:{}", origin.display(), at.line(), at.column()),
        _ => origin.display().to_string(),
    };
    match error {
        YamlError::SerdeUnknownField {
            field, expected, ..
        } => ConfigError::UnknownKey {
            place,
            key: field.clone(),
            known: expected.clone(),
        },
        YamlError::SerdeUnknownVariant {
            variant, expected, ..
        } => ConfigError::UnknownValue {
            place,
            value: variant.clone(),
            known: expected.clone(),
        },
        YamlError::SerdeMissingField { field, .. } => ConfigError::Invalid {
            place,
            message: format!("the key `{field}` is missing"),
        },
        YamlError::DuplicateMappingKey { key: Some(key), .. } => ConfigError::Invalid {
            place,
            message: format!("the key `{key}` stands here a second time"),
        },
        other => {
            let said = one_line(&other.to_string());
            let message = without_place(&said).to_owned();
            let line = other.location().map_or(0, |at| at.line());
            ConfigError::Invalid {
                place,
                message: match key_on_line(text, line) {
                    Some(key) => format!("`{key}`: {message}"),
                    None => message,
                },
            }
        }
    }
}

/// The key that a line of block-style YAML begins with. Only the key: the
/// value may be a secret.
fn key_on_line(text: &str, line: u64) -> Option<&str> {
    let index = usize::try_from(line.checked_sub(1)?).ok()?;
    let (key, _) = text.lines().nth(index)?.split_once(':')?;
    let key = key
        .trim()
        .trim_start_matches("- ")
        .trim_matches(['"', '\'']);
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    (!key.is_empty() && key.chars().all(plain)).then_some(key)
}

/// The message itself without the drawing of the source below it.
fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// The message without the parser's own `at line 3, column 12` at its end: the
/// place is named before it.
fn without_place(message: &str) -> &str {
    let only_place = |tail: &str| {
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        tail.split_once(", column ")
            .is_some_and(|(line, column)| is_number(line) && is_number(column))
    };
    match message.rsplit_once(" at line ") {
        Some((said, tail)) if only_place(tail) => said,
        _ => message,
    }
}

/// The known word that looks most like `word`, if one looks like it at all.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| {
            (
                strsim::normalized_damerau_levenshtein(word, candidate),
                candidate,
            )
        })
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        max_cache_bytes: Option<u64>,
        mode: Mode,
        inner: Option<Box<Sample>>,
    }

    #[derive(Debug, PartialEq, Default, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Mode {
        #[default]
        Off,
        WhenKnown,
    }

    fn parse(text: &str) -> Result<Sample, ConfigError> {
        parse_strict(text, Path::new("models.yaml"))
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_the_nearest_one() {
        let error = parse("mode: off\ninner:\n  max_cache_byte: 3\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "models.yaml:3:3: unknown key `max_cache_byte`"
        );
        assert!(
            error
                .hint()
                .unwrap()
                .starts_with("did you mean `max_cache_bytes`?")
        );
    }

    #[test]
    fn json_is_read_as_well() {
        let sample = parse("{\n\t\"max_cache_bytes\": 3,\n\t\"mode\": \"when_known\"\n}").unwrap();
        assert_eq!(sample.max_cache_bytes, Some(3));
        let error = parse("{\"mod\": \"off\"}").unwrap_err();
        assert_eq!(error.to_string(), "models.yaml:1:2: unknown key `mod`");
    }

    #[test]
    fn a_wrong_value_is_named_with_its_place() {
        let error = parse("mode: whenknown").unwrap_err();
        assert!(error.to_string().contains("`whenknown`"), "{error}");
        assert!(error.hint().unwrap().contains("when_known"));
        let error = parse("mode: off\nmax_cache_bytes: many\n").unwrap_err();
        assert!(error.to_string().starts_with("models.yaml:2:"), "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
        let error = parse("mode: off\nmode: off\n").unwrap_err();
        assert!(error.to_string().contains("`mode`"), "{error}");
    }

    #[test]
    fn nothing_is_an_empty_configuration() {
        assert_eq!(parse("").unwrap(), Sample::default());
        assert_eq!(parse("# only this\n").unwrap(), Sample::default());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_strict::<Sample>(Path::new("no/such.yaml")).unwrap_err();
        assert!(error.to_string().contains("no/such.yaml"));
        assert!(error.hint().is_some());
    }

    #[test]
    fn nearest_word() {
        assert_eq!(nearest("vrsion", ["version", "mode"]), Some("version"));
        assert_eq!(nearest("zzz", ["version", "mode"]), None);
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,200}") {
            let _ = parse(&text);
        }
    }

    #[test]
    fn bombs_are_refused_quickly() {
        let deep = |open: &str, close: &str| open.repeat(100_000) + &close.repeat(100_000);
        let mut aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..20 {
            let list = vec![format!("*a{}", level - 1); 9].join(", ");
            aliases += &[
                "a",
                &level.to_string(),
                ": &a",
                &level.to_string(),
                " [",
                &list,
                "]\n",
            ]
            .concat();
        }
        for text in [
            deep("[", "]"),
            deep("{a: ", "}"),
            deep("{inner: ", "}"),
            deep("- ", ""),
            "inner:\n".to_owned()
                + &(1..2000)
                    .map(|n| " ".repeat(n) + "inner:\n")
                    .collect::<String>(),
            aliases,
        ] {
            assert!(parse_strict::<Sample>(&text, Path::new("c.yaml")).is_err());
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.yaml");
        fs::write(&path, " ".repeat(MAX_FILE as usize + 1)).unwrap();
        assert!(matches!(
            read_strict::<Sample>(&path),
            Err(ConfigError::Read { .. })
        ));
    }

    proptest! {
        #[test]
        fn whatever_stands_there_is_answered(
            text in "(max_cache_bytes|mode|inner|:|[ \n\t\"'{}\\[\\]&*!|>%@`,#-]|[0-9a-z]|\\PC){0,60}",
        ) {
            let _ = parse_strict::<Sample>(&text, Path::new("c.yaml"));
        }
    }
}
