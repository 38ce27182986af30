//! Builds the daemon, once per process and kind of build.
//!
//! Cargo holds no lock while tests run, so the nested build cannot wait for
//! its parent. It uses the same target directory and profile, so whatever was
//! built already is not built again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Which build of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// Default features: what users get.
    Default,
    /// With the feature `env-shim`, which is for development only.
    EnvShim,
}

impl Build {
    fn features(self) -> Option<&'static str> {
        match self {
            Self::Default => None,
            Self::EnvShim => Some("env-shim"),
        }
    }

    fn name(self) -> &'static str {
        self.features().unwrap_or("default")
    }
}

/// The daemon's executable.
pub fn orchestratord(build: Build) -> PathBuf {
    static DEFAULT: OnceLock<PathBuf> = OnceLock::new();
    static ENV_SHIM: OnceLock<PathBuf> = OnceLock::new();
    let place = match build {
        Build::Default => &DEFAULT,
        Build::EnvShim => &ENV_SHIM,
    };
    place.get_or_init(|| make(build)).clone()
}

/// All builds end up under one name in the target directory, so each is put
/// aside under a name of its own before another may be made.
fn make(build: Build) -> PathBuf {
    let aside = target_directory().join("tmp").join("e2e-haiku");
    fs::create_dir_all(&aside).expect("the target directory can be written to");
    let lock =
        File::create(aside.join("build.lock")).expect("the target directory can be written to");
    lock.lock().expect("a fresh lock file can be locked");
    let built = cargo_build(build);
    let kept = aside.join(format!("orchestratord-{}", build.name()));
    keep(&built, &kept);
    if build != Build::Default {
        // Nobody may find a development build under the daemon's usual name.
        cargo_build(Build::Default);
    }
    kept
}

fn cargo_build(build: Build) -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let command = escargot::CargoBuild::new()
        .manifest_path(manifest)
        .package("orchestratord")
        .bin("orchestratord")
        .target_dir(target_directory())
        .current_release();
    let command = match build.features() {
        Some(features) => command.features(features),
        None => command,
    };
    let run = command.run();
    let run = run
        .unwrap_or_else(|error| panic!("orchestratord ({}) does not build: {error}", build.name()));
    run.path().to_owned()
}

/// The same file under another name, or a copy where file systems part them.
fn keep(built: &Path, kept: &Path) {
    let fresh = kept.with_extension(std::process::id().to_string());
    let _ = fs::remove_file(&fresh);
    fs::hard_link(built, &fresh)
        .or_else(|_| fs::copy(built, &fresh).map(drop))
        .and_then(|()| fs::rename(&fresh, kept))
        .unwrap_or_else(|error| {
            panic!(
                "{} cannot be kept as {}: {error}",
                built.display(),
                kept.display()
            )
        });
    // Renaming one name of a file to another of the same file does nothing and says so nowhere.
    let _ = fs::remove_file(&fresh);
}

/// Cargo's target directory: the one that this test's own executable is in,
/// which Cargo marks.
pub fn target_directory() -> PathBuf {
    let own = std::env::current_exe().expect("a process knows its own executable");
    let marked = own
        .ancestors()
        .find(|directory| directory.join("CACHEDIR.TAG").exists());
    marked.map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
        Path::to_owned,
    )
}
