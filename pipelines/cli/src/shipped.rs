//! What is part of the binary: pipelines, and the guides that `demo` asks about.

/// Pipelines by name: file name and text.
const PIPELINES: &[(&str, &str, &str)] =
    &[("answer", "pipelines/answer.yaml", include_str!("../../answer.yaml"))];

/// A shipped pipeline: its file's name and text.
pub fn pipeline(name: &str) -> Option<(&'static str, &'static str)> {
    PIPELINES.iter().find(|(known, ..)| *known == name).map(|(_, file, text)| (*file, *text))
}

/// The names of all shipped pipelines.
pub fn names() -> impl Iterator<Item = &'static str> {
    PIPELINES.iter().map(|(name, ..)| *name)
}

/// Forebay's own guides: file name and text.
pub const GUIDES: &[(&str, &str)] = &[
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
    ("topics.md", include_str!("../../guides/topics.md")),
];

/// Questions about the guides, one request a line.
pub const QUESTIONS: &str = include_str!("../../guides/questions.jsonl");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guide_is_part_of_the_binary() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../guides");
        let mut there: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".md"))
            .collect();
        there.sort();
        let shipped: Vec<_> = GUIDES.iter().map(|(name, _)| *name).collect();
        assert_eq!(there, shipped);
    }
}
