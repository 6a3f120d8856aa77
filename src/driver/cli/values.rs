//! Values of options: parsers that say what is possible, so that a bad value ends the program before it does anything.

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::bench::Pages;
use crate::driver::{MOST_THREADS, Rotate};
use crate::{CacheFormat, Isa, Mesh};

pub(super) fn format_parser() -> impl TypedValueParser<Value = CacheFormat> {
    PossibleValuesParser::new(CacheFormat::ALL.map(CacheFormat::name))
        .try_map(|s| CacheFormat::from_name(&s.to_ascii_lowercase()).ok_or_else(|| format!("no format is called {s}")))
}

pub(super) fn rotate_parser() -> impl TypedValueParser<Value = Rotate> {
    PossibleValuesParser::new(Rotate::ALL.map(Rotate::name))
        .try_map(|s| Rotate::from_name(&s.to_ascii_lowercase()).ok_or_else(|| format!("nothing is called {s}")))
}

/// A level that this CPU has.
pub(super) fn isa_parser() -> impl TypedValueParser<Value = Isa> {
    PossibleValuesParser::new(Isa::ALL.map(Isa::name)).try_map(|s| {
        let level = Isa::from_name(&s.to_ascii_lowercase()).ok_or_else(|| format!("no level is called {s}"))?;
        if level.is_available() {
            return Ok(level);
        }
        let has: Vec<&str> = Isa::ALL.into_iter().filter(|l| l.is_available()).map(Isa::name).collect();
        Err(format!("this CPU cannot run it; it has {}", has.join(", ")))
    })
}

pub(super) fn pages_parser() -> impl TypedValueParser<Value = Pages> {
    PossibleValuesParser::new(Pages::ALL.map(Pages::name)).try_map(|s| {
        Pages::ALL.into_iter().find(|pages| pages.name() == s).ok_or_else(|| format!("no pages are called {s}"))
    })
}

pub(super) fn temperature(s: &str) -> Result<f32, String> {
    let value: f32 = s.parse().map_err(|_| "it must be a number, 0 or more".to_owned())?;
    if value.is_finite() && value >= 0.0 { Ok(value) } else { Err("it must be a finite number, 0 or more".to_owned()) }
}

pub(super) fn top_p(s: &str) -> Result<f32, String> {
    let value: f32 = s.parse().map_err(|_| "it must be a number above 0 and at most 1".to_owned())?;
    if value > 0.0 && value <= 1.0 { Ok(value) } else { Err("it must be above 0 and at most 1".to_owned()) }
}

pub(super) fn exponent(s: &str) -> Result<f64, String> {
    let value: f64 = s.parse().map_err(|_| "it must be a number".to_owned())?;
    if value.is_finite() { Ok(value) } else { Err("it must be a finite number".to_owned()) }
}

/// A whole number in a range.
fn within(s: &str, least: u64, most: u64) -> Result<u64, String> {
    let must = match most {
        u64::MAX => format!("it must be a whole number, {least} or more"),
        most => format!("it must be a whole number from {least} to {most}"),
    };
    s.parse().ok().filter(|n| (least..=most).contains(n)).ok_or(must)
}

/// A seed, of any size.
pub(super) fn seed(s: &str) -> Result<u64, String> {
    within(s, 0, u64::MAX).map_err(|_| format!("it must be a whole number from 0 to {}", u64::MAX))
}

pub(super) fn count(s: &str) -> Result<usize, String> {
    within(s, 0, u64::MAX).map(|n| n as usize)
}

pub(super) fn at_least_one(s: &str) -> Result<usize, String> {
    within(s, 1, u64::MAX).map(|n| n as usize)
}

pub(super) fn threads(s: &str) -> Result<usize, String> {
    within(s, 0, MOST_THREADS as u64).map(|n| n as usize)
}

pub(super) fn not_empty(s: &str) -> Result<String, String> {
    if s.is_empty() { Err("it needs at least one character".to_owned()) } else { Ok(s.to_owned()) }
}

/// The parts of each axis, as in `data=2,model=2,sequence=2`. An axis that is not named has one.
pub(super) fn mesh(s: &str) -> Result<Mesh, String> {
    let (mut mesh, mut named) = (Mesh::new(1, 1, 1), Vec::new());
    for part in s.split(',') {
        let (axis, n) = part.split_once('=').ok_or("it must be parts of axes, as data=2,model=2,sequence=2")?;
        let n = at_least_one(n).map_err(|e| format!("{axis}: {e}"))?;
        match axis {
            "data" => mesh.data = n,
            "model" => mesh.model = n,
            "sequence" => mesh.sequence = n,
            _ => return Err(format!("no axis is called {axis:?}; there are data, model and sequence")),
        }
        if named.contains(&axis) {
            return Err(format!("{axis} is given twice"));
        }
        named.push(axis);
    }
    mesh.shards().map_err(|e| e.message().to_owned())?;
    Ok(mesh)
}
