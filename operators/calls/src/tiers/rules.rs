//! Rules on a request that say which tier answers it: the first that holds decides.
//!
//! ```text
//! tokens > 8000                          -> large
//! prompt matches "(?i)\bprove\b"         -> large
//! tenant = acme and not tools            -> small
//! metadata.plan = free                   -> small      # a comment
//! ```
//!
//! Invariant: what a rule looks at is in the request and its passages, so the same record is given to the same tier again.

use crate::Call;
use forebay_schemas::{Lane, Role};
use regex_lite::{Regex, RegexBuilder};
use serde_json::Value;

/// The most rules of a client; each is looked at for each call.
const RULES_MAX: usize = 64;
/// The most conditions of a rule.
const CONDITIONS_MAX: usize = 16;
/// The memory that a pattern may take once it is compiled, in bytes.
const PATTERN_BYTES_MAX: usize = 256 * 1024;

/// What is wrong with a rule, and which it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {line} {fault}")]
pub struct Error {
    /// Its line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub fault: String,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule {
    conditions: Vec<Condition>,
    tier: usize,
}

#[derive(Clone, Debug)]
struct Condition {
    holds_if: bool,
    test: Test,
}

#[derive(Clone, Debug)]
enum Test {
    Count(Count, Order, u64),
    Is(Word, String),
    Contains(String),
    Matches(Regex),
    HasTools,
    HasResponseFormat,
}

#[derive(Clone, Copy, Debug)]
enum Count {
    Tokens,
    Characters,
    Passages,
    Turns,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Above,
    AtLeast,
    Below,
    AtMost,
}

#[derive(Clone, Debug)]
enum Word {
    Tenant,
    Model,
    Lane,
    Metadata(Vec<String>),
}

impl Rule {
    /// All rules of a text, one a line, in their order. A rule gives a call to one of these tiers.
    pub fn all(text: &str, tiers: &[String]) -> Result<Vec<Self>, Error> {
        let mut rules = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let faulty = |fault: String| Error { line: number, fault };
            let words = words(line).map_err(faulty)?;
            if words.is_empty() {
                continue;
            }
            rules.push(Self::read(&words, tiers).map_err(faulty)?);
            if rules.len() > RULES_MAX {
                return Err(faulty(format!("is one too many; there may be {RULES_MAX}")));
            }
        }
        Ok(rules)
    }

    fn read(words: &[Token], tiers: &[String]) -> Result<Self, String> {
        let [conditions @ .., Token::Bare(arrow), tier] = words else { return Err(shape()) };
        if arrow != "->" || conditions.is_empty() {
            return Err(shape());
        }
        let place = tiers.iter().position(|name| name == tier.text());
        let tier = place.ok_or_else(|| {
            format!("gives calls to {:?}, which is no tier; the tiers are {}", tier.text(), tiers.join(", "))
        })?;
        let conditions: Vec<_> = conditions
            .split(|word| matches!(word, Token::Bare(word) if word == "and"))
            .map(Condition::read)
            .collect::<Result<_, _>>()?;
        if conditions.len() > CONDITIONS_MAX {
            return Err(format!("has {} conditions; it may have {CONDITIONS_MAX}", conditions.len()));
        }
        Ok(Self { conditions, tier })
    }

    /// The tier that this rule gives the call to, where it holds.
    pub fn tier(&self, call: &Call<'_>) -> Option<usize> {
        let holds = |Condition { holds_if, test }: &Condition| test.holds(call) == *holds_if;
        self.conditions.iter().all(holds).then_some(self.tier)
    }
}

fn shape() -> String {
    "is not of the form \"condition and condition -> model\"".to_owned()
}

impl Condition {
    fn read(words: &[Token]) -> Result<Self, String> {
        let (holds_if, words) = match words {
            [Token::Bare(not), rest @ ..] if not == "not" => (false, rest),
            words => (true, words),
        };
        let texts: Vec<&str> = words.iter().map(Token::text).collect();
        let (holds_if, test) = match texts.as_slice() {
            ["tools"] => (holds_if, Test::HasTools),
            ["response_format"] => (holds_if, Test::HasResponseFormat),
            ["prompt", "contains", text] if !text.is_empty() => {
                (holds_if, Test::Contains((*text).to_owned()))
            }
            ["prompt", "matches", pattern] => (holds_if, Test::Matches(regex(pattern)?)),
            [name, "=", value] => (holds_if, Test::Is(word(name)?, (*value).to_owned())),
            [name, "!=", value] => (!holds_if, Test::Is(word(name)?, (*value).to_owned())),
            [name, order, number] => {
                (holds_if, Test::Count(count(name)?, self::order(order)?, number_of(number)?))
            }
            _ => return Err(format!("has a condition that says nothing known: {:?}", texts.join(" "))),
        };
        if let Test::Is(Word::Lane, lane) = &test
            && [Lane::Interactive, Lane::Backfill].iter().all(|known| known.as_str() != lane)
        {
            return Err(format!("names lane {lane:?}; there are interactive and backfill"));
        }
        Ok(Self { holds_if, test })
    }
}

fn regex(pattern: &str) -> Result<Regex, String> {
    let built = RegexBuilder::new(pattern).size_limit(PATTERN_BYTES_MAX).build();
    built.map_err(|fault| format!("has pattern {pattern:?}, which cannot be read: {fault}"))
}

fn word(name: &str) -> Result<Word, String> {
    match name.split_once('.') {
        None if name == "tenant" => Ok(Word::Tenant),
        None if name == "model" => Ok(Word::Model),
        None if name == "lane" => Ok(Word::Lane),
        Some(("metadata", path)) => Ok(Word::Metadata(path.split('.').map(str::to_owned).collect())),
        _ => Err(format!("compares {name:?}; it may be tenant, model, lane or a field like metadata.plan")),
    }
}

fn count(name: &str) -> Result<Count, String> {
    match name {
        "tokens" => Ok(Count::Tokens),
        "characters" => Ok(Count::Characters),
        "passages" => Ok(Count::Passages),
        "turns" => Ok(Count::Turns),
        _ => Err(format!("counts {name:?}; it may be tokens, characters, passages or turns")),
    }
}

fn order(sign: &str) -> Result<Order, String> {
    match sign {
        ">" => Ok(Order::Above),
        ">=" => Ok(Order::AtLeast),
        "<" => Ok(Order::Below),
        "<=" => Ok(Order::AtMost),
        _ => Err(format!("compares by {sign:?}; it may be >, >=, <, <=, = or !=")),
    }
}

fn number_of(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("compares with {text:?}, which is no whole number"))
}

impl Test {
    fn holds(&self, call: &Call<'_>) -> bool {
        match self {
            Self::Count(what, order, bound) => {
                let count = what.of(call);
                match order {
                    Order::Above => count > *bound,
                    Order::AtLeast => count >= *bound,
                    Order::Below => count < *bound,
                    Order::AtMost => count <= *bound,
                }
            }
            Self::Is(Word::Tenant, value) => call.tenant.as_str() == value,
            Self::Is(Word::Model, value) => call.model.as_deref() == Some(value),
            Self::Is(Word::Lane, value) => call.lane.as_str() == value,
            Self::Is(Word::Metadata(path), value) => {
                let found = path.iter().try_fold(call.metadata, |at, key| Some(at?.get(key)));
                match found.flatten() {
                    Some(Value::String(text)) => text == value,
                    // As JSON writes it: 3, true, null.
                    Some(other) => value.parse().is_ok_and(|value: Value| value == *other),
                    None => false,
                }
            }
            Self::Contains(text) => call.question.contains(text),
            Self::Matches(pattern) => pattern.is_match(&call.question),
            Self::HasTools => call.sampling.tools.is_some(),
            Self::HasResponseFormat => call.sampling.response_format.is_some(),
        }
    }
}

impl Count {
    fn of(self, call: &Call<'_>) -> u64 {
        let count = match self {
            Self::Tokens => return call.prompt_tokens_estimated(),
            Self::Characters => call.question.chars().count(),
            Self::Passages => call.passages.len(),
            Self::Turns => turns(call),
        };
        u64::try_from(count).unwrap_or(u64::MAX)
    }
}

/// What the user and the model said, without instructions.
pub(super) fn turns(call: &Call<'_>) -> usize {
    call.messages.iter().filter(|message| matches!(message.role, Role::User | Role::Assistant)).count()
}

/// A word of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Bare(String),
    Quoted(String),
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Bare(text) | Self::Quoted(text) => text,
        }
    }
}

/// The words of a line; what stands in quotation marks is one, in which `\"` is a mark and every other backslash itself.
fn words(line: &str) -> Result<Vec<Token>, String> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() && !rest.starts_with('#') {
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut before = ' ';
            let end = quoted.find(|letter| {
                let ends = letter == '"' && before != '\\';
                before = letter;
                ends
            });
            let end = end.ok_or("has a quotation mark that is never closed")?;
            words.push(Token::Quoted(quoted[..end].replace("\\\"", "\"")));
            rest = quoted[end + 1..].trim_start();
        } else {
            let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
            words.push(Token::Bare(rest[..end].to_owned()));
            rest = rest[end..].trim_start();
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::call;
    use forebay_schemas::{Sampling, Tenant};
    use serde_json::json;

    fn tiers() -> Vec<String> {
        ["small", "large"].map(str::to_owned).to_vec()
    }

    /// Whether the condition holds of a call about a proof, by tenant acme.
    fn check(condition: &str, expected: bool) {
        let metadata = json!({"plan": "free", "user": {"level": 3}});
        let asked = Call {
            question: "Prove that \"2\" is prime.".to_owned(),
            metadata: Some(&metadata),
            tenant: Tenant::try_from("acme".to_owned()).unwrap(),
            model: Some("large".to_owned()),
            sampling: Sampling { tools: Some(json!([])), ..Sampling::default() },
            ..call(&"x".repeat(400))
        };
        let rules = Rule::all(&format!("{condition} -> large"), &tiers()).unwrap();
        assert_eq!(rules[0].tier(&asked), expected.then_some(1), "{condition}");
    }

    #[test]
    fn each_condition_looks_at_what_it_says() {
        for (condition, expected) in [
            ("tokens > 99", true),
            ("tokens > 100", false),
            ("tokens >= 100", true),
            ("characters < 24", false),
            ("characters <= 24", true),
            ("passages < 1", true),
            ("turns >= 2", false),
            ("tenant = acme", true),
            ("tenant != acme", false),
            ("not tenant = acme", false),
            ("model = large", true),
            ("lane = backfill", false),
            ("metadata.plan = free", true),
            ("metadata.user.level = 3", true),
            ("metadata.user.name = 3", false),
            (r#"prompt contains "\"2\"""#, true),
            ("prompt contains prove", false),
            (r#"prompt matches "(?i)\bprove\b""#, true),
            ("tools", true),
            ("not tools", false),
            ("response_format", false),
            ("tools and tenant = acme and not response_format", true),
            ("tools and tenant = other", false),
        ] {
            check(condition, expected);
        }
    }

    #[test]
    fn the_first_rule_that_holds_decides() {
        let text =
            "# from the top\n\ntenant = none -> small\ntokens >= 0 -> large # all\ntokens >= 0 -> small\n";
        let rules = Rule::all(text, &tiers()).unwrap();
        assert_eq!(rules.len(), 3);
        assert_eq!(rules.iter().find_map(|rule| rule.tier(&call("why"))), Some(1));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let refused = |text: &str| Rule::all(text, &tiers()).unwrap_err().to_string();
        assert_eq!(
            refused("\ntools -> medium"),
            "rule 2 gives calls to \"medium\", which is no tier; the tiers are small, large"
        );
        for (text, expected) in [
            ("tools large", "is not of the form"),
            ("-> large", "is not of the form"),
            ("colour = red -> large", "compares \"colour\""),
            ("tokens ~ 3 -> large", "compares by \"~\""),
            ("tokens > many -> large", "is no whole number"),
            ("words > 3 -> large", "counts \"words\""),
            ("lane = slow -> large", "names lane \"slow\""),
            ("prompt matches \"(\" -> large", "cannot be read"),
            ("prompt contains \"x -> large", "never closed"),
            ("tools and -> large", "says nothing known"),
        ] {
            assert!(refused(text).contains(expected), "{text}: {}", refused(text));
        }
        assert!(refused(&"tools -> large\n".repeat(65)).contains("one too many"));
    }
}
