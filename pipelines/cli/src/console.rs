//! The only place that prints. Standard output holds what was asked for; the rest goes to standard error.

use std::{fmt, io::Write as _};

/// What the user can mend: the command line, the configuration, a pipeline. Ends with exit code 2.
#[derive(Debug)]
pub struct Wrong(String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

/// An error that the user can mend.
pub fn wrong(message: impl fmt::Display) -> anyhow::Error {
    Wrong(message.to_string()).into()
}

/// Prints a line of what was asked for. A reader that has gone away, as `head` does, is no fault of ours.
pub fn out(line: impl fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints a piece of what was asked for, which is seen at once.
pub fn piece(text: &str) {
    let mut out = std::io::stdout();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
}

/// Says something besides.
pub fn say(line: impl fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says why the command could not be done, with all causes.
pub fn complain(fault: &anyhow::Error) {
    let causes: Vec<_> = fault.chain().map(ToString::to_string).collect();
    // Some errors repeat their cause in their own words.
    let mut text = String::new();
    for cause in causes {
        if !text.contains(&cause) {
            let separator = if text.is_empty() { "" } else { ": " };
            text = format!("{text}{separator}{cause}");
        }
    }
    say(format_args!("forebay: {text}"));
}
