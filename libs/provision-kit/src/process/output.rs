//! A program that is run to its end for what it says.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::{CommandSpec, DROP_GRACE, ProcessError, spawn};

/// What a finished program said.
#[derive(Debug, Clone)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Most of one stream that [`output`] keeps, in bytes. It goes on reading, so that the program is
/// never held up by a full pipe, and drops the rest.
pub(super) const OUTPUT_LIMIT: usize = 1024 * 1024;

/// How long the end of the streams is waited for once the program is gone.
const DRAIN: Duration = Duration::from_secs(1);

/// Runs a program to its end, at most for `limit`, and returns what it said (up to 1 MiB of each
/// stream). A status other than success is not an error here.
pub async fn output(spec: CommandSpec, limit: Duration) -> Result<Output, ProcessError> {
    let program = spec.program.clone();
    let mut group = spawn(spec).await?;
    let pid = group.pid();
    let (mut stdout, mut stderr) = (
        Capped::new(group.take_stdout()),
        Capped::new(group.take_stderr()),
    );
    let run = async {
        let both = async { tokio::try_join!(stdout.fill(), stderr.fill()) };
        tokio::pin!(both);
        let failed = |source| ProcessError::Read { pid, source };
        let status = tokio::select! {
            read = &mut both => {
                read.map_err(failed)?;
                group.wait().await?
            }
            status = group.wait() => {
                let status = status?;
                // `wait` has killed the group, but a daemon that left it may hold the pipes open
                // for ever.
                if let Ok(read) = tokio::time::timeout(DRAIN, both).await {
                    read.map_err(failed)?;
                }
                status
            }
        };
        Ok(status)
    };
    let Ok(result) = tokio::time::timeout(limit, run).await else {
        group.terminate(DROP_GRACE).await?;
        return Err(ProcessError::TimedOut { program, limit });
    };
    Ok(Output {
        status: result?,
        stdout: stdout.text(),
        stderr: stderr.text(),
    })
}

/// One stream, of which the beginning is kept.
struct Capped<R> {
    stream: Option<R>,
    kept: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Capped<R> {
    fn new(stream: Option<R>) -> Self {
        Self {
            stream,
            kept: Vec::new(),
        }
    }

    /// Reads to the stream's end. What was read stays if this is cancelled.
    async fn fill(&mut self) -> io::Result<()> {
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let count = stream.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            let room = OUTPUT_LIMIT - self.kept.len();
            self.kept.extend_from_slice(&buffer[..count.min(room)]);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.kept).into_owned()
    }
}
