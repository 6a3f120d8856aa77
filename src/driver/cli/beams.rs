//! `kvlane generate --beams`.

use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::generate::{Generate, Loaded};
use super::interrupt::{self, Interrupts};
use super::output::{count_of, note, print, print_json, progress_bar, with_prompt_bar};
use super::values;
use crate::driver::beam::{BeamOptions, BeamSearch, EarlyStopping, Hypothesis};
use crate::driver::cache::Cache;
use crate::driver::error::{Error, Result};

/// The options of a beam search.
#[derive(Debug, Args)]
pub(super) struct Beams {
    /// Search for the most likely continuation with N beams, instead of choosing token by token
    #[arg(long, value_name = "N", value_parser = values::at_least_one, conflicts_with_all = ["temperature", "top_p", "top_k", "seed", "stop", "no_cache", "window", "prompts", "keep_last"])]
    pub(super) beams: Option<usize>,
    /// Divide the log-probability of a text of n tokens by n to this power; more favours longer texts
    #[arg(long, value_name = "A", default_value = "1", requires = "beams", value_parser = values::exponent)]
    length_penalty: f64,
    /// When as many texts have ended as there are beams: end the search unless a running one scores better as it is, end
    /// it at once, or go on while one can still become better
    #[arg(long, value_name = "HOW", default_value = "heuristic", requires = "beams")]
    early_stopping: Stopping,
    /// Write the K best texts that the search finds
    #[arg(long, value_name = "K", default_value = "1", requires = "beams", value_parser = values::at_least_one)]
    samples: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stopping {
    Heuristic,
    First,
    Never,
}

impl Beams {
    /// The options of the search, if there is one. Bad ones are an error before a file is read.
    pub(super) fn options(&self, max_tokens: usize) -> Result<Option<BeamOptions>> {
        let Some(beams) = self.beams else { return Ok(None) };
        let mut options = BeamOptions::new(beams, max_tokens);
        options.length_penalty = self.length_penalty;
        options.early_stopping = match self.early_stopping {
            Stopping::Heuristic => EarlyStopping::Heuristic,
            Stopping::First => EarlyStopping::First,
            Stopping::Never => EarlyStopping::Never,
        };
        options.check()?;
        if self.samples > beams {
            return Err(Error::argument(format!(
                "--samples {} of a search with {beams} beams; 1 to {beams} texts are found",
                self.samples
            )));
        }
        Ok(Some(options))
    }
}

/// Runs the search and writes its texts.
pub(super) fn beams(args: &Generate, loaded: Loaded, mut options: BeamOptions) -> Result<ExitCode> {
    let Loaded { decoder, tokenizer, prompt, name, capacity, load, kernels } = loaded;
    // The last token takes no room.
    options.max_tokens = options.max_tokens.min(capacity - prompt.len() + 1);
    let cache = Cache::with_beams(decoder.config(), options.beams, capacity, args.run.formats())?;
    let mut search = BeamSearch::new(&decoder, cache, &prompt, options)?;

    let interrupts = Interrupts::watch()?;
    let start = Instant::now();
    with_prompt_bar(prompt.len(), |progress| search.prefill(progress))?;
    let prefill = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let progress = progress_bar("search", options.max_tokens, "{prefix} {wide_bar} {pos}/{len} steps");
    let mut steps = 1;
    while search.step()? && !interrupts.pressed() {
        progress.set_position(steps as u64);
        steps += 1;
    }
    let interrupted = interrupts.pressed();
    progress.finish_and_clear();
    let decode = start.elapsed().as_secs_f64();

    let mut found = search.hypotheses();
    found.truncate(args.beams.samples);
    let eos = &decoder.config().eos;
    let ended = |h: &Hypothesis| h.tokens.last().is_some_and(|token| eos.contains(token));
    let text = |h: &Hypothesis| {
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for &token in &h.tokens[..h.tokens.len() - usize::from(ended(h))] {
            text += &stream.push(token)?;
        }
        Ok(text + &stream.finish()?)
    };
    let texts = found.iter().map(text).collect::<Result<Vec<String>>>()?;
    let (prefill_rate, step_rate) = (prompt.len() as f64 / prefill, steps as f64 / decode);
    if args.json {
        let finish = |h: &Hypothesis| match ended(h) {
            true => "eos",
            false if h.tokens.len() == options.max_tokens => "max_tokens",
            false => "cancelled",
        };
        let samples: Vec<_> = found
            .iter()
            .zip(&texts)
            .map(|(h, text)| {
                json!({
                    "text": text,
                    "ids": h.tokens,
                    "score": h.score,
                    "log_probability": h.log_probability,
                    "finish": finish(h),
                })
            })
            .collect();
        print_json(&json!({
            "model": name,
            "prompt_ids": prompt,
            "beams": options.beams,
            "steps": steps,
            "samples": samples,
            "threads": decoder.threads().count(),
            "isa": decoder.context().isa().name(),
            "k_type": args.run.formats().k.name(),
            "v_type": args.run.formats().v.name(),
            "rotate": args.run.formats().rotate.name(),
            "cache_bytes": search.cache().bytes(),
            "load_seconds": load.as_secs_f64(),
            "prefill_tokens_per_second": prefill_rate,
            "steps_per_second": step_rate,
            "kernels": kernels,
        }))?;
    } else {
        for (i, (h, text)) in found.iter().zip(&texts).enumerate() {
            if args.beams.samples > 1 {
                print(&format!("{}==> score {:.4} <==\n", if i > 0 { "\n" } else { "" }, h.score))?;
            }
            print(&format!("{text}\n"))?;
        }
        let ending = if interrupted { "interrupted".to_owned() } else { format!("best score {:.4}", found[0].score) };
        note(&format!("{name}: loaded in {:.2} s; {ending}", load.as_secs_f64()));
        note(&format!(
            "prefill {}, {prefill_rate:.1} tokens/s; {} of {}, {step_rate:.1} steps/s; {}",
            count_of(prompt.len(), "token"),
            count_of(steps, "step"),
            count_of(options.beams, "beam"),
            count_of(decoder.threads().count(), "thread")
        ));
        note(&format!("kernels: {}", kernels.join(", ")));
    }
    Ok(if interrupted { ExitCode::from(interrupt::EXIT_CODE) } else { ExitCode::SUCCESS })
}
