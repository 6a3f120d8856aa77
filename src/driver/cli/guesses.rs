//! `kvlane generate --draft` and `--lookup`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::generate::{Generate, Loaded};
use super::interrupt::{self, Interrupts};
use super::model::open;
use super::output::{count_of, note, print, print_json, with_prompt_bar};
use super::values;
use crate::driver::cache::Cache;
use crate::driver::error::{Error, Result};
use crate::driver::sampling::SamplerOptions;
use crate::driver::scheduler::Finish;
use crate::driver::speculate::{Speculation, SpeculationOptions, check_vocabularies};

/// Options that guesses do not go with.
const CONFLICTS: [&str; 6] = ["no_cache", "window", "beams", "prompts", "keep_last", "stop"];

/// The options of guesses.
#[derive(Debug, Args)]
pub(super) struct Guesses {
    /// Let this smaller model guess tokens, which the model verifies several at a time. The text has the model's
    /// distribution all the same; both must have the same vocabulary
    #[arg(long, value_name = "FILE|DIR", conflicts_with_all = CONFLICTS)]
    draft: Option<PathBuf>,
    /// Guess what followed the last N tokens of the text (or fewer) when they occurred before; with --draft, before the
    /// draft guesses
    #[arg(long, value_name = "N", value_parser = values::at_least_one, conflicts_with_all = CONFLICTS)]
    lookup: Option<usize>,
    /// The most guesses that follow each other. Default: 4
    #[arg(long, value_name = "N", value_parser = values::at_least_one)]
    guesses: Option<usize>,
    /// The most guesses for one position: they form a tree, which is verified in one pass. Default: 1. With more, logits
    /// can differ by the rounding of linear layers, and a token whose lead is as small can be another one
    #[arg(long, value_name = "N", value_parser = values::at_least_one)]
    branches: Option<usize>,
}

impl Guesses {
    /// The options of the text, if there are guesses.
    pub(super) fn options(&self, max_tokens: usize, sampling: SamplerOptions) -> Result<Option<SpeculationOptions>> {
        if self.draft.is_none() && self.lookup.is_none() {
            return match (self.guesses, self.branches) {
                (None, None) => Ok(None),
                _ => Err(Error::argument("--guesses and --branches need --draft or --lookup, which make the guesses")),
            };
        }
        let mut options = SpeculationOptions::new(max_tokens).sampling(sampling).lookup(self.lookup.unwrap_or(0));
        options.ahead = self.guesses.unwrap_or(options.ahead);
        options.branches = self.branches.unwrap_or(options.branches);
        Ok(Some(options))
    }
}

/// Generates the text, and says what the guesses were good for.
pub(super) fn guesses(args: &Generate, loaded: Loaded, options: SpeculationOptions) -> Result<ExitCode> {
    let Loaded { decoder, tokenizer, prompt, name, capacity, load, kernels } = loaded;
    let start = Instant::now();
    let draft = match &args.guesses.draft {
        Some(path) => {
            let file = open(Some(path))?;
            check_vocabularies(tokenizer, &file.tokenizer()?)?;
            Some(args.run.load(&file, capacity)?)
        }
        None => None,
    };
    let load = load + start.elapsed();
    let formats = args.run.formats();
    let cache = Cache::without_rings(decoder.config(), 1, capacity, formats)?;
    let mut text = Speculation::new(&decoder, cache, &prompt, options)?;
    if let Some(draft) = &draft {
        text = text.draft(draft, Cache::without_rings(draft.config(), 1, capacity, formats)?)?;
    }

    let interrupts = Interrupts::watch()?;
    let start = Instant::now();
    let mut new = with_prompt_bar(prompt.len(), |progress| text.prefill(progress))?;
    let prefill = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let mut stream = tokenizer.stream();
    let mut written = String::new();
    let mut emit = |piece: String| match args.json {
        true => {
            written += &piece;
            Ok(())
        }
        false => print(&piece),
    };
    loop {
        let ended = text.finish() == Some(&Finish::Eos);
        let mut piece = String::new();
        for &token in &new[..new.len() - usize::from(ended)] {
            piece += &stream.push(token)?;
        }
        emit(piece)?;
        if text.finish().is_some() || interrupts.pressed() {
            break;
        }
        new = text.step()?;
    }
    emit(stream.finish()?)?;
    let interrupted = interrupts.pressed();
    let decode = start.elapsed().as_secs_f64();

    let statistics = text.statistics();
    let decoded = statistics.tokens - 1;
    let (prefill_rate, decode_rate) = (prompt.len() as f64 / prefill, decoded as f64 / decode);
    if args.json {
        print_json(&json!({
            "model": name,
            "text": written,
            "prompt_ids": prompt,
            "ids": text.tokens(),
            "finish": text.finish().unwrap_or(&Finish::Cancelled).name(),
            "passes": statistics.passes,
            "guesses": statistics.guesses,
            "held": statistics.held,
            "threads": decoder.threads().count(),
            "isa": decoder.context().isa().name(),
            "k_type": formats.k.name(),
            "v_type": formats.v.name(),
            "rotate": formats.rotate.name(),
            "cache_bytes": text.cache().bytes(),
            "load_seconds": load.as_secs_f64(),
            "prefill_tokens_per_second": prefill_rate,
            "decode_tokens_per_second": decode_rate,
            "kernels": kernels,
        }))?;
    } else {
        print("\n")?;
        let ending = match text.finish() {
            Some(Finish::Eos) => "the model ended the text",
            Some(Finish::Full) => "the model's context is full",
            Some(_) => "--max-tokens reached",
            None => "interrupted",
        };
        note(&format!("{name}: loaded in {:.2} s; {ending}", load.as_secs_f64()));
        note(&format!(
            "prefill {}, {prefill_rate:.1} tokens/s; decode {}, {decode_rate:.1} tokens/s; {}",
            count_of(prompt.len(), "token"),
            count_of(decoded, "token"),
            count_of(decoder.threads().count(), "thread")
        ));
        note(&format!(
            "{} of {} guesses held; {:.2} tokens per pass",
            statistics.held,
            statistics.guesses,
            decoded as f64 / statistics.passes.max(1) as f64
        ));
        note(&format!("kernels: {}", kernels.join(", ")));
    }
    Ok(if interrupted { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::SUCCESS })
}
