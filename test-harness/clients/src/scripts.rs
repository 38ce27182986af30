//! Runs one of the Python scripts against a server.

#![allow(clippy::print_stdout, reason = "what a client saw is to be read")]

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;

use crate::environment;

const LIMIT: Duration = Duration::from_mins(3);

/// Settings of a machine that would send an SDK elsewhere, or make it say who
/// somebody is.
const FOREIGN: [&str; 5] = ["OPENAI_", "ANTHROPIC_", "OLLAMA_", "PYTHON", "HTTPX_"];

/// Runs `python/<name>.py`; panics, with what it wrote, if one of its checks
/// fails.
pub async fn run(name: &str, base_url: &str, arguments: &[&str]) {
    let packages = environment::packages().await;
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    let mut command = Command::new("python3");
    for (variable, _) in std::env::vars_os() {
        let text = variable.to_string_lossy();
        let proxy = text.to_ascii_lowercase().ends_with("_proxy");
        if proxy || FOREIGN.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&variable);
        }
    }
    command
        // Without bytecode files beside the scripts, and nothing held back.
        .args(["-B", "-u", "-s"])
        .arg(directory.join(format!("{name}.py")))
        .args(["--base-url", base_url])
        .args(arguments)
        .env("PYTHONPATH", packages)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let begun = Instant::now();
    let output = tokio::time::timeout(LIMIT, command.output())
        .await
        .unwrap_or_else(|_| panic!("{name}.py does not end within {} s", LIMIT.as_secs()))
        .unwrap_or_else(|error| panic!("{name}.py cannot be started: {error}"));
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{name}.py, {:.1} s:\n{said}", begun.elapsed().as_secs_f64());
    assert!(
        output.status.success(),
        "{name}.py ended with {}:\n{said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
