//! Reads dead letters, each once, with whether it was redriven.
//!
//! A dead letter is written at least once, and once more whenever its record dies again after a redrive, always under
//! one key, so always to one partition. So each partition is read twice: first what lies where is noted of every key,
//! then each letter is shown where it lies, and bodies need not be kept.
//!
//! Invariant: of the letters of one key the one with the most redrives is shown, once; it counts as redriven where a
//! note says so that is younger than it, by the count of redrives and not by a clock.

use crate::{
    args::{DlqFilter, Since},
    scan::{self, Reader, Stretch},
};
use anyhow::bail;
use forebay_operator::Clock;
use forebay_runtime::host::kafka::headers;
use forebay_schemas::{DeadLetter, Headers, dead_letter::Redriven};
use rdkafka::{Message as _, message::BorrowedMessage};
use std::{collections::HashMap, ops::ControlFlow};

/// How many keys of a partition are noted at most; some 200 MB.
const KEYS_MAX: usize = 1_000_000;

/// A dead letter as it lies on its topic.
pub struct Letter {
    /// What its headers say.
    pub letter: DeadLetter,
    /// All of its headers.
    pub headers: Headers,
    /// The bytes of the original.
    pub value: Option<Vec<u8>>,
    /// The key of the message.
    pub key: String,
    /// The partition of the message.
    pub partition: i32,
    /// The offset of the message.
    pub offset: i64,
    /// When it was written, in milliseconds since 1970.
    pub at_ms: i64,
    /// Its redrive, and when that was noted.
    pub redriven: Option<(Redriven, i64)>,
}

/// Which letters are wanted.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub stage: Option<String>,
    pub error: Option<String>,
    pub tenant: Option<String>,
    /// Keys of letters or ids of requests; any where none is given.
    pub names: Vec<String>,
}

impl Filter {
    pub fn new(filter: &DlqFilter, names: Vec<String>) -> Self {
        let DlqFilter { stage, error, tenant, .. } = filter.clone();
        Self { stage, error, tenant, names }
    }

    pub fn wants(&self, Letter { letter, key, .. }: &Letter) -> bool {
        let is =
            |wanted: &Option<String>, there: &str| wanted.as_deref().is_none_or(|wanted| wanted == there);
        let named = |name: &String| name == key || name == letter.id.as_str();
        is(&self.stage, &letter.stage)
            && (is(&self.error, &letter.class) || is(&self.error, &letter.code))
            && is(&self.tenant, letter.tenant.as_str())
            && (self.names.is_empty() || self.names.iter().any(named))
    }
}

/// The time that is meant, in milliseconds since 1970.
pub fn since_ms(since: Option<Since>, clock: Clock) -> Option<i64> {
    Some(match since? {
        Since::At(ms) => ms,
        Since::Ago(ago) => clock.now_ms().saturating_sub(i64::try_from(ago.as_millis()).unwrap_or(i64::MAX)),
    })
}

/// Shows every dead letter that was written since then, partition by partition, until told to stop; how many messages
/// were none. Blocks.
pub fn each(
    reader: &Reader,
    topic: &str,
    since_ms: Option<i64>,
    mut show: impl FnMut(Letter) -> anyhow::Result<ControlFlow<()>>,
) -> anyhow::Result<u64> {
    let mut unreadable = 0;
    for stretch in scan::stretches(reader, topic, since_ms)? {
        let mut index = Index::read(reader, topic, stretch, since_ms)?;
        unreadable += index.unreadable;
        let shown = scan::visit(reader, topic, stretch, |message| match index.take(message) {
            Some(letter) => show(letter),
            None => Ok(ControlFlow::Continue(())),
        })?;
        if shown.is_break() {
            break;
        }
    }
    Ok(unreadable)
}

/// What lies where in one partition.
#[derive(Default)]
struct Index {
    keys: HashMap<Box<[u8]>, Noted>,
    unreadable: u64,
}

/// What is known of a key: its youngest letter, and its youngest redrive.
struct Noted {
    offset: i64,
    redrives: u32,
    redriven: Option<Box<(Redriven, i64)>>,
}

impl Index {
    fn read(reader: &Reader, topic: &str, stretch: Stretch, since_ms: Option<i64>) -> anyhow::Result<Self> {
        let mut index = Self::default();
        let _ = scan::visit(reader, topic, stretch, |message| {
            index.note(message, since_ms);
            if index.keys.len() > KEYS_MAX {
                bail!(
                    "{topic}/{} holds more than {KEYS_MAX} dead letters; read fewer of them by --since",
                    stretch.partition
                );
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(index)
    }

    fn note(&mut self, message: &BorrowedMessage<'_>, since_ms: Option<i64>) {
        let (key, headers, at_ms) = (message.key().unwrap_or_default(), headers(message), at_ms(message));
        match (Redriven::read(&headers), DeadLetter::read(&headers)) {
            (Ok(Some(redriven)), _) => {
                // A note follows its letter; a letter that is too old to be read has none.
                if let Some(noted) = self.keys.get_mut(key)
                    && noted.redriven.as_ref().is_none_or(|known| known.0.redrives < redriven.redrives)
                {
                    noted.redriven = Some(Box::new((redriven, at_ms)));
                }
            }
            (Ok(None), Ok(letter)) if since_ms.is_none_or(|since| at_ms >= since) => {
                let (offset, redrives) = (message.offset(), letter.redrives);
                let noted = self.keys.entry(key.into()).or_insert(Noted { offset, redrives, redriven: None });
                if redrives > noted.redrives {
                    (noted.offset, noted.redrives) = (offset, redrives);
                }
            }
            (Ok(None), Ok(_)) => {}
            _ => self.unreadable += 1,
        }
    }

    /// The letter that this message is, if it is the one that counts under its key.
    fn take(&mut self, message: &BorrowedMessage<'_>) -> Option<Letter> {
        let key = message.key().unwrap_or_default();
        let noted = self.keys.get_mut(key).filter(|noted| noted.offset == message.offset())?;
        let redriven = noted.redriven.take().filter(|redriven| redriven.0.redrives > noted.redrives);
        let headers = headers(message);
        Some(Letter {
            letter: DeadLetter::read(&headers).ok()?,
            headers,
            value: message.payload().map(<[u8]>::to_vec),
            key: String::from_utf8_lossy(key).into_owned(),
            partition: message.partition(),
            offset: message.offset(),
            at_ms: at_ms(message),
            redriven: redriven.map(|redriven| *redriven),
        })
    }
}

fn at_ms(message: &BorrowedMessage<'_>) -> i64 {
    message.timestamp().to_millis().unwrap_or_default()
}
