//! The command line. Results (generated text, a table, a JSON object) go to standard output; progress, figures and
//! errors go to standard error.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::bench::{Bench, bench};
use super::cache::{Cache, Formats, PREFILL_CHUNK};
use super::decoder::{Decoder, Logits, Scratch};
use super::embedded;
use super::error::{Error, ErrorKind, Result};
use super::model::{Activation, ModelConfig, ModelFile, RopeConfig, Stretch};
use super::runner::{Finish, Request, Slots, Streaming};
use super::sampling::SamplerOptions;
use super::threads::Threads;
use super::tokenizer::Tokenizer;
use crate::bench::machine::{cpu_features, cpu_name};
use crate::{CacheFormat, Context, Isa, KernelInfo, Op, Pairing, Precision, RopeScaling, kernels};

/// Attention over a key/value cache for CPUs, shown on small language models.
#[derive(Debug, Parser)]
#[command(name = "kvlane", version, arg_required_else_help = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(Generate),
    Info(Info),
    Inspect(Inspect),
    CacheCost(CacheCost),
    Bench(Bench),
}

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
struct Generate {
    #[command(flatten)]
    run: Run,
    /// The text to continue; `-` reads it from standard input. Special tokens can be written out
    #[arg(long, value_name = "TEXT", default_value = embedded::PROMPT)]
    prompt: String,
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

/// Options of every command that runs a model.
#[derive(Debug, Args)]
struct Run {
    /// A GGUF file, or a directory with config.json, tokenizer.json and safetensors. Default: a tiny model that is part
    /// of this program
    #[arg(long, value_name = "FILE|DIR")]
    model: Option<PathBuf>,
    /// Number of threads; 0 is one per CPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Format of the keys and values in the cache; int8 has a scale per token and head
    #[arg(long, value_name = "FORMAT", default_value = "f32", value_parser = format_parser())]
    kv_type: CacheFormat,
    /// Format of the keys, if it is another than that of --kv-type
    #[arg(long, value_name = "FORMAT", value_parser = format_parser())]
    k_type: Option<CacheFormat>,
    /// Format of the values, if it is another than that of --kv-type
    #[arg(long, value_name = "FORMAT", value_parser = format_parser())]
    v_type: Option<CacheFormat>,
    /// The highest instruction-set level to use. Default: the best that this CPU has (and KVLANE_MAX_ISA allows)
    #[arg(long, value_name = "LEVEL", value_parser = isa_parser())]
    isa: Option<Isa>,
}

/// Show the CPU, the instruction-set levels of this build, and the kernel chosen for each operation.
#[derive(Debug, Args)]
struct Info {
    /// Choose kernels as if this were the highest level
    #[arg(long, value_name = "LEVEL", value_parser = isa_parser())]
    isa: Option<Isa>,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

/// Show a model's shape.
#[derive(Debug, Args)]
struct Inspect {
    /// A GGUF file, or a directory with config.json and safetensors
    file: PathBuf,
    /// Write JSON, with every tensor
    #[arg(long)]
    json: bool,
}

/// Measure what a token costs with the cache and without, against the length of the context.
///
/// Prints a Markdown table: for each context length, the milliseconds for the next token with the cache, and by
/// computing the whole context again. Each is the median of several runs.
#[derive(Debug, Args)]
struct CacheCost {
    #[command(flatten)]
    run: Run,
    /// The longest context to measure; lengths double from 16 up to it. Default: the model's context, at most 1024
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

fn format_parser() -> impl TypedValueParser<Value = CacheFormat> {
    PossibleValuesParser::new(CacheFormat::ALL.map(CacheFormat::name))
        .try_map(|s| CacheFormat::from_name(&s).ok_or_else(|| format!("no format is called {s}")))
}

pub(super) fn isa_parser() -> impl TypedValueParser<Value = Isa> {
    PossibleValuesParser::new(Isa::ALL.map(Isa::name))
        .try_map(|s| Isa::from_name(&s).ok_or_else(|| format!("no level is called {s}")))
}

/// Parses the arguments, runs the command, and reports an error.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate(&args),
        Command::Info(args) => info(&args),
        Command::Inspect(args) => inspect(&args),
        Command::CacheCost(args) => cache_cost(&args),
        Command::Bench(args) => bench(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of standard output has closed it, as in `kvlane generate | head -1`.
        Err(e) if e.kind() == ErrorKind::ClosedPipe => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::stdout)
}

fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

fn open(path: Option<&PathBuf>) -> Result<ModelFile> {
    match path {
        Some(path) => ModelFile::open(path),
        None => embedded::open(),
    }
}

/// A bar for bytes or tokens.
fn bar(what: &str, len: usize, bytes: bool) -> ProgressBar {
    let template = match bytes {
        true => "{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes}",
        false => "{prefix} {wide_bar} {pos}/{len} tokens",
    };
    progress_bar(what, len, template)
}

/// A bar on standard error if that is a terminal, otherwise a hidden one; `template` is in indicatif's syntax.
pub(super) fn progress_bar(what: &str, len: usize, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(len as u64), ProgressDrawTarget::stderr());
    bar.with_style(style).with_prefix(what.to_owned())
}

impl Run {
    /// The formats of the cache.
    fn formats(&self) -> Formats {
        Formats { k: self.k_type.unwrap_or(self.kv_type), v: self.v_type.unwrap_or(self.kv_type) }
    }

    /// Unpacks the model for sequences of up to `longest(config)` tokens.
    fn load(&self, file: &ModelFile, longest: usize) -> Result<Decoder> {
        let threads = Threads::new(self.threads)?;
        let progress = bar("loading", 0, true);
        let weights = threads.run(|| {
            file.weights(&|done, total| {
                progress.set_length(total as u64);
                progress.set_position(done as u64);
            })
        })?;
        progress.finish_and_clear();
        Decoder::new(file.config().clone(), weights, longest, self.isa, threads)
    }
}

fn generate(args: &Generate) -> Result<()> {
    let start = Instant::now();
    let file = open(args.run.model.as_ref())?;
    let tokenizer = file.tokenizer()?;
    let prompt = tokenizer.encode(&prompt_text(&args.prompt)?, true)?;
    let config = file.config();
    if prompt.is_empty() {
        return Err(Error::argument("the prompt has no tokens"));
    }
    let streaming = args.window.map(|window| Streaming { sinks: args.sinks, window });
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

    let mut slots =
        Slots::new(&decoder, 1, capacity, args.run.formats())?.recompute(args.no_cache).streaming(streaming)?;
    let request = Request {
        prompt: prompt.clone(),
        max_tokens: args.max_tokens,
        sampling: SamplerOptions {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
        },
    };

    let start = Instant::now();
    let progress = (prompt.len() > PREFILL_CHUNK).then(|| bar("prompt", prompt.len(), false));
    let mut event = slots.insert(request, &mut |done| {
        if let Some(bar) = &progress {
            bar.set_position(done as u64);
        }
    })?;
    if let Some(bar) = progress {
        bar.finish_and_clear();
    }
    let prefill = start.elapsed();

    let start = Instant::now();
    let mut tokens = Vec::new();
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    let mut emit = |piece: String| {
        if args.json {
            text += &piece;
            return Ok(());
        }
        print(&piece)
    };
    let finish = loop {
        tokens.push(event.token);
        if event.finish != Some(Finish::Eos) {
            emit(stream.push(event.token)?)?;
        }
        if let Some(finish) = event.finish {
            break finish;
        }
        event = slots.step()?.remove(0);
    };
    emit(stream.finish()?)?;
    let decode = start.elapsed();

    let per_second = |n: usize, time: Duration| n as f64 / time.as_secs_f64();
    // The prefill generates the first token.
    let (prefill_rate, decode_rate) = (per_second(prompt.len(), prefill), per_second(tokens.len() - 1, decode));
    let ran = kernels_that_run(decoder.context(), args.run.formats());
    let names: Vec<&str> = ran.iter().map(|k| k.name).collect();
    if args.json {
        return print_json(&json!({
            "model": name,
            "text": text,
            "prompt_ids": prompt,
            "ids": tokens,
            "finish": match finish {
                Finish::Eos => "eos",
                Finish::MaxTokens => "max_tokens",
                Finish::Full => "context",
            },
            "cached": !args.no_cache,
            "threads": decoder.threads().count(),
            "isa": decoder.context().isa().name(),
            "k_type": args.run.formats().k.name(),
            "v_type": args.run.formats().v.name(),
            "cache_bytes": slots.cache().bytes(),
            "evicted": slots.evicted(),
            "load_seconds": load.as_secs_f64(),
            "prefill_tokens_per_second": prefill_rate,
            "decode_tokens_per_second": decode_rate,
            "kernels": names,
        }));
    }
    if io::stdout().is_terminal() {
        print("\n")?;
    }
    let ending = match finish {
        Finish::Eos => "the model ended the text",
        Finish::MaxTokens => "--max-tokens reached",
        Finish::Full => "the model's context is full",
    };
    eprintln!("{name}: loaded in {:.2} s; {ending}", load.as_secs_f64());
    eprintln!(
        "prefill {} tokens, {prefill_rate:.1} tokens/s; decode {} tokens, {decode_rate:.1} tokens/s; {} threads{}",
        prompt.len(),
        tokens.len() - 1,
        decoder.threads().count(),
        if args.no_cache { ", every token from nothing" } else { "" }
    );
    if streaming.is_some() {
        eprintln!("cache of {capacity} tokens; {} tokens forgotten", slots.evicted());
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

fn info(args: &Info) -> Result<()> {
    let context = match args.isa {
        Some(isa) => Context::with_max_isa(isa)?,
        None => Context::new()?,
    };
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let features = cpu_features();
    let chosen: Vec<KernelInfo> = Op::ALL
        .into_iter()
        .flat_map(|op| CacheFormat::ALL.into_iter().map(move |src| (op, src)))
        .flat_map(|(op, src)| CacheFormat::ALL.into_iter().map(move |dst| (op, src, dst)))
        .filter_map(|(op, src, dst)| context.kernel(op, src, dst))
        .collect();
    let built = |level: Isa| kernels().filter(|k| k.isa == level).count();

    if args.json {
        return print_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "architecture": std::env::consts::ARCH,
            "cpu": cpu_name(),
            "cpus": cpus,
            "features": features.iter().map(|&(n, has)| (n.to_owned(), has.into())).collect::<serde_json::Map<_, _>>(),
            "levels": Isa::ALL.map(|level| json!({
                "name": level.name(),
                "needs": level.features(),
                "built": level.is_built(),
                "available": level.is_available(),
                "partial": level.is_partial(),
                "kernels": built(level),
            })),
            "isa": context.isa().name(),
            "chosen": chosen.iter().map(|k| json!({
                "op": k.op.name(), "from": k.src.name(), "to": k.dst.name(), "isa": k.isa.name(), "name": k.name,
            })).collect::<Vec<_>>(),
        }));
    }
    let mut text = format!(
        "kvlane {}\n\nCPU       {} ({cpus} usable)\n",
        env!("CARGO_PKG_VERSION"),
        cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned())
    );
    let list = |wanted: bool| {
        let names: Vec<&str> = features.iter().filter(|f| f.1 == wanted).map(|f| f.0).collect();
        if names.is_empty() { "-".to_owned() } else { names.join(" ") }
    };
    text += &format!("has       {}\nhas not   {}\n\nlevels\n", list(true), list(false));
    for level in Isa::ALL {
        let state = match (level.is_built(), level.is_available()) {
            (false, _) => "of another architecture".to_owned(),
            (true, false) => format!("{} kernels built; this CPU cannot run them", built(level)),
            (true, true) if level.is_partial() => format!("{} kernels, the others from avx512", built(level)),
            (true, true) => format!("{} kernels", built(level)),
        };
        let mark = if level == context.isa() { ", chosen" } else { "" };
        text += &format!("  {:<8}{state}{mark}\n", level.name());
    }
    text += "\nkernels\n";
    for k in &chosen {
        text += &format!("  {:<14}{:>5} -> {:<6}{}\n", k.op.name(), k.src.name(), k.dst.name(), k.name);
    }
    print(&text)
}

fn inspect(args: &Inspect) -> Result<()> {
    let file = ModelFile::open(&args.file)?;
    let c = file.config();
    let tensors = file.tensors()?;
    let mut types: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for t in &tensors {
        let entry = types.entry(t.ty).or_default();
        *entry = (entry.0 + 1, entry.1 + t.bytes);
    }
    let token_bytes = |format: CacheFormat| c.layers.len() * Formats::from(format).token_bytes(c.kv_heads, c.head_dim);

    if args.json {
        return print_json(&json!({
            "format": file.format(),
            "name": c.name,
            "parameters": c.parameters(),
            "vocab": c.vocab,
            "dim": c.dim,
            "layers": c.layers.len(),
            "attention": c.layers.iter().map(|l| json!({ "window": l.window, "rope": l.rope })).collect::<Vec<_>>(),
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "ffn_dim": c.ffn_dim,
            "active_parameters": c.active_parameters(),
            "experts": c.experts.map(|e| json!({ "count": e.count, "used": e.used, "normalized": e.normalized })),
            "rms_eps": c.rms_eps,
            "ropes": c.ropes.iter().map(|rope| json!({
                "base": rope.base,
                "rotary_dim": rope.rotary_dim,
                "pairing": pairing(rope),
                "scaling": stretch(rope),
            })).collect::<Vec<_>>(),
            "context": c.context,
            "tied": c.tied,
            "bos": c.bos,
            "eos": c.eos,
            "chat_template": c.chat_template,
            "cache_bytes_per_token": CacheFormat::ALL.map(|f| (f.name().to_owned(), token_bytes(f).into()))
                .into_iter().collect::<serde_json::Map<_, _>>(),
            "tensors": tensors.iter().map(|t| json!({
                "name": t.name, "type": t.ty, "shape": t.shape, "bytes": t.bytes,
            })).collect::<Vec<_>>(),
        }));
    }
    let tokens = |ids: &[u32], tokenizer: Option<&Tokenizer>| {
        let name = |id: u32| tokenizer.and_then(|t| t.token(id)).map_or(id.to_string(), |t| format!("{id} {t:?}"));
        if ids.is_empty() { "-".to_owned() } else { ids.iter().map(|&id| name(id)).collect::<Vec<_>>().join(", ") }
    };
    // Show the shape even if the tokenizer cannot be built.
    let tokenizer = file.tokenizer();
    let named = tokenizer.as_ref().ok();
    let bytes: usize = tensors.iter().map(|t| t.bytes).sum();
    let types: Vec<String> =
        types.iter().map(|(ty, (n, bytes))| format!("{ty} x{n} ({})", mebibytes(*bytes))).collect();
    let rope = |rope: &RopeConfig| {
        let (pairing, stretch) = (pairing(rope), stretch(rope));
        format!("base {}, {} of {} elements, {pairing}, {stretch}", rope.base, rope.rotary_dim, c.head_dim)
    };
    let lines = [
        ("format", file.format()),
        ("name", c.name.clone().unwrap_or_else(|| "-".to_owned())),
        (
            "parameters",
            format!(
                "{}{} in {} tensors, {}",
                c.parameters(),
                if c.experts.is_some() { format!(", {} per token,", c.active_parameters()) } else { String::new() },
                tensors.len(),
                mebibytes(bytes)
            ),
        ),
        ("types", types.join(", ")),
        ("vocabulary", format!("{}{}", c.vocab, if c.tied { ", embedding tied to the head" } else { "" })),
        ("layers", layers(c)),
        (
            "width",
            format!(
                "{}, {} in {} ({})",
                c.dim,
                c.ffn_dim,
                match c.experts {
                    Some(e) => format!("each of {} experts, {} of them per token", e.count, e.used),
                    None => "the feed-forward part".to_owned(),
                },
                match c.activation {
                    Activation::Silu => "SwiGLU",
                    Activation::GeluTanh => "GeGLU",
                }
            ),
        ),
        ("heads", format!("{} over {} key/value heads of {}", c.heads, c.kv_heads, c.head_dim)),
        ("rope", c.ropes.iter().map(rope).collect::<Vec<_>>().join("; local layers: ")),
        ("context", format!("{} tokens", c.context)),
        (
            "cache",
            format!(
                "{} bytes per token in f32, {} in f16 or bf16, {} in int8{}",
                token_bytes(CacheFormat::F32),
                token_bytes(CacheFormat::F16),
                token_bytes(CacheFormat::Int8),
                if c.layers.iter().any(|l| l.window.is_some()) {
                    format!("; local layers keep the tokens of their window and {PREFILL_CHUNK} more")
                } else {
                    String::new()
                }
            ),
        ),
        ("starts with", tokens(c.bos.as_slice(), named)),
        ("ends with", tokens(&c.eos, named)),
        ("chat template", if c.chat_template.is_some() { "yes" } else { "no" }.to_owned()),
    ];
    print(&lines.iter().map(|(what, value)| format!("{what:<14}{value}\n")).collect::<String>())?;
    if let Err(e) = &tokenizer {
        eprintln!("note: the tokenizer cannot be built: {e}");
    }
    Ok(())
}

fn mebibytes(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn layers(c: &ModelConfig) -> String {
    let mut windows: BTreeMap<usize, usize> = BTreeMap::new();
    c.layers.iter().filter_map(|l| l.window).for_each(|n| *windows.entry(n).or_default() += 1);
    let windows = windows.iter().map(|(n, layers)| format!(", {layers} of them see the last {n} tokens"));
    format!("{}{}", c.layers.len(), windows.collect::<String>())
}

fn pairing(rope: &RopeConfig) -> &'static str {
    match rope.pairing {
        Pairing::Interleaved => "neighbouring pairs",
        Pairing::HalfSplit => "pairs of halves",
    }
}

fn stretch(rope: &RopeConfig) -> String {
    match &rope.stretch {
        Stretch::Fixed(RopeScaling::None) => "not scaled".to_owned(),
        Stretch::Fixed(scaling) => format!("scaled by {scaling:?}"),
        Stretch::LongRope { factor, .. } => format!("LongRoPE by {factor}"),
        Stretch::Divisors(_) => "scaled by a divisor a frequency".to_owned(),
    }
}

fn cache_cost(args: &CacheCost) -> Result<()> {
    let file = open(args.run.model.as_ref())?;
    let longest = args.max_context.unwrap_or(file.config().context.min(1024));
    if longest < 16 {
        return Err(Error::argument(format!("contexts of up to {longest} tokens; 16 is the least")));
    }
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
    eprintln!(
        "{}, {} threads, {}, cache in {}, {} for {} tokens",
        decoder.config().name.as_deref().unwrap_or("model"),
        decoder.threads().count(),
        decoder.context().isa(),
        args.run.formats(),
        mebibytes(cache.bytes()),
        cache.capacity()
    );
    Ok(())
}

/// In milliseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_prompt_may_begin_with_a_dash() {
        let cli = Cli::parse_from(["kvlane", "generate", "--prompt=-", "--isa", "scalar", "--kv-type", "bf16"]);
        let Command::Generate(args) = cli.command else { panic!("not generate") };
        assert_eq!((args.run.isa, args.prompt.as_str()), (Some(Isa::Scalar), "-"));
        assert_eq!(args.run.formats(), CacheFormat::Bf16.into());
        assert!(Cli::try_parse_from(["kvlane", "generate", "--isa", "mmx"]).is_err());
    }

    #[test]
    fn keys_and_values_have_formats_of_their_own() {
        let formats = |args: &[&str]| {
            let cli = Cli::parse_from([&["kvlane", "generate"], args].concat());
            let Command::Generate(args) = cli.command else { panic!("not generate") };
            args.run.formats()
        };
        let of = |k, v| Formats { k, v };
        assert_eq!(formats(&[]), of(CacheFormat::F32, CacheFormat::F32));
        assert_eq!(formats(&["--kv-type", "int8"]), of(CacheFormat::Int8, CacheFormat::Int8));
        assert_eq!(formats(&["--k-type", "int8"]), of(CacheFormat::Int8, CacheFormat::F32));
        assert_eq!(formats(&["--kv-type", "bf16", "--v-type", "int8"]), of(CacheFormat::Bf16, CacheFormat::Int8));
        assert!(Cli::try_parse_from(["kvlane", "generate", "--k-type", "int4"]).is_err());
    }
}
