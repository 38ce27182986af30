//! The names of the metrics, in one place, and what they mean.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

pub const TASKS: &str = "orchestratord_tasks_total";
pub const REFUSED: &str = "orchestratord_tasks_refused_total";
pub const RESUMED: &str = "orchestratord_tasks_resumed_total";
pub const QUEUED: &str = "orchestratord_queue_depth";
pub const RUNNING: &str = "orchestratord_running_tasks";
pub const SLOTS: &str = "orchestratord_slots";
pub const READY: &str = "orchestratord_pool_ready";
pub const ENGINE_EXITS: &str = "orchestratord_engine_exits_total";
pub const RESTARTS: &str = "orchestratord_engine_restarts_total";
pub const TOKENS_IN: &str = "orchestratord_prompt_tokens_total";
pub const TOKENS_OUT: &str = "orchestratord_generated_tokens_total";
pub const QUEUE_WAIT: &str = "orchestratord_queue_wait_seconds";
pub const FIRST_TOKEN: &str = "orchestratord_time_to_first_token_seconds";
pub const SERVICE_TIME: &str = "orchestratord_service_time_seconds";
pub const CANCEL_FREED: &str = "orchestratord_cancel_to_free_seconds";
pub const CONNECTIONS: &str = "orchestratord_connections";
pub const TURNED_AWAY: &str = "orchestratord_connections_turned_away_total";
pub const LOADS: &str = "orchestratord_pool_loads_total";
pub const UNLOADS: &str = "orchestratord_pool_unloads_total";
pub const LOAD_TIME: &str = "orchestratord_pool_load_seconds";
pub const READY_AFTER: &str = "orchestratord_pool_ready_after_seconds";
pub const MEMORY_SWAPS: &str = "orchestratord_memory_swaps_total";
pub const MEMORY_WAIT: &str = "orchestratord_memory_wait_seconds";
pub const MEMORY_PROMISED: &str = "orchestratord_memory_promised_bytes";
pub const MEMORY_MEASURED: &str = "orchestratord_memory_measured_bytes";
pub const MEMORY_BUDGET: &str = "orchestratord_memory_budget_bytes";

/// Bucket bounds in seconds: from a cached first token to a long build.
pub const BUCKETS: &[f64] = &[
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0,
];

pub fn describe() {
    describe_counter!(
        TASKS,
        "Tasks that are over, by pool and outcome (completed, cancelled, or an error code)"
    );
    describe_counter!(
        REFUSED,
        "Tasks refused at admission, by pool and error code"
    );
    describe_counter!(
        RESUMED,
        "How often a task lost its engine and was gone on with, by pool"
    );
    describe_gauge!(QUEUED, "Tasks waiting, by pool and priority");
    describe_gauge!(RUNNING, "Tasks in the engine, by pool");
    describe_gauge!(SLOTS, "Tasks the engine decodes side by side, by pool");
    describe_gauge!(READY, "1 while the pool takes tasks to its engine, else 0");
    describe_counter!(
        ENGINE_EXITS,
        "Engines that ended without being asked to, by pool"
    );
    describe_counter!(
        RESTARTS,
        "Engines that had to be started again, by pool and cause (crash, hang, load_failure, reload)"
    );
    describe_counter!(TOKENS_IN, "Prompt tokens of completed tasks, by pool");
    describe_counter!(TOKENS_OUT, "Generated tokens of completed tasks, by pool");
    describe_gauge!(CONNECTIONS, "Open connections of clients");
    describe_counter!(
        TURNED_AWAY,
        "Connections turned away, since `limits.connections` were open"
    );
    describe_counter!(
        MEMORY_SWAPS,
        "Pools that were unloaded to make room for others, by pool"
    );
    describe_histogram!(
        MEMORY_WAIT,
        Unit::Seconds,
        "How long an engine's start waited for memory, by pool"
    );
    describe_gauge!(
        MEMORY_PROMISED,
        Unit::Bytes,
        "Memory promised to engines, by kind (ram, vram)"
    );
    describe_gauge!(
        MEMORY_MEASURED,
        Unit::Bytes,
        "Memory that engines were measured to use, by kind"
    );
    describe_gauge!(
        MEMORY_BUDGET,
        Unit::Bytes,
        "What all engines may take together, by kind"
    );
    describe_histogram!(
        QUEUE_WAIT,
        Unit::Seconds,
        "From admission until the engine took the task"
    );
    describe_histogram!(
        FIRST_TOKEN,
        Unit::Seconds,
        "From admission until the first piece of the answer"
    );
    describe_histogram!(
        SERVICE_TIME,
        Unit::Seconds,
        "From dispatch until the task was over"
    );
    describe_histogram!(
        CANCEL_FREED,
        Unit::Seconds,
        "From a cancel until the engine's slot was seen free"
    );
    describe_counter!(
        LOADS,
        "Engines that got ready, by pool and cause (begin, task, asked, restart, reload)"
    );
    describe_counter!(
        UNLOADS,
        "Engines that were ended to free their memory, by pool and cause (idle_ttl, memory, asked)"
    );
    describe_histogram!(
        LOAD_TIME,
        Unit::Seconds,
        "From the engine's start until it was ready"
    );
    describe_histogram!(
        READY_AFTER,
        Unit::Seconds,
        "From the start of making a pool ready until it was"
    );
}
