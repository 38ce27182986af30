//! One minute of chaos with the real engine.

use test_harness_chaos::args::{EngineChoice, Options};
use test_harness_chaos::run::run;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minute_with_the_real_engine_breaks_nothing() {
    let mut options = Options::new(EngineChoice::Real, 1.0, 11_434);
    // Its answers cost two cores that other tests want, too.
    options.clients = 2;
    let report = run(options, &|line| println!("{line}")).await;
    let report = report.expect("the harness can run");
    println!("{}", report.table());
    assert!(report.is_clean(), "{}", report.story());
    let injected: u64 = report.faults.iter().map(|row| row.injected).sum();
    assert!(injected >= 3, "only {injected} faults in a minute");
    assert!(report.totals.completed > 0, "no task was completed");
}
