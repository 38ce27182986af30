//! The store over time: reuse, damage, several at once, eviction.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use llama_orch_types::Hinted;
use provision_kit::fs::sha256_bytes;
use provisioners_model_provisioner::ModelError;
use provisioners_model_provisioner::provenance::How;
use provisioners_model_provisioner::store::{FileStamp, Place, Store};
use provisioners_model_provisioner::verify::{SignatureRejected, SignatureVerifier, SignedModel};

use crate::bench::{Behaviour, Bench, Server, model};
use crate::gguf::{Gguf, text};

#[tokio::test]
async fn a_verified_file_is_not_read_again_while_it_stands() {
    let (bytes, _) = model();
    let script = [Behaviour::Honest, Behaviour::Status(404)];
    let (address, _) = Server::start(&bytes, &script).await;
    let bench = Bench::new();
    let reference = format!("{address}/m.gguf");
    let model = bench.ensure(&reference).await.unwrap();
    // Other bytes of the same size, time and inode, and a record that knows
    // the new ctime, which nobody can set: only hashing would tell.
    let before = std::fs::metadata(&model.path).unwrap();
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&model.path)
        .unwrap();
    std::io::Write::write_all(&mut &file, &other).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    assert_eq!(std::fs::metadata(&model.path).unwrap().ino(), before.ino());
    let store = Store::new(bench.cache().models(), &bench.cache().locks());
    let mut record = store.record(Place::Stored(model.digest)).unwrap();
    record.stamp = FileStamp::of(&model.path).unwrap();
    store.save(record).unwrap();
    assert_eq!(bench.ensure(&reference).await.unwrap().digest, model.digest);
    // Once its ctime tells of a change, it is hashed; without a source, refused.
    file.set_modified(before.modified().unwrap()).unwrap();
    let error = bench.ensure(&reference).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Changed { expected, actual, repair: Some(_), .. }
            if *expected == model.digest && *actual == sha256_bytes(&other)),
        "{error}"
    );
    assert!(
        error
            .hint()
            .unwrap()
            .contains(&model.path.display().to_string())
    );
}

/// Writes other bytes of the same length to each file that it is asked about,
/// which is after the file was hashed.
#[derive(Debug)]
struct Meddler;

impl SignatureVerifier for Meddler {
    fn verify(&self, model: SignedModel<'_>) -> Result<(), SignatureRejected> {
        flip_last_bit(model.path);
        Ok(())
    }
}

fn flip_last_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_verified_is_not_taken() {
    let (bytes, digest) = model();
    let bench = Bench::new();
    let path = bench.write("own.gguf", &bytes);
    let local = path.display().to_string();
    let (address, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    for reference in [&local, &format!("{address}/m.gguf")] {
        let provisioner = bench
            .provisioner()
            .with_signature_verifier(Arc::new(Meddler));
        let error = provisioner.ensure(reference).await.unwrap_err();
        assert!(
            matches!(error, ModelError::ChangedMeanwhile { .. }),
            "{error}"
        );
        assert!(error.retriable() && error.hint().is_some());
        assert!(bench.provisioner().list().await.unwrap().is_empty());
        assert!(bench.stored().is_empty() && bench.downloads().is_empty());
    }
    // Once it stands still it is taken as it is now.
    flip_last_bit(&path);
    assert_eq!(bench.ensure(&local).await.unwrap().digest, digest);
}

#[tokio::test]
async fn a_record_that_cannot_be_written_is_no_reason_to_refuse() {
    let (bytes, digest) = model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
    bench.ensure("tiny").await.unwrap();
    let lines = bench.provenance().len();
    // Nobody can lock a directory, and nobody can write below a file.
    let lock = bench.cache().locks().join("model-records.lock");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(&lock).unwrap();
    let provenance = bench.dir.path().join("runtime/provenance");
    std::fs::rename(&provenance, bench.dir.path().join("aside")).unwrap();
    std::fs::write(&provenance, "").unwrap();
    let model = bench.ensure("tiny").await.unwrap();
    assert_eq!(model.digest, digest);
    assert_eq!(server.gets(), 1);
    assert!(
        bench
            .recorder
            .notes()
            .iter()
            .any(|note| note.contains("no record"))
    );
    // A file that must be hashed again, and one that is fetched, too.
    let file = std::fs::File::options()
        .write(true)
        .open(&model.path)
        .unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
    std::fs::remove_file(&model.path).unwrap();
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
    assert_eq!(server.gets(), 2);
    // With the way free again, records go on.
    std::fs::remove_dir(&lock).unwrap();
    std::fs::remove_file(&provenance).unwrap();
    std::fs::rename(bench.dir.path().join("aside"), &provenance).unwrap();
    bench.ensure("tiny").await.unwrap();
    assert_eq!(bench.provenance().len(), lines + 1);
}

#[tokio::test]
async fn a_touched_file_is_hashed_and_good_again() {
    let (bytes, digest) = model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let reference = format!("{address}/m.gguf");
    let model = bench.ensure(&reference).await.unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(&model.path)
        .unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(bench.ensure(&reference).await.unwrap().digest, digest);
    assert_eq!(server.gets(), 1);
}

#[tokio::test]
async fn a_file_without_its_record_is_found_by_its_name() {
    let (bytes, digest) = model();
    let mut bench = Bench::new();
    bench.profile(digest, None, &["/no/such/m.gguf"]);
    std::fs::create_dir_all(bench.cache().models().join("sha256")).unwrap();
    std::fs::write(
        bench.cache().models().join("sha256").join(digest.hex()),
        &bytes,
    )
    .unwrap();
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
    assert_eq!(bench.provenance()[0].how, How::Cached);
}

#[tokio::test]
async fn of_two_who_want_the_same_one_fetches() {
    let (bytes, digest) = model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
    let (one, other) = (bench.provisioner(), bench.provisioner());
    let (one, other) = tokio::join!(one.ensure("tiny"), other.ensure("tiny"));
    assert_eq!(one.unwrap(), other.unwrap());
    assert_eq!(server.gets(), 1);
    let mut how: Vec<_> = bench
        .provenance()
        .into_iter()
        .map(|line| line.how)
        .collect();
    how.sort_by_key(|how| format!("{how:?}"));
    assert_eq!(how, [How::Cached, How::Fetched]);
    assert!(
        bench
            .recorder
            .notes()
            .iter()
            .any(|note| note.contains("waiting"))
    );
}

/// Three models of one size, fetched in order.
async fn three(bench: &Bench) -> Vec<String> {
    let mut references = Vec::new();
    for name in ["a", "b", "c"] {
        let mut file = Gguf::tiny();
        file.pair("general.name", text(name));
        let (address, _) = Server::start(&file.bytes(), &[Behaviour::Honest]).await;
        let reference = format!("{address}/{name}.gguf");
        bench.ensure(&reference).await.unwrap();
        references.push(reference);
    }
    references
}

#[tokio::test]
async fn eviction_shows_first_and_spares_what_is_in_use() {
    let mut bench = Bench::new();
    let references = three(&bench).await;
    let size = bench.provisioner().list().await.unwrap()[0]
        .stamp
        .size_bytes;
    bench.config.max_cache_bytes = Some(size);
    let user = bench.provisioner();
    let used = user.ensure(&references[0]).await.unwrap();

    let other = bench.provisioner();
    let plan = other.plan_eviction().await.unwrap();
    assert_eq!(plan.bytes_before, 3 * size);
    assert_eq!(plan.remove.len(), 2);
    assert_eq!(plan.remove[0].names, [references[1].clone()]);
    assert_eq!(bench.stored().len(), 3);

    assert_eq!(other.evict().await.unwrap(), plan);
    assert_eq!(bench.stored(), std::slice::from_ref(&used.path));
    // Over the limit, but in use.
    bench.config.max_cache_bytes = Some(0);
    let plan = bench.provisioner().evict().await.unwrap();
    assert!(plan.remove.is_empty());
    assert_eq!(plan.bytes_over_limit, size);
    drop(user);
    assert_eq!(bench.provisioner().evict().await.unwrap().remove.len(), 1);
    assert!(bench.stored().is_empty());
    let records = bench.cache().models().join("records");
    assert_eq!(std::fs::read_dir(records).unwrap().count(), 0);
}

#[tokio::test]
async fn a_fetch_keeps_the_store_under_its_limit() {
    let mut bench = Bench::new();
    bench.config.max_cache_bytes = Some(2 * Gguf::tiny().bytes().len() as u64 + 200);
    let references = three(&bench).await;
    let listed = bench.provisioner().list().await.unwrap();
    let left: Vec<_> = listed.iter().map(|record| record.source.clone()).collect();
    assert_eq!(left, [references[2].clone(), references[1].clone()]);
    assert!(
        bench
            .recorder
            .notes()
            .iter()
            .any(|note| note.contains(&references[0]))
    );
}
