//! `forebay completions`: what a shell needs to complete our command line.

use crate::args::Args;
use clap::CommandFactory as _;
use clap_complete::Shell;

/// Prints them to standard output.
pub fn print(shell: Shell) {
    clap_complete::generate(shell, &mut Args::command(), "forebay", &mut std::io::stdout());
}
