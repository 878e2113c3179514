//! The samples of version 0.1: every field filled with a telling value, and the short forms that people type.

use crate::{Sample, headers, older, tombstone, typed, written};
use forebay_schemas::*;
use serde_json::{Map, Value, json};

pub fn samples() -> Vec<Sample> {
    vec![
        written("request.json", request()),
        typed(
            "request-minimal.json",
            "{\"prompt\": \"What is a dead letter?\"}\n",
            prompt("What is a dead letter?"),
        ),
        written(
            "request-of-a-job.json",
            Request {
                tenant: Some(tenant("shop")),
                key_id: Some(KeyId::try_from("k-7".to_owned()).unwrap()),
                job: Some(JobId::try_from("catalogue-2026-11".to_owned()).unwrap()),
                ..prompt("Describe it.")
            },
        ),
        typed("request-openai.json", OPENAI, openai()),
        typed("request-byte-order-mark.json", "\u{feff}{\"prompt\": \"Häh?\"}\r\n", prompt("Häh?")),
        written(
            "grounded.json",
            Grounded { request: request(), retrieval: RETRIEVAL, passages: vec![passage()] },
        ),
        written(
            "grounded-reranked.json",
            Grounded {
                request: request(),
                retrieval: Retrieval {
                    rerank: Some(Rerank { candidates: 32, scored: Some(KEY.to_owned()) }),
                    ..RETRIEVAL
                },
                passages: vec![passage()],
            },
        ),
        written(
            "grounded-embedded.json",
            Grounded {
                request: request(),
                retrieval: Retrieval { embed: Some(Embed { question: Some(embedding()) }), ..RETRIEVAL },
                passages: vec![passage()],
            },
        ),
        written("completion.json", completion()),
        written("ending.json", ending()),
        written("ending-unreadable.json", unreadable()),
        written("answer.json", answer()),
        written("answer-empty.json", empty_answer()),
        written(
            "delta.json",
            Delta {
                id: "order-17".into(),
                tenant: tenant("shop"),
                attempt: 1,
                seq: 42,
                text: " three days".into(),
            },
        ),
        written("cancel.json", Cancel { id: id("order-17"), tenant: tenant("shop") }),
        typed(
            "cancel-minimal.json",
            "{\"id\": \"order-17\"}\n",
            Cancel { id: id("order-17"), tenant: Tenant::default() },
        ),
        written("document.json", document(tenant("shop"), Format::Markdown, TEXT)),
        typed(
            "document-minimal.json",
            "{\"id\": \"returns.md\", \"text\": \"Within three days.\"}\n",
            document(Tenant::default(), Format::Text, "Within three days."),
        ),
        tombstone(
            "document-tombstone.json",
            "returns.md",
            Document { id: "returns.md".into(), tenant: Tenant::default(), format: Format::Text, text: None },
        ),
        written("chunks.json", chunks()),
        written("chunks-embedded.json", embedded_chunks()),
        tombstone(
            "chunks-tombstone.json",
            "returns.md",
            Chunks { document: "returns.md".into(), content: None },
        ),
        written("cache-entry.json", cache_entry()),
        tombstone("cache-entry-tombstone.json", KEY, CacheEntry { key: KEY.into(), content: None }),
        written("dead-letter.json", dead_letter()),
        written("outcome.avro", outcome()),
        written("outcome-nulls.avro", outcome_of_nothing()),
        older("outcome-44-columns.avro", outcome_of_44_columns()),
        older("outcome-nulls-44-columns.avro", outcome_of_nothing()),
        older("outcome-without-tier.avro", Outcome { tier: None, ..outcome_of_44_columns() }),
        older("outcome-nulls-without-tier.avro", outcome_of_nothing()),
        written("ledger-entry.json", ledger_entry()),
        older(
            "ledger-entry-19-columns.json",
            LedgerEntry { row: Some(attempt_of_19_columns()), ..ledger_entry() },
        ),
        older(
            "ledger-entry-23-columns.json",
            LedgerEntry { row: Some(attempt_of_23_columns()), ..ledger_entry() },
        ),
        older(
            "ledger-entry-25-columns.json",
            LedgerEntry { row: Some(attempt_of_25_columns()), ..ledger_entry() },
        ),
        written(
            "ledger-entry-lease.json",
            LedgerEntry::of_lease(EntryKind::Renewed, "0123456789abcdef", 1_795_500_000_000),
        ),
        written("attempt.avro", attempt()),
        written("attempt-nulls.avro", attempt_of_nothing()),
        older("attempt-19-columns.avro", attempt_of_19_columns()),
        older("attempt-nulls-19-columns.avro", attempt_of_nothing()),
        older("attempt-23-columns.avro", attempt_of_23_columns()),
        older("attempt-25-columns.avro", attempt_of_25_columns()),
        older("attempt-nulls-25-columns.avro", attempt_of_nothing()),
        older("attempt-nulls-23-columns.avro", attempt_of_nothing()),
        written("audit.json", audit()),
        typed("audit-minimal.json", AUDIT, audit_of_little()),
        written("label.json", label()),
        typed("label-minimal.json", "{\"request_id\": \"order-17\", \"wrong\": true}\n", label_of_little()),
        written("payload.json", payload()),
        typed(
            "payload-minimal.json",
            "{\"request_id\": \"order-17\", \"prompt\": \"Häh?\"}\n",
            payload_of_little(),
        ),
        written("alert.json", alert()),
        written("alert-of-all.json", alert_of_all()),
        headers("envelope.headers.json", envelope()),
    ]
}

const TEXT: &str = "# Returns\n\nSend it back within three days – unopened.\n";
const QUOTE: &str = "Send it back within three days – unopened.";
const KEY: &str = "9f2c0a4be1d75a3388f6c1d2e4b7a690";
const RETRIEVAL: Retrieval = Retrieval { limit: 8, tokens_max: 2048, rerank: None, embed: None };

const OPENAI: &str = r#"{"model": "gpt-5-mini", "messages": [
  {"role": "system", "content": "Answer in one sentence."},
  {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": "{}"}}]},
  {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
  {"role": "user", "content": [{"type": "text", "text": "When may I return it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]}],
 "max_completion_tokens": 64, "stop": ["\n"], "user": "u-9"}
"#;

fn id(text: &str) -> RequestId {
    RequestId::try_from(text.to_owned()).unwrap()
}

fn tenant(text: &str) -> Tenant {
    Tenant::try_from(text.to_owned()).unwrap()
}

fn object(value: Value) -> Map<String, Value> {
    serde_json::from_value(value).unwrap()
}

fn prompt(text: &str) -> Request {
    Request { prompt: Some(text.to_owned()), ..Request::default() }
}

fn request() -> Request {
    Request {
        id: Some(id("order-17")),
        tenant: Some(tenant("shop")),
        key_id: None,
        job: None,
        prompt: Some("When may I return “it”?".into()),
        messages: None,
        model: Some("gpt-5-mini".into()),
        conversation: Some("c-3".into()),
        deadline_ms: Some(30_000),
        metadata: Some(json!({"big": u64::MAX, "exact": 0.300_000_000_000_000_04_f64, "whole": 1.0})),
        stream: true,
        cache: Some(CacheControl { no_cache: true, no_store: true, max_age_s: Some(3600) }),
        sampling: Sampling {
            temperature: Some(0.7),
            top_p: Some(0.95),
            max_tokens: Some(256),
            max_completion_tokens: Some(512),
            stop: Some(json!(["\n\n"])),
            seed: Some(-7),
            frequency_penalty: Some(-0.5),
            presence_penalty: Some(0.5),
            response_format: Some(json!({"type": "json_object"})),
            tools: Some(json!([{"type": "function"}])),
            tool_choice: Some(json!("auto")),
        },
        unknown: object(json!({"x_team": null})),
    }
}

fn openai() -> Request {
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "find", "arguments": "{}"}});
    let turn = |role, content, rest| Message { role, content, rest: object(rest) };
    let text = |text: &str| Some(Content::Text(text.to_owned()));
    let parts = vec![
        json!({"type": "text", "text": "When may I return it?"}),
        json!({"type": "image_url", "image_url": {"url": "data:,"}}),
    ];
    Request {
        model: Some("gpt-5-mini".into()),
        messages: Some(vec![
            turn(Role::System, text("Answer in one sentence."), json!({})),
            turn(Role::Assistant, None, json!({"tool_calls": [call]})),
            turn(Role::Tool, text("nothing"), json!({"tool_call_id": "call_1"})),
            turn(Role::User, Some(Content::Parts(parts)), json!({})),
        ]),
        sampling: Sampling {
            max_completion_tokens: Some(64),
            stop: Some(json!(["\n"])),
            ..Sampling::default()
        },
        unknown: object(json!({"user": "u-9"})),
        ..Request::default()
    }
}

fn passage() -> Passage {
    Passage {
        document: "returns.md".into(),
        version: DocumentVersion::of(TEXT),
        chunk: chunk().id,
        start: 11,
        end: 55,
        heading: vec!["Returns".into()],
        text: QUOTE.into(),
        score: 0.031_25,
    }
}

fn chunk() -> Chunk {
    Chunk {
        id: format!("returns.md:{}:0123456789abcdef", DocumentVersion::of(TEXT)),
        start: 11,
        end: 55,
        heading: vec!["Returns".into()],
        text: QUOTE.into(),
        embedding: None,
    }
}

fn embedding() -> Embedding {
    Embedding::new("small-embedder", vec![0.5, -0.031_25, 1.0e-7]).unwrap()
}

fn embedded_chunks() -> Chunks {
    let chunk = Chunk { embedding: Some(embedding()), ..chunk() };
    let split = Split { tenant: tenant("shop"), version: DocumentVersion::of(TEXT), chunks: vec![chunk] };
    Chunks { document: "returns.md".into(), content: Some(split) }
}

fn chunks() -> Chunks {
    let split = Split { tenant: tenant("shop"), version: DocumentVersion::of(TEXT), chunks: vec![chunk()] };
    Chunks { document: "returns.md".into(), content: Some(split) }
}

fn document(tenant: Tenant, format: Format, text: &str) -> Document {
    Document { id: "returns.md".into(), tenant, format, text: Some(text.to_owned()) }
}

fn citation() -> Citation {
    Citation {
        document: "returns.md".into(),
        version: DocumentVersion::of(TEXT),
        start: 11,
        end: 55,
        quote: QUOTE.into(),
    }
}

const USAGE: Usage = Usage {
    prompt_tokens: 120,
    completion_tokens: 9,
    total_tokens: 129,
    cached_tokens: None,
    cached_write_tokens: None,
    reasoning_tokens: None,
};

fn generated() -> Generated {
    Generated {
        text: "Within three days.".into(),
        citations: vec![citation()],
        model: "gpt-5-mini-2025-08-07".into(),
        provider: "openai_compatible".into(),
        usage: Some(USAGE),
        cost_nano_usd: Some(NanoUsd(48_000)),
        finish_reason: Some("stop".into()),
        ttft_us: Some(81_250),
        is_fallback: false,
        tier: None,
    }
}

fn completion() -> Completion {
    Completion {
        request: request(),
        retrieval: Some(RETRIEVAL),
        passages: vec![passage()],
        cache: CacheStatus::Miss,
        answer: generated(),
    }
}

fn ending() -> Ending {
    Ending {
        status: Status::Blocked,
        stage: "validate".into(),
        request: Some(request()),
        retrieval: Some(RETRIEVAL),
        chunks: vec![chunk().id],
        cache: CacheStatus::Hit,
        answer: Some(generated()),
        verdict: Some(Verdict {
            judgement: Judgement::Block,
            findings: vec![Finding {
                code: "citation_missing".into(),
                message: "returns.md has no such bytes".into(),
            }],
        }),
        error: Some(Fault {
            code: "citation_missing".into(),
            message: "returns.md has no such bytes".into(),
        }),
    }
}

fn unreadable() -> Ending {
    let error =
        Fault { code: "undecodable".into(), message: "could not read a Request: expected value".into() };
    Ending::without_answer(Status::Failed, "look_up", None, error)
}

fn answer() -> Answer {
    Answer {
        id: id("order-17"),
        tenant: tenant("shop"),
        status: Status::Answered,
        text: Some("Within three days.".into()),
        citations: vec![citation()],
        cache: CacheStatus::Miss,
        model: Some("gpt-5-mini-2025-08-07".into()),
        usage: Some(USAGE),
        cost_nano_usd: Some(NanoUsd(48_000)),
        error: Some(Fault { code: "annotated".into(), message: "for the sample only".into() }),
        origin: Some(origin()),
        metadata: request().metadata,
        timings_us: TimingsUs {
            queue: Some(1),
            cache: Some(2),
            retrieve: Some(3),
            infer: Some(4),
            ttft: Some(5),
            validate: Some(6),
            total: Some(21_000),
        },
        generation: 1,
    }
}

fn empty_answer() -> Answer {
    Answer {
        id: id("order-17"),
        tenant: Tenant::default(),
        status: Status::Expired,
        text: None,
        citations: Vec::new(),
        cache: CacheStatus::Bypass,
        model: None,
        usage: None,
        cost_nano_usd: None,
        error: None,
        origin: None,
        metadata: None,
        timings_us: TimingsUs::default(),
        generation: 0,
    }
}

fn cache_entry() -> CacheEntry {
    let kept = Kept {
        answer: generated(),
        retrieval: Some(RETRIEVAL),
        chunks: vec![chunk().id],
        made_at_ms: 1_795_500_000_123,
    };
    CacheEntry { key: KEY.into(), content: Some(kept) }
}

fn dead_letter() -> DeadLetter {
    DeadLetter {
        schema: "Grounded".into(),
        id: id("order-17"),
        tenant: tenant("shop"),
        generation: 1,
        stage: "infer".into(),
        pipeline: "answer".into(),
        topic: "prompts".into(),
        partition: 3,
        offset: 4_294_967_296,
        timestamp_ms: 1_795_500_000_123,
        class: "unavailable".into(),
        code: "model_unavailable".into(),
        message: "could not reach 127.0.0.1:8000".into(),
        attempts: 4,
        since_ms: 1_795_500_000_200,
        call_id: "00112233445566778899aabbccddeeff".into(),
        deadline_at_ms: Some(1_795_500_030_000),
        paid_nano_usd: NanoUsd(48_000),
        redrives: 1,
        body: None,
    }
}

fn origin() -> Origin {
    Origin { topic: "requests".into(), partition: 3, offset: 4_294_967_296, key: Some("customer-5".into()) }
}

fn envelope() -> Envelope {
    Envelope {
        id: id("order-17"),
        tenant: tenant("shop"),
        lane: Lane::Backfill,
        deadline_at_ms: Some(1_795_500_030_000),
        origin: origin(),
        accepted_at_ms: 1_795_500_000_000,
        generation: 1,
        again: 0,
        visit: 2,
        timings: Timings { queue: 1, cache: Some(2), retrieve: Some(3), infer: Some(4), validate: Some(5) },
        spend: NanoUsd(48_000),
        attempts: 3,
        stream: true,
        payload: Some("9ae0c2d3f1b4a586".into()),
        traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        client: vec![("x-shop".into(), Some("ü".into())), ("x-null".into(), None)],
    }
}

fn outcome() -> Outcome {
    Outcome {
        request_id: "order-17".into(),
        tenant: "shop".into(),
        generation: 1,
        trace_id: Some("4bf92f3577b34da6a3ce929d0e0e4736".into()),
        conversation: Some("c-3".into()),
        lane: "backfill".into(),
        date: "2026-11-24".into(),
        accepted_at: 1_795_500_000_000_000,
        ended_at: 1_795_500_021_000_000,
        origin_topic: "requests".into(),
        origin_partition: 3,
        origin_offset: 4_294_967_296,
        model_requested: Some("gpt-5-mini".into()),
        model_served: Some("gpt-5-mini-2025-08-07".into()),
        provider: Some("openai_compatible".into()),
        input_tokens: Some(120),
        cached_read_tokens: Some(64),
        cached_write_tokens: Some(32),
        output_tokens: Some(9),
        reasoning_tokens: Some(5),
        billed_nano_usd: Some(48_000),
        list_nano_usd: Some(96_000),
        saved_by_cache_nano_usd: Some(48_001),
        gpu_us: Some(7),
        queue_us: 1,
        cache_us: Some(2),
        retrieve_us: Some(3),
        infer_us: Some(4),
        validate_us: Some(5),
        ttft_us: Some(6),
        total_us: 21_000_000,
        status: "answered".into(),
        stage: "validate".into(),
        finish_reason: Some("stop".into()),
        cache_status: "miss".into(),
        verdict: Some("annotate".into()),
        findings: Some("citation_missing".into()),
        error_code: Some("none".into()),
        attempts: 3,
        passages: 8,
        citations: 1,
        prompt_hash: Some("9f2c0a4be1d75a33".into()),
        metadata: Some(r#"{"team":"ü"}"#.into()),
        tier: Some("gpt-5-mini".into()),
        key_id: Some("key-7".into()),
        job: Some("nightly".into()),
    }
}

fn outcome_of_44_columns() -> Outcome {
    Outcome { key_id: None, job: None, ..outcome() }
}

fn outcome_of_nothing() -> Outcome {
    Outcome {
        request_id: "order-17".into(),
        tenant: "default".into(),
        generation: 0,
        trace_id: None,
        conversation: None,
        lane: "interactive".into(),
        date: "1970-01-01".into(),
        accepted_at: 0,
        ended_at: 0,
        origin_topic: String::new(),
        origin_partition: i32::MIN,
        origin_offset: i64::MAX,
        model_requested: None,
        model_served: None,
        provider: None,
        input_tokens: None,
        cached_read_tokens: None,
        cached_write_tokens: None,
        output_tokens: None,
        reasoning_tokens: None,
        billed_nano_usd: None,
        list_nano_usd: None,
        saved_by_cache_nano_usd: None,
        gpu_us: None,
        queue_us: 0,
        cache_us: None,
        retrieve_us: None,
        infer_us: None,
        validate_us: None,
        ttft_us: None,
        total_us: 0,
        status: "failed".into(),
        stage: "look_up".into(),
        finish_reason: None,
        cache_status: "bypass".into(),
        verdict: None,
        findings: None,
        error_code: None,
        attempts: 0,
        passages: 0,
        citations: 0,
        prompt_hash: None,
        metadata: None,
        tier: None,
        key_id: None,
        job: None,
    }
}

const AUDIT: &str = r#"{"request_id": "order-17", "judge": "rules", "judge_version": "1", "flagged": false}"#;

fn audit() -> Audit {
    Audit {
        request_id: id("order-17"),
        tenant: tenant("shop"),
        generation: 1,
        judge: "gpt-5".into(),
        judge_version: "2026-11-01".into(),
        flagged: true,
        score: Some(0.75),
        quality: Some(0.25),
        inclusion_probability: Some(0.125),
        stratum: Some("gpt-5-mini/miss".into()),
        detail: Some("no passage says three days".into()),
        audited_at: Some(1_795_500_000_000_000),
    }
}

fn audit_of_little() -> Audit {
    Audit {
        tenant: Tenant::default(),
        generation: 0,
        judge: "rules".into(),
        judge_version: "1".into(),
        flagged: false,
        score: None,
        quality: None,
        inclusion_probability: None,
        stratum: None,
        detail: None,
        audited_at: None,
        ..audit()
    }
}

fn label() -> Label {
    Label {
        request_id: id("order-17"),
        tenant: tenant("shop"),
        generation: 1,
        wrong: true,
        quality: Some(0.5),
        labeller: Some("ada".into()),
        inclusion_probability: Some(0.25),
        note: Some("it is five days".into()),
        labelled_at: Some(1_795_500_000_000_000),
    }
}

fn label_of_little() -> Label {
    Label {
        tenant: Tenant::default(),
        generation: 0,
        quality: None,
        labeller: None,
        inclusion_probability: None,
        note: None,
        labelled_at: None,
        ..label()
    }
}

fn alert() -> Alert {
    Alert {
        id: "0f0e0d0c0b0a09080706050403020100".into(),
        state: AlertState::Firing,
        kind: AlertKind::Forecast,
        holder: "job".into(),
        tenant: Some(tenant("shop")),
        name: Some("nightly".into()),
        budget: "20 USD/day".into(),
        unit: "nano-USD".into(),
        seen_at: 1_795_500_060_000_000,
        began_at: 1_795_500_060_000_000,
        spent: 40_000_000,
        pace: 25_000_000,
        used: 9_000_000_000,
        held: 12_000_000,
        limit: 20_000_000_000,
        value: 31_500_000_000,
        threshold: 20_000_000_000,
        reached_at: Some(1_795_526_400_000_000),
        message: "job \"nightly\" of tenant \"shop\" will have used up its budget".into(),
    }
}

fn alert_of_all() -> Alert {
    let (holder, unit, kind) = ("all".into(), "tokens".into(), AlertKind::Cap);
    let alert = Alert { holder, unit, kind, tenant: None, name: None, reached_at: None, ..alert() };
    Alert { state: AlertState::Resolved, seen_at: 1_795_500_240_000_000, ..alert }
}

fn payload() -> Payload {
    Payload {
        request_id: id("order-17"),
        tenant: tenant("shop"),
        generation: 1,
        prompt: "When may I return it?".into(),
        answer: Some("Within three days.".into()),
        passages: Some(r#"["Send it back within three days – unopened."]"#.into()),
        model: Some("gpt-5-mini".into()),
        ended_at: Some(1_795_500_000_000_000),
    }
}

fn payload_of_little() -> Payload {
    Payload {
        tenant: Tenant::default(),
        generation: 0,
        prompt: "Häh?".into(),
        answer: None,
        passages: None,
        model: None,
        ended_at: None,
        ..payload()
    }
}

fn ledger_entry() -> LedgerEntry {
    LedgerEntry {
        call_id: CallId::read("00112233445566778899aabbccddeeff"),
        attempt: Some(2),
        source_offset: Some(17),
        input: Some("0123456789abcdef".into()),
        config: Some("fedcba9876543210".into()),
        answer: Some(json!({"text": "Within three days.", "model": "small"})),
        code: Some("answer_too_large".into()),
        to: Some("retry.infer.10s".into()),
        row: Some(attempt()),
        ..LedgerEntry::of_lease(EntryKind::Done, "0123456789abcdef", 1_795_500_000_000)
    }
}

fn attempt() -> Attempt {
    Attempt {
        attempt_id: "0011223344556677/2".into(),
        call_id: "0011223344556677".into(),
        request_id: "order-17".into(),
        tenant: "shop".into(),
        generation: 1,
        stage: "infer".into(),
        attempt: 2,
        started_at: 1_795_500_000_000_000,
        duration_us: 812_345,
        ttft_us: Some(81_250),
        provider: "openai_compatible".into(),
        endpoint: Some("http://127.0.0.1:8000".into()),
        model: Some("gpt-5-mini".into()),
        status: "rejected".into(),
        error_code: Some("model_rejected".into()),
        http_status: Some(400),
        input_tokens: Some(120),
        output_tokens: Some(9),
        cost_nano_usd: Some(48_000),
        tier: Some("gpt-5-mini".into()),
        cached_read_tokens: Some(64),
        cached_write_tokens: Some(32),
        reasoning_tokens: Some(5),
        key_id: Some("key-7".into()),
        job: Some("nightly".into()),
        operation: Some("chat".into()),
    }
}

fn attempt_of_25_columns() -> Attempt {
    Attempt { operation: None, ..attempt() }
}

fn attempt_of_23_columns() -> Attempt {
    Attempt { key_id: None, job: None, ..attempt_of_25_columns() }
}

fn attempt_of_19_columns() -> Attempt {
    Attempt {
        tier: None,
        cached_read_tokens: None,
        cached_write_tokens: None,
        reasoning_tokens: None,
        ..attempt_of_23_columns()
    }
}

fn attempt_of_nothing() -> Attempt {
    Attempt {
        ttft_us: None,
        provider: "extractive".into(),
        endpoint: None,
        model: None,
        status: "ok".into(),
        error_code: None,
        http_status: None,
        input_tokens: None,
        output_tokens: None,
        cost_nano_usd: None,
        ..attempt_of_19_columns()
    }
}
