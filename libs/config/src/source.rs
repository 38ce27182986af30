//! Where a configuration comes from, kept so that it can be read again.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::{Loaded, SetupError};

/// How the configuration was found at start: the named file, and what the
/// command line and the environment say over it. Relative paths count from the
/// working directory, which the daemon never leaves.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// The named file; without one `orchestratord.yaml` is read if it is there.
    pub file: Option<PathBuf>,
    pub listen: Option<SocketAddr>,
    pub cache_dir: Option<PathBuf>,
    pub runtime_dir: Option<PathBuf>,
}

impl Source {
    /// The file's settings as they are now, with the command line's on top.
    pub fn load(&self) -> Result<Loaded, SetupError> {
        let mut loaded = Loaded::read(self.file.as_deref())?;
        let config = &mut loaded.config;
        if let Some(listen) = self.listen {
            config.listen = listen;
        }
        if let Some(dir) = &self.cache_dir {
            config.cache_dir = Some(dir.clone());
        }
        if let Some(dir) = &self.runtime_dir {
            config.runtime_dir = Some(dir.clone());
        }
        Ok(loaded)
    }
}
