//! A tiny source archive that builds into something that knows its version.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use provision_kit::fs::sha256_bytes;
use provisioners_engine_provisioner::{ArchiveSource, EngineConfig, Mode, Source};

use super::Machine;

/// A machine whose build tools are shared among the tests: where PATH has none they come from PyPI,
/// and once is enough.
pub(crate) fn machine() -> Machine {
    let machine = Machine::new();
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build-tools");
    std::fs::create_dir_all(machine.cache.root()).unwrap();
    for name in ["tools", "locks"] {
        std::fs::create_dir_all(shared.join(name)).unwrap();
        symlink(shared.join(name), machine.cache.root().join(name)).unwrap();
    }
    machine
}

/// A source whose build first appends a line to `counted`, then waits while `gate` is there, then
/// compiles one file.
pub(crate) struct FakeSource {
    pub(crate) directory: PathBuf,
    pub(crate) program: String,
}

impl FakeSource {
    pub(crate) fn new(machine: &Machine) -> Self {
        Self {
            directory: machine.path().to_owned(),
            program: r#"
                #include <cstdio>
                int main() { std::printf("version: 0.1.0 (build %d, commit fake)\n", BUILD); }
            "#
            .into(),
        }
    }

    pub(crate) fn counted(&self) -> usize {
        let text = std::fs::read_to_string(self.directory.join("counted")).unwrap_or_default();
        text.lines().count()
    }

    pub(crate) fn gate(&self) -> PathBuf {
        self.directory.join("gate")
    }

    pub(crate) fn cmake(&self) -> String {
        format!(
            r"
            cmake_minimum_required(VERSION 3.14)
            project(fake CXX)
            add_custom_command(OUTPUT first.h COMMAND echo once >> {counted} COMMAND touch first.h)
            add_custom_command(OUTPUT second.h DEPENDS first.h
                COMMAND sh ${{CMAKE_SOURCE_DIR}}/wait.sh {gate} COMMAND touch second.h)
            add_executable(llama-server server.cpp second.h)
            target_compile_definitions(llama-server PRIVATE BUILD=${{LLAMA_BUILD_NUMBER}})
            set_target_properties(llama-server PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
            ",
            counted = self.directory.join("counted").display(),
            gate = self.gate().display(),
        )
    }

    /// Packs the source and returns a config that builds it.
    pub(crate) fn config(&self) -> EngineConfig {
        let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gzip);
        for (name, text) in [
            ("CMakeLists.txt", self.cmake().as_str()),
            ("server.cpp", &self.program),
            ("wait.sh", "while test -e \"$1\"; do sleep 0.05; done"),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(1_700_000_000);
            let path = format!("package-1/engine/{name}");
            tar.append_data(&mut header, path, text.as_bytes()).unwrap();
        }
        let bytes = tar.into_inner().unwrap().finish().unwrap();
        let archive = self.directory.join("source.tar.gz");
        std::fs::write(&archive, &bytes).unwrap();
        let mut config = EngineConfig {
            mode: Some(Mode::Source),
            version: "b7".into(),
            ..EngineConfig::default()
        };
        config.source.sources = vec![Source::Archive(ArchiveSource {
            url: format!("file:{}", archive.display()),
            digest: sha256_bytes(&bytes),
        })];
        config
    }
}

pub(crate) fn entries(path: PathBuf, prefix: &str) -> usize {
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .count()
}
