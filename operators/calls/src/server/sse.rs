//! Server-sent events (WHATWG HTML, section 9.2), as far as models use them: the data of each event, in order.
//!
//! Of our own, as the libraries looked at panic on a byte order mark that comes by itself, or read the rest again and again once
//! a byte is no UTF-8, and what a server sends must do neither.
//!
//! Invariant: whatever bytes come, and wherever they are cut, events are the same; each byte is looked at once.

use super::api::malformed;
use crate::CallError;
use std::collections::VecDeque;

/// Events out of bytes. Who feeds it bounds how many.
#[derive(Default)]
pub(super) struct Events {
    line: Vec<u8>,
    /// Whether the last byte was a carriage return, whose line feed may still come.
    is_after_return: bool,
    is_begun: bool,
    /// The data of the event that is not whole yet.
    data: Option<String>,
    whole: VecDeque<String>,
}

impl Events {
    /// Takes bytes in.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        for &byte in bytes {
            match byte {
                b'\n' if self.is_after_return => {}
                b'\n' | b'\r' => self.end_line()?,
                byte => self.line.push(byte),
            }
            self.is_after_return = byte == b'\r';
        }
        Ok(())
    }

    /// The data of the next event that is whole.
    pub(super) fn next(&mut self) -> Option<String> {
        self.whole.pop_front()
    }

    fn end_line(&mut self) -> Result<(), CallError> {
        let line = std::mem::take(&mut self.line);
        let line = str::from_utf8(&line).map_err(|error| malformed("no UTF-8").because(error))?;
        let is_first = !std::mem::replace(&mut self.is_begun, true);
        let line = line.strip_prefix('\u{feff}').filter(|_| is_first).unwrap_or(line);
        if line.is_empty() {
            self.whole.extend(self.data.take());
            return Ok(());
        }
        // A line that begins with a colon is a comment; names and ids of events say nothing that their data does not.
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        if field == "data" {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) => data.extend(["\n", value]),
                None => self.data = Some(value.to_owned()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], expected: &[&str]) {
        for size in 1..=bytes.len().max(1) {
            let mut events = Events::default();
            bytes.chunks(size).for_each(|part| events.feed(part).unwrap());
            let seen: Vec<_> = std::iter::from_fn(|| events.next()).collect();
            assert_eq!(seen, expected, "{:?} by {size}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn events_end_with_an_empty_line_whatever_ends_a_line() {
        check(b"data: a\n\ndata: b\r\n\r\ndata: c\r\rdata: d\n", &["a", "b", "c"]);
        check(b"data: a\r\n\ndata:b\n\r\n", &["a", "b"]);
        check("data: ü✓😀\n\n".as_bytes(), &["ü✓😀"]);
    }

    #[test]
    fn what_is_no_data_is_passed_over() {
        check(b"\xef\xbb\xbf: hello\n\ndata: a\n\n", &["a"]);
        check(b"\xef\xbb\xbfdata: a\n\n", &["a"]);
        check(b"event: e\nid: 7\nretry: 5\n: x\n\n\n\nevent: e\ndata: a\n\n", &["a"]);
        check(b"data: a\ndata:  b\ndata\n\n", &["a\n b\n"]);
        check(b"", &[]);
    }

    #[test]
    fn bytes_that_are_no_text_are_an_error() {
        let mut events = Events::default();
        assert_eq!(events.feed(b"data: \xff\n").unwrap_err().code, "model_malformed");
    }
}
