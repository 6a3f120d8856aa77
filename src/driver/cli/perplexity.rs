//! `kvlane perplexity`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::model::{Run, open};
use super::output::{bar, count_of, note, print, print_json};
use super::values::{self, format_parser};
use crate::CacheFormat;
use crate::driver::error::{Error, Result};
use crate::driver::files;
use crate::driver::model::ModelFile;
use crate::driver::perplexity::perplexity;

/// Measure how well a model predicts a text, and what the format of the cache does to that.
///
/// Prints the perplexity: e to the mean of the negative log-probabilities of the text's tokens. With --baseline it also prints the
/// distance of the next token's distributions from those with a cache of another format.
#[derive(Debug, Args)]
pub(super) struct Measure {
    #[command(flatten)]
    run: Run,
    /// The text, in UTF-8
    text: PathBuf,
    /// Compare with a cache of this format; f32 if none is named
    #[arg(
        long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "f32",
        value_parser = format_parser(), ignore_case = true
    )]
    baseline: Option<CacheFormat>,
    /// Cut the text into windows of N tokens, each predicted from an empty cache. Default: the model's context, at most 2048
    #[arg(long, value_name = "N", value_parser = values::at_least_one)]
    context: Option<usize>,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

/// The tokens of a text and the windows that they are cut into.
pub(super) struct Tokens {
    pub(super) ids: Vec<u32>,
    pub(super) context: usize,
    /// The token that every window starts with, if the model expects one.
    pub(super) first: Option<u32>,
}

impl Tokens {
    pub(super) fn read(path: &Path, file: &ModelFile, context: Option<usize>) -> Result<Self> {
        let text = files::text(path)?;
        let model_context = file.config().context;
        let context = context.unwrap_or(model_context.min(2048));
        if context > model_context {
            return Err(Error::argument(format!(
                "windows of {context} tokens, but the model was made for {model_context}"
            )));
        }
        let tokenizer = file.tokenizer()?;
        let (ids, plain) = (tokenizer.encode(&text, true)?, tokenizer.encode(&text, false)?);
        // The token that the tokenizer puts before a text, if it does.
        let first = ids.first().copied().filter(|_| ids.len() > plain.len() && ids.first() != plain.first());
        Ok(Self { ids, context, first })
    }
}

pub(super) fn measure(args: &Measure) -> Result<()> {
    args.run.check()?;
    let file = open(args.run.model.as_ref())?;
    let Tokens { ids, context, first } = Tokens::read(&args.text, &file, args.context)?;
    let formats = args.run.formats();
    let decoder = args.run.load(&file, context)?;
    let progress = bar("measuring", ids.len(), false);
    let baseline = args.baseline.map(Into::into);
    let result = perplexity(&decoder, &ids, (context, first), formats, baseline, &mut |done| {
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();

    let c = decoder.config();
    let token_bytes = c.layers.len() * formats.token_bytes(c.kv_heads, c.head_dim);
    if args.json {
        let mut object = json!({
            "model": c.name,
            "threads": decoder.threads().count(),
            "isa": decoder.context().isa().name(),
            "k_type": formats.k.name(),
            "v_type": formats.v.name(),
            "rotate": formats.rotate.name(),
            "cache_bytes_per_token": token_bytes,
            "context": context,
            "tokens": result.tokens,
            "perplexity": result.perplexity,
            "standard_error": result.error,
        });
        if let (Some(distance), Some(baseline)) = (&result.distance, args.baseline) {
            object["baseline"] = json!({
                "type": baseline.name(),
                "perplexity": distance.perplexity,
                "mean_kl_divergence": distance.mean_divergence,
                "largest_kl_divergence": distance.largest_divergence,
                "mean_cosine": distance.mean_cosine,
                "least_cosine": distance.least_cosine,
                "same_choice": distance.same_choice,
            });
        }
        return print_json(&object);
    }
    let mut lines = format!("perplexity    {:.4} +- {:.4}\n", result.perplexity, result.error);
    if let (Some(distance), Some(baseline)) = (&result.distance, args.baseline) {
        lines += &format!(
            "baseline      {:.4} in {baseline}\nKL divergence {:.3e} on average, {:.3e} at most\ncosine        {:.6} on average, {:.6} \
             at least\nsame choice   {:.2} %\n",
            distance.perplexity,
            distance.mean_divergence,
            distance.largest_divergence,
            distance.mean_cosine,
            distance.least_cosine,
            100.0 * distance.same_choice
        );
    }
    print(&lines)?;
    note(&format!(
        "{}, cache in {formats}, {token_bytes} bytes per token; {} in windows of {context}",
        c.name.as_deref().unwrap_or("model"),
        count_of(result.tokens, "token"),
    ));
    Ok(())
}
