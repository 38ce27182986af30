//! The env shim: refused wherever only real engines may answer, absent from
//! the default build, and marked in every receipt where it is used.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use test_harness_e2e_haiku::binary::Build;
use test_harness_e2e_haiku::daemon::{Daemon, refused};
use test_harness_e2e_haiku::settings::Settings;
use test_harness_e2e_haiku::sse::text;
use test_harness_e2e_haiku::wait_for;
use test_harness_fake_engine::{FakeEngine, Script};

const URL: &str = "ORCHD_LLAMACPP_URL";

async fn is_refused(build: Build) {
    let mut settings = Settings {
        build,
        ..Settings::real("refused")
    };
    // Nobody listens there, and nobody is to be asked.
    settings
        .variables
        .push((URL, "http://127.0.0.1:9".to_owned()));
    let refused = refused(&settings).await;
    assert!(!refused.status.success(), "{refused:?}");
    for name in [URL, "REQUIRE_REAL_LLAMA"] {
        assert!(
            refused.stderr.contains(name),
            "{name} is not named: {refused:?}"
        );
    }
}

#[tokio::test]
async fn a_default_build_refuses_the_shim_where_only_real_engines_may_answer() {
    is_refused(Build::Default).await;
}

#[tokio::test]
async fn a_build_with_the_shim_refuses_it_where_only_real_engines_may_answer() {
    is_refused(Build::EnvShim).await;
}

#[tokio::test]
async fn a_scripted_engine_is_refused_where_only_real_engines_may_answer() {
    let settings = Settings {
        pool: json!({ "engine": "mock" }),
        ..Settings::real("scripted")
    };
    let refused = refused(&settings).await;
    assert!(!refused.status.success(), "{refused:?}");
    assert!(refused.stderr.contains("REQUIRE_REAL_LLAMA"), "{refused:?}");
}

async fn features(build: Build, name: &'static str) -> Vec<String> {
    // No engine is needed to ask for the features.
    let settings = Settings {
        build,
        variables: Vec::new(),
        ..Settings::without_engine(name)
    };
    let mut daemon = Daemon::launch(&settings).await;
    let capabilities = daemon.api.json("/v2/meta/capabilities").await;
    daemon.end().await;
    serde_json::from_value(capabilities["features"].clone()).expect("a list of features")
}

#[tokio::test]
async fn a_default_build_has_neither_shim_nor_scripted_engine() {
    let default = features(Build::Default, "features").await;
    assert!(default.contains(&"provisioning".to_owned()), "{default:?}");
    for development in ["env-shim", "mock-adapter"] {
        assert!(!default.contains(&development.to_owned()), "{default:?}");
    }
    // The list can tell: another build's is another.
    let shim = features(Build::EnvShim, "shim-features").await;
    assert!(shim.contains(&"env-shim".to_owned()), "{shim:?}");
}

#[tokio::test]
async fn the_shim_binds_an_engine_elsewhere_and_every_receipt_says_so() {
    let pieces = ["Not", " a", " model", "."];
    let engine = FakeEngine::start(&Script::with_pieces(&pieces));
    let mut settings = Settings {
        build: Build::EnvShim,
        variables: vec![(URL, engine.url())],
        ..Settings::real("shim")
    };
    settings
        .variables
        .push(("ORCHD_LLAMACPP_POOL", settings.pool_id()));
    let mut daemon = Daemon::ready(&settings).await;
    let replica = daemon.pool_view().await["replica"].clone();
    assert_eq!(replica["provisioning_mode"], "env_shim", "{replica:#}");
    assert_eq!(replica["url"], json!(engine.url()), "{replica:#}");
    assert!(
        replica.get("engine_digest").is_none() && replica.get("pid").is_none(),
        "{replica:#}"
    );

    let task = json!({ "pool_id": daemon.pool, "prompt": "Hello", "max_tokens": 32 });
    let admission = daemon.api.submit(&task).await;
    let events = daemon.api.events(&admission, None).await.rest().await;
    assert_eq!(text(&events), pieces.concat());
    let end = &events.last().expect("a stream has events").event;
    assert_eq!(
        end.data["receipt"]["provisioning_mode"], "env_shim",
        "{end:?}"
    );
    assert_eq!(engine.requests().len(), 1, "the engine was not asked");
    assert!(
        daemon.log_text().contains("ENV SHIM"),
        "{}",
        daemon.log_text()
    );

    // The engine is not the daemon's: it outlives it.
    daemon.end().await;
    assert_eq!(engine.busy_slots(), 0);
}

#[tokio::test]
async fn a_default_build_ignores_the_shims_variable() {
    // With nothing but the variable to go by, a default build has no engine.
    let engine = FakeEngine::start(&Script::default());
    let mut settings = Settings {
        variables: vec![(URL, engine.url())],
        ..Settings::without_engine("ignored")
    };
    settings
        .variables
        .push(("ORCHD_LLAMACPP_POOL", settings.pool_id()));
    let mut daemon = Daemon::launch(&settings).await;
    let path = format!("/v2/pools/{}", daemon.pool);
    let pool = wait_for("the pool's failure", Duration::from_mins(1), async || {
        let pool: Value = daemon.api.json(&path).await;
        (pool["state"] == "failed").then_some(pool)
    });
    let pool = pool.await;
    assert!(pool.get("replica").is_none(), "{pool:#}");
    let task = json!({ "pool_id": daemon.pool, "prompt": "Hello" });
    let (status, body) = daemon.api.post("/v2/tasks", &task).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body:#}");
    assert_eq!(engine.requests(), Vec::<Value>::new());
    daemon.end().await;
}
