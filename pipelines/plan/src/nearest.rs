//! Finds the name that was probably meant.
//!
//! Invariant: a hint names only what would be accepted in that place.

/// The most names that a hint lists where none is near: all topics that are shared.
const LISTED_MAX: usize = 20;

/// The name nearest to `given`, if one is near enough to have been meant: at most one slip in three characters.
/// A transposition is one slip, and capitals are none.
pub(crate) fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let given = given.to_lowercase();
    let slips_max = (given.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&given, &name.to_lowercase()), name))
        .filter(|(slips, _)| *slips <= slips_max)
        .min()
        .map(|(_, name)| name)
}

/// What to say of a name that is not among the known ones: the nearest, or else the list, or nothing.
pub(crate) fn hint<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let known: Vec<&str> = known.into_iter().collect();
    if let Some(name) = nearest(given, known.iter().copied()) {
        return Some(format!("did you mean {name:?}?"));
    }
    match known.len() {
        0 => None,
        1..=LISTED_MAX => Some(format!("known: {}", list(known))),
        _ => None,
    }
}

/// Names, each in quotes, joined by commas.
pub(crate) fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(given: &str, meant: Option<&str>) {
        assert_eq!(nearest(given, ["requests", "results", "limit", "to", "from"]), meant, "{given}");
    }

    #[test]
    fn a_slip_is_understood_and_another_word_is_not() {
        check("limt", Some("limit"));
        check("lmiit", Some("limit"));
        check("Requests", Some("requests"));
        check("reqests", Some("requests"));
        check("form", Some("from"));
        check("ot", Some("to"));
        check("temperature", None);
        check("", None);
    }

    #[test]
    fn a_long_list_of_names_is_not_printed() {
        let names: Vec<String> = (0..=LISTED_MAX).map(|n| format!("name{n}")).collect();
        assert_eq!(hint("quite another", names.iter().map(String::as_str)), None);
        assert_eq!(hint("quite another", ["a", "b"]).as_deref(), Some("known: \"a\", \"b\""));
    }
}
