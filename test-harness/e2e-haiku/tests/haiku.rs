//! The proof: a haiku about this very minute, written by a real engine that
//! the daemon provisioned, with nothing canned on the way.

#![allow(clippy::print_stderr, reason = "the proof is to be read as it happens")]

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use test_harness_e2e_haiku::daemon::Daemon;
use test_harness_e2e_haiku::engine::{Engine, counter, sha256};
use test_harness_e2e_haiku::prompt::{self, Wording};
use test_harness_e2e_haiku::proof::{Attempt, Bundle};
use test_harness_e2e_haiku::settings::Settings;
use test_harness_e2e_haiku::sse::text;
use test_harness_e2e_haiku::verify::{self, Check, Expected, NAMES_THE_MINUTE};
use test_harness_e2e_haiku::wait_for;
use test_harness_e2e_haiku::words::Minute;

/// Once the pool is ready.
const LIMIT: Duration = Duration::from_secs(30);

const SAME_MINUTE: &str = "the minute did not change before the stream started";

const GENERATED: &str = "orchestratord_generated_tokens_total";

#[tokio::test]
async fn a_real_engine_writes_a_haiku_about_this_minute() {
    let mut bundle = Bundle::create();
    let settings = Settings {
        log: Some(bundle.dir().join("daemon.log")),
        ..Settings::real("haiku")
    };
    let daemon = Daemon::ready(&settings).await;
    let ready = Instant::now();
    let mut attempt = run(&daemon, &bundle, Wording::Open).await;
    if may_be_repeated(&attempt) {
        eprintln!("once more: {:?}", attempt.failed().collect::<Vec<_>>());
        bundle.second_attempt();
        attempt = run(&daemon, &bundle, Wording::Guided).await;
    }
    let took = ready.elapsed();
    bundle.keep_log(&daemon.engine_log());
    daemon.stop().await;
    eprintln!(
        "minute {}:\n{}\n",
        attempt.minute.words(),
        text(&attempt.events)
    );
    eprintln!("proof bundle: {}", bundle.dir().display());
    let failed: Vec<&Check> = attempt.failed().collect();
    assert!(
        failed.is_empty(),
        "{failed:#?}\nsee {}",
        bundle.dir().display()
    );
    assert!(
        took <= LIMIT,
        "the proof took {took:?}, at most {LIMIT:?} are allowed"
    );
}

/// Only what is nobody's fault: the clock went on, or the small model did not
/// write the words it was asked for.
fn may_be_repeated(attempt: &Attempt) -> bool {
    let mut failed = attempt.failed().peekable();
    failed.peek().is_some()
        && failed.all(|check| [SAME_MINUTE, NAMES_THE_MINUTE].contains(&check.name))
}

async fn run(daemon: &Daemon, bundle: &Bundle, wording: Wording) -> Attempt {
    let engine = daemon.engine().await;
    let before = counters(daemon, &engine, bundle, "before").await;

    let (minute, nonce) = (Minute::now(), prompt::nonce());
    let task = prompt::task(&daemon.pool, minute, &nonce, wording);
    let begun = Instant::now();
    let admission = daemon.api.submit(&task).await;
    let mut reader = daemon.api.events(&admission, None).await;
    let mut events: Vec<_> = reader.next().await.into_iter().collect();
    let minute_at_start = Minute::now();
    events.extend(reader.rest().await);
    let took = begun.elapsed();

    let tokens_out = events
        .last()
        .and_then(|end| end.event.data["tokens_out"].as_u64())
        .unwrap_or(0);
    let counted =
        async || (engine.tokens_predicted().await >= before.engine + tokens_out).then_some(());
    wait_for(
        "the engine's count of the tokens",
        Duration::from_secs(5),
        counted,
    )
    .await;
    let after = counters(daemon, &engine, bundle, "after").await;

    let capabilities = daemon.api.json("/v2/meta/capabilities").await;
    bundle.json("capabilities.json", &capabilities);
    let pool = capabilities["pools"]
        .as_array()
        .and_then(|pools| pools.first());
    let pool = pool.unwrap_or_else(|| panic!("no pool in {capabilities:#}"));
    let handoff = daemon.handoff();
    bundle.json("handoff.json", &handoff);

    let expected = Expected {
        minute,
        nonce: &nonce,
        limit: LIMIT,
    };
    let mut checks = verify::transcript(&events, &expected);
    checks.push(Check::same(SAME_MINUTE, &minute, &minute_at_start));
    checks.extend(counts(&before, &after, tokens_out));
    checks.extend(identities(daemon, &engine, &pool["replica"], &handoff));
    let end = events
        .last()
        .map_or(&Value::Null, |arrived| &arrived.event.data);
    checks.extend(claims(&capabilities, &pool["replica"], end));
    let attempt = Attempt {
        minute,
        minute_at_start,
        nonce,
        task,
        admission,
        events,
        took,
        replica: pool["replica"].clone(),
        checks,
    };
    attempt.write(bundle);
    attempt
}

/// Generated tokens, as the engine and the daemon count them.
#[derive(Debug)]
struct Counters {
    engine: u64,
    daemon: u64,
}

async fn counters(daemon: &Daemon, engine: &Engine, bundle: &Bundle, when: &str) -> Counters {
    let ours = daemon.api.text("/metrics").await;
    let theirs = engine.api.text("/metrics").await;
    bundle.text(&format!("daemon-metrics-{when}.txt"), &ours);
    bundle.text(&format!("engine-metrics-{when}.txt"), &theirs);
    let predicted = counter(&theirs, "llamacpp:tokens_predicted_total");
    Counters {
        engine: predicted
            .unwrap_or_else(|| panic!("the engine counts no predicted tokens:\n{theirs}")),
        // The daemon's counter is there from the first token on.
        daemon: counter(&ours, GENERATED).unwrap_or(0),
    }
}

fn counts(before: &Counters, after: &Counters, tokens_out: u64) -> [Check; 2] {
    [
        Check::same(
            "the engine's own counter rose by what `end` says",
            &(after.engine - before.engine),
            &tokens_out,
        ),
        Check::same(
            "the daemon's counter rose by what `end` says",
            &(after.daemon - before.daemon),
            &tokens_out,
        ),
    ]
}

/// That the process behind the pool is the engine that is reported, with the
/// model that is reported.
fn identities(daemon: &Daemon, engine: &Engine, replica: &Value, handoff: &Value) -> Vec<Check> {
    let digest = |path: &Path| {
        Value::String(sha256(path).unwrap_or_else(|error| format!("{}: {error}", path.display())))
    };
    let executable = digest(&engine.executable());
    let model = handoff["model"]["path"].as_str().unwrap_or("");
    let weights = digest(Path::new(model));
    let arguments = engine.arguments();
    let hosted = arguments
        .iter()
        .any(|argument| Path::new(argument) == Path::new(model));
    vec![
        Check::same_value(
            "the running binary has the reported digest",
            &executable,
            &replica["engine_digest"],
        ),
        Check::same_value(
            "the model file has the reported digest",
            &weights,
            &replica["model_digest"],
        ),
        Check::same_value(
            "the handoff names the same model",
            &handoff["model"]["digest"],
            &replica["model_digest"],
        ),
        Check::same_value(
            "the handoff names the same binary",
            &handoff["engine_digest"],
            &replica["engine_digest"],
        ),
        Check::new(
            "the engine was started with that model file",
            hosted,
            arguments.join(" "),
        ),
        Check::same(
            "the engine is the daemon's child",
            &engine.parent(),
            &Some(daemon.pid()),
        ),
        Check::new(
            "the engine's URL is that very process",
            engine.owns_its_port(),
            format!("pid {} at {}", engine.pid, engine.api.url()),
        ),
    ]
}

/// That daemon and receipt claim what was found.
fn claims(capabilities: &Value, replica: &Value, end: &Value) -> Vec<Check> {
    let receipt = &end["receipt"];
    let mode = &replica["provisioning_mode"];
    let provisioned = ["system", "cache", "release", "source"]
        .iter()
        .any(|known| mode == known);
    vec![
        Check::same_value(
            "only real engines may answer",
            &capabilities["require_real_llama"],
            &Value::Bool(true),
        ),
        Check::new("the engine was provisioned", provisioned, mode.to_string()),
        Check::same_value(
            "the receipt names the engine",
            &receipt["engine_digest"],
            &replica["engine_digest"],
        ),
        Check::same_value(
            "the receipt names the model",
            &receipt["model_digest"],
            &replica["model_digest"],
        ),
        Check::same_value(
            "the receipt names the mode",
            &receipt["provisioning_mode"],
            mode,
        ),
    ]
}
