//! Pools as people read them. Pure.

use crate::api::pools::PoolView;
use crate::services::pool::Phase;
use crate::services::residency::Needs;

const HEAD: [&str; 8] = [
    "POOL", "MODEL", "STATE", "MEMORY", "RUNNING", "QUEUED", "LOAD", "IDLE",
];

/// A head and one line for each pool, in columns.
pub(super) fn table(pools: &[PoolView]) -> Vec<String> {
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(pools.iter().map(row));
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let widths: [usize; HEAD.len()] = std::array::from_fn(width);
    let line = |row: &[String; HEAD.len()]| {
        let cells = row.iter().zip(widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn row(pool: &PoolView) -> [String; HEAD.len()] {
    [
        pool.pool_id.clone(),
        pool.model.clone(),
        pool.state.as_str().to_owned(),
        memory(pool),
        format!("{}/{}", pool.running, pool.slots),
        format!(
            "{}/{}",
            pool.queue.interactive + pool.queue.batch,
            pool.queue.capacity
        ),
        load(pool),
        pool.idle_ms.map_or_else(|| "-".to_owned(), short),
    ]
}

/// What it holds of memory; in brackets what it would need, if it holds none.
fn memory(pool: &PoolView) -> String {
    let Some(memory) = pool.memory else {
        return "-".to_owned();
    };
    let needs = memory.promised.unwrap_or_else(|| {
        let measured = memory.measured.unwrap_or_default();
        Needs {
            ram: some_or(measured.ram, memory.estimated.ram),
            vram: some_or(measured.vram, memory.estimated.vram),
        }
    });
    let kinds = [(needs.ram, ""), (needs.vram, " GPU")];
    let told: Vec<String> = kinds
        .into_iter()
        .filter(|(bytes, _)| *bytes > 0)
        .map(|(bytes, kind)| format!("{}{kind}", size(bytes)))
        .collect();
    match (told.join(" + "), memory.promised) {
        (none, _) if none.is_empty() => "-".to_owned(),
        (held, Some(_)) => held,
        (needed, None) => format!("({needed})"),
    }
}

fn some_or(measured: u64, estimated: u64) -> u64 {
    if measured > 0 { measured } else { estimated }
}

/// Bytes as people say them.
fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    match bytes.div_ceil(MIB) {
        mib @ 0..1024 => format!("{mib} MiB"),
        mib => format!("{:.1} GiB", mib as f64 / 1024.0),
    }
}

/// When it is loaded, and when it goes.
fn load(pool: &PoolView) -> String {
    if pool.engine == "openai" {
        return "elsewhere".to_owned();
    }
    // As the configuration has it.
    let value = serde_json::to_value(pool.load).unwrap_or_default();
    let mut words = vec![value.as_str().unwrap_or_default().to_owned()];
    if pool.pin {
        words.push("pinned".to_owned());
    }
    if let Some(left) = pool.unloads_in_ms {
        words.push(format!("unloads in {}", short(left)));
    }
    words.join(", ")
}

/// Milliseconds in the largest unit that fits.
fn short(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms} ms"),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

/// How it stands, in a sentence.
pub(super) fn in_a_line(pool: &PoolView) -> String {
    let id = &pool.pool_id;
    match pool.state {
        Phase::Ready => format!(
            "pool {id} is ready: {} with {} slot(s)",
            pool.model, pool.slots
        ),
        Phase::Unloaded => format!("pool {id} is unloaded; its next task loads it again"),
        Phase::Stopped => format!("pool {id} is stopped and takes no tasks until it is started"),
        Phase::Provisioning | Phase::Starting if pool.queue.interactive + pool.queue.batch > 0 => {
            format!("pool {id} is {}: tasks wait for it", pool.state.as_str())
        }
        state => format!("pool {id} is {}", state.as_str()),
    }
}

/// What tells one stage of a wait from the next.
pub(super) fn stage(pool: &PoolView) -> String {
    let steps = pool.preparation.steps.iter();
    let steps: Vec<&str> = steps.map(|step| step.description.as_str()).collect();
    format!("{} {}", pool.state.as_str(), steps.join(" "))
}

/// What is being waited for.
pub(super) fn waiting(pool: &PoolView) -> String {
    let id = &pool.pool_id;
    match (pool.state, pool.preparation.in_words()) {
        (Phase::Draining, _) if pool.running > 0 => {
            format!("{id}: {} task(s) finish", pool.running)
        }
        (_, Some(words)) => format!("{id}: {words}"),
        (state, None) => format!("{id}: {}", state.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pool(id: &str, state: &str, more: &serde_json::Value) -> PoolView {
        let mut view = json!({
            "pool_id": id, "engine": "llamacpp", "model": "haiku", "load": "on_demand",
            "pin": false, "flags": [], "state": state, "in_state_ms": 1,
            "queue": { "interactive": 1, "batch": 2, "capacity": 64 }, "running": 1, "slots": 2,
            "mean_service_ms": 1, "measured_tasks": 0, "engine_exits": 0,
            "restarts": { "crash": 0, "hang": 0, "load_failure": 0, "reload": 0 },
            "preparation": { "steps": [] },
        });
        for (key, value) in more.as_object().unwrap() {
            view[key] = value.clone();
        }
        serde_json::from_value(view).unwrap()
    }

    #[test]
    fn columns_stand_under_each_other() {
        let needs = json!({ "ram": 150 << 20, "vram": 0 });
        let promised = json!({ "ram": 3 << 29, "vram": 5u64 << 30 });
        let idle = json!({ "idle_ms": 61_000, "unloads_in_ms": 239_000,
            "memory": { "estimated": needs, "promised": promised } });
        let pools = [
            pool("a", "unloaded", &json!({})),
            pool(
                "b",
                "unloaded",
                &json!({ "memory": { "estimated": needs } }),
            ),
            pool("longer-name", "ready", &idle),
        ];
        assert_eq!(
            table(&pools),
            [
                "POOL         MODEL  STATE     MEMORY                 RUNNING  QUEUED  LOAD                         IDLE",
                "a            haiku  unloaded  -                      1/2      3/64    on_demand                    -",
                "b            haiku  unloaded  (150 MiB)              1/2      3/64    on_demand                    -",
                "longer-name  haiku  ready     1.5 GiB + 5.0 GiB GPU  1/2      3/64    on_demand, unloads in 3 min  61 s",
            ]
        );
    }

    #[test]
    fn a_stage_changes_with_what_is_done_and_not_with_how_far_it_is() {
        let step = |share: f64| {
            let step =
                json!({ "kind": "model_fetch", "description": "fetching", "progress": share });
            pool(
                "a",
                "provisioning",
                &json!({ "preparation": { "steps": [step] } }),
            )
        };
        assert_eq!(stage(&step(0.1)), stage(&step(0.2)));
        assert_eq!(waiting(&step(0.5)), "a: preparing: fetching 50 %");
        assert_eq!(
            waiting(&pool("a", "draining", &json!({}))),
            "a: 1 task(s) finish"
        );
    }
}
