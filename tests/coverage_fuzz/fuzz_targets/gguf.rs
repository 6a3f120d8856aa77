//! A hostile GGUF file, read as the driver reads it: metadata, tensors, tokenizer, weights. Every result is a value or
//! an error; libFuzzer's limits bound the memory and time of a small file.
#![no_main]

use kvlane::driver::gguf::Gguf;
use kvlane::driver::{ModelFile, Result};
use libfuzzer_sys::fuzz_target;

fn read(bytes: &[u8]) -> Result<()> {
    let gguf = Gguf::from_bytes(bytes.to_vec())?;
    for tensor in gguf.tensors() {
        assert!(tensor.data.len() <= bytes.len());
    }
    let file = ModelFile::from_gguf(gguf)?;
    // Each part is read even if another fails, because they do not depend on each other.
    let tensors = file.tensors().map(drop);
    let weights = file.weights(&|_, _| ()).map(drop);
    let tokenizer = file.tokenizer()?;
    let ids = tokenizer.encode("abc ab </s> \u{20ac} 12", true)?;
    tokenizer.decode(&ids)?;
    tensors.and(weights)
}

fuzz_target!(|bytes: &[u8]| {
    let _ = read(bytes);
});
