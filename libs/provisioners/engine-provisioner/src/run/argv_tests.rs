use super::*;
use llama_orch_types::{Digest, ModelMetadata, PoolId};
use proptest::prelude::*;

fn spec(flags: &[&str]) -> LaunchSpec {
    let model = ModelMetadata {
        id: "haiku".into(),
        path: "/models/a b.gguf".into(),
        digest: Digest::from_bytes([0; 32]),
        size_bytes: 1,
        architecture: None,
        quantization: None,
        parameter_count: None,
        ctx_max: Some(8192),
        chat_template: None,
        shape: None,
    };
    LaunchSpec {
        flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
        ..LaunchSpec::new(PoolId::default_pool(), model)
    }
}

fn rendered(spec: &LaunchSpec) -> String {
    render_argv(spec, 4000).unwrap().join(" ")
}

#[test]
fn the_deterministic_profile_is_what_it_says() {
    assert_eq!(
        rendered(&spec(&[])),
        "--model /models/a b.gguf --host 127.0.0.1 --port 4000 --offline --log-colors off \
         --parallel 1 --no-kv-unified --no-webui --metrics --slots --no-cont-batching --fit off \
         --cache-ram 0 --ctx-size 4096 --alias default --batch-size 128 --ubatch-size 128"
    );
}

#[test]
fn each_slot_of_the_throughput_profile_has_its_whole_context() {
    let spec = LaunchSpec {
        profile: Profile::Throughput,
        slots: 4,
        ctx: Some(2048),
        threads: Some(2),
        gpu_layers: Some(0),
        ..spec(&[])
    };
    let line = rendered(&spec);
    assert!(line.contains("--parallel 4 "), "{line}");
    assert!(line.contains(" --cont-batching "), "{line}");
    assert!(
        line.ends_with("--ctx-size 8192 --threads 2 --n-gpu-layers 0 --alias default"),
        "{line}"
    );
}

#[test]
fn the_context_defaults_to_what_the_model_knows() {
    let mut spec = spec(&[]);
    spec.model.ctx_max = Some(512);
    assert!(rendered(&spec).contains("--ctx-size 512 "));
    spec.model.ctx_max = None;
    assert!(rendered(&spec).contains("--ctx-size 4096 "));
}

#[test]
fn an_engine_for_embeddings_takes_a_whole_input_in_one_batch() {
    let serves = |purpose, profile, flags: &[&str]| LaunchSpec {
        purpose,
        profile,
        ctx: Some(2048),
        ..spec(flags)
    };
    for profile in [Profile::Deterministic, Profile::Throughput] {
        let line = rendered(&serves(Purpose::Embeddings, profile, &[]));
        assert!(
            line.ends_with("--embeddings --alias default --batch-size 2048 --ubatch-size 2048"),
            "{line}"
        );
        let line = rendered(&serves(Purpose::Rerank, profile, &["-ub 512", "-b 512"]));
        assert!(
            line.ends_with("--reranking --alias default --ubatch-size 512 --batch-size 512"),
            "{line}"
        );
    }
    let pooled = serves(
        Purpose::Embeddings,
        Profile::Deterministic,
        &["--pooling mean"],
    );
    assert!(rendered(&pooled).ends_with(" --pooling mean"));
    let twice = serves(Purpose::Rerank, Profile::Deterministic, &["--rerank"]);
    assert_eq!(
        render_argv(&twice, 1).unwrap_err().to_string(),
        "`--reranking` is given twice: by `serves` and by `flags[0]`"
    );
}

#[test]
fn old_spellings_become_the_one() {
    for old in ["-ngl", "--ngl", "--gpu-layers", "--n-gpu-layers"] {
        for flags in [
            vec![old.to_owned(), "7".to_owned()],
            vec![format!("{old} 7")],
            vec![format!("{old}=7")],
        ] {
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let line = rendered(&spec(&flags));
            assert!(line.ends_with(" --n-gpu-layers 7"), "{line}");
        }
    }
}

#[test]
fn a_flag_given_twice_names_both_places() {
    let error = render_argv(&spec(&["--seed", "1", "-s 1"]), 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`--seed` is given twice: by `flags[0]` and by `flags[2]`"
    );
    let error = render_argv(&spec(&["--metrics"]), 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`--metrics` is given twice: by profile deterministic and by `flags[0]`"
    );
}

#[test]
fn a_contradiction_names_both_places() {
    for (flags, expected) in [
        (
            &["--parallel", "4"][..],
            "`--parallel 4` (`flags[0]`) contradicts `--parallel 1` (profile deterministic)",
        ),
        (
            &["-cb"],
            "`--cont-batching` (`flags[0]`) contradicts `--no-cont-batching` (profile deterministic)",
        ),
        (
            &["--ui"],
            "`--webui` (`flags[0]`) contradicts `--no-webui` (profile deterministic)",
        ),
        (
            &["-c", "1"],
            "`--ctx-size 1` (`flags[0]`) contradicts `--ctx-size 4096` (`ctx`)",
        ),
        (
            &["--temp 0", "--temperature 1"],
            "`--temp 1` (`flags[1]`) contradicts `--temp 0` (`flags[0]`)",
        ),
    ] {
        assert_eq!(
            render_argv(&spec(flags), 1).unwrap_err().to_string(),
            expected
        );
    }
    let with_threads = LaunchSpec {
        threads: Some(1),
        ..spec(&["-t", "2"])
    };
    assert!(
        render_argv(&with_threads, 1)
            .unwrap_err()
            .to_string()
            .contains("(`threads`)")
    );
}

#[test]
fn no_host_is_not_about_the_host() {
    let argv = render_argv(&spec(&["--no-host"]), 1).unwrap();
    assert!(argv.contains(&"--no-host".to_owned()), "{argv:?}");
    assert!(render_argv(&spec(&["--no-host", "--no-host"]), 1).is_err());
}

#[test]
fn what_is_ours_stays_ours() {
    for flag in [
        "--port 1",
        "--host 0.0.0.0",
        "-m other.gguf",
        "-hf a/b",
        "--api-key x",
        "--version",
        "--reuse-port",
    ] {
        let error = render_argv(&spec(&[flag]), 1).unwrap_err();
        assert!(
            matches!(error, FlagError::NotYours { .. }),
            "{flag}: {error}"
        );
    }
}

#[test]
fn a_users_batch_size_wins_and_values_may_be_negative() {
    let line = rendered(&spec(&["-b", "512", "--n-predict", "-1"]));
    assert!(
        line.contains("--ubatch-size 128 --batch-size 512 --n-predict -1"),
        "{line}"
    );
    assert!(!line.contains("--batch-size 128 "), "{line}");
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    let two = LaunchSpec {
        slots: 2,
        ..spec(&[])
    };
    assert_eq!(
        render_argv(&two, 1),
        Err(FlagError::TooManySlots { slots: 2 })
    );
    let none = LaunchSpec {
        slots: 0,
        ..spec(&[])
    };
    assert_eq!(
        render_argv(&none, 1),
        Err(FlagError::Zero { field: "slots" })
    );
    let huge = LaunchSpec {
        ctx: Some(u32::MAX),
        ..spec(&[])
    };
    assert!(matches!(
        render_argv(&huge, 1),
        Err(FlagError::TooLarge { .. })
    ));
    assert!(matches!(
        render_argv(&spec(&["7"]), 1),
        Err(FlagError::StrayWord { .. })
    ));
}

proptest! {
    /// Whatever the user writes, what is ours is in the line exactly once, and nothing panics.
    #[test]
    fn ours_is_there_once(flags in proptest::collection::vec("[-a-z0-9= ]{0,12}", 0..6)) {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        if let Ok(argv) = render_argv(&spec(&flags), 4000) {
            for name in ["--port", "--host", "--model", "--parallel", "--metrics", "--ctx-size"] {
                prop_assert_eq!(argv.iter().filter(|word| *word == name).count(), 1);
            }
        }
    }
}
