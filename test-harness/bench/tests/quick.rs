//! The whole benchmark, much reduced, in whatever build the tests are: what
//! comes out must be complete, and within bounds that no noise reaches.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use test_harness_bench::args::{Args, What};
use test_harness_bench::goals::Goal;
use test_harness_bench::place::on_path;
use test_harness_bench::report::{Report, Table};

/// nginx is a release build, the daemon here is mostly none: seen 10 to 25.
const MOST_CPU_TO_NGINX: f64 = 120.0;

fn args(out: &Path, what: What) -> Args {
    Args {
        what,
        quick: false,
        rounds: None,
        out: out.to_owned(),
        threads: 1,
        readme: Some(out.join("README.md")),
        bench_engine: Some(PathBuf::from(env!("CARGO_BIN_EXE_bench-engine"))),
        smoke: true,
    }
}

#[tokio::test]
async fn a_reduced_run_measures_everything() {
    let dir = tempfile::tempdir().unwrap();
    let readme = dir.path().join("README.md");
    let marks = "before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n";
    fs::write(&readme, marks).unwrap();
    let report = test_harness_bench::run(&args(dir.path(), What::All))
        .await
        .unwrap();
    println!("{}", report.shown());

    let nginx = on_path("nginx").is_some();
    if !nginx {
        println!("nginx is not installed: nothing is compared with it");
        assert!(report.notes.iter().any(|note| note.contains("nginx")));
    }
    tables_are_whole(&report, if nginx { 4 } else { 2 });
    goals_are_within_reason(&report, nginx);
    files_are_written(dir.path(), &report);
    let written = fs::read_to_string(&readme).unwrap();
    assert!(written.starts_with("before\n") && written.ends_with("after\n"));
    assert!(written.contains(&report.date) && written.contains("| figure"));
}

fn tables_are_whole(report: &Report, relays: usize) {
    let named = |part: &str| {
        let tables = report.tables.iter();
        let found: Vec<&Table> = tables
            .filter(|table| table.name.starts_with(part))
            .collect();
        found
    };
    let relay = named("relay");
    assert_eq!(relay.len(), 6);
    for table in relay {
        // The engine itself is measured flat out only.
        let bare = usize::from(table.name.contains("flat out"));
        assert_eq!(table.rows.len(), relays + bare, "{}", table.name);
        let lost = table.columns.iter().position(|column| column == "lost");
        for row in &table.rows {
            assert_eq!(row[lost.unwrap()].value, Some(0.0), "{}", table.shown());
        }
    }
    assert_eq!(named("scale").len(), 2);
    assert_eq!(named("start").len(), 1);
    // Four numbers of streams, for tasks and for /v1, of two kinds of engine.
    assert_eq!(named("overhead").len(), 16);
    for table in &report.tables {
        assert!(table.rows.len() >= 2, "{}", table.name);
        for row in &table.rows {
            assert_eq!(row.len(), table.columns.len(), "{}", table.name);
            let figures: Vec<f64> = row.iter().filter_map(|cell| cell.value).collect();
            let finite = figures.iter().all(|figure| figure.is_finite());
            assert!(finite && !figures.is_empty(), "{}", table.shown());
        }
    }
}

fn goals_are_within_reason(report: &Report, nginx: bool) {
    let goal = |part: &str| {
        let mut goals = report.goals.iter();
        goals.find(|goal| goal.name.contains(part)).unwrap()
    };
    let seen = |goal: &Goal| goal.measured.unwrap();
    for part in ["queued tasks", "open readers"] {
        let goal = goal(part);
        assert!(seen(goal) < 4.0 * goal.target, "{goal:?}");
    }
    for goal in &report.goals {
        let compared = goal.name.contains("nginx");
        assert_eq!(goal.measured.is_some(), nginx || !compared, "{goal:?}");
        if goal.name.contains("lost") {
            assert_eq!(goal.reached(), Some(true), "{goal:?}");
        }
        if goal.name.contains("CPU") && nginx {
            assert!(seen(goal) < MOST_CPU_TO_NGINX, "{goal:?}");
        }
    }
    let queue = report
        .tables
        .iter()
        .find(|table| table.name.contains("by the queue's length"));
    let last = queue.unwrap().rows.last().unwrap();
    assert!(
        last[1].value.unwrap() < 10.0,
        "an admission costs more in a longer queue"
    );
}

fn files_are_written(dir: &Path, report: &Report) {
    let json = fs::read_to_string(dir.join("bench.json")).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    let count = |name: &str| json[name].as_array().map_or(0, Vec::len);
    assert_eq!(count("tables"), report.tables.len());
    assert_eq!(count("goals"), report.goals.len());
    let text = fs::read_to_string(dir.join("bench.md")).unwrap();
    assert_eq!(text, report.shown());
    let plot = fs::read_to_string(dir.join("bench.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"));
}
