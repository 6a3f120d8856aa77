//! The size of the CPU's second-level cache, which determines the query rows of an attention tile.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The assumed size if the CPU does not report it.
const ASSUMED: usize = 512 << 10;

/// The size of a core's second-level cache in bytes, constant for the life of the process.
///
/// The result is kept, because CPUID is slow in a virtual machine. Concurrent first calls compute the same value.
pub(crate) fn second_level() -> usize {
    static BYTES: AtomicUsize = AtomicUsize::new(0);
    match BYTES.load(Ordering::Relaxed) {
        0 => {
            let bytes = detect().filter(|bytes| (64 << 10..=64 << 20).contains(bytes)).unwrap_or(ASSUMED);
            BYTES.store(bytes, Ordering::Relaxed);
            bytes
        }
        bytes => bytes,
    }
}

/// The deterministic cache parameters: leaf 4 on Intel, leaf 0x8000001d on AMD (see CPUID in the manuals).
#[cfg(target_arch = "x86_64")]
fn detect() -> Option<usize> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
    let amd = __cpuid(0x8000_0000).eax >= 0x8000_001d && __cpuid(0x8000_0001).ecx & TOPOLOGY_EXTENSIONS != 0;
    let leaf = match amd {
        true => 0x8000_001d,
        false if __cpuid(0).eax >= 4 => 4,
        false => return None,
    };
    for number in 0..16 {
        let cache = __cpuid_count(leaf, number);
        let bits = |x: u32, low: u32, n: u32| (x >> low & ((1 << n) - 1)) as usize;
        let (kind, level) = (bits(cache.eax, 0, 5), bits(cache.eax, 5, 3));
        const NONE: usize = 0;
        const UNIFIED: usize = 3;
        match (kind, level) {
            (NONE, _) => return None,
            (UNIFIED, 2) => {
                let [line, partitions, ways] =
                    [(0, 12), (12, 10), (22, 10)].map(|(low, n)| bits(cache.ebx, low, n) + 1);
                return Some(ways * partitions * line * (cache.ecx as usize + 1));
            }
            _ => {}
        }
    }
    None
}

/// On other architectures only the operating system has the size.
#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_operating_system_says() {
        assert_eq!(second_level(), second_level());
        assert!((64 << 10..=64 << 20).contains(&second_level()));
        let said = (0..8).find_map(|index| {
            let read = |what| {
                std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{what}"))
                    .map(|text| text.trim().to_owned())
            };
            let second = read("level").ok()? == "2" && read("type").ok()? == "Unified";
            second.then(|| read("size").ok()?.strip_suffix('K')?.parse::<usize>().ok())?
        });
        if let (Some(kib), true) = (said, detect().is_some()) {
            assert_eq!(second_level(), kib << 10);
        }
    }
}
