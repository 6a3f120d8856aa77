//! A hostile `tokenizer.json`: read, then used on text, as a whole and as a stream.
#![no_main]

use kvlane::driver::{Result, Tokenizer};
use libfuzzer_sys::fuzz_target;

const TEXTS: [&str; 3] = ["abc ab <s>", "\u{20ac}\u{e9}a\u{301} \u{1f600}\n\n 123,456", ""];

fn read(bytes: &[u8]) -> Result<()> {
    let tokenizer = Tokenizer::from_json(bytes)?;
    for text in TEXTS {
        for special in [false, true] {
            let ids = tokenizer.encode(text, special)?;
            tokenizer.decode(&ids)?;
            let mut stream = tokenizer.stream();
            for &id in ids.iter().chain(&[0, u32::MAX]) {
                stream.push(id)?;
            }
            stream.finish()?;
        }
    }
    Ok(())
}

fuzz_target!(
    // The library turns panics into errors. Without libFuzzer's hook, only a panic that leaves the library is a crash.
    init: std::panic::set_hook(Box::new(|_| ())),
    |bytes: &[u8]| {
        let _ = read(bytes);
    }
);
