//! A Gemma with random weights, small enough to compute its logits with plain f64 arithmetic.
#![cfg(feature = "driver")]

// Other tests use the rest of it.
#[allow(dead_code)]
mod gguf_writer;
#[allow(dead_code)]
mod mesh_threads;

use std::collections::BTreeMap;

use gguf_writer::{T, V, Writer};
use kvlane::driver::argmax;
use kvlane::driver::gguf::Gguf;
use kvlane::driver::{
    BeamOptions, BeamSearch, Cache, Decoder, ErrorKind, Logits, ModelFile, Request, SamplerOptions, Scheduler, Scratch,
    Speculation, SpeculationOptions, Threads,
};
use kvlane::{DType, Mesh, SPLIT_GRID};

const VOCAB: usize = 32;
const DIM: usize = 16;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
// Differs from DIM / HEADS.
const HEAD_DIM: usize = 6;
const FFN: usize = 24;
const LAYERS: usize = 5;
const WINDOW: usize = 4;
const PATTERN: usize = 3;
const BASE: f64 = 1e6;
const LOCAL_BASE: f64 = 1e4;
const EPS: f64 = 1e-6;
const ATTN_CAP: f64 = 3.0;
const LOGIT_CAP: f64 = 8.0;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// With the names of GGUF, and norm weights as they are applied.
fn tensors() -> Tensors {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut unit = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut all = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let norm = shape.len() == 1;
        let values = (0..shape.iter().product()).map(|_| if norm { 1.0 + 0.5 * unit() } else { 0.6 * unit() });
        all.insert(name, (shape.to_vec(), values.collect()));
    };
    add("token_embd.weight".into(), &[VOCAB, DIM]);
    add("output_norm.weight".into(), &[DIM]);
    for i in 0..LAYERS {
        for (part, shape) in [
            ("attn_norm", &[DIM][..]),
            ("attn_q", &[HEADS * HEAD_DIM, DIM]),
            ("attn_k", &[KV_HEADS * HEAD_DIM, DIM]),
            ("attn_v", &[KV_HEADS * HEAD_DIM, DIM]),
            ("attn_q_norm", &[HEAD_DIM]),
            ("attn_k_norm", &[HEAD_DIM]),
            ("attn_output", &[DIM, HEADS * HEAD_DIM]),
            ("post_attention_norm", &[DIM]),
            ("ffn_norm", &[DIM]),
            ("ffn_gate", &[FFN, DIM]),
            ("ffn_up", &[FFN, DIM]),
            ("ffn_down", &[DIM, FFN]),
            ("post_ffw_norm", &[DIM]),
        ] {
            add(format!("blk.{i}.{part}.weight"), shape);
        }
    }
    all
}

fn writer() -> Writer {
    let mut w = Writer::new();
    w.set("general.architecture", V::Str("gemma3".into()))
        .set("gemma3.block_count", V::U32(LAYERS as u32))
        .set("gemma3.context_length", V::U32(64))
        .set("gemma3.embedding_length", V::U32(DIM as u32))
        .set("gemma3.feed_forward_length", V::U32(FFN as u32))
        .set("gemma3.attention.head_count", V::U32(HEADS as u32))
        .set("gemma3.attention.head_count_kv", V::U32(KV_HEADS as u32))
        .set("gemma3.attention.key_length", V::U32(HEAD_DIM as u32))
        .set("gemma3.attention.value_length", V::U32(HEAD_DIM as u32))
        .set("gemma3.attention.layer_norm_rms_epsilon", V::F32(EPS as f32))
        .set("gemma3.attention.sliding_window", V::U32(WINDOW as u32))
        .set("gemma3.attention.sliding_window_pattern", V::U32(PATTERN as u32))
        .set("gemma3.attn_logit_softcapping", V::F32(ATTN_CAP as f32))
        .set("gemma3.final_logit_softcapping", V::F32(LOGIT_CAP as f32))
        .set("gemma3.rope.freq_base", V::F32(BASE as f32));
    for (name, (shape, values)) in tensors() {
        w.tensors.push(T {
            name,
            extents: shape.iter().rev().map(|&n| n as u64).collect(),
            ty: 0,
            offset: None,
            data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        });
    }
    w
}

fn open(w: &Writer) -> kvlane::driver::Result<ModelFile> {
    ModelFile::from_gguf(Gguf::from_bytes(w.bytes())?)
}

fn decoder(file: &ModelFile) -> Decoder {
    let weights = file.weights(&|_, _| ()).unwrap();
    Decoder::new(file.config().clone(), weights, 0, None, Threads::new(1).unwrap()).unwrap()
}

/// The logits of every token, `[ids, VOCAB]`, computed from the definition.
fn oracle(ids: &[usize]) -> Vec<f64> {
    let all = tensors();
    let get = |name: String| all[&name].1.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let linear = |x: &[f64], w: &[f64]| -> Vec<f64> {
        w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let norm = |x: &[f64], w: &[f64]| -> Vec<f64> {
        let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + EPS).sqrt();
        x.iter().zip(w).map(|(x, w)| x / scale * w).collect()
    };
    let rope = |x: &[f64], position: usize, base: f64| -> Vec<f64> {
        let half = HEAD_DIM / 2;
        let turned = |i: usize| {
            let (cos, sin) = {
                let angle = position as f64 * base.powf(-2.0 * (i % half) as f64 / HEAD_DIM as f64);
                (angle.cos(), angle.sin())
            };
            if i < half { x[i] * cos - x[i + half] * sin } else { x[i] * cos + x[i - half] * sin }
        };
        (0..HEAD_DIM).map(turned).collect()
    };
    let embedding = get("token_embd.weight".into());
    let mut xs: Vec<Vec<f64>> =
        ids.iter().map(|id| embedding[id * DIM..][..DIM].iter().map(|x| x * (DIM as f64).sqrt()).collect()).collect();
    for l in 0..LAYERS {
        let w = |part: &str| get(format!("blk.{l}.{part}.weight"));
        let local = (l + 1) % PATTERN != 0;
        let base = if local { LOCAL_BASE } else { BASE };
        let heads = |x: &[f64], position: usize, matrix: &str, weight: &str| -> Vec<Vec<f64>> {
            let heads = linear(x, &w(matrix));
            heads.chunks(HEAD_DIM).map(|head| rope(&norm(head, &w(weight)), position, base)).collect()
        };
        let h: Vec<Vec<f64>> = xs.iter().map(|x| norm(x, &w("attn_norm"))).collect();
        let k: Vec<_> = h.iter().enumerate().map(|(p, h)| heads(h, p, "attn_k", "attn_k_norm")).collect();
        let v: Vec<_> = h.iter().map(|h| linear(h, &w("attn_v"))).collect();
        for (p, x) in xs.iter_mut().enumerate() {
            let first = if local { (p + 1).saturating_sub(WINDOW) } else { 0 };
            let mut attended = Vec::new();
            for (head, q) in heads(&h[p], p, "attn_q", "attn_q_norm").iter().enumerate() {
                let of = head / (HEADS / KV_HEADS);
                let weight = |j: usize| {
                    let dot: f64 = q.iter().zip(&k[j][of]).map(|(a, b)| a * b).sum();
                    (ATTN_CAP * (dot / (HEAD_DIM as f64).sqrt() / ATTN_CAP).tanh()).exp()
                };
                let total: f64 = (first..=p).map(weight).sum();
                let value = |d: usize| (first..=p).map(|j| weight(j) * v[j][of * HEAD_DIM + d]).sum::<f64>() / total;
                attended.extend((0..HEAD_DIM).map(value));
            }
            let delta = norm(&linear(&attended, &w("attn_output")), &w("post_attention_norm"));
            x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
            let h = norm(x, &w("ffn_norm"));
            let (gate, up) = (linear(&h, &w("ffn_gate")), linear(&h, &w("ffn_up")));
            let gelu =
                |g: f64| 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh());
            let act: Vec<f64> = gate.iter().zip(up).map(|(&g, u)| gelu(g) * u).collect();
            let delta = norm(&linear(&act, &w("ffn_down")), &w("post_ffw_norm"));
            x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
        }
    }
    let last = get("output_norm.weight".into());
    let logits = xs.iter().flat_map(|x| linear(&norm(x, &last), &embedding));
    logits.map(|x| LOGIT_CAP * (x / LOGIT_CAP).tanh()).collect()
}

const IDS: [u32; 15] = [2, 7, 31, 7, 0, 19, 4, 11, 28, 3, 3, 16, 9, 22, 14];

/// `chunk` determines the size of the rings of local layers; with the length of [`IDS`] they never wrap around.
fn compare(decoder: &Decoder, chunk: usize, pieces: &[usize]) {
    let want = oracle(&IDS.map(|id| id as usize));
    let mut cache = Cache::with_chunk(decoder.config(), 1, IDS.len(), chunk, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    let (mut got, mut rest) = (Vec::new(), &IDS[..]);
    for &n in pieces {
        let (piece, tail) = rest.split_at(n);
        got.extend(decoder.forward(&mut cache, &mut scratch, 0, &[piece], Logits::All).unwrap());
        rest = tail;
    }
    assert!(rest.is_empty() && got.len() == want.len());
    let worst = got.iter().zip(&want).fold(0.0f64, |worst, (&g, w)| worst.max((f64::from(g) - w).abs()));
    assert!(want.iter().any(|x| x.abs() > 1.0) && worst < 1e-5, "{worst}");
}

#[test]
fn logits_are_the_definitions() {
    let decoder = decoder(&open(&writer()).unwrap());
    for chunk in [1, 2, 3, 5, IDS.len(), usize::MAX] {
        compare(&decoder, chunk, &[IDS.len()]);
        compare(&decoder, chunk, &[6, 1, 1, 7]);
        compare(&decoder, chunk, &[1; IDS.len()]);
    }
}

fn text(n: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 7 + i * 13 + seed * 5) % VOCAB) as u32).collect()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert!(!a.is_empty() && a.len() == b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| worst.max((a - b).abs()))
}

/// Sequences of different lengths, in rings that wrap around many times and in layers that keep all tokens.
#[test]
fn rings_are_rows_that_keep_everything() {
    let decoder = decoder(&open(&writer()).unwrap());
    let texts = [text(90, 1), text(61, 2), text(7, 3)];
    let run = |chunk: usize, dtype: DType| {
        let mut cache = Cache::with_chunk(decoder.config(), 3, 100, chunk, dtype).unwrap();
        let slots = (LAYERS - 1) * 100usize.min(WINDOW.saturating_add(chunk)) + 100;
        assert_eq!(cache.bytes(), 3 * slots * 2 * KV_HEADS * HEAD_DIM * dtype.size());
        let mut scratch = Scratch::default();
        let mut logits = vec![Vec::new(); 3];
        // Prompts of three lengths, then one token per sequence and step until each has no tokens left.
        let mut done = [0; 3];
        for counts in [[40, 11, 0], [1, 0, 2]].into_iter().chain([[1, 1, 1]; 100]) {
            let pieces: Vec<&[u32]> =
                (0..3).map(|b| &texts[b][done[b]..texts[b].len().min(done[b] + counts[b])]).collect();
            let mut got = &decoder.forward(&mut cache, &mut scratch, 0, &pieces, Logits::All).unwrap()[..];
            for (b, piece) in pieces.iter().enumerate() {
                let (row, rest) = got.split_at(piece.len() * VOCAB);
                logits[b].extend_from_slice(row);
                done[b] += piece.len();
                got = rest;
            }
            assert!(got.is_empty());
        }
        assert_eq!(cache.lengths(), [90, 61, 7]);
        logits.concat()
    };
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 0.02), (DType::Bf16, 0.2)] {
        let whole = run(100, dtype);
        for chunk in [1, 4, 9] {
            let worst = worst(&run(chunk, dtype), &whole);
            assert!(worst < tolerance, "{dtype} {chunk}: {worst}");
        }
    }
}

/// With logits of the last tokens only, several passes return them in the order of the rows.
#[test]
fn last_tokens_come_in_the_order_of_rows() {
    let decoder = decoder(&open(&writer()).unwrap());
    let texts = [text(3, 1), text(20, 2), text(0, 3), text(11, 4)];
    let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let run = |chunk: usize, logits: Logits| {
        let mut cache = Cache::with_chunk(decoder.config(), 4, 20, chunk, DType::F32).unwrap();
        let got = decoder.forward(&mut cache, &mut Scratch::default(), 0, &texts, logits).unwrap();
        assert_eq!(cache.lengths(), [3, 20, 0, 11]);
        got
    };
    assert!(run(4, Logits::None).is_empty());
    let all = run(20, Logits::All);
    let last: Vec<f32> = [3, 23, 34].iter().flat_map(|&end| &all[(end - 1) * VOCAB..end * VOCAB]).copied().collect();
    assert!(worst(&run(4, Logits::Last), &last) < 1e-5);
    assert!(worst(&run(4, Logits::All), &all) < 1e-5);
}

#[test]
fn a_ring_gives_back_what_it_has() {
    let decoder = decoder(&open(&writer()).unwrap());
    let chunk = 3;
    let mut scratch = Scratch::default();
    let mut feed =
        |cache: &mut Cache, ids: &[u32]| decoder.forward(cache, &mut scratch, 0, &[ids], Logits::All).unwrap();
    let mut cache = Cache::with_chunk(decoder.config(), 1, 64, chunk, DType::F32).unwrap();
    let first = feed(&mut cache, &IDS);
    // One more than the chunk, and then no more, because overwritten tokens are lost.
    let n = IDS.len() - chunk - 1;
    for (before, to) in [(IDS.len(), n - 1), (IDS.len(), 1)] {
        let error = cache.truncate(0, to).unwrap_err().to_string();
        assert!(error.contains(&format!("from {before} tokens to {to}")), "{error}");
        assert_eq!(cache.len(0), before);
    }
    cache.truncate(0, n).unwrap();
    assert!(cache.truncate(0, n - 1).is_err() && cache.len(0) == n);
    feed(&mut cache, &[9, 9]);
    assert!(cache.truncate(0, n - 1).is_err() && cache.len(0) == n + 2);
    cache.truncate(0, n).unwrap();
    cache.truncate(0, 99).unwrap();
    let again = feed(&mut cache, &IDS[n..]);
    assert!(worst(&again, &first[n * VOCAB..]) < 1e-5);
    // An emptied row has no tokens, and a row that has not wrapped around can be truncated anywhere.
    cache.truncate(0, 0).unwrap();
    feed(&mut cache, &IDS[..WINDOW + chunk]);
    cache.truncate(0, 1).unwrap();
    assert!(worst(&feed(&mut cache, &IDS[1..]), &first[VOCAB..]) < 1e-5);

    let error = Cache::with_chunk(decoder.config(), 1, 64, 0, DType::F32).unwrap_err();
    assert!(error.kind() == ErrorKind::Argument && error.to_string().contains("at least 1"), "{error}");
}

/// Prompts longer than the rings, in a slot that had another request before, beside a running request.
#[test]
fn slots_with_rings_are_reused() {
    let decoder = decoder(&open(&writer()).unwrap());
    let (capacity, new) = (1200, 9);
    let prompts = [text(1100, 1), text(40, 2), text(800, 3)];
    let whole = |prompt: &[u32]| {
        let mut cache = Cache::with_chunk(decoder.config(), 1, capacity, capacity, DType::F32).unwrap();
        let mut scratch = Scratch::default();
        let mut next = prompt.to_vec();
        let step = |_| {
            let logits = decoder.forward(&mut cache, &mut scratch, 0, &[&next], Logits::Last).unwrap();
            next = vec![argmax(&logits).unwrap()];
            next[0]
        };
        (0..new).map(step).collect::<Vec<u32>>()
    };
    let mut scheduler = Scheduler::new(&decoder, 2, capacity, DType::F32).unwrap();
    let rings = Cache::with_chunk(decoder.config(), 2, capacity, capacity, DType::F32).unwrap();
    assert!(scheduler.cache().bytes() < rings.bytes());
    let counts = [3, new, new];
    let requests = prompts.iter().zip(counts).map(|(p, n)| Request::new(p.clone()).max_tokens(n));
    let ids: Vec<_> = requests.map(|request| scheduler.submit(request).unwrap()).collect();
    let mut texts = [Vec::new(), Vec::new(), Vec::new()];
    for event in scheduler.run() {
        texts[ids.iter().position(|&id| id == event.request).unwrap()].extend(event.token);
    }
    for ((prompt, n), text) in prompts.iter().zip(counts).zip(texts) {
        assert_eq!(text, whole(prompt)[..n]);
    }

    // Several samples of a prompt longer than the rings: a copy in a slot, and one aside for which there was no slot.
    scheduler.submit(Request::new(prompts[0].clone()).max_tokens(new).samples(4)).unwrap();
    let mut samples = vec![Vec::new(); 4];
    for event in scheduler.run() {
        samples[event.sample].extend(event.token);
    }
    assert_eq!(samples, vec![whole(&prompts[0]); 4]);
    let computed = prompts.iter().map(Vec::len).sum::<usize>() + prompts[0].len();
    assert_eq!(scheduler.statistics().prompt_tokens, computed);
}

/// Layers with windows keep rings, or every token for beams: rows that move by copying in rings find what rows that move
/// by table find.
#[test]
fn beams_by_table_are_beams_in_rings() {
    let decoder = decoder(&open(&writer()).unwrap());
    for (beams, chunk) in [(2, 1), (3, 5), (6, 512)] {
        // So short that linear layers compute the rows of its passes one by one.
        let prompt = text(8, beams);
        let rings = Cache::with_chunk(decoder.config(), beams, 40, chunk, DType::F32).unwrap();
        let table = Cache::with_beams(decoder.config(), beams, 40, DType::F32).unwrap();
        assert!(table.bytes() >= rings.bytes());
        let [rings, table] = [rings, table].map(|cache| {
            let mut search = BeamSearch::new(&decoder, cache, &prompt, BeamOptions::new(beams, 30)).unwrap();
            while search.step().unwrap() {}
            search.hypotheses()
        });
        assert_eq!((table.len(), &table), (beams, &rings));
    }
}

/// The same model without its last layers.
fn draft(layers: usize) -> Decoder {
    let file = open(&writer()).unwrap();
    let (mut config, mut weights) = (file.config().clone(), file.weights(&|_, _| ()).unwrap());
    config.layers.truncate(layers);
    weights.layers.truncate(layers);
    Decoder::new(config, weights, 0, None, Threads::new(1).unwrap()).unwrap()
}

/// A tree's tokens see a window of positions, not of slots. One branch needs no more than rings.
#[test]
fn guesses_see_windows_of_positions() {
    let decoder = decoder(&open(&writer()).unwrap());
    let prompt = text(9, 3);
    let mut greedy: Vec<u32> = Vec::new();
    let (mut cache, mut scratch) = (Cache::new(decoder.config(), 1, 64, DType::F32).unwrap(), Scratch::default());
    let mut next = prompt.clone();
    while greedy.len() < 50 {
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &[&next], Logits::Last).unwrap();
        next = vec![argmax(&logits).unwrap()];
        greedy.extend(&next);
    }
    for layers in [1, 3, 5] {
        let draft = draft(layers);
        for (ahead, branches) in [(3, 1), (6, 2), (3, 5)] {
            let options = SpeculationOptions::new(50).ahead(ahead).branches(branches);
            let cache = |decoder: &Decoder| match branches {
                1 => Cache::with_chunk(decoder.config(), 1, 64, 8, DType::F32).unwrap(),
                _ => Cache::without_rings(decoder.config(), 1, 64, DType::F32).unwrap(),
            };
            let speculation = Speculation::new(&decoder, cache(&decoder), &prompt, options).unwrap();
            let mut speculation = speculation.draft(&draft, cache(&draft)).unwrap();
            while speculation.finish().is_none() {
                speculation.step().unwrap();
            }
            let s = speculation.statistics();
            assert_eq!(speculation.tokens(), greedy, "{layers} layers, {ahead} x {branches}, {s:?}");
            assert!(s.held > 0, "{layers} layers, {ahead} x {branches}");
        }
    }
    let rings = Cache::new(decoder.config(), 1, 600, DType::F32).unwrap();
    let refused = Speculation::new(&decoder, rings, &prompt, SpeculationOptions::new(4).branches(2)).err();
    assert!(refused.is_some_and(|e| e.to_string().contains("2 branches of guesses: closing a gap")));
}

/// Many short texts with drawn guesses, whose third token has the distribution that the model gives it after all pairs of
/// first tokens.
#[test]
fn sampled_text_has_the_models_distribution() {
    let decoder = decoder(&open(&writer()).unwrap());
    let draft = draft(2);
    let prompt = text(6, 2);
    let softmax = |logits: &[f32]| {
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / 0.9).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(move |w| w / sum).collect::<Vec<f64>>()
    };
    let after = |tokens: &[u32]| {
        let mut cache = Cache::new(decoder.config(), 1, 16, DType::F32).unwrap();
        let ids = [&prompt[..], tokens].concat();
        softmax(&decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&ids], Logits::Last).unwrap())
    };
    let first = after(&[]);
    let (mut second, mut third) = (vec![0.0; VOCAB], vec![0.0; VOCAB]);
    for (a, &before) in first.iter().enumerate() {
        for (b, p) in after(&[a as u32]).into_iter().enumerate() {
            second[b] += before * p;
            for (third, q) in third.iter_mut().zip(after(&[a as u32, b as u32])) {
                *third += before * p * q;
            }
        }
    }
    for (ahead, branches) in [(2, 1), (2, 3)] {
        let n = 4000;
        let mut found = [[0usize; VOCAB]; 3];
        let mut held = 0;
        for seed in 0..n {
            let sampling = SamplerOptions::new().temperature(0.9).seed(seed);
            let options = SpeculationOptions::new(3).sampling(sampling).ahead(ahead).branches(branches);
            let cache = |decoder: &Decoder| Cache::without_rings(decoder.config(), 1, 16, DType::F32).unwrap();
            let speculation = Speculation::new(&decoder, cache(&decoder), &prompt, options).unwrap();
            let mut speculation = speculation.draft(&draft, cache(&draft)).unwrap();
            while speculation.finish().is_none() {
                speculation.step().unwrap();
            }
            held += speculation.statistics().held;
            for (found, &token) in found.iter_mut().zip(speculation.tokens()) {
                found[token as usize] += 1;
            }
        }
        assert!(held > n as usize / 4, "{held} guesses held");
        for (i, (found, expected)) in found.iter().zip([&first, &second, &third]).enumerate() {
            // Cells with fewer than 5 expected are one.
            let (mut square, mut cells, mut small) = (0.0, 0, (0.0, 0.0));
            for (&found, p) in found.iter().zip(expected) {
                let (found, expected) = (found as f64, p * n as f64);
                if expected < 5.0 {
                    small = (small.0 + found, small.1 + expected);
                } else {
                    square += (found - expected).powi(2) / expected;
                    cells += 1;
                }
            }
            if small.1 > 0.0 {
                square += (small.0 - small.1).powi(2) / small.1.max(1.0);
            }
            let k = f64::from(cells);
            eprintln!("token {i}, {ahead} x {branches}: chi-square {square:.1} of {cells} cells; {held} guesses held");
            assert!(
                cells > 5 && square < k + 5.0 * (2.0 * k).sqrt(),
                "token {i}: chi-square {square} of {cells} cells"
            );
        }
    }
}

/// Layers with windows on a mesh: segments keep every token, one process keeps rings. Weights are plain floats here, so that
/// heads that are divided change roundings.
#[test]
fn windows_are_divided() {
    let file = open(&writer()).unwrap();
    let long = SPLIT_GRID + 40;
    let run_through = |decoder: &Decoder| {
        let ids: Vec<u32> = (0..long as u32 + 4).map(|i| (i * i * 7 + i) % VOCAB as u32).collect();
        let mut cache = decoder.cache(1, 2 * SPLIT_GRID, DType::F32).unwrap();
        let mut scratch = Scratch::default();
        let mut all = decoder.forward(&mut cache, &mut scratch, 0, &[&ids[..long]], Logits::Last).unwrap();
        for id in &ids[long..] {
            all.extend(decoder.forward(&mut cache, &mut scratch, 0, &[&[*id]], Logits::Last).unwrap());
        }
        all
    };
    let want = run_through(&decoder(&file));
    for got in mesh_threads::run(&file, Mesh::new(1, 1, 2), run_through) {
        assert!(got == want, "segments");
    }
    for got in mesh_threads::run(&file, Mesh::new(1, 2, 2), run_through) {
        let worst = got.iter().zip(&want).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        assert!(worst < 1e-4, "{worst}");
    }
}
