//! Random requests, from a seed: mostly nearly right, since what is all wrong
//! gets no further than the first check.

/// A small generator of numbers (xorshift), so that a seed is all it takes to
/// repeat a run.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 11).unwrap_or_default() % end
    }

    /// True once in so many times.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }

    pub(crate) fn bytes(&mut self, at_most: usize) -> Vec<u8> {
        let count = self.below(at_most + 1);
        (0..count).map(|_| self.next().to_le_bytes()[3]).collect()
    }
}

/// A route, as the daemon describes it.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub(crate) method: String,
    pub(crate) path: String,
}

/// How a request is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    Whole,
    InPieces,
    /// Then nothing more can come.
    HalfClosed,
    /// The connection is dropped somewhere within.
    Aborted,
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) bytes: Vec<u8>,
    pub(crate) delivery: Delivery,
    /// Whether an answer must come: what is lawful, small and sent whole.
    pub(crate) answered: bool,
}

const METHODS: &[&str] = &[
    "GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW", "get",
    "M-SEARCH",
];

const IDS: &[&str] = &[
    "default",
    "x",
    "%00",
    "%ff%fe",
    "..",
    "%2e%2e%2f%2e%2e",
    ".",
    "%",
    "%zz",
    "a%20b",
    "%F0%9F%98%80",
    "00000000-0000-7000-8000-000000000000",
    "-1",
    "'\"<>",
    "default/",
    "{id}",
    "~",
    "a;b=c",
    "null",
];

const QUERIES: &[&str] = &[
    "",
    "",
    "",
    "?verbose=true",
    "?verbose=1",
    "?verbose=true&verbose=false",
    "?",
    "??",
    "?a=b",
    "?%ff=%00",
    "?verbose",
    "?&&&",
    "?verbose=%74rue",
    "?=",
    "#x",
];

const HEADERS: &[&str] = &[
    "Accept: */*",
    "Authorization: Bearer x",
    "Authorization: Basic Og==\r\nAuthorization: Bearer x",
    "x-api-key: x",
    "X-Priority: batch",
    "X-Priority: \u{e9}",
    "X-Deadline-Ms: 1",
    "X-Deadline-Ms: 99999999999999999999",
    "X-Cancel-On-Disconnect: false",
    "Last-Event-ID: 0",
    "Last-Event-ID: 18446744073709551616",
    "Last-Event-ID: -1",
    "Last-Event-ID: a",
    "X-Correlation-Id: mine",
    "X-Correlation-Id: two words",
    "X-Correlation-Id: ",
    "Content-Type: text/plain",
    "Content-Type: application/json; charset=utf-16",
    "Content-Encoding: gzip",
    "Connection: keep-alive, close",
    "Connection: upgrade\r\nUpgrade: websocket",
    "Connection: upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    "TE: trailers",
    "Range: bytes=0-",
    "If-None-Match: *",
    "Origin: null",
    "Origin: http://evil.example",
    "Cookie: a=b",
    "Transfer-Encoding: identity",
    "X: \u{e9}\u{1F600}",
];

const LAWLESS_HEADERS: &[&str] = &[
    "No colon",
    "Bad Name: x",
    ": x",
    "X: a\0b",
    "X: a\r\n b",
    "Content-Length: 1\r\nContent-Length: 2",
    "Content-Length: x",
    "Content-Length: +1",
    "Transfer-Encoding: gzip, identity",
    "\u{e9}: x",
];

const BODIES: &[&str] = &[
    "",
    "{}",
    "null",
    "[]",
    "\"text\"",
    "{\"prompt\":\"a b c\",\"max_tokens\":4}",
    "{\"prompt\":\"a\",\"max_tokens\":1,\"cancel_on_disconnect\":true}",
    "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":2}",
    "{\"prompt\":\"a\",\"stop\":[\"x\",\"y\"],\"temperature\":0.5,\"seed\":3,\"max_tokens\":2}",
    "{\"prompt\":\"a\",\"json_schema\":{\"type\":\"object\"},\"max_tokens\":2}",
    "{\"prompt\":\"a\",\"priority\":\"batch\",\"deadline_ms\":1}",
    "{\"prompt\":\"\\ud800\"}",
    "{\"prompt\":\"a\",\"max_tokens\":1e99}",
    "{\"prompt\":\"a\",\"prompt\":\"b\"}",
    "{\"deadline_ms\":-1}",
    "{\"deadline_ms\":0}",
    "{\"model\":\"default\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":2,\"stream\":true}",
    "{\"model\":\"nobody\",\"prompt\":\"a\",\"stream\":true}",
    "{\"input\":[\"a\",{\"text\":\"b\"}],\"max_output_tokens\":2,\"stream\":true}",
    "{\"model\":3,\"stream\":\"yes\",\"stream_options\":[]}",
    "{\"query\":\"a\",\"documents\":[\"b\"],\"content\":\"c\",\"tokens\":[1]}",
];

/// A request that nobody would send by accident.
pub(crate) fn request(dice: &mut Dice, routes: &[Route], tasks: &[String]) -> Request {
    let route = if dice.once_in(5) {
        // What takes a body has the most to get wrong.
        routes.iter().find(|route| route.path == "/v2/tasks")
    } else {
        None
    };
    let route = route.unwrap_or(&routes[dice.below(routes.len())]);
    let mut lawful = true;
    let method = if dice.once_in(3) {
        dice.pick(METHODS)
    } else {
        route.method.as_str()
    };
    let mut head = method.as_bytes().to_vec();
    head.push(b' ');
    head.extend(target(dice, &route.path, tasks));
    let version = if dice.once_in(8) {
        lawful = false;
        dice.pick(&[
            "HTTP/1.0",
            "HTTP/2.0",
            "HTTP/0.9",
            "http/1.1",
            "",
            "HTTP/1.1 x",
        ])
    } else {
        "HTTP/1.1"
    };
    head.extend_from_slice(format!(" {version}\r\nHost: localhost\r\n").as_bytes());
    for _ in 0..dice.below(4) {
        head.extend_from_slice(dice.pick(HEADERS).as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    if dice.once_in(8) {
        lawful = false;
        head.extend_from_slice(dice.pick(LAWLESS_HEADERS).as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    if dice.once_in(30) {
        lawful = false;
        let count = dice.below(150);
        head.extend_from_slice("Y: z\r\n".repeat(count).as_bytes());
    }
    let body = body(dice);
    let framed = frame(dice, &mut head, &body);
    let mut bytes = head;
    bytes.extend(framed.0);
    if dice.once_in(10) {
        lawful = false;
        mutate(dice, &mut bytes);
    }
    let delivery = match dice.below(10) {
        0 => Delivery::HalfClosed,
        1 => Delivery::Aborted,
        2 | 3 => Delivery::InPieces,
        _ => Delivery::Whole,
    };
    let whole = matches!(delivery, Delivery::Whole | Delivery::InPieces);
    Request {
        // What is not read to its end may lose its answer to the reset.
        answered: lawful && framed.1 && whole && bytes.len() < 8 * 1024,
        bytes,
        delivery,
    }
}

fn target(dice: &mut Dice, template: &str, tasks: &[String]) -> Vec<u8> {
    let id = match dice.below(4) {
        0 if !tasks.is_empty() => tasks[dice.below(tasks.len())].clone(),
        1 => {
            let bytes = dice.bytes(24);
            let escapes: Vec<String> = bytes.iter().map(|byte| format!("%{byte:02x}")).collect();
            escapes.concat()
        }
        2 if dice.once_in(4) => "a".repeat(dice.below(20_000)),
        _ => dice.pick(IDS).to_owned(),
    };
    let path = template.replace("{id}", &id);
    let query = dice.pick(QUERIES);
    let text = match dice.below(20) {
        0 => format!("http://localhost{path}{query}"),
        1 => format!("http://evil.example:99{path}"),
        2 => dice
            .pick(&[
                "*",
                "localhost:80",
                "/",
                "//",
                "/../../etc/passwd",
                "/%2e%2e/",
                "?",
            ])
            .to_owned(),
        3 => format!("{path}/"),
        4 => format!("/{path}"),
        5 => format!("{path}{query}&{}", "q".repeat(dice.below(4000))),
        _ => format!("{path}{query}"),
    };
    text.into_bytes()
}

fn body(dice: &mut Dice) -> Vec<u8> {
    match dice.below(16) {
        0 => dice.bytes(300),
        1 => "[".repeat(dice.below(5000)).into_bytes(),
        2 => "{\"prompt\":".repeat(dice.below(300)).into_bytes(),
        3 if dice.once_in(4) => {
            format!("{{\"prompt\":\"{}\"}}", "x".repeat(dice.below(3_000_000))).into_bytes()
        }
        4 => {
            let mut body = dice.pick(BODIES).as_bytes().to_vec();
            mutate(dice, &mut body);
            body
        }
        5 => {
            let grammar = "root ::= ((((".repeat(dice.below(200));
            serde_json::json!({ "prompt": "a", "grammar": grammar, "max_tokens": 1 })
                .to_string()
                .into_bytes()
        }
        _ => dice.pick(BODIES).as_bytes().to_vec(),
    }
}

/// The body as it is sent, after the end of the head, and whether that is
/// lawful and complete.
fn frame(dice: &mut Dice, head: &mut Vec<u8>, body: &[u8]) -> (Vec<u8>, bool) {
    let mut out = Vec::new();
    let complete = match dice.below(12) {
        // Too long: what is missing never comes.
        0 => {
            let claimed = body.len() + 1 + dice.below(100);
            head.extend_from_slice(format!("Content-Length: {claimed}\r\n").as_bytes());
            out.extend_from_slice(body);
            false
        }
        // Too short: the rest looks like a request.
        1 => {
            head.extend_from_slice(format!("Content-Length: {}\r\n", body.len() / 2).as_bytes());
            out.extend_from_slice(body);
            false
        }
        2 | 3 => {
            head.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
            for piece in body.chunks(1 + dice.below(200)) {
                out.extend_from_slice(format!("{:x};ext=1\r\n", piece.len()).as_bytes());
                out.extend_from_slice(piece);
                out.extend_from_slice(b"\r\n");
            }
            let end = dice.pick(&[
                "0\r\n\r\n",
                "0\r\nT: x\r\n\r\n",
                "0\r\n",
                "-1\r\n\r\n",
                "ffffffffffffffffff\r\n",
            ]);
            out.extend_from_slice(end.as_bytes());
            end == "0\r\n\r\n"
        }
        4 => {
            head.extend_from_slice(
                format!("Expect: 100-continue\r\nContent-Length: {}\r\n", body.len()).as_bytes(),
            );
            out.extend_from_slice(body);
            false
        }
        _ => {
            head.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
            out.extend_from_slice(body);
            true
        }
    };
    head.extend_from_slice(b"\r\n");
    (out, complete)
}

fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>) {
    for _ in 0..=dice.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = dice.below(bytes.len());
        match dice.below(4) {
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => {
                bytes.remove(at);
            }
            2 => bytes.truncate(at),
            _ => {
                let more = dice.bytes(6);
                bytes.splice(at..at, more);
            }
        }
    }
}
