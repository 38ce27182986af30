//! How one of several engines behind an adapter is.

use llama_orch_types::ReplicaId;

/// One replica at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaStatus {
    pub id: ReplicaId,
    /// Without credentials.
    pub url: String,
    /// Whether it is given tasks.
    pub healthy: bool,
    /// Tasks on it.
    pub running: u32,
    pub slots: u32,
    /// Why it is given none, or the last such reason.
    pub last_error: Option<String>,
}
