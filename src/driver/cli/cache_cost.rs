//! `kvlane cache-cost`.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::model::{Run, open};
use super::output::{bar, count_of, mebibytes, note, print, print_json};
use super::values;
use crate::driver::cache::Cache;
use crate::driver::decoder::{Logits, Scratch};
use crate::driver::error::{Error, Result};

/// Measure what a token costs with the cache and without, against the length of the context.
///
/// Prints a Markdown table: for each context length, the milliseconds for the next token with the cache, and by
/// computing the whole context again. Each is the median of several runs.
#[derive(Debug, Args)]
pub(super) struct CacheCost {
    #[command(flatten)]
    run: Run,
    /// The longest context to measure; lengths double from 16 up to it. Default: the model's context, at most 1024
    #[arg(long, value_name = "N", value_parser = values::count)]
    max_context: Option<usize>,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn cache_cost(args: &CacheCost) -> Result<()> {
    args.run.check()?;
    let file = open(args.run.model.as_ref())?;
    let longest = args.max_context.unwrap_or(file.config().context.min(1024));
    if longest < 16 {
        return Err(Error::argument(format!("contexts of up to {longest} tokens; 16 is the least")));
    }
    Cache::bytes_for(file.config(), 1, longest.saturating_add(1), args.run.formats())?;
    let decoder = args.run.load(&file, longest + 1)?;
    let lengths: Vec<usize> =
        std::iter::successors(Some(16usize), |n| n.checked_mul(2)).take_while(|&n| n < longest).collect();
    let lengths = [lengths, vec![longest]].concat();

    // The cost does not depend on the tokens.
    let ids: Vec<u32> = (0..=longest).map(|i| (i % decoder.config().vocab) as u32).collect();
    let mut cache = Cache::new(decoder.config(), 1, longest + 1, args.run.formats())?;
    let mut scratch = Scratch::default();
    let progress = bar("measuring", 2 * lengths.iter().sum::<usize>(), false);
    let mut rows = Vec::new();
    for &n in &lengths {
        let mut feed = |cache: &mut Cache, ids: &[u32]| -> Result<Duration> {
            let start = Instant::now();
            decoder.forward(cache, &mut scratch, 0, &[ids], Logits::Last)?;
            Ok(start.elapsed())
        };
        cache.reset(0);
        feed(&mut cache, &ids[..n])?;
        progress.inc(n as u64);
        let mut with = Vec::new();
        for _ in 0..9 {
            cache.truncate(0, n)?;
            with.push(feed(&mut cache, &ids[n..=n])?);
        }
        let mut without = Vec::new();
        for _ in 0..3 {
            cache.reset(0);
            without.push(feed(&mut cache, &ids[..=n])?);
        }
        progress.inc(n as u64);
        rows.push((n, median(with), median(without)));
    }
    progress.finish_and_clear();

    if args.json {
        return print_json(&json!({
            "model": decoder.config().name,
            "threads": decoder.threads().count(),
            "isa": decoder.context().isa().name(),
            "k_type": args.run.formats().k.name(),
            "v_type": args.run.formats().v.name(),
            "rotate": args.run.formats().rotate.name(),
            "cache_bytes": cache.bytes(),
            "points": rows.iter().map(|(n, with, without)| json!({
                "context": n, "cached_ms": with, "recomputed_ms": without,
            })).collect::<Vec<_>>(),
        }));
    }
    let mut text = String::from(
        "| context (tokens) | with the cache (ms/token) | without (ms/token) | ratio |\n| ---: | ---: | ---: | ---: |\n",
    );
    for (n, with, without) in rows {
        text += &format!("| {n} | {with:.2} | {without:.2} | {:.1} |\n", without / with);
    }
    print(&text)?;
    note(&format!(
        "{}, {}, {}, cache in {}, {} for {} tokens",
        decoder.config().name.as_deref().unwrap_or("model"),
        count_of(decoder.threads().count(), "thread"),
        decoder.context().isa(),
        args.run.formats(),
        mebibytes(cache.bytes()),
        cache.capacity()
    ));
    Ok(())
}

/// In milliseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e3
}
