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
pub(super) const OUTPUT_LIMIT: u64 = 1024 * 1024;

/// Runs a program to its end, at most for `limit`, and returns what it said (up to 1 MiB of each
/// stream). A status other than success is not an error here.
pub async fn output(spec: CommandSpec, limit: Duration) -> Result<Output, ProcessError> {
    let program = spec.program.clone();
    let mut group = spawn(spec).await?;
    let pid = group.pid();
    let (stdout, stderr) = (group.take_stdout(), group.take_stderr());
    let run = async {
        // The streams are read while waiting, and their end is not waited for on its own: `wait`
        // kills whoever else could hold the pipes open.
        let (status, stdout, stderr) =
            tokio::join!(group.wait(), read_capped(stdout), read_capped(stderr));
        let text = |bytes: io::Result<Vec<u8>>| {
            bytes
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .map_err(|source| ProcessError::Read { pid, source })
        };
        Ok(Output {
            status: status?,
            stdout: text(stdout)?,
            stderr: text(stderr)?,
        })
    };
    if let Ok(result) = tokio::time::timeout(limit, run).await {
        return result;
    }
    group.terminate(DROP_GRACE).await?;
    Err(ProcessError::TimedOut { program, limit })
}

async fn read_capped(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    if let Some(mut stream) = stream {
        (&mut stream)
            .take(OUTPUT_LIMIT)
            .read_to_end(&mut kept)
            .await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    }
    Ok(kept)
}
