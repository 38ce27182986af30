//! Ids that must not be mixed up.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest pool or replica id, in bytes.
const MAX_NAME_LEN: usize = 63;

/// Why a text is no pool or replica id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("an id must not be empty")]
    Empty,
    #[error("`{0}` is longer than {MAX_NAME_LEN} bytes")]
    TooLong(String),
    #[error(
        "`{text}` must start with a lower-case letter or digit and hold only a-z, 0-9, `-`, `_` and `.`"
    )]
    BadCharacter { text: String },
}

/// Ids become file names (`run/<pool>.pid`), so only characters that are safe
/// in a file name, on a command line and in a URL are let in.
fn check_name(text: &str) -> Result<(), IdError> {
    let Some(first) = text.chars().next() else {
        return Err(IdError::Empty);
    };
    if text.len() > MAX_NAME_LEN {
        return Err(IdError::TooLong(text.to_owned()));
    }
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if !plain(first)
        || !text
            .chars()
            .all(|c| plain(c) || matches!(c, '-' | '_' | '.'))
    {
        return Err(IdError::BadCharacter {
            text: text.to_owned(),
        });
    }
    Ok(())
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                check_name(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                check_name(&text)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl schemars::JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": "string",
                    "pattern": "^[a-z0-9][a-z0-9._-]{0,62}$",
                })
            }
        }
    };
}

name_id! {
    /// Names a pool: one model served by one kind of engine. The pool that is
    /// made without any configuration is named `default`.
    PoolId
}

name_id! {
    /// Names one engine process of a pool, for example `r0`.
    ReplicaId
}

impl PoolId {
    /// The name of the pool that exists without any configuration.
    pub fn default_pool() -> Self {
        Self("default".to_owned())
    }

    pub fn is_default(&self) -> bool {
        self.0 == "default"
    }
}

impl ReplicaId {
    /// The first (and, for a local engine, only) replica of a pool.
    pub fn first() -> Self {
        Self("r0".to_owned())
    }
}

/// Names a task. Ids sort by the time they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TaskId(Uuid);

impl TaskId {
    /// A new id that no other task has.
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }
}

impl FromStr for TaskId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        Uuid::parse_str(text).map(Self)
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_id_is_safe_as_a_file_name() {
        for good in ["default", "haiku-2", "a.b_c", "0"] {
            assert!(good.parse::<PoolId>().is_ok(), "{good}");
        }
        for bad in [
            "", "../etc", "a/b", "Default", ".hidden", "-flag", "a b", "ä", "a\0",
        ] {
            assert!(bad.parse::<PoolId>().is_err(), "{bad}");
        }
        assert_eq!(
            "x".repeat(64).parse::<PoolId>(),
            Err(IdError::TooLong("x".repeat(64)))
        );
    }

    #[test]
    fn json_holds_a_checked_pool_id() {
        assert!(serde_json::from_str::<PoolId>("\"../x\"").is_err());
        let id: PoolId = serde_json::from_str("\"haiku\"").unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"haiku\"");
    }

    #[test]
    fn task_ids_sort_by_age() {
        let ids: Vec<_> = (0..100).map(|_| TaskId::generate()).collect();
        assert!(ids.is_sorted());
        assert_eq!(ids[0].to_string().parse::<TaskId>().unwrap(), ids[0]);
    }
}
