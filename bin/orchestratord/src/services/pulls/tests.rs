//! The owner with a source that does as it is told.

use std::sync::Mutex;
use std::thread::{self, ThreadId};
use std::time::Duration;

use provision_kit::progress::{Silent, Step, StepKind, Unit};
use tokio::sync::watch;

use super::*;
use crate::services::watched::WorkState::{self, Queued, Running};

/// Brings a model when it is let.
#[derive(Debug)]
struct Source {
    /// What was begun, in order.
    begun: Mutex<Vec<String>>,
    /// The threads that worked.
    threads: Mutex<Vec<ThreadId>>,
    /// Names that may be brought now.
    let_through: watch::Sender<Vec<String>>,
}

#[async_trait]
impl Fetch for Source {
    fn identify(&self, reference: &str) -> Result<Identity, Failure> {
        if reference == "nobody" {
            return Err(Failure::new(ErrorCode::ModelNotFound, "nobody"));
        }
        let model = reference.split('?').next().unwrap().to_owned();
        Ok(Identity {
            has_secret: model != reference,
            key: model.to_lowercase(),
            model,
        })
    }

    async fn fetch(
        &self,
        reference: &str,
        reporter: Arc<dyn Reporter>,
    ) -> Result<PulledModel, Failure> {
        self.begun.lock().unwrap().push(reference.to_owned());
        self.threads.lock().unwrap().push(thread::current().id());
        let mut step = Step::start(&reporter, StepKind::ModelFetch, "x", Unit::Bytes, Some(10));
        step.set(4, Some(10));
        let mut let_through = self.let_through.subscribe();
        let is_let =
            |names: &Vec<String>| names.iter().any(|name| name == reference || name == "*");
        let_through.wait_for(is_let).await.unwrap();
        assert!(reference != "panics", "as it was told");
        step.set(10, Some(10));
        step.finish();
        if reference == "broken" {
            return Err(Failure::new(ErrorCode::ModelUnavailable, "broken").with_hint("mend it"));
        }
        Ok(PulledModel {
            digest: reference.to_owned(),
            path: String::new(),
            size_bytes: 10,
        })
    }
}

struct Bench {
    dir: tempfile::TempDir,
    source: Arc<Source>,
    pulls: Pulls,
    stop: CancellationToken,
    tracker: TaskTracker,
}

impl Bench {
    fn new() -> Self {
        Self::in_dir(tempfile::tempdir().unwrap())
    }

    fn in_dir(dir: tempfile::TempDir) -> Self {
        let source = Arc::new(Source {
            begun: Mutex::default(),
            threads: Mutex::default(),
            let_through: watch::Sender::new(Vec::new()),
        });
        let (stop, tracker) = (CancellationToken::new(), TaskTracker::new());
        let pulls = Pulls::start(
            source.clone(),
            dir.path().join("pulls.json"),
            Arc::new(Silent),
            &tracker,
            stop.clone(),
        );
        Self {
            dir,
            source,
            pulls,
            stop,
            tracker,
        }
    }

    fn let_through(&self, name: &str) {
        let add = |names: &mut Vec<String>| names.push(name.to_owned());
        self.source.let_through.send_modify(add);
    }

    async fn begin(&self, reference: &str) -> PullView {
        self.pulls.begin(reference).await.unwrap()
    }

    async fn until_over(&self, pull: &PullView) -> PullView {
        let (found, _) = self.pulls.show(&pull.pull_id).await.unwrap();
        let mut standing = found.work.watch();
        let over = standing.wait_for(|standing| standing.progress.state.is_over());
        let over = tokio::time::timeout(Duration::from_secs(30), over).await;
        let over = over.unwrap().unwrap().clone();
        found.view(&over, None)
    }

    async fn states(&self) -> Vec<WorkState> {
        let all = self.pulls.list().await.unwrap();
        all.iter().map(|pull| pull.progress.state).collect()
    }

    fn kept(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("pulls.json")).unwrap_or_default()
    }

    async fn end(self) -> tempfile::TempDir {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        self.dir
    }
}

#[tokio::test]
async fn two_run_the_rest_wait_and_the_same_bytes_are_pulled_once() {
    let bench = Bench::new();
    let first = bench.begin("a").await;
    assert_eq!(first.progress.state, WorkState::Running);
    bench.begin("b").await;
    let third = bench.begin("c").await;
    assert_eq!(third.queue_position, Some(0));
    assert_eq!(bench.begin("d").await.queue_position, Some(1));
    // By another name.
    assert_eq!(bench.begin(" A ").await.pull_id, first.pull_id);
    assert_eq!(bench.begin("C").await.pull_id, third.pull_id);
    assert_eq!(bench.states().await, [Running, Running, Queued, Queued]);
    bench.let_through("c");
    bench.let_through("b");
    let done = bench.until_over(&third).await;
    assert_eq!(done.progress.state, WorkState::Done);
    assert_eq!(
        (done.progress.bytes, done.progress.total_bytes),
        (10, Some(10))
    );
    assert_eq!(done.result.unwrap().digest, "c");
    assert!(done.ended_at.is_some());
    // What is over is pulled anew.
    bench.let_through("*");
    assert_ne!(bench.begin("c").await.pull_id, third.pull_id);
    assert!(!bench.source.begun.lock().unwrap().contains(&"A".to_owned()));
}

#[tokio::test]
async fn a_pull_does_not_run_where_tasks_are_served() {
    let bench = Bench::new();
    bench.let_through("*");
    let pull = bench.begin("a").await;
    bench.until_over(&pull).await;
    let threads = bench.source.threads.lock().unwrap();
    // This test's runtime has the one thread.
    assert!(threads.len() == 1 && !threads.contains(&thread::current().id()));
}

#[tokio::test]
async fn a_queue_that_is_full_is_said() {
    let bench = Bench::new();
    for number in 0..AT_ONCE + QUEUED_AT_MOST {
        bench.begin(&format!("m{number}")).await;
    }
    let refused = bench.pulls.begin("more").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::QueueFull);
    assert!(refused.retriable && refused.retry_after_ms.is_some());
    // One that joins needs no room.
    bench.begin("m1").await;
    assert_eq!(bench.states().await.len(), AT_ONCE + QUEUED_AT_MOST);
}

#[tokio::test]
async fn failures_and_panics_end_a_pull_and_nothing_else() {
    let bench = Bench::new();
    let refused = bench.pulls.begin("nobody").await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::ModelNotFound);
    let (broken, panics) = (bench.begin("broken").await, bench.begin("panics").await);
    let good = bench.begin("good").await;
    bench.let_through("*");
    let broken = bench.until_over(&broken).await;
    assert_eq!(broken.progress.state, WorkState::Failed);
    assert_eq!(broken.error.unwrap().hint.as_deref(), Some("mend it"));
    let panics = bench.until_over(&panics).await.error.unwrap();
    assert_eq!(panics.code, ErrorCode::Internal);
    assert_eq!(
        bench.until_over(&good).await.progress.state,
        WorkState::Done
    );
}

#[tokio::test]
async fn a_cancelled_pull_makes_room_and_stays_cancelled() {
    let bench = Bench::new();
    let (first, _) = (bench.begin("a").await, bench.begin("b").await);
    let (waiting, next) = (bench.begin("c").await, bench.begin("d").await);
    let cancelled = bench.pulls.cancel(&waiting.pull_id).await.unwrap();
    assert_eq!(cancelled.progress.state, WorkState::Cancelled);
    bench.pulls.cancel(&first.pull_id).await.unwrap();
    bench.let_through("*");
    assert_eq!(
        bench.until_over(&next).await.progress.state,
        WorkState::Done
    );
    let again = bench.pulls.cancel(&first.pull_id).await.unwrap();
    assert_eq!(again.progress.state, WorkState::Cancelled);
    let missing = bench.pulls.cancel("nothing").await.unwrap_err();
    assert_eq!(missing.code, ErrorCode::PullNotFound);
    assert!(!bench.source.begun.lock().unwrap().contains(&"c".to_owned()));
}

#[tokio::test]
async fn what_an_end_interrupts_the_next_process_goes_on_with() {
    let bench = Bench::new();
    let before = [
        bench.begin("a").await,
        bench.begin("b").await,
        bench.begin("c").await,
    ];
    let secret = bench.begin("d?sig=secret").await;
    bench.pulls.cancel(&before[1].pull_id).await.unwrap();
    assert!(bench.kept().contains("\"a\"") && !bench.kept().contains("\"b\""));
    // A reader is let go.
    let (pull, _) = bench.pulls.show(&before[0].pull_id).await.unwrap();
    let mut standing = pull.work.watch();
    let dir = bench.end().await;
    standing.wait_for(|it| it.abandoned).await.unwrap();

    let bench = Bench::in_dir(dir);
    assert!(bench.states().await.is_empty(), "only when it is told to");
    bench.pulls.go_on().await.unwrap();
    bench.pulls.go_on().await.unwrap();
    assert_eq!(bench.states().await.len(), 2);
    assert!(!bench.kept().contains("secret"));
    assert!(bench.pulls.show(&secret.pull_id).await.is_err());
    bench.let_through("*");
    for pull in [&before[0], &before[2]] {
        let done = bench.until_over(pull).await;
        assert_eq!(done.progress.state, WorkState::Done);
        assert_eq!(done.created_at, pull.created_at);
    }
    // The owner has written down by the time it answers.
    bench.pulls.list().await.unwrap();
    assert_eq!(bench.kept(), "");
}
