//! The settings of tiers: which models, the cheapest first, what gives a request to which, and when the next one answers.
//!
//! Invariant: every endpoint of the pool is a tier's, or stands in; a request is answered by no model that nobody named.

use crate::{
    config::{Sourced, pool::PoolSettings, served::Served},
    console::wrong,
};
use forebay_calls::tiers::{Escalation, Policy, TIERS_MAX, classifier::Classifier, rules::Rule};
use std::{collections::BTreeMap, io::Read as _};

/// Weights of a few languages' words have some 100 KiB.
const CLASSIFIER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Which tiers there are, and which answers what.
#[derive(Clone, Debug)]
pub struct TierSettings {
    /// The names of their models, the cheapest first.
    pub models: Vec<String>,
    pub policy: Policy,
}

impl TierSettings {
    /// The settings, where there are tiers.
    pub fn of(
        values: &BTreeMap<String, Sourced>,
        served: &[Served],
        common_model: Option<&str>,
        pool: Option<&PoolSettings>,
    ) -> anyhow::Result<Option<Self>> {
        let sourced =
            |path: &str| values.get(path).map(|sourced| (sourced.value.as_str(), sourced.from.as_str()));
        let (text, from) = sourced("tiers.models").unwrap_or_default();
        let models: Vec<String> =
            text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect();
        if models.is_empty() {
            let said =
                values.iter().find(|(path, value)| path.starts_with("tiers.") && value.from != "default");
            return match said {
                Some((path, _)) => Err(wrong(format!("{path} has no effect without tiers.models"))),
                None => Ok(None),
            };
        }
        let faulty = |fault: String| wrong(format!("tiers.models is {text:?} (from {from}); {fault}"));
        if !(2..=TIERS_MAX).contains(&models.len()) {
            return Err(faulty(format!("there may be 2 to {TIERS_MAX} tiers")));
        }
        let fallbacks = pool.map(|pool| pool.fallbacks.as_slice()).unwrap_or_default();
        let own = served.iter().filter(|served| !fallbacks.iter().any(|fallback| fallback.is(served)));
        let own: Vec<&str> = own.map(|served| served.asks_for(common_model)).collect();
        for (at, model) in models.iter().enumerate() {
            if !own.contains(&model.as_str()) {
                let known = own.join(", ");
                return Err(faulty(format!("no endpoint of the pool serves {model:?}; they serve {known}")));
            }
            if models[..at].contains(model) {
                return Err(faulty(format!("{model:?} stands there twice")));
            }
        }
        if let Some(other) = own.iter().find(|model| !models.iter().any(|tier| tier == *model)) {
            return Err(faulty(format!("an endpoint of the pool serves {other:?}, which is no tier")));
        }
        let (rules, from) = sourced("tiers.rules").unwrap_or_default();
        let rules = Rule::all(rules, &models)
            .map_err(|fault| wrong(format!("tiers.rules (from {from}): {fault}")))?;
        let (escalate, from) = sourced("tiers.escalate").unwrap_or_default();
        let escalation = escalation(escalate).ok_or_else(|| {
            wrong(format!(
                "tiers.escalate is {escalate:?} (from {from}); it may be off, or some of schema, refusal, verdict, outage and \
                 \"logprob -0.8\", joined by commas"
            ))
        })?;
        let classifier = match sourced("tiers.classifier").unwrap_or_default() {
            ("", _) => None,
            (file, from) => Some(classifier(file, from, &models)?),
        };
        Ok(Some(Self { models, policy: Policy { rules, classifier, escalation } }))
    }
}

/// The models of the tiers, for what cannot do without.
pub fn models(tiers: Option<TierSettings>) -> anyhow::Result<Vec<String>> {
    let missing =
        || wrong("there are no tiers: name their models, the cheapest first, by --tiers or tiers.models");
    Ok(tiers.ok_or_else(missing)?.models)
}

fn escalation(text: &str) -> Option<Escalation> {
    let mut escalation = Escalation::default();
    if text.trim() == "off" {
        return Some(escalation);
    }
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match word {
            "schema" => escalation.on_schema = true,
            "refusal" => escalation.on_refusal = true,
            "verdict" => escalation.on_verdict = true,
            "outage" => escalation.on_outage = true,
            _ => {
                let least: f64 = word.strip_prefix("logprob ")?.trim().parse().ok()?;
                escalation.logprob_min = Some(least).filter(|least| *least < 0.0 && least.is_finite());
                escalation.logprob_min?;
            }
        }
    }
    Some(escalation)
}

fn classifier(file: &str, from: &str, models: &[String]) -> anyhow::Result<Classifier> {
    let mut text = String::new();
    let read = std::fs::File::open(file)
        .and_then(|opened| opened.take(CLASSIFIER_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|fault| wrong(format!("could not read tiers.classifier {file} (from {from}): {fault}")))?;
    Classifier::read(&text, models).map_err(|fault| {
        let cause = std::error::Error::source(&fault).map(|cause| format!(": {cause}")).unwrap_or_default();
        wrong(format!("tiers.classifier {file} (from {from}): {fault}{cause}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<TierSettings>, String> {
        let sourced = |value: &str, from: &str| Sourced { value: value.to_owned(), from: from.to_owned() };
        let mut values = BTreeMap::from([
            ("tiers.escalate".to_owned(), sourced("schema,refusal,verdict", "default")),
            ("tiers.models".to_owned(), sourced("", "default")),
        ]);
        for (path, value) in pairs {
            values.insert(format!("tiers.{path}"), sourced(value, "f.yaml:3"));
        }
        let served = ["small", "large"].map(|model| Served {
            name: Some(model.to_owned()),
            url: "http://h/v1".to_owned(),
            api: forebay_calls::Api::default(),
            model: Some(model.to_owned()),
            keys: Vec::new(),
            vllm: Default::default(),
        });
        TierSettings::of(&values, &served, None, None).map_err(|fault| fault.to_string())
    }

    #[test]
    fn there_are_tiers_where_models_are_named_in_their_order() {
        assert!(read(&[]).unwrap().is_none());
        let rules = "tokens > 8000 -> large\n";
        let tiers = read(&[("models", "small, large"), ("rules", rules)]).unwrap().unwrap();
        assert_eq!((tiers.models.join(" "), tiers.policy.rules.len()), ("small large".to_owned(), 1));
        let usual =
            Escalation { on_schema: true, on_refusal: true, on_verdict: true, ..Escalation::default() };
        assert_eq!(tiers.policy.escalation, usual);
        let off = read(&[("models", "small, large"), ("escalate", "off")]).unwrap().unwrap();
        assert_eq!(off.policy.escalation, Escalation::default());
        let some =
            read(&[("models", "small, large"), ("escalate", "outage, logprob -0.8")]).unwrap().unwrap();
        let expected = Escalation { on_outage: true, logprob_min: Some(-0.8), ..Escalation::default() };
        assert_eq!(some.policy.escalation, expected);
    }

    #[test]
    fn the_example_of_the_guide_is_a_configuration() {
        let guide = include_str!("../../../guides/tiers.md");
        let example = guide.split("```").find_map(|block| block.strip_prefix("yaml\n")).unwrap();
        let config = crate::config::merge(Some(("forebay.yaml", example)), |_| None, &[]).unwrap();
        let tiers = config.tiers.unwrap();
        assert_eq!((tiers.models.join(" "), tiers.policy.rules.len()), ("small-8b large-70b".to_owned(), 3));
        assert_eq!(tiers.policy.escalation.logprob_min, Some(-0.8));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_its_place() {
        let refused = |pairs: &[(&str, &str)]| read(pairs).unwrap_err();
        assert_eq!(refused(&[("rules", "x")]), "tiers.rules has no effect without tiers.models");
        assert_eq!(
            refused(&[("models", "small, huge")]),
            "tiers.models is \"small, huge\" (from f.yaml:3); no endpoint of the pool serves \"huge\"; they serve small, large"
        );
        let models = |more: (&'static str, &'static str)| refused(&[("models", "small,large"), more]);
        assert!(refused(&[("models", "small")]).contains("2 to 8 tiers"));
        assert!(refused(&[("models", "small, small")]).contains("twice"));
        assert!(models(("rules", "\ntokens > x -> large")).contains("tiers.rules (from f.yaml:3): rule 2 "));
        assert!(models(("escalate", "logprob 0.8")).contains("logprob -0.8"));
        for refused in ["always", "off,schema", "schema, off"] {
            assert!(models(("escalate", refused)).contains("it may be off, or some of"), "{refused}");
        }
        assert!(
            models(("classifier", "/nowhere/c.json"))
                .contains("could not read tiers.classifier /nowhere/c.json")
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{\n\"version\": 1}").unwrap();
        let told = refused(&[("models", "small,large"), ("classifier", file.path().to_str().unwrap())]);
        assert!(told.contains("it is no classifier of tiers: missing field `tiers` at line 2"), "{told}");
    }
}
