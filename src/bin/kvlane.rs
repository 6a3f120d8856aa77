//! The kvlane command line: `kvlane --help` says everything.

fn main() -> std::process::ExitCode {
    kvlane::driver::cli::main()
}
