//! What an engine will take of memory, by its model and its settings. Pure.
//!
//! Weights, keys and values of the whole context, what computing takes, and the
//! program itself. It is an estimate, meant to be a little too large; what the
//! engine is then measured to use corrects it.

use llama_orch_types::ModelShape;
use provisioners_engine_provisioner::{Accelerator, EngineInstallation, LaunchSpec, Profile};

use crate::services::residency::Needs;

const MIB: u64 = 1024 * 1024;

/// Most that one token of context takes, in bytes, where the model does not say:
/// that of 7 billion weights without grouped attention, and twice that.
const MOST_PER_TOKEN: u64 = MIB;

/// The program, its threads and its HTTP server.
const PROGRAM: u64 = 32 * MIB;

/// What is kept for each token of the vocabulary.
const PER_WORD: u64 = 256;

/// Numbers in a layer's passing results for each number of a token's state.
const RESULTS: u64 = 16;

/// Bytes of a number that is computed with.
const FLOAT: u64 = 4;

/// Tokens that the engine computes at once, by profile: see the engine's flags.
const BATCH: u64 = 512;
const SMALL_BATCH: u64 = 128;

/// What is known of the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) shape: Option<ModelShape>,
    /// Further files that the flags name, in bytes.
    pub(super) further_files: u64,
}

/// Whether the engine will put a part of the model on a GPU.
pub(super) fn uses_gpu(installation: &EngineInstallation, spec: &LaunchSpec) -> bool {
    match spec.gpu_layers {
        Some(layers) => layers > 0,
        None => {
            installation.accelerator != Accelerator::Cpu
                || value_of(&spec.flags, &["-ngl", "--gpu-layers", "--n-gpu-layers"]).is_some()
        }
    }
}

/// What the engine takes.
pub(super) fn estimate(spec: &LaunchSpec, facts: &Facts, on_gpu: bool) -> Needs {
    let weights = spec.model.size_bytes.saturating_add(facts.further_files);
    let tokens = u64::from(spec.ctx_per_slot()) * u64::from(spec.slots);
    let context = tokens.saturating_mul(per_token(spec, facts.shape));
    let (computing, words) = match facts.shape {
        Some(shape) => (
            batch(spec)
                .saturating_mul(shape.embedding)
                .saturating_mul(RESULTS * FLOAT),
            shape.vocabulary,
        ),
        None => (0, 0),
    };
    let program = PROGRAM.saturating_add(words.saturating_mul(PER_WORD));
    let model = weights.saturating_add(context);
    if !on_gpu {
        return Needs::of_ram(model.saturating_add(computing).saturating_add(program));
    }
    let moved = on_the_gpu(model, spec, facts.shape);
    // There all of a batch's results are set aside, and not only those that are used.
    let results = batch(spec).saturating_mul(words).saturating_mul(FLOAT);
    Needs {
        ram: (model - moved)
            .saturating_add(computing)
            .saturating_add(program)
            .saturating_add(weights / 10),
        vram: moved.saturating_add(computing).saturating_add(results),
    }
}

/// The part of weights and context that lies on the GPU.
fn on_the_gpu(model: u64, spec: &LaunchSpec, shape: Option<ModelShape>) -> u64 {
    let named = value_of(&spec.flags, &["-ngl", "--gpu-layers", "--n-gpu-layers"]);
    let layers = spec
        .gpu_layers
        .map(u64::from)
        .or_else(|| named.and_then(|layers| layers.parse().ok()));
    match (layers, shape) {
        // The last counts for what comes behind the layers.
        (Some(layers), Some(shape)) if layers <= shape.layers => {
            model / (shape.layers + 1) * layers
        }
        _ => model,
    }
}

/// Keys and values of one token, in bytes.
fn per_token(spec: &LaunchSpec, shape: Option<ModelShape>) -> u64 {
    let Some(shape) = shape else {
        let weights = spec.model.parameter_count.unwrap_or(spec.model.size_bytes);
        return (32 * 1024 + weights / 1_000_000 * 64).min(MOST_PER_TOKEN);
    };
    let kind = |names: &[&str]| value_of(&spec.flags, names);
    let keys = of_type(kind(&["-ctk", "--cache-type-k"]), shape.key_length);
    let values = of_type(kind(&["-ctv", "--cache-type-v"]), shape.value_length);
    shape
        .layers
        .saturating_mul(shape.kv_heads)
        .saturating_mul(keys.saturating_add(values))
}

/// Bytes of so many numbers of a cache's type; `f16` unless another is named.
fn of_type(name: Option<&str>, numbers: u64) -> u64 {
    // Bytes of a block of 32 numbers.
    let block = match name.unwrap_or("f16") {
        "f32" => 128,
        "q8_0" => 34,
        "q5_1" => 24,
        "q5_0" => 22,
        "q4_1" => 20,
        "q4_0" | "iq4_nl" => 18,
        // `f16`, `bf16`, and what comes some day.
        _ => 64,
    };
    numbers.saturating_mul(block).div_ceil(32)
}

fn batch(spec: &LaunchSpec) -> u64 {
    let named = value_of(&spec.flags, &["-ub", "--ubatch-size"]);
    named
        .and_then(|size| size.parse().ok())
        .unwrap_or(match spec.profile {
            Profile::Deterministic => SMALL_BATCH,
            Profile::Throughput => BATCH,
        })
}

/// The value of a flag: `--name value` or `--name=value`, in one word or two.
fn value_of<'a>(flags: &'a [String], names: &[&str]) -> Option<&'a str> {
    let mut words = flags.iter().flat_map(|flag| flag.split_whitespace());
    while let Some(word) = words.next() {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (word, None),
        };
        if names.contains(&name) {
            return value.or_else(|| words.next());
        }
    }
    None
}

/// Files that the flags name: a projector, an adapter, a draft model.
pub(super) fn files_in(flags: &[String]) -> impl Iterator<Item = &str> {
    let words = flags
        .iter()
        .flat_map(|flag| flag.split([' ', '=']))
        .map(str::trim);
    words.filter(|word| {
        let path = std::path::Path::new(word);
        path.extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_orch_types::{Digest, ModelMetadata, PoolId};
    use proptest::prelude::*;

    fn spec(size_bytes: u64) -> LaunchSpec {
        let model = ModelMetadata {
            id: "m".to_owned(),
            path: "m.gguf".into(),
            digest: Digest::from_bytes([1; 32]),
            size_bytes,
            architecture: None,
            quantization: None,
            parameter_count: Some(135_000_000),
            ctx_max: Some(8192),
            chat_template: None,
            shape: None,
        };
        LaunchSpec::new(PoolId::default_pool(), model)
    }

    /// That of SmolLM2-135M.
    const SMALL: ModelShape = ModelShape {
        layers: 30,
        embedding: 576,
        kv_heads: 3,
        key_length: 64,
        value_length: 64,
        vocabulary: 49_152,
    };

    fn facts(shape: Option<ModelShape>) -> Facts {
        Facts {
            shape,
            further_files: 0,
        }
    }

    #[test]
    fn the_estimate_is_near_what_a_real_engine_was_seen_to_hold() {
        // llama-server b11434 on a CPU, SmolLM2-135M Q4_1, after a prompt of 1,500
        // tokens: context and slots, and its resident memory in kB.
        for (ctx, slots, seen) in [(4096, 1, 239_088), (8192, 1, 331_016), (8192, 4, 885_728)] {
            let spec = LaunchSpec {
                ctx: Some(ctx),
                slots,
                profile: Profile::Throughput,
                ..spec(98_362_432)
            };
            let ram = estimate(&spec, &facts(Some(SMALL)), false).ram;
            let seen = seen * 1024;
            assert!(
                ram > seen && ram < seen + seen / 6,
                "{ram} was estimated, and {seen} seen"
            );
        }
    }

    #[test]
    fn the_caches_types_count() {
        let with = |flags: &[&str]| {
            let spec = LaunchSpec {
                flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
                ..spec(0)
            };
            per_token(&spec, Some(SMALL))
        };
        assert_eq!(with(&[]), 30 * 3 * (128 + 128));
        assert_eq!(with(&["--cache-type-k q8_0"]), 30 * 3 * (68 + 128));
        assert_eq!(with(&["-ctk=q8_0", "-ctv", "f32"]), 30 * 3 * (68 + 256));
    }

    #[test]
    fn a_gpu_takes_its_layers_and_leaves_the_rest() {
        let layers = |gpu_layers| LaunchSpec {
            gpu_layers,
            ..spec(310 * MIB)
        };
        let all = estimate(&layers(None), &facts(Some(SMALL)), true);
        assert!(all.vram > 310 * MIB && all.ram < 200 * MIB, "{all:?}");
        let some = estimate(&layers(Some(10)), &facts(Some(SMALL)), true);
        assert!(some.vram < all.vram && some.ram > all.ram, "{some:?}");
        assert_eq!(
            estimate(&layers(Some(0)), &facts(Some(SMALL)), false).vram,
            0
        );
    }

    #[test]
    fn files_that_flags_name_are_found() {
        let flags = ["--mmproj a b.gguf", "--lora=/x/c.GGUF", "--seed", "1.5"];
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        assert_eq!(
            files_in(&flags).collect::<Vec<_>>(),
            ["b.gguf", "/x/c.GGUF"]
        );
    }

    proptest! {
        #[test]
        fn nothing_overflows_and_more_context_never_takes_less(
            size in any::<u64>(),
            ctx in 128..16_777_216u32,
            more in 0..1_000_000u32,
            numbers in prop::array::uniform5(0..u64::from(u32::MAX)),
            on_gpu in any::<bool>(),
            layers in prop::option::of(any::<u32>()),
        ) {
            let [layers_in_all, embedding, kv_heads, key_length, vocabulary] = numbers;
            let shape = ModelShape {
                layers: layers_in_all, embedding, kv_heads, key_length, value_length: key_length, vocabulary,
            };
            let with = |ctx| {
                let spec = LaunchSpec { ctx: Some(ctx), gpu_layers: layers, slots: 256, ..spec(size) };
                estimate(&spec, &facts(Some(shape)), on_gpu)
            };
            let (less, more) = (with(ctx), with(ctx + more));
            prop_assert!(more.ram >= less.ram.saturating_sub(u64::from(u32::MAX)) && more.vram >= less.vram);
        }
    }
}
