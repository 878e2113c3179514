//! `forebay config print`: every setting, its value, where it came from.

use crate::{config::Config, console::out};

/// Prints them as YAML with comments, so that the output can be used as a file.
pub fn print(config: &Config) {
    let shown = config.shown();
    let line = |path: &str, value: &str| match value {
        "" => format!("# {path}:"),
        // Of several lines: in quotation marks, as JSON has them and YAML reads them.
        value if value.contains('\n') => format!("{path}: {}", serde_json::json!(value)),
        value => format!("{path}: {value}"),
    };
    let lines: Vec<_> =
        shown.iter().map(|(path, sourced)| (line(path, &sourced.value), &sourced.from)).collect();
    let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0);
    for (line, from) in lines {
        out(format_args!("{line:width$}  # {from}"));
    }
}
