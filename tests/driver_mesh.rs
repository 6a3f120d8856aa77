//! A decoder on a mesh of processes computes what one process computes. The processes are threads here;
//! `tests/driver_mpi.rs` has real ones.
#![cfg(feature = "driver")]

mod mesh_threads;

use std::path::Path;

use kvlane::driver::mesh::{MeshAxis, MeshPart};
use kvlane::driver::{
    Cache, Decoder, Event, Formats, Logits, ModelConfig, ModelFile, Overlong, Request, SamplerOptions, Scheduler,
    Scratch, Threads, embedded,
};
use kvlane::{CacheFormat, DType, Mesh, SPLIT_GRID};
use mesh_threads::{parts, run};

fn grok() -> ModelFile {
    ModelFile::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/grok.gguf"))).unwrap()
}

fn whole(file: &ModelFile) -> Decoder {
    let weights = file.weights(&|_, _| ()).unwrap();
    Decoder::new(file.config().clone(), weights, 0, None, Threads::new(1).unwrap()).unwrap()
}

fn tokens(n: usize, vocab: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i * 31 + 7 * i) % vocab as u32).collect()
}

/// The logits of two rows, one of which crosses the grid: a prompt in two passes, then one token of each at a time.
fn logits(decoder: &Decoder, formats: impl Into<Formats>, long: usize) -> Vec<f32> {
    let vocab = decoder.config().vocab;
    let mut cache = decoder.cache(3, 2 * SPLIT_GRID, formats).unwrap();
    let (ids, mut scratch) = (tokens(long + 5, vocab), Scratch::default());
    let rows = [(2, &ids[..long]), (0, &ids[3..40])];
    let mut all = decoder.forward_rows(&mut cache, &mut scratch, &rows, Logits::Last).unwrap();
    for t in 0..3 {
        let rows = [(0, &ids[40 + t..41 + t]), (2, &ids[long + t..long + t + 1])];
        all.extend(decoder.forward_rows(&mut cache, &mut scratch, &rows, Logits::All).unwrap());
    }
    all
}

fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let differ = got.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differ, None, "{what}: the first logit that differs");
}

#[test]
fn logits_have_the_bits_of_one_process() {
    let file = embedded::open().unwrap();
    let long = SPLIT_GRID + 77;
    let want = logits(&whole(&file), DType::F32, long);
    for (model, sequence) in [(2, 1), (1, 2), (2, 2), (4, 1), (6, 2)] {
        let mesh = Mesh::new(1, model, sequence);
        for (rank, got) in run(&file, mesh, |d| logits(d, DType::F32, long)).iter().enumerate() {
            assert_same_bits(got, &want, &format!("rank {rank} of {mesh:?}"));
        }
    }
}

#[test]
fn caches_of_every_format_are_divided() {
    let file = embedded::open().unwrap();
    let long = SPLIT_GRID + 5;
    let int8_keys = Formats::new(CacheFormat::Int8, CacheFormat::Bf16);
    for formats in [CacheFormat::F16.into(), CacheFormat::Bf16.into(), CacheFormat::Int8.into(), int8_keys] {
        let want = logits(&whole(&file), formats, long);
        let mesh = Mesh::new(1, 2, 2);
        for got in run(&file, mesh, |d| logits(d, formats, long)) {
            assert_same_bits(&got, &want, &format!("{formats}"));
        }
    }
}

#[test]
fn experts_are_divided() {
    let file = grok();
    let want = logits(&whole(&file), DType::Bf16, 60);
    for got in run(&file, Mesh::new(1, 2, 2), |d| logits(d, DType::Bf16, 60)) {
        assert_same_bits(&got, &want, "Grok-1");
    }
}

/// Every event of requests with samples, more of them than slots.
fn events(decoder: &Decoder) -> Vec<Event> {
    let mut scheduler = Scheduler::new(decoder, 2, 2 * SPLIT_GRID, DType::F32).unwrap();
    let vocab = decoder.config().vocab;
    for (i, n) in [3, SPLIT_GRID - 2, 17].into_iter().enumerate() {
        let sampling = SamplerOptions::new().temperature(0.9).seed(i as u64);
        let request = Request::new(tokens(n, vocab)).max_tokens(6).sampling(sampling).samples(3);
        scheduler.submit(request.overlong(Overlong::Refuse)).unwrap();
    }
    scheduler.run()
}

#[test]
fn schedulers_of_a_group_agree() {
    let file = embedded::open().unwrap();
    let ids = |events: Vec<Event>| events.into_iter().map(|e| (e.request, e.sample, e.token)).collect::<Vec<_>>();
    let want = ids(events(&whole(&file)));
    assert!(want.len() > 20);
    for got in run(&file, Mesh::new(1, 2, 2), events) {
        assert_eq!(ids(got), want);
    }
}

/// The formulas of the documentation, `src/docs/mesh.md`.
fn model_bytes(c: &ModelConfig, parts: usize) -> (usize, usize) {
    let layer = c.q_dim() + 2 * c.dim + c.ffn_dim;
    let others = |n: usize| 4 * n * (parts - 1) / parts;
    (others(layer) * c.layers.len(), others(c.vocab))
}

#[test]
fn what_moves_is_what_the_documentation_says() {
    let file = embedded::open().unwrap();
    let (m, held) = (5usize, SPLIT_GRID + 100);
    let received = |decoder: &Decoder| {
        let ids = tokens(held + m, decoder.config().vocab);
        let mut cache = decoder.cache(1, 2 * SPLIT_GRID, DType::F32).unwrap();
        let mut scratch = Scratch::default();
        decoder.forward(&mut cache, &mut scratch, 0, &[&ids[..held]], Logits::None).unwrap();
        let part = decoder.mesh_part().unwrap();
        let before = [MeshAxis::Model, MeshAxis::Sequence].map(|axis| part.traffic(axis));
        decoder.forward(&mut cache, &mut scratch, 0, &[&ids[held..]], Logits::Last).unwrap();
        let after = [MeshAxis::Model, MeshAxis::Sequence].map(|axis| part.traffic(axis));
        [0, 1]
            .map(|i| ((after[i].bytes - before[i].bytes) as usize, (after[i].exchanges - before[i].exchanges) as usize))
    };
    let c = file.config();
    let layers = c.layers.len();
    let all = run(&file, Mesh::new(1, 2, 1), received);
    let (layer, vocab) = model_bytes(c, 2);
    // The embeddings of the new tokens come from the process that has them: together each is received once.
    let embeddings: usize = 4 * m * c.dim;
    assert_eq!(all.iter().map(|r| r[0].0).sum::<usize>(), 2 * (m * layer + vocab) + embeddings);
    assert!(all.iter().all(|r| r[0].1 == 4 * layers + 2 && r[1] == (0, 0)));

    let all = run(&file, Mesh::new(1, 1, 2), received);
    // A state of each head, query and chunk: its values, and sixteen floats more. Each process holds one chunk.
    let state = 4 * (c.head_dim.next_multiple_of(16) + 16);
    assert!(all.iter().all(|r| r[0].0 == 0 && r[1] == (layers * m * c.heads * state, layers)), "{all:?}");
}

#[test]
fn a_part_has_its_share_of_weights_and_cache() {
    let file = embedded::open().unwrap();
    let whole_memory = file.weights(&|_, _| ()).unwrap().memory();
    for part in parts(Mesh::new(1, 2, 1)) {
        let memory = file.weights_of_part(&part, &|_, _| ()).unwrap().memory();
        assert!(memory < whole_memory * 51 / 100, "{memory} of {whole_memory} bytes");
    }
    let bytes = Cache::bytes_for(file.config(), 1, 2 * SPLIT_GRID, DType::F32).unwrap();
    for own in run(&file, Mesh::new(1, 2, 2), |d| d.cache(1, 2 * SPLIT_GRID, DType::F32).unwrap().bytes()) {
        assert_eq!(own, bytes / 4);
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let file = embedded::open().unwrap();
    let part = |data, model, sequence| parts(Mesh::new(data, model, sequence)).swap_remove(0);
    let sentence = |part: &MeshPart| part.check(file.config()).unwrap_err().to_string();
    assert_eq!(sentence(&part(1, 3, 1)), "model=3 parts are more than the model's 2 KV heads, and no multiple of them");
    assert_eq!(sentence(&part(1, 7, 1)), "model=7 parts, but the model has 6 query heads");
    assert_eq!(
        part(1, 1, 3).check_capacity(2 * SPLIT_GRID).unwrap_err().to_string(),
        "sequence=3 segments, but 2048 tokens are 2 times the 1024 keys at whose multiples segments begin"
    );
    assert!(part(1, 1, 2).check_capacity(2 * SPLIT_GRID).is_ok() && part(1, 1, 1).check_capacity(5).is_ok());
    // Weights of another part.
    let threads = Threads::new(1).unwrap();
    let all = Decoder::new(file.config().clone(), file.weights(&|_, _| ()).unwrap(), 0, None, threads).unwrap();
    assert!(all.on_mesh(&part(1, 2, 1)).unwrap_err().to_string().starts_with("weights with 320 rows"));
    // Operations that need whole sequences.
    for sentence in run(&file, Mesh::new(1, 1, 2), |decoder| {
        let mut cache = decoder.cache(2, 2 * SPLIT_GRID, DType::F32).unwrap();
        decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&[1, 2, 3]], Logits::None).unwrap();
        decoder.evict(&mut cache, 0, 1..2).unwrap_err().to_string()
            + &decoder.reorder(&mut cache, &[0, 0]).unwrap_err().to_string()
    }) {
        assert_eq!(sentence.matches("a row of a cache that holds the positions").count(), 2, "{sentence}");
    }
}
