//! The views that answer the usual questions, each a file of SQL.
//!
//! A file opens with what the view answers, as a comment. Each column of its outermost SELECT stands on a line of its own that ends in
//! `-- [unit] meaning`; from these lines comes the reference.
//!
//! Invariant: what a view says of its columns is what it has, in that order; a test plans each of them.

/// One view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Its name in SQL.
    pub name: &'static str,
    /// Its query, with comments.
    pub sql: &'static str,
}

macro_rules! views {
    ($($name:literal),* $(,)?) => {
        &[$(View { name: $name, sql: include_str!(concat!("views/", $name, ".sql")) }),*]
    };
}

/// All views, in the order of the reference.
pub const VIEWS: &[View] = views![
    "cost_daily",
    "cost_by_tenant_model",
    "spend_minute",
    "latency",
    "cache_savings",
    "backfill_jobs",
    "judged",
    "quality",
    "given_up",
    "focus_1_3",
];

/// What a view says of one of its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// The unit that it counts in; empty where it counts nothing.
    pub unit: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

impl View {
    /// The view of this name.
    pub fn find(name: &str) -> Option<Self> {
        VIEWS.iter().copied().find(|view| view.name == name)
    }

    /// What it answers.
    pub fn meaning(self) -> String {
        let lines = self.sql.lines().map_while(|line| line.strip_prefix("-- "));
        lines.collect::<Vec<_>>().join(" ")
    }

    /// Its columns, as its lines tell of them.
    pub fn columns(self) -> Vec<Column> {
        let told = self.sql.lines().filter_map(|line| line.strip_prefix("    ")?.split_once(" -- "));
        let column = |(code, told): (&'static str, &'static str)| {
            let code = code.trim_end().trim_end_matches(',');
            let name = code.rsplit([' ', '.']).next().unwrap_or(code).trim_matches('"');
            let (unit, meaning) =
                told.strip_prefix('[').and_then(|told| told.split_once("] ")).unwrap_or(("", told));
            Column { name, unit, meaning }
        };
        told.map(column).collect()
    }
}
