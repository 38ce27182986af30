//! The state of memory as it is shown.

use std::collections::BTreeMap;

use llama_orch_types::PoolId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Budget, Needs};

/// Memory as it is given out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemoryView {
    /// What all engines may take together; a kind of memory that is not limited
    /// is left out.
    pub budget: Budget,
    /// What was promised to engines that run or load.
    pub promised: Needs,
    /// What they were measured to use, as far as they were.
    pub measured: Needs,
    /// Pools that were unloaded to make room for others so far.
    pub swaps: u64,
    pub loaded: Vec<LeaseView>,
    /// Pools that wait for memory, in the order they came.
    pub waiting: Vec<WaiterView>,
    /// What is known of every pool that has asked for memory so far.
    #[schema(value_type = BTreeMap<String, PoolMemory>)]
    pub pools: BTreeMap<PoolId, PoolMemory>,
}

/// A pool that holds memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LeaseView {
    #[schema(value_type = String)]
    pub pool_id: PoolId,
    pub promised: Needs,
    /// How many engines it is for: two while one takes over from another.
    pub engines: usize,
}

/// A pool that waits for memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WaiterView {
    #[schema(value_type = String)]
    pub pool_id: PoolId,
    pub needs: Needs,
    /// Milliseconds until this view was made.
    pub waited_ms: u64,
    /// For people.
    pub reason: String,
}

/// What an engine of a pool needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolMemory {
    /// By the model's file, its context and its slots.
    pub estimated: Needs,
    /// The most that an engine with these settings was seen to use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Needs>,
    /// What is promised to it, and so held, now; none if it is not loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promised: Option<Needs>,
}
