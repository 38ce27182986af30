//! The sides of a comparison: how each is started, and how it is asked.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use memchr::memmem::Finder;
use serde_json::{Value, json};
use test_harness_support::binary::{Build, orchestratord};

use crate::http::{Connection, find};
use crate::place::{Process, free_address};

/// How long a side may take until it serves. An engine may have to be built.
const READY_LIMIT: Duration = Duration::from_mins(20);

/// Not the name that a daemon on this machine has for its own: two cannot run
/// one pool from the same cache.
pub const POOL: &str = "bench";

/// What llama-server's events have their text in.
const CONTENT: &[u8] = b"\"content\":\"";

/// How one stream is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// llama-server's own `/completion`.
    Completion,
    /// OpenAI's chat completions.
    Chat,
    /// Tasks of orchestratord, which asks for the same prompt at `/completion`.
    Tasks,
}

/// Who is asked, where and how.
#[derive(Debug, Clone)]
pub struct Side {
    pub name: &'static str,
    pub address: SocketAddr,
    pub api: Api,
    /// The model's name, where several may be served.
    pub model: Option<String>,
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Ask {
    pub prompt: String,
    pub max_tokens: u32,
}

impl Side {
    /// Asks and hands every event with text to `seen`, to the stream's end.
    pub async fn stream(
        &self,
        connection: &mut Connection,
        ask: &Ask,
        mut seen: impl FnMut(),
    ) -> io::Result<()> {
        let (path, text): (String, &[u8]) = match self.api {
            Api::Completion => ("/completion".to_owned(), CONTENT),
            Api::Chat => ("/v1/chat/completions".to_owned(), CONTENT),
            Api::Tasks => {
                let answer = checked(connection, "POST", "/v2/tasks", &self.body(ask)).await?;
                let accepted: Value = serde_json::from_str(&answer)?;
                let path = accepted["streams"]["sse"].as_str();
                (path.unwrap_or_default().to_owned(), b"\"t\":\"")
            }
        };
        let status = match self.api {
            Api::Tasks => connection.send("GET", &path, "").await?,
            _ => connection.send("POST", &path, &self.body(ask)).await?,
        };
        if status != 200 {
            let body = connection.whole().await?;
            return Err(io::Error::other(format!("{}: {status}: {body}", self.name)));
        }
        let text = Finder::new(text);
        let mut failed = None;
        connection
            .events(|event| {
                let at = text.find(event).map(|at| at + text.needle().len());
                if at.is_some_and(|at| event.get(at) != Some(&b'"')) {
                    seen();
                } else if find(event, b"\"error\":{").is_some() || event_is_error(event) {
                    failed = Some(String::from_utf8_lossy(event).into_owned());
                }
            })
            .await?;
        failed.map_or(Ok(()), |event| {
            Err(io::Error::other(format!("{}: {event}", self.name)))
        })
    }

    fn body(&self, ask: &Ask) -> String {
        let messages = json!([{ "role": "user", "content": ask.prompt }]);
        let body = match self.api {
            Api::Completion => json!({
                "prompt": ask.prompt, "n_predict": ask.max_tokens, "stream": true,
                "temperature": 0.0,
            }),
            Api::Chat => json!({
                "model": self.model.as_deref().unwrap_or(POOL), "messages": messages,
                "max_tokens": ask.max_tokens, "stream": true, "temperature": 0.0,
            }),
            Api::Tasks => json!({
                "pool_id": POOL, "prompt": ask.prompt, "max_tokens": ask.max_tokens,
                "temperature": 0.0,
            }),
        };
        body.to_string()
    }
}

fn event_is_error(event: &[u8]) -> bool {
    find(event, b"event: error").is_some()
}

/// A request whose answer must be a success; its body.
pub async fn checked(
    connection: &mut Connection,
    method: &str,
    path: &str,
    body: &str,
) -> io::Result<String> {
    let status = connection.send(method, path, body).await?;
    let answer = connection.whole().await?;
    if (200..300).contains(&status) {
        Ok(answer)
    } else {
        Err(io::Error::other(format!(
            "{method} {path}: {status}: {answer}"
        )))
    }
}

/// Waits until a GET of `path` is answered with 200.
pub async fn until_serving(
    process: &mut Process,
    address: SocketAddr,
    path: &str,
) -> io::Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < READY_LIMIT {
        if process.has_ended() {
            return Err(io::Error::other(format!(
                "{} has ended; see its log",
                process.name
            )));
        }
        if let Ok(mut connection) = Connection::open(address).await
            && matches!(connection.send("GET", path, "").await, Ok(200))
        {
            return Ok(());
        }
        // Often, as a start is measured by it; an engine that loads answers at once.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Err(io::Error::other(format!("{} does not serve", process.name)))
}

/// A daemon with one pool, [`POOL`].
#[derive(Debug)]
pub struct Daemon {
    pub process: Process,
    pub address: SocketAddr,
}

impl Daemon {
    /// The command that starts one in `dir`, and the address that it listens on.
    pub fn command(dir: &Path, pool: &Value) -> io::Result<(Command, SocketAddr)> {
        let address = free_address()?;
        let mut config = json!({
            "listen": address,
            "runtime_dir": dir.join("runtime"),
            "limits": { "connections": 24_000, "streams_per_client": 20_000 },
            "tasks": { "keep_seconds": 1 },
            "pools": { POOL: pool },
        });
        if pool["provision"]["mode"] == "system" {
            // It provides nothing, and so keeps out of everybody's cache.
            config["cache_dir"] = json!(dir.join("cache"));
        }
        let file = dir.join("orchestratord.json");
        std::fs::write(&file, config.to_string())?;
        let mut command = Command::new(orchestratord(Build::Default));
        command
            .arg("--config")
            .arg(&file)
            .args(["--log-level", "warn"]);
        command.current_dir(dir);
        Ok((command, address))
    }

    pub async fn start(dir: &Path, pool: &Value) -> io::Result<Self> {
        let (mut command, address) = Self::command(dir, pool)?;
        let mut process = Process::start("orchestratord", &mut command, dir)?;
        until_serving(&mut process, address, &format!("/v2/pools/{POOL}/health")).await?;
        Ok(Self { process, address })
    }

    /// The pool as the daemon shows it.
    pub async fn pool(&self) -> io::Result<Value> {
        let mut connection = Connection::open(self.address).await?;
        let text = checked(&mut connection, "GET", &format!("/v2/pools/{POOL}"), "").await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The engine behind it and its process.
    pub async fn engine(&self) -> io::Result<(SocketAddr, u32)> {
        let pool = self.pool().await?;
        let replica = &pool["replica"];
        let url = replica["url"].as_str().unwrap_or_default();
        let address = url.trim_start_matches("http://").parse().ok();
        let pid = replica["pid"].as_u64().and_then(|pid| pid.try_into().ok());
        let engine = address.zip(pid);
        engine.ok_or_else(|| io::Error::other(format!("the pool has no engine: {pool}")))
    }
}

/// nginx as a plain relay, set up as is usual for event streams: no buffering,
/// connections to the engine kept, no access log, one worker. The engine closes a
/// connection after each stream; what nginx sends on one that it takes for open goes
/// out once more.
pub fn nginx(program: &Path, dir: &Path, engine: SocketAddr) -> io::Result<(Process, SocketAddr)> {
    let address = free_address()?;
    let own = dir.join("nginx");
    std::fs::create_dir_all(own.join("logs"))?;
    let config = format!(
        "worker_processes 1;\nworker_rlimit_nofile 24000;\ndaemon off;\npid {own}/nginx.pid;\nerror_log {own}/error.log warn;\n\
         events {{ worker_connections 12000; }}\n\
         http {{\n  access_log off;\n  client_body_temp_path {own}/body;\n  proxy_temp_path {own}/proxy;\n  fastcgi_temp_path {own}/fastcgi;\n  uwsgi_temp_path {own}/uwsgi;\n  scgi_temp_path {own}/scgi;\n\
         upstream engine {{ server {engine}; keepalive 256; }}\n\
         server {{ listen {address} backlog=4096; tcp_nodelay on;\n    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off; proxy_next_upstream error non_idempotent; proxy_read_timeout 600s; }}\n  }}\n}}\n",
        own = own.display(),
    );
    let file = own.join("nginx.conf");
    std::fs::write(&file, config)?;
    let mut command = Command::new(program);
    command.arg("-p").arg(&own).arg("-c").arg(&file);
    Ok((Process::start("nginx", &mut command, dir)?, address))
}

/// A directory with the model under a plain name, as router mode wants it.
pub fn models_dir(dir: &Path, model: &Path) -> io::Result<PathBuf> {
    let models = dir.join("models");
    std::fs::create_dir_all(&models)?;
    std::os::unix::fs::symlink(model, models.join("haiku.gguf"))?;
    Ok(models)
}
