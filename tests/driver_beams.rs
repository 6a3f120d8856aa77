//! Beam search on the embedded model: by table and by copying, against the model's own probabilities, and its limits.
#![cfg(feature = "driver")]

use kvlane::driver::{
    BeamOptions, BeamSearch, Cache, Decoder, EarlyStopping, Formats, Hypothesis, Logits, Scratch, Threads, Tokenizer,
    argmax, embedded,
};
use kvlane::{CacheFormat, DType, Isa};

fn load(isa: Option<Isa>, threads: usize) -> (Decoder, Tokenizer) {
    let file = embedded::open().unwrap();
    let threads = Threads::new(threads).unwrap();
    let weights = threads.run(|| file.weights(&|_, _| ())).unwrap();
    let decoder = Decoder::new(file.config().clone(), weights, 0, isa, threads).unwrap();
    (decoder, file.tokenizer().unwrap())
}

fn search(decoder: &Decoder, cache: Cache, prompt: &[u32], options: BeamOptions) -> Vec<Hypothesis> {
    let mut search = BeamSearch::new(decoder, cache, prompt, options).unwrap();
    while search.step().unwrap() {}
    assert!(!search.step().unwrap());
    search.hypotheses()
}

/// With every bit of the scores.
fn bits(found: &[Hypothesis]) -> Vec<(&[u32], [u64; 2])> {
    found.iter().map(|h| (&h.tokens[..], [h.log_probability.to_bits(), h.score.to_bits()])).collect()
}

#[test]
fn beams_by_table_are_beams_by_copy() {
    for level in Isa::ALL.into_iter().filter(|l| l.is_available()) {
        let (decoder, tokenizer) = load(Some(level), 2);
        for (i, text) in ["And it came to pass", "The", "And God said, Let there be"].into_iter().enumerate() {
            let prompt = tokenizer.encode(text, true).unwrap();
            for (beams, format) in [2, 3, 5, 9].into_iter().zip(CacheFormat::ALL.into_iter().cycle().skip(i)) {
                let options = BeamOptions::new(beams, 24);
                let capacity = prompt.len() + 23;
                let copied = Cache::new(decoder.config(), beams, capacity, format).unwrap();
                let shared = Cache::with_beams(decoder.config(), beams, capacity, format).unwrap();
                let [copied, shared] = [copied, shared].map(|cache| search(&decoder, cache, &prompt, options));
                assert_eq!(shared.len(), beams);
                assert_eq!(bits(&shared), bits(&copied), "{level}, {beams} beams, {format}, {text:?}");
            }
        }
    }
}

/// Beams do share: had every one kept to its own row, no token of another would be read.
#[test]
fn no_token_moves() {
    let (decoder, tokenizer) = load(None, 1);
    let prompt = tokenizer.encode("And it came to pass", true).unwrap();
    let cache = Cache::with_beams(decoder.config(), 4, 64, DType::F32).unwrap();
    let mut search = BeamSearch::new(&decoder, cache, &prompt, BeamOptions::new(4, 20)).unwrap();
    for _ in 0..8 {
        assert!(search.step().unwrap());
    }
    assert_eq!(search.cache().lengths(), [prompt.len() as i32 + 7; 4]);
    let running = search.hypotheses();
    assert!(running.iter().all(|h| h.tokens.len() == 8));

    // Rows that were emptied cannot take the slots of tokens that others have.
    let mut cache = search.into_cache();
    let mut scratch = Scratch::default();
    cache.reset(0);
    let refused = decoder.forward(&mut cache, &mut scratch, 0, &[&prompt], Logits::None).unwrap_err().to_string();
    assert!(refused.contains("row 0 would write its position 0 again"), "{refused}");
    assert_eq!(cache.len(0), 0);
    let refused = decoder.evict(&mut cache, 1, 0..1).unwrap_err().to_string();
    assert!(refused.contains("rows share tokens"), "{refused}");
    (1..4).for_each(|row| cache.reset(row));
    decoder.forward(&mut cache, &mut scratch, 0, &[&prompt], Logits::None).unwrap();
}

/// The model's probability of a hypothesis, computed in one pass, is the one that the search has added up.
#[test]
fn scores_are_the_models() {
    let (decoder, tokenizer) = load(None, 0);
    let vocab = decoder.config().vocab;
    let prompt = tokenizer.encode("And he said unto them,", true).unwrap();
    for penalty in [1.0, 0.0, 2.0, -0.5] {
        let options = BeamOptions::new(4, 16).length_penalty(penalty);
        let cache = Cache::with_beams(decoder.config(), 4, 64, DType::F32).unwrap();
        let found = search(&decoder, cache, &prompt, options);
        assert!(found.is_sorted_by(|a, b| a.score >= b.score));
        for h in &found {
            let ids = [&prompt[..], &h.tokens[..h.tokens.len() - 1]].concat();
            let mut cache = Cache::new(decoder.config(), 1, ids.len(), DType::F32).unwrap();
            let logits = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&ids], Logits::All).unwrap();
            let rows = logits.chunks_exact(vocab).skip(prompt.len() - 1);
            let sum: f64 = rows
                .zip(&h.tokens)
                .map(|(row, &token)| {
                    let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
                    f64::from(row[token as usize]) - sum.ln()
                })
                .sum();
            assert!((sum - h.log_probability).abs() < 1e-4, "{sum} for {}", h.log_probability);
            let score = sum / (h.tokens.len() as f64).powf(penalty);
            assert!((score - h.score).abs() < 1e-4 * (1.0 + score.abs()), "{score} for {}", h.score);
        }
    }
}

/// Plain search without a cache, over sequences instead of rows.
#[test]
fn a_search_without_cache_finds_the_same() {
    let (decoder, tokenizer) = load(None, 0);
    let config = decoder.config();
    let prompt = tokenizer.encode("And God said", true).unwrap();
    let n = 10;
    for beams in [1, 2, 4] {
        let mut running = vec![(0.0, Vec::new())];
        for _ in 0..n {
            let mut next = Vec::new();
            for (score, tokens) in &running {
                let ids = [&prompt[..], tokens].concat();
                let mut cache = Cache::new(config, 1, ids.len(), DType::F32).unwrap();
                let logits = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&ids], Logits::Last).unwrap();
                let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
                next.extend(
                    logits
                        .iter()
                        .zip(0..)
                        .map(|(&l, token)| (score + f64::from(l) - sum.ln(), [&tokens[..], &[token]].concat())),
                );
            }
            next.sort_by(|a: &(f64, Vec<u32>), b| b.0.total_cmp(&a.0));
            next.truncate(beams);
            assert!(next.iter().all(|(_, t)| !config.eos.contains(&t[t.len() - 1])), "choose a prompt that goes on");
            running = next;
        }
        let cache = Cache::with_beams(config, beams, 64, DType::F32).unwrap();
        let found = search(&decoder, cache, &prompt, BeamOptions::new(beams, n));
        assert_eq!(found.len(), beams);
        for (h, (score, tokens)) in found.iter().zip(&running) {
            assert_eq!(h.tokens, *tokens, "{beams} beams");
            assert!((h.log_probability - score).abs() < 1e-4, "{} for {score}", h.log_probability);
        }
    }
}

#[test]
fn one_beam_is_greedy() {
    let (decoder, tokenizer) = load(None, 0);
    let prompt = tokenizer.encode("And God said", true).unwrap();
    let mut cache = Cache::new(decoder.config(), 1, 64, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    let (mut next, mut greedy) = (prompt.clone(), Vec::new());
    for _ in 0..20 {
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &[&next], Logits::Last).unwrap();
        next = vec![argmax(&logits).unwrap()];
        greedy.extend(&next);
    }
    assert!(!decoder.config().eos.contains(&greedy[19]));
    let cache = Cache::with_beams(decoder.config(), 1, 64, DType::F32).unwrap();
    assert_eq!(search(&decoder, cache, &prompt, BeamOptions::new(1, 20))[0].tokens, greedy);
}

/// A model whose every token ends the text, or half of them do: hypotheses of different lengths compete.
#[test]
fn ways_of_stopping_differ() {
    let file = embedded::open().unwrap();
    let prompt = file.tokenizer().unwrap().encode("And the LORD", true).unwrap();
    let with_eos = |eos: Vec<u32>| {
        let mut config = file.config().clone();
        config.eos = eos;
        let weights = file.weights(&|_, _| ()).unwrap();
        Decoder::new(config, weights, 0, None, Threads::new(2).unwrap()).unwrap()
    };
    let run = |decoder: &Decoder, beams: usize, early_stopping, length_penalty, format: Formats| {
        let options = BeamOptions::new(beams, 24).early_stopping(early_stopping).length_penalty(length_penalty);
        let cache = Cache::with_beams(decoder.config(), beams, 64, format).unwrap();
        let mut search = BeamSearch::new(decoder, cache, &prompt, options).unwrap();
        let mut steps = 1;
        while search.step().unwrap() {
            steps += 1;
        }
        (steps, search.hypotheses())
    };
    let f32 = Formats::from(DType::F32);
    let vocab = file.config().vocab as u32;
    let all = with_eos((0..vocab).collect());
    for stopping in [EarlyStopping::Heuristic, EarlyStopping::First, EarlyStopping::Never] {
        let (steps, found) = run(&all, 3, stopping, 1.0, f32);
        assert_eq!((steps, found.len()), (1, 3), "{stopping:?}");
        assert!(found.iter().all(|h| h.tokens.len() == 1));
    }

    let some = with_eos((0..vocab).filter(|token| token % 9 == 0).collect());
    let of = |stopping, penalty| run(&some, 4, stopping, penalty, f32);
    let (first, found) = of(EarlyStopping::First, 1.0);
    let (heuristic, better) = of(EarlyStopping::Heuristic, 1.0);
    let (never, best) = of(EarlyStopping::Never, 1.0);
    assert!(first < 24 && first <= heuristic && heuristic <= never, "{first} {heuristic} {never}");
    assert!(first < never, "the ways of stopping are to differ");
    for (a, b) in found.iter().zip(&better).chain(better.iter().zip(&best)) {
        assert!(a.score <= b.score, "{a:?} {b:?}");
    }
    for h in [found, better, best].iter().flatten() {
        let (last, before) = h.tokens.split_last().unwrap();
        assert!(last % 9 == 0 || h.tokens.len() == 24, "{h:?}");
        assert!(before.iter().all(|token| token % 9 != 0), "{h:?}");
    }
    // A larger penalty favours longer texts.
    let mean = |penalty| {
        let (_, found) = of(EarlyStopping::Never, penalty);
        found.iter().map(|h| h.tokens.len()).sum::<usize>()
    };
    assert!(mean(0.0) < mean(3.0));
}

#[test]
fn bad_arguments_are_sentences() {
    let (decoder, _) = load(None, 1);
    let cache = |rows, capacity| Cache::with_beams(decoder.config(), rows, capacity, DType::F32).unwrap();
    let refused = |cache: Cache, prompt: &[u32], options: BeamOptions| {
        BeamSearch::new(&decoder, cache, prompt, options).unwrap_err().to_string()
    };
    let plain = BeamOptions::new(2, 4);
    for (sentence, part) in [
        (refused(cache(3, 8), &[1], plain), "2 beams for a cache of 3 rows"),
        (refused(cache(0, 8), &[1], BeamOptions::new(0, 4)), "0 beams"),
        (refused(cache(2, 8), &[1], BeamOptions::new(2, 0)), "2 beams for 0 tokens"),
        (refused(cache(2, 8), &[], plain), "a prompt of 0 tokens"),
        (refused(cache(2, 8), &[1; 6], plain), "a prompt of 6 tokens and 4 more"),
        (refused(cache(2, 8), &[1], plain.length_penalty(f64::NAN)), "length penalty is NaN"),
    ] {
        assert!(sentence.contains(part), "{sentence:?} lacks {part:?}");
    }
    // Exactly full, and a token that the model does not have.
    assert!(BeamSearch::new(&decoder, cache(2, 8), &[1; 5], plain).is_ok());
    let mut search = BeamSearch::new(&decoder, cache(2, 8), &[1, u32::MAX], plain).unwrap();
    assert!(search.step().is_err());
    assert!(!search.step().unwrap() && search.hypotheses().is_empty());
    assert!(decoder.reorder(&mut cache(2, 8), &[0]).is_err() && decoder.reorder(&mut cache(2, 8), &[0, 2]).is_err());
}

#[test]
fn kept_tokens_close_the_gaps() {
    let (decoder, _) = load(None, 1);
    let ids: Vec<u32> = (0..20).map(|i| (i * 131 + 5) % 2000).collect();
    let fill = |mut cache: Cache| {
        decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&ids], Logits::None).unwrap();
        cache
    };
    let mut cache = fill(Cache::without_rings(decoder.config(), 2, 32, DType::F32).unwrap());
    for bad in [&[3][..], &[20], &[8, 8], &[9, 8]] {
        assert!(decoder.keep(&mut cache, 0, 5, bad).is_err(), "{bad:?}");
    }
    assert!(decoder.keep(&mut cache, 0, 21, &[]).is_err());
    assert_eq!(cache.len(0), 20);
    decoder.keep(&mut cache, 0, 5, &[5, 6, 9, 10, 14]).unwrap();
    assert_eq!(cache.len(0), 10);
    decoder.keep(&mut cache, 0, 5, &[5, 6]).unwrap();
    assert_eq!(cache.len(0), 7);
    decoder.keep(&mut cache, 0, 3, &[]).unwrap();
    assert_eq!(cache.lengths(), [3, 0]);
    // Runs from the start need no move, in any cache; others cannot be in one of beams.
    let mut beams = fill(Cache::with_beams(decoder.config(), 1, 32, DType::F32).unwrap());
    assert!(decoder.keep(&mut beams, 0, 5, &[6]).is_err());
    decoder.keep(&mut beams, 0, 5, &[5, 6]).unwrap();
    assert_eq!(beams.len(0), 7);
}
