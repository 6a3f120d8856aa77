//! The kvlane command line.

fn main() {}
