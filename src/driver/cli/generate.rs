//! `kvlane generate`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::beams::{Beams, beams};
use super::guesses::{Guesses, guesses};
use super::interrupt::{self, Interrupts};
use super::model::{Run, open};
use super::output::{bar, count_of, note, print, print_json};
use super::serve::serve;
use super::text::{Conversation, Prompts, Sampling, prompt_text};
use super::values;
use crate::driver::cache::{Cache, Formats, PREFILL_CHUNK};
use crate::driver::decoder::Decoder;
use crate::driver::embedded;
use crate::driver::error::{Error, Result};
use crate::driver::model::ModelConfig;
use crate::driver::scheduler::{Event, Finish, Overlong, RequestId, Scheduler, Statistics, Streaming};
use crate::driver::tokenizer::Tokenizer;
use crate::{CacheFormat, Context, KernelInfo, Mesh, Op, Precision};

/// Continue texts.
///
/// The continuation goes to standard output as it is generated. Figures follow on standard error: tokens per second of
/// the prompt and of the generation, and the kernels that ran. Ctrl-C ends the text after the current token.
///
/// With --prompts, every line of a file is a request in JSON, and every event is a line of JSON. The keys of a request are
/// `prompt` or `messages`, and optionally `id`, `max_tokens`, `temperature`, `top_p`, `top_k`, `seed`, `stop`,
/// `stop_token_ids`, `logit_bias`, `allowed_token_ids`, `logprobs`, `n`, `keep_last`; what a line leaves out is as the
/// options say. A line that is no request, or whose request ends by an error, makes the exit code 1; the others are served.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kvlane generate --prompt 'And God said'
  kvlane generate --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'Once upon a time' --temperature 0
  kvlane generate --model SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt 'What is the capital of France?'
  kvlane generate --prompt 'And God said' --prompt 'In the beginning' --slots 2
  kvlane generate --prompts requests.jsonl --slots 8
  kvlane generate --prompt 'And God said' --window 128 --max-tokens 5000
  kvlane generate --prompt 'And God said' --beams 4 --samples 2 --max-tokens 20
  kvlane generate --prompt 'And God said' --lookup 3 --branches 2
  mpirun -n 4 kvlane generate --mesh data=2,model=2 --prompt 'And God said' --prompt 'The LORD'
  echo 'The moon' | kvlane generate --model ./Llama-3.2-1B --prompt - --kv-type bf16")]
pub(super) struct Generate {
    #[command(flatten)]
    pub(super) run: Run,
    /// The text to continue; `-` reads it from standard input. Special tokens can be written out. May be given several
    /// times
    #[arg(long, value_name = "TEXT", default_value = embedded::PROMPT)]
    pub(super) prompt: Vec<String>,
    /// Requests, one JSON object per line; `-` reads them from standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "json", "no_cache", "window"])]
    pub(super) prompts: Option<PathBuf>,
    /// Requests that run at the same time
    #[arg(long, value_name = "N", default_value = "4", value_parser = values::at_least_one)]
    pub(super) slots: usize,
    /// Tokens that a slot holds, prompt included, with --prompts. Default: the model's context
    #[arg(long, value_name = "N", requires = "prompts", value_parser = values::at_least_one)]
    pub(super) context: Option<usize>,
    /// Make each prompt a user's turn in a conversation, by the model's chat template
    #[arg(long)]
    pub(super) chat: bool,
    #[command(flatten)]
    pub(super) conversation: Conversation,
    #[command(flatten)]
    pub(super) sampling: Sampling,
    /// Keep the last tokens of a prompt that is longer than the context, instead of refusing it
    #[arg(long, conflicts_with = "window")]
    pub(super) keep_last: bool,
    /// Empty the cache before every token and compute the whole text again, to measure what the cache saves
    #[arg(long)]
    no_cache: bool,
    /// Continue beyond the model's context: keep the first tokens (see --sinks) and at least the N most recent ones,
    /// forget the tokens between them, and close the gap
    #[arg(long, value_name = "N", conflicts_with = "no_cache", value_parser = values::at_least_one)]
    window: Option<usize>,
    /// Number of first tokens that are never forgotten
    #[arg(long, value_name = "S", default_value = "4", requires = "window", value_parser = values::count)]
    sinks: usize,
    /// Write one JSON object with the text and the figures at the end, instead of the text
    #[arg(long)]
    pub(super) json: bool,
    /// Divide the work over the processes that mpirun has started: requests over data, heads and linear layers over model,
    /// keys over sequence; for instance data=2,model=2,sequence=2
    #[arg(long, value_name = "AXIS=N,...", value_parser = values::mesh,
        conflicts_with_all = ["no_cache", "window", "beams", "draft", "lookup"])]
    pub(super) mesh: Option<Mesh>,
    /// End if another process of the mesh has not answered for so long
    #[arg(long, value_name = "SECONDS", default_value = "600", requires = "mesh", value_parser = values::at_least_one)]
    pub(super) mesh_patience: usize,
    #[command(flatten)]
    pub(super) beams: Beams,
    #[command(flatten)]
    pub(super) guesses: Guesses,
}

/// What is ready when a text can begin.
pub(super) struct Loaded<'a> {
    pub(super) decoder: Decoder,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) prompt: Vec<u32>,
    pub(super) name: String,
    /// The number of tokens that a row must hold.
    pub(super) capacity: usize,
    pub(super) load: Duration,
    /// Names of the kernels that run.
    pub(super) kernels: Vec<&'static str>,
}

pub(super) fn generate(args: &Generate) -> Result<ExitCode> {
    args.run.check()?;
    if args.conversation.system.is_some() && !args.chat && args.prompts.is_none() {
        return Err(Error::argument("--system is given, but it needs --chat or --prompts"));
    }
    if let Some(mesh) = args.mesh {
        #[cfg(feature = "mpi")]
        return super::mesh::generate_on_mesh(args, mesh);
        #[cfg(not(feature = "mpi"))]
        return Err(Error::argument(format!(
            "--mesh of {} processes is given, but this program was built without the feature mpi",
            mesh.shards()?
        )));
    }
    let search = args.beams.options(args.sampling.max_tokens)?;
    let speculation = args.guesses.options(args.sampling.max_tokens, args.sampling.options())?;
    if (search.is_some() || speculation.is_some()) && args.prompt.len() > 1 {
        let option = if search.is_some() { "--beams takes" } else { "--draft and --lookup take" };
        return Err(Error::argument(format!("{option} one --prompt, but {} are given", args.prompt.len())));
    }
    let start = Instant::now();
    let file = open(args.run.model.as_ref())?;
    let tokenizer = file.tokenizer()?;
    let prompts = Prompts::new(file.config(), &tokenizer, &args.conversation)?;
    if let Some(path) = &args.prompts {
        return serve(args, path, file, &tokenizer, &prompts);
    }
    if args.prompt.iter().filter(|p| *p == "-").count() > 1 {
        return Err(Error::argument("--prompt - is given twice, but there is one standard input"));
    }
    let texts = args.prompt.iter().map(|argument| prompt_text(argument)).collect::<Result<Vec<_>>>()?;
    let ids = texts.iter().map(|text| prompts.text(text, args.chat)).collect::<Result<Vec<_>>>()?;
    let streaming = args.window.map(|window| Streaming::new(window).sinks(args.sinks));
    let capacity = capacity(args, file.config(), &ids, streaming)?;
    let slots = args.slots.min(ids.len());
    Cache::bytes_for(file.config(), slots, capacity, args.run.formats())?;
    let decoder = args.run.load(&file, capacity)?;
    let name = decoder.config().name.clone().unwrap_or_else(|| file.format());
    drop(file);
    let load = start.elapsed();
    let loaded = |decoder, ids: Vec<Vec<u32>>, name| {
        let kernels = kernel_names(&decoder, args.run.formats());
        let prompt = ids.into_iter().next().unwrap_or_default();
        Loaded { decoder, tokenizer: &tokenizer, prompt, name, capacity, load, kernels }
    };
    if let Some(options) = search {
        return beams(args, loaded(decoder, ids, name), options);
    }
    if let Some(options) = speculation {
        return guesses(args, loaded(decoder, ids, name), options);
    }

    let mut scheduler = Scheduler::new(&decoder, slots, capacity, args.run.formats())?
        .tokenizer(&tokenizer)
        .recompute(args.no_cache)
        .streaming(streaming)?;
    let overlong = if args.keep_last { Overlong::KeepLast } else { Overlong::Refuse };
    let submit = |ids: &Vec<u32>| scheduler.submit(args.sampling.request(ids.clone()).overlong(overlong));
    let requests = ids.iter().map(submit).collect::<Result<Vec<_>>>()?;
    let interrupts = Interrupts::watch()?;
    let mut completions = Completions::new(&texts, args.json)?;
    run(&mut scheduler, &interrupts, &mut completions, &requests, &ids)?;

    let figures = Figures { name, load, decoder: &decoder, formats: args.run.formats(), scheduler: &scheduler };
    if args.json {
        let mut object = completions.json(&ids);
        object["cached"] = (!args.no_cache).into();
        figures.add_to(&mut object);
        print_json(&object)?;
    } else {
        let ending = completions.ending(slots);
        figures.note(&ending, if args.no_cache { ", every token from nothing" } else { "" });
        if streaming.is_some() {
            note(&format!("cache of {capacity} tokens; {} tokens forgotten", scheduler.statistics().evicted));
        }
        figures.note_kernels();
    }
    let error = completions.error();
    match error {
        Some(error) => Err(error),
        None if interrupts.pressed() => Ok(ExitCode::from(interrupt::EXIT_CODE)),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// The number of tokens that a row must hold.
pub(super) fn capacity(
    args: &Generate,
    config: &ModelConfig,
    ids: &[Vec<u32>],
    streaming: Option<Streaming>,
) -> Result<usize> {
    if let Some(streaming) = streaming {
        let capacity = streaming.capacity(config.context);
        streaming.check(config, capacity)?;
        return Ok(capacity);
    }
    let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
    if longest > config.context && !args.keep_last {
        return Err(Error::argument(format!(
            "the prompt has {longest} tokens, but the model was made for {}",
            config.context
        )));
    }
    Ok(longest.saturating_add(args.sampling.max_tokens).min(config.context))
}

/// What became of a prompt.
#[derive(Debug, Default)]
pub(super) struct Completion {
    ids: Vec<u32>,
    text: String,
    finish: Option<Finish>,
}

impl Completion {
    pub(super) fn take(&mut self, token: Option<u32>, text: &str, finish: Option<Finish>) {
        self.ids.extend(token);
        self.text += text;
        self.finish = finish;
    }

    fn json(&self, prompt: &str, prompt_ids: &[u32]) -> Value {
        json!({
            "prompt": prompt,
            "text": self.text,
            "prompt_ids": prompt_ids,
            "ids": self.ids,
            "finish": self.finish.as_ref().map(Finish::name),
        })
    }

    fn ending(&self) -> &str {
        match &self.finish {
            Some(Finish::Eos) => "the model ended the text",
            Some(Finish::Stop) => "--stop reached",
            Some(Finish::MaxTokens) => "--max-tokens reached",
            Some(Finish::Full) => "the model's context is full",
            Some(Finish::Cancelled) => "interrupted",
            Some(Finish::Error(sentence)) => sentence,
            None => "not ended",
        }
    }
}

/// What became of all prompts. Unless they are wanted as JSON, their texts are printed in their order, the first that has not
/// ended as it comes.
pub(super) struct Completions<'a> {
    texts: &'a [String],
    pub(super) results: Vec<Completion>,
    json: bool,
    /// The prompt whose text is printed, and the bytes of it that were.
    current: usize,
    printed: usize,
}

impl<'a> Completions<'a> {
    /// For prompts of these texts, at least one.
    pub(super) fn new(texts: &'a [String], json: bool) -> Result<Self> {
        let results = texts.iter().map(|_| Completion::default()).collect();
        let this = Self { texts, results, json, current: 0, printed: 0 };
        if !json {
            this.header()?;
        }
        Ok(this)
    }

    fn header(&self) -> Result<()> {
        if self.texts.len() == 1 {
            return Ok(());
        }
        let gap = if self.current > 0 { "\n" } else { "" };
        print(&format!("{gap}==> {} <==\n", self.texts[self.current].replace('\n', " ")))
    }

    /// Prints what can be printed.
    pub(super) fn show(&mut self) -> Result<()> {
        while !self.json && self.current < self.results.len() {
            let result = &self.results[self.current];
            print(&result.text[self.printed..])?;
            self.printed = result.text.len();
            if result.finish.is_none() {
                break;
            }
            // A terminal, or a file that another program appends to, goes on in a new line.
            print("\n")?;
            (self.current, self.printed) = (self.current + 1, 0);
            if self.current < self.results.len() {
                self.header()?;
            }
        }
        Ok(())
    }

    /// One object, or one for all.
    pub(super) fn json(&self, ids: &[Vec<u32>]) -> Value {
        let all = self.results.iter().zip(self.texts).zip(ids);
        let mut results: Vec<Value> = all.map(|((result, text), ids)| result.json(text, ids)).collect();
        match results.len() {
            1 => results.remove(0),
            _ => json!({ "completions": results }),
        }
    }

    pub(super) fn ending(&self, slots: usize) -> String {
        match &self.results[..] {
            [result] => result.ending().to_owned(),
            all => format!("{} in {}", count_of(all.len(), "prompt"), count_of(slots, "slot")),
        }
    }

    /// The error of the first that has one.
    pub(super) fn error(&self) -> Option<Error> {
        self.results.iter().find_map(|result| match &result.finish {
            Some(Finish::Error(sentence)) => Some(Error::request(sentence.clone())),
            _ => None,
        })
    }
}

/// Runs the requests.
fn run(
    scheduler: &mut Scheduler,
    interrupts: &Interrupts,
    completions: &mut Completions,
    requests: &[RequestId],
    ids: &[Vec<u32>],
) -> Result<()> {
    let progress = (ids[0].len() > PREFILL_CHUNK).then(|| bar("prompt", ids[0].len(), false));
    let mut stopping = false;
    while !scheduler.is_idle() {
        if interrupts.pressed() && !stopping {
            stopping = true;
            scheduler.cancel_all();
        }
        for Event { request, token, text, finish, .. } in scheduler.step() {
            if let Some(i) = requests.iter().position(|&id| id == request) {
                completions.results[i].take(token, &text, finish);
            }
        }
        match (&progress, scheduler.prompt_progress(requests[0])) {
            (Some(bar), Some((done, _))) => bar.set_position(done as u64),
            (Some(bar), None) => bar.finish_and_clear(),
            _ => (),
        }
        completions.show()?;
    }
    Ok(())
}

/// The figures that follow a generation.
pub(super) struct Figures<'a> {
    pub(super) name: String,
    pub(super) load: Duration,
    pub(super) decoder: &'a Decoder,
    pub(super) formats: Formats,
    pub(super) scheduler: &'a Scheduler<'a>,
}

impl Figures<'_> {
    /// Bytes that a token costs in all layers.
    fn token_bytes(&self) -> usize {
        let c = self.decoder.config();
        c.layers.len() * self.formats.token_bytes(c.kv_heads, c.head_dim)
    }

    fn rates(&self) -> (Statistics, f64, f64) {
        let per_second = |n: usize, time: Duration| if time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() };
        let s = self.scheduler.statistics();
        (s, per_second(s.prompt_tokens, s.prefill), per_second(s.decode_tokens, s.decode))
    }

    pub(super) fn add_to(&self, object: &mut Value) {
        let (statistics, prefill_rate, decode_rate) = self.rates();
        let figures = json!({
            "model": self.name,
            "threads": self.decoder.threads().count(),
            "isa": self.decoder.context().isa().name(),
            "k_type": self.formats.k.name(),
            "v_type": self.formats.v.name(),
            "rotate": self.formats.rotate.name(),
            "cache_bytes": self.scheduler.cache().bytes(),
            "cache_bytes_per_token": self.token_bytes(),
            "evicted": statistics.evicted,
            "load_seconds": self.load.as_secs_f64(),
            "prefill_tokens": statistics.prompt_tokens,
            "prefill_tokens_per_second": prefill_rate,
            "decode_tokens": statistics.decode_tokens,
            "decode_tokens_per_second": decode_rate,
            "kernels": kernel_names(self.decoder, self.formats),
        });
        if let (Value::Object(object), Value::Object(figures)) = (object, figures) {
            object.extend(figures);
        }
    }

    /// Writes the figures to standard error.
    pub(super) fn note(&self, ending: &str, remark: &str) {
        let (statistics, prefill_rate, decode_rate) = self.rates();
        note(&format!("{}: loaded in {:.2} s; {ending}", self.name, self.load.as_secs_f64()));
        note(&format!(
            "prefill {}, {prefill_rate:.1} tokens/s; decode {}, {decode_rate:.1} tokens/s; {}; cache in {}, {} bytes per token{remark}",
            count_of(statistics.prompt_tokens, "token"),
            count_of(statistics.decode_tokens, "token"),
            count_of(self.decoder.threads().count(), "thread"),
            self.formats,
            self.token_bytes(),
        ));
    }

    pub(super) fn note_kernels(&self) {
        note(&format!("kernels: {}", kernel_names(self.decoder, self.formats).join(", ")));
    }
}

/// The names of the kernels that run.
fn kernel_names(decoder: &Decoder, formats: Formats) -> Vec<&'static str> {
    kernels_that_run(decoder.context(), formats).iter().map(|k| k.name).collect()
}

/// The kernels of a pass of the decoder, which computes in f32 and stores in `formats`.
fn kernels_that_run(context: &Context, formats: Formats) -> Vec<KernelInfo> {
    let (f32, Formats { k, v, rotate }) = (CacheFormat::F32, formats);
    // Keys are rotated on their way into the cache; into a quantised one by two kernels.
    let keys = match k.dtype() {
        None => Op::KvWrite,
        Some(_) if rotate.k => Op::Hadamard,
        Some(_) => Op::Rope,
    };
    let values = if v.dtype().is_some() && rotate.v { Op::Hadamard } else { Op::KvWrite };
    let quantised = rotate.k && k.dtype().is_none() || rotate.v && v.dtype().is_none();
    let between = quantised.then_some((Op::Hadamard, f32, f32));
    let mut ran: Vec<KernelInfo> = [(Op::RopeAngles, f32, f32), (Op::Rope, f32, f32), (keys, f32, k), (values, f32, v)]
        .into_iter()
        .chain(between)
        .filter_map(|(op, src, dst)| context.kernel(op, src, dst))
        .chain(context.attention_kernels(k, v, Precision::Default))
        .collect();
    ran.dedup_by_key(|k| k.name);
    ran
}
