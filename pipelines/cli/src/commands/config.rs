//! `forebay config print`: every setting, its value, where it came from.
//!
//! Invariant: the output can be used as a file and says the same, whatever a value looks like.

use crate::{config::Config, console::out};
use forebay_plan::leaves::leaves;
use std::fmt::Write as _;

/// Prints them as YAML with comments.
pub fn print(config: &Config) {
    let shown = config.shown();
    let lines: Vec<_> =
        shown.iter().map(|(path, sourced)| (line(path, &sourced.value), &sourced.from)).collect();
    let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0);
    for (line, from) in lines {
        out(format_args!("{line:width$}  # {from}"));
    }
}

/// A setting as a line; a comment where it has no value. Whether a value needs quotation marks is asked of whoever will read it,
/// as YAML's rules for that are long.
fn line(path: &str, value: &str) -> String {
    let plain = format!("{path}: {value}");
    let is_read_back = || {
        let read = leaves("config print", &format!("{plain}  # where it came from"));
        read.is_ok_and(|leaves| matches!(&leaves[..], [leaf] if leaf.path == path && leaf.value == value))
    };
    match value {
        "" => format!("# {path}:"),
        _ if !value.contains('\n') && is_read_back() => plain,
        value => format!("{path}: {}", quoted(value)),
    }
}

/// In YAML's double quotation marks, all of it printable ASCII.
fn quoted(value: &str) -> String {
    let mut text = String::from("\"");
    for char in value.chars() {
        // Writing to a String cannot fail.
        let _ = match char {
            '"' | '\\' => write!(text, "\\{char}"),
            ' '..='~' => write!(text, "{char}"),
            _ => write!(text, "\\U{:08X}", u32::from(char)),
        };
    }
    text + "\""
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(value: &str, expected: &str) {
        assert_eq!(line("budgets", value), expected);
    }

    #[test]
    fn a_value_has_quotation_marks_where_it_would_be_read_as_something_else() {
        check("", "# budgets:");
        check("* 2 USD/day", r#"budgets: "* 2 USD/day""#);
        check("acme 20 USD/day,* 2 USD/day", "budgets: acme 20 USD/day,* 2 USD/day");
        check("http://127.0.0.1:8000/v1", "budgets: http://127.0.0.1:8000/v1");
        check("1.50", r#"budgets: "1.50""#);
        check("null", r#"budgets: "null""#);
        check("a # b", r#"budgets: "a # b""#);
        check("say \"so\"\n", r#"budgets: "say \"so\"\U0000000A""#);
    }

    /// What YAML gives a meaning, among other characters.
    fn values() -> impl Strategy<Value = String> {
        let special = prop::sample::select(
            "*&!|>%@`'\"#-?:,[]{}~=<\\ \n\t1a\u{85}\u{2028}\u{feff}é😀".chars().collect::<Vec<_>>(),
        );
        prop_oneof![
            prop::collection::vec(special, 1..12).prop_map(|chars| chars.into_iter().collect()),
            ".{1,30}",
            any::<f64>().prop_map(|number| number.to_string()),
        ]
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back_as_it_was(values in prop::collection::vec(values(), 1..5)) {
            let paths: Vec<String> = (0..values.len()).map(|number| format!("kafka.k{number}")).collect();
            let lines = paths.iter().zip(&values).map(|(path, value)| format!("{}  # flag\n", line(path, value)));
            let read = leaves("f.yaml", &lines.collect::<String>()).map_err(|faults| faults.to_string());
            let read: Vec<_> = read.unwrap().into_iter().map(|leaf| (leaf.path, leaf.value)).collect();
            prop_assert_eq!(read, paths.into_iter().zip(values).collect::<Vec<_>>());
        }
    }
}
