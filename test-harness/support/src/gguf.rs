//! The smallest model file that is one.

/// A GGUF without weights: an architecture and a context length of 4096.
pub fn tiny_gguf() -> Vec<u8> {
    const STRING: u32 = 8;
    const UINT32: u32 = 4;
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(STRING.to_le_bytes());
    text(&mut out, "llama");
    text(&mut out, "llama.context_length");
    out.extend(UINT32.to_le_bytes());
    out.extend(4096u32.to_le_bytes());
    out
}
