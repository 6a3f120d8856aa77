//! `kvlane generate`.

use std::io::{self, IsTerminal, Read};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::model::{Run, open};
use super::output::{bar, print, print_json};
use crate::driver::cache::{Formats, PREFILL_CHUNK};
use crate::driver::embedded;
use crate::driver::error::{Error, Result};
use crate::driver::sampling::SamplerOptions;
use crate::driver::scheduler::{Finish, Request, Scheduler, Streaming};
use crate::{CacheFormat, Context, KernelInfo, Op, Precision};

/// Continue a text.
///
/// The continuation goes to standard output as it is generated. Figures follow on standard error: tokens per second of
/// the prompt and of the generation, and the kernels that ran.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kvlane generate --prompt 'And God said'
  kvlane generate --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'Once upon a time' --temperature 0
  kvlane generate --prompt 'And God said' --window 128 --max-tokens 5000
  echo 'The moon' | kvlane generate --model ./Llama-3.2-1B --prompt - --kv-type bf16")]
pub(super) struct Generate {
    #[command(flatten)]
    pub(super) run: Run,
    /// The text to continue; `-` reads it from standard input. Special tokens can be written out
    #[arg(long, value_name = "TEXT", default_value = embedded::PROMPT)]
    pub(super) prompt: String,
    /// The most tokens to write
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Divisor of the logits; 0 always selects the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Select among the most likely tokens whose probabilities together reach P; 1 is no limit
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Select among the K most likely tokens; 0 is no limit
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Seed of the random numbers: the same seed gives the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Empty the cache before every token and compute the whole text again, to measure what the cache saves
    #[arg(long)]
    no_cache: bool,
    /// Continue beyond the model's context: keep the first tokens (see --sinks) and at least the N most recent ones,
    /// forget the tokens between them, and close the gap
    #[arg(long, value_name = "N", conflicts_with = "no_cache")]
    window: Option<usize>,
    /// Number of first tokens that are never forgotten
    #[arg(long, value_name = "S", default_value_t = 4, requires = "window")]
    sinks: usize,
    /// Write one JSON object with the text and the figures at the end, instead of the text
    #[arg(long)]
    json: bool,
}

pub(super) fn generate(args: &Generate) -> Result<()> {
    let start = Instant::now();
    let file = open(args.run.model.as_ref())?;
    let tokenizer = file.tokenizer()?;
    let prompt = tokenizer.encode(&prompt_text(&args.prompt)?, true)?;
    let config = file.config();
    if prompt.is_empty() {
        return Err(Error::argument("the prompt has no tokens"));
    }
    let streaming = args.window.map(|window| Streaming::new(window).sinks(args.sinks));
    if prompt.len() > config.context && streaming.is_none() {
        return Err(Error::argument(format!(
            "the prompt has {} tokens, but the model was made for {}",
            prompt.len(),
            config.context
        )));
    }
    let capacity = match streaming {
        Some(streaming) => streaming.capacity(config.context),
        None => prompt.len().saturating_add(args.max_tokens).min(config.context),
    };
    let decoder = args.run.load(&file, capacity)?;
    let name = config.name.clone().unwrap_or_else(|| file.format());
    drop(file);
    let load = start.elapsed();

    let mut scheduler = Scheduler::new(&decoder, 1, capacity, args.run.formats())?
        .tokenizer(&tokenizer)
        .recompute(args.no_cache)
        .streaming(streaming)?;
    let sampling =
        SamplerOptions::new().temperature(args.temperature).top_k(args.top_k).top_p(args.top_p).seed(args.seed);
    let request = Request::new(prompt.clone()).max_tokens(args.max_tokens).sampling(sampling);
    let id = scheduler.submit(request)?;

    let progress = (prompt.len() > PREFILL_CHUNK).then(|| bar("prompt", prompt.len(), false));
    let mut tokens = Vec::new();
    let mut text = String::new();
    let mut finish = Finish::Eos;
    while !scheduler.is_idle() {
        for event in scheduler.step() {
            tokens.extend(event.token);
            match args.json {
                true => text += &event.text,
                false => print(&event.text)?,
            }
            if let Some(end) = event.finish {
                finish = end;
            }
        }
        match (&progress, scheduler.prompt_progress(id)) {
            (Some(bar), Some((done, _))) => bar.set_position(done as u64),
            (Some(bar), None) => bar.finish_and_clear(),
            _ => (),
        }
    }
    let statistics = scheduler.statistics();
    let (prefill, decode) = (statistics.prefill, statistics.decode);

    let per_second = |n: usize, time: Duration| n as f64 / time.as_secs_f64();
    // The prefill generates the first token.
    let (prefill_rate, decode_rate) =
        (per_second(prompt.len(), prefill), per_second(tokens.len().saturating_sub(1), decode));
    let ran = kernels_that_run(decoder.context(), args.run.formats());
    let names: Vec<&str> = ran.iter().map(|k| k.name).collect();
    if args.json {
        return print_json(&json!({
            "model": name,
            "text": text,
            "prompt_ids": prompt,
            "ids": tokens,
            "finish": finish.name(),
            "cached": !args.no_cache,
            "threads": decoder.threads().count(),
            "isa": decoder.context().isa().name(),
            "k_type": args.run.formats().k.name(),
            "v_type": args.run.formats().v.name(),
            "cache_bytes": scheduler.cache().bytes(),
            "evicted": statistics.evicted,
            "load_seconds": load.as_secs_f64(),
            "prefill_tokens_per_second": prefill_rate,
            "decode_tokens_per_second": decode_rate,
            "kernels": names,
        }));
    }
    if io::stdout().is_terminal() {
        print("\n")?;
    }
    let ending = match &finish {
        Finish::Eos => "the model ended the text",
        Finish::MaxTokens => "--max-tokens reached",
        Finish::Full => "the model's context is full",
        Finish::Error(sentence) => return Err(Error::argument(sentence)),
        other => other.name(),
    };
    eprintln!("{name}: loaded in {:.2} s; {ending}", load.as_secs_f64());
    eprintln!(
        "prefill {} tokens, {prefill_rate:.1} tokens/s; decode {} tokens, {decode_rate:.1} tokens/s; {} threads{}",
        prompt.len(),
        tokens.len().saturating_sub(1),
        decoder.threads().count(),
        if args.no_cache { ", every token from nothing" } else { "" }
    );
    if streaming.is_some() {
        eprintln!("cache of {capacity} tokens; {} tokens forgotten", statistics.evicted);
    }
    eprintln!("kernels: {}", names.join(", "));
    Ok(())
}

fn prompt_text(argument: &str) -> Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    // Far more than any model's context, and little memory.
    const MOST: u64 = 64 << 20;
    let mut text = String::new();
    io::stdin().take(MOST).read_to_string(&mut text).map_err(Error::stdin)?;
    Ok(text)
}

/// The kernels of a pass of the decoder, which computes in f32 and stores in `formats`.
fn kernels_that_run(context: &Context, formats: Formats) -> Vec<KernelInfo> {
    let (f32, Formats { k, v }) = (CacheFormat::F32, formats);
    // Keys are rotated on their way into the cache; into a quantised one by two kernels.
    let keys = if k.has_scales() { Op::KvWrite } else { Op::Rope };
    let mut ran: Vec<KernelInfo> =
        [(Op::RopeAngles, f32, f32), (Op::Rope, f32, f32), (keys, f32, k), (Op::KvWrite, f32, v)]
            .into_iter()
            .filter_map(|(op, src, dst)| context.kernel(op, src, dst))
            .chain(context.attention_kernels(k, v, Precision::Default))
            .collect();
    ran.dedup_by_key(|k| k.name);
    ran
}
