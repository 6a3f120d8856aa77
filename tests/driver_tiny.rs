//! The embedded model compared with PyTorch on the same file (`src/driver/tiny/train.py` writes the reference).
#![cfg(feature = "driver")]

use kvlane::driver::argmax;
use kvlane::driver::quant::dequantize;
use kvlane::driver::{
    Cache, Decoder, Finish, Formats, Logits, ModelFile, Prefilled, Request, Rotate, Scheduler, Scratch, Streaming,
    Stretch, Threads, Tokenizer, cache_error, embedded, perplexity,
};
use kvlane::{CacheFormat, DType, Isa, KvRead, Pairing, RopeScaling, Serial, Source, ViewMut, YarnScaling, kv_read};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    greedy_text: String,
    /// After the prompt's last token.
    logits: Vec<f32>,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("data/tiny_reference.json")).unwrap()
}

/// Linear layers in f32, as the reference computes them.
fn load(isa: Option<Isa>, threads: usize) -> (Decoder, Tokenizer) {
    let (decoder, tokenizer) = load_rounding(isa, threads);
    (decoder.exact(true), tokenizer)
}

/// Linear layers as they are by default.
fn load_rounding(isa: Option<Isa>, threads: usize) -> (Decoder, Tokenizer) {
    let file = embedded::open().unwrap();
    let threads = Threads::new(threads).unwrap();
    let weights = threads.run(|| file.weights(&|_, _| ())).unwrap();
    let decoder = Decoder::new(file.config().clone(), weights, 0, isa, threads).unwrap();
    (decoder, file.tokenizer().unwrap())
}

fn greedy(decoder: &Decoder, prompt: &[u32], n: usize, recompute: bool) -> Vec<u32> {
    greedy_in(decoder, prompt, n, recompute, CacheFormat::F32.into())
}

fn greedy_in(decoder: &Decoder, prompt: &[u32], n: usize, recompute: bool, formats: Formats) -> Vec<u32> {
    let mut scheduler = Scheduler::new(decoder, 1, prompt.len() + n, formats).unwrap().recompute(recompute);
    scheduler.submit(Request::new(prompt).max_tokens(n)).unwrap();
    scheduler.run().iter().filter_map(|event| event.token).collect()
}

#[test]
fn text_and_logits_are_the_references() {
    let (decoder, tokenizer) = load(None, 0);
    let mut worst = 0.0f32;
    for case in cases() {
        assert_eq!(tokenizer.encode(&case.prompt, true).unwrap(), case.prompt_ids, "{:?}", case.prompt);
        let mut cache = Cache::new(decoder.config(), 1, 64, DType::F32).unwrap();
        let logits =
            decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&case.prompt_ids], Logits::Last).unwrap();
        assert_eq!(argmax(&logits).unwrap(), case.greedy_ids[0]);
        assert_eq!(logits.len(), case.logits.len());
        worst = logits.iter().zip(&case.logits).fold(worst, |w, (a, b)| w.max((a - b).abs()));
        let ids = greedy(&decoder, &case.prompt_ids, case.greedy_ids.len(), false);
        assert_eq!(ids, case.greedy_ids, "{:?}", case.prompt);
        assert_eq!(tokenizer.decode(&ids).unwrap(), case.greedy_text);
    }
    eprintln!("largest difference of a logit: {worst:.2e}");
    // Four layers in f32, with sums in another order; logits are of the order of 10.
    assert!(worst < 1e-4, "{worst}");
}

#[test]
fn cached_is_recomputed_at_every_level() {
    for level in Isa::ALL.into_iter().filter(|l| l.is_available()) {
        let (decoder, _) = load(Some(level), 1);
        for case in cases() {
            let n = case.greedy_ids.len();
            let cached = greedy(&decoder, &case.prompt_ids, n, false);
            assert_eq!(cached, greedy(&decoder, &case.prompt_ids, n, true), "{level} {:?}", case.prompt);
            assert_eq!(cached, case.greedy_ids, "{level} {:?}", case.prompt);
        }
    }
}

/// A text after its first tokens, and the logits of every position, from pieces of the text.
fn in_pieces(decoder: &Decoder, ids: &[u32], pieces: &[usize]) -> Vec<f32> {
    let mut cache = Cache::new(decoder.config(), 1, ids.len(), DType::F32).unwrap();
    let (mut scratch, mut rest, mut all) = (Scratch::default(), ids, Vec::new());
    for &n in pieces.iter().cycle() {
        let (piece, tail) = rest.split_at(n.min(rest.len()));
        all.extend(decoder.forward(&mut cache, &mut scratch, 0, &[piece], Logits::All).unwrap());
        rest = tail;
        if rest.is_empty() {
            break;
        }
    }
    all
}

/// By default linear layers round their inputs to sixteen bits. That moves logits, which are of the order of 10, by
/// thousandths, and the likeliest token only where two are as close as that.
#[test]
fn rounded_inputs_stay_close() {
    let ((exact, _), (rounding, _)) = (load(None, 0), load_rounding(None, 0));
    let vocab = exact.config().vocab;
    let mut worst = 0.0f32;
    for case in cases() {
        let ids = [case.prompt_ids, case.greedy_ids].concat();
        let (want, got) = (in_pieces(&exact, &ids, &[ids.len()]), in_pieces(&rounding, &ids, &[ids.len()]));
        for (want, got) in want.chunks(vocab).zip(got.chunks(vocab)) {
            let error = want.iter().zip(got).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
            worst = worst.max(error);
            let best = argmax(want).unwrap() as usize;
            let second = want.iter().enumerate().filter(|&(i, _)| i != best).fold(f32::MIN, |m, (_, &x)| m.max(x));
            if want[best] - second > 2.0 * error {
                assert_eq!(argmax(got).unwrap() as usize, best);
            }
        }
    }
    eprintln!("largest difference of a logit: {worst:.2e}");
    assert!(worst > 1e-6 && worst < 0.01, "{worst}");
}

/// With quantised weights, logits have the same bits however a text is cut and on any number of threads.
#[test]
fn quantised_weights_keep_the_bits() {
    let case = &cases()[0];
    let ids = [case.prompt_ids.as_slice(), &case.greedy_ids].concat();
    for exact in [false, true] {
        let decoder = |threads| load_rounding(None, threads).0.exact(exact);
        let want = in_pieces(&decoder(1), &ids, &[ids.len()]);
        for (threads, pieces) in [(1, &[1][..]), (3, &[1, 9, 2, 17]), (2, &[12])] {
            assert!(in_pieces(&decoder(threads), &ids, pieces) == want, "{threads} threads, {pieces:?}, exact {exact}");
        }
    }
}

/// Weights keep the type of the file.
#[test]
fn weights_take_the_memory_of_their_file() {
    let file = embedded::open().unwrap();
    let size: usize = file.tensors().unwrap().iter().map(|t| t.bytes).sum();
    let memory = file.weights(&|_, _| ()).unwrap().memory();
    assert!(memory >= size && 10 * memory <= 13 * size, "{memory} bytes for tensors of {size}");
}

/// Every pair of formats with int8 for keys or values, and some with eight-bit floats and with blocks.
fn quantised() -> impl Iterator<Item = Formats> {
    let pairs = CacheFormat::ALL.into_iter().flat_map(|k| CacheFormat::ALL.map(|v| Formats::new(k, v)));
    let (e4m3, e5m2) = (CacheFormat::Fp8E4m3, CacheFormat::Fp8E5m2);
    let others = [
        (e4m3, e4m3),
        (e5m2, e5m2),
        (e4m3, CacheFormat::F32),
        (CacheFormat::Bf16, e5m2),
        (CacheFormat::Q8_0, CacheFormat::Q8_0),
        (CacheFormat::Q8_0, CacheFormat::Q4_0),
        (CacheFormat::Q5_1, CacheFormat::Iq4Nl),
    ];
    let int8 = Formats::from(CacheFormat::Int8);
    let rotated = Rotate::ALL[1..].iter().map(move |&rotate| int8.rotate(rotate));
    let plain = pairs.filter(|pair| pair.k.has_scales() || pair.v.has_scales());
    plain.chain(rotated).chain(others.map(|(k, v)| Formats::new(k, v)))
}

/// With a cache in f32, keys and values that are rotated change nothing but roundings: the same text, in one pass, token by token, and
/// recomputed. Prompts that were prefilled elsewhere have to be rotated alike.
#[test]
fn rotated_caches_write_the_same_text() {
    let (decoder, _) = load(None, 0);
    for rotate in Rotate::ALL {
        let formats = Formats::from(CacheFormat::F32).rotate(rotate);
        for case in cases() {
            let n = case.greedy_ids.len();
            let logits = |formats: Formats| {
                let mut cache = Cache::new(decoder.config(), 1, 64, formats).unwrap();
                decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&case.prompt_ids], Logits::Last).unwrap()
            };
            let (plain, rotated) = (logits(CacheFormat::F32.into()), logits(formats));
            let worst = plain.iter().zip(&rotated).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
            assert!(worst < 1e-3 && (rotate == Rotate::default()) == (worst == 0.0), "{formats}: {worst}");
            for recompute in [false, true] {
                let ids = greedy_in(&decoder, &case.prompt_ids, n, recompute, formats);
                assert_eq!(ids, case.greedy_ids, "{formats} {:?}", case.prompt);
            }
        }
    }
    let both = Formats::from(CacheFormat::Int8).rotate(Rotate { k: true, v: true });
    let mut scheduler = Scheduler::new(&decoder, 1, 64, both).unwrap();
    let mut ends_well = |formats: Formats| {
        let prefilled = Prefilled::new(&decoder, &[1u32, 2, 3][..], formats).unwrap();
        let submitted = scheduler.submit_prefilled(prefilled, Request::new([]).max_tokens(2));
        submitted.is_ok() && scheduler.run().last().is_some_and(|event| event.finish == Some(Finish::MaxTokens))
    };
    assert!(ends_well(both) && !ends_well(CacheFormat::Int8.into()));
}

/// Whether keys or values have fewer than seven bits of precision.
fn is_coarse(formats: Formats) -> bool {
    let coarse = |format: CacheFormat| format.has_static_scales() || format.head_bytes(32) < 32;
    coarse(formats.k) || coarse(formats.v)
}

/// A quantised cache changes logits a little, one of eight-bit floats or fewer bits more, and changes no token whose lead over the next is larger.
#[test]
fn quantised_caches_stay_close() {
    let (decoder, _) = load(None, 0);
    // With int8 and q8_0 alone, and with coarser formats.
    let (mut worst, mut close, mut total) = ([0.0f32; 2], [0; 2], [0; 2]);
    for case in cases() {
        // Logits after every token of the reference text, so that tokens do not depend on earlier choices.
        let ids = [&case.prompt_ids[..], &case.greedy_ids].concat();
        let logits = |formats: Formats| {
            let mut cache = Cache::new(decoder.config(), 1, ids.len(), formats).unwrap();
            decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&ids], Logits::All).unwrap()
        };
        let exact = logits(CacheFormat::F32.into());
        for formats in quantised() {
            let (vocab, kind) = (decoder.config().vocab, usize::from(is_coarse(formats)));
            for (exact, found) in exact.chunks(vocab).zip(logits(formats).chunks(vocab)) {
                let off = exact.iter().zip(found).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
                worst[kind] = worst[kind].max(off);
                let best = argmax(exact).unwrap() as usize;
                let next = (0..vocab).filter(|&i| i != best).fold(f32::MIN, |m, i| m.max(exact[i]));
                let same = argmax(found).unwrap() as usize == best;
                assert!(same || exact[best] - next <= 2.0 * off, "{formats}");
                (close[kind], total[kind]) = (close[kind] + usize::from(same), total[kind] + 1);
            }
        }
    }
    eprintln!("largest difference of a logit: {worst:?}; {close:?} of {total:?} tokens are the same");
    for (kind, most) in [(0, 2.0), (1, 6.0)] {
        assert!(worst[kind] < most && close[kind] * 100 >= total[kind] * 50, "{worst:?} {close:?} of {total:?}");
    }
}

/// A quantised cache holds the same bytes whether it was filled by one pass or token by token.
#[test]
fn quantised_caches_decode_as_they_recompute() {
    for level in Isa::ALL.into_iter().filter(|l| l.is_available()) {
        let (decoder, _) = load(Some(level), 1);
        for (case, formats) in cases().iter().cycle().zip(quantised()) {
            let n = case.greedy_ids.len();
            let [cached, again] =
                [false, true].map(|recompute| greedy_in(&decoder, &case.prompt_ids, n, recompute, formats));
            assert_eq!(cached, again, "{level} {formats} {:?}", case.prompt);
        }
    }
}

/// A decode step does not depend on how the prompt was cut or on the number of threads.
#[test]
fn steps_do_not_depend_on_threads() {
    let case = &cases()[0];
    let run = |threads: usize, formats: Formats| {
        let (decoder, _) = load(None, threads);
        let mut cache = Cache::new(decoder.config(), 1, 64, formats).unwrap();
        let mut scratch = Scratch::default();
        let mut last = Vec::new();
        for id in &case.prompt_ids {
            last = decoder.forward(&mut cache, &mut scratch, 0, &[&[*id]], Logits::Last).unwrap();
        }
        last
    };
    for formats in [CacheFormat::F16, CacheFormat::Int8, CacheFormat::Fp8E4m3, CacheFormat::Q8_0].map(Formats::from) {
        let one = run(1, formats);
        for threads in [2, 3] {
            assert!(run(threads, formats) == one, "{threads} threads, {formats}");
        }
    }
}

/// Sequences of different lengths, some without a new token: each has the result that it has alone.
#[test]
fn ragged_rows_are_rows_alone() {
    let (decoder, _) = load(None, 2);
    let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 2000).collect();
    let alone = |ids: &[u32]| {
        let mut cache = Cache::new(decoder.config(), 1, 64, DType::F32).unwrap();
        decoder.forward(&mut cache, &mut Scratch::default(), 0, &[ids], Logits::All).unwrap()
    };
    let close = |a: &[f32], b: &[f32]| {
        assert_eq!(a.len(), b.len());
        let worst = a.iter().zip(b).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        assert!(worst < 1e-4, "{worst}");
    };
    let vocab = decoder.config().vocab;
    let mut cache = Cache::new(decoder.config(), 5, 48, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    let none: &[u32] = &[];
    let first = decoder.forward(&mut cache, &mut scratch, 1, &[&ids[..7], none, &ids[5..25]], Logits::All).unwrap();
    assert_eq!(cache.lengths(), [0, 7, 0, 20, 0]);
    let (a, b) = first.split_at(7 * vocab);
    close(a, &alone(&ids[..7]));
    close(b, &alone(&ids[5..25]));
    let second =
        decoder.forward(&mut cache, &mut scratch, 0, &[&ids[..2], &ids[7..10], &ids[..1], none], Logits::Last).unwrap();
    assert_eq!(cache.lengths(), [2, 10, 1, 20, 0]);
    for (row, text) in second.chunks(vocab).zip([&ids[..2], &ids[..10], &ids[..1]]) {
        let all = alone(text);
        close(row, &all[all.len() - vocab..]);
    }
    // Earlier tokens of a row have no effect after a reset.
    cache.reset(3);
    let again = decoder.forward(&mut cache, &mut scratch, 3, &[&ids[..4]], Logits::All).unwrap();
    close(&again, &alone(&ids[..4]));
}

#[test]
fn bad_calls_leave_the_cache_alone() {
    let (decoder, _) = load(None, 1);
    let mut cache = Cache::new(decoder.config(), 2, 4, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    decoder.forward(&mut cache, &mut scratch, 0, &[&[1, 2, 3]], Logits::None).unwrap();
    for (row, tokens) in [(0, &[1, 2][..]), (1, &[1; 5]), (1, &[2048]), (2, &[1])] {
        assert!(decoder.forward(&mut cache, &mut scratch, row, &[tokens], Logits::Last).is_err());
        assert_eq!(cache.lengths(), [3, 0]);
    }
    assert!(decoder.forward(&mut cache, &mut scratch, usize::MAX, &[&[1]], Logits::Last).is_err());
    assert!(Cache::new(decoder.config(), usize::MAX, 8, DType::F32).is_err());
    assert!(Cache::new(decoder.config(), 1, 1 << 40, DType::F32).is_err());
    assert!(Cache::new(decoder.config(), 1, 1 << 40, CacheFormat::Int8).is_err());
}

#[test]
fn a_cache_counts_its_scales() {
    let config = embedded::open().unwrap().config().clone();
    let (layers, heads, dim) = (config.layers.len(), config.kv_heads, config.head_dim);
    let bytes = |k, v| Cache::new(&config, 2, 10, Formats::new(k, v)).unwrap().bytes();
    let (keys, tokens) = (layers * heads * dim, 2 * 10);
    assert_eq!(bytes(CacheFormat::F32, CacheFormat::Bf16), tokens * keys * (4 + 2));
    assert_eq!(bytes(CacheFormat::Int8, CacheFormat::Int8), tokens * 2 * (keys + layers * heads * 4));
    assert_eq!(bytes(CacheFormat::F16, CacheFormat::Int8), tokens * (keys * 2 + keys + layers * heads * 4));
    assert_eq!(bytes(CacheFormat::Fp8E4m3, CacheFormat::Fp8E5m2), tokens * keys * 2);
    assert_eq!(bytes(CacheFormat::Q8_0, CacheFormat::Q4_1), tokens * keys / 32 * (34 + 20));
}

#[test]
fn requests_end_for_the_reason_they_give() {
    let (decoder, tokenizer) = load(None, 1);
    let prompt = tokenizer.encode("And God said", true).unwrap();
    let end = |max_tokens: usize, capacity: usize| {
        let mut scheduler = Scheduler::new(&decoder, 2, capacity, DType::F32).unwrap();
        scheduler.submit(Request::new(prompt.clone()).max_tokens(max_tokens)).unwrap();
        let mut events = scheduler.run();
        assert!(scheduler.step().is_empty());
        (events.len(), events.pop().unwrap().finish)
    };
    assert_eq!(end(1, 64), (1, Some(Finish::MaxTokens)));
    assert_eq!(end(9, 64), (9, Some(Finish::MaxTokens)));
    // The last generated token needs no slot.
    assert_eq!(end(9, prompt.len() + 3), (4, Some(Finish::Full)));
}

/// In a model of one layer, keys and values depend only on the token and its position. A cache after an eviction is
/// then the cache of the text without the evicted tokens.
#[test]
fn forgetting_a_span_is_not_having_read_it() {
    let file = embedded::open().unwrap();
    let ids: Vec<u32> = (0..48).map(|i| (i * 151 + 7) % 2000).collect();
    // YaRN's factor on cosines and sines must not be applied twice to a key that is rotated again.
    let yarn = YarnScaling::new(4.0, 128.0).attention_factor(1.5).into();
    for scaling in [RopeScaling::None, yarn] {
        let (mut config, mut weights) = (file.config().clone(), file.weights(&|_, _| ()).unwrap());
        config.layers.truncate(1);
        weights.layers.truncate(1);
        config.ropes[0].stretch = Stretch::Fixed(scaling);
        let decoder = Decoder::new(config, weights, 0, None, Threads::new(2).unwrap()).unwrap().exact(true);
        let mut scratch = Scratch::default();
        let both = Rotate { k: true, v: true };
        let formats: [(Formats, f32); 10] = [
            (DType::F32.into(), 1e-4),
            (DType::F16.into(), 0.02),
            (DType::Bf16.into(), 0.2),
            (CacheFormat::Int8.into(), 0.2),
            (Formats::from(DType::F32).rotate(both), 1e-4),
            (Formats::from(DType::F16).rotate(both), 0.02),
            (Formats::from(CacheFormat::Int8).rotate(both), 0.2),
            (CacheFormat::Fp8E4m3.into(), 1.0),
            (CacheFormat::Q8_0.into(), 0.2),
            (Formats::new(CacheFormat::Int8, CacheFormat::F32), 0.2),
        ];
        for (formats, tolerance) in formats {
            let mut cache = Cache::new(decoder.config(), 2, 64, formats).unwrap();
            decoder.forward(&mut cache, &mut scratch, 0, &[&ids[..5], &ids[..40]], Logits::None).unwrap();
            decoder.evict(&mut cache, 1, 4..23).unwrap();
            decoder.evict(&mut cache, 1, 9..9).unwrap();
            assert_eq!(cache.lengths(), [5, 21]);
            let after = decoder.forward(&mut cache, &mut scratch, 1, &[&ids[40..]], Logits::Last).unwrap();

            let mut cache = Cache::new(decoder.config(), 1, 64, formats).unwrap();
            let text = [&ids[..4], &ids[23..]].concat();
            let never = decoder.forward(&mut cache, &mut scratch, 0, &[&text], Logits::Last).unwrap();
            let worst = after.iter().zip(&never).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
            eprintln!("{formats}: largest difference of a logit {worst:.2e}");
            assert!(worst < tolerance, "{formats}: {worst}");
        }
        let mut cache = Cache::new(decoder.config(), 1, 8, DType::F32).unwrap();
        decoder.forward(&mut cache, &mut scratch, 0, &[&ids[..6]], Logits::None).unwrap();
        assert!(decoder.evict(&mut cache, 1, 0..1).is_err() && decoder.evict(&mut cache, 0, 3..7).is_err());
        assert_eq!(cache.len(0), 6);
    }
}

/// Tokens that are forgotten one at a time, in a model of one layer: with the keys of the first tokens kept, the cache stays
/// that of the text without them. Keys that are rotated again and again drift away.
#[test]
fn kept_sinks_prevent_drift() {
    let file = embedded::open().unwrap();
    let (mut config, mut weights) = (file.config().clone(), file.weights(&|_, _| ()).unwrap());
    config.layers.truncate(1);
    weights.layers.truncate(1);
    let decoder = Decoder::new(config, weights, 0, None, Threads::new(2).unwrap()).unwrap();
    let ids: Vec<u32> = (0..230).map(|i| (i * 151 + 7) % 2000).collect();
    let (sinks, window) = (3, 20);
    let mut scratch = Scratch::default();
    for (format, tolerance) in [(DType::F32, 1e-4), (DType::F16, 0.02)] {
        let mut last = |kept: bool| {
            let mut cache = Cache::new(decoder.config(), 2, sinks + window, format).unwrap();
            if kept {
                cache.keep_sinks(sinks).unwrap();
            }
            let mut logits = Vec::new();
            for &id in &ids {
                if cache.room(0) == 0 {
                    decoder.evict(&mut cache, 0, sinks..sinks + 1).unwrap();
                }
                logits = decoder.forward(&mut cache, &mut scratch, 0, &[&[id]], Logits::Last).unwrap();
                // A copy of the row goes on in the same way.
                if cache.len(0) == 10 {
                    decoder.copy_prefix(&mut cache, 0, &[1], 10).unwrap();
                    decoder.copy_prefix(&mut cache, 1, &[0], 10).unwrap();
                }
            }
            logits
        };
        let (kept, drifted) = (last(true), last(false));
        let mut cache = Cache::new(decoder.config(), 1, 64, format).unwrap();
        let text = [&ids[..sinks], &ids[ids.len() - window..]].concat();
        let never = decoder.forward(&mut cache, &mut scratch, 0, &[&text], Logits::Last).unwrap();
        let worst = |a: &[f32]| a.iter().zip(&never).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        eprintln!("{format}: largest difference of a logit {:.2e}, drifted {:.2e}", worst(&kept), worst(&drifted));
        assert!(worst(&kept) < tolerance && (format == DType::F32 || worst(&kept) * 3.0 < worst(&drifted)));
    }
    let mut cache = Cache::new(decoder.config(), 1, 8, DType::F32).unwrap();
    assert!(cache.keep_sinks(9).is_err() && cache.keep_sinks(8).is_ok());
}

#[test]
fn streams_go_on_past_the_cache() {
    let (decoder, tokenizer) = load(None, 2);
    let prompt = tokenizer.encode("And it came to pass", true).unwrap();
    let streaming = Streaming::new(40).sinks(4);
    let capacity = streaming.capacity(512);
    assert_eq!(capacity, 54);
    let n = 3 * capacity;
    let whole = greedy(&decoder, &prompt, n, false);
    for formats in [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Int8, CacheFormat::Fp8E4m3].map(Formats::from) {
        let mut scheduler = Scheduler::new(&decoder, 2, capacity, formats).unwrap().streaming(Some(streaming)).unwrap();
        let requests = [(); 2].map(|()| scheduler.submit(Request::new(prompt.clone()).max_tokens(n)).unwrap());
        let mut texts = [vec![], vec![]];
        while !scheduler.is_idle() {
            for event in scheduler.step() {
                let text = &mut texts[usize::from(event.request == requests[1])];
                text.push(event.token.unwrap());
                assert_eq!(event.finish, (text.len() == n).then_some(Finish::MaxTokens));
            }
            assert!((0..2).all(|row| scheduler.cache().len(row) <= capacity));
        }
        let [ids, twin] = texts;
        assert_eq!((ids.len(), &twin), (n, &ids));
        // The token generated by a full row has seen all tokens.
        let before = capacity + 1 - prompt.len();
        if formats == CacheFormat::F32.into() {
            assert_eq!(ids[..before], whole[..before]);
        }
        // Every eviction leaves the sink tokens and the window without the token to come.
        let (fed, kept) = (prompt.len() + n - 1, 4 + 40 - 1);
        let times = (fed - capacity).div_ceil(capacity - kept);
        assert_eq!(scheduler.statistics().evicted, 2 * times * (capacity - kept));
        // The text continues, without repeating one token. With four bits of a key, it repeats some words.
        let least = if formats == CacheFormat::Fp8E4m3.into() { 2 } else { 5 };
        assert!(ids[n - 20..].iter().collect::<std::collections::HashSet<_>>().len() >= least, "{ids:?}");
    }
    // A prompt longer than the cache.
    let long: Vec<u32> = prompt.iter().copied().cycle().take(200).collect();
    let mut scheduler = Scheduler::new(&decoder, 1, capacity, DType::F32).unwrap().streaming(Some(streaming)).unwrap();
    scheduler.submit(Request::new(long).max_tokens(2)).unwrap();
    assert_eq!(scheduler.run().len(), 2);
    assert!(scheduler.cache().len(0) > 43 && scheduler.statistics().evicted >= 200 - capacity);

    let refused = |sinks, window| {
        let streaming = Streaming::new(window).sinks(sinks);
        Scheduler::new(&decoder, 1, 54, DType::F32).unwrap().streaming(Some(streaming)).is_err()
    };
    assert!(refused(4, 0) && refused(15, 40) && refused(usize::MAX, 2) && !refused(14, 40) && !refused(0, 1));
}

/// The same model as a Hugging Face directory: other names, another container, and the elements of a head in the order
/// for half-split pairs instead of neighbours.
#[test]
fn a_hugging_face_directory_is_the_same_model() {
    let file = embedded::open().unwrap();
    let c = file.config().clone();
    let (decoder, _) = load(None, 1);
    let gguf = file.gguf().unwrap();

    let floats = |name: &str| {
        let tensor = gguf.tensor(name).unwrap();
        let mut values = vec![0.0f32; tensor.elements()];
        dequantize(tensor.ty, tensor.data, &mut values).unwrap();
        (tensor.shape, values)
    };
    // Row 2i of a head becomes row i, row 2i + 1 becomes row i + dim / 2.
    let halves = |(shape, values): (Vec<usize>, Vec<f32>)| {
        let half = c.head_dim / 2;
        let source = |row: usize| {
            let (head, j) = (row / c.head_dim, row % c.head_dim);
            head * c.head_dim + 2 * (j % half) + j / half
        };
        let rows = (0..shape[0]).flat_map(|row| values[source(row) * shape[1]..][..shape[1]].to_vec());
        (shape.clone(), rows.collect::<Vec<f32>>())
    };
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), floats("token_embd.weight")),
        ("model.norm.weight".to_owned(), floats("output_norm.weight")),
    ];
    for i in 0..c.layers.len() {
        for (ours, theirs) in [
            ("attn_norm", "input_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ] {
            let tensor = floats(&format!("blk.{i}.{ours}.weight"));
            let tensor = if matches!(ours, "attn_q" | "attn_k") { halves(tensor) } else { tensor };
            tensors.push((format!("model.layers.{i}.{theirs}.weight"), tensor));
        }
    }
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": c.vocab, "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim, "num_hidden_layers": c.layers.len(), "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "max_position_embeddings": c.context, "rms_norm_eps": c.rms_eps,
        "rope_theta": c.ropes[0].base, "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("tiny-hf");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();

    // A chat template lies in a file of its own, or in the tokenizer's configuration, alone or among others.
    let _ = std::fs::remove_file(dir.join("chat_template.jinja"));
    for (name, text, want) in [
        ("tokenizer_config.json", r#"{"bos_token": "<s>"}"#, None),
        ("tokenizer_config.json", r#"{"chat_template": "one"}"#, Some("one")),
        ("tokenizer_config.json", r#"{"chat_template": 7}"#, None),
        (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#,
            Some("d"),
        ),
        ("chat_template.jinja", "file", Some("file")),
    ] {
        std::fs::write(dir.join(name), text).unwrap();
        assert_eq!(ModelFile::open(&dir).unwrap().config().chat_template.as_deref(), want, "{text}");
    }

    let file = ModelFile::open(&dir).unwrap();
    assert_eq!(file.config().ropes[0].pairing, Pairing::HalfSplit);
    let weights = file.weights(&|_, _| ()).unwrap();
    let other = Decoder::new(file.config().clone(), weights, 0, None, Threads::new(1).unwrap()).unwrap();
    for case in cases() {
        let ids = [case.prompt_ids, case.greedy_ids].concat();
        let logits = |decoder: &Decoder| {
            let mut cache = Cache::new(decoder.config(), 1, ids.len(), DType::F32).unwrap();
            decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&ids], Logits::All).unwrap()
        };
        let worst = logits(&decoder).iter().zip(logits(&other)).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        // q.k has the same products, added in another order.
        assert!(worst < 1e-4, "{worst}");
    }
}

/// What a run with a cache in a format has in its first layer is as far from f32 as is measured; later layers are exact up to there.
#[test]
fn cache_errors_are_those_of_a_run() {
    let (decoder, tokenizer) = load(None, 2);
    let ids = tokenizer.encode(include_str!("data/page.txt"), true).unwrap()[..300].to_vec();
    let (c, rotate) = (decoder.config(), Rotate { k: true, v: true });
    let formats = [
        CacheFormat::F32.into(),
        CacheFormat::F16.into(),
        Formats::from(CacheFormat::Int8).rotate(rotate),
        CacheFormat::Int8.into(),
        Formats::new(CacheFormat::F32, CacheFormat::Q4_0),
        CacheFormat::Q4_0.into(),
    ];
    let measured = |context: usize| cache_error(&decoder, &ids, (context, None), &formats, &mut |_| ()).unwrap();
    let found = measured(300);
    let read = |formats: Formats| {
        let mut cache = Cache::new(c, 1, ids.len(), formats).unwrap();
        decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&ids], Logits::None).unwrap();
        let shape = [1, ids.len(), c.kv_heads, c.head_dim];
        let [mut k, mut v] = [(); 2].map(|()| vec![0.0f32; shape.iter().product()]);
        let (k_cache, v_cache) = cache.views(0).unwrap();
        let targets = (ViewMut::new(&mut k, shape).unwrap(), ViewMut::new(&mut v, shape).unwrap());
        let mut read = KvRead::new(k_cache, v_cache, targets.0, targets.1, Source::positions(&[0]));
        // Heads of 32.
        let block = |rotated: bool| rotated.then_some(32);
        [read.k_hadamard, read.v_hadamard] = [block(formats.rotate.k), block(formats.rotate.v)];
        kv_read(decoder.context(), &Serial, read).unwrap();
        [k, v]
    };
    let near = |found: f64, want: f64| assert!((found - want).abs() <= 1e-9 * want.abs(), "{found}, not {want}");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let exact = read(CacheFormat::F32.into());
    for (&formats, layers) in formats.iter().zip(&found) {
        assert_eq!(layers.len(), c.layers.len());
        let here = read(formats);
        for (i, found) in [layers[0].k, layers[0].v].iter().enumerate() {
            let pairs = here[i].chunks(c.head_dim).zip(exact[i].chunks(c.head_dim));
            let cosines: Vec<f64> = pairs.map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).collect();
            let largest = here[i].iter().zip(&exact[i]).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
            near(found.mean_cosine, cosines.iter().sum::<f64>() / cosines.len() as f64);
            near(found.least_cosine, cosines.iter().copied().fold(1.0, f64::min));
            let rms = (dot(&exact[i], &exact[i]) / exact[i].len() as f64).sqrt();
            near(found.largest_error, largest.fold(0.0, f64::max) / rms);
        }
    }
    for layer in 0..c.layers.len() {
        let attention: Vec<f64> = found.iter().map(|layers| layers[layer].attention.largest_error).collect();
        assert!(attention[0] == 0.0 && found[0][layer].k.largest_error == 0.0, "{attention:?}");
        assert!(attention[0] < attention[1] && attention[1] < attention[2].min(attention[3]), "{attention:?}");
        assert!(attention[2].max(attention[3]) < attention[5], "{attention:?}");
        assert!(found[4][layer].k.largest_error == 0.0 && found[4][layer].v == found[5][layer].v);
    }
    // Values of the first layer are those of their tokens, wherever these stand.
    near(measured(70)[5][0].v.mean_cosine, found[5][0].v.mean_cosine);
    for (ids, context) in [(&ids[..0], 100), (&ids[..], 1)] {
        assert!(cache_error(&decoder, ids, (context, None), &formats, &mut |_| ()).is_err());
    }
}

/// Perplexity is that of logits computed at once, in a window and in windows.
#[test]
fn perplexity_is_that_of_the_logits() {
    let (decoder, tokenizer) = load(None, 2);
    let ids = tokenizer.encode(include_str!("data/page.txt"), true).unwrap()[..300].to_vec();
    let formats = Formats::from(CacheFormat::Fp8E4m3);
    let loss = |ids: &[u32]| -> f64 {
        let mut cache = Cache::new(decoder.config(), 1, ids.len(), formats).unwrap();
        let logits = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[ids], Logits::All).unwrap();
        let vocab = decoder.config().vocab;
        let of = |(i, &next): (usize, &u32)| {
            let row = &logits[i * vocab..(i + 1) * vocab];
            row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln() - f64::from(row[next as usize])
        };
        ids[1..].iter().enumerate().map(of).sum()
    };
    let measured = |context: usize, first: Option<u32>| {
        perplexity(&decoder, &ids, (context, first), formats, None, &mut |_| ()).unwrap()
    };
    let near = |found: f64, want: f64| assert!((found / want - 1.0).abs() < 1e-5, "{found}, not {want}");
    let whole = measured(512, None);
    assert_eq!((whole.tokens, whole.distance), (299, None));
    near(whole.perplexity, (loss(&ids) / 299.0).exp());
    // 100, then a token to begin with and 99, 99 and 2.
    let start = ids[0];
    let parts =
        [&ids[1..100], &ids[100..199], &ids[199..298], &ids[298..]].map(|part| loss(&[&[start], part].concat()));
    let windows = measured(100, Some(start));
    assert_eq!(windows.tokens, 299);
    near(windows.perplexity, (parts.iter().sum::<f64>() / 299.0).exp());
    // Without such a token the first of a window is not predicted.
    assert_eq!(measured(100, None).tokens, 297);
    for (ids, context) in [(&ids[..1], 100), (&ids[..], 1)] {
        assert!(perplexity(&decoder, ids, (context, None), formats, None, &mut |_| ()).is_err());
    }
}
