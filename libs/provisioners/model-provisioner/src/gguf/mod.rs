//! What a GGUF file says about itself.
//!
//! A small, tolerant reader of the header. It takes the few facts that are
//! needed, steps over everything else, and checks that the tensors' data is
//! all there. Unknown file types and tensor types are no reason to refuse a
//! file: the engine decides that. A file is hostile until proven otherwise:
//! no count in it is believed, nothing is allocated from one, and every loop
//! ends with the file.

mod reader;
mod shape;
mod types;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use llama_orch_types::ModelShape;
use serde::{Deserialize, Serialize};

use reader::{HeaderReader, MAX_HEADER, Scalar};
use shape::ShapeNumbers;

/// Longest text that is kept, in bytes: chat templates can be long.
const MAX_TEXT: u64 = 1024 * 1024;

/// The format's alignment where the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;

/// ggml knows four dimensions; a few more are let through for later formats.
const MAX_DIMENSIONS: u32 = 8;

/// Facts from a header.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GgufFacts {
    pub architecture: Option<String>,
    /// The longest context the model was trained for, in tokens.
    pub ctx_max: Option<u32>,
    pub quantization: Option<String>,
    pub chat_template: Option<String>,
    /// Numbers in all tensors.
    pub parameter_count: Option<u64>,
    /// In how many files the model is split; 1 for a whole one.
    pub split_count: u64,
    /// What a model's memory depends on, where the file says it as its kind does.
    pub shape: Option<ModelShape>,
}

/// Why a file is not a usable GGUF file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("cannot read the file")]
    Read(#[source] io::Error),
    /// `start` is how the file begins, made readable.
    #[error("it does not begin with `GGUF` but with `{start}`")]
    NotGguf { start: String },
    #[error("its GGUF version is {0}; versions 2 and 3 are known")]
    Version(u32),
    #[error("it is a big-endian GGUF file, which this machine's engines do not read")]
    BigEndian,
    #[error("it ends in the middle of its header, after {size} bytes")]
    HeaderCut { size: u64 },
    #[error("it has {actual} bytes where its header asks for at least {needed}: it is truncated")]
    Truncated { needed: u64, actual: u64 },
    #[error("its header makes no sense: {0}")]
    Malformed(&'static str),
}

impl GgufError {
    /// The file is a part of a good one.
    pub fn is_truncated(&self) -> bool {
        matches!(self, Self::HeaderCut { .. } | Self::Truncated { .. })
    }
}

/// Reads a file's header and checks that the file is long enough for it.
pub fn read_file(path: &Path) -> Result<GgufFacts, GgufError> {
    let file = File::open(path).map_err(GgufError::Read)?;
    let size = file.metadata().map_err(GgufError::Read)?.len();
    read(BufReader::with_capacity(64 * 1024, file), size)
}

/// Reads a header from the start of `input`, which belongs to a file of
/// `size` bytes.
pub fn read(input: impl BufRead, size: u64) -> Result<GgufFacts, GgufError> {
    read_within(input, size, MAX_HEADER)
}

fn read_within(input: impl BufRead, size: u64, limit: u64) -> Result<GgufFacts, GgufError> {
    let mut reader = HeaderReader::new(input, size, limit);
    check_magic(&mut reader)?;
    let tensors = reader.u64()?;
    let pairs = reader.u64()?;
    let mut metadata = Metadata::default();
    for _ in 0..pairs {
        metadata.take_pair(&mut reader)?;
    }
    let tensors = Tensors::read(&mut reader, tensors)?;
    let alignment = metadata.alignment()?;
    tensors.check_extent(reader.position(), alignment, size)?;
    Ok(metadata.into_facts(&tensors))
}

fn check_magic(reader: &mut HeaderReader<impl BufRead>) -> Result<(), GgufError> {
    let magic = reader.start()?;
    if &magic != b"GGUF" {
        let start = magic
            .iter()
            .flat_map(|&byte| std::ascii::escape_default(byte))
            .map(char::from)
            .collect();
        return Err(GgufError::NotGguf { start });
    }
    match reader.u32()? {
        2 | 3 => Ok(()),
        version if version.swap_bytes() <= 3 && version > 3 => Err(GgufError::BigEndian),
        version => Err(GgufError::Version(version)),
    }
}

/// The key-value pairs that matter.
#[derive(Debug, Default)]
struct Metadata {
    architecture: Option<String>,
    chat_template: Option<String>,
    file_type: Option<u64>,
    alignment: Option<u64>,
    split_count: Option<u64>,
    /// By architecture, as in `llama.context_length`. Only files of several
    /// architectures hold more than one, and hostile files are capped.
    context_lengths: BTreeMap<String, u64>,
    shapes: ShapeNumbers,
}

impl Metadata {
    fn take_pair(&mut self, reader: &mut HeaderReader<impl BufRead>) -> Result<(), GgufError> {
        let key = reader.key()?;
        let value = reader.value(MAX_TEXT)?;
        match (key.as_str(), value) {
            ("general.architecture", Scalar::Text(text)) => {
                // It is shown on terminals.
                self.architecture = Some(text).filter(|text| is_word(text));
            }
            ("tokenizer.chat_template", Scalar::Text(text)) => self.chat_template = Some(text),
            ("general.file_type", Scalar::Unsigned(number)) => self.file_type = Some(number),
            ("general.alignment", Scalar::Unsigned(number)) => self.alignment = Some(number),
            ("split.count", Scalar::Unsigned(number)) => self.split_count = Some(number),
            (key, Scalar::Unsigned(number)) => {
                if let Some(architecture) = key.strip_suffix(".context_length")
                    && self.context_lengths.len() < 16
                {
                    self.context_lengths.insert(architecture.to_owned(), number);
                }
                self.shapes.take(key, number);
            }
            _ => {}
        }
        Ok(())
    }

    fn alignment(&self) -> Result<u64, GgufError> {
        match self.alignment {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 30 => Ok(alignment),
            Some(_) => Err(GgufError::Malformed("its alignment is no power of two")),
        }
    }

    fn into_facts(self, tensors: &Tensors) -> GgufFacts {
        let context = self
            .architecture
            .as_ref()
            .and_then(|architecture| self.context_lengths.get(architecture));
        let quantization = self
            .file_type
            .and_then(|number| u32::try_from(number).ok())
            .and_then(types::file_type_name)
            .or(tensors.main_type());
        let shape = self.architecture.as_deref();
        let shape = shape.and_then(|name| self.shapes.shape(name, tensors.embedded));
        GgufFacts {
            shape,
            ctx_max: context.and_then(|&context| u32::try_from(context).ok()),
            quantization: quantization.map(str::to_owned),
            parameter_count: (tensors.parameters > 0).then_some(tensors.parameters),
            architecture: self.architecture,
            chat_template: self.chat_template,
            split_count: self.split_count.unwrap_or(1).max(1),
        }
    }
}

/// Whether it can be an architecture's name; a hostile file may hold anything.
fn is_word(text: &str) -> bool {
    text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Sums over the tensors.
#[derive(Debug, Default)]
struct Tensors {
    parameters: u64,
    /// The furthest byte of tensor data, counted from where data begins.
    extent: u64,
    /// Numbers in the table of the vocabulary's embeddings.
    embedded: u64,
    /// Bytes by known tensor type.
    bytes_by_type: BTreeMap<&'static str, u64>,
}

impl Tensors {
    fn read(reader: &mut HeaderReader<impl BufRead>, count: u64) -> Result<Self, GgufError> {
        let mut tensors = Self::default();
        for _ in 0..count {
            let name = reader.key()?;
            let dimensions = reader.u32()?;
            if dimensions > MAX_DIMENSIONS {
                return Err(GgufError::Malformed(
                    "a tensor has more dimensions than there are",
                ));
            }
            let mut elements = 1u64;
            for _ in 0..dimensions {
                elements = elements
                    .checked_mul(reader.u64()?)
                    .ok_or(GgufError::Malformed("a tensor is larger than any file"))?;
            }
            let number = reader.u32()?;
            let offset = reader.u64()?;
            if name == "token_embd.weight" {
                tensors.embedded = elements;
            }
            tensors.add(elements, number, offset)?;
        }
        Ok(tensors)
    }

    fn add(&mut self, elements: u64, number: u32, offset: u64) -> Result<(), GgufError> {
        const TOO_LARGE: GgufError = GgufError::Malformed("a tensor ends beyond any file");
        self.parameters = self.parameters.saturating_add(elements);
        // A tensor of unknown type begins at its offset; no more is known.
        let bytes = match types::tensor_type(number) {
            Some(known) => {
                let bytes = elements
                    .div_ceil(known.block)
                    .checked_mul(known.bytes)
                    .ok_or(TOO_LARGE)?;
                let sum = self.bytes_by_type.entry(known.name).or_default();
                *sum = sum.saturating_add(bytes);
                bytes
            }
            None => 0,
        };
        let end = offset.checked_add(bytes).ok_or(TOO_LARGE)?;
        self.extent = self.extent.max(end);
        Ok(())
    }

    /// The type that takes most bytes.
    fn main_type(&self) -> Option<&'static str> {
        self.bytes_by_type
            .iter()
            .max_by_key(|(_, bytes)| **bytes)
            .map(|(name, _)| *name)
    }

    fn check_extent(&self, header_end: u64, alignment: u64, size: u64) -> Result<(), GgufError> {
        let needed = header_end
            .checked_next_multiple_of(alignment)
            .and_then(|start| start.checked_add(self.extent))
            .ok_or(GgufError::Malformed("its tensors end beyond any file"))?;
        if self.extent > 0 && needed > size {
            return Err(GgufError::Truncated {
                needed,
                actual: size,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
