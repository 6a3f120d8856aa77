//! Several requests over one cache: none depends on its neighbours, and each ends by itself.
#![cfg(feature = "driver")]

use std::collections::BTreeMap;

use kvlane::driver::{
    Cache, Decoder, Event, Finish, Formats, Logits, ModelConfig, Overlong, Prefilled, Request, RequestId,
    SamplerOptions, Scheduler, Scratch, Streaming, Threads, Tokenizer, Weights, embedded,
};
use kvlane::{CacheFormat, DType};

fn load_with(threads: usize, change: impl FnOnce(&mut ModelConfig, &mut Weights)) -> (Decoder, Tokenizer) {
    let file = embedded::open().unwrap();
    let threads = Threads::new(threads).unwrap();
    let (mut config, mut weights) = (file.config().clone(), threads.run(|| file.weights(&|_, _| ())).unwrap());
    change(&mut config, &mut weights);
    (Decoder::new(config, weights, 0, None, threads).unwrap(), file.tokenizer().unwrap())
}

/// One layer of the embedded model, which is quick, and whose text is as good as any.
fn load() -> (Decoder, Tokenizer) {
    load_with(2, |config, weights| {
        config.layers.truncate(1);
        weights.layers.truncate(1);
    })
}

fn prompt(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 151 + seed * 37 + 11) % 2000).collect()
}

/// What became of a sample.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    tokens: Vec<u32>,
    text: String,
    finish: Option<Finish>,
}

fn outcomes(events: impl IntoIterator<Item = Event>) -> BTreeMap<(RequestId, usize), Outcome> {
    let mut all = BTreeMap::<_, Outcome>::new();
    for event in events {
        let outcome = all.entry((event.request, event.sample)).or_default();
        assert_eq!(outcome.finish, None, "an event after the end");
        outcome.tokens.extend(event.token);
        outcome.text += &event.text;
        outcome.finish = event.finish;
    }
    all
}

/// The only sample of the only request.
fn alone(scheduler: &mut Scheduler, request: Request) -> Outcome {
    let id = scheduler.submit(request).unwrap();
    outcomes(scheduler.run()).remove(&(id, 0)).unwrap()
}

/// Seven requests of different kinds.
fn requests() -> Vec<Request> {
    let sampled = SamplerOptions::new().temperature(0.9).top_p(0.95);
    vec![
        Request::new(prompt(5, 0)).max_tokens(9),
        Request::new(prompt(23, 1)).max_tokens(4).sampling(sampled.seed(1)),
        Request::new(prompt(1, 2)).max_tokens(14).sampling(sampled.seed(2).top_k(5)),
        Request::new(prompt(40, 3)).max_tokens(6),
        Request::new(prompt(12, 4)).max_tokens(11).sampling(sampled.seed(3)).forbidden([1, 2, 3]),
        Request::new(prompt(17, 5)).max_tokens(3).logit_bias([(70, 3.0)]),
        Request::new(prompt(8, 6)).max_tokens(8).sampling(sampled.seed(4)).allowed((0..900).collect::<Vec<_>>()),
    ]
}

#[test]
fn seven_requests_through_three_slots_are_each_alone() {
    let (decoder, tokenizer) = load();
    for format in CacheFormat::ALL {
        let scheduler = |slots| Scheduler::new(&decoder, slots, 64, format).unwrap().tokenizer(&tokenizer);
        let mut together = scheduler(3).prefill_chunk(16).unwrap();
        let ids: Vec<_> = requests().into_iter().map(|r| together.submit(r).unwrap()).collect();
        let found = outcomes(together.run());
        assert_eq!(found.len(), 7);
        for (request, id) in requests().into_iter().zip(ids) {
            let want = alone(&mut scheduler(1).prefill_chunk(16).unwrap(), request);
            assert_eq!(found[&(id, 0)], want, "{format} {id}");
            assert_eq!(want.finish, Some(Finish::MaxTokens));
        }
    }
}

/// Rows share a step without a change of a bit: twelve of them, in an order and in places of their own.
#[test]
fn rows_apart_are_rows_alone_to_the_bit() {
    let (decoder, _) = load();
    for format in CacheFormat::ALL {
        let mut cache = Cache::new(decoder.config(), 64, 24, format).unwrap();
        let mut scratch = Scratch::default();
        let texts: Vec<Vec<u32>> = (0..12).map(|i| prompt(3 + 5 * i % 9, i as u32)).collect();
        let rows = [63, 0, 31, 8, 5, 6, 7, 40, 2, 62, 17, 33];
        for (row, text) in rows.iter().zip(&texts) {
            decoder.forward(&mut cache, &mut scratch, *row, &[text], Logits::None).unwrap();
        }
        let list: Vec<(usize, &[u32])> = rows.iter().map(|&row| (row, &[7u32][..])).collect();
        let together = decoder.forward_rows(&mut cache, &mut scratch, &list, Logits::Last).unwrap();
        assert_eq!((cache.len(63), cache.len(0), cache.len(31), cache.len(1)), (4, 9, 5, 0));
        for (logits, text) in together.chunks(decoder.config().vocab).zip(&texts) {
            let mut cache = Cache::new(decoder.config(), 1, 24, format).unwrap();
            decoder.forward(&mut cache, &mut scratch, 0, &[text], Logits::None).unwrap();
            let alone = decoder.forward(&mut cache, &mut scratch, 0, &[&[7]], Logits::Last).unwrap();
            assert!(alone == logits, "{format}");
        }
        for (bad, part) in [([0, 0], "row 0 is named twice"), ([0, 64], "row 64 is named, but the cache has 64 rows")] {
            let list = bad.map(|row| (row, &[7u32][..]));
            let error = decoder.forward_rows(&mut cache, &mut scratch, &list, Logits::Last).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
        assert_eq!(cache.len(0), 9);
    }
}

/// Values of 1e5 fit into f32 and not into f16: the logits of that sequence become NaN in its second step.
#[test]
fn broken_logits_end_their_request_alone() {
    let (decoder, _) = load();
    let (large, _) = load_with(2, |config, weights| {
        config.layers.truncate(1);
        weights.layers.truncate(1);
        weights.layers[0].attn_norm.iter_mut().for_each(|w| *w *= 5e4);
    });
    let mut scheduler = Scheduler::new(&decoder, 3, 64, DType::F16).unwrap();
    let sound = [Request::new(prompt(5, 0)).max_tokens(9), Request::new(prompt(9, 1)).max_tokens(9)];
    let first = scheduler.submit(sound[0].clone()).unwrap();
    let prefilled = Prefilled::new(&large, prompt(6, 3), DType::F32).unwrap();
    let broken = scheduler.submit_prefilled(prefilled, Request::new([0]).max_tokens(9)).unwrap();
    let last = scheduler.submit(sound[1].clone()).unwrap();
    let mut found = outcomes(scheduler.run());
    let Outcome { tokens, finish: Some(Finish::Error(sentence)), .. } = found.remove(&(broken, 0)).unwrap() else {
        panic!("no error");
    };
    assert!(tokens.len() == 1 && sentence.contains("NaN"), "{tokens:?} {sentence}");
    // Its slot is free, and its neighbours have all their tokens, each once.
    assert_eq!(scheduler.running(), 0);
    for (id, request) in [first, last].into_iter().zip(sound) {
        let want = alone(&mut Scheduler::new(&decoder, 1, 64, DType::F16).unwrap(), request);
        assert_eq!(want.tokens.len(), 9);
        assert_eq!(found[&(id, 0)], want);
    }
    // A model all of whose requests fail keeps no slot either.
    let mut scheduler = Scheduler::new(&large, 1, 64, DType::F16).unwrap();
    for _ in 0..3 {
        scheduler.submit(Request::new(prompt(6, 3)).samples(2)).unwrap();
    }
    let found = outcomes(scheduler.run());
    assert!(found.len() == 6 && found.values().all(|o| matches!(o.finish, Some(Finish::Error(_)))), "{found:?}");
}

#[test]
fn samples_share_the_prompt() {
    let (decoder, _) = load();
    let sampling = SamplerOptions::new().temperature(1.0).seed(40);
    let text = prompt(30, 1);
    let one = |i: u64| {
        let mut scheduler = Scheduler::new(&decoder, 1, 64, DType::F32).unwrap();
        alone(&mut scheduler, Request::new(text.clone()).max_tokens(6).sampling(sampling.seed(40 + i)))
    };
    let want: Vec<Outcome> = (0..5u64).map(one).collect();
    assert_ne!(want[0], want[1]);
    for slots in [1, 3, 8] {
        let mut scheduler = Scheduler::new(&decoder, slots, 64, DType::F32).unwrap();
        let other = scheduler.submit(Request::new(prompt(7, 2)).max_tokens(5)).unwrap();
        let id = scheduler.submit(Request::new(text.clone()).max_tokens(6).sampling(sampling).samples(5)).unwrap();
        let mut found = outcomes(scheduler.run());
        assert_eq!(found.remove(&(other, 0)).unwrap().tokens.len(), 5);
        let found: Vec<Outcome> = (0..5).map(|i| found.remove(&(id, i)).unwrap()).collect();
        assert_eq!(found, want, "{slots} slots");
        assert_eq!(scheduler.statistics().prompt_tokens, 30 + 7);
    }
}

#[test]
fn running_requests_go_on_while_a_prompt_is_computed() {
    let (decoder, _) = load();
    let mut scheduler = Scheduler::new(&decoder, 2, 128, DType::F32).unwrap().prefill_chunk(10).unwrap();
    let short = scheduler.submit(Request::new(prompt(3, 0)).max_tokens(40)).unwrap();
    scheduler.step();
    let long = scheduler.submit(Request::new(prompt(95, 1)).max_tokens(2)).unwrap();
    let mut seen = Vec::new();
    while let Some((done, all)) = scheduler.prompt_progress(long) {
        assert_eq!(all, 95);
        seen.push(done);
        let events = scheduler.step();
        assert_eq!(events.iter().filter(|e| e.request == short && e.token.is_some()).count(), 1);
    }
    assert_eq!(seen, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]);
    assert!(Scheduler::new(&decoder, 2, 128, DType::F32).unwrap().prefill_chunk(0).is_err());
}

#[test]
fn texts_stop_before_their_stop_strings() {
    let (decoder, tokenizer) = load_with(2, |_, _| ());
    let scheduler = || Scheduler::new(&decoder, 1, 64, DType::F32).unwrap().tokenizer(&tokenizer);
    let request = || Request::new(tokenizer.encode("And God said", true).unwrap()).max_tokens(20);
    let whole = alone(&mut scheduler(), request());
    assert_eq!(whole.text, tokenizer.decode(&whole.tokens).unwrap());
    // A stop string that begins and ends inside of tokens.
    let middle = whole.text.char_indices().nth(whole.text.chars().count() / 2).unwrap().0;
    let end = whole.text[middle..].char_indices().nth(7).unwrap().0 + middle;
    let stop = &whole.text[middle..end];
    let at = whole.text.find(stop).unwrap();
    let stopped = alone(&mut scheduler(), request().stop(["never in this text", stop]));
    assert_eq!((stopped.text.as_str(), stopped.finish), (&whole.text[..at], Some(Finish::Stop)));
    assert!(stopped.tokens.len() < 20 && whole.tokens.starts_with(&stopped.tokens));
    // One that does not come changes nothing.
    assert_eq!(alone(&mut scheduler(), request().stop(["never in this text"])), whole);
    // A stop token ends the text before itself.
    let token = whole.tokens[5];
    let first = whole.tokens.iter().position(|&t| t == token).unwrap();
    let stopped = alone(&mut scheduler(), request().stop_tokens([token]));
    assert_eq!((stopped.tokens.as_slice(), stopped.finish), (&whole.tokens[..=first], Some(Finish::Stop)));
    assert_eq!(stopped.text, tokenizer.decode(&whole.tokens[..first]).unwrap());
}

#[test]
fn masks_and_biases_decide_and_probabilities_show_it() {
    let (decoder, _) = load();
    let run = |request: Request| {
        let mut scheduler = Scheduler::new(&decoder, 1, 64, DType::F32).unwrap();
        scheduler.submit(request.max_tokens(5)).unwrap();
        scheduler.run()
    };
    let tokens = |events: &[Event]| events.iter().filter_map(|e| e.token).collect::<Vec<u32>>();
    let request = || Request::new(prompt(9, 1)).logprobs(8);
    let plain = run(request());
    let (best, top) = (plain[0].token.unwrap(), plain[0].logprobs.clone().unwrap());
    let mut cache = Cache::new(decoder.config(), 1, 16, DType::F32).unwrap();
    let logits = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&prompt(9, 1)], Logits::Last).unwrap();
    let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    assert_eq!((top.top.len(), top.top[0]), (8, (best, top.chosen)));
    for &(id, logprob) in &top.top {
        assert!((f64::from(logprob) - (f64::from(logits[id as usize]) - sum.ln())).abs() < 1e-5);
    }
    assert!(top.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));

    let second = top.top[1].0;
    assert_eq!(run(request().forbidden([best]))[0].token, Some(second));
    assert_eq!(run(request().logit_bias([(best, f32::NEG_INFINITY)]))[0].token, Some(second));
    let allowed = run(request().allowed([second, 17]));
    assert!(tokens(&allowed).iter().all(|&t| t == second || t == 17));
    assert_eq!(allowed[0].logprobs.as_ref().unwrap().top[2].1, f32::NEG_INFINITY);
    let biased = run(request().logit_bias([(1234, 100.0)]));
    assert_eq!(tokens(&biased), [1234; 5]);
    assert!(biased[0].logprobs.as_ref().unwrap().chosen > -1e-3);
    assert_eq!(run(Request::new(prompt(9, 1)))[0].logprobs, None);
}

#[test]
fn overlong_prompts_are_refused_or_cut() {
    let (decoder, _) = load();
    let text = prompt(50, 1);
    let run = |request: Request| {
        let mut scheduler = Scheduler::new(&decoder, 1, 32, DType::F32).unwrap();
        scheduler.submit(request.overlong(Overlong::KeepLast)).map(|_| scheduler.run().len())
    };
    let mut scheduler = Scheduler::new(&decoder, 1, 32, DType::F32).unwrap();
    let error = scheduler.submit(Request::new(text.clone())).unwrap_err();
    assert!(error.to_string().contains("50 tokens; 1 to 32 fit"), "{error}");
    // All tokens that were asked for fit after the cut, and they are those of the last 27 tokens.
    let cut = Request::new(text.clone()).max_tokens(6).overlong(Overlong::KeepLast);
    let cut = alone(&mut scheduler, cut);
    assert_eq!((cut.tokens.len(), cut.finish.as_ref()), (6, Some(&Finish::MaxTokens)));
    assert_eq!(alone(&mut scheduler, Request::new(&text[50 - 27..]).max_tokens(6)), cut);
    // At least half a row is kept: 16 tokens, after which 17 more can be generated.
    assert_eq!(run(Request::new(text.clone()).max_tokens(100)).unwrap(), 17);
    assert_eq!(run(Request::new(&text[..32]).max_tokens(100)).unwrap(), 1);
}

#[test]
fn cancelled_requests_end_and_others_go_on() {
    let (decoder, tokenizer) = load();
    let mut scheduler = Scheduler::new(&decoder, 2, 64, DType::F32).unwrap().tokenizer(&tokenizer);
    let requests: Vec<Request> = (0..4).map(|i| Request::new(prompt(4, i)).max_tokens(8)).collect();
    let ids: Vec<_> = requests.iter().map(|r| scheduler.submit(r.clone().samples(2)).unwrap()).collect();
    let mut events: Vec<Event> = (0..3).flat_map(|_| scheduler.step()).collect();
    // One that runs, one that waits, and one that does not exist any more.
    assert!(scheduler.cancel(ids[0]) && scheduler.cancel(ids[2]) && !scheduler.cancel(ids[0]));
    events.extend(scheduler.run());
    let found = outcomes(events);
    assert_eq!(found.len(), 8);
    for (i, (id, request)) in ids.iter().zip(requests).enumerate() {
        let want = alone(&mut Scheduler::new(&decoder, 1, 64, DType::F32).unwrap().tokenizer(&tokenizer), request);
        for sample in 0..2 {
            let outcome = &found[&(*id, sample)];
            if i % 2 == 1 {
                assert_eq!(*outcome, want);
            } else {
                assert_eq!(outcome.finish, Some(Finish::Cancelled));
                assert!(want.tokens.starts_with(&outcome.tokens) && outcome.tokens.len() < 8);
            }
        }
    }
    scheduler.submit(Request::new(prompt(4, 0))).unwrap();
    scheduler.step();
    assert!(scheduler.cancel_all() && !scheduler.is_idle());
    assert!(scheduler.run().len() == 1 && scheduler.is_idle());
}

/// A prompt that was computed elsewhere continues as if it had been computed here.
#[test]
fn prefilled_rows_are_inserted() {
    let (decoder, _) = load();
    for formats in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Int8].map(Formats::from) {
        let mut scheduler = Scheduler::new(&decoder, 2, 64, formats).unwrap();
        let request = || Request::new(prompt(20, 1)).max_tokens(7);
        let want = alone(&mut scheduler, request());
        let prefilled = Prefilled::new(&decoder, prompt(20, 1), formats).unwrap();
        let computed = scheduler.statistics().prompt_tokens;
        let other = scheduler.submit(Request::new(prompt(5, 2)).max_tokens(9)).unwrap();
        let id = scheduler.submit_prefilled(prefilled, Request::new([9]).max_tokens(7).samples(3)).unwrap();
        let found = outcomes(scheduler.run());
        assert_eq!(found[&(other, 0)].tokens.len(), 9);
        (0..3).for_each(|sample| assert_eq!(found[&(id, sample)], want, "{formats}"));
        assert_eq!(scheduler.statistics().prompt_tokens, computed + 5);
    }
    let long = Prefilled::new(&decoder, prompt(70, 1), DType::F32).unwrap();
    let mut scheduler = Scheduler::new(&decoder, 2, 64, DType::F32).unwrap();
    let error = scheduler.submit_prefilled(long, Request::new([9])).unwrap_err();
    assert!(error.to_string().contains("70 tokens; 1 to 64 fit"), "{error}");
    assert!(Prefilled::new(&decoder, [], DType::F32).is_err());
}

/// Slots that stream are slots, too: samples and neighbours have no effect.
#[test]
fn streams_are_alone() {
    let (decoder, _) = load();
    let scheduler = |slots| {
        let scheduler = Scheduler::new(&decoder, slots, 30, DType::F32).unwrap();
        scheduler.streaming(Some(Streaming::new(20))).unwrap()
    };
    let requests = || [(50, 9), (10, 60)].map(|(n, new)| Request::new(prompt(n, 1)).max_tokens(new));
    let mut together = scheduler(2);
    let ids = requests().map(|request| together.submit(request.samples(2)).unwrap());
    let found = outcomes(together.run());
    for (request, id) in requests().into_iter().zip(ids) {
        let want = alone(&mut scheduler(1), request);
        (0..2).for_each(|sample| assert_eq!(found[&(id, sample)], want));
    }
}

#[test]
fn bad_requests_are_refused_with_a_sentence() {
    let (decoder, tokenizer) = load();
    let mut scheduler = Scheduler::new(&decoder, 1, 32, DType::F32).unwrap().tokenizer(&tokenizer);
    let request = || Request::new(prompt(3, 1));
    let sampling = SamplerOptions::new();
    let cases = [
        (Request::new([]), "a prompt of 0 tokens; 1 to 32 fit"),
        (Request::new([3, 5000]), "the prompt's token 5000 is outside of the 2048"),
        (request().max_tokens(0), "0 tokens to generate"),
        (request().samples(0), "0 samples; 1 to 65536"),
        (request().samples(usize::MAX), "samples; 1 to 65536"),
        (request().sampling(sampling.temperature(f32::INFINITY)), "the temperature is inf"),
        (request().sampling(sampling.top_p(0.0)), "top-p is 0"),
        (request().stop(["a", ""]), "a stop string is empty"),
        (request().stop_tokens([2048]), "stop token 2048"),
        (request().forbidden([1, 9999]), "forbidden token 9999"),
        (request().allowed([9999]), "allowed token 9999"),
        (request().allowed([]), "none of the 2048 tokens may be chosen"),
        (request().allowed([4]).forbidden([4]), "none of the 2048 tokens may be chosen"),
        (request().logit_bias([(9999, 1.0)]), "biased token 9999"),
        (request().logit_bias([(1, f32::NAN)]), "the bias of token 1 is NaN"),
        (request().logit_bias([(1, f32::INFINITY)]), "the bias of token 1 is inf"),
        (request().logprobs(2049), "probabilities of 2049 tokens; the model has 2048"),
    ];
    for (request, part) in cases {
        let error = scheduler.submit(request).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(scheduler.is_idle());
    }
    assert_eq!(alone(&mut scheduler, request().max_tokens(2)).tokens.len(), 2);
    let mut wordless = Scheduler::new(&decoder, 1, 32, DType::F32).unwrap();
    assert!(wordless.submit(request().stop(["x"])).unwrap_err().to_string().contains("need a tokenizer"));
    assert!(Scheduler::new(&decoder, 0, 32, DType::F32).is_err());
}

/// The next turn of a conversation computes its new tokens only.
#[test]
fn rows_are_reused_by_prompts_that_begin_with_them() {
    let (decoder, _) = load();
    let mut scheduler = Scheduler::new(&decoder, 2, 128, DType::F32).unwrap().reuse(true);
    let mut text = prompt(20, 1);
    let mut computed = 0;
    for turn in 0..3 {
        let before = text.clone();
        let answer = alone(&mut scheduler, Request::new(text.clone()).max_tokens(6));
        let fresh = &mut Scheduler::new(&decoder, 1, 128, DType::F32).unwrap();
        assert_eq!(alone(fresh, Request::new(before).max_tokens(6)), answer, "turn {turn}");
        // The last generated token was not computed, and the user's five tokens are new.
        let new = if turn == 0 { 20 } else { 1 + 5 };
        assert_eq!(scheduler.statistics().prompt_tokens - computed, new);
        computed += new;
        text.extend(answer.tokens);
        text.extend(prompt(5, 10 + turn));
    }
    // A prompt that leaves the path after 20 tokens, and one with the whole row.
    let other = [&text[..20], &prompt(4, 77)].concat();
    for (text, new) in [(other.clone(), 4), (other, 1)] {
        let fresh = &mut Scheduler::new(&decoder, 1, 128, DType::F32).unwrap();
        let want = alone(fresh, Request::new(text.clone()).max_tokens(4));
        assert_eq!(alone(&mut scheduler, Request::new(text).max_tokens(4)), want);
        assert_eq!(scheduler.statistics().prompt_tokens - computed, new);
        computed += new;
    }
}
