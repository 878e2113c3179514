//! Rows: flat records that SQL reads. Ours are in Avro single-object encoding, those that anyone may write in JSON.
//!
//! A row is declared once, with the unit and meaning of each column; its schema and its reference come from
//! there. Types are those that Delta tables know: no unsigned numbers, no enums.
//!
//! Invariant: a column is added as the last one, and may be null. So each older form is the present one without some of its
//! last columns, and its rows are read with null in them.

use crate::{DecodeError, EncodeError, RequestId, Tenant};
use apache_avro::{
    Schema,
    headers::{HeaderBuilder, RabinFingerprintHeader},
    reader::datum::GenericDatumReader,
    writer::datum::GenericDatumWriter,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::sync::LazyLock;

/// How many columns an older row may lack.
const ADDED_MAX: usize = 7;

/// One column of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Its Avro type.
    pub avro: &'static str,
    /// Whether it may be null.
    pub nullable: bool,
    /// The unit that it counts in; empty where it counts nothing.
    pub unit: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

/// A type that a column may have.
pub trait Cell {
    /// Its Avro type.
    const AVRO: &'static str;
    /// Whether it may be null.
    const NULLABLE: bool = false;
}

macro_rules! cells {
    ($($rust:ty => $avro:literal),*) => { $(impl Cell for $rust { const AVRO: &'static str = $avro; })* };
}
cells!(
    String => "string", RequestId => "string", Tenant => "string", i32 => "int", i64 => "long", f64 => "double",
    bool => "boolean"
);

impl<C: Cell> Cell for Option<C> {
    const AVRO: &'static str = C::AVRO;
    const NULLABLE: bool = true;
}

/// The wire form of one kind of row: its schema and the ten bytes that stand before every datum.
pub struct Form {
    schema: Schema,
    header: Vec<u8>,
    /// The same as it was before its last columns came, the youngest first.
    older: Vec<Form>,
}

impl Form {
    /// Builds the form from the columns.
    pub(crate) fn of(name: &str, doc: &str, columns: &[Column]) -> Result<Self, Box<apache_avro::Error>> {
        let added = columns.iter().rev().take_while(|column| column.nullable).count().min(ADDED_MAX);
        let older = (1..=added).map(|count| Self::alone(name, doc, &columns[..columns.len() - count]));
        Ok(Self { older: older.collect::<Result<_, _>>()?, ..Self::alone(name, doc, columns)? })
    }

    fn alone(name: &str, doc: &str, columns: &[Column]) -> Result<Self, Box<apache_avro::Error>> {
        let schema = Schema::parse(&avro(name, doc, columns)).map_err(Box::new)?;
        // In Avro's canonical form a logical type is its plain one: "long". apache_avro writes {"type":"long"} there,
        // and its fingerprint is not the one that the specification, Java and fastavro give.
        let plain = record(name, doc, columns, |column| json!(column.avro));
        let plain = Schema::parse(&plain).map_err(Box::new)?;
        let header = RabinFingerprintHeader::from_schema(&plain).build_header();
        Ok(Self { schema, header, older: Vec::new() })
    }

    /// The form that these bytes are in, and the datum in them.
    fn split<'a>(&self, body: &'a [u8]) -> Option<(&Self, &'a [u8])> {
        let mut forms = std::iter::once(self).chain(&self.older);
        forms.find_map(|form| Some((form, body.strip_prefix(form.header.as_slice())?)))
    }
}

/// The ten bytes that stand before a row in each of its forms, with that form's schema; the present one first, then each
/// with one column less. What reads rows by another library than ours needs them.
pub(crate) fn forms(
    record: &'static str,
    doc: &str,
    columns: &[Column],
    form: &LazyForm,
) -> Result<Vec<(Vec<u8>, Value)>, EncodeError> {
    let form = form.as_ref().map_err(|error| EncodeError::Avro { record, detail: error.to_string() })?;
    let all = std::iter::once(form).chain(&form.older).enumerate();
    Ok(all
        .map(|(less, form)| (form.header.clone(), avro(record, doc, &columns[..columns.len() - less])))
        .collect())
}

/// The Avro schema of a row, as it is published.
pub fn avro(name: &str, doc: &str, columns: &[Column]) -> Value {
    record(name, doc, columns, |column| match column.unit {
        "µs since 1970" => json!({"type": "long", "logicalType": "timestamp-micros"}),
        _ => json!(column.avro),
    })
}

fn record(name: &str, doc: &str, columns: &[Column], kind: impl Fn(&Column) -> Value) -> Value {
    let field = |column: &Column| {
        let doc = match column.unit {
            "" => column.meaning.to_owned(),
            unit => format!("{} [{unit}]", column.meaning),
        };
        match column.nullable {
            true => json!({"name": column.name, "type": ["null", kind(column)], "default": null, "doc": doc}),
            false => json!({"name": column.name, "type": kind(column), "doc": doc}),
        }
    };
    let fields: Vec<_> = columns.iter().map(field).collect();
    json!({"type": "record", "name": name, "namespace": "forebay", "doc": doc, "fields": fields})
}

/// The form, or the fault in our own declaration of it; a test of each row shows that there is none.
pub(crate) type LazyForm = LazyLock<Result<Form, Box<apache_avro::Error>>>;

pub(crate) fn encode<R: Serialize>(
    record: &'static str,
    form: &LazyForm,
    row: &R,
) -> Result<Vec<u8>, EncodeError> {
    let wrong = |detail: String| EncodeError::Avro { record, detail };
    let form = form.as_ref().map_err(|error| wrong(error.to_string()))?;
    let write = || {
        let mut bytes = form.header.clone();
        GenericDatumWriter::builder(&form.schema).build()?.write_ser(&mut bytes, row)?;
        Ok(bytes)
    };
    write().map_err(|error: apache_avro::Error| wrong(error.to_string()))
}

pub(crate) fn decode<R: DeserializeOwned>(
    record: &'static str,
    form: &LazyForm,
    body: &[u8],
) -> Result<R, DecodeError> {
    let wrong = |detail: String| DecodeError::Avro { record, detail };
    let form = form.as_ref().map_err(|error| wrong(error.to_string()))?;
    let Some((written, mut datum)) = form.split(body) else { return Err(wrong(foreign(body, form))) };
    // A column that was not there then has no bytes; the type of the row reads it as null.
    let mut read = || GenericDatumReader::builder(&written.schema).build()?.read_deser(&mut datum);
    let row = read().map_err(|error: apache_avro::Error| wrong(error.to_string()))?;
    match datum.len() {
        0 => Ok(row),
        rest => Err(wrong(format!("{rest} bytes follow the row"))),
    }
}

/// Why these bytes do not start as the rows of this form do.
fn foreign(body: &[u8], form: &Form) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match body {
        [0xC3, 0x01, rest @ ..] if rest.len() >= 8 => {
            let (theirs, ours) = (hex(&rest[..8]), hex(&form.header[2..]));
            format!("its schema has the fingerprint {theirs}; the one known here is {ours}")
        }
        _ => "it does not start with C3 01 and a fingerprint of eight bytes".to_owned(),
    }
}

/// Declares a row: its struct, its columns with unit and meaning, its Avro form.
macro_rules! row {
    (
        $(#[doc = $doc:literal])+
        $name:ident, $key:ident;
        $( $(#[doc = $meaning:literal])+ $column:ident: $kind:ty $([$unit:literal])?, )*
    ) => {
        $(#[doc = $doc])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        pub struct $name { $( $(#[doc = $meaning])+ pub $column: $kind, )* }

        impl $name {
            /// All columns, in the order of the wire.
            pub const COLUMNS: &'static [crate::Column] = &[$(crate::Column {
                name: stringify!($column),
                avro: <$kind as crate::row::Cell>::AVRO,
                nullable: <$kind as crate::row::Cell>::NULLABLE,
                unit: concat!($($unit)?),
                meaning: concat!($($meaning),+).trim_ascii_start(),
            }),*];

            /// The published Avro schema.
            pub fn avro() -> serde_json::Value {
                crate::row::avro(stringify!($name), concat!($($doc),+).trim_ascii_start(), Self::COLUMNS)
            }

            /// The bytes that stand before a row, with the schema that it then has: the present form, then each older one.
            pub fn forms() -> Result<Vec<(Vec<u8>, serde_json::Value)>, crate::EncodeError> {
                let doc = concat!($($doc),+).trim_ascii_start();
                crate::row::forms(stringify!($name), doc, Self::COLUMNS, &FORM)
            }
        }

        impl crate::Record for $name {
            const NAME: &'static str = stringify!($name);
            fn decode(body: &[u8]) -> Result<Self, crate::DecodeError> {
                crate::row::decode(Self::NAME, &FORM, body)
            }
            fn encode(&self) -> Result<Option<Vec<u8>>, crate::EncodeError> {
                crate::row::encode(Self::NAME, &FORM, self).map(Some)
            }
            fn key(&self) -> Option<&str> {
                Some(&self.$key)
            }
        }

        static FORM: crate::row::LazyForm = std::sync::LazyLock::new(|| {
            crate::row::Form::of(stringify!($name), concat!($($doc),+).trim_ascii_start(), $name::COLUMNS)
        });
    };
}
pub(crate) use row;

/// Declares a row that anyone may write, as JSON: its struct and its columns with unit and meaning. A column with
/// `= default` may be left out; columns after `shares:` are fractions, and a row with one that is none is refused.
macro_rules! json_row {
    (
        $(#[doc = $doc:literal])+
        $name:ident, $key:ident, shares: [$($share:ident),*];
        $( $(#[doc = $meaning:literal])+ $column:ident: $kind:ty $([$unit:literal])? $(= $default:ident)?, )*
    ) => {
        $(#[doc = $doc])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        pub struct $name { $( $(#[doc = $meaning])+ $(#[serde($default)])? pub $column: $kind, )* }

        impl $name {
            /// All columns, in the order of the table.
            pub const COLUMNS: &'static [crate::Column] = &[$(crate::Column {
                name: stringify!($column),
                avro: <$kind as crate::row::Cell>::AVRO,
                nullable: <$kind as crate::row::Cell>::NULLABLE,
                unit: concat!($($unit)?),
                meaning: concat!($($meaning),+).trim_ascii_start(),
            }),*];
        }

        impl crate::Record for $name {
            const NAME: &'static str = stringify!($name);
            fn decode(body: &[u8]) -> Result<Self, crate::DecodeError> {
                let row: Self = crate::from_json(body)?;
                $(
                    // Beyond, no estimate could be made of the table that holds it.
                    if row.$share.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
                        let fault = concat!(stringify!($share), " is a fraction from 0 to 1");
                        return Err(crate::DecodeError::Meaning { record: Self::NAME, fault });
                    }
                )*
                Ok(row)
            }
            fn encode(&self) -> Result<Option<Vec<u8>>, crate::EncodeError> {
                crate::to_json(self)
            }
            fn key(&self) -> Option<&str> {
                Some(self.$key.as_str())
            }
        }
    };
}
pub(crate) use json_row;
