use std::io::{Read, Write};
use std::net::TcpListener;

use proptest::prelude::*;
use reqwest::header::HeaderValue;

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

/// Serves one connection and gives its client's target.
fn served(serve: impl FnOnce(std::net::TcpStream) + Send + 'static) -> Target {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || serve(listener.accept().unwrap().0));
    Target::of(&url, Some(&HeaderValue::from_static("Bearer k"))).unwrap()
}

const CONNECT: Duration = Duration::from_secs(5);

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
    let mut answer = send(&target, "/x", body, CONNECT).await.unwrap();
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
    let body = Bytes::from(vec![b'x'; 64 << 20]);
    let answer = send(&target, "/x", body, CONNECT).await.unwrap();
    assert_eq!(answer.status, 413);
    assert_eq!(answer.body.short(9).await, b"no");
}

#[tokio::test]
async fn a_request_is_sent_on_to_an_engine_that_answers_before_it_has_read_it() {
    const LARGE: usize = 64 << 20;
    let (told, asked) = tokio::sync::oneshot::channel();
    let target = served(|mut stream| {
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
        stream.write_all(head).unwrap();
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
    let answer = send(&target, "/x", body, CONNECT).await.unwrap();
    assert_eq!(answer.status, 200);
    let asked = timeout(Duration::from_mins(1), asked).await;
    asked.expect("the whole body gets there").unwrap();
    assert_eq!(answer.body.short(9).await, b"ok");
}

#[tokio::test]
async fn an_engine_that_answers_and_takes_no_more_is_not_waited_for() {
    let (gone, until_gone) = std::sync::mpsc::channel::<()>();
    let target = served(move |mut stream| {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            .unwrap();
        // Open, and not read from, until the client has given up.
        let _ = until_gone.recv();
    });
    let body = Bytes::from(vec![b'x'; 64 << 20]);
    let limit = Duration::from_millis(50);
    let sent = send_within(&target, "/x", body, CONNECT, limit).await;
    assert!(matches!(sent, Err(HttpError::NotTaken { .. })), "{sent:?}");
    drop(gone);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn acknowledgements_are_delayed_where_it_is_asked_for() {
    for delayed in [false, true] {
        let target = served(|mut stream| {
            let _ = stream.read(&mut [0; 1024]);
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
                .unwrap();
            let _ = stream.read(&mut [0; 8]);
        });
        let target = target.with_delayed_acks(delayed);
        let answer = send(&target, "/x", Bytes::new(), CONNECT).await.unwrap();
        let source = answer.body.source.as_ref().unwrap();
        let at_once = socket2::SockRef::from(source).tcp_quickack().unwrap();
        assert_eq!(at_once, !delayed);
    }
}

#[test]
fn the_buffer_grows_with_an_engine_that_is_ahead_and_shrinks_again() {
    // Much at once, then one small piece after the other.
    let ahead = vec![b'x'; 8 * LARGEST_READ];
    let slow = vec![b'y'; 200];
    let pieces = std::iter::once(ahead.clone()).chain(std::iter::repeat_n(slow, 50));
    let source =
        futures::stream::iter(pieces.map(|piece| Ok::<_, std::io::Error>(Bytes::from(piece))));
    let source = tokio_util::io::StreamReader::new(source);
    let mut body = Body::new(source, BytesMut::new(), Framing::to_end());
    let (mut read, mut largest) = (0, 0);
    let reading = async {
        while let Some(bytes) = poll_fn(|context| body.poll_data(context)).await {
            read += bytes.unwrap().len();
            largest = largest.max(body.read_size);
        }
    };
    futures::executor::block_on(reading);
    assert_eq!(read, ahead.len() + 50 * 200);
    assert_eq!(largest, LARGEST_READ);
    assert_eq!(body.read_size, FIRST_READ);
    assert!(body.buffer.capacity() <= 2 * FIRST_READ);
}

#[tokio::test]
async fn a_connection_that_closes_without_an_answer_is_told_from_none() {
    let target = served(drop);
    let error = send(&target, "/x", Bytes::new(), CONNECT)
        .await
        .unwrap_err();
    let broken = matches!(
        error,
        HttpError::Closed | HttpError::Receive(_) | HttpError::Send(_)
    );
    assert!(broken, "{error:?}");
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let target = Target::of(&url, None).unwrap();
    let error = send(&target, "/x", Bytes::new(), CONNECT)
        .await
        .unwrap_err();
    assert!(matches!(error, HttpError::Connect(_)), "{error:?}");
}
