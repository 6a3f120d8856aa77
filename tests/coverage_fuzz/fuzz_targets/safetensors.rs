//! A directory in the Hugging Face layout with one hostile file. The first byte of the input selects the file, the
//! rest is its contents. The other files are valid.
#![no_main]

use kvlane::driver::{ModelFile, Result};
use libfuzzer_sys::fuzz_target;
use std::path::{Path, PathBuf};

/// The files that the first byte selects from, with their valid contents.
const FILES: [(&str, Option<&[u8]>); 5] = [
    ("model.safetensors", Some(include_bytes!("../../data/seeds/safetensors/tensors"))),
    ("config.json", Some(include_bytes!("../../data/seeds/safetensors/config"))),
    ("model.safetensors.index.json", None),
    ("generation_config.json", None),
    ("tokenizer_config.json", None),
];

/// A directory of this process, in memory if the system has one.
fn directory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    parent.join(format!("kvlane-fuzz-{}", std::process::id()))
}

fn read(directory: &Path) -> Result<()> {
    let file = ModelFile::open(directory)?;
    let tensors = file.tensors().map(drop);
    let weights = file.weights(&|_, _| ()).map(drop);
    tensors.and(weights)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, contents)) = bytes.split_first() else { return };
    let directory = directory();
    std::fs::create_dir_all(&directory).expect("the directory can be made");
    let chosen = usize::from(choice) % FILES.len();
    for (i, (name, sound)) in FILES.iter().enumerate() {
        let contents = if i == chosen { Some(contents) } else { sound.map(|input| &input[1..]) };
        if let Some(contents) = contents {
            std::fs::write(directory.join(name), contents).expect("the file can be written");
        }
    }
    let _ = read(&directory);
    std::fs::remove_dir_all(&directory).expect("the directory can be removed");
});
