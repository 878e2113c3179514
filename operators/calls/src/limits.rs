//! What a provider says about its limits, in the headers of its answers.
//!
//! OpenAI and whoever follows it give `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, where a reset is a duration
//! such as `6m0s` or `12ms`; Anthropic gives `anthropic-ratelimit-{requests,tokens}-{limit,remaining,reset}`, where it is
//! a moment (RFC 3339). A refusal says how long to wait: `retry-after-ms`, or `retry-after` (RFC 9110) in seconds or as a
//! date.
//!
//! Invariant: what cannot be read is as if it were not there; no header fails a call.

use forebay_operator::Clock;
use reqwest::header::{DATE, HeaderMap, RETRY_AFTER};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest reset that is believed.
const RESET_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What is left of each limit; absent where nothing is said of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Of requests.
    pub requests: Option<Quota>,
    /// Of tokens.
    pub tokens: Option<Quota>,
}

/// What is left of one limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quota {
    /// How much there is when all of it is there.
    pub limit: Option<u64>,
    /// How much is left.
    pub remaining: u64,
    /// Until all of it is there again.
    pub reset: Duration,
}

impl Limits {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads the headers of an answer. With a success, a value that is not positive is no statement: Azure sends -1.
    pub(crate) fn read(headers: &HeaderMap, is_success: bool) -> Self {
        let quota = |of: &str| {
            let openai = |what: &str| text(headers, &format!("x-ratelimit-{what}-{of}"));
            let anthropic = |what: &str| text(headers, &format!("anthropic-ratelimit-{of}-{what}"));
            let number = |what: &str| openai(what).or_else(|| anthropic(what))?.parse::<u64>().ok();
            let remaining = number("remaining").filter(|&remaining| remaining > 0 || !is_success)?;
            let reset = match openai("reset") {
                Some(reset) => duration(&reset)?,
                None => until(headers, rfc3339(&anthropic("reset")?)?),
            };
            let limit = number("limit").filter(|&limit| limit > 0);
            Some(Quota { limit, remaining, reset: reset.min(RESET_MAX) })
        };
        Self { requests: quota("requests"), tokens: quota("tokens") }
    }
}

/// How long a refusal asks to wait.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = |text: &str, unit: f64| Duration::try_from_secs_f64(text.parse::<f64>().ok()? * unit).ok();
    if let Some(wait) = text(headers, "retry-after-ms").and_then(|text| seconds(&text, 0.001)) {
        return Some(wait);
    }
    let value = text(headers, RETRY_AFTER.as_str())?;
    seconds(&value, 1.0).or_else(|| Some(until(headers, httpdate::parse_http_date(&value).ok()?)))
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_owned())
}

/// Counted from the server's own clock where it shows it: ours may be off by more than the wait.
fn until(headers: &HeaderMap, moment: SystemTime) -> Duration {
    let server = text(headers, DATE.as_str()).and_then(|text| httpdate::parse_http_date(&text).ok());
    moment.duration_since(server.unwrap_or_else(now)).unwrap_or_default()
}

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(Clock::System.now_ms()).unwrap_or(0))
}

/// A duration as Go writes it: `6m0s`, `12ms`, `1h2m3.5s`; or seconds without a unit.
fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let (mut rest, mut sum) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(digits);
        let unit = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let seconds = match unit {
            "d" => 86_400.0,
            "h" => 3_600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 0.001,
            "us" | "µs" => 0.000_001,
            _ => return None,
        };
        sum = sum.checked_add(Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?)?;
        rest = after;
    }
    Some(sum)
}

/// A moment in UTC, as `2026-11-24T16:05:00Z`, with or without a fraction.
pub(crate) fn rfc3339(text: &str) -> Option<SystemTime> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let [year, month, day] = numbers(date, '-')?;
    let time = time.split_once('.').map_or(time, |(whole, _)| whole);
    let [hour, minute, second] = numbers(time, ':')?;
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Howard Hinnant, "days_from_civil": years begin in March, so that a leap day is the last of its year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, of_era) = (year / 400, year % 400);
    let of_year = (153 * month + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let seconds = days.checked_mul(86_400)?.checked_add(hour * 3_600 + minute * 60 + second)?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn numbers(text: &str, separator: char) -> Option<[u64; 3]> {
    let numbers: Vec<u64> = text.split(separator).map(|part| part.parse().ok()).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_wait_is_read_in_each_of_its_forms() {
        let check = |lines: &[(&'static str, &str)], expected: Option<u64>| {
            let wait = retry_after(&headers(lines));
            assert_eq!(wait, expected.map(Duration::from_millis), "{lines:?}");
        };
        check(&[("retry-after", "3")], Some(3_000));
        check(&[("retry-after-ms", "1500"), ("retry-after", "9")], Some(1_500));
        let (date, until) = ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:41 GMT");
        check(&[("date", date), ("retry-after", until)], Some(4_000));
        check(&[("date", until), ("retry-after", date)], Some(0));
        check(&[("retry-after", "soon")], None);
        check(&[("retry-after", "-1")], None);
        check(&[], None);
    }

    #[test]
    fn limits_are_read_in_both_dialects() {
        let check = |lines: &[(&'static str, &str)], is_success, expected: &str| {
            let Limits { requests, tokens } = Limits::read(&headers(lines), is_success);
            let show = |quota: Option<Quota>| match quota {
                Some(Quota { limit, remaining, reset }) => {
                    format!("{remaining} of {limit:?} in {} ms", reset.as_millis())
                }
                None => "-".to_owned(),
            };
            assert_eq!(format!("{}, {}", show(requests), show(tokens)), expected, "{lines:?}");
        };
        let openai = [
            ("x-ratelimit-limit-requests", "60"),
            ("x-ratelimit-remaining-requests", "59"),
            ("x-ratelimit-reset-requests", "6m0s"),
            ("x-ratelimit-remaining-tokens", "149984"),
            ("x-ratelimit-reset-tokens", "12ms"),
        ];
        check(&openai, true, "59 of Some(60) in 360000 ms, 149984 of None in 12 ms");
        let anthropic = [
            ("date", "Tue, 24 Nov 2026 16:00:00 GMT"),
            ("anthropic-ratelimit-requests-limit", "50"),
            ("anthropic-ratelimit-requests-remaining", "49"),
            ("anthropic-ratelimit-requests-reset", "2026-11-24T16:05:00.5Z"),
        ];
        check(&anthropic, true, "49 of Some(50) in 300000 ms, -");
        let spent =
            |remaining| [("x-ratelimit-remaining-requests", remaining), ("x-ratelimit-reset-requests", "1s")];
        check(&spent("-1"), true, "-, -");
        check(&spent("0"), true, "-, -");
        check(&spent("0"), false, "0 of None in 1000 ms, -");
        check(
            &[("x-ratelimit-remaining-requests", "1"), ("x-ratelimit-reset-requests", "soon")],
            true,
            "-, -",
        );
    }

    #[test]
    fn a_leap_day_is_a_day() {
        let seconds = |text| rfc3339(text).unwrap().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(seconds("2024-02-29T00:00:00Z"), 1_709_164_800);
        assert_eq!(seconds("2024-03-01T00:00:00Z"), 1_709_251_200);
        assert_eq!(rfc3339("2024-13-01T00:00:00Z"), None);
        assert_eq!(rfc3339("2024-03-01 00:00:00"), None);
    }
}
