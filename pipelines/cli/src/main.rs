//! The command line of Forebay: parse, check, build, run, drain.
//!
//! Standard output holds what was asked for and nothing else; all that is said besides goes to standard error.
//!
//! Exit codes: 0 done; 1 could not be done; 2 the command line, the configuration or a pipeline is wrong;
//! 70 stood still and is to be started anew; 130 stopped by a second Ctrl-C.

mod alerts;
mod args;
mod build;
mod client;
mod commands;
mod config;
mod console;
mod documents;
mod embedded;
mod letters;
mod models;
mod offsets;
mod scan;
mod shipped;
mod shutdown;
mod standings;
mod watchdog;

use args::{Args, Command};
use clap::Parser as _;
use console::Wrong;
use forebay_telemetry::logging;
use std::process::ExitCode;

/// A record's bytes are allocated on one thread and freed on another, which glibc's allocator serves badly.
/// tests/bench has the figures.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // The allocator asks for huge pages, and then holds twice the memory for the same records: tests/bench.
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        Err(fault) => {
            console::complain(&fault);
            ExitCode::from(if fault.is::<Wrong>() { 2 } else { 1 })
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    logging::init(args.log_format(), filter(&args.command))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(commands::run(args.command, &args.settings));
    // Threads that are stuck in a client of ours must not keep the process from ending.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    code
}

/// What is logged where FOREBAY_LOG does not say: a command that prints an answer is not talked over.
fn filter(command: &Command) -> Option<&'static str> {
    match command {
        Command::Up(_) | Command::Run(_) => None,
        // A case may well show what is warned of.
        Command::Test(_) => Some("error"),
        _ => Some("warn"),
    }
}
