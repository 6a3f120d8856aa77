//! The options of every command that runs a model.

use std::path::PathBuf;

use clap::Args;

use super::output::{bar, count_of, note};
use super::values::{self, format_parser, isa_parser, rotate_parser};
use crate::driver::cache::{Formats, Rotate};
use crate::driver::decoder::Decoder;
use crate::driver::embedded;
use crate::driver::error::{Error, Result};
use crate::driver::mesh::MeshPart;
use crate::driver::model::ModelFile;
use crate::driver::threads::Threads;
use crate::{CacheFormat, Context, Isa};

/// Options of every command that runs a model.
#[derive(Debug, Args)]
pub(super) struct Run {
    /// A GGUF file, or a directory with config.json, tokenizer.json and safetensors. Default: a tiny model that is part
    /// of this program
    #[arg(long, value_name = "FILE|DIR")]
    pub(super) model: Option<PathBuf>,
    /// Number of threads; 0 is one per CPU
    #[arg(long, value_name = "N", default_value = "0", value_parser = values::threads)]
    pub(super) threads: usize,
    /// Format of the keys and values in the cache; int8 has a scale per token and head, fp8 none, the others
    /// blocks of ggml, for heads of a multiple of 32 elements. Default: f32, or all of them for cache-error
    #[arg(long, value_name = "FORMAT", value_parser = format_parser(), ignore_case = true)]
    pub(super) kv_type: Option<CacheFormat>,
    /// Format of the keys, if it is another than that of --kv-type
    #[arg(long, value_name = "FORMAT", value_parser = format_parser(), ignore_case = true)]
    pub(super) k_type: Option<CacheFormat>,
    /// Format of the values, if it is another than that of --kv-type
    #[arg(long, value_name = "FORMAT", value_parser = format_parser(), ignore_case = true)]
    pub(super) v_type: Option<CacheFormat>,
    /// Rotate keys, values or both by Hadamard matrices before they are stored, which spreads outliers of single channels
    #[arg(long, value_name = "WHAT", default_value = "none", value_parser = rotate_parser(), ignore_case = true)]
    pub(super) rotate: Rotate,
    /// The highest instruction-set level to use. Default: the best that this CPU has (and KVLANE_MAX_ISA allows)
    #[arg(long, value_name = "LEVEL", value_parser = isa_parser(), ignore_case = true)]
    pub(super) isa: Option<Isa>,
}

pub(super) fn open(path: Option<&PathBuf>) -> Result<ModelFile> {
    match path {
        Some(path) => ModelFile::open(path),
        None => embedded::open(),
    }
}

/// The kernels up to a level. A wrong environment variable is a wrong argument.
pub(super) fn context(isa: Option<Isa>) -> Result<Context> {
    let context = isa.map_or_else(Context::new, Context::with_max_isa);
    context.map_err(|e| Error::argument(e.message()))
}

/// Says so if there are more threads than CPUs.
pub(super) fn note_threads(threads: usize) {
    let cpus = std::thread::available_parallelism().map_or(usize::MAX, |n| n.get());
    if threads > cpus {
        note(&format!("note: {} share {}", count_of(threads, "thread"), count_of(cpus, "CPU")));
    }
}

impl Run {
    /// Checks what can be checked before any file is read.
    pub(super) fn check(&self) -> Result<()> {
        context(self.isa)?;
        note_threads(self.threads);
        Ok(())
    }

    /// The formats of the cache.
    pub(super) fn formats(&self) -> Formats {
        let [k, v] = [self.k_type, self.v_type].map(|own| own.or(self.kv_type).unwrap_or(CacheFormat::F32));
        Formats::new(k, v).rotate(self.rotate)
    }

    /// Whether an option names a format.
    pub(super) fn names_formats(&self) -> bool {
        [self.kv_type, self.k_type, self.v_type].iter().any(Option::is_some)
    }

    /// Unpacks the model for sequences of up to `longest` tokens.
    pub(super) fn load(&self, file: &ModelFile, longest: usize) -> Result<Decoder> {
        self.load_part(file, longest, None)
    }

    /// As [`Self::load`], a part of a mesh.
    pub(super) fn load_part(&self, file: &ModelFile, longest: usize, part: Option<&MeshPart>) -> Result<Decoder> {
        let threads = Threads::new(self.threads)?;
        let progress = bar("loading", 0, true);
        let weights = threads.run(|| {
            let show = |done: usize, total: usize| {
                progress.set_length(total as u64);
                progress.set_position(done as u64);
            };
            match part {
                Some(part) => file.weights_of_part(part, &show),
                None => file.weights(&show),
            }
        })?;
        progress.finish_and_clear();
        let decoder = Decoder::new(file.config().clone(), weights, longest, self.isa, threads)?;
        match part {
            Some(part) => decoder.on_mesh(part),
            None => Ok(decoder),
        }
    }
}
