//! Calls are passed on, and cancels too.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use llama_orch_types::TaskId;
use support::{
    After, Cancel, Reply, Server, answer, call, chat, chunks, endpoint, first_event, replicas,
    rest, text, waits,
};
use worker_adapters_adapter_api::{
    CallApi, CancelReport, EngineHealth, TokenEvent, WorkerAdapter, WorkerError,
};
use worker_adapters_openai_http::OpenaiAdapter;

#[tokio::test]
async fn a_call_arrives_as_it_was_but_for_the_model_and_the_count() {
    let server = Server::answering(Reply::chat(&["a", "b"])).await;
    let replicas = replicas(&[&server]).await;
    let body = r#"{"model": "ours", "odd":1.0e0,"stream":true}"#;
    let task = call(CallApi::ChatCompletions, body, true);
    let stream = replicas.submit_traced(task, "trace-7").await.unwrap();
    let (events, failure) = rest(stream).await;
    assert!(failure.is_none());
    assert_eq!(text(&events), "ab");
    let chunks = events
        .iter()
        .filter(|event| matches!(event, TokenEvent::Chunk(_)));
    assert_eq!(chunks.count(), 2, "the count was not asked for");
    let Some(TokenEvent::End(end)) = events.last() else {
        panic!("no end");
    };
    assert_eq!((end.tokens_in, end.tokens_out), (3, 2));
    let sent = &server.tasks()[0];
    assert_eq!(sent.line, "POST /v1/chat/completions");
    assert_eq!(
        sent.body,
        r#"{"stream_options":{"include_usage":true},"model": "far", "odd":1.0e0,"stream":true}"#
    );
    assert!(sent.head.contains("x-correlation-id: trace-7"));
}

#[tokio::test]
async fn an_answer_that_does_not_stream_is_handed_on_whole() {
    let body = r#"{"data":[{"embedding":[0.5]}],"usage":{"prompt_tokens":4}}"#;
    let server = Server::answering(Reply::ok(body)).await;
    let replicas = replicas(&[&server]).await;
    let task = call(CallApi::Embeddings, r#"{"input":"x"}"#, false);
    let (events, _) = rest(replicas.submit(task).await.unwrap()).await;
    assert!(matches!(&events[1], TokenEvent::Answer(answer) if answer.body == body));
    assert!(matches!(&events[2], TokenEvent::End(end) if end.tokens_in == 4));
    assert_eq!(server.tasks()[0].line, "POST /v1/embeddings");
    assert_eq!(server.tasks()[0].body, r#"{"model":"far","input":"x"}"#);
}

#[tokio::test]
async fn a_route_that_the_server_lacks_is_named() {
    let server = Server::answering(Reply::Status(404, String::new(), "Not Found".to_owned())).await;
    let replicas = replicas(&[&server]).await;
    let task = call(CallApi::Rerank, "{}", false);
    let refused = replicas.submit(task).await.err().unwrap();
    assert!(matches!(&refused, WorkerError::NotOffered { what } if what.contains("/v1/rerank")));
}

#[tokio::test]
async fn health_falls_back_where_no_models_are_listed() {
    let server = Server::start(|request| match request.line.as_str() {
        "GET /health" => Reply::ok(""),
        _ => Reply::Status(404, String::new(), String::new()),
    })
    .await;
    let adapter = OpenaiAdapter::new(endpoint(&server.url), waits()).unwrap();
    assert_eq!(adapter.health().await.unwrap(), EngineHealth::Ready);
    assert!(matches!(
        adapter.count_tokens(&chat().input).await,
        Err(WorkerError::NotOffered { .. })
    ));
}

#[tokio::test]
async fn the_list_of_models_tells_name_and_context() {
    let models = r#"{"data":[{"id":"other"},{"id":"far","owned_by":"vllm","max_model_len":8192}]}"#;
    let server = Server::start(move |_| Reply::ok(models)).await;
    let adapter = OpenaiAdapter::new(endpoint(&server.url), waits()).unwrap();
    let props = adapter.props().await.unwrap();
    assert_eq!(
        (props.version.as_str(), props.ctx, props.slots),
        ("vllm", 8192, 2)
    );
}

#[tokio::test]
async fn a_cancel_closes_the_stream_and_asks_where_it_can() {
    let upstream = TaskId::generate();
    for (head, report) in [
        (String::new(), CancelReport::NotShown),
        (
            format!("x-task-id: {upstream}\r\n"),
            CancelReport::Freed { after_ms: 7 },
        ),
    ] {
        let stream = Reply::Stream(head, chunks(&["x"]), After::Hang);
        let server = Server::start(move |request| match request.line.as_str() {
            "GET /v1/models" => Reply::ok("{}"),
            "POST /v1/chat/completions" => stream.clone(),
            _ => Reply::ok(r#"{"task_id":"x","cancelled":true,"freed_ms":7}"#),
        })
        .await;
        let replicas = replicas(&[&server]).await;
        let task = chat();
        let id = task.id;
        let mut stream = replicas.submit(task).await.unwrap();
        first_event(&mut stream).await;
        assert_eq!(replicas.replica_of(id).unwrap().as_str(), "r0");
        assert_eq!(replicas.cancel(id).await.unwrap(), report);
        let (events, failure) = rest(stream).await;
        assert!(events.is_empty() && matches!(failure, Some(WorkerError::Cancelled)));
        assert_eq!(replicas.cancel(id).await.unwrap(), CancelReport::NotRunning);
        if report != CancelReport::NotShown {
            let asked = &server.tasks()[1];
            assert_eq!(asked.line, format!("POST /v2/tasks/{upstream}/cancel"));
        }
    }
}

#[tokio::test]
async fn an_answer_that_its_cancel_ends_is_no_failure_of_the_server() {
    let cancel = Cancel::default();
    let answering = async || {
        let head = format!("x-task-id: {}\r\n", TaskId::generate());
        let stream = Reply::Stream(head, vec![], After::Cancel(cancel.clone()));
        let told = Reply::Cancelled(cancel.clone(), r#"{"freed_ms":7}"#.to_owned());
        Server::start(move |request| match request.line.as_str() {
            "GET /v1/models" => Reply::ok("{}"),
            "POST /v1/chat/completions" => stream.clone(),
            _ => told.clone(),
        })
        .await
    };
    let servers = [answering().await, answering().await];
    let replicas = replicas(&[&servers[0], &servers[1]]).await;
    let task = chat();
    let id = task.id;
    let stream = replicas.submit(task).await.unwrap();
    let (report, (events, failure)) = tokio::join!(replicas.cancel(id), rest(stream));
    assert_eq!(report.unwrap(), CancelReport::Freed { after_ms: 7 });
    let tokens = events
        .iter()
        .filter(|event| !matches!(event, TokenEvent::Started));
    assert_eq!(tokens.count(), 0, "{events:?}");
    assert!(
        matches!(failure, Some(WorkerError::Cancelled)),
        "{failure:?}"
    );
    let asked: Vec<String> = servers
        .iter()
        .flat_map(Server::tasks)
        .map(|task| task.line)
        .collect();
    let calls = asked.iter().filter(|line| line.ends_with("/completions"));
    assert_eq!(calls.count(), 1, "nobody else is given it: {asked:?}");
    let statuses = replicas.replicas();
    assert!(
        statuses.iter().all(|one| one.last_error.is_none()),
        "{statuses:?}"
    );
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let elsewhere = Server::answering(Reply::chat(&["stolen"])).await;
    let head = format!("location: {}/v1/chat/completions\r\n", elsewhere.url);
    let server = Server::answering(Reply::Status(308, head, String::new())).await;
    let replicas = replicas(&[&server]).await;
    assert!(matches!(
        replicas.submit(chat()).await.err().unwrap(),
        WorkerError::Protocol { .. }
    ));
    assert!(elsewhere.tasks().is_empty());
}

#[tokio::test]
async fn a_prompt_is_continued_by_the_other_route() {
    let events = vec![r#"{"choices":[{"text":"on","index":0,"finish_reason":"stop"}]}"#.to_owned()];
    // Some servers end without a last word.
    let server = Server::answering(Reply::Stream(String::new(), events, After::End)).await;
    let replicas = replicas(&[&server]).await;
    let mut task = chat();
    task.input = worker_adapters_adapter_api::TaskInput::Prompt("go ".to_owned());
    assert_eq!(answer(&replicas, task).await, "on");
    assert_eq!(server.tasks()[0].line, "POST /v1/completions");
}
