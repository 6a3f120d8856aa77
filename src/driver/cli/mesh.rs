//! `kvlane generate --mesh`: the processes that `mpirun` started serve requests together.
//!
//! Every process reads the same arguments. Process 0 reads standard input and the file of requests for all. A group (the
//! processes with the same part of the data) runs one scheduler in each of its processes, on the same requests; its first process
//! sends what is generated to process 0, which alone writes to standard output.
//!
//! Until all processes are ready, errors are agreed on: each process ends with a sentence. Later, a process that cannot
//! continue ends all others.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::ExitCode;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::exit_code;
use super::generate::{Completions, Figures, Generate, capacity};
use super::interrupt::{self, Interrupts};
use super::model::{context, open};
use super::output::{count_of, label, mebibytes, note, print, print_json};
use super::serve::{Service, open_lines, read_lines};
use super::text::{Prompts, prompt_text};
use crate::Mesh;
use crate::driver::decoder::Decoder;
use crate::driver::error::{Error, Result};
use crate::driver::mesh::{Group, MeshAxis, MeshPart, World};
use crate::driver::model::ModelFile;
use crate::driver::scheduler::{Event, Finish, Overlong, RequestId, Scheduler};
use crate::driver::tokenizer::Tokenizer;

/// How often process 0 looks for messages when it has nothing else to do.
const POLL: Duration = Duration::from_millis(1);

/// A message to process 0.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Of the prompt with this number.
    Piece { prompt: usize, token: Option<u32>, text: String, finish: Option<(String, String)> },
    /// A line of output.
    Line(String),
    /// The last of a process.
    End,
}

/// What is to be served, the same in all processes.
#[derive(Debug, Serialize, Deserialize)]
enum Input {
    Prompts(Vec<String>),
    /// The lines of a file with their numbers, and what is wrong with them.
    Lines(Vec<(usize, std::result::Result<String, String>)>),
}

impl Input {
    fn read(args: &Generate) -> Result<Self> {
        let Some(path) = &args.prompts else {
            return Ok(Self::Prompts(args.prompt.iter().map(|argument| prompt_text(argument)).collect::<Result<_>>()?));
        };
        let input = open_lines(path)?;
        let (sender, receiver) = sync_channel(1);
        std::thread::spawn(move || read_lines(input, &sender));
        Ok(Self::Lines(receiver.into_iter().map(|(n, line)| (n, line.map_err(|e| e.to_string()))).collect()))
    }

    fn len(&self) -> usize {
        match self {
            Self::Prompts(texts) => texts.len(),
            Self::Lines(lines) => lines.len(),
        }
    }
}

/// What a process has done, for process 0.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    prompt_tokens: usize,
    decode_tokens: usize,
    failed: bool,
    /// Bytes and exchanges along the axes model and sequence.
    received: [(u64, u64); 2],
}

/// Everything that is ready when the processes begin to serve.
struct Ready<'a> {
    decoder: Decoder,
    part: MeshPart,
    group: Group,
    input: Input,
    ids: Vec<Vec<u32>>,
    capacity: usize,
    tokenizer: &'a Tokenizer,
    name: String,
    load: Duration,
}

pub(super) fn generate_on_mesh(args: &Generate, mesh: Mesh) -> Result<ExitCode> {
    let patience = Duration::from_secs(args.mesh_patience as u64);
    let world = World::start(patience, |sentence| note(&format!("error: {sentence}")))?;
    label(format!("process {} of {}: ", world.rank(), world.size()));
    match prepare_and_serve(&world, args, mesh) {
        Ok(Ok(code)) => {
            world.finish();
            Ok(code)
        }
        Ok(Err(error)) => {
            world.abort(&error);
            Err(error)
        }
        Err(error) => {
            // All have the error. Each says so before any of them ends, since `mpirun` ends the others then.
            note(&format!("error: {error}"));
            world.finish();
            Ok(exit_code(&error))
        }
    }
}

/// The outer error is that of all processes, the inner one of this process alone.
fn prepare_and_serve(world: &World, args: &Generate, mesh: Mesh) -> Result<Result<ExitCode>> {
    let start = Instant::now();
    let file = world.agree(open(args.run.model.as_ref()))?;
    let tokenizer = world.agree(file.tokenizer())?;
    let prompts = world.agree(Prompts::new(file.config(), &tokenizer, &args.conversation))?;
    let ready = prepare(world, args, mesh, (&file, &tokenizer, &prompts), start)?;
    Ok(serve(world, args, &prompts, ready))
}

/// Prepares this process. Errors are those of all processes.
fn prepare<'a>(
    world: &World,
    args: &Generate,
    mesh: Mesh,
    (file, tokenizer, prompts): (&ModelFile, &'a Tokenizer, &Prompts),
    start: Instant,
) -> Result<Ready<'a>> {
    let (part, group) = world.agree(world.part(mesh))?;
    let config = file.config();
    let mut hash = DefaultHasher::new();
    format!("{config:?} {:?}", file.tensors().map(|all| all.iter().map(|t| t.bytes).sum::<usize>()).ok())
        .hash(&mut hash);
    for (what, value) in [
        ("the hash of the model's shape", format!("{:x}", hash.finish())),
        ("the command line", std::env::args().skip(1).collect::<Vec<_>>().join(" ")),
        ("the highest level of the kernels (--isa)", world.agree(context(args.run.isa))?.isa().name().to_owned()),
    ] {
        world.same(what, &value)?;
    }
    world.agree(part.check(config))?;

    let input = if world.rank() == 0 { Input::read(args) } else { Ok(Input::Lines(Vec::new())) };
    let input = world.agree(input)?;
    let bytes = serde_json::to_vec(&input).map_err(|e| Error::argument(e.to_string()))?;
    let input: Input = serde_json::from_slice(&world.broadcast(&bytes)?).map_err(|e| Error::argument(e.to_string()))?;
    let (n, what) = (input.len(), if args.prompts.is_some() { "request" } else { "prompt" });
    if n < mesh.data {
        return Err(Error::argument(format!("data={} parts, but there is {}", mesh.data, count_of(n, what))));
    }
    let ids = match &input {
        Input::Prompts(texts) => texts.iter().map(|text| prompts.text(text, args.chat)).collect::<Result<Vec<_>>>()?,
        Input::Lines(_) => Vec::new(),
    };
    let capacity = match &input {
        Input::Prompts(_) => capacity(args, config, &ids, None)?,
        Input::Lines(_) => args.context.map_or(config.context, |n| n.min(config.context)),
    };
    world.agree(part.check_capacity(capacity))?;
    let decoder = world.agree(args.run.load_part(file, capacity, Some(&part)))?;
    let name = config.name.clone().unwrap_or_else(|| file.format());
    Ok(Ready { decoder, part, group, input, ids, capacity, tokenizer, name, load: start.elapsed() })
}

/// Where the output of a process goes.
struct Output<'a> {
    world: &'a World,
    /// Whether it is the first of its group, which speaks for all.
    speaks: bool,
    /// In process 0, with texts.
    completions: Option<Completions<'a>>,
    /// The groups that have not ended, of process 0.
    open: usize,
    last: Instant,
}

impl Output<'_> {
    fn put(&mut self, message: Message) -> Result<()> {
        if !self.speaks {
            return Ok(());
        }
        if self.world.rank() == 0 {
            return self.take(message);
        }
        let bytes = serde_json::to_vec(&message).map_err(|e| Error::argument(e.to_string()))?;
        self.world.send(&bytes);
        Ok(())
    }

    fn take(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Piece { prompt, token, text, finish } => {
                let Some(completions) = &mut self.completions else { return Ok(()) };
                completions.results[prompt].take(token, &text, finish.map(finish_of));
                completions.show()
            }
            Message::Line(line) => print(&line),
            Message::End => {
                self.open -= 1;
                Ok(())
            }
        }
    }

    /// Takes what other processes have sent. Returns whether there was anything.
    fn poll(&mut self) -> Result<bool> {
        let mut any = false;
        while self.world.rank() == 0
            && let Some((_, bytes)) = self.world.receive()
        {
            self.take(serde_json::from_slice(&bytes).map_err(|e| Error::malformed(e.to_string()))?)?;
            (any, self.last) = (true, Instant::now());
        }
        Ok(any)
    }
}

fn finish_of((name, sentence): (String, String)) -> Finish {
    let all = [Finish::Eos, Finish::Stop, Finish::MaxTokens, Finish::Full, Finish::Cancelled];
    all.into_iter().find(|finish| finish.name() == name).unwrap_or(Finish::Error(sentence))
}

/// Serves this process's share of the requests.
fn serve(world: &World, args: &Generate, prompts: &Prompts, ready: Ready) -> Result<ExitCode> {
    let Ready { decoder, part, group, input, ids, capacity, tokenizer, name, load } = ready;
    let (first, shard, mesh) = (world.rank() == 0, part.shard(), part.mesh());
    let interrupts = Interrupts::watch()?;
    let own = shard.sequences(input.len());
    let slots = if args.prompts.is_some() { args.slots } else { args.slots.min(own.len()) };
    let mut scheduler = Scheduler::new(&decoder, slots, capacity, args.run.formats())?.tokenizer(tokenizer);
    let mut output = Output {
        world,
        speaks: shard.model() == 0 && shard.sequence() == 0,
        completions: None,
        open: mesh.data,
        last: Instant::now(),
    };
    let (stopped, failed) = match &input {
        Input::Prompts(texts) => {
            if first {
                output.completions = Some(Completions::new(texts, args.json)?);
            }
            let overlong = if args.keep_last { Overlong::KeepLast } else { Overlong::Refuse };
            let submit = |ids: &Vec<u32>| scheduler.submit(args.sampling.request(ids.clone()).overlong(overlong));
            let requests: Vec<RequestId> = ids[own.clone()].iter().map(submit).collect::<Result<_>>()?;
            let report = |output: &mut Output, Event { request, token, text, finish, .. }: Event| {
                let Some(i) = requests.iter().position(|&id| id == request) else { return Ok(()) };
                let finish = finish.map(|finish| {
                    let sentence = if let Finish::Error(sentence) = &finish { sentence.clone() } else { String::new() };
                    (finish.name().to_owned(), sentence)
                });
                output.put(Message::Piece { prompt: own.start + i, token, text, finish })
            };
            (run(&mut scheduler, &group, &interrupts, &mut output, report)?, false)
        }
        Input::Lines(lines) => {
            let (sender, receiver) = std::sync::mpsc::channel();
            let put = Box::new(|line| sender.send(line).map_err(|e| Error::request(e.to_string())));
            let mut service = Service::new(args, prompts, tokenizer, put);
            for (number, line) in &lines[own] {
                service.submit(&mut scheduler, *number, line.clone().map_err(Error::argument))?;
            }
            let flush = |output: &mut Output| receiver.try_iter().try_for_each(|line| output.put(Message::Line(line)));
            flush(&mut output)?;
            let stopped = run(&mut scheduler, &group, &interrupts, &mut output, |output, event| {
                service.report(event)?;
                flush(output)
            })?;
            (stopped, service.failed)
        }
    };
    output.put(Message::End)?;
    output.last = Instant::now();
    while first && output.open > 0 {
        if !output.poll()? {
            std::thread::sleep(POLL);
        }
        if output.last.elapsed().as_secs() > args.mesh_patience as u64 {
            return Err(Error::request(format!(
                "{} of the mesh have not answered for {} seconds",
                count_of(output.open, "group"),
                args.mesh_patience
            )));
        }
    }
    // Other groups may take long.
    world.be_patient();
    let statistics = scheduler.statistics();
    let received = [MeshAxis::Model, MeshAxis::Sequence].map(|axis| {
        let traffic = part.traffic(axis);
        (traffic.bytes, traffic.exchanges)
    });
    let Some(all) = everyone(
        world,
        &Done { prompt_tokens: statistics.prompt_tokens, decode_tokens: statistics.decode_tokens, failed, received },
    )?
    else {
        return Ok(ExitCode::SUCCESS);
    };
    let failed = all.iter().any(|done| done.failed);
    let figures = Figures { name, load, decoder: &decoder, formats: args.run.formats(), scheduler: &scheduler };
    let completions = output.completions.as_ref();
    if let Some(completions) = completions.filter(|_| args.json) {
        let mut object = completions.json(&ids);
        figures.add_to(&mut object);
        object["cached"] = true.into();
        object["mesh"] = summary(mesh, &all);
        print_json(&object)?;
    } else {
        let ending = match completions {
            Some(completions) => completions.ending(slots),
            None => format!("{} in {}", count_of(input.len(), "request"), count_of(slots, "slot")),
        };
        figures.note(&ending, if mesh.data > 1 { ", in this process's group" } else { "" });
        figures.note_kernels();
        note_traffic(mesh, &all);
    }
    match completions.and_then(Completions::error) {
        _ if stopped => Ok(ExitCode::from(interrupt::EXIT_CODE)),
        Some(error) => {
            note(&format!("error: {error}"));
            Ok(exit_code(&error))
        }
        None => Ok(ExitCode::from(u8::from(failed))),
    }
}

/// Steps until nothing is left to do in this group. Processes of a group stop together; returns whether Ctrl-C has stopped them.
fn run(
    scheduler: &mut Scheduler,
    group: &Group,
    interrupts: &Interrupts,
    output: &mut Output,
    mut report: impl FnMut(&mut Output, Event) -> Result<()>,
) -> Result<bool> {
    let mut stopping = false;
    while !scheduler.is_idle() {
        if !stopping && group.any(interrupts.pressed()) {
            stopping = true;
            scheduler.cancel_all();
        }
        for event in scheduler.step() {
            report(output, event)?;
        }
        output.poll()?;
    }
    Ok(stopping)
}

/// What all processes have done, in process 0.
fn everyone(world: &World, done: &Done) -> Result<Option<Vec<Done>>> {
    let bytes = serde_json::to_vec(done).map_err(|e| Error::argument(e.to_string()))?;
    let all = world.gather(&bytes)?;
    if world.rank() > 0 {
        return Ok(None);
    }
    let read = |bytes: &Vec<u8>| serde_json::from_slice(bytes).map_err(|e| Error::malformed(e.to_string()));
    all.iter().map(read).collect::<Result<_>>().map(Some)
}

fn summary(mesh: Mesh, all: &[Done]) -> Value {
    // The processes of a group have computed the same tokens.
    let per_group = mesh.model * mesh.sequence;
    let sum = |of: fn(&Done) -> usize| all.iter().step_by(per_group).map(of).sum::<usize>();
    let received = |axis: usize| {
        json!({
            "bytes": all.iter().map(|done| done.received[axis].0).sum::<u64>(),
            "exchanges": all.iter().map(|done| done.received[axis].1).sum::<u64>(),
        })
    };
    json!({
        "data": mesh.data, "model": mesh.model, "sequence": mesh.sequence,
        "prompt_tokens": sum(|done| done.prompt_tokens),
        "decode_tokens": sum(|done| done.decode_tokens),
        "received_over_model": received(0),
        "received_over_sequence": received(1),
    })
}

fn note_traffic(mesh: Mesh, all: &[Done]) {
    let s = summary(mesh, all);
    let of = |axis: &str| {
        let bytes = s[axis]["bytes"].as_u64().unwrap_or(0) as usize;
        format!("{} in {}", mebibytes(bytes), count_of(s[axis]["exchanges"].as_u64().unwrap_or(0) as usize, "exchange"))
    };
    note(&format!(
        "mesh data={},model={},sequence={}: {} prompt tokens and {} after them; all processes received {} over model, {} over \
         sequence",
        mesh.data,
        mesh.model,
        mesh.sequence,
        s["prompt_tokens"],
        s["decode_tokens"],
        of("received_over_model"),
        of("received_over_sequence")
    ));
}
