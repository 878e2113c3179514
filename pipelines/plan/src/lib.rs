//! Reads a pipeline and checks it.
