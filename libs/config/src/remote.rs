//! Engines elsewhere: what a pool of `engine: openai` sends its tasks to.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use llama_orch_types::EngineKind;
use provision_kit::chain::one_line;
use provision_kit::secret::Secret;
use reqwest::Url;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::loaded::Unfit;
use super::read::ranged;
use super::{LoadPolicy, PoolConfig, SetupError, Token};

/// One replica of an engine elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EndpointConfig {
    /// What comes before `/v1/…`, such as `http://10.0.0.5:8000`.
    pub url: String,
    /// A file that holds its bearer token and nothing else.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// How many tasks it is given at once (1 to 4096).
    #[serde(default = "slots", deserialize_with = "ranged::<_, u32, 1, 4096>")]
    #[schemars(range(min = 1, max = 4096))]
    pub slots: u32,
}

fn slots() -> u32 {
    16
}

impl EndpointConfig {
    /// The token in its file, as it is now.
    pub fn bearer(&self) -> Result<Option<Secret>, SetupError> {
        let Some(path) = &self.token_file else {
            return Ok(None);
        };
        let text = std::fs::read_to_string(path).map_err(|source| SetupError::TokenFile {
            path: path.clone(),
            source,
        })?;
        let token = Token::try_from(text).map_err(|problem| SetupError::Token {
            origin: path.display().to_string(),
            problem,
        })?;
        Ok(Some(Secret::new(token.reveal())))
    }

    /// The token file, if others than its owner may read it.
    pub fn open_to_others(&self) -> Option<&Path> {
        const OTHERS: u32 = 0o077;
        let path = self.token_file.as_deref()?;
        let mode = std::fs::metadata(path).ok()?.permissions().mode();
        (mode & OTHERS != 0).then_some(path)
    }

    /// Why its address cannot be used. The address itself is repeated only where it can
    /// hold no secret.
    fn problem(&self) -> Option<String> {
        let url = match Url::parse(&self.url) {
            Ok(url) => url,
            Err(error) => return Some(format!("a `url` that is no address: {error}")),
        };
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Some("a `url` that does not begin with http:// or https://".to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Some("a `url` with credentials in it".to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Some("a `url` with a query or a fragment".to_owned());
        }
        let path = url.path().trim_end_matches('/');
        (path == "/v1" || path.ends_with("/v1"))
            .then(|| format!("`{}`, which ends in /v1: that is added", self.url))
    }
}

impl PoolConfig {
    /// Whether its endpoints fit its engine, and everything else its endpoints.
    pub(super) fn check_endpoints(&self) -> Result<(), Unfit> {
        let unfit = |key, problem: String, hint: &str| Unfit {
            key,
            problem,
            hint: hint.to_owned(),
        };
        if self.engine != EngineKind::Openai {
            if self.endpoints.is_empty() {
                return Ok(());
            }
            return Err(unfit(
                "endpoints",
                format!(
                    "the engine `{}` runs here and has no endpoints",
                    self.engine
                ),
                "set `engine: openai`, or leave `endpoints` out",
            ));
        }
        if self.endpoints.is_empty() {
            return Err(unfit(
                "endpoints",
                "an engine elsewhere needs at least one endpoint".to_owned(),
                "add `endpoints: [{ url: \"http://10.0.0.5:8000\" }]`",
            ));
        }
        for endpoint in &self.endpoints {
            if let Some(problem) = endpoint.problem() {
                return Err(unfit(
                    "endpoints",
                    problem,
                    "name what comes before /v1, such as `http://10.0.0.5:8000`; a token belongs into a `token_file`",
                ));
            }
            if let Err(error) = endpoint.bearer() {
                return Err(unfit(
                    "endpoints",
                    one_line(&error),
                    "put the server's token, one word, into the file, or leave `token_file` out",
                ));
            }
        }
        match self.meaningless_elsewhere() {
            Some(key) => Err(unfit(
                key,
                "it means nothing for an engine that runs elsewhere".to_owned(),
                "leave it out, and set it where the engine is started; `slots` belongs to each endpoint",
            )),
            None => Ok(()),
        }
    }

    /// The first setting that says how an engine is provided, started or unloaded.
    fn meaningless_elsewhere(&self) -> Option<&'static str> {
        let usual = Self::default();
        let set = [
            ("ctx", self.ctx != usual.ctx),
            ("slots", self.slots != usual.slots),
            ("threads", self.threads != usual.threads),
            ("gpu_layers", self.gpu_layers != usual.gpu_layers),
            ("flags", self.flags != usual.flags),
            ("load", self.load != LoadPolicy::Eager),
            ("idle_ttl_seconds", self.idle_ttl_seconds.is_some()),
            ("pin", self.pin),
            #[cfg(feature = "provisioning")]
            ("profile", self.profile != usual.profile),
            #[cfg(feature = "provisioning")]
            ("provision", self.provision != usual.provision),
        ];
        set.iter().find(|(_, set)| *set).map(|(key, _)| *key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str) -> EndpointConfig {
        EndpointConfig {
            url: url.to_owned(),
            token_file: None,
            slots: 2,
        }
    }

    fn elsewhere(url: &str) -> PoolConfig {
        PoolConfig {
            engine: EngineKind::Openai,
            endpoints: vec![endpoint(url)],
            ..PoolConfig::default()
        }
    }

    fn complaint(pool: &PoolConfig) -> (&'static str, String) {
        let unfit = pool.check_endpoints().unwrap_err();
        (unfit.key, unfit.problem)
    }

    #[test]
    fn an_address_is_plain_and_shows_no_secret() {
        for url in ["http://a:1", "https://far.example/base/", "http://[::1]:8"] {
            elsewhere(url).check_endpoints().unwrap();
        }
        for url in [
            "a:1",
            "",
            "ftp://a",
            "http://",
            "http://user:hunter2@a",
            "http://a/?key=hunter2",
            "http://a/#hunter2",
            "http://a/v1",
            "http://a/v1/",
        ] {
            let (key, problem) = complaint(&elsewhere(url));
            assert_eq!(key, "endpoints", "{url}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }

    #[test]
    fn settings_that_mean_nothing_there_are_named() {
        let far = elsewhere("http://a:1");
        let with = |change: fn(&mut PoolConfig)| {
            let mut pool = far.clone();
            change(&mut pool);
            complaint(&pool).0
        };
        assert_eq!(with(|pool| pool.ctx = Some(4096)), "ctx");
        assert_eq!(with(|pool| pool.slots = 4), "slots");
        assert_eq!(with(|pool| pool.flags = vec!["-x".to_owned()]), "flags");
        assert_eq!(with(|pool| pool.pin = true), "pin");
        assert_eq!(with(|pool| pool.load = LoadPolicy::OnDemand), "load");
        assert_eq!(with(|pool| pool.endpoints.clear()), "endpoints");
        let here = PoolConfig {
            engine: EngineKind::Llamacpp,
            ..far
        };
        assert_eq!(complaint(&here).0, "endpoints");
    }

    #[test]
    fn a_token_file_holds_one_word_and_is_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let mut pool = elsewhere("http://a:1");
        pool.endpoints[0].token_file = Some(file.clone());
        assert!(complaint(&pool).1.contains("token"));
        std::fs::write(&file, "two words").unwrap();
        let (_, problem) = complaint(&pool);
        assert!(!problem.contains("two words"), "{problem}");
        std::fs::write(&file, "hunter2\n").unwrap();
        pool.check_endpoints().unwrap();
        let endpoint = &pool.endpoints[0];
        let set = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&file, mode).unwrap();
        };
        set(0o644);
        assert_eq!(endpoint.open_to_others(), Some(file.as_path()));
        set(0o600);
        assert_eq!(endpoint.open_to_others(), None);
        assert_eq!(endpoint.bearer().unwrap().unwrap().reveal(), "hunter2");
    }
}
