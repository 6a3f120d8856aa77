//! The command line. Results (generated text, a table, a JSON object) go to standard output; progress, figures and
//! errors go to standard error.

mod beams;
mod bench;
mod cache_cost;
mod cache_error;
mod chat;
mod generate;
mod guesses;
mod info;
mod inspect;
mod interrupt;
#[cfg(feature = "mpi")]
mod mesh;
mod model;
mod output;
mod perplexity;
mod serve;
mod text;
mod tune;
mod values;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::bench::{Bench, bench};
use self::cache_cost::{CacheCost, cache_cost};
use self::cache_error::{Deviations, deviations};
use self::chat::{Chat, chat};
use self::generate::{Generate, generate};
use self::info::{Info, info};
use self::inspect::{Inspect, inspect};
use self::output::note;
use self::perplexity::{Measure, measure};
use self::tune::{Tune, tune_cpu};
use super::error::{Error, ErrorKind};

/// Attention over a key/value cache for CPUs, shown on small language models.
#[derive(Debug, Parser)]
#[command(name = "kvlane", version, arg_required_else_help = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    // Boxed, because it has many more options than the others.
    #[command(allow_negative_numbers = true)]
    Generate(Box<Generate>),
    #[command(allow_negative_numbers = true)]
    Chat(Chat),
    Info(Info),
    Inspect(Inspect),
    #[command(allow_negative_numbers = true)]
    CacheCost(CacheCost),
    #[command(allow_negative_numbers = true)]
    Perplexity(Measure),
    #[command(allow_negative_numbers = true)]
    CacheError(Deviations),
    #[command(allow_negative_numbers = true)]
    Bench(Bench),
    Tune(Tune),
}

/// Parses the arguments, runs the command, and reports an error.
pub fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let result = match Cli::parse().command {
        Command::Generate(args) => generate(&args),
        Command::Chat(args) => chat(&args),
        Command::Info(args) => info(&args).map(done),
        Command::Inspect(args) => inspect(&args).map(done),
        Command::CacheCost(args) => cache_cost(&args).map(done),
        Command::Perplexity(args) => measure(&args).map(done),
        Command::CacheError(args) => deviations(&args).map(done),
        Command::Bench(args) => bench(&args).map(done),
        Command::Tune(args) => tune_cpu(&args).map(done),
    };
    match result {
        Ok(code) => code,
        // The reader of standard output has closed it, as in `kvlane generate | head -1`.
        Err(e) if e.kind() == ErrorKind::ClosedPipe => ExitCode::SUCCESS,
        Err(e) => {
            note(&format!("error: {e}"));
            exit_code(&e)
        }
    }
}

/// Wrong arguments have one exit code, whoever finds them.
fn exit_code(e: &Error) -> ExitCode {
    ExitCode::from(if e.kind() == ErrorKind::Argument { 2 } else { 1 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::cache::{Formats, Rotate};
    use crate::{CacheFormat, Isa};
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_prompt_may_begin_with_a_dash() {
        let cli = Cli::parse_from(["kvlane", "generate", "--prompt=-", "--isa", "scalar", "--kv-type", "bf16"]);
        let Command::Generate(args) = cli.command else { panic!("not generate") };
        assert_eq!((args.run.isa, args.prompt[0].as_str()), (Some(Isa::Scalar), "-"));
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
        let of = Formats::new;
        assert_eq!(formats(&[]), of(CacheFormat::F32, CacheFormat::F32));
        assert_eq!(formats(&["--kv-type", "int8"]), of(CacheFormat::Int8, CacheFormat::Int8));
        assert_eq!(formats(&["--k-type", "int8"]), of(CacheFormat::Int8, CacheFormat::F32));
        assert_eq!(formats(&["--kv-type", "bf16", "--v-type", "int8"]), of(CacheFormat::Bf16, CacheFormat::Int8));
        assert!(Cli::try_parse_from(["kvlane", "generate", "--k-type", "int4"]).is_err());
        let rotate = |k, v| Formats::from(CacheFormat::F32).rotate(Rotate { k, v });
        assert_eq!(formats(&["--rotate", "none"]), rotate(false, false));
        assert_eq!(formats(&["--rotate", "k"]), rotate(true, false));
        assert_eq!(formats(&["--rotate", "both"]), rotate(true, true));
        assert!(Cli::try_parse_from(["kvlane", "generate", "--rotate", "q"]).is_err());
    }
}
