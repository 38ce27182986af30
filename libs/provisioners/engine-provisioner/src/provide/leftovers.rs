//! What killed processes left of engines that they were making.

use std::time::SystemTime;

use provision_kit::dirs::CacheDirs;
use provision_kit::leftovers::{
    RESUMABLE, clear_downloads, clear_staged, entries, is_older, remove_unlocked,
};

/// Removes staged engines that nobody makes any more, builds and downloads that nobody went on with
/// for two weeks, and temporary files. Blocking.
pub(super) fn clear(cache: &CacheDirs, now: SystemTime) {
    for (name, path) in entries(&cache.engines()) {
        let staged = name
            .strip_prefix('.')
            .and_then(|rest| rest.strip_suffix(".staging"));
        let build = name
            .strip_prefix("build-")
            .filter(|_| is_older(&path, RESUMABLE, now));
        if let Some(recipe) = staged.or(build) {
            let lock = cache.locks().join(format!("engine-{recipe}.lock"));
            remove_unlocked(&path, &lock);
        }
    }
    let is_digest = |stem: &str| stem.len() == 64 && stem.bytes().all(|b| b.is_ascii_hexdigit());
    clear_downloads(&cache.downloads(), now, |stem| {
        is_digest(stem).then(|| cache.locks().join(format!("download-{stem}.lock")))
    });
    for directory in [cache.downloads(), cache.run()] {
        clear_staged(&directory, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use provision_kit::lock::FileLock;
    use std::fs;
    use std::time::Duration;

    #[test]
    fn what_a_killed_process_staged_goes_and_what_can_be_gone_on_with_stays() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheDirs::new(directory.path());
        let engines = cache.engines();
        for name in [
            ".b7-dead.staging",
            ".b7-live.staging",
            "build-b7-dead",
            "b7-done",
        ] {
            fs::create_dir_all(engines.join(name).join("below")).unwrap();
        }
        let lock = cache.locks().join("engine-b7-live.lock");
        let _held = FileLock::try_acquire(&lock).unwrap().unwrap();
        let left = || {
            let mut names: Vec<_> = entries(&engines)
                .into_iter()
                .map(|(name, _)| name)
                .collect();
            names.sort();
            names
        };
        clear(&cache, SystemTime::now());
        assert_eq!(left(), [".b7-live.staging", "b7-done", "build-b7-dead"]);
        clear(
            &cache,
            SystemTime::now() + RESUMABLE + Duration::from_mins(1),
        );
        assert_eq!(left(), [".b7-live.staging", "b7-done"]);
    }
}
