//! The seam: whatever is written, brought in and asked in whatever order, each row is seen once.

use super::*;
use crate::decode::{Decoder, Message};
use crate::guards::{Limits, Scope};
use crate::kafka_table::tests::World;
use crate::lake;
use crate::session::tests::shown;
use arrow::array::RecordBatch;
use deltalake_core::kernel::Transaction;
use deltalake_core::kernel::transaction::CommitProperties;
use forebay_schemas::{Headers, Outcome, Record as _};
use proptest::prelude::*;

const OUTCOME: &[u8] = include_bytes!("../../../../schemas/golden/v0.1/outcome.avro");
const PARTITIONS: i32 = 2;

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// So many rows are written to a partition.
    Write { partition: i32, rows: usize },
    /// The sink brings in so many of those of a partition that are not in the table yet.
    BringIn { partition: i32, rows: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let rows = || (0..PARTITIONS, 1..6usize);
    prop_oneof![
        rows().prop_map(|(partition, rows)| Step::Write { partition, rows }),
        rows().prop_map(|(partition, rows)| Step::BringIn { partition, rows }),
    ]
}

/// What was written to each partition, and how much of it is in the table.
struct Seam {
    world: World,
    written: Vec<Vec<Vec<u8>>>,
    brought_in: Vec<usize>,
}

impl Seam {
    async fn new() -> Self {
        let world = World::new("outcomes", PARTITIONS).await;
        Self { world, written: vec![Vec::new(); 2], brought_in: vec![0; 2] }
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Write { partition, rows } => {
                for _ in 0..rows {
                    let index = usize::try_from(partition).unwrap();
                    let number = self.written[index].len();
                    let tenant = if number.is_multiple_of(2) { "acme" } else { "globex" }.to_owned();
                    let row = Outcome {
                        request_id: format!("{partition}/{number}"),
                        tenant,
                        ..Outcome::decode(OUTCOME).unwrap()
                    };
                    let row = row.encode().unwrap().unwrap();
                    self.world.send("outcomes", partition, 0, &row).await;
                    self.written[index].push(row);
                }
            }
            Step::BringIn { partition, rows } => self.bring_in(partition, rows).await,
        }
    }

    /// Files and offset in one version, as the sink does.
    async fn bring_in(&mut self, partition: i32, rows: usize) {
        let index = usize::try_from(partition).unwrap();
        let from = self.brought_in[index];
        let to = (from + rows).min(self.written[index].len());
        if from == to {
            return;
        }
        let message = |number: usize| Message {
            offset: i64::try_from(number).unwrap(),
            timestamp_ms: 0,
            key: None,
            value: Some(self.written[index][number].clone().into()),
            headers: Headers::new(),
        };
        let messages: Vec<Message> = (from..to).map(message).collect();
        let batch = Decoder::new(TABLE).unwrap().read(&messages).unwrap().batch;
        let live = Live::new(self.world.kafka.clone(), "outcomes".to_owned());
        let application = format!("{}/{partition}", live.application().await.unwrap());
        let last = Transaction::new(application, i64::try_from(to - 1).unwrap());
        let table = lake::open(&self.world.tables.root(), &lake::Options::default(), TABLE).await.unwrap();
        let properties = CommitProperties::default().with_application_transactions(vec![last]);
        table.write(vec![batch]).with_commit_properties(properties).await.unwrap();
        self.brought_in[index] = to;
    }

    async fn check(&self) {
        let count = |of: &Vec<Vec<Vec<u8>>>| of.iter().map(Vec::len).sum::<usize>();
        let written = count(&self.written);
        let session = self.world.session(Limits::default(), Scope::All);
        let counted = "SELECT count(*), count(DISTINCT request_id) FROM requests_live";
        assert_eq!(shown(&session.collect(counted).await.unwrap()), format!("{written} {written}"));
        let both = "SELECT (SELECT count(*) FROM outcomes) AS stored, count(*) AS seen FROM requests_live WHERE request_id LIKE '1/%'";
        let stored: usize = self.brought_in.iter().sum();
        assert_eq!(
            shown(&session.collect(both).await.unwrap()),
            format!("{stored} {}", self.written[1].len())
        );
        let sorted =
            session.collect("SELECT request_id FROM requests_live ORDER BY request_id").await.unwrap();
        assert_eq!(sorted.iter().map(RecordBatch::num_rows).sum::<usize>(), written);
        let scoped = self.world.session(Limits::default(), Scope::Tenants(vec!["acme".to_owned()]));
        let of_acme: usize = self.written.iter().map(|rows| rows.len().div_ceil(2)).sum();
        let counted = "SELECT count(*), count(DISTINCT tenant) FROM requests_live";
        assert_eq!(
            shown(&scoped.collect(counted).await.unwrap()),
            format!("{of_acme} {}", usize::from(of_acme > 0))
        );
    }
}

#[test]
fn a_row_is_seen_once_whatever_was_brought_in_when() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let cases = ProptestConfig {
        cases: 5,
        max_shrink_iters: 20,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(cases, |(steps in proptest::collection::vec(step(), 1..9))| {
        runtime.block_on(async {
            let mut seam = Seam::new().await;
            seam.check().await;
            for step in steps {
                seam.take(step).await;
                seam.check().await;
            }
        });
    });
}

#[test]
fn a_range_begins_behind_what_is_in_the_table() {
    let check = |from, to, last, expected: (i64, i64)| {
        let mut range = Range { partition: 0, from, to };
        behind(&mut range, last, "t");
        assert_eq!((range.from, range.to), expected);
    };
    check(0, 10, None, (0, 10));
    check(0, 10, Some(3), (4, 10));
    check(0, 10, Some(9), (10, 10));
    // The table was brought further than the topic went when it was asked.
    check(0, 10, Some(12), (13, 13));
    check(6, 10, Some(3), (6, 10));
}

#[tokio::test]
async fn without_kafka_it_is_what_is_in_the_table() {
    let tables = crate::session::tests::Tables::new();
    assert_eq!(tables.ask("SELECT count(*) FROM requests_live").await, "0");
    let row = serde_json::json!({"tenant": "acme"});
    tables.add(TABLE, &[row]).await;
    assert_eq!(tables.ask("SELECT count(*) FROM requests_live").await, "1");
}
