//! A client that sends any bytes, and looks closely at what comes back.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::DEADLINE;

/// One answer, taken apart.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// What holds for every answer, whatever was asked. `headless` says that
    /// the request was a HEAD, whose answer has no body.
    pub(crate) fn check(&self, headless: bool) {
        if self.status == 100 {
            return;
        }
        let id = self.header("x-correlation-id");
        let id = id.unwrap_or_else(|| panic!("no correlation id: {}", self.head));
        assert_ne!(self.status, 500, "{}", String::from_utf8_lossy(&self.body));
        if self.status < 400 || headless {
            return;
        }
        let body = self.json();
        let error = &body["error"];
        let told = |text: &Value| text.as_str().is_some_and(|text| !text.is_empty());
        if error.is_string() {
            // Ollama's shape has no place for more.
            assert!(told(error), "{body}");
            return;
        }
        assert!(told(&error["message"]), "{body}");
        if body["type"] == "error" {
            // Anthropic's.
            assert!(told(&error["type"]), "{body}");
            assert_eq!(body["request_id"], id, "{body}");
            return;
        }
        assert!(told(&error["code"]), "{body}");
        assert_eq!(error["correlation_id"], id, "{body}");
        // OpenAI's has a `type` instead.
        let native = error["retriable"].is_boolean();
        assert!(native || told(&error["type"]), "{body}");
    }
}

pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    unread: Vec<u8>,
}

impl Raw {
    pub(crate) fn connect(url: &str) -> Self {
        let stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Self {
            stream,
            unread: Vec::new(),
        }
    }

    /// False if the daemon has closed the connection before it took all.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Says that nothing more will come.
    pub(crate) fn half_close(&self) {
        // An error only says that the connection is closed already.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// More bytes; false at the end, be it orderly or not.
    fn fill(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => {
                self.unread.extend_from_slice(&buffer[..count]);
                true
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!(
                    "the daemon neither answered nor closed: {:?}",
                    String::from_utf8_lossy(&self.unread)
                )
            }
            Err(_) => false,
        }
    }

    /// The next answer; `None` if the connection ends first. Of an event stream
    /// only the head is read.
    pub(crate) fn answer(&mut self, headless: bool) -> Option<Answer> {
        let end = loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                break end;
            }
            if !self.fill() {
                assert!(self.unread.is_empty(), "an answer that breaks off");
                return None;
            }
        };
        let head = String::from_utf8(self.unread[..end].to_vec()).unwrap();
        self.unread.drain(..end + 4);
        let line = head.lines().next().unwrap();
        assert!(line.starts_with("HTTP/1."), "{line}");
        let status = line[9..12].parse().unwrap();
        let mut answer = Answer {
            status,
            head,
            body: Vec::new(),
        };
        let streams = answer.header("content-type") == Some("text/event-stream");
        if !headless && !streams && status != 100 {
            answer.body = self.body(&answer);
        }
        answer.check(headless);
        Some(answer)
    }

    fn body(&mut self, answer: &Answer) -> Vec<u8> {
        let Some(length) = answer.header("content-length") else {
            panic!("an answer without a length: {}", answer.head);
        };
        let length: usize = length.parse().unwrap();
        while self.unread.len() < length {
            assert!(self.fill(), "a body that breaks off: {}", answer.head);
        }
        self.unread.drain(..length).collect()
    }

    /// Reads until the daemon closes the connection, and says how long it took.
    pub(crate) fn until_closed(mut self) -> Duration {
        let begun = Instant::now();
        while self.fill() {}
        begun.elapsed()
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Sends one request and reads its answer, which must come.
pub(crate) fn ask(url: &str, request: &[u8]) -> Answer {
    let mut raw = Raw::connect(url);
    raw.send(request);
    let headless = request.starts_with(b"HEAD ");
    raw.answer(headless)
        .unwrap_or_else(|| panic!("no answer to {:?}", String::from_utf8_lossy(request)))
}

/// A submission with this body.
pub(crate) fn submission(body: &[u8]) -> Vec<u8> {
    let mut request = format!(
        "POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    request
}
