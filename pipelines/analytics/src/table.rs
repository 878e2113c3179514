//! The tables: what each is called, which topic fills it, and what every column says.
//!
//! A table is a row of its topic, column by column, with the day of its time behind them. What is declared with the
//! records in forebay-schemas is not declared again here. A roll-up is made of a table, by [`crate::rollup`].
//!
//! Invariant: a column is added as the last but `date`, and may be null; it is never renamed. Rows that are older read null.

use crate::rollup;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use forebay_schemas::{Attempt, Audit, Label, Outcome, Payload, topics};
use std::sync::{Arc, LazyLock};

/// The column by which every table is partitioned.
pub const DATE: &str = "date";
/// The column that says whose a row is, in every table.
pub const TENANT: &str = "tenant";
/// The unit of the columns that are points in time.
pub(crate) const TIME_UNIT: &str = "µs since 1970";

/// A table of the output log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// One row a request.
    Outcomes,
    /// One row an upstream call.
    Attempts,
    /// One row a verdict of a judge.
    Audits,
    /// One row a verdict of a person.
    Labels,
    /// One row the texts of a request.
    Payloads,
    /// One row a record that was given up.
    DeadLetters,
    /// One row an hour of outcomes that are alike.
    OutcomesHourly,
    /// One row an hour of attempts that are alike.
    AttemptsHourly,
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// UTF-8.
    Text,
    /// 32 bits, signed.
    Int,
    /// 64 bits, signed.
    Long,
    /// A double.
    Double,
    /// True or false.
    Boolean,
    /// Bytes.
    Bytes,
    /// A point in time in UTC, to the microsecond.
    Time,
    /// A day in UTC.
    Date,
}

impl Kind {
    fn of(avro: &str, unit: &str) -> Self {
        match (avro, unit) {
            (_, TIME_UNIT) => Self::Time,
            ("int", _) => Self::Int,
            ("long", _) => Self::Long,
            ("double", _) => Self::Double,
            ("boolean", _) => Self::Boolean,
            _ => Self::Text,
        }
    }

    /// Its type in Arrow: one that Delta tables know.
    pub fn arrow(self) -> DataType {
        match self {
            Self::Text => DataType::Utf8,
            Self::Int => DataType::Int32,
            Self::Long => DataType::Int64,
            Self::Double => DataType::Float64,
            Self::Boolean => DataType::Boolean,
            Self::Bytes => DataType::Binary,
            Self::Time => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Self::Date => DataType::Date32,
        }
    }
}

/// One column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// Whether it may be null.
    pub nullable: bool,
    /// The unit that it counts in; empty where it counts nothing.
    pub unit: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

/// A dead letter is read from its headers, so its columns are declared here and not by its record.
const DEAD_LETTERS: &[Column] = &[
    text(
        "letter",
        false,
        "The key of the letter: step, topic, partition and offset of what was given up. After a crash a letter may be here twice, with the \
         same `redrives`; the view given_up has it once.",
    ),
    text("request_id", false, "The request's id; derived where the record did not say."),
    text(TENANT, false, "Whose request it was."),
    column("generation", Kind::Int, false, "redrives", "Counts redrives of the request."),
    text("stage", false, "The step that gave up."),
    text("pipeline", false, "The pipeline of that step."),
    text("record", false, "The name of the record that the step wanted."),
    text("origin_topic", false, "The topic of the original."),
    column("origin_partition", Kind::Int, false, "", "Its partition."),
    column("origin_offset", Kind::Long, false, "", "Its offset."),
    column("origin_at", Kind::Time, false, TIME_UNIT, "When the original was written to its topic."),
    text("class", false, "undecodable, rejected, unavailable or panicked."),
    text("code", false, "A word of a closed vocabulary."),
    text("message", false, "What happened."),
    column("attempts", Kind::Int, false, "tries", "How often it was tried."),
    column("since", Kind::Time, false, TIME_UNIT, "When it first failed in this step."),
    text(
        "call_id",
        false,
        "The id of the first upstream call that the step makes for it; empty without one.",
    ),
    column(
        "deadline_at",
        Kind::Time,
        true,
        TIME_UNIT,
        "When nobody waits any more; null without a deadline.",
    ),
    column("paid_nano_usd", Kind::Long, false, "nano-USD", "What was spent on the request so far."),
    column("redrives", Kind::Int, false, "redrives", "How often this record had been redriven at this step."),
    text("body_at", true, "Where the original's bytes lie, where they were too large to copy."),
    column("died_at", Kind::Time, false, TIME_UNIT, "When the letter was written."),
];

pub(crate) const fn column(
    name: &'static str,
    kind: Kind,
    nullable: bool,
    unit: &'static str,
    meaning: &'static str,
) -> Column {
    Column { name, kind, nullable, unit, meaning }
}

const fn text(name: &'static str, nullable: bool, meaning: &'static str) -> Column {
    column(name, Kind::Text, nullable, "", meaning)
}

impl Table {
    /// All tables that a topic fills.
    pub const ALL: &'static [Self] =
        &[Self::Outcomes, Self::Attempts, Self::Audits, Self::Labels, Self::Payloads, Self::DeadLetters];

    /// All tables that are made of another.
    pub const ROLLUPS: &'static [Self] = &[Self::OutcomesHourly, Self::AttemptsHourly];

    /// Its name in SQL, and that of its folder.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outcomes => "outcomes",
            Self::Attempts => "attempts",
            Self::Audits => "audits",
            Self::Labels => "labels",
            Self::Payloads => "payloads",
            Self::DeadLetters => "dead_letters",
            Self::OutcomesHourly => "outcomes_hourly",
            Self::AttemptsHourly => "attempts_hourly",
        }
    }

    /// The table of this name.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.iter().chain(Self::ROLLUPS).copied().find(|table| table.name() == name)
    }

    /// What it is made of, where that is another table.
    pub const fn source(self) -> Option<Self> {
        match self {
            Self::OutcomesHourly => Some(Self::Outcomes),
            Self::AttemptsHourly => Some(Self::Attempts),
            _ => None,
        }
    }

    /// The topic that fills it, or what it is made of; without the prefix.
    pub const fn topic(self) -> &'static str {
        match self {
            Self::Outcomes | Self::OutcomesHourly => topics::OUTCOMES.name,
            Self::Attempts | Self::AttemptsHourly => topics::ATTEMPTS.name,
            Self::Audits => topics::AUDITS.name,
            Self::Labels => topics::LABELS.name,
            Self::Payloads => topics::PAYLOADS.name,
            Self::DeadLetters => topics::DEAD_LETTERS.name,
        }
    }

    /// The column whose day a row is partitioned by.
    pub const fn time_column(self) -> &'static str {
        match self {
            Self::Outcomes | Self::Payloads => "ended_at",
            Self::Attempts => "started_at",
            Self::Audits => "audited_at",
            Self::Labels => "labelled_at",
            Self::DeadLetters => "died_at",
            Self::OutcomesHourly | Self::AttemptsHourly => rollup::HOUR,
        }
    }

    /// All columns; the last is `date`.
    pub fn columns(self) -> Vec<Column> {
        let of = |columns: &'static [forebay_schemas::Column]| {
            // Where a writer left these open they are filled in: whose a row is and when are always known.
            let filled = |name: &str| name == self.time_column() || name == TENANT;
            let columns = columns.iter().filter(|column| column.name != DATE).map(move |column| Column {
                name: column.name,
                kind: Kind::of(column.avro, column.unit),
                nullable: column.nullable && !filled(column.name),
                unit: column.unit,
                meaning: column.meaning,
            });
            columns.collect()
        };
        let mut columns: Vec<Column> = match self {
            Self::Outcomes => of(Outcome::COLUMNS),
            Self::Attempts => of(Attempt::COLUMNS),
            Self::Audits => of(Audit::COLUMNS),
            Self::Labels => of(Label::COLUMNS),
            Self::Payloads => of(Payload::COLUMNS),
            Self::DeadLetters => DEAD_LETTERS.to_vec(),
            Self::OutcomesHourly | Self::AttemptsHourly => rollup::columns(self),
        };
        let meaning = match self {
            Self::Outcomes | Self::Payloads => {
                "The day of `ended_at` in UTC; the table is partitioned by it."
            }
            Self::Attempts => "The day of `started_at` in UTC; the table is partitioned by it.",
            Self::Audits => "The day of `audited_at` in UTC; the table is partitioned by it.",
            Self::Labels => "The day of `labelled_at` in UTC; the table is partitioned by it.",
            Self::DeadLetters => "The day of `died_at` in UTC; the table is partitioned by it.",
            Self::OutcomesHourly | Self::AttemptsHourly => {
                "The day of `hour` in UTC; the table is partitioned by it."
            }
        };
        columns.push(column(DATE, Kind::Date, false, "", meaning));
        columns
    }

    /// The same as an Arrow schema.
    pub fn schema(self) -> SchemaRef {
        static SCHEMAS: LazyLock<Vec<SchemaRef>> = LazyLock::new(|| {
            let field = |column: Column| Field::new(column.name, column.kind.arrow(), column.nullable);
            let schema = |table: &Table| {
                Arc::new(Schema::new(table.columns().into_iter().map(field).collect::<Vec<_>>()))
            };
            Table::ALL.iter().chain(Table::ROLLUPS).map(schema).collect()
        });
        Arc::clone(&SCHEMAS[self as usize])
    }

    /// The columns that lie in its files: not the day, which their folder says.
    pub fn schema_of_files(self) -> SchemaRef {
        let schema = self.schema();
        let fields = schema.fields().iter().filter(|field| field.name() != DATE).cloned();
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }

    /// How many days are kept: texts of clients for fewer, and what is rolled up for ten years.
    pub const fn days_kept(self) -> u32 {
        match self {
            Self::Payloads => 30,
            Self::OutcomesHourly | Self::AttemptsHourly => 3_660,
            _ => 400,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_table_has_its_time_its_tenant_and_its_day_and_no_column_twice() {
        for table in Table::ALL.iter().chain(Table::ROLLUPS) {
            let columns = table.columns();
            let find = |name: &str| columns.iter().find(|column| column.name == name).unwrap();
            assert_eq!(
                (find(table.time_column()).kind, find(table.time_column()).nullable),
                (Kind::Time, false)
            );
            assert_eq!((find(TENANT).kind, find(TENANT).nullable), (Kind::Text, false));
            assert_eq!(columns.last().unwrap().kind, Kind::Date);
            assert_eq!(
                columns.iter().map(|column| column.name).collect::<BTreeSet<_>>().len(),
                columns.len()
            );
            assert!(columns.iter().all(|column| column.meaning.ends_with('.')), "{}", table.name());
            assert_eq!(table.schema().fields().len(), columns.len());
            assert_eq!(Table::find(table.name()), Some(*table));
        }
    }
}
