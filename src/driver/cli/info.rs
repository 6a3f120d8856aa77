//! `kvlane info`.

use clap::Args;
use serde_json::json;

use super::model::context;
use super::output::{print, print_json};
use super::values::isa_parser;
use crate::bench::machine::{cpu_features, cpu_name};
use crate::driver::error::Result;
use crate::{CacheFormat, Isa, KernelInfo, Op, kernels};

/// Show the CPU, the instruction-set levels of this build, and the kernel chosen for each operation.
#[derive(Debug, Args)]
pub(super) struct Info {
    /// Choose kernels as if this were the highest level
    #[arg(long, value_name = "LEVEL", value_parser = isa_parser(), ignore_case = true)]
    isa: Option<Isa>,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn info(args: &Info) -> Result<()> {
    let context = context(args.isa)?;
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
        text += &format!("  {:<11}{state}{mark}\n", level.name());
    }
    text += "\nkernels\n";
    for k in &chosen {
        text += &format!("  {:<14}{:>5} -> {:<6}{}\n", k.op.name(), k.src.name(), k.dst.name(), k.name);
    }
    print(&text)
}
