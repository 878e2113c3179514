//! Logs to stderr: text for a person at a terminal, one JSON object a line for everybody else.
//!
//! Invariant: prompts, answers and keys never appear. Ours are not logged in the first place; the libraries below, which
//! print what they send and receive when asked for detail, are held to `info` whatever the filter says.

use std::io::{IsTerminal, stderr};
use tracing::{Level, Metadata};
use tracing_subscriber::{
    Layer,
    filter::{Targets, filter_fn},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// The variable that sets the filter, such as `info,forebay_runtime=debug`.
pub const FILTER_VARIABLE: &str = "FOREBAY_LOG";

/// What is logged unless somebody asks for more. librdkafka reports every reconnection, and the SDK every export.
pub const FILTER_DEFAULT: &str = "info,librdkafka=warn,rdkafka=warn,opentelemetry=warn";

/// Libraries through whose hands prompts and keys go.
const HELD_TO_INFO: [&str; 8] =
    ["h2", "hyper", "hyper_util", "librdkafka", "rdkafka", "redis", "reqwest", "tower"];

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Text where stderr is a terminal, JSON where it is not.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
    /// For a person.
    Text,
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// The filter is none.
    #[error("log filter {filter:?} from {origin} is not one such as \"info,forebay_runtime=debug\"")]
    Filter {
        /// The filter.
        filter: String,
        /// Where it was set.
        origin: &'static str,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Logs already go somewhere.
    #[error("logging was already set up")]
    Twice {
        /// What happened.
        #[source]
        source: tracing_subscriber::util::TryInitError,
    },
}

/// Logs to stderr from now on, for the whole process. The filter is that of [`FILTER_VARIABLE`] where that is set, then
/// `filter`, then [`FILTER_DEFAULT`].
pub fn init(format: Format, filter: Option<&str>) -> Result<(), InitError> {
    let variable = std::env::var(FILTER_VARIABLE).ok();
    let filter = choose(variable.as_deref(), filter)?;
    let terminal = stderr().is_terminal();
    let json = match format {
        Format::Auto => !terminal,
        Format::Json => true,
        Format::Text => false,
    };
    let lines = if json {
        fmt::layer().json().flatten_event(true).with_writer(stderr).boxed()
    } else {
        fmt::layer().with_ansi(terminal).with_writer(stderr).boxed()
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(filter_fn(may_be_logged)).with(lines);
    subscriber.try_init().map_err(|source| InitError::Twice { source })
}

fn choose(variable: Option<&str>, given: Option<&str>) -> Result<Targets, InitError> {
    let (filter, origin) = match (variable.filter(|filter| !filter.trim().is_empty()), given) {
        (Some(filter), _) => (filter, FILTER_VARIABLE),
        (None, Some(filter)) => (filter, "the settings"),
        (None, None) => (FILTER_DEFAULT, "the default"),
    };
    filter.parse().map_err(|source| InitError::Filter { filter: filter.to_owned(), origin, source })
}

fn may_be_logged(metadata: &Metadata<'_>) -> bool {
    let root = metadata.target().split("::").next().unwrap_or_default();
    *metadata.level() <= Level::INFO || !HELD_TO_INFO.contains(&root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(filter: &str, log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let layer = fmt::layer().with_ansi(false).with_writer(move || writer.clone());
        let filter = choose(Some(filter), None).unwrap();
        let subscriber =
            tracing_subscriber::registry().with(filter).with(filter_fn(may_be_logged)).with(layer);
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(lines.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn what_libraries_send_is_not_logged_whatever_the_filter_says() {
        let lines = logged("trace", || {
            tracing::trace!(target: "hyper::proto::h1::io", "the prompt");
            tracing::debug!(target: "h2", "the prompt");
            tracing::debug!(target: "forebay_runtime", "a detail of ours");
            tracing::warn!(target: "hyper", "a warning");
        });
        assert!(!lines.contains("the prompt"), "{lines}");
        assert!(lines.contains("a detail of ours") && lines.contains("a warning"), "{lines}");
    }

    #[test]
    fn the_default_keeps_reconnections_out() {
        let lines = logged("", || ());
        assert_eq!(lines, "");
        let lines = logged(FILTER_DEFAULT, || {
            tracing::info!(target: "librdkafka", "reconnecting");
            tracing::error!(target: "librdkafka", "all brokers down");
            tracing::info!(target: "forebay", "ready");
        });
        assert!(!lines.contains("reconnecting"), "{lines}");
        assert!(lines.contains("all brokers down") && lines.contains("ready"), "{lines}");
    }

    #[test]
    fn a_filter_that_is_none_is_refused_with_its_origin() {
        let error = choose(Some("forebay=loud"), None).unwrap_err().to_string();
        assert!(error.contains("\"forebay=loud\" from FOREBAY_LOG"), "{error}");
        let error = choose(Some(" "), Some("info,h2=loud")).unwrap_err().to_string();
        assert!(error.contains("from the settings"), "{error}");
    }
}
