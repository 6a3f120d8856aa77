//! `kvlane cache-error`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::model::{Run, open};
use super::output::{bar, count_of, note, print, print_json};
use super::perplexity::Tokens;
use super::values;
use crate::CacheFormat;
use crate::driver::cache::Formats;
use crate::driver::cache_error::{CacheError, Deviation, cache_error};
use crate::driver::error::Result;

/// Measure how far keys, values and attention over caches of some formats are from those over a cache in f32.
///
/// Runs the model over a text, writes the keys and values of every layer to a cache of each format, and reads them back. Prints a Markdown
/// table of the cosine between the vectors of a head (mean and least) and the largest error of an element in units of the layer's
/// root mean square: for keys, for values, and for the outputs of attention. Every format is measured unless one is named.
#[derive(Debug, Args)]
pub(super) struct Deviations {
    #[command(flatten)]
    run: Run,
    /// The text, in UTF-8
    text: PathBuf,
    /// Cut the text into windows of N tokens, each computed from an empty cache. Default: the model's context, at most 2048
    #[arg(long, value_name = "N", value_parser = values::at_least_one)]
    context: Option<usize>,
    /// Show every layer, too
    #[arg(long)]
    layers: bool,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn deviations(args: &Deviations) -> Result<()> {
    args.run.check()?;
    let file = open(args.run.model.as_ref())?;
    let Tokens { ids, context, first } = Tokens::read(&args.text, &file, args.context)?;
    let dim = file.config().head_dim;
    let formats: Vec<Formats> = match args.run.names_formats() {
        true => vec![args.run.formats()],
        false => CacheFormat::ALL
            .into_iter()
            .filter(|format| dim.is_multiple_of(format.unit_elements()))
            .map(|format| Formats::from(format).rotate(args.run.rotate))
            .collect(),
    };
    let decoder = args.run.load(&file, context)?;
    let progress = bar("measuring", ids.len(), false);
    let found = cache_error(&decoder, &ids, (context, first), &formats, &mut |done| {
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();

    let c = decoder.config();
    let token_bytes = |formats: &Formats| c.layers.len() * formats.token_bytes(c.kv_heads, c.head_dim);
    if args.json {
        let deviation = |d: &Deviation| json!({ "mean_cosine": d.mean_cosine, "least_cosine": d.least_cosine, "largest_error": d.largest_error });
        let error = |e: &CacheError| json!({ "k": deviation(&e.k), "v": deviation(&e.v), "attention": deviation(&e.attention) });
        let row = |(formats, layers): (&Formats, &Vec<CacheError>)| {
            let mut object = error(&CacheError::of_all(layers));
            object["k_type"] = formats.k.name().into();
            object["v_type"] = formats.v.name().into();
            object["rotate"] = formats.rotate.name().into();
            object["cache_bytes_per_token"] = token_bytes(formats).into();
            if args.layers {
                object["layers"] = layers.iter().map(error).collect();
            }
            object
        };
        return print_json(&json!({
            "model": c.name,
            "threads": decoder.threads().count(),
            "isa": decoder.context().isa().name(),
            "context": context,
            "tokens": ids.len(),
            "formats": formats.iter().zip(&found).map(row).collect::<Vec<Value>>(),
        }));
    }
    let parts = ["keys", "values", "attention"].map(|part| format!("{part}: cosine | least | largest error |"));
    let layer_head = if args.layers { [" layer |", " ---: |"] } else { [""; 2] };
    let mut text = format!("| keys and values | bytes per token |{} {}\n", layer_head[0], parts.join(" "));
    text += &format!("| --- | ---: |{}{}\n", layer_head[1], " ---: |".repeat(9));
    for (formats, layers) in formats.iter().zip(&found) {
        let mut row = |layer: &str, e: &CacheError| {
            let cell =
                |d: &Deviation| format!(" {:.6} | {:.6} | {:.4} |", d.mean_cosine, d.least_cosine, d.largest_error);
            let layer = if args.layers { format!(" {layer} |") } else { String::new() };
            let cells: String = [&e.k, &e.v, &e.attention].map(cell).concat();
            text += &format!("| {formats} | {} |{layer}{cells}\n", token_bytes(formats));
        };
        if args.layers {
            layers.iter().enumerate().for_each(|(i, e)| row(&i.to_string(), e));
        }
        row("all", &CacheError::of_all(layers));
    }
    print(&text)?;
    note(&format!(
        "{}, {} in windows of {context}, {}",
        c.name.as_deref().unwrap_or("model"),
        count_of(ids.len(), "token"),
        decoder.context().isa(),
    ));
    Ok(())
}
