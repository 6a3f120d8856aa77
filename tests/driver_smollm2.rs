//! SmolLM2-135M-Instruct compared with Hugging Face transformers on the same file
//! (`tests/data/make_smollm2_reference.py` makes the reference).
//!
//! The model is read from the path in `KVLANE_SMOLLM2`, or from `kvlane/` in the user's cache directory. Without it
//! these tests print a message and pass, unless `KVLANE_REQUIRE_MODELS` is set, which makes it a failure.
#![cfg(feature = "driver")]

mod model_reference;

use std::sync::LazyLock;

use kvlane::DType;
use kvlane::driver::argmax;
use kvlane::driver::{
    BeamOptions, BeamSearch, Cache, ChatTemplate, Decoder, EarlyStopping, Finish, Logits, Message, Request, Scheduler,
    Scratch, Speculation, SpeculationOptions, Tokenizer,
};
use model_reference::{Prompt, Reference, open_model};
use serde::Deserialize;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

static REFERENCE: LazyLock<Reference> = LazyLock::new(|| Reference::read(include_str!("data/smollm2_reference.json")));

/// The tests share one model. Its linear layers compute in f32, as the reference's do.
static MODEL: LazyLock<Option<(Decoder, Tokenizer)>> = LazyLock::new(|| open_model("KVLANE_SMOLLM2", FILE, true));

/// The same model with linear layers as they are by default: their inputs are rounded to sixteen bits.
static ROUNDING: LazyLock<Option<Decoder>> = LazyLock::new(|| open_model("KVLANE_SMOLLM2", FILE, false).map(|m| m.0));

/// A pass over `ids` with an empty cache; logits for every token.
fn recompute(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    let mut cache = Cache::new(decoder.config(), 1, ids.len(), DType::F32).unwrap();
    decoder.forward(&mut cache, &mut Scratch::default(), 0, &[ids], Logits::All).unwrap()
}

/// The tokens of several steps, and the logits from which each was chosen.
type Steps = (Vec<u32>, Vec<Vec<f32>>);

/// Prefill, then one token at a time.
fn cached(decoder: &Decoder, prompt: &[u32], n: usize, dtype: DType) -> Steps {
    let mut cache = Cache::new(decoder.config(), 1, prompt.len() + n, dtype).unwrap();
    let mut scratch = Scratch::default();
    let (mut tokens, mut all) = (Vec::new(), Vec::new());
    let mut next = prompt.to_vec();
    for _ in 0..n {
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &[&next], Logits::Last).unwrap();
        next = vec![argmax(&logits).unwrap()];
        tokens.extend(&next);
        all.push(logits);
    }
    assert_eq!(cache.len(0), prompt.len() + n - 1);
    (tokens, all)
}

/// Greedy decoding of every prompt through an f32 cache, done once for all tests.
static DECODED: LazyLock<Vec<Steps>> = LazyLock::new(|| {
    let Some((decoder, _)) = MODEL.as_ref() else { return Vec::new() };
    REFERENCE.prompts.iter().map(|p| cached(decoder, &p.ids, p.greedy.len(), DType::F32)).collect()
});

#[test]
fn tokens_are_the_references() {
    let Some((_, tokenizer)) = MODEL.as_ref() else { return };
    for case in &REFERENCE.tokenizer {
        assert_eq!(tokenizer.encode(&case.text, true).unwrap(), case.ids, "{:?}", case.text);
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for &id in &case.ids {
            text += &stream.push(id).unwrap();
        }
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(&case.ids).unwrap());
        if !case.text.contains("<|") {
            assert_eq!(text, case.text);
        }
    }
    for case in &REFERENCE.prompts {
        assert_eq!(tokenizer.encode(&case.text, true).unwrap(), case.ids, "{:?}", case.text);
    }
}

/// Both sides round every product of 30 layers to f32, in different orders. Logits reach 30, where a unit in the last
/// place is 2e-6; the largest observed difference is 1.4e-4 (2.3e-4 between decode and recomputation, which also sum
/// in different orders), and the data has four decimals. A wrong angle, scale or mask causes errors of tenths.
const TOLERANCE: f64 = 1e-3;

#[test]
fn logits_are_the_references() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let mut worst = 0.0f64;
    for case in &REFERENCE.prompts {
        let ids = [case.ids.as_slice(), &case.greedy[..case.greedy.len() - 1]].concat();
        let logits = recompute(decoder, &ids);
        for (i, &position) in case.positions.iter().enumerate() {
            let row = &logits[position * decoder.config().vocab..][..decoder.config().vocab];
            worst = worst.max(REFERENCE.check_logits(case, i, row, TOLERANCE));
        }
    }
    eprintln!("largest difference of a logit: {worst:.2e}");
}

#[test]
fn greedy_tokens_are_the_references() {
    for (case, (tokens, _)) in REFERENCE.prompts.iter().zip(DECODED.iter()) {
        assert_eq!(*tokens, case.greedy, "{:?}", case.text);
    }
}

#[test]
fn cached_is_recomputed() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let vocab = decoder.config().vocab;
    let mut worst = 0.0f32;
    for (case, (tokens, steps)) in REFERENCE.prompts.iter().zip(DECODED.iter()) {
        let n = tokens.len();
        // Each step with an empty cache: the tokens must be the same.
        let mut ids = case.ids.clone();
        for token in &tokens[..if ids.len() < 64 { 4 } else { 1 }] {
            let logits = recompute(decoder, &ids);
            assert_eq!(argmax(&logits[(ids.len() - 1) * vocab..]).unwrap(), *token, "{:?}", case.text);
            ids.push(*token);
        }
        // All steps at once: causality makes each row of the whole equal to its step.
        let ids = [case.ids.as_slice(), &tokens[..n - 1]].concat();
        let all = recompute(decoder, &ids);
        for (i, step) in steps.iter().enumerate() {
            let row = &all[(case.ids.len() + i - 1) * vocab..][..vocab];
            assert_eq!(argmax(row).unwrap(), tokens[i], "{:?} step {i}", case.text);
            worst = step.iter().zip(row).fold(worst, |w, (a, b)| w.max((a - b).abs()));
        }
    }
    eprintln!("largest difference of a logit between decode and recomputation: {worst:.2e}");
    assert!(f64::from(worst) < TOLERANCE);
}

/// Rounding moves logits, which reach 30, by a hundredth, and the likeliest token only where two are as close as that.
#[test]
fn rounded_inputs_stay_close() {
    let (Some((exact, _)), Some(rounding)) = (MODEL.as_ref(), ROUNDING.as_ref()) else { return };
    let vocab = exact.config().vocab;
    let (mut worst, mut same, mut all) = (0.0f32, 0, 0);
    for case in REFERENCE.prompts.iter().filter(|p| p.ids.len() < 64) {
        let ids = [case.ids.as_slice(), &case.greedy[..case.greedy.len() - 1]].concat();
        let (want, got) = (recompute(exact, &ids), recompute(rounding, &ids));
        let pairs = want.chunks(vocab).zip(got.chunks(vocab)).skip(case.ids.len() - 1);
        for ((want, got), &token) in pairs.zip(&case.greedy) {
            let error = want.iter().zip(got).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
            let best = want[token as usize];
            let others = want.iter().enumerate().filter(|&(i, _)| i != token as usize);
            let lead = best - others.fold(f32::MIN, |m, (_, &x)| m.max(x));
            let chosen = argmax(got).unwrap();
            assert!(chosen == token || lead <= 2.0 * error, "{:?}: {chosen} for {token}, {lead}, {error}", case.text);
            worst = worst.max(error);
            same += usize::from(chosen == token);
            all += 1;
        }
    }
    eprintln!("largest difference of a logit: {worst:.2e}; {same} of {all} tokens are the same");
    assert!(worst > 1e-5 && worst < 0.1, "{worst}");
    assert!(100 * same >= 99 * all, "{same} of {all} tokens");
}

/// Greedy decoding step by step has the bits, and so the tokens, of the whole text at once.
#[test]
fn rounded_steps_are_the_whole() {
    let Some(rounding) = ROUNDING.as_ref() else { return };
    let vocab = rounding.config().vocab;
    let case = REFERENCE.prompts.iter().min_by_key(|p| p.ids.len()).unwrap();
    let (tokens, steps) = cached(rounding, &case.ids, case.greedy.len(), DType::F32);
    let ids = [case.ids.as_slice(), &tokens[..tokens.len() - 1]].concat();
    let all = recompute(rounding, &ids);
    for (step, row) in steps.iter().zip(all.chunks(vocab).skip(case.ids.len() - 1)) {
        assert!(step == row);
    }
}

/// Trees of guesses give the greedy text, though the keys of a second branch are added up in another order.
#[test]
fn branches_of_guesses_give_the_greedy_text() {
    let (Some((_, tokenizer)), Some(rounding)) = (MODEL.as_ref(), ROUNDING.as_ref()) else { return };
    let n = 48;
    let mut held = 0;
    for text in [
        "one two three one two four one two three one two five one two three one two",
        "The cat sat on the mat. The dog sat on the rug. The cat sat on the bed. The dog sat on the",
        "if a then b; if a then c; if b then a; if a then b; if b then c; if a then",
        "Once upon a time, there was a little girl. Once upon a time, there was a little",
    ] {
        let prompt = tokenizer.encode(text, true).unwrap();
        let (expected, _) = cached(rounding, &prompt, n, DType::F32);
        for (ahead, branches) in [(3, 2), (4, 3)] {
            let options = SpeculationOptions::new(n).lookup(3).ahead(ahead).branches(branches);
            let cache = Cache::without_rings(rounding.config(), 1, prompt.len() + n, DType::F32).unwrap();
            let mut guessed = Speculation::new(rounding, cache, &prompt, options).unwrap();
            while guessed.finish().is_none() {
                guessed.step().unwrap();
            }
            let tokens = guessed.tokens();
            assert_eq!(tokens, &expected[..tokens.len()], "{ahead} x {branches}: {text}");
            held += guessed.statistics().held;
        }
    }
    assert!(held > n, "{held} guesses held");
}

/// Prompts of different lengths in one padded pass, then one token per sequence and step.
#[test]
fn rows_of_a_batch_are_rows_alone() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let cases: Vec<&Prompt> = REFERENCE.prompts.iter().filter(|p| p.ids.len() < 64).collect();
    let vocab = decoder.config().vocab;
    let mut cache = Cache::new(decoder.config(), cases.len(), 96, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    let mut next: Vec<Vec<u32>> = cases.iter().map(|c| c.ids.clone()).collect();
    for step in 0..cases[0].greedy.len() {
        let tokens: Vec<&[u32]> = next.iter().map(Vec::as_slice).collect();
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &tokens, Logits::Last).unwrap();
        next = logits.chunks(vocab).map(|row| vec![argmax(row).unwrap()]).collect();
        for (case, token) in cases.iter().zip(&next) {
            assert_eq!(token[0], case.greedy[step], "{:?} step {step}", case.text);
        }
    }
    for (row, case) in cases.iter().enumerate() {
        assert_eq!(cache.len(row), case.ids.len() + case.greedy.len() - 1);
    }
}

/// A 16-bit cache changes logits by its rounding only.
#[test]
fn narrow_caches_stay_close() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let case = &REFERENCE.prompts[REFERENCE.prompts.len() - 1];
    let (_, wide) = cached(decoder, &case.ids, 1, DType::F32);
    for (dtype, tolerance) in [(DType::F16, 0.02), (DType::Bf16, 0.2)] {
        let (_, narrow) = cached(decoder, &case.ids, 1, dtype);
        let worst = wide[0].iter().zip(&narrow[0]).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        eprintln!("{dtype}: largest difference of a logit {worst:.2e}");
        assert!(worst > 0.0 && worst < tolerance, "{dtype}: {worst}");
    }
}

/// More requests than slots: each starts when a slot is free, and none is affected by the others.
#[test]
fn slots_are_reused() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let cases: Vec<&Prompt> = REFERENCE.prompts.iter().filter(|p| p.ids.len() < 24).collect();
    let mut scheduler = Scheduler::new(decoder, 3, 64, DType::F32).unwrap();
    // Different lengths, so that slots become free at different times.
    let ids = cases
        .iter()
        .enumerate()
        .map(|(i, case)| scheduler.submit(Request::new(case.ids.clone()).max_tokens(3 + 5 * i % 11)).unwrap());
    let ids: Vec<_> = ids.collect();
    let mut texts = vec![Vec::new(); cases.len()];
    let mut ended = 0;
    for event in scheduler.run() {
        texts[ids.iter().position(|&id| id == event.request).unwrap()].extend(event.token);
        ended += usize::from(event.finish == Some(Finish::MaxTokens));
    }
    assert_eq!((scheduler.running(), scheduler.waiting(), ended), (0, 0, cases.len()));
    for (case, text) in cases.iter().zip(texts) {
        assert_eq!(text, case.greedy[..text.len()], "{:?}", case.text);
    }
}

/// A question by the chat template of the file, and another one that the cache of the first serves.
#[test]
fn questions_are_answered() {
    let Some((decoder, tokenizer)) = MODEL.as_ref() else { return };
    let template = ChatTemplate::of_model(decoder.config(), tokenizer).unwrap();
    let question = [Message::new("user", "What is the capital of France?")];
    let text = template.render(&question).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n\
         What is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    );
    let mut ids = tokenizer.encode(&text, false).unwrap();
    let mut scheduler = Scheduler::new(decoder, 1, 256, DType::F32).unwrap().tokenizer(tokenizer).reuse(true);
    let mut ask = |ids: &[u32]| {
        scheduler.submit(Request::new(ids).max_tokens(40)).unwrap();
        let events = scheduler.run();
        let tokens: Vec<u32> = events.iter().filter_map(|event| event.token).collect();
        let finish = events.last().unwrap().finish.clone();
        (events.into_iter().map(|event| event.text).collect::<String>(), tokens, finish, scheduler.statistics())
    };
    let (answer, tokens, finish, first) = ask(&ids);
    assert!(answer.contains("Paris"), "{answer:?}");
    // The model ends its turn itself, with the token that the template writes there.
    assert_eq!((finish, tokenizer.token(*tokens.last().unwrap())), (Some(Finish::Eos), Some("<|im_end|>".into())));
    ids.extend(tokens);
    let next = "\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n";
    let new = tokenizer.encode(next, false).unwrap();
    ids.extend(&new);
    let (answer, _, _, second) = ask(&ids);
    assert!(answer.contains("Rome"), "{answer:?}");
    assert_eq!(second.prompt_tokens - first.prompt_tokens, new.len() + 1);
}

/// `tests/data/make_beam_reference.py` makes it.
#[derive(Deserialize)]
struct BeamReference {
    eos: Vec<u32>,
    max_tokens: usize,
    prompts: Vec<BeamPrompt>,
}

#[derive(Deserialize)]
struct BeamPrompt {
    text: String,
    ids: Vec<u32>,
    searches: Vec<Search>,
}

#[derive(Deserialize)]
struct Search {
    beams: usize,
    length_penalty: f64,
    early_stopping: serde_json::Value,
    margin: f64,
    sequences: Vec<Vec<u32>>,
    scores: Vec<f64>,
}

/// Sequences and scores of transformers' beam search. Rounding could order two candidates differently only if they were
/// closer than the errors of the two sides. The reference has no decision with a margin below a thousandth, which is
/// twice the difference of log-probabilities that is tolerated.
#[test]
fn beams_are_the_references() {
    let Some((decoder, tokenizer)) = MODEL.as_ref() else { return };
    let reference: BeamReference = serde_json::from_str(include_str!("data/smollm2_beams.json")).unwrap();
    assert_eq!(decoder.config().eos, reference.eos);
    assert!(reference.prompts.len() >= 12);
    let mut worst = 0.0f64;
    let mut ended = 0;
    for prompt in &reference.prompts {
        assert_eq!(tokenizer.encode(&prompt.text, true).unwrap(), prompt.ids, "{:?}", prompt.text);
        for expected in &prompt.searches {
            assert!(expected.margin >= 1e-3);
            let mut options = BeamOptions::new(expected.beams, reference.max_tokens);
            options.length_penalty = expected.length_penalty;
            options.early_stopping = match &expected.early_stopping {
                serde_json::Value::Bool(false) => EarlyStopping::Heuristic,
                serde_json::Value::Bool(true) => EarlyStopping::First,
                other => {
                    assert_eq!(other, "never");
                    EarlyStopping::Never
                }
            };
            let capacity = prompt.ids.len() + reference.max_tokens - 1;
            let cache = Cache::with_beams(decoder.config(), expected.beams, capacity, DType::F32).unwrap();
            let mut search = BeamSearch::new(decoder, cache, &prompt.ids, options).unwrap();
            while search.step().unwrap() {}
            let found = search.hypotheses();
            let sequences: Vec<_> = found.iter().map(|h| h.tokens.clone()).collect();
            assert_eq!(sequences, expected.sequences, "{} beams, {:?}", expected.beams, prompt.text);
            for (h, score) in found.iter().zip(&expected.scores) {
                worst = worst.max((h.score - score).abs() * (h.tokens.len() as f64).powf(expected.length_penalty));
                ended += usize::from(h.tokens.len() < reference.max_tokens);
            }
        }
    }
    eprintln!("largest difference of a log-probability: {worst:.2e}; {ended} sequences ended early");
    assert!(worst < 5e-4 && ended > 8, "{worst} {ended}");
}
