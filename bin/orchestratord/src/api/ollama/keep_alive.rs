//! `keep_alive`: how long a model shall stay in memory.
//!
//! How long a pool stays is the configuration's word (`idle_ttl_seconds`, `pin`), for
//! all of its clients alike. So a request may ask for one thing only: that the pool is
//! unloaded after it, with 0. Every other time is taken and changes nothing.

use serde_json::Value;

use super::options::invalid;
use crate::services::event_log::Failure;

/// What a request says of the time after it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum KeepAlive {
    /// As the configuration has it.
    #[default]
    Configured,
    /// Unload, if nobody else has a task in the pool by then.
    Unload,
}

impl KeepAlive {
    /// Reads seconds as a number, or a time such as `5m`, `1h30m` or `-1`.
    pub(super) fn read(value: Option<&Value>) -> Result<Self, Failure> {
        let seconds = match value {
            None | Some(Value::Null) => return Ok(Self::Configured),
            Some(Value::Number(number)) => number.as_f64(),
            Some(Value::String(text)) if text.is_empty() => return Ok(Self::Configured),
            Some(Value::String(text)) => seconds(text),
            Some(_) => None,
        };
        match seconds {
            Some(0.0) => Ok(Self::Unload),
            Some(_) => Ok(Self::Configured),
            None => Err(invalid(
                "`keep_alive` must be a number of seconds or a time such as `5m`",
            )),
        }
    }
}

/// A time as Go writes it, or a bare number of seconds.
fn seconds(text: &str) -> Option<f64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest.is_empty() {
        return None;
    }
    let mut sum = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, after) = rest.split_at(end.unwrap_or(rest.len()));
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.');
        let (unit, after) = after.split_at(end.unwrap_or(after.len()));
        let scale = match unit {
            "" | "s" => 1.0,
            "h" => 3600.0,
            "m" => 60.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        sum += number.parse::<f64>().ok()? * scale;
        rest = after;
    }
    Some(sign * sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn only_nothing_unloads() {
        for zero in [json!(0), json!(0.0), json!("0"), json!("0s"), json!("0h0m")] {
            assert_eq!(
                KeepAlive::read(Some(&zero)),
                Ok(KeepAlive::Unload),
                "{zero}"
            );
        }
        for other in [
            json!(-1),
            json!(300),
            json!("5m"),
            json!("1h30m"),
            json!("-1"),
            json!("1.5h"),
            json!("100ms"),
            json!(""),
            json!(null),
        ] {
            let read = KeepAlive::read(Some(&other));
            assert_eq!(read, Ok(KeepAlive::Configured), "{other}");
        }
        for wrong in [
            json!("soon"),
            json!("5 m"),
            json!(true),
            json!("-"),
            json!("m"),
        ] {
            assert!(KeepAlive::read(Some(&wrong)).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            let _ = KeepAlive::read(Some(&json!(text)));
        }

        #[test]
        fn a_time_is_the_sum_of_its_parts(hours in 0_u32..99, minutes in 0_u32..99) {
            let read = seconds(&format!("{hours}h{minutes}m"));
            prop_assert_eq!(read, Some(f64::from(hours) * 3600.0 + f64::from(minutes) * 60.0));
        }
    }
}
