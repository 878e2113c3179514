//! All that on S3: tables whose commits rest on conditional puts, written, joined and rolled up by two at once, and killed at each.
//!
//! `FOREBAY_TEST_S3` names a bucket by its URL; without one this is skipped, and in CI that is a failure.

use super::*;
use futures::future::join_all;
use tables_store::{Error, PutMode, PutOptions, path::Path};

impl World {
    /// With tables in a bucket.
    async fn on_s3() -> Option<Self> {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(bucket) = set("FOREBAY_TEST_S3") else {
            let is_quick = set("FOREBAY_TEST_QUICK").is_some();
            assert!(set("CI").is_none() || is_quick, "FOREBAY_TEST_S3 is not set; tests/run has it");
            println!("skipped: there is no S3; tests/run has it");
            return None;
        };
        let (endpoint, bucket) = bucket.rsplit_once('/').unwrap();
        let mut world = Self::new().await;
        let root = format!("s3://{bucket}/{}/", world.prefix.trim_end_matches('-'));
        let options = [
            ("aws_endpoint", endpoint),
            ("aws_allow_http", "true"),
            ("aws_region", "us-east-1"),
            ("aws_access_key_id", "anyone"),
            ("aws_secret_access_key", "anything"),
        ];
        let options = options.map(|(name, value)| (name.to_owned(), value.to_owned()));
        world.tables = (Url::parse(&root).unwrap(), options.into());
        // Once, before they leave: a server of one request after the other would be busy with nothing else.
        world.compact_ms = 3_600_000;
        Some(world)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_s3_two_that_race_and_are_killed_write_join_and_roll_up_each_row_once() {
    let Some(mut world) = World::on_s3().await else { return };
    for point in ["sink.written:1", "sink.checked:1", "compact.written:1", "rollup.written:1"] {
        world.write(100).await;
        assert_eq!(world.to_the_end(point, Some(point)).await.signal(), Some(SIGABRT), "{point}");
    }
    world.write(500).await;
    // Each of them reads all of it, and looks after all of the files.
    let mut sinks = ["one", "other"].map(|group| world.sink(group, &["--once"], None));
    world.write(500).await;
    for sink in &mut sinks {
        assert!(timeout(LIMIT, sink.wait()).await.expect("the sink ends").unwrap().success());
    }
    assert!(world.to_the_end("last", None).await.success());
    world.check().await;
    assert_eq!((world.files().await, world.check_stored().await), (3, 3), "a file a day, and each rolled up");
    world.check_counts().await;
}

/// A race of sinks may be won without it, so what their commits rest on is looked at by itself.
#[tokio::test(flavor = "multi_thread")]
async fn on_s3_of_several_that_create_one_object_one_does_and_the_others_are_told() {
    let Some(world) = World::on_s3().await else { return };
    let store = world.open(Table::Labels).await.object_store();
    for object in 0..10 {
        let path = Path::from(format!("races/{object}"));
        let create = || PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let puts = (0..8_u8).map(|writer| store.put_opts(&path, vec![writer; 10_000].into(), create()));
        let (done, refused): (Vec<_>, Vec<_>) = join_all(puts).await.into_iter().partition(Result::is_ok);
        assert_eq!(done.len(), 1, "{path}");
        assert!(refused.iter().all(|put| matches!(put, Err(Error::AlreadyExists { .. }))), "{refused:?}");
    }
}
