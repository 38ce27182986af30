//! The names of all environment variables that the daemon reads.

/// `1` removes every fallback and refuses the shim and scripted engines.
pub const REQUIRE_REAL_LLAMA: &str = "REQUIRE_REAL_LLAMA";

/// Path of the configuration file.
pub const CONFIG: &str = "ORCHD_CONFIG";

/// Address to listen on.
pub const LISTEN: &str = "ORCHD_LISTEN";

/// The bearer token that clients must send.
pub const TOKEN: &str = super::config::TOKEN_VARIABLE;

/// The env shim's variables (feature `env-shim`).
pub const SHIM_URL: &str = "ORCHD_LLAMACPP_URL";
pub const SHIM_POOL: &str = "ORCHD_LLAMACPP_POOL";
pub const SHIM_REPLICA: &str = "ORCHD_LLAMACPP_REPLICA";

/// Whether only real engines may answer. Any value but empty, `0` and `false`
/// counts as yes: whoever sets it wants it on.
pub fn real_engines_only(value: Option<&str>) -> bool {
    !matches!(value, None | Some("" | "0" | "false"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_only_is_off_only_when_told_so() {
        for off in [None, Some(""), Some("0"), Some("false")] {
            assert!(!real_engines_only(off), "{off:?}");
        }
        for on in ["1", "true", "yes"] {
            assert!(real_engines_only(Some(on)), "{on}");
        }
    }
}
