//! Whatever a file holds, reading it ends with a value or with faults that lie within the file.

use crate::support::{Operators, read};
use forebay_plan::{Faults, cases, plan};
use proptest::prelude::*;

fn lie_within(faults: &Faults, text: &str) {
    assert!(!faults.is_empty());
    let lines = text.lines().count();
    for fault in faults {
        assert!(fault.line >= 1 && fault.column >= 1, "{fault}");
        // The end of a file may be said to lie behind its last line.
        assert!(fault.line <= lines + 1, "{fault}, of {lines} lines");
    }
}

fn read_both(text: &str) {
    if let Err(faults) = plan("f.yaml", text, &Operators) {
        lie_within(&faults, text);
    }
    if let Err(faults) = cases::parse("f.yaml", text) {
        lie_within(&faults, text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        read_both(&text);
    }

    #[test]
    fn any_yaml_like_text_is_read_or_refused(text in "[a-c \\n\\t:,{}\\[\\]&*!|>'\"#?%-]{0,80}") {
        read_both(&text);
    }

    #[test]
    fn a_shipped_pipeline_with_a_slip_in_it_is_read_or_refused(at in 0.0..1.0f64, slip in "[a-z:{}\\[\\],\\n &*-]{0,3}") {
        let mut text = read("answer.yaml");
        let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a fraction of a small length")]
        let at = places[(at * places.len() as f64) as usize];
        let next = at + text[at..].chars().next().map_or(0, char::len_utf8);
        text.replace_range(at..next, &slip);
        read_both(&text);
    }
}

#[test]
fn nesting_is_bounded() {
    for (open, close) in [("[", "]"), ("{a: ", "}")] {
        let text = format!("name: {}{}", open.repeat(200), close.repeat(200));
        let faults = plan("f.yaml", &text, &Operators).unwrap_err().to_string();
        assert!(faults.contains("nested more than 64 deep"), "{faults}");
    }
    let block: String = (0..200).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
    assert!(plan("f.yaml", &block, &Operators).unwrap_err().to_string().contains("nested more than 64 deep"));
}

#[test]
fn aliases_cannot_grow_without_bound() {
    let mut nodes = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let alias = format!("*a{}", level - 1);
        nodes.push_str(&format!("a{level}: &a{level} [{}]\n", [alias.as_str(); 10].join(", ")));
    }
    let faults = plan("f.yaml", &nodes, &Operators).unwrap_err().to_string();
    assert!(faults.contains("more than 50000 values"), "{faults}");

    let text = format!("a: &a {}\nb: [{}]\n", "x".repeat(500_000), ["*a"; 1_000].join(", "));
    let faults = plan("f.yaml", &text, &Operators).unwrap_err().to_string();
    assert!(faults.contains("bytes of text"), "{faults}");
}

#[test]
fn a_file_that_is_too_large_is_not_read() {
    let faults = plan("f.yaml", &"#".repeat(1024 * 1024 + 1), &Operators).unwrap_err();
    assert_eq!(faults.to_string(), "f.yaml:1:1: the file has 1048577 bytes; at most 1048576 are read");
}

#[test]
fn an_anchor_may_be_used_again() {
    let text = read("answer.yaml");
    let text = text.replacen("tables: [chunks]", "tables: &passages [chunks]", 1);
    let shared = text.replacen("    settings: {limit: 8}", "    settings: &few {limit: 8}", 1);
    assert!(plan("f.yaml", &shared, &Operators).is_ok());
    let wrong = shared.replacen("    in_flight: 64", "    tables: *passages", 1);
    let faults = plan("f.yaml", &wrong, &Operators).unwrap_err().to_string();
    // Where it was written, since nothing stands where it is used.
    assert!(faults.contains("f.yaml:23:24: infer looks nothing up in a table of Chunks"), "{faults}");
}

#[test]
fn a_byte_order_mark_is_no_fault() {
    assert!(plan("f.yaml", &format!("\u{feff}{}", read("answer.yaml")), &Operators).is_ok());
}

#[test]
fn windows_line_ends_are_no_fault() {
    assert!(plan("f.yaml", &read("answer.yaml").replace('\n', "\r\n"), &Operators).is_ok());
}

#[test]
fn a_report_is_bounded() {
    let text: String = (0..20_000).map(|n| format!("key{n}: 1\nkey{n}: 2\n")).collect();
    let faults = plan("f.yaml", &text, &Operators).unwrap_err();
    assert_eq!(faults.len(), 501);
    assert!(faults.to_string().contains("there are more than 500 faults"), "{faults}");
}
