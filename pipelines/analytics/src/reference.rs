//! Writes SQL.md, the reference of every table, view, column and function, from what declares them.
//!
//! Invariant: the page says what a session has. The test below fails where it does not, and writes it with FOREBAY_UPDATE=1.

use crate::functions::FUNCTIONS;
use crate::guards::{Limits, Scope};
use crate::session::tests::Tables;
use crate::shell::sql_type;
use crate::table::Table;
use crate::views::VIEWS;
use crate::{kafka_table, live};
use std::fmt::Write as _;

async fn page() -> String {
    let session = Tables::new().session(Limits::default(), Scope::All);
    let mut page = String::from(
        "# SQL reference\n\n\
         The tables, views and functions of `forebay sql`, as src/table.rs, src/views/ and src/functions/ declare them. A test fails where\n\
         this page is stale; `FOREBAY_UPDATE=1 cargo test -p forebay-analytics --lib reference` writes it anew. How to ask is told in\n\
         pipelines/guides/sql.md; SQL itself is DataFusion's.\n\n\
         Money is in nano-USD, whole numbers of 10⁻⁹ USD. What is not known is null and never 0.\n",
    );
    for table in Table::ALL.iter().chain(Table::ROLLUPS) {
        let (name, topic, time) = (table.name(), table.topic(), table.time_column());
        let from = match table.source() {
            Some(source) => format!(
                "Of `{}`, by the hour: rows that are alike are one, added up. Days that are over are stored and outlive their \
                 rows; all others are worked out when asked, so it says what `{}` says up to now. A bound on `date` spares reading \
                 the rest.",
                source.name(),
                source.name()
            ),
            None => {
                format!("From the topic `{topic}`. A bound on `{time}` or `date` spares reading the rest.")
            }
        };
        let _ = write!(page, "\n## Table {name}\n\n{from}\n\n");
        page.push_str("| Column | Type | Null | Unit | Meaning |\n|---|---|---|---|---|\n");
        for column in table.columns() {
            let (kind, null) =
                (sql_type(&column.kind.arrow()), if column.nullable { "may be" } else { "never" });
            let _ = writeln!(
                page,
                "| `{}` | {kind} | {null} | {} | {} |",
                column.name, column.unit, column.meaning
            );
        }
    }
    for view in VIEWS {
        let schema = session.columns(view.name).await.unwrap().unwrap();
        let _ = write!(page, "\n## View {}\n\n{}\n\n", view.name, view.meaning());
        page.push_str("| Column | Type | Unit | Meaning |\n|---|---|---|---|\n");
        for (column, field) in view.columns().iter().zip(schema.fields()) {
            let kind = sql_type(field.data_type());
            let _ = writeln!(page, "| `{}` | {kind} | {} | {} |", column.name, column.unit, column.meaning);
        }
    }
    let _ = write!(page, "\n## View {}\n\n{}\n", live::NAME, live::MEANING);
    let _ = write!(
        page,
        "\n## Topics\n\n| Function | Meaning |\n|---|---|\n| `{}` | {} |\n",
        kafka_table::CALL,
        kafka_table::MEANING
    );
    for (title, is_aggregate) in [("Functions of a row", false), ("Functions of many rows", true)] {
        let _ = write!(page, "\n## {title}\n\n| Function | Meaning |\n|---|---|\n");
        for function in FUNCTIONS.iter().filter(|function| function.is_aggregate == is_aggregate) {
            let _ = writeln!(page, "| `{}` | {} |", function.call, function.meaning);
        }
    }
    page
}

#[tokio::test]
async fn the_reference_is_not_stale() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/SQL.md");
    let now = page().await;
    if std::env::var_os("FOREBAY_UPDATE").is_some_and(|value| value == "1") {
        std::fs::write(path, &now).unwrap();
    }
    let was = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        was == now,
        "pipelines/analytics/SQL.md is stale; FOREBAY_UPDATE=1 cargo test -p forebay-analytics --lib reference writes it anew"
    );
}
