//! Guesses on the embedded model: the text is that without guesses, whatever guesses.
#![cfg(feature = "driver")]

use kvlane::driver::{
    Cache, Decoder, Error, Finish, Formats, Logits, Sampler, SamplerOptions, Scratch, Speculation, SpeculationOptions,
    SpeculationStatistics, Threads, Tokenizer, TreePass, check_vocabularies, embedded,
};
use kvlane::{CacheFormat, DType};

/// The embedded model, of which a draft has the first layers only.
fn load(layers: usize, eos: &[u32]) -> (Decoder, Tokenizer) {
    let file = embedded::open().unwrap();
    let threads = Threads::new(2).unwrap();
    let (mut config, mut weights) = (file.config().clone(), threads.run(|| file.weights(&|_, _| ())).unwrap());
    config.layers.truncate(layers);
    weights.layers.truncate(layers);
    config.eos.extend_from_slice(eos);
    let decoder = Decoder::new(config, weights, 0, None, threads).unwrap();
    (decoder, file.tokenizer().unwrap())
}

/// The text without guesses.
fn plain(decoder: &Decoder, prompt: &[u32], n: usize, sampling: SamplerOptions, formats: Formats) -> Vec<u32> {
    let mut cache = Cache::new(decoder.config(), 1, prompt.len() + n, formats).unwrap();
    let (mut scratch, mut sampler) = (Scratch::default(), Sampler::new(sampling).unwrap());
    let (mut next, mut text) = (prompt.to_vec(), Vec::new());
    while text.len() < n {
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &[&next], Logits::Last).unwrap();
        let token = sampler.sample(&logits).unwrap();
        text.push(token);
        next = vec![token];
        if decoder.config().eos.contains(&token) {
            break;
        }
    }
    text
}

fn guessed(
    decoder: &Decoder,
    draft: Option<&Decoder>,
    prompt: &[u32],
    options: SpeculationOptions,
    formats: Formats,
) -> (Vec<u32>, SpeculationStatistics) {
    let cache = |decoder: &Decoder| {
        Cache::without_rings(decoder.config(), 1, prompt.len() + options.max_tokens, formats).unwrap()
    };
    let mut text = Speculation::new(decoder, cache(decoder), prompt, options).unwrap();
    if let Some(draft) = draft {
        text = text.draft(draft, cache(draft)).unwrap();
    }
    let mut tokens = Vec::new();
    while text.finish().is_none() {
        tokens.extend(text.step().unwrap());
    }
    assert_eq!(tokens, text.tokens());
    let s = text.statistics();
    assert_eq!((s.tokens, s.held + s.passes + 1 >= s.tokens), (tokens.len(), true));
    assert!(s.held <= s.guesses && s.guesses <= s.passes * options.ahead * options.branches, "{s:?}");
    assert!(text.step().unwrap().is_empty());
    (tokens, s)
}

#[test]
fn greedy_text_is_the_greedy_text() {
    let (decoder, tokenizer) = load(4, &[]);
    let drafts = [load(4, &[]).0, load(3, &[]).0, load(1, &[]).0];
    let greedy = SamplerOptions::new();
    for (text, format) in ["And it came to pass", "And the LORD spake unto Moses, saying,", "The"].into_iter().zip([
        CacheFormat::F32,
        CacheFormat::Int8,
        CacheFormat::Bf16,
    ]) {
        let formats = Formats::from(format);
        let prompt = tokenizer.encode(text, true).unwrap();
        let expected = plain(&decoder, &prompt, 60, greedy, formats);
        for (ahead, branches) in [(1, 1), (4, 1), (7, 1), (3, 2), (4, 3), (2, 7)] {
            let options = SpeculationOptions::new(60).ahead(ahead).branches(branches);
            let (tokens, lookup) = guessed(&decoder, None, &prompt, options.lookup(3), formats);
            assert_eq!(tokens, expected, "lookup, {ahead} x {branches}, {format}, {text:?}");
            assert!(lookup.held > 0);
            for draft in &drafts {
                let (tokens, s) = guessed(&decoder, Some(draft), &prompt, options, formats);
                assert_eq!(tokens, expected, "draft, {ahead} x {branches}, {format}, {text:?}");
                assert!(s.held > 0 && s.passes < 60);
                let (tokens, _) = guessed(&decoder, Some(draft), &prompt, options.lookup(2), formats);
                assert_eq!(tokens, expected);
            }
        }
        // The model itself is always right: every pass but the last has as many tokens as can be.
        let options = SpeculationOptions::new(60).ahead(4);
        let (_, s) = guessed(&decoder, Some(&drafts[0]), &prompt, options, formats);
        assert_eq!((s.held, s.passes, s.guesses), (47, 12, 47));
    }
}

/// Guesses that are not drawn take no random number and change none, and one branch changes no bit.
#[test]
fn sampled_text_with_lookup_is_the_sampled_text() {
    let (decoder, tokenizer) = load(4, &[]);
    let prompt = tokenizer.encode("And the LORD said", true).unwrap();
    for seed in 0..4 {
        let sampling = SamplerOptions::new().temperature(0.6).top_p(0.9).seed(seed);
        let expected = plain(&decoder, &prompt, 80, sampling, DType::F32.into());
        let options = SpeculationOptions::new(80).sampling(sampling).lookup(2).ahead(5);
        let (tokens, s) = guessed(&decoder, None, &prompt, options, DType::F32.into());
        assert_eq!(tokens, expected, "seed {seed}");
        assert!(s.guesses > 0);
    }
}

/// Each node of a tree has the logits that it has as the only continuation, and those of the first branch are the same to
/// the bit. So it stays when the tree is one path.
#[test]
fn a_node_is_its_path_alone() {
    let (decoder, tokenizer) = load(4, &[]);
    let vocab = decoder.config().vocab;
    let text = tokenizer.encode("And it came to pass in those days", true).unwrap();
    // The parents of nodes 1 to 6; node 0 is the last token of the text.
    let parents = [0, 1, 0, 3, 3, 2];
    let tokens: Vec<u32> = (0..7).map(|i| if i == 0 { text[text.len() - 1] } else { 300 + 7 * i }).collect();
    let paths: Vec<Vec<usize>> = (0..7)
        .map(|node| {
            let mut path = vec![node];
            while path[0] > 0 {
                path.insert(0, parents[path[0] - 1]);
            }
            path
        })
        .collect();
    for format in CacheFormat::ALL {
        let mut scratch = Scratch::default();
        let base = text.len() - 1;
        let mut cache = Cache::without_rings(decoder.config(), 2, 48, format).unwrap();
        // The other row has tokens too. Each row is computed in a pass of its own, as it is below.
        decoder.forward(&mut cache, &mut scratch, 0, &[&text[..3]], Logits::None).unwrap();
        decoder.forward(&mut cache, &mut scratch, 1, &[&text[..base]], Logits::None).unwrap();
        let positions: Vec<i32> = paths.iter().map(|path| (base + path.len() - 1) as i32).collect();
        let visible: Vec<u8> = paths.iter().map(|path| path.iter().fold(0, |bits, node| bits | 1 << node)).collect();
        let tree = TreePass { positions: &positions, first_key: base, visible: &visible };
        let all = decoder.forward_tree(&mut cache, &mut scratch, 1, &tokens, &tree).unwrap();
        assert_eq!(cache.lengths(), [3, base as i32 + 7]);

        let mut worst = 0.0f32;
        for (path, found) in paths.iter().zip(all.chunks_exact(vocab)) {
            let ids: Vec<u32> = path.iter().map(|&node| tokens[node]).collect();
            let mut alone = Cache::new(decoder.config(), 1, 48, format).unwrap();
            decoder.forward(&mut alone, &mut scratch, 0, &[&text[..base]], Logits::None).unwrap();
            let logits = decoder.forward(&mut alone, &mut scratch, 0, &[&ids], Logits::Last).unwrap();
            if path.iter().copied().eq(0..path.len()) {
                assert!(found == logits, "{path:?} {format}");
            }
            worst = found.iter().zip(&logits).fold(worst, |w, (a, b)| w.max((a - b).abs()));
        }
        // A rounding may fall on the other side: of inputs of linear layers, and in the cache of all formats but f32.
        let tolerance = match format {
            CacheFormat::F32 => 1e-3,
            CacheFormat::F16 | CacheFormat::Bf16 | CacheFormat::Int8 | CacheFormat::Q8_0 => 0.2,
            _ => 1.0,
        };
        assert!(worst < tolerance, "{worst} {format}");

        let kept = [0, 3, 5].map(|node| base + node);
        decoder.keep(&mut cache, 1, base, &kept).unwrap();
        let after = decoder.forward(&mut cache, &mut scratch, 1, &[&[9, 10]], Logits::Last).unwrap();
        let ids: Vec<u32> = text[..base].iter().copied().chain([0, 3, 5].map(|n| tokens[n])).chain([9, 10]).collect();
        let mut alone = Cache::new(decoder.config(), 1, 48, format).unwrap();
        let logits = decoder.forward(&mut alone, &mut scratch, 0, &[&ids], Logits::Last).unwrap();
        let worst = after.iter().zip(&logits).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        assert!(worst < tolerance, "{worst} {format}");
    }
    let mut cache = Cache::without_rings(decoder.config(), 1, 8, DType::F32).unwrap();
    for (positions, visible, first_key) in [(&[0][..], &[1, 3][..], 0), (&[0, 1], &[1], 0), (&[0, 1], &[1, 3], 3)] {
        let tree = TreePass { positions, first_key, visible };
        assert!(decoder.forward_tree(&mut cache, &mut Scratch::default(), 0, &[5, 6], &tree).is_err());
        assert_eq!(cache.len(0), 0);
    }
}

#[test]
fn texts_end_for_the_reason_they_give() {
    let (decoder, tokenizer) = load(4, &[]);
    let prompt = tokenizer.encode("And it came to pass", true).unwrap();
    let greedy = plain(&decoder, &prompt, 40, SamplerOptions::new(), DType::F32.into());
    let run = |decoder: &Decoder, draft: &Decoder, capacity: usize, max_tokens: usize, branches: usize| {
        let cache = |decoder: &Decoder| Cache::without_rings(decoder.config(), 1, capacity, DType::F32).unwrap();
        let options = SpeculationOptions::new(max_tokens).ahead(6).branches(branches);
        let text = Speculation::new(decoder, cache(decoder), &prompt, options).unwrap();
        let mut text = text.draft(draft, cache(draft)).unwrap();
        while text.finish().is_none() {
            text.step().unwrap();
        }
        (text.tokens().to_vec(), text.finish().cloned())
    };
    for branches in [1, 3] {
        for n in [1, 2, 5, 17] {
            assert_eq!(run(&decoder, &decoder, 99, n, branches), (greedy[..n].to_vec(), Some(Finish::MaxTokens)));
            // The last token needs no room.
            let full = run(&decoder, &decoder, prompt.len() + n - 1, 40, branches);
            assert_eq!(full, (greedy[..n].to_vec(), Some(Finish::Full)));
        }
        // A token in the middle of a path of guesses ends the text.
        let (ending, _) = load(4, &greedy[9..10]);
        let end = greedy.iter().position(|&token| token == greedy[9]).unwrap();
        assert_eq!(run(&ending, &decoder, 99, 40, branches), (greedy[..=end].to_vec(), Some(Finish::Eos)));
    }
    // A draft with room for less than the text stops guessing.
    let cache = |capacity| Cache::without_rings(decoder.config(), 1, capacity, DType::F32).unwrap();
    let text = Speculation::new(&decoder, cache(99), &prompt, SpeculationOptions::new(40)).unwrap();
    let mut text = text.draft(&decoder, cache(prompt.len() + 12)).unwrap();
    while text.finish().is_none() {
        text.step().unwrap();
    }
    assert_eq!(text.tokens(), greedy);
    assert!((4..20).contains(&text.statistics().held), "{:?}", text.statistics());
}

#[test]
fn bad_arguments_are_sentences() {
    let (decoder, tokenizer) = load(4, &[]);
    let cache = |rows, capacity| Cache::without_rings(decoder.config(), rows, capacity, DType::F32).unwrap();
    let options = SpeculationOptions::new(8);
    let refused = |cache: Cache, prompt: &[u32], options| Speculation::new(&decoder, cache, prompt, options).err();
    let sentence = |e: Option<Error>| e.unwrap().to_string();
    for (found, part) in [
        (sentence(refused(cache(1, 8), &[], options)), "a prompt of 0 tokens"),
        (sentence(refused(cache(1, 8), &[1; 9], options)), "a prompt of 9 tokens for a cache of 1 rows of 8"),
        (sentence(refused(cache(0, 8), &[1], options)), "a cache of 0 rows"),
        (sentence(refused(cache(1, 8), &[1], SpeculationOptions::new(0))), "0 tokens to generate"),
        (
            sentence(refused(
                Cache::with_beams(decoder.config(), 1, 8, DType::F32).unwrap(),
                &[1],
                options.branches(2),
            )),
            "2 branches of guesses",
        ),
        (
            sentence(
                Speculation::new(&decoder, cache(1, 8), &[1], options).unwrap().draft(&decoder, cache(0, 8)).err(),
            ),
            "0 rows for the draft",
        ),
    ] {
        assert!(found.contains(part), "{found:?} lacks {part:?}");
    }
    let mut broken = Speculation::new(&decoder, cache(1, 8), &[u32::MAX], options).unwrap();
    assert!(broken.step().is_err());
    assert!(matches!(broken.finish(), Some(Finish::Error(sentence)) if sentence.contains("4294967295")));
    check_vocabularies(&tokenizer, &tokenizer).unwrap();
}

/// Drawn guesses follow the draft, so that the text is another one with the same seed, but each is the same every time.
#[test]
fn one_seed_one_text() {
    let (decoder, tokenizer) = load(4, &[]);
    let (draft, _) = load(3, &[]);
    let prompt = tokenizer.encode("And the LORD said", true).unwrap();
    let text = |seed, branches| {
        let sampling = SamplerOptions::new().temperature(0.9).top_p(0.95).seed(seed);
        let options = SpeculationOptions::new(40).sampling(sampling).branches(branches);
        guessed(&decoder, Some(&draft), &prompt, options, DType::F32.into())
    };
    for branches in [1, 3] {
        let (first, s) = text(1, branches);
        assert_eq!(text(1, branches), (first.clone(), s));
        assert!(s.held > 0 && text(2, branches).0 != first);
    }
}
