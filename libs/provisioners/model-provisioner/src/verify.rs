//! The seam for signatures.
//!
//! A digest says that the bytes are the expected ones; a signature says who
//! vouches for them. Nothing here knows any signature scheme. Whoever wants
//! one (sigstore, minisign, an in-house key) implements [`SignatureVerifier`]
//! and gives it to `ModelProvisioner::with_signature_verifier`. It is asked
//! once for each file, after its digest is known and before it gets its final
//! name; a refusal leaves nothing behind. It is asked again when a file had
//! to be hashed again.

use std::fmt::Debug;
use std::path::Path;

use llama_orch_types::Digest;

/// The file that somebody should vouch for.
#[derive(Debug, Clone, Copy)]
pub struct SignedModel<'a> {
    /// What the user asked for.
    pub id: &'a str,
    /// The reference that served the file.
    pub source: &'a str,
    /// The complete file, not yet under its final name.
    pub path: &'a Path,
    pub digest: Digest,
    pub size_bytes: u64,
}

/// The verifier does not vouch for a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct SignatureRejected {
    /// For people: "no signature by the release key".
    pub reason: String,
}

/// Decides whether a model may be used. Called on a thread that may block.
pub trait SignatureVerifier: Debug + Send + Sync {
    fn verify(&self, model: SignedModel<'_>) -> Result<(), SignatureRejected>;
}
