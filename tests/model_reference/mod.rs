//! A model file, and the results of Hugging Face transformers on it, which the scripts
//! `tests/data/make_*_reference.py` record.

use std::path::PathBuf;

use kvlane::driver::{Decoder, ModelFile, Threads, Tokenizer};
use serde::Deserialize;

#[derive(Deserialize)]
pub struct Reference {
    vocabulary: Vec<usize>,
    pub prompts: Vec<Prompt>,
    pub tokenizer: Vec<Text>,
}

#[derive(Deserialize)]
pub struct Prompt {
    pub text: String,
    pub ids: Vec<u32>,
    pub greedy: Vec<u32>,
    pub positions: Vec<usize>,
    logits: Vec<Vec<f64>>,
    max: Vec<f64>,
    logsumexp: Vec<f64>,
}

#[derive(Deserialize)]
pub struct Text {
    pub text: String,
    pub ids: Vec<u32>,
}

impl Reference {
    pub fn read(json: &str) -> Self {
        serde_json::from_str(json).unwrap()
    }

    /// Compares the logits `row` with the `i`-th recorded position of a prompt; returns the largest difference.
    pub fn check_logits(&self, case: &Prompt, i: usize, row: &[f32], tolerance: f64) -> f64 {
        let max = row.iter().fold(f64::MIN, |m, &l| m.max(f64::from(l)));
        let sum: f64 = row.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        let picked = self.vocabulary.iter().map(|&v| f64::from(row[v])).zip(case.logits[i].iter().copied());
        let mut worst = 0.0f64;
        for (got, want) in picked.chain([(max, case.max[i]), (max + sum.ln(), case.logsumexp[i])]) {
            let error = (got - want).abs();
            worst = worst.max(error);
            assert!(error < tolerance, "{:?} at {}: {got} for {want}", case.text, case.positions[i]);
        }
        worst
    }
}

/// The model `file`, at the path in the environment variable or in `kvlane/` of the user's cache directory. If it does
/// not exist, prints a message, and fails if `KVLANE_REQUIRE_MODELS` is set. Loaded, it may take at most 1.3 times its file's
/// size. `exact` is [`Decoder::exact`].
pub fn open_model(variable: &str, file: &str, exact: bool) -> Option<(Decoder, Tokenizer)> {
    let path = model_path(variable, file)?;
    let threads = Threads::new(0).unwrap();
    let file = ModelFile::open(&path).unwrap();
    let weights = threads.run(|| file.weights(&|_, _| ())).unwrap();
    let size = std::fs::metadata(&path).unwrap().len() as usize;
    assert!(10 * weights.memory() <= 13 * size, "{} bytes for a file of {size}", weights.memory());
    let decoder = Decoder::new(file.config().clone(), weights, 0, None, threads).unwrap();
    Some((decoder.exact(exact), file.tokenizer().unwrap()))
}

fn model_path(variable: &str, file: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::home_dir().map(|h| h.join(".cache")));
    let candidates = [std::env::var_os(variable).map(PathBuf::from), cache.map(|c| c.join("kvlane").join(file))];
    let found = candidates.into_iter().flatten().find(|p| p.is_file());
    if found.is_none() {
        let required = std::env::var_os("KVLANE_REQUIRE_MODELS").is_some_and(|v| v != "0");
        assert!(!required, "{file} is required, but neither {variable} nor the cache directory has it");
        eprintln!("NOT RUN: {file} was not found; set {variable} to its path");
    }
    found
}
