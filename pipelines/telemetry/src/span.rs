//! One hop of a record as a span of its trace, and each try of a model call within it.
//!
//! Invariant: a trace is never cut here. Where tracing is off, the `traceparent` that came goes on as it came, and
//! nothing is allocated for it; where it is on, what goes on names this hop, with the sampling decision of the root.

use crate::{Outcome, words::short};
use axum::http::Uri;
use forebay_operator::Called;
use opentelemetry::{
    Context, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
        TraceState,
    },
};
use opentelemetry_sdk::trace::{SdkTracer, Span};
use std::{
    fmt,
    time::{Duration, UNIX_EPOCH},
};

/// A `traceparent` of W3C's version 00: `00-{32 digits}-{16 digits}-{2 digits}`.
const TRACEPARENT_BYTES: usize = 55;
/// Later versions may be longer; beyond this it is not one that anybody writes, and goes no further.
const TRACEPARENT_BYTES_MAX: usize = 64;

/// Where a record lies.
pub(crate) struct Place<'a> {
    pub(crate) topic: &'a str,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) group: Option<&'a str>,
}

/// One hop of a record. Dropped without [`end`](Self::end), it ends without an outcome.
pub struct StepSpan(Inner);

enum Inner {
    Untraced(Option<Carried>),
    /// Boxed, for it is large and lives in the future of every record in flight.
    Traced(Box<Span>),
}

/// A short text without an allocation.
struct Carried {
    bytes: [u8; TRACEPARENT_BYTES_MAX],
    length: usize,
}

impl Carried {
    fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; TRACEPARENT_BYTES_MAX];
        bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(Self { bytes, length: text.len() })
    }

    fn text(&self) -> Option<&str> {
        std::str::from_utf8(self.bytes.get(..self.length)?).ok()
    }
}

impl StepSpan {
    pub(crate) fn untraced(parent: Option<&str>) -> Self {
        Self(Inner::Untraced(parent.and_then(Carried::new)))
    }

    pub(crate) fn start(
        tracer: &SdkTracer,
        parent: Option<&str>,
        labels: &[KeyValue; 2],
        place: &Place<'_>,
    ) -> Self {
        // Not the context of the thread: what ran on it before is no ancestor of this record.
        let context = match parent.and_then(parse) {
            Some(parent) => Context::new().with_remote_span_context(parent),
            None => Context::new(),
        };
        let mut attributes = Vec::with_capacity(9);
        attributes.extend(labels.iter().cloned());
        attributes.extend([
            KeyValue::new("messaging.system", "kafka"),
            KeyValue::new("messaging.operation.name", "process"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.destination.name", place.topic.to_owned()),
            KeyValue::new("messaging.destination.partition.id", place.partition.to_string()),
            KeyValue::new("messaging.kafka.offset", place.offset),
        ]);
        if let Some(group) = place.group {
            attributes.push(KeyValue::new("messaging.consumer.group.name", group.to_owned()));
        }
        let builder = SpanBuilder::from_name(format!("process {}", place.topic));
        let builder = builder.with_kind(SpanKind::Consumer).with_attributes(attributes);
        Self(Inner::Traced(Box::new(builder.start_with_context(tracer, &context))))
    }

    /// What the headers of the outputs carry on.
    pub fn traceparent(&self) -> Option<String> {
        match &self.0 {
            Inner::Untraced(parent) => parent.as_ref()?.text().map(str::to_owned),
            Inner::Traced(span) => {
                let context = span.span_context();
                // After the shutdown there are no ids to hand on.
                context.is_valid().then(|| {
                    let flags = context.trace_flags() & TraceFlags::SAMPLED;
                    format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), flags)
                })
            }
        }
    }

    /// The hop is over.
    pub fn end(self, outcome: Outcome) {
        let Inner::Traced(mut span) = self.0 else { return };
        span.set_attribute(KeyValue::new("outcome", outcome.as_str()));
        if outcome.is_error() {
            span.set_attribute(KeyValue::new("error.type", outcome.as_str()));
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

impl fmt::Debug for StepSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StepSpan").field(&self.traceparent()).finish()
    }
}

/// A try of a model call that is over, within its hop. Its attributes are those of the conventions for generative AI.
pub(crate) fn call(tracer: &SdkTracer, called: &Called) {
    let Some(parent) = called.traceparent.as_deref().and_then(parse) else { return };
    // Clients may name it.
    let model = short(&called.model);
    let mut attributes = vec![
        KeyValue::new("gen_ai.operation.name", called.operation.as_str()),
        KeyValue::new("gen_ai.provider.name", called.provider.clone()),
        KeyValue::new("gen_ai.request.model", model.to_owned()),
    ];
    let mut add = |name: &'static str, value: Option<opentelemetry::Value>| {
        attributes.extend(value.map(|value| KeyValue::new(name, value)));
    };
    add("gen_ai.response.model", called.response_model.clone().map(Into::into));
    add("gen_ai.usage.input_tokens", called.input_tokens.map(Into::into));
    add("gen_ai.usage.output_tokens", called.output_tokens.map(Into::into));
    let ttft_s = called.ttft_us.map(|us| micros(us).as_secs_f64());
    add("gen_ai.response.time_to_first_chunk", ttft_s.map(Into::into));
    let server: Option<Uri> = called.endpoint.as_deref().and_then(|endpoint| endpoint.parse().ok());
    add("server.address", server.as_ref().and_then(Uri::host).map(|host| host.to_owned().into()));
    add("server.port", server.as_ref().and_then(Uri::port_u16).map(|port| i64::from(port).into()));
    add("error.type", called.error.map(Into::into));
    let started = UNIX_EPOCH + micros(called.started_at_us);
    let builder = SpanBuilder::from_name(format!("{} {model}", called.operation.as_str()))
        .with_kind(SpanKind::Client)
        .with_start_time(started)
        .with_attributes(attributes);
    let context = Context::new().with_remote_span_context(parent);
    let mut span = builder.start_with_context(tracer, &context);
    if called.error.is_some() {
        span.set_status(Status::error(""));
    }
    span.end_with_timestamp(started + micros(called.duration_us));
}

fn micros(us: i64) -> Duration {
    Duration::from_micros(u64::try_from(us).unwrap_or(0))
}

/// The context that a `traceparent` names; `None` where it names none, and a new trace begins, as W3C demands.
fn parse(traceparent: &str) -> Option<SpanContext> {
    let (known, later) = traceparent.split_at_checked(TRACEPARENT_BYTES)?;
    let mut fields = known.split('-');
    let mut field = |digits: usize| {
        let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        fields.next().filter(|field| field.len() == digits && field.bytes().all(lower_hex))
    };
    let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
    let readable = match version {
        "00" => later.is_empty(),
        "ff" => false,
        // Fields that a later version adds are not ours to read.
        _ => later.is_empty() || later.starts_with('-'),
    };
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::NONE);
    (readable && context.is_valid()).then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_traceparent_is_read_as_w3c_says() {
        let context = parse(PARENT).unwrap();
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span_id().to_string(), "00f067aa0ba902b7");
        assert!(context.is_sampled() && context.is_remote());
        assert!(!parse(&PARENT.replace("-01", "-00")).unwrap().is_sampled());
        assert!(parse(&PARENT.replace("00-4", "01-4")).is_some());
        assert!(parse(&format!("{}-more", PARENT.replace("00-4", "01-4"))).is_some());
    }

    #[test]
    fn what_is_no_traceparent_begins_a_new_trace() {
        for not in [
            "".to_owned(),
            "00".to_owned(),
            PARENT.to_uppercase(),
            PARENT.replace("00-4", "ff-4"),
            PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            PARENT.replace("00f067aa0ba902b7", &"0".repeat(16)),
            PARENT.replace("00f067aa0ba902b7", "+0f067aa0ba902b7"),
            format!("{PARENT}-more"),
            format!("{}é", &PARENT[..54]),
            PARENT.replace('-', "_"),
        ] {
            assert!(parse(&not).is_none(), "{not}");
        }
    }

    #[test]
    fn untraced_hands_on_what_came() {
        for came in [PARENT, "cc-something-of-a-later-version", ""] {
            assert_eq!(StepSpan::untraced(Some(came)).traceparent().as_deref(), Some(came));
        }
        assert_eq!(StepSpan::untraced(None).traceparent(), None);
        assert_eq!(StepSpan::untraced(Some(&"x".repeat(65))).traceparent(), None);
    }
}
