//! Two minutes of chaos with the scripted engine.

use test_harness_chaos::args::{EngineChoice, Options};
use test_harness_chaos::run::run;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_minutes_with_the_scripted_engine_break_nothing() {
    let options = Options::new(EngineChoice::Scripted, 2.0, 20_261_124);
    let report = run(options, &|line| println!("{line}")).await;
    let report = report.expect("the harness can run");
    println!("{}", report.table());
    assert!(report.is_clean(), "{}", report.story());
    let injected: u64 = report.faults.iter().map(|row| row.injected).sum();
    assert!(injected >= 5, "only {injected} faults in two minutes");
    assert!(report.totals.completed > 0, "no task was completed");
    let guests = &report.guests;
    assert!(guests.completed > 0 && guests.cancelled > 0, "{guests:?}");
}
