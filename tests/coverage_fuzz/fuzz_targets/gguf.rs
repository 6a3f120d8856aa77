//! A GGUF file from a stranger, read as the driver reads it: metadata, tensors, tokenizer, weights. Every answer is a value or an
//! error; libFuzzer's limits on memory and time bound what a small file may cost.
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
    // The parts do not depend on each other, so an error in one of them does not hide the others.
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
