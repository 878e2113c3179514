//! Asks the cheapest model that is likely good enough, and a better one where its answer is not.
//!
//! Which tier is asked first is told by the first rule that holds, else by the model that the request names, else by the
//! classifier, else it is the cheapest. An answer that lacks the form that was asked for, refuses, is unsure of itself or is
//! found wrong by whoever asked makes the next tier answer.
//!
//! Invariant: each tier is asked at most once for a call, the cheaper before the better, and each time as a call of its own
//! to whoever listens. An answer that could go out is never lost for a better one: it stands where the better tier cannot be
//! reached, paid or waited for. A request that waits for a tier to come back is never rejected for what a better one says of it.

pub mod classifier;
mod form;
pub mod rules;
#[cfg(test)]
mod tests;

use crate::{Call, CallError, Class, Listener, Model, Reply, Route};
use classifier::Classifier;
use futures::future::BoxFuture;
use rules::Rule;
use std::{fmt, sync::Arc, time::Duration};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

/// The most tiers of a client.
pub const TIERS_MAX: usize = 8;
/// What a better tier must leave of the time until the deadline, so that the answer that stands still arrives: a tenth of
/// it, and no less and no more than this. Half of it is for writing down what was paid, which a busy log takes tens of
/// milliseconds for: with less, a better answer would be paid and lost. So where no more is left than twice this, none is asked.
const LEFT_MIN: Duration = Duration::from_millis(100);
const LEFT_MAX: Duration = Duration::from_secs(1);
/// No more of an answer is looked at for a refusal.
const REFUSAL_CHARS_MAX: usize = 300;
/// How models refuse, in English, where they do not say so otherwise. A false alarm costs one call of the next tier.
const REFUSALS: [&str; 8] = [
    "i can't help",
    "i cannot help",
    "i can't assist",
    "i cannot assist",
    "i'm unable to",
    "i am unable to",
    "i'm not able to",
    "i am not able to",
];

/// One tier.
pub struct Tier {
    /// The name of its model.
    pub name: String,
    /// Its client.
    pub model: Arc<dyn Model>,
    /// The same, without those that stand in where it cannot be reached: for when an answer is there already.
    pub alone: Arc<dyn Model>,
    /// Those alone, for when it could not be reached and a better tier did not help; absent where nobody stands in.
    pub stand_ins: Option<Arc<dyn Model>>,
}

/// What whoever asks says of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is good enough.
    Good,
    /// It may go out where there is none better.
    Doubtful,
    /// It will be held back.
    Bad,
}

/// How whoever asks judges an answer.
#[derive(Clone, Copy, Default)]
pub struct Judge<'a>(pub Option<&'a (dyn Fn(&Reply) -> Verdict + Send + Sync)>);

impl fmt::Debug for Judge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Judge").field(&self.0.is_some()).finish()
    }
}

/// What makes the next tier answer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Escalation {
    /// The answer is not in the form that `response_format` asked for.
    pub on_schema: bool,
    /// The model refused, by the provider's word or its own.
    pub on_refusal: bool,
    /// Whoever asked judges it bad or doubtful.
    pub on_verdict: bool,
    /// The tier cannot be reached.
    pub on_outage: bool,
    /// The mean log-probability of its tokens is below this. Only then are they asked for.
    pub logprob_min: Option<f64>,
}

/// Which tier answers what.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// The first that holds picks a tier.
    pub rules: Vec<Rule>,
    /// What picks where no rule does.
    pub classifier: Option<Classifier>,
    /// What makes the next tier answer.
    pub escalation: Escalation,
}

/// The tier that answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Its name.
    pub tier: String,
    /// Its kind of provider.
    pub provider: &'static str,
}

/// Models of several tiers, as one.
pub struct Tiers {
    /// The cheapest first; at least one.
    tiers: Vec<Tier>,
    policy: Policy,
    /// All their names: what tells answers of these tiers from those of others.
    name: String,
}

/// Why an answer is not good enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Schema,
    Bad,
    Doubtful,
    Refusal,
    Unsure,
}

impl Cause {
    /// Whether the answer must not stand, though nobody has a better one.
    fn is_hard(self) -> bool {
        matches!(self, Self::Schema | Self::Bad)
    }
}

impl Tiers {
    /// These, the cheapest first.
    pub fn new(tiers: Vec<Tier>, policy: Policy) -> Self {
        let name = tiers.iter().map(|tier| tier.name.as_str()).collect::<Vec<_>>().join(",");
        Self { tiers, policy, name }
    }

    /// The place of the tier that this name means.
    fn named(&self, name: Option<&str>) -> Option<usize> {
        self.tiers
            .iter()
            .position(|tier| name.is_some_and(|name| name == tier.name || name == tier.model.name()))
    }

    /// The place of the tier that is asked first.
    fn pick(&self, call: &Call<'_>) -> usize {
        let Policy { rules, classifier, .. } = &self.policy;
        rules
            .iter()
            .find_map(|rule| rule.tier(call))
            .or_else(|| self.named(call.model.as_deref()))
            .or_else(|| classifier.as_ref().map(|classifier| classifier.pick(call)))
            .unwrap_or(0)
    }

    /// Why an answer is not good enough; nothing where it is.
    fn fault(&self, call: &Call<'_>, reply: &Reply) -> Option<Cause> {
        let Escalation { on_schema, on_refusal, on_verdict, logprob_min, .. } = self.policy.escalation;
        if on_schema && !form::has_form(&reply.text, call.sampling.response_format.as_ref()) {
            return Some(Cause::Schema);
        }
        match call.judge.0.filter(|_| on_verdict).map(|judge| judge(reply)) {
            Some(Verdict::Bad) => return Some(Cause::Bad),
            Some(Verdict::Doubtful) => return Some(Cause::Doubtful),
            Some(Verdict::Good) | None => {}
        }
        if on_refusal && refuses(reply) {
            return Some(Cause::Refusal);
        }
        // A server that tells none is not thought unsure.
        reply.logprob.zip(logprob_min).filter(|(logprob, least)| logprob < least).map(|_| Cause::Unsure)
    }

    /// Whether the next tier may answer what this one failed at.
    fn escalates(&self, error: &CallError) -> bool {
        let Escalation { on_refusal, on_outage, .. } = self.policy.escalation;
        (on_refusal && error.code == "model_refused") || (on_outage && error.may_fall_back())
    }

    async fn cascade(&self, call: &Call<'_>, listener: &dyn Listener) -> Result<Reply, CallError> {
        let picked = self.pick(call);
        let last = self.tiers.len().saturating_sub(1);
        // What could go out, and what the last tier came to that was asked.
        let (mut stands, mut ended) = (None, None);
        // The first tier that could not be reached, and why.
        let mut unreached = None;
        for (place, tier) in (0..).zip(&self.tiers[picked.min(last)..]) {
            let is_last = picked + usize::try_from(place).unwrap_or(usize::MAX) >= last;
            let better = match (&stands, call.deadline) {
                (Some(_), Some(deadline)) => match time_for_better(deadline) {
                    None => break,
                    times => times,
                },
                _ => None,
            };
            listener.tier(place, &tier.name);
            let asked = Call {
                // A name that means a tier has done its part, and one that does not is the first one's.
                model: call.model.clone().filter(|name| place == 0 && self.named(Some(name)).is_none()),
                logprobs: self.policy.escalation.logprob_min.is_some(),
                deadline: better.map(|(until, _)| until).or(call.deadline),
                route: Route::default(),
                ..call.clone()
            };
            let stand_ins = stands.is_none() && (is_last || !self.policy.escalation.on_outage);
            let model = if stand_ins { &tier.model } else { &tier.alone };
            let replied = match better {
                None => model.complete(&asked, listener).await,
                // Later than the tries themselves give up, so that they end with their own error where they can, and what
                // was paid for is written down and counted.
                Some((_, given_up_at)) => {
                    match timeout_at(given_up_at, model.complete(&asked, listener)).await {
                        Ok(replied) => replied,
                        Err(_) => break,
                    }
                }
            };
            let answered = || Answered { tier: tier.name.clone(), provider: model.provider() };
            let named = |reply: Reply| {
                let answered = reply.fallback.is_none().then(answered);
                Reply { answered, ..reply }
            };
            match replied.map(named).map_err(|error| error.with_partial(named)) {
                Ok(reply) => {
                    let Some(cause) = self.fault(call, &reply) else { return Ok(reply) };
                    debug!(tier = tier.name, ?cause, is_last, "an answer of a tier is not good enough");
                    if !cause.is_hard() {
                        stands = Some(reply);
                    } else {
                        ended = Some(Ok(reply));
                    }
                }
                Err(error) => {
                    let goes_on = self.escalates(&error);
                    if goes_on && error.may_fall_back() && unreached.is_none() {
                        unreached = Some((tier, error.copy()));
                    }
                    ended = Some(Err(error));
                    if !goes_on {
                        break;
                    }
                }
            }
        }
        if stands.is_none()
            && let (Some(Err(error)), Some((tier, why))) = (&ended, unreached)
            && error.class == Class::Rejected
        {
            return instead_of(tier, why, call, listener).await;
        }
        let nobody = || CallError::new(Class::Closed, "model_unavailable", "there is no tier");
        stands.map(Ok).or(ended).unwrap_or_else(|| Err(nobody()))
    }
}

/// Who stands in for a tier that could not be reached, where a better one would not answer; else why it could not be: another
/// time it may answer.
async fn instead_of(
    tier: &Tier,
    why: CallError,
    call: &Call<'_>,
    listener: &dyn Listener,
) -> Result<Reply, CallError> {
    let Some(stand_ins) = &tier.stand_ins else { return Err(why) };
    let asked = Call { route: Route::default(), ..call.clone() };
    let replied = stand_ins.complete(&asked, listener).await;
    // What somebody has begun to read is the end, whoever wrote it.
    replied.map_err(|error| if error.class == Class::Cut { error } else { why })
}

/// Until when a better tier may take, where an answer stands, and when it is given up with all that is written of it; nothing
/// where it is too late to ask.
fn time_for_better(deadline: Instant) -> Option<(Instant, Instant)> {
    let left = deadline.saturating_duration_since(Instant::now());
    let kept = (left / 10).clamp(LEFT_MIN, LEFT_MAX);
    (left > kept * 2).then(|| (deadline - kept, deadline - kept / 2))
}

/// Whether an answer is none.
fn refuses(reply: &Reply) -> bool {
    let begins: String = reply.text.chars().take(REFUSAL_CHARS_MAX).collect();
    let begins = begins.to_lowercase().replace('’', "'");
    reply.finish_reason.as_deref() == Some("content_filter")
        || REFUSALS.iter().any(|refusal| begins.contains(refusal))
}

impl Model for Tiers {
    fn provider(&self) -> &'static str {
        self.tiers.first().map_or("tiers", |tier| tier.model.provider())
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn reads_messages(&self) -> bool {
        self.tiers.iter().any(|tier| tier.model.reads_messages())
    }

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(self.cascade(call, listener))
    }
}
