//! Options that concern texts: how to choose tokens, and how a prompt becomes tokens.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;

use super::values;
use crate::driver::chat::{ChatTemplate, Message};
use crate::driver::error::{Error, Result};
use crate::driver::files;
use crate::driver::model::ModelConfig;
use crate::driver::sampling::SamplerOptions;
use crate::driver::scheduler::Request;
use crate::driver::tokenizer::Tokenizer;

/// How to choose tokens.
#[derive(Debug, Args)]
pub(super) struct Sampling {
    /// The most tokens to write
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::at_least_one)]
    pub(super) max_tokens: usize,
    /// Divisor of the logits; 0 always selects the most likely token
    #[arg(long, value_name = "T", default_value = "0.8", value_parser = values::temperature)]
    pub(super) temperature: f32,
    /// Select among the most likely tokens whose probabilities together reach P; 1 is no limit
    #[arg(long, value_name = "P", default_value = "0.95", value_parser = values::top_p)]
    pub(super) top_p: f32,
    /// Select among the K most likely tokens; 0 is no limit
    #[arg(long, value_name = "K", default_value = "0", value_parser = values::count)]
    pub(super) top_k: usize,
    /// Seed of the random numbers: the same seed gives the same text
    #[arg(long, value_name = "S", default_value = "0", value_parser = values::seed)]
    pub(super) seed: u64,
    /// End the text before this text; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = values::not_empty)]
    pub(super) stop: Vec<String>,
}

impl Sampling {
    pub(super) fn options(&self) -> SamplerOptions {
        SamplerOptions::new().temperature(self.temperature).top_k(self.top_k).top_p(self.top_p).seed(self.seed)
    }

    pub(super) fn request(&self, prompt: Vec<u32>) -> Request {
        Request::new(prompt).max_tokens(self.max_tokens).sampling(self.options()).stop(self.stop.iter().cloned())
    }
}

/// How a conversation becomes text.
#[derive(Debug, Args)]
pub(super) struct Conversation {
    /// A text that comes before the conversation and tells the model how to answer
    #[arg(long, value_name = "TEXT")]
    pub(super) system: Option<String>,
    /// A chat template (Jinja) instead of that of the model
    #[arg(long, value_name = "FILE")]
    pub(super) chat_template: Option<PathBuf>,
}

/// Makes tokens of prompts and conversations.
#[derive(Debug)]
pub(super) struct Prompts<'a> {
    tokenizer: &'a Tokenizer,
    config: ModelConfig,
    /// The template, if it can be read.
    template: Option<ChatTemplate>,
    system: Option<String>,
}

impl<'a> Prompts<'a> {
    /// A template that is not needed may be missing or broken.
    pub(super) fn new(config: &ModelConfig, tokenizer: &'a Tokenizer, args: &Conversation) -> Result<Self> {
        let mut config = config.clone();
        if let Some(path) = &args.chat_template {
            config.chat_template = Some(files::text(path)?);
            ChatTemplate::of_model(&config, tokenizer).map_err(|e| e.context(path.display()))?;
        }
        let template = ChatTemplate::of_model(&config, tokenizer).ok();
        Ok(Self { tokenizer, config, template, system: args.system.clone() })
    }

    /// The text of a conversation, after the system's message if one was given.
    pub(super) fn render(&self, messages: &[Message]) -> Result<String> {
        let template = match &self.template {
            Some(template) => template,
            None => &ChatTemplate::of_model(&self.config, self.tokenizer)?,
        };
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        let all: Vec<Message> = system.chain(messages.iter().cloned()).collect();
        template.render(&all)
    }

    /// The tokens of a conversation.
    pub(super) fn conversation(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.tokens(&self.render(messages)?, false)
    }

    /// The tokens of a text to continue, or, with `chat`, of a user's turn.
    pub(super) fn text(&self, text: &str, chat: bool) -> Result<Vec<u32>> {
        match chat {
            true => self.conversation(&[Message::new("user", text)]),
            false => self.tokens(text, true),
        }
    }

    /// The tokens of a text, with those that the model expects around a text if `special`.
    pub(super) fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, special)?;
        if ids.is_empty() { Err(Error::argument("the prompt has no tokens")) } else { Ok(ids) }
    }
}

/// The most bytes of a text that are read: far more than any model's context, and little memory.
pub(super) const MOST_TEXT: u64 = 64 << 20;

/// The text of `--prompt`; `-` stands for standard input without its last line break.
pub(super) fn prompt_text(argument: &str) -> Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().take(MOST_TEXT).read_to_string(&mut text).map_err(Error::stdin)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}
