//! Building with CMake and ninja.
//!
//! Ninja is our direct child, not CMake's: it puts each compiler into a process group of its own,
//! so killing it would leave them running. It is ended with TERM, upon which it ends them.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use provision_kit::blocking::blocking;
use provision_kit::fs::FsError;
use provision_kit::process::{self, ChildGroup, CommandSpec, DeathSignal};
use provision_kit::progress::{Reporter, Step, StepKind, Unit};
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWriteExt as _, BufReader};

use super::{BINARY, tools};
use crate::config::Accelerator;
use crate::error::EngineError;
use crate::run::environment::scrub;
use crate::version;

/// Longest that CMake may take to look at the machine.
const CONFIGURE_LIMIT: Duration = Duration::from_mins(15);

/// Longest that a build may take. CUDA's takes an hour on a small machine.
const BUILD_LIMIT: Duration = Duration::from_hours(4);

/// How long the end of a tool's streams is waited for once the tool is gone.
const DRAIN: Duration = Duration::from_secs(1);

/// How many of the last lines go into an error.
const TAIL_LINES: usize = 15;

/// CMake's options, apart from paths, which do not change what is built. `compiler` is the line in
/// which the compiler names its version.
pub(super) fn options(
    engine_version: &str,
    accelerator: Accelerator,
    compiler: &str,
    cpu_features: &str,
) -> Vec<String> {
    let mut options: Vec<String> = [
        "CMAKE_BUILD_TYPE=Release",
        // One file that needs nothing beside it.
        "BUILD_SHARED_LIBS=OFF",
        "LLAMA_BUILD_TESTS=OFF",
        "LLAMA_BUILD_EXAMPLES=OFF",
        "LLAMA_BUILD_APP=OFF",
        // The page is not served, and a prebuilt one would be fetched from somewhere.
        "LLAMA_BUILD_UI=OFF",
        "LLAMA_USE_PREBUILT_UI=OFF",
        // The name that older versions know it by.
        "LLAMA_BUILD_WEBUI=OFF",
        // The engine is given a file and speaks HTTP over loopback only: without these it needs
        // no headers of either.
        "LLAMA_OPENSSL=OFF",
        "LLAMA_CURL=OFF",
        "GGML_NATIVE=ON",
        // Otherwise the build asks git, which may find a repository around the cache directory.
        "LLAMA_BUILD_COMMIT=unknown",
    ]
    .map(|option| format!("-D{option}"))
    .to_vec();
    if let Some(number) = version::build_number(engine_version) {
        options.push(format!("-DLLAMA_BUILD_NUMBER={number}"));
    }
    match accelerator {
        Accelerator::Cpu => {}
        Accelerator::Cuda => options.push("-DGGML_CUDA=ON".to_owned()),
        Accelerator::Vulkan => options.push("-DGGML_VULKAN=ON".to_owned()),
    }
    if cpu_features.contains("amx_tile") && miscompiles_amx(compiler) {
        for language in ["C", "CXX"] {
            let flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16";
            options.push(format!("-DCMAKE_{language}_FLAGS={flags}"));
        }
    }
    options
}

/// Whether an option is there for the compiler's sake, and changes nothing else about the engine.
pub(super) fn is_for_compiler(option: &str) -> bool {
    option.starts_with("-DCMAKE_C_FLAGS=-mno-amx")
        || option.starts_with("-DCMAKE_CXX_FLAGS=-mno-amx")
}

/// Whether this compiler is a GCC that drops the stores to the tile configuration before the
/// instruction that loads it: it takes 64 bytes for 8 (GCC's bug 114098, mended in 11.5, 12.4, 13.3
/// and 14). An engine built by one for a CPU with AMX crashes on its first matrix.
fn miscompiles_amx(compiler: &str) -> bool {
    if compiler.contains("clang") {
        return false;
    }
    let number = |word: &str| -> Option<(u32, u32)> {
        let mut parts = word.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    // `c++ (Debian 12.2.0-14+deb12u1) 12.2.0`: the version follows the vendor's parentheses, and
    // some vendors put a date and more of them behind it.
    let words = compiler.split_once(") ").map_or("", |(_, words)| words);
    match words.split_whitespace().find_map(number) {
        Some((11, minor)) => minor < 5,
        Some((12, minor)) => minor < 4,
        Some((13, minor)) => minor < 3,
        // Older ones know neither AMX nor the options that leave it out.
        _ => false,
    }
}

/// One build.
#[derive(Debug)]
pub(super) struct BuildPlan {
    /// For people: what is built.
    pub what: String,
    pub cmake: PathBuf,
    pub ninja: PathBuf,
    pub source: PathBuf,
    pub build: PathBuf,
    pub log: PathBuf,
    pub options: Vec<String>,
    pub cuda_compiler: Option<PathBuf>,
    pub jobs: Option<u32>,
}

/// Configures and builds; returns the built binary. Dropping the future ends the build, which goes
/// on from there next time.
pub(super) async fn run(
    plan: &BuildPlan,
    reporter: &Arc<dyn Reporter>,
) -> Result<PathBuf, EngineError> {
    let what = format!("building {}", plan.what);
    let mut step = Step::start(
        reporter,
        StepKind::EngineProvision,
        what,
        Unit::BuildSteps,
        None,
    );
    let mut log = BuildLog::create(&plan.log).await?;
    configure(plan, &mut log, &mut step).await?;

    let mut spec = CommandSpec::new(&plan.ninja)
        .arg("-C")
        .arg(&plan.build)
        .death_signal(DeathSignal::Terminate)
        // A user's own setting must not hide the count from us.
        .env("NINJA_STATUS", "[%f/%t] ");
    if let Some(jobs) = plan.jobs {
        spec = spec.arg("-j").arg(jobs.to_string());
    }
    let status = run_tool("ninja", spec.arg(BINARY), &mut log, &mut step, BUILD_LIMIT).await?;
    if !status.success() {
        return Err(log.failure("ninja", status).await);
    }
    let built = [plan.build.join("bin").join(BINARY), plan.build.join(BINARY)]
        .into_iter()
        .find(|path| crate::machine::is_executable(path))
        .ok_or_else(|| EngineError::NotInArchive {
            archive: plan.build.clone(),
            what: BINARY,
        })?;
    step.finish();
    Ok(built)
}

/// Runs CMake. What an earlier, interrupted run left may not fit any more (another CMake, a moved
/// cache directory): then it starts over once.
async fn configure(
    plan: &BuildPlan,
    log: &mut BuildLog,
    step: &mut Step,
) -> Result<(), EngineError> {
    let resumed = plan.build.join("CMakeCache.txt").exists();
    if resumed {
        step.note("going on with an interrupted build");
    }
    let mut spec = CommandSpec::new(&plan.cmake)
        .arg("-S")
        .arg(&plan.source)
        .arg("-B")
        .arg(&plan.build)
        .args(["-G", "Ninja"])
        .arg(format!("-DCMAKE_MAKE_PROGRAM={}", plan.ninja.display()))
        .args(&plan.options);
    if let Some(nvcc) = &plan.cuda_compiler {
        spec = spec.arg(format!("-DCMAKE_CUDA_COMPILER={}", nvcc.display()));
    }
    let status = run_tool("cmake", spec.clone(), log, step, CONFIGURE_LIMIT).await?;
    if status.success() {
        return Ok(());
    }
    if !resumed {
        return Err(log.failure("cmake", status).await);
    }
    step.note("what the interrupted build left is of no use: starting over");
    let stale = plan.build.clone();
    blocking(move || tools::remove_tree(&stale)).await?;
    let status = run_tool("cmake", spec, log, step, CONFIGURE_LIMIT).await?;
    if status.success() {
        Ok(())
    } else {
        Err(log.failure("cmake", status).await)
    }
}

/// Runs one tool to its end; what it says goes to the log, and its count to the step.
async fn run_tool(
    tool: &'static str,
    spec: CommandSpec,
    log: &mut BuildLog,
    step: &mut Step,
    limit: Duration,
) -> Result<ExitStatus, EngineError> {
    let failed = |source| EngineError::BuildTool { tool, source };
    let program = spec.program().to_owned();
    let mut group = process::spawn(scrub(spec)).await.map_err(failed)?;
    match tokio::time::timeout(limit, follow(&mut group, log, step)).await {
        Ok(status) => status.map_err(|error| match error {
            Followed::Process(source) => failed(source),
            Followed::Log(error) => error.into(),
        }),
        // Dropping the group ends it.
        Err(_) => Err(failed(process::ProcessError::TimedOut { program, limit })),
    }
}

enum Followed {
    Process(process::ProcessError),
    Log(FsError),
}

async fn follow(
    group: &mut ChildGroup,
    log: &mut BuildLog,
    step: &mut Step,
) -> Result<ExitStatus, Followed> {
    let mut stdout = Lines::new(group.take_stdout());
    let mut stderr = Lines::new(group.take_stderr());
    let mut status = None;
    let mut deadline = None;
    loop {
        let drained = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let line = tokio::select! {
            line = stdout.next(), if !stdout.ended => line,
            line = stderr.next(), if !stderr.ended => line,
            ended = group.wait(), if status.is_none() => {
                status = Some(ended.map_err(Followed::Process)?);
                // A daemon that the tool started (a compiler cache does) may hold the streams open
                // for ever.
                deadline = Some(tokio::time::Instant::now() + DRAIN);
                continue;
            }
            () = drained => break,
            else => break,
        };
        if let Some(line) = line {
            if let Some((done, total)) = parse_count(&line) {
                step.set(done, Some(total));
            }
            log.add(&line).await.map_err(Followed::Log)?;
        }
    }
    match status {
        Some(status) => Ok(status),
        None => group.wait().await.map_err(Followed::Process),
    }
}

/// The lines of one stream. Reading can be cancelled and gone on with.
struct Lines<R> {
    reader: Option<BufReader<R>>,
    partial: Vec<u8>,
    ended: bool,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    fn new(stream: Option<R>) -> Self {
        Self {
            ended: stream.is_none(),
            reader: stream.map(BufReader::new),
            partial: Vec::new(),
        }
    }

    /// The next line; `None` at the end, and when a stream fails, which a build does not hang on.
    async fn next(&mut self) -> Option<String> {
        let read = match &mut self.reader {
            Some(reader) => reader
                .read_until(b'\n', &mut self.partial)
                .await
                .unwrap_or(0),
            None => 0,
        };
        if read == 0 {
            self.ended = true;
            if self.partial.is_empty() {
                return None;
            }
        }
        let line = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
        self.partial.clear();
        Some(line)
    }
}

/// Ninja's count at the start of a line: `[12/345] Building …`.
fn parse_count(line: &str) -> Option<(u64, u64)> {
    let (count, _) = line.strip_prefix('[')?.split_once(']')?;
    let (done, total) = count.split_once('/')?;
    let (done, total) = (done.trim().parse().ok()?, total.trim().parse().ok()?);
    (done <= total).then_some((done, total))
}

/// Everything that the tools say, in a file, and the last lines in memory.
struct BuildLog {
    path: PathBuf,
    file: File,
    tail: VecDeque<String>,
}

impl BuildLog {
    async fn create(path: &Path) -> Result<Self, FsError> {
        let file = File::create(path)
            .await
            .map_err(FsError::at("create", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            tail: VecDeque::new(),
        })
    }

    async fn add(&mut self, line: &str) -> Result<(), FsError> {
        let text = format!("{line}\n");
        self.file
            .write_all(text.as_bytes())
            .await
            .map_err(FsError::at("write", &self.path))?;
        // Lines that only count say nothing about a failure.
        if parse_count(line).is_none() && !line.is_empty() {
            if self.tail.len() == TAIL_LINES {
                self.tail.pop_front();
            }
            self.tail.push_back(line.chars().take(400).collect());
        }
        Ok(())
    }

    async fn failure(&mut self, tool: &'static str, status: ExitStatus) -> EngineError {
        if let Err(error) = self.file.flush().await {
            tracing::warn!(%error, "the end of the build's log is lost");
        }
        EngineError::Build {
            tool,
            status: status.to_string(),
            log: self.path.clone(),
            tail: self.tail.iter().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ninjas_count_is_read() {
        assert_eq!(
            parse_count("[12/345] Building CXX object x.o"),
            Some((12, 345))
        );
        assert_eq!(parse_count("[ 1/ 2] Linking"), Some((1, 2)));
        for line in [
            "[12/345",
            "12/345] x",
            "[a/b] x",
            "[3/2] x",
            "-- [done]",
            "",
        ] {
            assert_eq!(parse_count(line), None, "{line}");
        }
    }

    #[tokio::test]
    async fn a_daemon_that_holds_the_streams_holds_up_no_build() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = BuildLog::create(&directory.path().join("log"))
            .await
            .unwrap();
        let reporter: Arc<dyn Reporter> = Arc::new(provision_kit::progress::Silent);
        let mut step = Step::start(
            &reporter,
            StepKind::EngineProvision,
            "test",
            Unit::BuildSteps,
            None,
        );
        let spec = CommandSpec::new("sh").arg("-c").arg(format!(
            // The tool ends once the daemon has left its group.
            "setsid sh -c 'echo $$ > {0}; exec sleep 600' & \
             while [ ! -s {0} ]; do sleep 0.01; done; cat {0}",
            directory.path().join("daemon").display()
        ));
        let limit = Duration::from_secs(30);
        let status = run_tool("sh", spec, &mut log, &mut step, limit).await;
        let daemon = log.tail.pop_back().unwrap();
        let kill = CommandSpec::new("kill").args(["-KILL", &daemon]);
        assert!(process::output(kill, limit).await.unwrap().status.success());
        assert!(status.unwrap().success());
    }

    #[test]
    fn the_build_says_its_number() {
        let of = |version, accelerator| options(version, accelerator, "", "").join(" ");
        assert!(of("b11434", Accelerator::Cpu).contains("-DLLAMA_BUILD_NUMBER=11434"));
        assert!(!of("nightly", Accelerator::Cpu).contains("LLAMA_BUILD_NUMBER"));
        assert!(of("b1", Accelerator::Cuda).contains("-DGGML_CUDA=ON"));
        assert!(!of("b1", Accelerator::Cpu).contains("GGML_CUDA"));
    }

    #[test]
    fn amx_is_left_out_where_the_compiler_breaks_it() {
        for (compiler, broken) in [
            ("c++ (Debian 12.2.0-14+deb12u1) 12.2.0", true),
            ("g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", true),
            ("c++ (GCC) 13.2.1 20230801", true),
            ("c++ (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0", false),
            ("c++ (GCC) 15.2.1 20250813 (Red Hat 15.2.1-1)", false),
            ("g++ (Ubuntu 9.4.0-1ubuntu1~20.04) 9.4.0", false),
            ("c++ (Debian 10.2.1-6) 10.2.1 20210110", false),
            ("Debian clang version 14.0.6", false),
            ("something else", false),
        ] {
            assert_eq!(miscompiles_amx(compiler), broken, "{compiler}");
        }
        let of = |features| options("b1", Accelerator::Cpu, "c++ (GCC) 12.2.0", features).join(" ");
        assert!(of("amx_tile avx").contains("-DCMAKE_CXX_FLAGS=-mno-amx-tile"));
        assert!(!of("avx").contains("amx"));
    }
}
