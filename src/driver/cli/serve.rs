//! `kvlane generate --prompts`: requests come as lines of JSON, events go as lines of JSON.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::generate::{Figures, Generate};
use super::interrupt::{self, Interrupts};
use super::output::{count_of, print};
use super::text::{MOST_TEXT, Prompts};
use crate::driver::cache::Cache;
use crate::driver::chat::Message;
use crate::driver::error::{Error, Result};
use crate::driver::model::ModelFile;
use crate::driver::scheduler::{Event, Finish, Logprobs, Overlong, Request, RequestId, Scheduler};
use crate::driver::tokenizer::Tokenizer;

/// A request as a line says it, in the names that public completion interfaces use.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    seed: Option<u64>,
    stop: Option<OneOrMany>,
    stop_token_ids: Option<Vec<u32>>,
    logit_bias: Option<BTreeMap<u32, f32>>,
    allowed_token_ids: Option<Vec<u32>>,
    logprobs: Option<LogprobsWanted>,
    n: Option<usize>,
    keep_last: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a number of tokens, or true or false")]
enum LogprobsWanted {
    Flag(bool),
    Count(usize),
}

impl Line {
    /// The request, with the options of the command for what the line leaves out.
    fn request(self, args: &Generate, prompts: &Prompts) -> Result<Request> {
        let ids = match (&self.prompt, &self.messages) {
            (Some(text), None) => prompts.text(text, args.chat)?,
            (None, Some(messages)) => prompts.conversation(messages)?,
            _ => return Err(Error::argument("a request has either \"prompt\" or \"messages\"")),
        };
        let mut request = args.sampling.request(ids);
        let options = request.sampling;
        request.sampling = options
            .temperature(self.temperature.unwrap_or(options.temperature))
            .top_p(self.top_p.unwrap_or(options.top_p))
            .top_k(self.top_k.unwrap_or(options.top_k))
            .seed(self.seed.unwrap_or(options.seed));
        if let Some(max_tokens) = self.max_tokens {
            request.max_tokens = max_tokens;
        }
        match self.stop {
            Some(OneOrMany::One(text)) => request.stop = vec![text],
            Some(OneOrMany::Many(texts)) => request.stop = texts,
            None => (),
        }
        request.stop_tokens = self.stop_token_ids.unwrap_or_default();
        request.logit_bias = self.logit_bias.into_iter().flatten().collect();
        request.allowed = self.allowed_token_ids;
        request.logprobs = match self.logprobs {
            Some(LogprobsWanted::Count(k)) => Some(k),
            Some(LogprobsWanted::Flag(true)) => Some(0),
            Some(LogprobsWanted::Flag(false)) | None => None,
        };
        request.samples = self.n.unwrap_or(1);
        if self.keep_last.unwrap_or(args.keep_last) {
            request.overlong = Overlong::KeepLast;
        }
        Ok(request)
    }
}

/// Sends the lines that are not blank, with their numbers from 1, until the receiver is gone.
pub(super) fn read_lines(from: impl Read, lines: &SyncSender<(usize, Result<String>)>) {
    let mut from = BufReader::new(from);
    for number in 1.. {
        let mut bytes = Vec::new();
        let line = match from.by_ref().take(MOST_TEXT).read_until(b'\n', &mut bytes) {
            Ok(0) => return,
            Ok(n) if n as u64 == MOST_TEXT => {
                Err(Error::argument(format!("the line is longer than {MOST_TEXT} bytes")))
            }
            Ok(_) => String::from_utf8(bytes).map_err(|e| Error::argument(format!("the line is not UTF-8: {e}"))),
            Err(e) => Err(Error::argument(format!("the line cannot be read: {e}"))),
        };
        let is_last = line.is_err();
        let is_blank = line.as_ref().is_ok_and(|text| text.trim().is_empty());
        // After an error there is no telling where the next line begins.
        if !is_blank && (lines.send((number, line)).is_err() || is_last) {
            return;
        }
    }
}

/// A request that has not ended.
struct Running {
    /// The number of its line.
    line: usize,
    id: Option<Value>,
    prompt_tokens: usize,
    /// Of every sample: tokens, and text.
    samples: BTreeMap<usize, (usize, String)>,
    left: usize,
}

pub(super) fn serve(
    args: &Generate,
    path: &Path,
    file: ModelFile,
    tokenizer: &Tokenizer,
    prompts: &Prompts,
) -> Result<ExitCode> {
    let start = Instant::now();
    // Opened first, so that a wrong path fails before the weights are loaded.
    let input = open_lines(path)?;
    let capacity = args.context.map_or(file.config().context, |n| n.min(file.config().context));
    Cache::bytes_for(file.config(), args.slots, capacity, args.run.formats())?;
    let decoder = args.run.load(&file, capacity)?;
    let name = decoder.config().name.clone().unwrap_or_else(|| file.format());
    drop(file);
    let load = start.elapsed();
    let mut scheduler = Scheduler::new(&decoder, args.slots, capacity, args.run.formats())?.tokenizer(tokenizer);
    let interrupts = Interrupts::watch()?;

    let (sender, receiver) = sync_channel(args.slots);
    std::thread::spawn(move || read_lines(input, &sender));
    let mut service = Service::new(args, prompts, tokenizer, Box::new(|line| print(&line)));
    let mut open = true;
    loop {
        if open && interrupts.pressed() {
            open = false;
            scheduler.cancel_all();
        }
        // A few requests wait, so that a slot that becomes free is filled at once.
        while open && scheduler.waiting() < args.slots {
            match next_line(&receiver, scheduler.is_idle()) {
                Next::Line(number, line) => service.submit(&mut scheduler, number, line)?,
                Next::Later => break,
                Next::End => open = false,
            }
        }
        if scheduler.is_idle() {
            if !open {
                break;
            }
            continue;
        }
        for event in scheduler.step() {
            service.report(event)?;
        }
    }
    let figures = Figures { name, load, decoder: &decoder, formats: args.run.formats(), scheduler: &scheduler };
    figures.note(
        &format!("{} in {}", count_of(service.requests, "request"), count_of(args.slots, "slot")),
        &format!("; {}", count_of(scheduler.statistics().steps, "step")),
    );
    figures.note_kernels();
    Ok(match (interrupts.pressed(), service.failed) {
        (true, _) => ExitCode::from(interrupt::EXIT_CODE),
        (false, failed) => ExitCode::from(u8::from(failed)),
    })
}

/// Opens a file of requests; `-` is standard input. A pipe is as good as a file.
pub(super) fn open_lines(path: &Path) -> Result<Box<dyn Read + Send>> {
    match path.to_str() {
        Some("-") => Ok(Box::new(std::io::stdin())),
        _ if path.is_dir() => Err(Error::argument(format!("{} is a directory, not a file", path.display()))),
        _ => Ok(Box::new(File::open(path).map_err(|e| Error::io(path, e))?)),
    }
}

enum Next {
    Line(usize, Result<String>),
    Later,
    End,
}

/// The next line; without anything else to do, waits a little for it.
fn next_line(receiver: &Receiver<(usize, Result<String>)>, idle: bool) -> Next {
    if idle {
        return match receiver.recv_timeout(Duration::from_millis(50)) {
            Ok((number, line)) => Next::Line(number, line),
            Err(RecvTimeoutError::Timeout) => Next::Later,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        };
    }
    match receiver.try_recv() {
        Ok((number, line)) => Next::Line(number, line),
        Err(TryRecvError::Empty) => Next::Later,
        Err(TryRecvError::Disconnected) => Next::End,
    }
}

pub(super) struct Service<'a> {
    args: &'a Generate,
    prompts: &'a Prompts<'a>,
    tokenizer: &'a Tokenizer,
    running: BTreeMap<RequestId, Running>,
    pub(super) requests: usize,
    /// Whether a line was no request, or a request ended by an error.
    pub(super) failed: bool,
    /// Takes a line of output, with its end.
    out: Box<dyn FnMut(String) -> Result<()> + 'a>,
}

impl<'a> Service<'a> {
    pub(super) fn new(
        args: &'a Generate,
        prompts: &'a Prompts<'a>,
        tokenizer: &'a Tokenizer,
        out: Box<dyn FnMut(String) -> Result<()> + 'a>,
    ) -> Self {
        Self { args, prompts, tokenizer, running: BTreeMap::new(), requests: 0, failed: false, out }
    }

    /// Submits a line. A bad one is an event.
    pub(super) fn submit(&mut self, scheduler: &mut Scheduler, number: usize, line: Result<String>) -> Result<()> {
        self.requests += 1;
        let mut id = None;
        let submitted = line.and_then(|text| {
            let bad = |e: serde_json::Error| Error::argument(format!("not a request: {e}"));
            let mut value: Value = serde_json::from_str(&text).map_err(bad)?;
            // Every event repeats the id, even if the rest of the line is wrong.
            id = value.as_object_mut().and_then(|object| object.remove("id"));
            let line: Line = serde_json::from_value(value).map_err(bad)?;
            let request = line.request(self.args, self.prompts)?;
            let (n, prompt) = (request.samples, request.prompt.len());
            scheduler.submit(request).map(|request| (request, n, prompt))
        });
        match submitted {
            Ok((request, left, all)) => {
                // The length after a cut.
                let prompt_tokens = scheduler.prompt_progress(request).map_or(all, |(_, n)| n);
                let samples = BTreeMap::new();
                self.running.insert(request, Running { line: number, id, prompt_tokens, samples, left });
                Ok(())
            }
            Err(e) => {
                self.failed = true;
                let mut object = head("error", number, id.as_ref());
                object.insert("error".into(), e.to_string().into());
                (self.out)(line_of(object))
            }
        }
    }

    pub(super) fn report(&mut self, event: Event) -> Result<()> {
        let tokenizer = self.tokenizer;
        let Some(running) = self.running.get_mut(&event.request) else { return Ok(()) };
        let (tokens, text) = running.samples.entry(event.sample).or_default();
        *text += &event.text;
        if let Some(token) = event.token {
            *tokens += 1;
            let mut object = head("token", running.line, running.id.as_ref());
            object.insert("index".into(), event.sample.into());
            object.insert("token".into(), token.into());
            object.insert("text".into(), event.text.into());
            if let Some(Logprobs { chosen, top, .. }) = &event.logprobs {
                let top: Vec<Value> = top
                    .iter()
                    .map(|&(token, p)| json!({ "token": token, "text": text_of(tokenizer, token), "logprob": number(p) }))
                    .collect();
                object.insert("logprob".into(), number(*chosen));
                object.insert("top_logprobs".into(), top.into());
            }
            (self.out)(line_of(object))?;
        }
        let Some(finish) = event.finish else { return Ok(()) };
        let mut object = head("end", running.line, running.id.as_ref());
        object.insert("index".into(), event.sample.into());
        object.insert("finish".into(), finish.name().into());
        if let Finish::Error(sentence) = finish {
            self.failed = true;
            object.insert("error".into(), sentence.into());
        }
        object.insert("text".into(), std::mem::take(text).into());
        object.insert("prompt_tokens".into(), running.prompt_tokens.into());
        object.insert("tokens".into(), (*tokens).into());
        running.left -= 1;
        if running.left == 0 {
            self.running.remove(&event.request);
        }
        (self.out)(line_of(object))
    }
}

/// The text of a token by itself; the name of one that has none, as tokens for turns.
fn text_of(tokenizer: &Tokenizer, token: u32) -> Option<String> {
    let text = tokenizer.decode(&[token]).ok().filter(|text| !text.is_empty());
    text.or_else(|| tokenizer.token(token))
}

/// JSON has no infinity; a token that cannot be chosen has the least number.
fn number(logprob: f32) -> Value {
    logprob.max(f32::MIN).into()
}

fn head(event: &str, line: usize, id: Option<&Value>) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("event".into(), event.into());
    object.insert("line".into(), line.into());
    if let Some(id) = id {
        object.insert("id".into(), id.clone());
    }
    object
}

fn line_of(object: Map<String, Value>) -> String {
    format!("{}\n", Value::Object(object))
}
