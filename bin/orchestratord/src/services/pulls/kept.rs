//! The list of unfinished pulls, as a file: what a restart goes on with.

use std::path::PathBuf;

use jiff::Timestamp;
use provision_kit::fs::{FsError, remove_file_if_there, write_atomic};
use serde::{Deserialize, Serialize};

/// A pull that was promised and is not over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptPull {
    pub(super) pull_id: String,
    pub(super) reference: String,
    pub(super) created_at: Timestamp,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    pulls: Vec<KeptPull>,
}

/// The file.
#[derive(Debug, Clone)]
pub(super) struct Kept(pub(super) PathBuf);

impl Kept {
    /// Replaces the list as a whole. Blocks.
    pub(super) fn save(&self, pulls: Vec<KeptPull>) -> Result<(), FsError> {
        if pulls.is_empty() {
            return remove_file_if_there(&self.0);
        }
        let mut text = serde_json::to_vec_pretty(&File { pulls })
            .map_err(|error| FsError::at("write", &self.0)(error.into()))?;
        text.push(b'\n');
        write_atomic(&self.0, &text)
    }

    /// The list; none if there is no readable file. Blocks.
    pub(super) fn load(&self) -> Vec<KeptPull> {
        let Ok(text) = std::fs::read(&self.0) else {
            return Vec::new();
        };
        match serde_json::from_slice::<File>(&text) {
            Ok(file) => file.pulls,
            Err(error) => {
                tracing::warn!(path = %self.0.display(), %error, "the list of unfinished pulls cannot be read: none of them goes on");
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_read_and_an_empty_list_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept(dir.path().join("pulls.json"));
        assert!(kept.load().is_empty());
        let pulls = vec![KeptPull {
            pull_id: "a".to_owned(),
            reference: "haiku".to_owned(),
            created_at: Timestamp::from_second(7).unwrap(),
        }];
        kept.save(pulls.clone()).unwrap();
        assert_eq!(kept.load(), pulls);
        std::fs::write(&kept.0, "{").unwrap();
        assert!(kept.load().is_empty());
        kept.save(Vec::new()).unwrap();
        kept.save(Vec::new()).unwrap();
        assert!(!kept.0.exists());
    }
}
