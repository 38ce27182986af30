//! How single settings are read: ranges, addresses, names. A wrong one is an
//! error at its place in the file.

use std::fmt;
use std::net::SocketAddr;

use llama_orch_types::EngineKind;
use serde::{Deserialize, Deserializer};

pub(super) fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    let numeric = text
        .strip_prefix("localhost:")
        .map(|port| format!("127.0.0.1:{port}"));
    numeric.as_deref().unwrap_or(&text).parse().map_err(|_| {
        serde::de::Error::custom(format!(
            "`{text}` is no address: an IP address and a port are expected, such as 127.0.0.1:8080"
        ))
    })
}

pub(super) fn engine_kind<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<EngineKind, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.as_str() {
        "llamacpp" => Ok(EngineKind::Llamacpp),
        "openai" => Ok(EngineKind::Openai),
        "mock" => Ok(EngineKind::Mock),
        other => Err(serde::de::Error::custom(format!(
            "`{other}` is no engine; this build knows `llamacpp` and `openai`"
        ))),
    }
}

fn check_range<T, E>(value: T, min: u64, max: u64) -> Result<T, E>
where
    T: Copy + Into<u64> + fmt::Display,
    E: serde::de::Error,
{
    let number: u64 = value.into();
    if (min..=max).contains(&number) {
        Ok(value)
    } else {
        Err(E::custom(format!(
            "{value} is out of range: {min} to {max}"
        )))
    }
}

pub(super) fn ranged<'de, D, T, const MIN: u64, const MAX: u64>(
    deserializer: D,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Copy + Into<u64> + fmt::Display,
{
    check_range(T::deserialize(deserializer)?, MIN, MAX)
}

pub(super) fn ranged_option<'de, D, T, const MIN: u64, const MAX: u64>(
    deserializer: D,
) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Copy + Into<u64> + fmt::Display,
{
    Option::<T>::deserialize(deserializer)?
        .map(|value| check_range(value, MIN, MAX))
        .transpose()
}
