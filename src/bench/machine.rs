//! The machine on which the bench runs, as the operating system describes it.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Isa;

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The CPU's name, from the operating system.
    pub cpu: Option<String>,
    /// The architecture's name in Rust.
    pub architecture: String,
    /// The operating system's name in Rust.
    pub os: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Caches of the first CPU.
    pub caches: Vec<Cache>,
    /// The levels of this build, and for each whether the CPU can run it.
    pub levels: Vec<Level>,
    /// The frequency governor, if known.
    pub governor: Option<String>,
    /// The setting of transparent huge pages, if known: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// The load average of the last minute before the bench began, if known. Figures of a busy machine are less
    /// reliable.
    pub load: Option<f64>,
}

/// A cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cache {
    /// The level; 1 is nearest to the core.
    pub level: u32,
    /// `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// Its size.
    pub bytes: usize,
    /// The list of CPUs that share it, in the system's format.
    pub shared_by: String,
}

/// An ISA level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Level {
    /// Its name.
    pub name: String,
    /// The reason why the CPU cannot run it; absent if it can.
    pub missing: Option<String>,
}

impl Machine {
    /// This machine.
    pub fn detect() -> Self {
        let features = cpu_features();
        let levels = Isa::ALL.into_iter().filter(|level| level.is_built()).map(|level| {
            let lacking: Vec<&str> = level
                .features()
                .iter()
                .copied()
                .filter(|name| features.iter().any(|(feature, has)| feature == name && !has))
                .collect();
            let missing = match (level.is_available(), lacking.is_empty()) {
                (true, _) => None,
                (false, false) => Some(format!("no {}", lacking.join(", "))),
                (false, true) => Some("the operating system does not allow it".to_owned()),
            };
            Level { name: level.name().to_owned(), missing }
        });
        let cpu = Path::new("/sys/devices/system/cpu/cpu0");
        Self {
            cpu: cpu_name(),
            architecture: std::env::consts::ARCH.to_owned(),
            os: std::env::consts::OS.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
            caches: caches(&cpu.join("cache")),
            levels: levels.collect(),
            governor: line(&cpu.join("cpufreq/scaling_governor")),
            huge_pages: line(Path::new("/sys/kernel/mm/transparent_hugepage/enabled"))
                .and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())),
            load: line(Path::new("/proc/loadavg")).and_then(|text| text.split(' ').next()?.parse().ok()),
        }
    }

    /// Whether a program gets huge pages if it asks for them.
    pub fn has_huge_pages(&self) -> bool {
        self.huge_pages.as_deref().is_some_and(|setting| setting != "never")
    }

    /// The size of the first CPU's cache for data at a level, if known.
    pub fn cache_bytes(&self, level: u32) -> Option<usize> {
        self.caches.iter().find(|c| c.level == level && c.kind != "Instruction").map(|c| c.bytes)
    }
}

/// The share of some bytes from an address on that lie on huge pages, on Linux.
pub(crate) fn huge_share(start: usize, bytes: usize) -> Option<f64> {
    let text = fs::read_to_string("/proc/self/smaps").ok()?;
    let mut huge = None;
    // A line of numbers in hexadecimal, `start-end`, begins the description of a mapping.
    let mut inside = false;
    for line in text.lines() {
        let address = |text: &str| usize::from_str_radix(text, 16).ok();
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        if let Some((low, high)) = range.and_then(|(low, high)| Some((address(low)?, address(high)?))) {
            inside = low < start.saturating_add(bytes) && start < high;
        } else if inside && let Some(kib) = line.strip_prefix("AnonHugePages:") {
            let kib = kib.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?;
            huge = Some(huge.unwrap_or(0) + (kib << 10));
        }
    }
    Some((huge? as f64 / bytes.max(1) as f64).min(1.0))
}

fn line(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}

fn caches(directory: &Path) -> Vec<Cache> {
    let cache = |index: usize| {
        let directory = directory.join(format!("index{index}"));
        let size = line(&directory.join("size"))?;
        let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &size[digits.len()..] {
            "K" => 1 << 10,
            "M" => 1 << 20,
            _ => 1,
        };
        Some(Cache {
            level: line(&directory.join("level"))?.parse().ok()?,
            kind: line(&directory.join("type"))?,
            bytes: digits.parse::<usize>().ok()?.checked_mul(unit)?,
            shared_by: line(&directory.join("shared_cpu_list")).unwrap_or_default(),
        })
    };
    (0..16).map_while(cache).collect()
}

/// The CPU features that are relevant to kernels of this kind.
pub(crate) fn cpu_features() -> Vec<(&'static str, bool)> {
    macro_rules! detect {
        ($detect:ident: $($name:tt),*) => { vec![$(($name, std::arch::$detect!($name))),*] };
    }
    #[cfg(target_arch = "x86_64")]
    let mut features = detect!(is_x86_feature_detected: "sse4.2", "avx", "avx2", "fma", "f16c", "avxvnni", "avx512f",
        "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16");
    // Stable Rust cannot detect these features. The level needs both, and the permission of the operating system.
    #[cfg(target_arch = "x86_64")]
    features.push(("amx-bf16", Isa::Amx.is_available()));
    #[cfg(target_arch = "aarch64")]
    let features = detect!(is_aarch64_feature_detected: "neon", "fp16", "dotprod", "bf16", "i8mm", "sve", "sve2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let features = Vec::new();
    features
}

/// The CPU's name, if the operating system has one.
pub(crate) fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
