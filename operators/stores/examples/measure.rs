//! Measures the embedded stores on this machine: `cargo run --release -p forebay-stores --example measure`.
//!
//! By hand, and not a test: the figures are the machine's. Those of the README were printed by this.

use std::error::Error;
use std::io::{Write, stdout};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay_stores::vectors::{self, Point};
use forebay_stores::{Database, KeyValue, Vectors, database, key_value};
use futures::future::try_join_all;

const DIMENSIONS: usize = 384;
const POINTS_PER_GROUP: usize = 10;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("store");
    for points in [1_000, 10_000, 100_000] {
        measure_vectors(&path, points).await?;
    }
    measure_key_value(&folder.path().join("entries")).await
}

async fn measure_vectors(path: &std::path::Path, points: usize) -> Result<(), Box<dyn Error>> {
    let mut random = Random(points as u64);
    let name = points.to_string();
    let database = Database::open(path, database::Options::default()).await?;
    let store = vectors::Embedded::open(&database, &name).await?;
    let started = Instant::now();
    for group in 0..points / POINTS_PER_GROUP {
        let point = |at| Point {
            id: format!("{group}:{at}"),
            scope: "tenant".into(),
            vector: random.vector(),
            payload: Bytes::from_static(&[7; 200]),
        };
        store.replace(&group.to_string(), (0..POINTS_PER_GROUP).map(point).collect()).await?;
    }
    database.flush().await?;
    let written = started.elapsed();
    database.close().await?;

    let started = Instant::now();
    let database = Database::open(path, database::Options::default()).await?;
    let store = vectors::Embedded::open(&database, &name).await?;
    let opened = started.elapsed();
    let mut searches = Vec::new();
    for _ in 0..200 {
        let query = random.vector();
        let started = Instant::now();
        store.search(&query, &["tenant"], 10).await?;
        searches.push(started.elapsed());
    }
    let (p50, p99) = percentiles(searches);
    database.close().await?;
    writeln!(
        stdout(),
        "{points} points x {DIMENSIONS}: written in {written:.1?}, opened in {opened:.1?}, search p50 {p50:.1?} p99 {p99:.1?}"
    )?;
    Ok(())
}

async fn measure_key_value(path: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let database = Database::open(path, database::Options::default()).await?;
    let store =
        key_value::Embedded::open(&database, "in memory", key_value::EmbeddedOptions::default()).await?;
    let cold = key_value::EmbeddedOptions { cache_bytes: 0, ..key_value::EmbeddedOptions::default() };
    let file = key_value::Embedded::open(&database, "file only", cold).await?;
    let (store, file): (Arc<dyn KeyValue>, Arc<dyn KeyValue>) = (Arc::new(store), Arc::new(file));
    let value = Bytes::from(vec![7; 1024]);
    let keys: Vec<_> = (0..1_000).map(|number| format!("key {number}")).collect();

    let mut sets = Vec::new();
    for key in &keys {
        let started = Instant::now();
        store.set(key, value.clone(), None).await?;
        sets.push(started.elapsed());
    }
    report("set of 1 KiB, one after the other", sets)?;

    let started = Instant::now();
    let writers = (0..256).map(|writer| {
        let (store, value, keys) = (Arc::clone(&store), value.clone(), keys.clone());
        tokio::spawn(async move {
            for number in 0..200 {
                store.set(&keys[(writer * 7 + number) % keys.len()], value.clone(), None).await?;
            }
            Ok::<_, forebay_stores::Error>(())
        })
    });
    try_join_all(writers).await?.into_iter().collect::<Result<(), _>>()?;
    let rate = 256.0 * 200.0 / started.elapsed().as_secs_f64();
    writeln!(stdout(), "set of 1 KiB, 256 at once: {rate:.0}/s")?;

    let mut batches = Vec::new();
    for _ in 0..100 {
        let entries = keys[..100].iter().map(|key| (key.clone(), Some(value.clone()))).collect();
        let started = Instant::now();
        file.set_many(entries).await?;
        batches.push(started.elapsed());
    }
    report("set_many of 100 x 1 KiB", batches)?;

    let mut flushes = Vec::new();
    for key in &keys[..100] {
        store.set(key, value.clone(), None).await?;
        let started = Instant::now();
        store.flush().await?;
        flushes.push(started.elapsed());
    }
    report("flush after one set", flushes)?;

    for (what, store) in [("get from memory", &store), ("get from the file", &file)] {
        let mut gets = Vec::new();
        for key in keys[..100].iter().cycle().take(10_000) {
            let started = Instant::now();
            store.get(key).await?;
            gets.push(started.elapsed());
        }
        report(what, gets)?;
    }
    database.close().await?;
    let mib = std::fs::metadata(path)?.len() / (1024 * 1024);
    writeln!(
        stdout(),
        "the file of 1,100 entries, after {} writes: {mib} MiB",
        1_000 + 256 * 200 + 10_000 + 100
    )?;
    Ok(())
}

fn report(what: &str, times: Vec<Duration>) -> Result<(), Box<dyn Error>> {
    let (p50, p99) = percentiles(times);
    writeln!(stdout(), "{what}: p50 {p50:.1?} p99 {p99:.1?}")?;
    Ok(())
}

fn percentiles(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

/// xorshift: the same vectors in every run.
struct Random(u64);

impl Random {
    fn vector(&mut self) -> Vec<f32> {
        (0..DIMENSIONS).map(|_| self.component()).collect()
    }

    fn component(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        f32::from(u16::try_from(self.0 & 0xFFFF).unwrap_or_default()) / 32768.0 - 1.0
    }
}
