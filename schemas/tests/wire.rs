//! What is written is read again as the same value, and what is not a record is refused with a reason.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "what goes wrong fails the test")]

use forebay_schemas::*;
use proptest::{collection::vec, option, prelude::*};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, error::Error as _, fmt::Debug};

fn again<R: Record>(record: &R) -> R {
    R::decode(&record.encode().unwrap().unwrap()).unwrap()
}

fn refusal<R: Record + Debug>(body: impl AsRef<[u8]>) -> String {
    let error = R::decode(body.as_ref()).expect_err("it was to be refused");
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

mod any_record {
    use super::*;

    /// Any text, control characters and all.
    fn text() -> impl Strategy<Value = String> {
        vec(any::<char>(), 0..12).prop_map(String::from_iter)
    }

    fn finite() -> impl Strategy<Value = f64> {
        any::<f64>().prop_filter("JSON has no other", |number| number.is_finite())
    }

    pub fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            finite().prop_map(Value::from),
            text().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 16, 4, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Value::from),
                vec((text(), inner), 0..4).prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    fn fields() -> impl Strategy<Value = Map<String, Value>> {
        // No name of a field of ours starts so.
        vec((text().prop_map(|name| format!("x_{name}")), json()), 0..3).prop_map(Map::from_iter)
    }

    pub fn id() -> impl Strategy<Value = RequestId> {
        text().prop_map(|text| RequestId::try_from(text + "1").unwrap())
    }

    pub fn tenant() -> impl Strategy<Value = Tenant> {
        text().prop_map(|text| Tenant::try_from(text + "1").unwrap())
    }

    fn role() -> impl Strategy<Value = Role> {
        prop::sample::select(vec![Role::System, Role::Developer, Role::User, Role::Assistant, Role::Tool])
    }

    fn message() -> impl Strategy<Value = Message> {
        let content = prop_oneof![text().prop_map(Content::Text), vec(json(), 0..3).prop_map(Content::Parts)];
        (role(), option::of(content), fields()).prop_map(|(role, content, rest)| Message {
            role,
            content,
            rest,
        })
    }

    fn sampling() -> impl Strategy<Value = Sampling> {
        let numbers =
            (option::of(finite()), option::of(finite()), option::of(finite()), option::of(finite()));
        let counts = (any::<Option<u64>>(), any::<Option<u64>>(), any::<Option<i64>>());
        let free = (option::of(json()), option::of(json()), option::of(json()), option::of(json()));
        (numbers, counts, free).prop_map(|(numbers, counts, free)| Sampling {
            temperature: numbers.0,
            top_p: numbers.1,
            frequency_penalty: numbers.2,
            presence_penalty: numbers.3,
            max_tokens: counts.0,
            max_completion_tokens: counts.1,
            seed: counts.2,
            stop: free.0,
            response_format: free.1,
            tools: free.2,
            tool_choice: free.3,
        })
    }

    fn cache_control() -> impl Strategy<Value = CacheControl> {
        any::<(bool, bool, Option<u64>)>().prop_map(|(no_cache, no_store, max_age_s)| CacheControl {
            no_cache,
            no_store,
            max_age_s,
        })
    }

    pub fn request() -> impl Strategy<Value = Request> {
        let asked = prop_oneof![
            text().prop_map(|text| (Some(text + "?"), None)),
            vec(message(), 1..3).prop_map(|messages| (None, Some(messages))),
        ];
        let names = (option::of(id()), option::of(tenant()), option::of(text()), option::of(text()));
        let of = (option::of(id()), option::of(id())).prop_map(|(key, job)| {
            let text = |id: Option<RequestId>| id.map(|id| id.as_str().to_owned());
            let key_id = text(key).map(|text| KeyId::try_from(text).unwrap());
            (key_id, text(job).map(|text| JobId::try_from(text).unwrap()))
        });
        let rest = (any::<Option<u64>>(), option::of(json()), any::<bool>(), option::of(cache_control()));
        (asked, names, of, rest, sampling(), fields()).prop_map(
            |(asked, names, of, rest, sampling, unknown)| Request {
                id: names.0,
                tenant: names.1,
                key_id: of.0,
                job: of.1,
                prompt: asked.0,
                messages: asked.1,
                model: names.2,
                conversation: names.3,
                deadline_ms: rest.0,
                metadata: rest.1,
                stream: rest.2,
                cache: rest.3,
                sampling,
                unknown,
            },
        )
    }

    pub fn passage() -> impl Strategy<Value = Passage> {
        let score = any::<f32>().prop_filter("JSON has no other", |number| number.is_finite());
        (text(), text(), any::<(usize, usize)>(), vec(text(), 0..3), text(), score).prop_map(
            |(document, chunk, (start, end), heading, text, score)| Passage {
                version: DocumentVersion::of(&text),
                document,
                chunk,
                start,
                end,
                heading,
                text,
                score,
            },
        )
    }

    fn rerank() -> impl Strategy<Value = Rerank> {
        (any::<usize>(), option::of(text())).prop_map(|(candidates, scored)| Rerank { candidates, scored })
    }

    fn embedding() -> impl Strategy<Value = Embedding> {
        let number = any::<f32>().prop_filter("a vector has no other", |number| number.is_finite());
        (text(), vec(number, 1..4)).prop_map(|(model, vector)| Embedding::new(model, vector).unwrap())
    }

    fn retrieval() -> impl Strategy<Value = Retrieval> {
        let embed = option::of(embedding()).prop_map(|question| Embed { question });
        (any::<(usize, usize)>(), option::of(rerank()), option::of(embed))
            .prop_map(|((limit, tokens_max), rerank, embed)| Retrieval { limit, tokens_max, rerank, embed })
    }

    pub fn grounded() -> impl Strategy<Value = Grounded> {
        (request(), retrieval(), vec(passage(), 0..3)).prop_map(|(request, retrieval, passages)| Grounded {
            request,
            retrieval,
            passages,
        })
    }

    fn citation() -> impl Strategy<Value = Citation> {
        passage().prop_map(|Passage { document, version, start, end, text: quote, .. }| Citation {
            document,
            version,
            start,
            end,
            quote,
        })
    }

    fn usage() -> impl Strategy<Value = Usage> {
        any::<(u64, u64, u64, [Option<u64>; 3])>().prop_map(
            |(
                prompt_tokens,
                completion_tokens,
                total_tokens,
                [cached_tokens, cached_write_tokens, reasoning_tokens],
            )| Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens,
                cached_tokens,
                cached_write_tokens,
                reasoning_tokens,
            },
        )
    }

    fn generated() -> impl Strategy<Value = Generated> {
        let words = (text(), text(), text(), option::of(text()));
        (words, vec(citation(), 0..3), option::of(usage()), any::<(Option<i64>, Option<i64>, bool)>())
            .prop_map(
                |((text, model, provider, finish_reason), citations, usage, (cost, ttft_us, is_fallback))| {
                    Generated {
                        text,
                        citations,
                        model,
                        provider,
                        usage,
                        cost_nano_usd: cost.map(NanoUsd),
                        finish_reason,
                        ttft_us,
                        is_fallback,
                        tier: None,
                    }
                },
            )
    }

    fn cache_status() -> impl Strategy<Value = CacheStatus> {
        prop::sample::select(vec![CacheStatus::Hit, CacheStatus::Miss, CacheStatus::Bypass])
    }

    pub fn completion() -> impl Strategy<Value = Completion> {
        (request(), option::of(retrieval()), vec(passage(), 0..3), cache_status(), generated()).prop_map(
            |(request, retrieval, passages, cache, answer)| Completion {
                request,
                retrieval,
                passages,
                cache,
                answer,
            },
        )
    }

    fn fault() -> impl Strategy<Value = Fault> {
        (text(), text()).prop_map(|(code, message)| Fault { code, message })
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        let judgement = prop::sample::select(vec![Judgement::Pass, Judgement::Annotate, Judgement::Block]);
        let finding = (text(), text()).prop_map(|(code, message)| Finding { code, message });
        (judgement, vec(finding, 0..3)).prop_map(|(judgement, findings)| Verdict { judgement, findings })
    }

    fn status() -> impl Strategy<Value = Status> {
        let all = [Status::Answered, Status::Failed, Status::Expired, Status::Cancelled, Status::Blocked];
        prop::sample::select(all.to_vec())
    }

    pub fn ending() -> impl Strategy<Value = Ending> {
        let how = (status(), text(), cache_status(), option::of(verdict()), option::of(fault()));
        (how, option::of(request()), option::of(retrieval()), vec(text(), 0..3), option::of(generated()))
            .prop_map(|((status, stage, cache, verdict, error), request, retrieval, chunks, answer)| Ending {
                status,
                stage,
                request,
                retrieval,
                chunks,
                cache,
                answer,
                verdict,
                error,
            })
    }

    pub fn cache_entry() -> impl Strategy<Value = CacheEntry> {
        (text(), generated(), option::of(retrieval()), vec(text(), 0..3), any::<i64>()).prop_map(
            |(key, answer, retrieval, chunks, made_at_ms)| CacheEntry {
                key,
                content: Some(Kept { answer, retrieval, chunks, made_at_ms }),
            },
        )
    }

    pub fn chunks() -> impl Strategy<Value = Chunks> {
        let chunk = (passage(), option::of(embedding())).prop_map(|(passage, embedding)| {
            let Passage { chunk: id, start, end, heading, text, .. } = passage;
            Chunk { id, start, end, heading, text, embedding }
        });
        (text(), tenant(), text(), vec(chunk, 0..3)).prop_map(|(document, tenant, text, chunks)| Chunks {
            document,
            content: Some(Split { tenant, version: DocumentVersion::of(&text), chunks }),
        })
    }

    pub fn document() -> impl Strategy<Value = Document> {
        let format = prop::sample::select(vec![Format::Markdown, Format::Text]);
        (id(), tenant(), format, text()).prop_map(|(id, tenant, format, text)| Document {
            id: id.to_string(),
            tenant,
            format,
            text: Some(text),
        })
    }

    pub fn answer() -> impl Strategy<Value = Answer> {
        let origin = (text(), any::<(i32, i64)>(), option::of(text()))
            .prop_map(|(topic, (partition, offset), key)| Origin { topic, partition, offset, key });
        let timings =
            any::<[Option<i64>; 7]>().prop_map(|[queue, cache, retrieve, infer, ttft, validate, total]| {
                TimingsUs { queue, cache, retrieve, infer, ttft, validate, total }
            });
        let who = (id(), tenant(), status(), cache_status(), option::of(text()), any::<u32>());
        (who, generated(), option::of(fault()), option::of(origin), option::of(json()), timings).prop_map(
            |((id, tenant, status, cache, text, generation), made, error, origin, metadata, timings_us)| {
                Answer {
                    id,
                    tenant,
                    status,
                    text,
                    citations: made.citations,
                    cache,
                    model: Some(made.model),
                    usage: made.usage,
                    cost_nano_usd: made.cost_nano_usd,
                    error,
                    origin,
                    metadata,
                    timings_us,
                    generation,
                }
            },
        )
    }

    pub fn attempt() -> impl Strategy<Value = Attempt> {
        let names = (text(), text(), text(), text(), text(), text(), text());
        let wanted = (any::<i32>(), any::<i32>(), any::<i64>(), any::<i64>());
        let maybe = (
            option::of(text()),
            option::of(text()),
            option::of(text()),
            any::<Option<i32>>(),
            option::of(text()),
            option::of(text()),
            option::of(text()),
            option::of(text()),
        );
        (names, wanted, maybe, any::<[Option<i64>; 7]>()).prop_map(|(names, wanted, maybe, numbers)| {
            Attempt {
                attempt_id: names.0,
                call_id: names.1,
                request_id: names.2,
                tenant: names.3,
                generation: wanted.0,
                stage: names.4,
                attempt: wanted.1,
                started_at: wanted.2,
                duration_us: wanted.3,
                ttft_us: numbers[0],
                provider: names.5,
                endpoint: maybe.0,
                model: maybe.1,
                status: names.6,
                error_code: maybe.2,
                http_status: maybe.3,
                input_tokens: numbers[1],
                output_tokens: numbers[2],
                cost_nano_usd: numbers[3],
                tier: maybe.4,
                cached_read_tokens: numbers[4],
                cached_write_tokens: numbers[5],
                reasoning_tokens: numbers[6],
                key_id: maybe.5,
                job: maybe.6,
                operation: maybe.7,
            }
        })
    }
}

/// One test for each record: whatever is in it comes back.
macro_rules! comes_back {
    ($($test:ident: $record:ident;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig::with_cases(64))]
            $(
                #[test]
                fn $test(record in any_record::$record()) {
                    prop_assert_eq!(again(&record), record);
                }
            )*
        }
    };
}
comes_back! {
    a_request_comes_back: request;
    a_grounded_question_comes_back: grounded;
    a_completion_comes_back: completion;
    an_ending_comes_back: ending;
    an_answer_comes_back: answer;
    a_cache_entry_comes_back: cache_entry;
    chunks_come_back: chunks;
    a_document_comes_back: document;
    an_attempt_comes_back: attempt;
}

#[test]
fn every_field_of_an_answer_is_there_also_where_it_is_null() {
    let answer = Answer {
        id: RequestId::try_from("order-17".to_owned()).unwrap(),
        tenant: Tenant::default(),
        status: Status::Failed,
        text: None,
        citations: Vec::new(),
        cache: CacheStatus::Bypass,
        model: None,
        usage: None,
        cost_nano_usd: None,
        error: Some(Fault { code: "undecodable".into(), message: "no JSON".into() }),
        origin: Some(Origin { topic: "requests".into(), partition: 0, offset: 7, key: None }),
        metadata: None,
        timings_us: TimingsUs::default(),
        generation: 0,
    };
    // Spelled out, since clients rely on these very names.
    let wanted = json!({
        "id": "order-17", "tenant": "default", "status": "failed", "text": null, "citations": [],
        "cache": "bypass", "model": null, "usage": null, "cost_nano_usd": null,
        "error": {"code": "undecodable", "message": "no JSON"},
        "origin": {"topic": "requests", "partition": 0, "offset": 7, "key": null},
        "metadata": null,
        "timings_us": {
            "queue": null, "cache": null, "retrieve": null, "infer": null, "ttft": null, "validate": null,
            "total": null
        },
        "generation": 0
    });
    assert_eq!(serde_json::from_slice::<Value>(&answer.encode().unwrap().unwrap()).unwrap(), wanted);
    let usage = Usage::of(1, 2);
    let names = json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3});
    assert_eq!(serde_json::to_value(usage).unwrap(), names);
}

/// What comes back of a request's `metadata`, typed so.
fn metadata(typed: &str) -> String {
    let request = Request::decode(format!(r#"{{"prompt": "a", "metadata": {typed}}}"#).as_bytes()).unwrap();
    again(&request).metadata.map_or_else(|| "null".to_owned(), |metadata| metadata.to_string())
}

#[test]
fn a_number_comes_back_as_it_was_typed() {
    let typed = "[1.0,0.30000000000000004,5e-324,1.7976931348623157e+308,18446744073709551615,-9223372036854775808,-0.0]";
    assert_eq!(metadata(typed), typed);
    // Digits for which the fast way of reading is one bit off.
    assert_eq!(
        metadata("[31.245270191439438,121.48791951161945]"),
        "[31.245270191439438,121.48791951161945]"
    );
}

#[test]
fn an_integer_of_more_than_64_bits_becomes_the_nearest_double() {
    assert_eq!(metadata("18446744073709551616"), "1.8446744073709552e+19");
}

#[test]
fn a_number_that_no_double_holds_is_refused() {
    for number in ["1e400", "NaN", "Infinity", "-Infinity", "01", ".5", "0x10"] {
        let refused = refusal::<Request>(format!(r#"{{"prompt": "a", "metadata": {number}}}"#));
        assert!(refused.starts_with("could not read a Request: "), "{number}: {refused}");
    }
    assert!(refusal::<Request>(r#"{"prompt": "a", "metadata": 1e400}"#).contains("number out of range"));
}

#[test]
fn a_score_that_is_no_number_is_not_written() {
    let passage = Passage {
        document: "d".into(),
        version: DocumentVersion::of(""),
        chunk: "c".into(),
        start: 0,
        end: 0,
        heading: Vec::new(),
        text: String::new(),
        score: f32::NAN,
    };
    let retrieval = Retrieval { limit: 1, tokens_max: 1, rerank: None, embed: None };
    let grounded = Grounded { request: Request::default(), retrieval, passages: vec![passage] };
    let error = grounded.encode().unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "JSON has no number NaN");
}

#[test]
fn a_field_that_comes_twice_is_refused_and_free_json_keeps_the_last() {
    assert!(refusal::<Request>(r#"{"prompt": "a", "prompt": "b"}"#).contains("duplicate field `prompt`"));
    assert!(
        refusal::<Request>(r#"{"prompt": "a", "top_p": 1, "top_p": 0}"#).contains("duplicate field `top_p`")
    );
    assert!(refusal::<Document>(r#"{"id": "a", "id": "b", "text": ""}"#).contains("duplicate field `id`"));
    assert_eq!(metadata(r#"{"a":1,"a":2}"#), r#"{"a":2}"#);
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    assert!(refusal::<Request>(b"{\"prompt\": \"\xff\"}").contains("invalid unicode code point"));
    assert!(refusal::<Request>(br#"{"prompt": "\ud800"}"#).contains("unexpected end of hex escape"));
    assert!(refusal::<Request>(b"").contains("EOF"));
    assert!(refusal::<Request>(br#"{"prompt": "a"} {"prompt": "b"}"#).contains("trailing characters"));
    // UTF-16, as PowerShell writes it.
    assert!(refusal::<Request>(b"\xff\xfe{\0\"\0").contains("line 1 column 1"));
}

#[test]
fn content_of_another_kind_is_named() {
    let refused = refusal::<Request>(r#"{"messages": [{"role": "user", "content": 5}]}"#);
    assert!(
        refused.contains(r#""content" is neither a text nor a list of parts at line 1 column"#),
        "{refused}"
    );
}

/// A request whose JSON is nested so deep, itself being the first level.
fn nested(levels: usize) -> String {
    let inner = levels - 1;
    // A bracket inside a text counts for nothing, nor does one behind an escaped quotation mark.
    let text = r#"[[[{\"[[\\"#;
    format!(r#"{{"prompt": "{text}", "metadata": {}{}}}"#, "[".repeat(inner), "]".repeat(inner))
}

#[test]
fn a_request_that_was_taken_can_be_told_of_however_deep_it_is() {
    let request = Request::decode(nested(64).as_bytes()).unwrap();
    let error = Fault { code: "deadline".into(), message: "late".into() };
    let ending = Ending::without_answer(Status::Expired, "infer", Some(request), error);
    assert_eq!(again(&ending), ending);

    let deeper = "could not read a Request: it is nested more than 64 levels deep";
    assert_eq!(refusal::<Request>(nested(65)), deeper);
    assert_eq!(refusal::<Request>(nested(126)), deeper);
    assert!(refusal::<Request>(nested(200_000)).contains("recursion limit exceeded"));
}

#[test]
fn a_damaged_record_of_a_compacted_topic_is_no_removal() {
    assert!(refusal::<Chunks>(r#"{"document": "a"}"#).contains("missing field"));
    let damaged = r#"{"document": "a", "tenant": "", "version": "0", "chunks": []}"#;
    assert!(refusal::<Chunks>(damaged).contains("a tenant has 0 bytes"), "{}", refusal::<Chunks>(damaged));
    assert!(refusal::<CacheEntry>(r#"{"key": "a"}"#).contains("missing field"));
    let damaged = r#"{"key": "a", "retrieval": null, "answer": 5, "chunks": [], "made_at_ms": 1}"#;
    assert!(refusal::<CacheEntry>(damaged).contains("invalid type: integer `5`, expected struct Generated"));
}

#[test]
fn a_vector_that_is_none_is_refused() {
    let chunks = |dimensions: usize, vector: &str| {
        let embedding = format!(r#"{{"model": "m", "dimensions": {dimensions}, "vector": "{vector}"}}"#);
        let chunk = format!(
            r#"{{"id": "c", "start": 0, "end": 1, "heading": [], "text": "a", "embedding": {embedding}}}"#
        );
        format!(r#"{{"document": "a", "tenant": "t", "version": "0", "chunks": [{chunk}]}}"#)
    };
    let one = embedding::to_base64(&[1.5]);
    assert_eq!(one, "AADAPw==");
    let read = Chunks::decode(chunks(1, &one).as_bytes()).unwrap().content.unwrap();
    assert_eq!(read.chunks[0].embedding, Embedding::new("m", vec![1.5]));
    let refused = |dimensions, vector: &str| refusal::<Chunks>(chunks(dimensions, vector));
    assert!(refused(2, &one).contains("not as many numbers"));
    assert!(refused(0, "").contains("has no numbers"));
    assert!(refused(1, "AADAPw").contains("no base64") && refused(1, "AADA").contains("no base64"));
    assert!(refused(1, &embedding::to_base64(&[f32::NAN])).contains("not finite"));
    assert_eq!(Embedding::new("m", vec![1.0, f32::INFINITY]), None);
}

#[test]
fn a_slip_in_a_document_or_in_cache_control_is_refused_with_the_names_that_there_are() {
    let refused = refusal::<Document>(r#"{"id": "a", "body": "b"}"#);
    assert!(
        refused.contains("unknown field `body`, expected one of `id`, `tenant`, `format`, `text`"),
        "{refused}"
    );
    let refused = refusal::<Request>(r#"{"prompt": "a", "cache": {"nostore": true}}"#);
    assert!(refused.contains("unknown field `nostore`, expected one of `no_cache`, `no_store`"), "{refused}");
}

#[test]
fn the_id_of_a_document_has_1_to_256_bytes() {
    let document = |id: &str| format!(r#"{{"id": "{id}", "text": "t"}}"#);
    assert_eq!(Document::decode(document(&"x".repeat(256)).as_bytes()).unwrap().id.len(), 256);
    assert!(refusal::<Document>(document(&"x".repeat(257))).ends_with("\"id\" is longer than 256 bytes"));
    assert!(refusal::<Document>(document("")).ends_with("\"id\" is empty"));
    assert!(Document::decode_tombstone("x").is_some());
    assert!(Document::decode_tombstone("").is_none());
    assert!(Document::decode_tombstone(&"x".repeat(257)).is_none());
}

#[test]
fn only_records_of_compacted_topics_have_a_form_without_a_value() {
    let can_be_removed = BTreeMap::from([
        ("Document", Document::decode_tombstone("k").is_some()),
        ("Chunks", Chunks::decode_tombstone("k").is_some()),
        ("CacheEntry", CacheEntry::decode_tombstone("k").is_some()),
        ("Request", Request::decode_tombstone("k").is_some()),
        ("Ending", Ending::decode_tombstone("k").is_some()),
        ("Answer", Answer::decode_tombstone("k").is_some()),
    ]);
    for topic in topics::ALL {
        let compacted = topic.cleanup == topics::Cleanup::Compact;
        assert_eq!(can_be_removed.get(topic.record).copied().unwrap_or(false), compacted, "{}", topic.name);
    }
}

/// The bytes of a row, as they stand in the goldens.
const ATTEMPT: &[u8] = include_bytes!("../golden/v0.1/attempt.avro");
const OUTCOME: &[u8] = include_bytes!("../golden/v0.1/outcome.avro");

/// CRC-64-AVRO of a text, as section "Schema Fingerprints" of the Avro specification writes it down.
fn fingerprint(canonical: &str) -> u64 {
    const EMPTY: u64 = 0xc15d_213a_a4d7_a795;
    canonical.bytes().fold(EMPTY, |fingerprint, byte| {
        let mut entry = (fingerprint ^ u64::from(byte)) & 0xff;
        for _ in 0..8 {
            entry = (entry >> 1) ^ if entry & 1 == 1 { EMPTY } else { 0 };
        }
        (fingerprint >> 8) ^ entry
    })
}

/// The Parsing Canonical Form of a row's schema: names, types and order, and nothing else.
fn canonical(name: &str, columns: &[Column]) -> String {
    let field = |Column { name, avro, nullable, .. }: &Column| match nullable {
        true => format!(r#"{{"name":"{name}","type":["null","{avro}"]}}"#),
        false => format!(r#"{{"name":"{name}","type":"{avro}"}}"#),
    };
    let fields: Vec<_> = columns.iter().map(field).collect();
    format!(r#"{{"name":"forebay.{name}","type":"record","fields":[{}]}}"#, fields.join(","))
}

#[test]
fn a_row_starts_with_the_fingerprint_that_the_specification_gives_its_schema() {
    for (row, name, columns) in
        [(OUTCOME, "Outcome", Outcome::COLUMNS), (ATTEMPT, "Attempt", Attempt::COLUMNS)]
    {
        assert_eq!(row[..2], [0xC3, 0x01]);
        assert_eq!(row[2..10], fingerprint(&canonical(name, columns)).to_le_bytes(), "{name}");
    }
}

#[test]
fn a_row_of_another_schema_is_refused_by_the_name_of_its_fingerprint() {
    let hex = |row: &[u8]| row[2..10].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let refused = refusal::<Outcome>(ATTEMPT);
    let wanted =
        format!("its schema has the fingerprint {}; the one known here is {}", hex(ATTEMPT), hex(OUTCOME));
    assert!(refused.ends_with(&wanted), "{refused}");
    assert!(
        refusal::<Outcome>(b"{}").ends_with("it does not start with C3 01 and a fingerprint of eight bytes")
    );
    assert!(refusal::<Outcome>(&OUTCOME[..9]).contains("a fingerprint of eight bytes"));
}

/// The first 19 columns, as rows were before there were tokens of caches and of reasoning.
const OLDER: &[u8] = include_bytes!("../golden/v0.1/attempt-19-columns.avro");

#[test]
fn a_row_of_an_older_form_is_read_and_what_it_does_not_say_is_null() {
    assert_eq!(OLDER[2..10], fingerprint(&canonical("Attempt", &Attempt::COLUMNS[..19])).to_le_bytes());
    let (older, now) = (Attempt::decode(OLDER).unwrap(), Attempt::decode(ATTEMPT).unwrap());
    let unsaid = [older.cached_read_tokens, older.cached_write_tokens, older.reasoning_tokens];
    assert_eq!(unsaid, [None; 3]);
    assert_eq!(older.cost_nano_usd, now.cost_nano_usd);
    assert_eq!(again(&older), older, "and written anew in the form of today");
    assert!(Attempt::COLUMNS[19..].iter().all(|column| column.nullable));
    assert!(Attempt::decode(&OLDER[..OLDER.len() - 1]).is_err());
}

#[test]
fn a_row_that_was_cut_or_has_more_behind_it_is_refused() {
    for end in 10..OUTCOME.len() {
        assert!(Outcome::decode(&OUTCOME[..end]).is_err(), "cut at byte {end}");
    }
    assert!(refusal::<Outcome>([OUTCOME, b"xyz"].concat()).ends_with("3 bytes follow the row"));
}

#[test]
fn a_share_beyond_one_is_refused_where_it_is_written() {
    let audit = |inclusion: &str| {
        format!(
            r#"{{"request_id": "a", "judge": "j", "judge_version": "1", "flagged": true, "inclusion_probability": {inclusion}}}"#
        )
    };
    assert_eq!(Audit::decode(audit("0.5").as_bytes()).unwrap().inclusion_probability, Some(0.5));
    assert_eq!(
        refusal::<Audit>(audit("50")),
        "could not read a Audit: inclusion_probability is a fraction from 0 to 1"
    );
    let label = r#"{"request_id": "a", "wrong": true, "quality": -1}"#;
    assert!(refusal::<Label>(label).contains("quality is a fraction"));
}
