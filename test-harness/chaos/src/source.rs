//! A model's source: a small web server with ranges, which can be told to
//! serve badly. It is the harness's own, so that repair is always possible.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// How an answer goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mischief {
    /// The connection breaks half-way.
    Cut,
    /// Half-way no further byte comes, for longer than anybody should wait.
    Stall,
    /// A length is promised that is only half of the file's: a clean, short answer.
    Truncate,
    /// One byte is another.
    Flip,
    /// Another part of the file than the one that was asked for.
    WrongRange,
    /// A few bytes at a time.
    Slow,
    /// 500.
    Error,
    /// Nothing is answered for a while, then the connection is closed.
    Silence,
}

/// A file on offer.
#[derive(Debug)]
pub struct ModelSource {
    port: u16,
    state: Arc<State>,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    path: PathBuf,
    /// What goes wrong, and how many answers it is for.
    mischief: Mutex<Option<(Mischief, u32)>>,
    answers: AtomicU64,
}

impl ModelSource {
    pub async fn serve(path: &Path) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(State {
            path: path.to_owned(),
            mischief: Mutex::new(None),
            answers: AtomicU64::new(0),
        });
        let served = Arc::clone(&state);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&served);
                // Ends with the connection; nothing here waits without a bound.
                tokio::spawn(async move {
                    let limit = Duration::from_mins(2);
                    let _ = tokio::time::timeout(limit, answer(stream, &state)).await;
                });
            }
        });
        Ok(Self {
            port,
            state,
            server,
        })
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/model.gguf", self.port)
    }

    /// The next answers with a body go wrong; later ones do not.
    pub fn misbehave(&self, mischief: Mischief, answers: u32) {
        *self.lock() = Some((mischief, answers));
        self.state.answers.store(0, Ordering::Relaxed);
    }

    pub fn behave(&self) {
        *self.lock() = None;
    }

    /// Answers with a body since the last mischief was ordered.
    pub fn answers(&self) -> u64 {
        self.state.answers.load(Ordering::Relaxed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Mischief, u32)>> {
        self.state
            .mischief
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ModelSource {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl State {
    fn next_mischief(&self) -> Option<Mischief> {
        let mut mischief = self.mischief.lock().unwrap_or_else(PoisonError::into_inner);
        let (kind, left) = mischief.take()?;
        if left > 1 {
            *mischief = Some((kind, left - 1));
        }
        Some(kind)
    }
}

async fn answer(mut stream: TcpStream, state: &State) -> std::io::Result<()> {
    let request = read_head(&mut stream).await?;
    let head_only = request.starts_with("HEAD ");
    let mut file = File::open(&state.path)?;
    let size = file.metadata()?.len();
    let range = asked_range(&request, size);
    let mischief = if head_only {
        None
    } else {
        state.next_mischief()
    };
    if !head_only {
        state.answers.fetch_add(1, Ordering::Relaxed);
    }
    match mischief {
        Some(Mischief::Error) => {
            return stream
                .write_all(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .await;
        }
        Some(Mischief::Silence) => {
            tokio::time::sleep(Duration::from_secs(2)).await;
            return Ok(());
        }
        _ => {}
    }
    let (mut start, mut end) = range.unwrap_or((0, size));
    if mischief == Some(Mischief::WrongRange) {
        (start, end) = (0, (size / 3).max(1));
    }
    if mischief == Some(Mischief::Truncate) {
        end = start + (end - start) / 2;
    }
    let status = if range.is_some() || mischief == Some(Mischief::WrongRange) {
        format!(
            "206 Partial Content\r\nContent-Range: bytes {start}-{}/{size}",
            end.max(1) - 1
        )
    } else {
        "200 OK".to_owned()
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nAccept-Ranges: bytes\r\nETag: \"chaos\"\r\nConnection: close\r\n\r\n",
        end - start
    );
    stream.write_all(head.as_bytes()).await?;
    if head_only {
        return Ok(());
    }
    file.seek(SeekFrom::Start(start))?;
    let half = start + (end - start) / 2;
    let mut at = start;
    let mut buffer = vec![0u8; 64 * 1024];
    while at < end {
        let most = buffer.len().min((end - at) as usize);
        let read = file.read(&mut buffer[..most])?;
        if read == 0 {
            break;
        }
        let passes_half = (at..at + read as u64).contains(&half);
        if passes_half && mischief == Some(Mischief::Flip) {
            buffer[(half - at) as usize] ^= 0x40;
        }
        stream.write_all(&buffer[..read]).await?;
        at += read as u64;
        match mischief {
            Some(Mischief::Cut) if passes_half => return Ok(()),
            Some(Mischief::Stall) if passes_half => {
                tokio::time::sleep(Duration::from_secs(20)).await;
                return Ok(());
            }
            Some(Mischief::Slow) => tokio::time::sleep(Duration::from_millis(3)).await,
            _ => {}
        }
    }
    stream.shutdown().await
}

async fn read_head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 16 * 1024 {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            break;
        }
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// From the first byte to the one after the last.
fn asked_range(request: &str, size: u64) -> Option<(u64, u64)> {
    let line = request
        .lines()
        .find(|line| line.to_ascii_lowercase().starts_with("range:"))?;
    let (start, end) = line.split_once("bytes=")?.1.split_once('-')?;
    let start: u64 = start.trim().parse().ok()?;
    let end = end
        .trim()
        .parse::<u64>()
        .map_or(size, |last| (last + 1).min(size));
    (start < end).then_some((start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_serves_well_and_badly_as_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        let bytes: Vec<u8> = (0..200_000u32).map(|number| number as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let source = ModelSource::serve(&path).await.unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let fetch = async |range: Option<&str>| {
            let mut request = client.get(source.url());
            if let Some(range) = range {
                request = request.header("Range", range);
            }
            request.send().await.unwrap().bytes().await
        };
        assert_eq!(fetch(None).await.unwrap(), bytes);
        assert_eq!(fetch(Some("bytes=10-19")).await.unwrap(), bytes[10..20]);
        assert_eq!(
            fetch(Some("bytes=199990-")).await.unwrap(),
            bytes[199_990..]
        );
        source.misbehave(Mischief::Cut, 1);
        assert!(fetch(None).await.is_err());
        source.misbehave(Mischief::Truncate, 1);
        assert_eq!(fetch(None).await.unwrap(), bytes[..100_000]);
        source.misbehave(Mischief::Flip, 1);
        let flipped = fetch(None).await.unwrap();
        let differing = flipped
            .iter()
            .zip(&bytes)
            .filter(|(one, other)| one != other);
        assert_eq!((differing.count(), flipped.len()), (1, bytes.len()));
        assert_eq!(fetch(None).await.unwrap(), bytes);
        assert_eq!(source.answers(), 2);
    }
}
