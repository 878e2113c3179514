//! What is part of the binary: pipelines, and the guides that `demo` asks about.

/// Pipelines by name: file name and text.
const PIPELINES: &[(&str, &str, &str)] =
    &[("answer", "pipelines/answer.yaml", include_str!("../../answer.yaml"))];

/// A shipped pipeline: its file's name and text.
pub fn pipeline(name: &str) -> Option<(&'static str, &'static str)> {
    PIPELINES.iter().find(|(known, ..)| *known == name).map(|(_, file, text)| (*file, *text))
}

/// The cases of the pipeline `answer`: file name and text.
const ANSWER_CASES: &[(&str, &str)] = &[
    ("pipelines/answer/cases/changed.yaml", include_str!("../../answer/cases/changed.yaml")),
    ("pipelines/answer/cases/cited.yaml", include_str!("../../answer/cases/cited.yaml")),
    ("pipelines/answer/cases/deleted.yaml", include_str!("../../answer/cases/deleted.yaml")),
    ("pipelines/answer/cases/expired.yaml", include_str!("../../answer/cases/expired.yaml")),
    ("pipelines/answer/cases/no-cache.yaml", include_str!("../../answer/cases/no-cache.yaml")),
    ("pipelines/answer/cases/repeated.yaml", include_str!("../../answer/cases/repeated.yaml")),
    ("pipelines/answer/cases/shared.yaml", include_str!("../../answer/cases/shared.yaml")),
    ("pipelines/answer/cases/tenants.yaml", include_str!("../../answer/cases/tenants.yaml")),
    ("pipelines/answer/cases/undecodable.yaml", include_str!("../../answer/cases/undecodable.yaml")),
];

/// The cases of a shipped pipeline.
pub fn cases(name: &str) -> Option<&'static [(&'static str, &'static str)]> {
    (name == "answer").then_some(ANSWER_CASES)
}

/// The names of all shipped pipelines.
pub fn names() -> impl Iterator<Item = &'static str> {
    PIPELINES.iter().map(|(name, ..)| *name)
}

/// Forebay's own guides: file name and text.
pub const GUIDES: &[(&str, &str)] = &[
    ("alerts.md", include_str!("../../guides/alerts.md")),
    ("cache.md", include_str!("../../guides/cache.md")),
    ("delivery.md", include_str!("../../guides/delivery.md")),
    ("embedded-broker.md", include_str!("../../guides/embedded-broker.md")),
    ("failures.md", include_str!("../../guides/failures.md")),
    ("models.md", include_str!("../../guides/models.md")),
    ("operations.md", include_str!("../../guides/operations.md")),
    ("pipelines.md", include_str!("../../guides/pipelines.md")),
    ("requests.md", include_str!("../../guides/requests.md")),
    ("results.md", include_str!("../../guides/results.md")),
    ("retrieval.md", include_str!("../../guides/retrieval.md")),
    ("simulator.md", include_str!("../../guides/simulator.md")),
    ("sql.md", include_str!("../../guides/sql.md")),
    ("tiers.md", include_str!("../../guides/tiers.md")),
    ("topics.md", include_str!("../../guides/topics.md")),
];

/// Questions about the guides, one request a line.
pub const QUESTIONS: &str = include_str!("../../guides/questions.jsonl");

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of a folder with this extension, sorted.
    fn there(folder: &str, extension: &str) -> Vec<String> {
        let folder = format!("{}/../{folder}", env!("CARGO_MANIFEST_DIR"));
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(extension))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn every_guide_and_every_case_is_part_of_the_binary() {
        let guides: Vec<_> = GUIDES.iter().map(|(name, _)| *name).collect();
        assert_eq!(there("guides", ".md"), guides);
        let cases: Vec<_> = ANSWER_CASES.iter().map(|(file, _)| file.rsplit('/').next().unwrap()).collect();
        assert_eq!(there("answer/cases", ".yaml"), cases);
    }
}
