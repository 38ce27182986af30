//! `file:`: a file of this machine, used where it lies.

use std::env;
use std::path::{Path, PathBuf};

use crate::fetch::FetchError;

/// The file's absolute path, free of links and `..`.
pub(crate) fn locate(path: &Path) -> Result<PathBuf, FetchError> {
    let path = expand_home(path, env::var_os("HOME").map(PathBuf::from));
    path.canonicalize()
        .map_err(|source| FetchError::Missing { path, source })
}

/// `~/x` as shells understand it: in a configuration file no shell helps.
fn expand_home(path: &Path, home: Option<PathBuf>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_expanded() {
        let expand = |path: &str| expand_home(Path::new(path), Some("/home/a".into()));
        assert_eq!(expand("~/m.gguf"), Path::new("/home/a/m.gguf"));
        assert_eq!(expand("~other/m.gguf"), Path::new("~other/m.gguf"));
        assert_eq!(expand("/x/~/m.gguf"), Path::new("/x/~/m.gguf"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = locate(Path::new("no/such.gguf")).unwrap_err();
        assert!(error.to_string().contains("no/such.gguf"));
    }
}
