//! The measuring client: HTTP/1.1 on a bare socket, so that what it costs is
//! small, and the same for every side.

use std::io::{self, Error, ErrorKind};
use std::net::SocketAddr;

use memchr::memmem::{self, Finder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// One connection that is kept for several requests.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    address: SocketAddr,
    /// Bytes that came and were not used.
    raw: Vec<u8>,
    /// The body so far, without its framing.
    body: Vec<u8>,
    left: Left,
}

/// What is left of an answer's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Bytes(usize),
    /// The next chunk and those after it, which are taken whole.
    Chunks,
    /// Until the other side closes.
    All,
    Nothing,
}

fn broken(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, what.into())
}

impl Connection {
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            address,
            raw: Vec::with_capacity(16 * 1024),
            body: Vec::with_capacity(16 * 1024),
            left: Left::Nothing,
        })
    }

    /// Sends a request and reads the answer's head; its status.
    pub async fn send(&mut self, method: &str, path: &str, body: &str) -> io::Result<u16> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        self.stream.write_all(request.as_bytes()).await?;
        self.raw.clear();
        self.body.clear();
        loop {
            if let Some(end) = find(&self.raw, b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&self.raw[..end]).to_lowercase();
                self.raw.drain(..end + 4);
                return self.read_head(&head);
            }
            if self.stream.read_buf(&mut self.raw).await? == 0 {
                return Err(broken("closed before the head"));
            }
        }
    }

    fn read_head(&mut self, head: &str) -> io::Result<u16> {
        let header = |name: &str| {
            let mut headers = head.lines().filter_map(|line| line.split_once(':'));
            headers.find_map(|(found, value)| (found == name).then(|| value.trim()))
        };
        self.left = match (header("transfer-encoding"), header("content-length")) {
            (Some(coding), _) if coding.contains("chunked") => Left::Chunks,
            (_, Some(length)) => Left::Bytes(length.parse().map_err(|_| broken("a length"))?),
            _ => Left::All,
        };
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        status.ok_or_else(|| broken("no status"))
    }

    /// The whole body.
    pub async fn whole(&mut self) -> io::Result<String> {
        while self.more().await? {}
        let text = String::from_utf8_lossy(&self.body).into_owned();
        self.body.clear();
        Ok(text)
    }

    /// Reads on; false at the body's end.
    async fn more(&mut self) -> io::Result<bool> {
        loop {
            let before = self.body.len();
            self.unframe()?;
            if self.body.len() > before {
                return Ok(true);
            }
            if self.left == Left::Nothing || self.left == Left::Bytes(0) {
                return Ok(false);
            }
            if self.stream.read_buf(&mut self.raw).await? == 0 {
                return match self.left {
                    Left::All => Ok(false),
                    _ => Err(broken("closed within the body")),
                };
            }
        }
    }

    /// Takes the framing off what came.
    fn unframe(&mut self) -> io::Result<()> {
        let mut used = 0;
        loop {
            let rest = &self.raw[used..];
            match self.left {
                Left::Nothing => break,
                Left::All => {
                    self.body.extend_from_slice(rest);
                    used = self.raw.len();
                    break;
                }
                Left::Bytes(left) => {
                    let take = left.min(rest.len());
                    self.body.extend_from_slice(&rest[..take]);
                    used += take;
                    self.left = Left::Bytes(left - take);
                    break;
                }
                Left::Chunks => {
                    let Some(end) = find(rest, b"\r\n") else {
                        break;
                    };
                    let size = std::str::from_utf8(&rest[..end]).unwrap_or_default();
                    let size = usize::from_str_radix(size.trim(), 16)
                        .map_err(|_| broken("a chunk's size"))?;
                    if size == 0 {
                        // No trailers are asked for.
                        if rest.len() < end + 4 {
                            break;
                        }
                        used += end + 4;
                        self.left = Left::Nothing;
                        continue;
                    }
                    if rest.len() < end + 2 + size + 2 {
                        break;
                    }
                    self.body.extend_from_slice(&rest[end + 2..end + 2 + size]);
                    used += end + 2 + size + 2;
                }
            }
        }
        self.raw.drain(..used);
        Ok(())
    }

    /// Hands every event to `seen` as it comes, to the stream's end.
    pub async fn events(&mut self, mut seen: impl FnMut(&[u8])) -> io::Result<()> {
        let gap = Finder::new(b"\n\n");
        let mut begin = 0;
        loop {
            while let Some(end) = gap.find(&self.body[begin..]) {
                seen(&self.body[begin..begin + end]);
                begin += end + 2;
            }
            self.body.drain(..begin);
            begin = 0;
            if !self.more().await? {
                return Ok(());
            }
        }
    }
}

pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    memmem::find(haystack, needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    async fn answered(answer: &'static str) -> (u16, Vec<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await.unwrap();
            // In small pieces, so that everything is cut somewhere.
            for piece in answer.as_bytes().chunks(3) {
                stream.write_all(piece).await.unwrap();
                stream.flush().await.unwrap();
                tokio::task::yield_now().await;
            }
            std::future::pending::<()>().await;
        });
        let mut connection = Connection::open(address).await.unwrap();
        let status = connection.send("GET", "/", "").await.unwrap();
        let mut events = Vec::new();
        let keep = |event: &[u8]| events.push(String::from_utf8_lossy(event).into_owned());
        connection.events(keep).await.unwrap();
        (status, events)
    }

    #[tokio::test]
    async fn events_come_through_both_framings() {
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: a\n\n\r\n6\r\ndata: \r\n3\r\nb\n\n\r\n0\r\n\r\n";
        let (status, events) = answered(chunked).await;
        assert_eq!(
            (status, events),
            (200, vec!["data: a".to_owned(), "data: b".to_owned()])
        );
        let counted = "HTTP/1.1 404 No\r\nContent-Length: 9\r\n\r\ndata: c\n\n";
        let (status, events) = answered(counted).await;
        assert_eq!((status, events), (404, vec!["data: c".to_owned()]));
    }

    #[test]
    fn a_needle_is_found() {
        assert_eq!(find(b"aab", b"ab"), Some(1));
        assert_eq!(find(b"aaa", b"ab"), None);
        assert_eq!(find(b"", b"a"), None);
    }
}
