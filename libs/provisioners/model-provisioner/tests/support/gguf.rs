//! Writes small GGUF files for tests.

// Each test program uses a part of it.
#![allow(dead_code, unreachable_pub)]

/// A GGUF file in the making.
#[derive(Debug, Clone)]
pub struct Gguf {
    pub version: u32,
    pub pairs: Vec<(String, Vec<u8>)>,
    /// Name, dimensions, type, bytes of data.
    pub tensors: Vec<(String, Vec<u64>, u32, u64)>,
}

impl Gguf {
    /// A valid file that says what a small llama says.
    pub fn tiny() -> Self {
        let mut file = Self {
            version: 3,
            pairs: Vec::new(),
            tensors: Vec::new(),
        };
        file.pair("general.architecture", text("llama"));
        file.pair("llama.context_length", number(8192));
        file.pair("general.file_type", number(3));
        file.pair("tokenizer.ggml.tokens", texts(&["<s>", "hello", "world"]));
        file.pair("tokenizer.ggml.scores", floats(3));
        file.pair("tokenizer.chat_template", text("{{ messages }}"));
        file.pair("general.quantized_on_the_moon", boolean(true));
        // Q4_1: 32 numbers in 20 bytes; F32: 4 bytes each.
        file.tensor("token_embd.weight", &[64, 3], 3, 120);
        file.tensor("output_norm.weight", &[64], 0, 256);
        file
    }

    pub fn pair(&mut self, key: &str, value: Vec<u8>) {
        self.pairs.push((key.to_owned(), value));
    }

    pub fn tensor(&mut self, name: &str, dimensions: &[u64], kind: u32, bytes: u64) {
        self.tensors
            .push((name.to_owned(), dimensions.to_vec(), kind, bytes));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            out.extend(raw_text(key));
            out.extend(value);
        }
        let mut offset = 0u64;
        for (name, dimensions, kind, bytes) in &self.tensors {
            out.extend(raw_text(name));
            out.extend((dimensions.len() as u32).to_le_bytes());
            for dimension in dimensions {
                out.extend(dimension.to_le_bytes());
            }
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + bytes).next_multiple_of(32);
        }
        if let Some((_, _, _, last)) = self.tensors.last() {
            out.resize(out.len().next_multiple_of(32), 0);
            let data: u64 = self.tensors[..self.tensors.len() - 1]
                .iter()
                .map(|(_, _, _, bytes)| bytes.next_multiple_of(32))
                .sum();
            out.resize(out.len() + (data + last) as usize, 0x5a);
        }
        out
    }
}

fn raw_text(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

fn typed(kind: u32, value: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend(value);
    out
}

pub fn text(value: &str) -> Vec<u8> {
    typed(8, raw_text(value))
}

pub fn number(value: u32) -> Vec<u8> {
    typed(4, value.to_le_bytes())
}

pub fn boolean(value: bool) -> Vec<u8> {
    typed(7, [u8::from(value)])
}

pub fn texts(values: &[&str]) -> Vec<u8> {
    let mut out = array_head(8, values.len());
    out.extend(values.iter().flat_map(|value| raw_text(value)));
    out
}

pub fn floats(count: usize) -> Vec<u8> {
    let mut out = array_head(6, count);
    out.extend((0..count).flat_map(|_| 1f32.to_le_bytes()));
    out
}

pub fn array_head(kind: u32, count: usize) -> Vec<u8> {
    let mut out = typed(9, kind.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
    out
}
