//! Criterion benches, one for every registry entry.

fn main() {}
