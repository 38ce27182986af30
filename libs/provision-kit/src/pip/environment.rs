//! Which of our environment variables pip must not see.
//!
//! pip may run code of the package that it was asked for. Settings of pip and
//! of the network go along; tokens and passwords of other services do not.

/// Names that are a secret, or end in `_` and this.
const SECRETS: [&str; 4] = ["TOKEN", "API_KEY", "SECRET", "PASSWORD"];

/// Our own settings, which hold secrets too.
const OURS: &str = "ORCHD_";

/// Whether a variable of this name stays behind.
pub(super) fn is_kept_from_pip(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    if name.starts_with("PIP_") {
        return false;
    }
    name.starts_with(OURS)
        || SECRETS.iter().any(|secret| {
            name.strip_suffix(secret)
                .is_some_and(|before| before.is_empty() || before.ends_with('_'))
        })
}

/// The names of our own variables that stay behind.
pub(super) fn kept_from_pip() -> impl Iterator<Item = std::ffi::OsString> {
    std::env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| is_kept_from_pip(&name.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stay_and_what_pip_needs_goes_along() {
        for secret in [
            "HF_TOKEN",
            "TOKEN",
            "ORCHD_API_TOKEN",
            "ORCHD_CONFIG",
            "OPENAI_API_KEY",
            "CLIENT_SECRET",
            "db_password",
        ] {
            assert!(is_kept_from_pip(secret), "{secret}");
        }
        for needed in [
            "PATH",
            "HOME",
            "PIP_INDEX_URL",
            "PIP_PASSWORD",
            "HTTPS_PROXY",
            "no_proxy",
            "TMPDIR",
            "SSL_CERT_FILE",
            "TOKENIZERS_PARALLELISM",
        ] {
            assert!(!is_kept_from_pip(needed), "{needed}");
        }
    }
}
