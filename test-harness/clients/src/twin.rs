//! A second model that answers differently, made from the first.
//!
//! It is the first one's file with another name in its header and with one
//! small tensor changed: the scale of the last layer's output. So it is a whole
//! model of the same size, with a digest and with answers of its own, and no
//! second download is needed.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use provision_kit::lock::FileLock;
use test_harness_e2e_haiku::engine::sha256;

use crate::environment::directory;

/// What comes out of the model `haiku`, and what it is called then.
const TWIN_DIGEST: &str = "sha256:072c9f43cdfff7e335dce781f97bf3d72b9a989b4008788d960fe631abe0ad40";
const NAME: &[u8] = b"twin";
const TENSOR: &str = "output_norm.weight";

const LOCK_LIMIT: Duration = Duration::from_mins(2);

/// A GGUF file that is not as this module expects it.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// The twin of the model at `first`, from the cache if it is there already.
/// Returns its path and its digest.
pub async fn of(first: &Path) -> (PathBuf, String) {
    let place = directory().join("twin.gguf");
    let _lock = FileLock::acquire(&place.with_extension("lock"), LOCK_LIMIT, |_| {})
        .await
        .expect("the twin can be locked");
    if !sha256(&place).is_ok_and(|digest| digest == TWIN_DIGEST) {
        let mut bytes = fs::read(first).expect("the first model can be read");
        change(&mut bytes).expect("the first model is a GGUF file with the tensor and a name");
        let staged = tempfile::NamedTempFile::new_in(directory()).expect("the cache is writable");
        fs::write(staged.path(), &bytes).expect("the twin can be written");
        staged.persist(&place).expect("the twin can be named");
    }
    let digest = sha256(&place).expect("the twin can be read");
    assert_eq!(
        digest, TWIN_DIGEST,
        "another model than expected was the twin's base"
    );
    (place, digest)
}

/// Changes a model's name and one of its tensors in place.
pub fn change(bytes: &mut [u8]) -> Result<(), Malformed> {
    let found = find(bytes)?;
    // The same length, so that nothing moves.
    let name = &mut bytes[found.name];
    if name.len() < NAME.len() {
        return Err(Malformed("the name is too short"));
    }
    name[..NAME.len()].copy_from_slice(NAME);
    for (index, value) in bytes[found.tensor].chunks_exact_mut(4).enumerate() {
        let old = f32::from_le_bytes([value[0], value[1], value[2], value[3]]);
        // Enough for other words, little enough for words.
        let factor = if index % 2 == 0 { 1.4 } else { 0.7 };
        value.copy_from_slice(&(old * factor).to_le_bytes());
    }
    Ok(())
}

/// Where in the file what is changed lies.
#[derive(Debug)]
struct Found {
    name: Range<usize>,
    tensor: Range<usize>,
}

fn find(bytes: &[u8]) -> Result<Found, Malformed> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4)? != b"GGUF" || cursor.u32()? < 2 {
        return Err(Malformed("no GGUF file of version 2 or later"));
    }
    let (tensors, keys) = (cursor.u64()?, cursor.u64()?);
    let mut name = None;
    let mut alignment = 32;
    for _ in 0..keys {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind)?;
        match (&bytes[key], kind) {
            (b"general.name", TEXT) => name = Some(value.start + 8..value.end),
            (b"general.alignment", 4) => alignment = cursor.at(value.start).u32()? as usize,
            _ => {}
        }
    }
    let mut tensor = None;
    for _ in 0..tensors {
        let called = cursor.text()?;
        let mut elements = 1;
        for _ in 0..cursor.u32()? {
            elements *= cursor.length()?;
        }
        let kind = cursor.u32()?;
        let offset = cursor.length()?;
        if &bytes[called] == TENSOR.as_bytes() {
            if kind != 0 {
                return Err(Malformed("the tensor is not of 32-bit floats"));
            }
            tensor = Some((offset, elements * 4));
        }
    }
    let data = cursor.at.next_multiple_of(alignment);
    let (offset, length) = tensor.ok_or(Malformed("the tensor is missing"))?;
    let tensor = data + offset..data + offset + length;
    if tensor.end > bytes.len() {
        return Err(Malformed("the tensor is not in the file"));
    }
    let name = name.ok_or(Malformed("the model has no name"))?;
    Ok(Found { name, tensor })
}

const TEXT: u32 = 8;
const LIST: u32 = 9;

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn at(&self, at: usize) -> Self {
        Self {
            bytes: self.bytes,
            at,
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(count);
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or(Malformed("the file ends too early"))?;
        self.at += count;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        let (low, high) = (self.u32()?, self.u32()?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn length(&mut self) -> Result<usize, Malformed> {
        usize::try_from(self.u64()?).map_err(|_| Malformed("a length is too large"))
    }

    /// Where a text lies, without its length.
    fn text(&mut self) -> Result<Range<usize>, Malformed> {
        let length = self.length()?;
        let start = self.at;
        self.take(length)?;
        Ok(start..self.at)
    }

    /// Where a value of a kind lies.
    fn value(&mut self, kind: u32) -> Result<Range<usize>, Malformed> {
        let start = self.at;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            TEXT => self.length()?,
            LIST => {
                let kind = self.u32()?;
                if kind == LIST {
                    return Err(Malformed("a list of lists"));
                }
                for _ in 0..self.u64()? {
                    self.value(kind)?;
                }
                0
            }
            _ => return Err(Malformed("an unknown kind of value")),
        };
        self.take(width)?;
        Ok(start..self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }

    /// A file with a name, a list to be stepped over, and two tensors.
    fn small(kind: u32) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(2_u64.to_le_bytes());
        text(&mut bytes, "words");
        bytes.extend(LIST.to_le_bytes());
        bytes.extend(TEXT.to_le_bytes());
        bytes.extend(1_u64.to_le_bytes());
        text(&mut bytes, "word");
        text(&mut bytes, "general.name");
        bytes.extend(TEXT.to_le_bytes());
        text(&mut bytes, "first");
        for (name, offset) in [("other", 0_u64), (TENSOR, 32)] {
            text(&mut bytes, name);
            bytes.extend(1_u32.to_le_bytes());
            bytes.extend(2_u64.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(32) + 32, 0);
        bytes.extend(1.0_f32.to_le_bytes());
        bytes.extend(1.0_f32.to_le_bytes());
        bytes
    }

    #[test]
    fn only_name_and_tensor_change() {
        let before = small(0);
        let mut after = before.clone();
        change(&mut after).unwrap();
        assert_eq!(after.len(), before.len());
        let name = before.windows(5).position(|five| five == b"first").unwrap();
        assert_eq!(&after[name..name + 5], b"twint");
        let end = before.len() - 8;
        assert_eq!(after[end..end + 4], 1.4_f32.to_le_bytes());
        assert_eq!(after[end + 4..], 0.7_f32.to_le_bytes());
        let changed = (0..end).filter(|&at| before[at] != after[at]);
        assert!(changed.into_iter().all(|at| (name..name + 4).contains(&at)));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let whole = small(0);
        for length in 0..whole.len() {
            assert!(change(&mut whole[..length].to_vec()).is_err(), "{length}");
        }
        let mut coarse = small(3);
        let refused = Malformed("the tensor is not of 32-bit floats");
        assert_eq!(change(&mut coarse), Err(refused));
    }
}
