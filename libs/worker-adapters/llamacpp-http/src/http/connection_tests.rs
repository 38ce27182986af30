use std::io::{Read, Write};
use std::net::TcpListener;

use proptest::prelude::*;
use reqwest::header::HeaderValue;
use tokio::io::ReadBuf;

use super::*;

const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n";

proptest! {
    #[test]
    fn any_reads_of_an_answer_give_the_same(read in 1usize..100) {
        prop_assert_eq!(read_all(ANSWER, read), (Some(200), b"hello world".to_vec(), None));
    }

    #[test]
    fn an_answer_cut_off_anywhere_is_not_whole(cut in 0..ANSWER.len(), read in 1usize..100) {
        let (_, _, error) = read_all(&ANSWER[..cut], read);
        prop_assert!(error.is_some());
    }

    #[test]
    fn random_answers_never_panic_and_any_reads_are_alike(
        rest in prop::collection::vec(
            prop_oneof![any::<u8>(), prop::sample::select(b"01\r\n\r\n: ".to_vec())],
            0..120,
        ),
        kept in 0usize..70,
        read in 1usize..60,
    ) {
        let answer = [&ANSWER[..kept], &rest].concat();
        prop_assert_eq!(read_all(&answer, read), read_all(&answer, answer.len()));
    }
}

#[test]
fn an_answer_to_the_end_of_its_connection_is_read_to_there() {
    let long = "x".repeat(300_000);
    let answer = format!("HTTP/1.0 200 OK\r\n\r\n{long}");
    let (status, body, error) = read_all(answer.as_bytes(), usize::MAX);
    assert_eq!((status, body.len(), error), (Some(200), 300_000, None));
}

/// An engine of which each read takes in at most so many bytes.
struct Engine {
    at_most: usize,
}

impl AsyncRead for Engine {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let bytes = self.at_most.min(buffer.remaining());
        buffer.initialize_unfilled_to(bytes);
        buffer.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn the_buffer_is_as_large_as_the_engine_is_ahead() {
    let buffer = BytesMut::with_capacity(FIRST_READ);
    let mut body = Body::new(Engine { at_most: 150 }, buffer, Framing::to_end());
    for (at_most, size) in [
        (150, FIRST_READ),
        (usize::MAX, LARGEST_READ),
        (150, FIRST_READ),
    ] {
        body.source = Some(Engine { at_most });
        for _ in 0..2000 {
            let piece = poll_fn(|context| body.poll_data(context)).await;
            assert!(piece.unwrap().unwrap().len() <= LARGEST_READ);
        }
        assert_eq!(body.read_size, size);
        assert!(body.buffer.capacity() <= size);
    }
}

/// Serves one connection and gives its client's target.
fn served(serve: impl FnOnce(std::net::TcpStream) + Send + 'static) -> Target {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || serve(listener.accept().unwrap().0));
    Target::of(&url, Some(&HeaderValue::from_static("Bearer k"))).unwrap()
}

const LIMITS: SendLimits = SendLimits {
    connect: Duration::from_secs(5),
    stalled: Duration::from_mins(1),
};

#[tokio::test]
async fn a_request_arrives_whole_and_its_connection_is_closed_with_the_answer() {
    let (told, asked) = tokio::sync::oneshot::channel();
    let target = served(|mut stream| {
        let mut request = vec![0; 1];
        while !request.ends_with(b"the body") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            request.extend(byte);
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
            .unwrap();
        // Until the client has gone.
        let left = stream.read(&mut [0; 8]);
        told.send((String::from_utf8(request).unwrap(), left.unwrap_or(0)))
            .unwrap();
    });
    let body = Bytes::from_static(b"the body");
    let mut answer = send(&target, "/x", body, LIMITS).await.unwrap();
    assert_eq!(answer.status, 200);
    let bytes = poll_fn(|context| answer.body.poll_data(context)).await;
    assert_eq!(bytes.unwrap().unwrap(), "hello");
    drop(answer);
    let (request, left) = asked.await.unwrap();
    assert!(request.contains("POST /x HTTP/1.1\r\ncontent-length: 8\r\n"));
    assert!(request.contains("\r\nauthorization: Bearer k\r\n"));
    assert_eq!(left, 0, "the connection is closed");
}

#[tokio::test]
async fn a_refusal_before_the_request_is_read_is_the_answer() {
    let target = served(|mut stream| {
        stream
            .write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            .unwrap();
        // Lets the client send on until it has gone.
        let mut scratch = vec![0; 1 << 16];
        while stream.read(&mut scratch).is_ok_and(|read| read > 0) {}
    });
    let body = Bytes::from(vec![b'x'; LARGE]);
    let answer = send(&target, "/x", body, LIMITS).await.unwrap();
    assert_eq!(answer.status, 413);
    assert_eq!(answer.body.short(9).await, b"no");
}

/// More than the sockets between hold.
const LARGE: usize = 64 << 20;
const BEGUN: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";

#[tokio::test]
async fn a_request_is_sent_on_to_an_engine_that_answers_before_it_has_read_it() {
    let (told, asked) = tokio::sync::oneshot::channel();
    let target = served(|mut stream| {
        stream.write_all(BEGUN).unwrap();
        let (mut scratch, mut whole) = (vec![0; 1 << 16], 0);
        while whole < LARGE {
            whole += stream.read(&mut scratch).unwrap();
        }
        stream.write_all(b"ok").unwrap();
        told.send(()).unwrap();
        // Until the client has gone.
        while stream.read(&mut scratch).is_ok_and(|read| read > 0) {}
    });
    let body = Bytes::from(vec![b'x'; LARGE]);
    let answer = send(&target, "/x", body, LIMITS).await.unwrap();
    assert_eq!(answer.status, 200);
    let asked = timeout(LIMITS.stalled, asked).await;
    asked.expect("the whole body gets there").unwrap();
    assert_eq!(answer.body.short(9).await, b"ok");
}

#[tokio::test]
async fn an_engine_that_answers_and_reads_nothing_more_is_not_waited_for() {
    let (_until_the_end, ended) = std::sync::mpsc::channel::<()>();
    let target = served(move |mut stream| {
        stream.write_all(BEGUN).unwrap();
        let _ = ended.recv();
    });
    let body = Bytes::from(vec![b'x'; LARGE]);
    let limits = SendLimits {
        stalled: Duration::from_millis(50),
        ..LIMITS
    };
    let sent = timeout(LIMITS.stalled, send(&target, "/x", body, limits));
    let error = sent.await.expect("it is given up").unwrap_err();
    assert!(matches!(error, HttpError::SendStalled { .. }), "{error:?}");
    let words = error.to_string();
    assert!(
        words.contains("rest of the request could not be sent"),
        "{words}"
    );
}

#[tokio::test]
async fn a_connection_that_closes_without_an_answer_is_told_from_none() {
    let target = served(drop);
    let error = send(&target, "/x", Bytes::new(), LIMITS).await.unwrap_err();
    let broken = matches!(
        error,
        HttpError::Closed | HttpError::Receive(_) | HttpError::Send(_)
    );
    assert!(broken, "{error:?}");
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let target = Target::of(&url, None).unwrap();
    let error = send(&target, "/x", Bytes::new(), LIMITS).await.unwrap_err();
    assert!(matches!(error, HttpError::Connect(_)), "{error:?}");
}
