//! Metrics, traces and health.
