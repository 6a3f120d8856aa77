//! `kvlane chat`.

use std::io::{self, BufRead, IsTerminal, Read};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;

use super::generate::Figures;
use super::interrupt::Interrupts;
use super::model::{Run, open};
use super::output::{count_of, note, note_part, print};
use super::text::{Conversation, MOST_TEXT, Prompts, Sampling};
use super::values;
use crate::driver::cache::Cache;
use crate::driver::chat::Message;
use crate::driver::error::{Error, Result};
use crate::driver::scheduler::{Finish, Scheduler};

/// Talk with a model.
///
/// Every line is a turn; the answer goes to standard output as it is generated. The cache keeps the conversation, so that a
/// turn computes its own tokens only. Ctrl-C ends an answer; at the beginning of a line, it ends the program, as the end
/// of the input does.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  kvlane chat --model SmolLM2-135M-Instruct.Q4_1.gguf --system 'You answer in one sentence.'")]
pub(super) struct Chat {
    #[command(flatten)]
    run: Run,
    #[command(flatten)]
    conversation: Conversation,
    #[command(flatten)]
    sampling: Sampling,
    /// The most tokens of the conversation. Default: the model's context
    #[arg(long, value_name = "N", value_parser = values::at_least_one)]
    context: Option<usize>,
}

pub(super) fn chat(args: &Chat) -> Result<ExitCode> {
    args.run.check()?;
    let start = Instant::now();
    let file = open(args.run.model.as_ref())?;
    let tokenizer = file.tokenizer()?;
    let prompts = Prompts::new(file.config(), &tokenizer, &args.conversation)?;
    // A model that cannot talk says so before its weights are loaded.
    prompts.render(&[Message::new("user", "?")])?;
    let capacity = args.context.map_or(file.config().context, |n| n.min(file.config().context));
    Cache::bytes_for(file.config(), 1, capacity, args.run.formats())?;
    let decoder = args.run.load(&file, capacity)?;
    let name = decoder.config().name.clone().unwrap_or_else(|| file.format());
    drop(file);
    let load = start.elapsed();
    let mut scheduler = Scheduler::new(&decoder, 1, capacity, args.run.formats())?.tokenizer(&tokenizer).reuse(true);
    let interrupts = Interrupts::watch()?;

    let mut talk = Talk { prompts: &prompts, messages: Vec::new(), rendered: String::new(), ids: Vec::new() };
    let is_terminal = io::stdin().is_terminal();
    let mut turns = 0;
    loop {
        if is_terminal {
            note_part("> ");
        }
        let mut line = String::new();
        let read = || io::stdin().lock().take(MOST_TEXT).read_line(&mut line);
        let read = interrupts.while_waiting(read).map_err(Error::stdin)?;
        if read == 0 {
            break;
        }
        if line.trim().is_empty() {
            continue;
        }
        turns += 1;
        talk.user(line.trim_end_matches(['\r', '\n']))?;
        let mut request = args.sampling.request(talk.ids.clone());
        // Another turn takes other random numbers.
        request.sampling = args.sampling.options().seed(args.sampling.seed.wrapping_add(turns));
        scheduler.submit(request)?;
        let (mut answer, mut finish) = (String::new(), None);
        let mut stopping = false;
        while !scheduler.is_idle() {
            if interrupts.pressed() && !stopping {
                stopping = true;
                scheduler.cancel_all();
            }
            for event in scheduler.step() {
                print(&event.text)?;
                answer += &event.text;
                // A token that ends a text is part of the template, which closes the turn.
                talk.ids.extend(event.token.filter(|_| event.finish != Some(Finish::Eos)));
                finish = event.finish.or(finish);
            }
        }
        print("\n")?;
        talk.assistant(answer);
        match finish {
            Some(Finish::Error(sentence)) => return Err(Error::request(sentence)),
            Some(Finish::Full) => {
                note("the model's context is full");
                break;
            }
            _ => (),
        }
    }
    if is_terminal {
        note("");
    }
    let figures = Figures { name, load, decoder: &decoder, formats: args.run.formats(), scheduler: &scheduler };
    figures.note(&count_of(turns as usize, "turn"), "");
    Ok(ExitCode::SUCCESS)
}

/// A conversation, and the tokens that it has become.
struct Talk<'a> {
    prompts: &'a Prompts<'a>,
    messages: Vec<Message>,
    /// The text before the last answer.
    rendered: String,
    /// Tokens of the text, and of the answers as they were generated.
    ids: Vec<u32>,
}

impl Talk<'_> {
    /// Adds a turn of the user. Its tokens follow those of the answer before, which are not encoded again: another cut of
    /// the same text into tokens would not be what the cache holds.
    fn user(&mut self, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let rendered = self.prompts.render(&self.messages)?;
        let answer = self.messages.len().checked_sub(2).map(|i| self.messages[i].content.as_str());
        match answer.and_then(|answer| after(&rendered, &self.rendered, answer)) {
            Some(rest) => self.ids.extend(self.prompts.tokens(rest, false)?),
            // The first turn, or a template that changes what it said before.
            None => self.ids = self.prompts.tokens(&rendered, false)?,
        }
        self.rendered = rendered;
        Ok(())
    }

    fn assistant(&mut self, text: String) {
        self.messages.push(Message::new("assistant", text));
    }
}

/// What `text` has after `before` and an answer, which templates may trim.
fn after<'t>(text: &'t str, before: &str, answer: &str) -> Option<&'t str> {
    let rest = text.strip_prefix(before)?;
    rest.strip_prefix(answer).or_else(|| rest.trim_start().strip_prefix(answer.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_follows_the_answer() {
        assert_eq!(after("<u>a<m>b c <e><u>d", "<u>a<m>", "b c "), Some("<e><u>d"));
        assert_eq!(after("<u>a<m>b c<e>", "<u>a<m>", " b c\n"), Some("<e>"));
        assert_eq!(after("<u>a<m>other<e>", "<u>a<m>", "b"), None);
        assert_eq!(after("<u>x<m>b<e>", "<u>a<m>", "b"), None);
    }
}
