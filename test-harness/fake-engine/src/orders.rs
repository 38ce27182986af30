//! Orders to running engines: each makes one completion go wrong.
//!
//! An order is a file beside the engine's binary. Whichever engine of that
//! directory begins a completion next takes it, and carries it out once, so a
//! fault can be had without a restart.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::script::Fault;

/// The directory that holds orders, beside the engine's binary.
const DIRECTORY: &str = "fake-engine.orders";

/// Has the next completion of an engine in `dir` go wrong. Orders are taken
/// oldest first.
pub fn order(dir: &Path, fault: &Fault) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let orders = dir.join(DIRECTORY);
    std::fs::create_dir_all(&orders).expect("the test's directory can be written to");
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let text = serde_json::to_string(fault).expect("a fault is plain data");
    // Written aside: an engine must not take half an order.
    let staged = orders.join(format!("{number:012}.new"));
    std::fs::write(&staged, text).expect("the test's directory can be written to");
    std::fs::rename(&staged, staged.with_extension("json"))
        .expect("the test's directory can be written to");
}

/// Takes back the orders that nobody has carried out, and says how many.
pub fn take_back(dir: &Path) -> usize {
    let waiting = waiting(dir);
    let removed = waiting
        .iter()
        .filter(|path| std::fs::remove_file(path).is_ok());
    removed.count()
}

/// Takes the oldest order, if there is one. Of several engines only one gets
/// it: whoever removes the file.
pub fn take(dir: &Path) -> Option<Fault> {
    waiting(dir).into_iter().find_map(|path| {
        let text = std::fs::read_to_string(&path).ok()?;
        std::fs::remove_file(&path).ok()?;
        serde_json::from_str(&text).ok()
    })
}

fn waiting(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir.join(DIRECTORY)) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "json")
        })
        .collect();
    paths.sort();
    paths
}
