//! The configuration as people write it, right and wrong.

use std::path::PathBuf;

use provision_kit::config::parse_strict;

use super::loaded::line_of;
use super::*;
use llama_orch_types::Hinted;

fn load(text: &str) -> Result<Loaded, SetupError> {
    let path = PathBuf::from("orchestratord.yaml");
    let config = parse_strict::<Config>(text, &path).map_err(SetupError::Read)?;
    Ok(Loaded {
        config,
        origin: Some((path, text.to_owned())),
    })
}

fn complaint(text: &str) -> String {
    let error = match load(text) {
        Err(error) => error,
        Ok(loaded) => loaded
            .check(loaded.config.auth.token.is_some(), true)
            .unwrap_err(),
    };
    let hint = error.hint().unwrap_or_default();
    format!("{} | {hint}", provision_kit::chain::one_line(&error))
}

#[test]
fn nothing_at_all_serves_haiku_on_loopback() {
    let loaded = Loaded::default();
    loaded.check(false, true).unwrap();
    assert_eq!(loaded.config.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(loaded.config.pools[&PoolId::default_pool()].model, "haiku");
    assert!(load("").is_ok(), "an empty file is no configuration");
}

#[test]
fn every_complaint_names_file_line_and_key() {
    for (text, line, word) in [
        (
            "listen: 127.0.0.1:1\npools:\n  a:\n    slotz: 2\n",
            ":4",
            "slotz",
        ),
        ("pools:\n  a:\n    slots: 0\n", ":3", "out of range"),
        ("pools:\n  A:\n    slots: 1\n", ":2", "A"),
        ("pools:\n  a:\n    engine: vllm\n", ":3", "vllm"),
        ("pools:\n  a:\n    model: haikuu\n", ":3", "haikuu"),
        ("pools:\n  a:\n    flags: [--port, '1']\n", ":3", "--port"),
        ("limits:\n  connections: 7\n", ":2", "out of range"),
        ("listen: somewhere\n", ":1", "somewhere"),
        ("drain_seconds: soon\n", ":1", "drain_seconds"),
        ("# why not\nlisten: 0.0.0.0:8080\n", ":2", "listen"),
        (
            "pools:\n  a:\n    model: haiku\n  b:\n    engine: mock\n",
            ":5",
            "pools.b.engine",
        ),
    ] {
        let complaint = complaint(text);
        assert!(complaint.contains("orchestratord.yaml"), "{complaint}");
        assert!(complaint.contains(line), "{complaint} misses {line}");
        assert!(complaint.contains(word), "{complaint} misses {word}");
    }
}

#[test]
fn a_signed_models_query_is_not_shown() {
    for plain in ["haiku", "./a?b.gguf", "https://example.org/m.gguf"] {
        assert_eq!(shown_model(plain), plain);
    }
    let shown = shown_model("https://example.org/m.gguf?sig=s3cret");
    assert!(shown.starts_with("https://example.org/m.gguf?…"), "{shown}");
    assert!(!shown.contains("s3cret"));
    assert!(!shown_model("https://u:p@example.org/m.gguf?sig=s3cret").contains("s3cret"));
}

#[test]
fn a_place_is_named_once() {
    let complaint = complaint("pools:\n  a:\n    slots: 999\n");
    assert!(
        complaint.contains("`slots`: 999 is out of range: 1 to 256 |"),
        "{complaint}"
    );
}

#[test]
fn an_unknown_key_is_answered_with_the_nearest() {
    assert!(complaint("pools:\n  a:\n    slotz: 2\n").contains("slots"));
}

#[cfg(feature = "provisioning")]
#[test]
fn the_deterministic_profile_has_one_slot() {
    let text = "pools:\n  a:\n    profile: deterministic\n    slots: 4\n";
    assert!(
        complaint(text).contains("orchestratord.yaml:4: `pools.a.slots`"),
        "{}",
        complaint(text)
    );
    let loaded = load("pools:\n  a:\n    slots: 4\n").unwrap();
    let pool = loaded.config.pools.values().next().unwrap();
    assert_eq!(pool.effective_profile(), Profile::Throughput);
}

#[test]
fn a_token_lets_other_machines_in_and_is_never_shown() {
    let loaded = load("listen: 0.0.0.0:8080\nauth:\n  token: s3cret\n").unwrap();
    loaded.check(true, true).unwrap();
    assert!(!format!("{loaded:?}", loaded = loaded.config).contains("s3cret"));
    assert!(complaint("auth:\n  token: 'a b'\n").contains("visible ASCII"));
}

#[test]
fn a_line_is_found_under_its_own_parent_only() {
    let text = "a:\n  x: 1\n# x: 9\nb:\n  x: 2\n";
    assert_eq!(line_of(text, &["b", "x"]), Some(5));
    assert_eq!(line_of(text, &["c", "x"]), None);
    let text = "pools:\n  a:\n    ctx: 1\n  b:\n    slots: 2\n";
    assert_eq!(line_of(text, &["pools", "a", "slots"]), None);
    assert_eq!(line_of(text, &["pools", "b", "slots"]), Some(5));
}
