//! The store over time: reuse, damage, several at once, eviction.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use llama_orch_types::Hinted;
use provision_kit::fs::sha256_bytes;
use provisioners_model_provisioner::ModelError;
use provisioners_model_provisioner::provenance::How;

use crate::bench::{Behaviour, Bench, Server, model};
use crate::gguf::{Gguf, text};

#[tokio::test]
async fn a_verified_file_is_not_read_again_while_it_stands() {
    let (bytes, _) = model();
    let (address, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let reference = format!("{address}/m.gguf");
    let model = bench.ensure(&reference).await.unwrap();
    // Other bytes of the same size, time and inode: only hashing would tell.
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
    assert_eq!(bench.ensure(&reference).await.unwrap().digest, model.digest);
    // Once its time tells of a change, it is hashed and refused.
    file.set_modified(SystemTime::now() + Duration::from_secs(5))
        .unwrap();
    let error = bench.ensure(&reference).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Changed { expected, actual, .. }
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
