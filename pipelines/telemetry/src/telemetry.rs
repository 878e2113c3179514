//! Starts and ends the telling of a process.
//!
//! Metrics are always kept, for the admin port. With a collector they and the spans are also sent to it, by threads of
//! the SDK's own, so that neither a slow collector nor a busy runtime stops the other.
//!
//! Invariant: where no collector is set, nothing is sent and no span is made.

use crate::{
    AlertMeter, GenAi, StepMeter,
    events::Events,
    instruments::DECLARED,
    meter::Instruments,
    pool::{self, Endpoint},
    span,
    tables::{self, TableMeter},
};
use forebay_operator::Event;
use opentelemetry::{KeyValue, metrics::MeterProvider, trace::TracerProvider};
use opentelemetry_otlp::{MetricExporter, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    metrics::{Instrument, PeriodicReader, SdkMeterProvider, Stream},
    trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider},
};
use prometheus::{Registry, TextEncoder};
use std::{fmt, sync::Arc, time::Duration};
use tokio::sync::oneshot;
use tracing::warn;

/// How long the collector may take for a batch.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a process that ends waits for the collector: a part of the seconds that an orchestrator gives it.
const END_MAX: Duration = Duration::from_secs(2);
/// Finished spans that wait to be sent; more are dropped. About 10 MiB.
const SPANS_WAITING_MAX: usize = 8_192;
/// Who made the spans and instruments, as OpenTelemetry asks.
const SCOPE: &str = "forebay";

/// What a process says of itself, and to whom.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Such as `forebay`.
    pub service_name: String,
    /// Such as `0.1.0`.
    pub service_version: String,
    /// Tells this process from its like, such as a host and a process id; `None` leaves it out.
    pub service_instance: Option<String>,
    /// A collector that speaks OTLP over HTTP, such as `http://collector:4318`.
    pub otlp_endpoint: Option<String>,
    /// The share, 0 to 1, of the traces that begin here and are recorded. Others keep the decision of their root.
    pub sample_ratio: f64,
    /// How often metrics go to the collector.
    pub metric_interval: Duration,
    /// What calls of models are told under.
    pub gen_ai: GenAi,
}

impl Settings {
    /// Settings without a collector.
    pub fn new(service_name: impl Into<String>, service_version: impl Into<String>) -> Self {
        Self {
            service_name: service_name.into(),
            service_version: service_version.into(),
            service_instance: None,
            otlp_endpoint: None,
            sample_ratio: 1.0,
            metric_interval: Duration::from_secs(15),
            gen_ai: GenAi::default(),
        }
    }

    fn resource(&self) -> Resource {
        let version = KeyValue::new("service.version", self.service_version.clone());
        let instance = self.service_instance.clone().map(|id| KeyValue::new("service.instance.id", id));
        let resource = Resource::builder_empty().with_service_name(self.service_name.clone());
        resource.with_attribute(version).with_attributes(instance).build()
    }
}

/// Why telling could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address of the collector is none.
    #[error("collector {endpoint:?} is not an address such as http://collector:4318")]
    Endpoint {
        /// The address.
        endpoint: String,
    },
    /// The share of traces is none.
    #[error("sample ratio {ratio} is not between 0 and 1")]
    SampleRatio {
        /// The share.
        ratio: f64,
    },
    /// The client of the collector could not be made.
    #[error("could not prepare sending to collector {endpoint:?}")]
    Exporter {
        /// The address.
        endpoint: String,
        /// What happened.
        #[source]
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// The metrics could not be registered for Prometheus.
    #[error("could not register the metrics for prometheus")]
    Prometheus {
        /// What happened.
        #[source]
        source: opentelemetry_sdk::error::OTelSdkError,
    },
}

/// Metrics and traces of a process. A clone tells the same.
#[derive(Clone)]
pub struct Telemetry(Arc<Inner>);

struct Inner {
    registry: Registry,
    meters: SdkMeterProvider,
    tracers: Option<(SdkTracerProvider, SdkTracer)>,
    steps: Arc<Instruments>,
    events: Events,
    tables: Arc<tables::Instruments>,
    alerts: AlertMeter,
}

impl Telemetry {
    /// Starts telling.
    pub fn start(settings: Settings) -> Result<Self, StartError> {
        if !(0.0..=1.0).contains(&settings.sample_ratio) {
            return Err(StartError::SampleRatio { ratio: settings.sample_ratio });
        }
        let collector = settings.otlp_endpoint.as_deref().map(Collector::new).transpose()?;
        let registry = Registry::new();
        let meters = meters(&settings, &registry, collector.as_ref())?;
        let tracers = collector.map(|collector| tracers(&settings, &collector)).transpose()?;
        let meter = meters.meter(SCOPE);
        Ok(Self(Arc::new(Inner {
            registry,
            tracers: tracers.map(|provider| (provider.clone(), provider.tracer(SCOPE))),
            steps: Arc::new(Instruments::new(&meter)),
            events: Events::new(&meter, settings.gen_ai),
            tables: Arc::new(tables::Instruments::new(&meter)),
            alerts: AlertMeter::new(&meter),
            meters,
        })))
    }

    /// What the step `stage`, which runs `operator`, counts with.
    pub fn step(&self, stage: &str, operator: &'static str) -> StepMeter {
        let tracer = self.0.tracers.as_ref().map(|(_, tracer)| tracer.clone());
        StepMeter::new(&self.0.steps, tracer, stage, operator)
    }

    /// What the sink of a table counts with.
    pub fn table(&self, name: &'static str) -> TableMeter {
        TableMeter::new(Arc::clone(&self.0.tables), name)
    }

    /// What alerts are counted with.
    pub fn alerts(&self) -> AlertMeter {
        self.0.alerts.clone()
    }

    /// Counts what an operator reported; of a model call a span is made too, where spans are.
    pub fn observe(&self, stage: &str, event: &Event) {
        if let (Event::Called(called), Some((_, tracer))) = (event, &self.0.tracers) {
            span::call(tracer, called);
        }
        self.0.events.observe(stage, event);
    }

    /// Tells from now on how the endpoints of a pool stand, as `read` gives them from memory; once in a process.
    pub fn watch_pool(&self, read: impl Fn() -> Vec<Endpoint> + Send + Sync + 'static) {
        pool::watch(&self.0.meters.meter(SCOPE), read);
    }

    /// Counts a piece of an answer, for whoever reads along, that was sent or lost.
    pub fn delta(&self, stage: &str, bytes: usize, is_sent: bool) {
        self.0.events.delta(stage, bytes, is_sent);
    }

    /// All metrics, in the Prometheus text format.
    pub fn prometheus(&self) -> String {
        TextEncoder::new().encode_to_string(&self.0.registry.gather()).unwrap_or_else(|error| {
            warn!(%error, "could not write the metrics as text");
            String::new()
        })
    }

    /// Sends what is left to the collector, for at most two seconds, and ends. Metrics can still be read.
    pub async fn shutdown(&self) {
        if self.0.tracers.is_none() {
            return;
        }
        let (telemetry, (sent, ended)) = (self.clone(), oneshot::channel());
        // A thread of its own: the SDK waits for its own threads, which would stop a runtime's, and a runtime that
        // ends waits for what it may not interrupt.
        let sender = std::thread::Builder::new().name("telemetry-end".to_owned()).spawn(move || {
            telemetry.send_the_rest();
            // Nobody waits any more where it took too long.
            let _ = sent.send(());
        });
        if let Err(error) = sender {
            return warn!(%error, "could not start a thread to send the last telemetry");
        }
        if tokio::time::timeout(END_MAX, ended).await.is_err() {
            warn!(waited_s = END_MAX.as_secs(), "the collector did not take the last telemetry in time");
        }
    }

    fn send_the_rest(&self) {
        if let Some((provider, _)) = &self.0.tracers
            && let Err(error) = provider.shutdown_with_timeout(END_MAX)
        {
            warn!(%error, "could not send the last spans");
        }
        if let Err(error) = self.0.meters.force_flush() {
            warn!(%error, "could not send the last metrics");
        }
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").field("traced", &self.0.tracers.is_some()).finish_non_exhaustive()
    }
}

/// A collector's address, known to be one.
struct Collector<'a>(&'a str);

impl<'a> Collector<'a> {
    fn new(endpoint: &'a str) -> Result<Self, StartError> {
        let not = || StartError::Endpoint { endpoint: endpoint.to_owned() };
        let uri: axum::http::Uri = endpoint.parse().map_err(|_| not())?;
        let http = matches!(uri.scheme_str(), Some("http" | "https"));
        // A query would end up in the middle of the paths that are added.
        if !http || uri.host().is_none_or(str::is_empty) || uri.query().is_some() {
            return Err(not());
        }
        Ok(Self(endpoint.trim_end_matches('/')))
    }

    fn spans(&self) -> Result<SpanExporter, StartError> {
        let exporter = SpanExporter::builder().with_http().with_endpoint(format!("{}/v1/traces", self.0));
        exporter.with_timeout(EXPORT_TIMEOUT).build().map_err(|source| self.refused(source))
    }

    fn metrics(&self) -> Result<MetricExporter, StartError> {
        let exporter = MetricExporter::builder().with_http().with_endpoint(format!("{}/v1/metrics", self.0));
        exporter.with_timeout(EXPORT_TIMEOUT).build().map_err(|source| self.refused(source))
    }

    fn refused(&self, source: opentelemetry_otlp::ExporterBuildError) -> StartError {
        StartError::Exporter { endpoint: self.0.to_owned(), source }
    }
}

fn meters(
    settings: &Settings,
    registry: &Registry,
    collector: Option<&Collector<'_>>,
) -> Result<SdkMeterProvider, StartError> {
    let prometheus = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        // There is one scope; its name on every series would tell nothing.
        .scope_info_enabled(false)
        .build()
        .map_err(|source| StartError::Prometheus { source })?;
    let mut provider = SdkMeterProvider::builder()
        .with_resource(settings.resource())
        .with_reader(prometheus)
        .with_view(within_limit);
    if let Some(collector) = collector {
        let reader = PeriodicReader::builder(collector.metrics()?).with_interval(settings.metric_interval);
        provider = provider.with_reader(reader.build());
    }
    Ok(provider.build())
}

/// Holds each instrument to the number of series that its line of the table allows.
fn within_limit(instrument: &Instrument) -> Option<Stream> {
    let declared = DECLARED.iter().find(|declared| declared.name == instrument.name())?;
    Stream::builder().with_cardinality_limit(declared.series_max).build().ok()
}

fn tracers(settings: &Settings, collector: &Collector<'_>) -> Result<SdkTracerProvider, StartError> {
    let queue = BatchConfigBuilder::default().with_max_queue_size(SPANS_WAITING_MAX).build();
    let processor = BatchSpanProcessor::builder(collector.spans()?).with_batch_config(queue).build();
    Ok(SdkTracerProvider::builder()
        .with_resource(settings.resource())
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(settings.sample_ratio))))
        .with_span_processor(processor)
        .build())
}
