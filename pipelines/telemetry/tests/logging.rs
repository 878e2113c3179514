//! What stderr shows, seen from outside: logging is set up once for a process, so each case is a process of its own.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]

use forebay_telemetry::logging::{self, FILTER_VARIABLE, Format, InitError};
use serde_json::Value;
use std::process::{Command, Stdio};

/// Set in the process that logs, to the format it logs in.
const CHILD: &str = "FOREBAY_TEST_LOG_FORMAT";

/// Does nothing but in a process that [`logged`] started.
#[test]
fn child() {
    let format = match std::env::var(CHILD).as_deref() {
        Ok("auto") => Format::Auto,
        Ok("text") => Format::Text,
        _ => return,
    };
    logging::init(format, Some("warn")).unwrap();
    tracing::info!(partition = 3, "assigned");
    tracing::warn!(stage = "infer", attempt = 2, "model call failed; will retry");
    assert!(matches!(logging::init(format, None), Err(InitError::Twice { .. })));
}

/// The lines that a process with this format and filter variable writes to stderr.
fn logged(format: &str, variable: Option<&str>) -> Vec<String> {
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "child", "--nocapture"]).env(CHILD, format).env_remove(FILTER_VARIABLE);
    if let Some(variable) = variable {
        process.env(FILTER_VARIABLE, variable);
    }
    let output = process.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn where_nobody_watches_a_line_is_a_json_object() {
    let lines = logged("auto", None);
    let [line] = &lines[..] else { panic!("{lines:?}") };
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["message"], "model call failed; will retry");
    assert_eq!(
        (&line["level"], &line["stage"], &line["attempt"]),
        (&"WARN".into(), &"infer".into(), &2.into())
    );
    assert!(line["timestamp"].is_string());
}

#[test]
fn the_variable_goes_before_the_settings() {
    assert_eq!(logged("auto", Some("info")).len(), 2);
    assert_eq!(logged("auto", Some("error")).len(), 0);
}

#[test]
fn text_can_be_had_without_a_terminal_and_then_has_no_colours() {
    let lines = logged("text", None);
    let [line] = &lines[..] else { panic!("{lines:?}") };
    assert!(line.contains("WARN") && line.contains("model call failed; will retry"), "{line}");
    assert!(!line.contains('\u{1b}'), "{line}");
}
