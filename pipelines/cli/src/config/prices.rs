//! The files that say what models cost: one, or several of which each holds from a day on.

use crate::console::wrong;
use anyhow::Context as _;
use forebay_calls::Prices;
use forebay_operator::Clock;
use std::{fs, io::Read as _};

/// LiteLLM's own table has about 1.5 MB.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Each with the day from which it holds; none where it always does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PriceFiles(Vec<(Option<String>, String)>);

impl PriceFiles {
    /// `old.json,2026-12-01=new.json`.
    pub fn of(text: &str) -> Self {
        let files = text.split(',').map(str::trim).filter(|file| !file.is_empty());
        let dated = files.map(|file| match file.split_once('=') {
            Some((day, file)) => (Some(day.trim().to_owned()), file.trim().to_owned()),
            None => (None, file.to_owned()),
        });
        Self(dated.collect())
    }

    /// The prices in them; none where no file is named.
    pub fn read(&self) -> anyhow::Result<Option<Prices>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let mut prices = Prices::new(Clock::System);
        for (day, file) in &self.0 {
            let mut text = String::new();
            let read =
                fs::File::open(file).and_then(|opened| opened.take(FILE_BYTES_MAX).read_to_string(&mut text));
            read.map_err(|fault| wrong(format!("could not read table of prices {file}: {fault}")))?;
            prices = prices.with_table(file, &text, day.as_deref()).map_err(wrong).context("prices")?;
        }
        Ok(Some(prices))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_may_hold_from_a_day_on() {
        let files = PriceFiles::of("old.json, 2026-12-01=new.json");
        let new = (Some("2026-12-01".to_owned()), "new.json".to_owned());
        assert_eq!(files, PriceFiles(vec![(None, "old.json".to_owned()), new]));
        assert!(PriceFiles::of("").read().unwrap().is_none());
        let gone = PriceFiles::of("/nowhere/prices.json").read().err().unwrap();
        assert!(
            gone.to_string().starts_with("could not read table of prices /nowhere/prices.json: "),
            "{gone}"
        );
    }
}
