//! What of our environment an engine does not get.

use provision_kit::process::CommandSpec;

/// Removes secrets, and variables that would change an engine's flags behind the command line's
/// back.
pub(crate) fn scrub(spec: CommandSpec) -> CommandSpec {
    std::env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| is_unwanted(name))
        .fold(spec, CommandSpec::env_remove)
}

/// Whether a variable is kept from every program that we start.
pub(crate) fn is_unwanted(name: &str) -> bool {
    const SECRET_ENDINGS: [&str; 5] = ["_API_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_ACCESS_KEY"];
    // Besides LLAMA_ARG_… the engine reads LLAMA_API_KEY, LLAMA_SERVER_… and others, and in the
    // mode that AIP_MODE turns on it listens elsewhere.
    const PREFIXES: [&str; 4] = ["ORCHD_", "LLAMA_", "AIP_", "LLAMACPP_"];
    name == "HF_TOKEN"
        || name == "HUGGING_FACE_HUB_TOKEN"
        || SECRET_ENDINGS.iter().any(|ending| name.ends_with(ending))
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_and_flags_are_kept_back_and_the_rest_is_not() {
        for name in [
            "HF_TOKEN",
            "OPENAI_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "GITHUB_TOKEN",
            "ORCHD_LLAMACPP_URL",
            "LLAMA_ARG_CTX_SIZE",
            "LLAMA_API_KEY",
            "AIP_HTTP_PORT",
        ] {
            assert!(is_unwanted(name), "{name}");
        }
        for name in [
            "PATH",
            "HOME",
            "CUDA_VISIBLE_DEVICES",
            "LD_LIBRARY_PATH",
            "GGML_VK_VISIBLE_DEVICES",
            "LANG",
        ] {
            assert!(!is_unwanted(name), "{name}");
        }
    }
}
