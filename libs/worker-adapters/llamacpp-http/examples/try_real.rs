#![allow(clippy::all, clippy::pedantic, clippy::print_stdout, clippy::unwrap_used)]
use std::time::{Duration, Instant};
use futures::StreamExt;
use llama_orch_types::TaskId;
use worker_adapters_adapter_api::*;
use worker_adapters_llamacpp_http::*;
fn task(p: &str, n: u32) -> EngineTask { EngineTask { id: TaskId::generate(), input: TaskInput::Prompt(p.into()), max_tokens: n, stop: vec![], sampling: SamplingParams { temperature: Some(0.8), seed: Some(7), ..Default::default() } } }
async fn run(a: &LlamaCppAdapter, t: EngineTask) -> (Vec<String>, Option<EndSummary>, Option<WorkerError>, usize) {
    let mut s = match a.submit(t).await { Ok(s) => s, Err(e) => return (vec![], None, Some(e), 0) };
    let (mut v, mut end, mut err, mut m) = (vec![], None, None, 0);
    while let Some(x) = s.next().await { match x { Ok(TokenEvent::Token { text, .. }) => v.push(text), Ok(TokenEvent::End(e)) => end = Some(e), Ok(TokenEvent::Metrics(_)) => m += 1, Ok(_) => {}, Err(e) => err = Some(e) } }
    (v, end, err, m)
}
#[tokio::main]
async fn main() {
    let url = std::env::args().nth(1).unwrap();
    let a = LlamaCppAdapter::new(AdapterSettings::new(url.clone())).unwrap();
    println!("{:?} {:?}", a.health().await, a.props().await);
    let http = reqwest::Client::new();
    let mut same = 0;
    for (i, p) in ["Once upon a time", "Emoji: 👩‍🚀🎉日本語 — write more emoji and Japanese: 日本", "The capital of France is", "def f(x):\n"].iter().enumerate() {
        let (v, end, err, m) = run(&a, task(p, 120)).await;
        let whole: serde_json::Value = http.post(format!("{url}/completion")).json(&serde_json::json!({"prompt": p, "n_predict": 120, "temperature": 0.8, "seed": 7, "cache_prompt": true})).send().await.unwrap().json().await.unwrap();
        let text = v.concat();
        let e = end.unwrap();
        println!("{i}: same={} pieces={} out={} in={} cached={} {:?} decode={:.0}ms metrics={m} err={err:?} nonascii={}", text == whole["content"].as_str().unwrap(), v.len(), e.tokens_out, e.tokens_in, e.tokens_cached, e.finish_reason, e.decode_time_ms, text.chars().filter(|c| !c.is_ascii()).count());
        same += (text == whole["content"].as_str().unwrap()) as u32;
        let n = a.count_tokens(&TaskInput::Prompt(p.to_string())).await.unwrap();
        println!("   count_tokens={n} tokens_in={}", e.tokens_in);
    }
    println!("same {same}/4");
    let msgs = TaskInput::Messages(vec![ChatMessage { role: "user".into(), content: "Say hi.".into() }]);
    let mut t = task("", 20); t.input = msgs.clone();
    let (v, e, ..) = run(&a, t).await;
    println!("chat {:?} in={} count={}", v.concat(), e.as_ref().unwrap().tokens_in, a.count_tokens(&msgs).await.unwrap());
    let mut t = task("Answer:", 20); t.sampling.grammar = Some("root ::= \"yes\" | \"no\"".into());
    println!("grammar {:?}", { let r = run(&a, t).await; (r.0, r.1.map(|e| e.finish_reason)) });
    let mut t = task("JSON:", 60); t.sampling.json_schema = Some(serde_json::json!({"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}));
    println!("schema {:?}", run(&a, t).await.0.concat());
    let mut t = task("x", 5); t.sampling.grammar = Some("root ::= (".into());
    println!("bad grammar {:?}", run(&a, t).await.2);
    println!("long {:?}", run(&a, task(&"hello world ".repeat(3000), 3)).await.2);
    let mut t = task("1, 2, 3, 4,", 50); t.stop = vec![" 9".into()]; t.sampling.temperature = Some(0.0);
    println!("stop {:?}", { let r = run(&a, t).await; (r.0.concat(), r.1.map(|e| e.finish_reason)) });
    let mut freed = vec![];
    for _ in 0..20 {
        let t = task("Once upon a time there was", 800); let id = t.id;
        let mut s = a.submit(t).await.unwrap();
        let mut n = 0; while n < 5 { if let Some(Ok(TokenEvent::Token { .. })) = s.next().await { n += 1 } }
        let r = tokio::spawn(async move { let mut k = 0; while let Some(x) = s.next().await { if x.is_ok() { k += 1 } } k });
        freed.push(match a.cancel(id).await.unwrap() { CancelReport::Freed { after_ms } => after_ms as i64, other => { println!("{other:?}"); -1 } });
        assert_eq!(r.await.unwrap(), 0);
    }
    freed.sort(); println!("cancel decoding, freed ms: {freed:?}");
    for k in 0..3 {
        let t = task(&format!("{k} {}", "the quick brown fox jumps over it ".repeat(180)), 50); let id = t.id;
        let t0 = Instant::now();
        let s = a.submit(t).await.unwrap();
        println!("prefill submit returned after {:?}", t0.elapsed());
        let r = tokio::spawn(async move { s.collect::<Vec<_>>().await.len() });
        let rep = a.cancel(id).await.unwrap();
        println!("cancel in prefill: {rep:?}, items {}", r.await.unwrap());
    }
    let t0 = Instant::now(); let c0 = cpu();
    let (v, e, ..) = run(&a, task("Tell a long story.", 900)).await;
    println!("story: pieces {} wall {:?} decode {:.0} our cpu {:?}", v.len(), t0.elapsed(), e.unwrap().decode_time_ms, cpu() - c0);
}
fn cpu() -> Duration { let s = std::fs::read_to_string("/proc/self/stat").unwrap(); let f: Vec<&str> = s.rsplit(") ").next().unwrap().split(' ').collect(); Duration::from_millis(10 * (f[11].parse::<u64>().unwrap() + f[12].parse::<u64>().unwrap())) }
