//! What is wrong with a file, all at once, each fault with its place.
//!
//! Invariant: faults are in the order of their places, whoever found them first.

use std::fmt;

/// The most faults that are kept of one file; nobody reads further, and one more fault says that there are more.
const FAULTS_MAX: usize = 500;

/// A place in a file; both count from 1, columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

impl Place {
    /// Where a fault of a whole file is reported.
    pub const START: Self = Self { line: 1, column: 1 };
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file, as its reader named it.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What was probably meant, or what would be right.
    pub hint: Option<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

/// All faults of one file; displayed one a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults {
    file: String,
    faults: Vec<Fault>,
}

impl Faults {
    /// No fault of this file yet.
    pub(crate) fn of(file: &str) -> Self {
        Self { file: file.to_owned(), faults: Vec::new() }
    }

    pub(crate) fn add(&mut self, place: Place, message: impl Into<String>) {
        self.push(place, message.into(), None);
    }

    pub(crate) fn add_with_hint(
        &mut self,
        place: Place,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.push(place, message.into(), Some(hint.into()));
    }

    pub(crate) fn push(&mut self, Place { line, column }: Place, message: String, hint: Option<String>) {
        let (message, hint) = match self.faults.len() {
            ..FAULTS_MAX => (message, hint),
            FAULTS_MAX => (format!("there are more than {FAULTS_MAX} faults; here the report ends"), None),
            _ => return,
        };
        let fault = Fault { file: self.file.clone(), line, column, message, hint };
        // The same text read through two aliases is wrong once.
        if self.faults.contains(&fault) {
            return;
        }
        let after = self.faults.partition_point(|other| (other.line, other.column) <= (line, column));
        self.faults.insert(after, fault);
    }

    pub(crate) fn extend(&mut self, more: Self) {
        for Fault { line, column, message, hint, .. } in more.faults {
            self.push(Place { line, column }, message, hint);
        }
    }

    /// The value, if nothing was wrong with it.
    pub(crate) fn or<T>(self, value: T) -> Result<T, Self> {
        if self.is_empty() { Ok(value) } else { Err(self) }
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// How much is wrong.
    pub fn len(&self) -> usize {
        self.faults.len()
    }

    /// All faults, in the order of their places.
    pub fn iter(&self) -> std::slice::Iter<'_, Fault> {
        self.faults.iter()
    }
}

impl<'a> IntoIterator for &'a Faults {
    type Item = &'a Fault;
    type IntoIter = std::slice::Iter<'a, Fault>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, fault) in self.faults.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}
