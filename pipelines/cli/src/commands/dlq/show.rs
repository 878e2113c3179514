//! `forebay dlq show`: all that is known of a dead letter, and the record itself.

use super::{blocking, length, line, open, say_unreadable, time, to_json};
use crate::{
    args::DlqShow,
    build,
    config::Config,
    console::{out, say},
    letters::{self, Filter, Letter},
};
use forebay_operator::Clock;
use forebay_runtime::claims::Claims;
use forebay_schemas::Claim;
use serde_json::{Value, json};
use std::{fmt::Write as _, ops::ControlFlow, process::ExitCode};

/// How many letters of one id are shown at most: a request may die at several steps, and in several generations.
const SHOWN_MAX: usize = 20;

/// Prints it.
pub async fn run(args: DlqShow, config: Config) -> anyhow::Result<ExitCode> {
    let (kafka, topic) = open(&config).await?;
    let since_ms = letters::since_ms(args.since, Clock::System);
    let filter = Filter { names: vec![args.letter.clone()], ..Filter::default() };
    let name = topic.clone();
    let (mut found, unreadable) = blocking(&kafka, move |reader| {
        let mut found = Vec::new();
        let unreadable = letters::each(&reader, &name, since_ms, |letter| {
            if filter.wants(&letter) {
                found.push(letter);
            }
            Ok(if found.len() < SHOWN_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok((found, unreadable))
    })
    .await?;
    say_unreadable(&topic, unreadable);
    if found.is_empty() {
        say(format_args!(
            "forebay: no dead letter has the key or the id {:?}; `forebay dlq list` shows those that are there",
            args.letter
        ));
        return Ok(ExitCode::FAILURE);
    }
    let claims = build::claims(&config).await?;
    for letter in &mut found {
        bring(letter, &claims).await;
    }
    for letter in &found {
        match args.json {
            true => out(json_of(letter)?),
            false => print(letter),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Brings the record of a letter whose body lies at the object store.
async fn bring(letter: &mut Letter, claims: &Claims) {
    let brought = match Claim::read(&letter.headers) {
        Ok(None) => return,
        Ok(Some(claim)) => claims.get(&claim).await.map_err(anyhow::Error::from),
        Err(fault) => Err(fault.into()),
    };
    letter.value = match brought {
        Ok(body) => Some(body.into()),
        Err(fault) => {
            say(format_args!("forebay: could not bring the record of {}: {fault:#}", line(&letter.key)));
            None
        }
    };
}

fn json_of(letter: &Letter) -> anyhow::Result<Value> {
    let mut value = to_json(letter)?;
    let headers = letter.headers.iter();
    let headers = headers.map(|(name, value)| json!([name, value.as_deref().map(String::from_utf8_lossy)]));
    value["headers"] = headers.collect();
    value["value"] = match (&letter.value, letter.value.as_deref().map(std::str::from_utf8)) {
        (None, _) | (_, None) => Value::Null,
        (_, Some(Ok(text))) => json!(text),
        (Some(bytes), Some(Err(_))) => json!({"hex": hex(bytes)}),
    };
    Ok(value)
}

fn print(letter: &Letter) {
    let age = length(Clock::System.now_ms() - letter.at_ms);
    out(format_args!("{}\n  {} ({age} ago)", line(&letter.key), time(letter.at_ms)));
    if let Some((redriven, at_ms)) = &letter.redriven {
        let (to, generation) = (line(&redriven.to.to_string()), redriven.generation);
        out(format_args!("  redriven at {} to {to}, generation {generation}", time(*at_ms)));
    }
    let width = letter.headers.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
    for (name, value) in &letter.headers {
        let value = value.as_deref().map_or("null".into(), String::from_utf8_lossy);
        out(format_args!("  {:width$}  {}", line(name), line(&value)));
    }
    match &letter.value {
        None => out("\nno value\n"),
        Some(bytes) => out(format_args!("\n{} bytes\n{}\n", bytes.len(), body(bytes))),
    }
}

/// JSON set out in lines, or a text, or else hexadecimal digits.
fn body(bytes: &[u8]) -> String {
    if let Ok(value) = serde_json::from_slice::<Value>(bytes)
        && let Ok(pretty) = serde_json::to_string_pretty(&value)
    {
        return pretty;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => text.lines().map(line).collect::<Vec<_>>().join("\n"),
        Err(_) => hex(bytes),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_shown_as_what_it_is() {
        assert_eq!(body(br#"{"a":1}"#), "{\n  \"a\": 1\n}");
        assert_eq!(body(b"no JSON \x1b[2J\nat all"), "no JSON \\u{1b}[2J\nat all");
        assert_eq!(body(b"\xff\xfe\x00"), "fffe00");
    }
}
