//! Engines elsewhere: what a pool of `engine: openai` sends its tasks to.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::read::ranged;

/// One replica of an engine elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EndpointConfig {
    /// What comes before `/v1/…`, such as `http://10.0.0.5:8000`.
    pub url: String,
    /// A file that holds its bearer token and nothing else.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// How many tasks it is given at once (1 to 4096).
    #[serde(default = "slots", deserialize_with = "ranged::<_, u32, 1, 4096>")]
    #[schemars(range(min = 1, max = 4096))]
    pub slots: u32,
}

fn slots() -> u32 {
    16
}
