//! The settings of alerts: what is told of what budgets spend, and to which webhook.

use crate::{
    config::{Sourced, from, one_of, text},
    console::wrong,
};
use forebay_calls::{Secret, prices};
use forebay_operators::budgets::watch::{Rules, Unusual};
use reqwest::Url;
use std::collections::BTreeMap;

/// The setting whose value is an address that nobody else may know.
pub const WEBHOOK: &str = "alerts.webhook";
/// The most parts of a budget that are told of.
const CAPS_MAX: usize = 8;

/// What is told, and where besides the topic.
#[derive(Clone)]
pub struct AlertSettings {
    pub rules: Rules,
    pub webhook: Option<Webhook>,
}

/// Where alerts are posted.
#[derive(Clone)]
pub struct Webhook {
    pub url: Url,
    /// Sent as a bearer's; none where the address is the secret.
    pub key: Option<Secret>,
}

impl AlertSettings {
    /// The settings; an error where some are said and there is nothing to watch.
    pub fn of(values: &BTreeMap<String, Sourced>, is_watched: bool) -> anyhow::Result<Self> {
        let is_said =
            values.iter().any(|(path, value)| path.starts_with("alerts.") && value.from != "default");
        if is_said && !is_watched {
            return Err(wrong(
                "settings under alerts have no effect without budgets, whose counters are watched: add one, as in \
                 budgets: \"all 1000 USD/month\"",
            ));
        }
        let a_minute = "an amount a minute, such as \"0.5 USD/minute\"";
        let rate = match text(values, "alerts.rate") {
            "" | "off" => None,
            _ => Some(one_of(values, "alerts.rate", &format!("{a_minute}, or off"), dollars_a_minute)?),
        };
        let floor = one_of(values, "alerts.floor", a_minute, dollars_a_minute)?;
        let percent = match text(values, "alerts.ewma") {
            "off" => None,
            _ => Some(one_of(
                values,
                "alerts.ewma",
                "1.1 to 1000, so many times what is usual, or off",
                times,
            )?),
        };
        let forecast = one_of(values, "alerts.forecast", "on or off", |text| match text {
            "on" | "true" => Some(true),
            "off" | "false" => Some(false),
            _ => None,
        })?;
        let caps = one_of(values, "alerts.cap", "parts of a budget, such as \"80%,100%\", or off", caps)?;
        let rules = Rules { rate, ewma: percent.map(|percent| Unusual { percent, floor }), forecast, caps };
        Ok(Self { rules, webhook: webhook(values)? })
    }
}

fn webhook(values: &BTreeMap<String, Sourced>) -> anyhow::Result<Option<Webhook>> {
    let (file, key) = (text(values, "alerts.webhook_key_file"), text(values, "alerts.webhook_key"));
    if text(values, WEBHOOK).is_empty() {
        let is_keyed = !file.is_empty() || !key.is_empty();
        return match is_keyed {
            true => Err(wrong("a key of a webhook has no effect without its address: add alerts.webhook")),
            false => Ok(None),
        };
    }
    // Its value is not said, as it may be a secret.
    let is_web = |url: &Url| matches!(url.scheme(), "http" | "https");
    let url = text(values, WEBHOOK).parse().ok().filter(is_web).ok_or_else(|| {
        let from = from(values, WEBHOOK);
        wrong(format!("{WEBHOOK} (from {from}) is no URL such as https://example.com/hook"))
    })?;
    let read = match (key, file) {
        ("", "") => None,
        ("", file) => Some(std::fs::read_to_string(file).map_err(|fault| {
            let from = from(values, "alerts.webhook_key_file");
            wrong(format!("could not read alerts.webhook_key_file {file} (from {from}): {fault}"))
        })?),
        (key, _) => Some(key.to_owned()),
    };
    Ok(Some(Webhook { url, key: read.map(|key| Secret::new(&key)) }))
}

fn dollars_a_minute(text: &str) -> Option<u64> {
    let amount = text.strip_suffix("USD/minute")?.trim_end();
    u64::try_from(prices::dollars(amount)?.0).ok()
}

/// How many percent so many times are.
fn times(text: &str) -> Option<u64> {
    let nanos = u64::try_from(prices::dollars(text)?.0).ok()?;
    Some(nanos / 10_000_000).filter(|percent| (110..=100_000).contains(percent))
}

/// The lowest first.
fn caps(text: &str) -> Option<Vec<u64>> {
    if text == "off" {
        return Some(Vec::new());
    }
    let part =
        |part: &str| part.trim().strip_suffix('%')?.parse().ok().filter(|part| (1..=100).contains(part));
    let mut parts: Vec<u64> = text.split(',').map(part).collect::<Option<_>>()?;
    parts.sort_unstable();
    parts.dedup();
    (parts.len() <= CAPS_MAX).then_some(parts)
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, merge};

    fn read(alerts: &str) -> Result<Config, String> {
        let file = format!("budgets: ['* 1 USD/day']\nalerts: {alerts}\n");
        merge(Some(("f.yaml", &file)), |_| None, &[]).map_err(|fault| fault.to_string())
    }

    #[test]
    fn what_is_told_reads_as_it_is_said() {
        let rules = read("{rate: 2.5 USD/minute, ewma: 2.5, cap: '100%, 50%'}").unwrap().alerts.rules;
        let unusual = rules.ewma.unwrap();
        assert_eq!((rules.rate, unusual.percent, unusual.floor), (Some(2_500_000_000), 250, 100_000_000));
        assert_eq!((rules.forecast, rules.caps), (true, vec![50, 100]));
        let rules = read("{rate: off, ewma: off, forecast: off, cap: off}").unwrap().alerts.rules;
        assert_eq!(rules, Default::default());
        assert!(merge(None, |_| None, &[]).unwrap().alerts.webhook.is_none());
    }

    #[test]
    fn what_is_wrong_is_named_and_the_address_of_a_webhook_is_not() {
        let refused = |alerts: &str| read(alerts).err().unwrap();
        let rate = refused("{rate: 2 EUR/minute}");
        assert!(
            rate.starts_with("alerts.rate is \"2 EUR/minute\" (from f.yaml:2); it may be an amount"),
            "{rate}"
        );
        assert!(refused("{ewma: 1}").contains("1.1 to 1000"));
        assert!(refused("{floor: 1}").contains("0.5 USD/minute"));
        assert!(refused("{forecast: soon}").contains("on or off"));
        assert!(refused("{cap: 120%}").contains("80%,100%"));
        let hook = refused("{webhook: 'hooks/canary'}");
        assert!(hook.contains("https://example.com/hook") && !hook.contains("canary"), "{hook}");
        assert!(refused("{webhook_key_file: /nowhere}").contains("add alerts.webhook"));
        assert!(refused("{webhook: 'http://h', webhook_key_file: /nowhere/key}").contains("/nowhere/key"));
        let alone = merge(Some(("f.yaml", "alerts: {rate: 1 USD/minute}\n")), |_| None, &[]).err().unwrap();
        assert!(alone.to_string().contains("all 1000 USD/month"), "{alone}");
    }
}
