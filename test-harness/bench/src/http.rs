//! The measuring client: HTTP/1.1 on a bare socket, so that what it costs is
//! small, and the same for every side.

use std::io::{self, Error, ErrorKind};
use std::mem::MaybeUninit;
use std::net::SocketAddr;

use memchr::memmem::{self, Finder};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Asks as an HTTP client does: on the connection of the request before, or on a new
/// one where the other side has closed that or closes it just then.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    kept: Option<Connection>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        let kept = None;
        Self { address, kept }
    }

    /// For the next request, which must come after the end of the one before.
    pub async fn connection(&mut self) -> io::Result<&mut Connection> {
        let connection = match self.kept.take() {
            Some(kept) if kept.is_open() => Connection {
                may_be_closed: true,
                ..kept
            },
            _ => Connection::open(self.address).await?,
        };
        Ok(self.kept.insert(connection))
    }
}

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
    /// The other side may close it as the next request is on its way.
    may_be_closed: bool,
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

fn is_closed(error: &Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
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
            may_be_closed: false,
        })
    }

    /// Whether another request may be sent: the answer is over, and the system knows of no
    /// end.
    fn is_open(&self) -> bool {
        let mut next = [MaybeUninit::uninit()];
        let is_over = matches!(self.left, Left::Nothing | Left::Bytes(0));
        let seen = SockRef::from(&self.stream).peek(&mut next);
        is_over && seen.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Sends a request and reads the answer's head; its status.
    pub async fn send(&mut self, method: &str, path: &str, body: &str) -> io::Result<u16> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        if std::mem::take(&mut self.may_be_closed) {
            match self.exchange(&request).await {
                Err(error) if is_closed(&error) => *self = Self::open(self.address).await?,
                answered => return answered,
            }
        }
        self.exchange(&request).await
    }

    async fn exchange(&mut self, request: &str) -> io::Result<u16> {
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
                let why = "closed before the head";
                return Err(Error::new(ErrorKind::UnexpectedEof, why));
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

    /// Takes one connection and answers so many requests on it.
    async fn serve(listener: &TcpListener, answers: usize) -> TcpStream {
        let (mut stream, _) = listener.accept().await.unwrap();
        for _ in 0..answers {
            assert_ne!(stream.read(&mut [0; 1024]).await.unwrap(), 0);
            let empty = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
            stream.write_all(empty).await.unwrap();
        }
        stream
    }

    /// Asks once; the client's port.
    async fn ask(client: &mut Client) -> u16 {
        let connection = client.connection().await.unwrap();
        assert_eq!(connection.send("GET", "/", "").await.unwrap(), 200);
        assert_eq!(connection.whole().await.unwrap(), "");
        connection.stream.local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn a_connection_is_kept_until_the_other_side_closes_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = Client::new(listener.local_addr().unwrap());
        let asks = async { (ask(&mut client).await, ask(&mut client).await) };
        let (mut served, (first, second)) = tokio::join!(serve(&listener, 2), asks);
        assert_eq!(first, second);
        served.shutdown().await.unwrap();
        let kept = client.kept.as_ref().unwrap();
        kept.stream.readable().await.unwrap();
        assert!(!kept.is_open());
        let (_, third) = tokio::join!(serve(&listener, 1), ask(&mut client));
        assert_ne!(third, first);
    }

    #[tokio::test]
    async fn a_request_that_meets_the_others_close_is_sent_once_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = Client::new(listener.local_addr().unwrap());
        let serve_twice = async {
            let mut first = serve(&listener, 1).await;
            assert_ne!(first.read(&mut [0; 1024]).await.unwrap(), 0);
            drop(first);
            serve(&listener, 1).await
        };
        let asks = async { (ask(&mut client).await, ask(&mut client).await) };
        let (_, (first, second)) = tokio::join!(serve_twice, asks);
        assert_ne!(first, second);
    }

    #[test]
    fn a_needle_is_found() {
        assert_eq!(find(b"aab", b"ab"), Some(1));
        assert_eq!(find(b"aaa", b"ab"), None);
        assert_eq!(find(b"", b"a"), None);
    }
}
