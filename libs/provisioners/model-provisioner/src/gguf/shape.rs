//! What the memory that a model needs beside its weights depends on.

use std::collections::BTreeMap;

use llama_orch_types::ModelShape;

/// How many numbers are kept: a hostile file has many.
const MOST: usize = 64;

/// The keys that matter, behind the architecture's name.
const KEYS: [&str; 6] = [
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
];

/// Numbers from the header, as they come.
#[derive(Debug, Default)]
pub(super) struct ShapeNumbers(BTreeMap<String, u64>);

impl ShapeNumbers {
    pub(super) fn take(&mut self, key: &str, number: u64) {
        let rest = key.split_once('.').map(|(_, rest)| rest);
        if rest.is_some_and(|rest| KEYS.contains(&rest)) && self.0.len() < MOST {
            self.0.insert(key.to_owned(), number);
        }
    }

    /// `embedded` is how many numbers the table of embeddings has.
    pub(super) fn shape(&self, architecture: &str, embedded: u64) -> Option<ModelShape> {
        let number = |key: &str| {
            let number = self.0.get(&format!("{architecture}.{key}")).copied();
            number.filter(|number| *number > 0)
        };
        let (layers, embedding) = (number("block_count")?, number("embedding_length")?);
        let heads = number("attention.head_count")?;
        // Where they differ from layer to layer the file has a list, and all heads
        // are the most there can be.
        let kv_heads = number("attention.head_count_kv").unwrap_or(heads);
        let even = embedding / heads;
        Some(ModelShape {
            layers,
            embedding,
            kv_heads,
            key_length: number("attention.key_length").unwrap_or(even),
            value_length: number("attention.value_length").unwrap_or(even),
            vocabulary: embedded / embedding,
        })
    }
}
