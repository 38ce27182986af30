//! The SDKs that people have, against a daemon with the real engine.

use std::path::Path;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest,
    CreateChatCompletionRequestArgs,
};
use async_openai::types::embeddings::CreateEmbeddingRequestArgs;
use futures::StreamExt;
use serde_json::{Value, json};
use test_harness_clients::scripts;
use test_harness_clients::server::{Server, alone, pool, pool_with};

const ALIAS: &str = "gpt-4o-mini";

/// A daemon with a pool for each thing that clients ask for.
async fn server(name: &'static str) -> Server {
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/tools.jinja");
    let template = template.to_str().expect("the path of this crate is text");
    let more = json!({
        "pools": {
            // The model's own template knows no tools.
            pool("tools"): pool_with(&json!({
                "flags": ["--chat-template-file", template],
            })),
            // A model made for embeddings would say by itself how to pool.
            pool("embeddings"): pool_with(&json!({
                "serves": "embeddings", "flags": ["--pooling", "mean"],
            })),
            pool("narrow"): pool_with(&json!({ "queue_capacity": 1 })),
        },
    });
    let chat = json!({ "profile": "throughput", "slots": 2, "aliases": [ALIAS] });
    ready(name, chat, more).await
}

/// Clients wait a minute, an engine that has to be built first takes more.
async fn ready(name: &'static str, first: Value, more: Value) -> Server {
    let mut server = Server::start(name, first, more).await;
    server.daemon().until_ready().await;
    server
}

/// Runs a script against a daemon of its own.
async fn prove(name: &'static str, script: &str) {
    let _alone = alone().await;
    let server = server(name).await;
    let (tools, embeddings, narrow) = (pool("tools"), pool("embeddings"), pool("narrow"));
    let arguments = [
        ["--model", server.first()],
        ["--alias", ALIAS],
        ["--tools-model", &tools],
        ["--embeddings-model", &embeddings],
        ["--narrow-model", &narrow],
    ];
    scripts::run(script, server.url(), arguments.as_flattened()).await;
    server.stop().await;
}

#[tokio::test]
async fn openais_sdk_finds_what_it_expects() {
    prove("openai", "openai_client").await;
}

#[tokio::test]
async fn anthropics_sdk_finds_what_it_expects() {
    prove("anthropic", "anthropic_client").await;
}

#[tokio::test]
async fn ollamas_package_finds_what_it_expects() {
    prove("ollama", "ollama_client").await;
}

#[tokio::test]
async fn each_sdks_key_is_the_daemons_token() {
    const TOKEN: &str = "right-token-0123456789";
    let _alone = alone().await;
    let more = json!({ "auth": { "token": TOKEN } });
    let mut server = Server::start("keys", json!({}), more).await;
    let arguments = ["--model", server.first(), "--api-key", TOKEN];
    scripts::run("keys", server.url(), &arguments).await;
    let log = server.daemon().log_text();
    assert!(!log.contains(TOKEN), "the token is in the log:\n{log}");
    server.stop().await;
}

fn chat(model: &str) -> CreateChatCompletionRequest {
    let message = ChatCompletionRequestUserMessageArgs::default()
        .content("Say hello.")
        .build()
        .expect("a message");
    CreateChatCompletionRequestArgs::default()
        .model(model)
        .max_completion_tokens(12_u32)
        .temperature(0.0)
        .messages([message.into()])
        .build()
        .expect("a request")
}

async fn streamed(client: &Client<OpenAIConfig>, request: CreateChatCompletionRequest) -> String {
    let mut chunks = client
        .chat()
        .create_stream(request)
        .await
        .expect("a stream");
    let mut text = String::new();
    while let Some(chunk) = chunks.next().await {
        for choice in chunk.expect("a chunk").choices {
            text.push_str(choice.delta.content.as_deref().unwrap_or(""));
        }
    }
    text
}

#[tokio::test]
async fn async_openai_finds_what_it_expects() {
    let _alone = alone().await;
    let server = server("rust").await;
    let config = OpenAIConfig::new()
        .with_api_key("none")
        .with_api_base(format!("{}/v1", server.url()));
    let client = Client::with_config(config);

    let models = client.models().list().await.expect("a list of models").data;
    let ids: Vec<&str> = models.iter().map(|model| model.id.as_str()).collect();
    for pool in server.pools() {
        assert!(ids.contains(&pool.as_str()), "{pool} is not in {ids:?}");
    }

    let answer = client.chat().create(chat(server.first())).await;
    let answer = answer.expect("an answer");
    let text = answer.choices[0].message.content.clone().expect("a text");
    let usage = answer.usage.expect("usage");
    assert_eq!(usage.completion_tokens, 12, "{text}");
    assert_eq!(streamed(&client, chat(server.first())).await, text);
    assert_eq!(streamed(&client, chat(ALIAS)).await, text);

    let texts = CreateEmbeddingRequestArgs::default()
        .model(pool("embeddings"))
        .input(["one", "two"])
        .build()
        .expect("a request");
    let vectors = client.embeddings().create(texts).await.expect("vectors");
    let lengths: Vec<usize> = vectors.data.iter().map(|one| one.embedding.len()).collect();
    assert_eq!(lengths, [576, 576]);

    let error = client.chat().create(chat("no-such-model")).await;
    let Err(OpenAIError::ApiError(error)) = error else {
        panic!("an error of the API is expected: {error:?}");
    };
    let shown = serde_json::to_value(&error.api_error).unwrap_or(Value::Null);
    assert_eq!(shown["code"], "model_not_found", "{error:?}");
    server.stop().await;
}
