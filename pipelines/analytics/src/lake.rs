//! Where the tables lie: opened from a URL, and made where they are missing.
//!
//! Any store will do that can create an object only where there is none: a local folder, or S3 and what speaks it, by
//! conditional put. Commits rest on that and on nothing else: no lock table, no database.
//!
//! Invariant: a table is made with the columns of [`Table`], partitioned by day; one that is there already is not changed
//! unless it lacks columns that were added since, which are then added.

use crate::{
    encode::Encoded,
    table::{DATE, Table},
};
use deltalake_core::{
    DeltaResult, DeltaTable, DeltaTableBuilder, DeltaTableError,
    kernel::{Add, StructField, engine::arrow_conversion::TryIntoKernel as _, transaction::CommitProperties},
    logstore::{
        LogStore, LogStoreFactory, ObjectStoreFactory, ObjectStoreRef, StorageConfig, default_logstore,
        logstore_factories, logstore_for, object_store_factories,
    },
    operations::create::CreateBuilder,
    protocol::SaveMode,
};
use std::{collections::HashMap, sync::Arc};
use tables_store::{ObjectStore, PutMode, PutOptions, aws, path::Path};
use url::Url;

/// Checkpoints are written every so many versions: a reader then opens at most so many small files.
const CHECKPOINT_EVERY: &str = "20";
/// How many columns of a file have statistics: all.
const INDEXED_COLUMNS: &str = "-1";

/// What an object store is told, such as `aws_endpoint`.
pub type Options = HashMap<String, String>;

/// A table that could not be opened or made.
#[derive(Debug, thiserror::Error)]
#[error(
    "could not {doing} table {table} at {url}; check the setting tables, and that the store can be written to"
)]
pub struct Error {
    doing: &'static str,
    table: &'static str,
    url: String,
    #[source]
    source: Box<DeltaTableError>,
}

/// Opens a table below `root`, at its newest version; makes it where it is missing.
pub async fn open(root: &Url, options: &Options, table: Table) -> Result<DeltaTable, Error> {
    register();
    let url = location(root, table);
    let fault = |doing| {
        let url = url.to_string();
        move |source| Error { doing, table: table.name(), url, source: Box::new(source) }
    };
    if url.scheme() == "file"
        && let Ok(folder) = url.to_file_path()
    {
        std::fs::create_dir_all(folder).map_err(|source| fault("make")(DeltaTableError::Io { source }))?;
    }
    let mut opened = builder(&url, options).and_then(DeltaTableBuilder::build).map_err(fault("open"))?;
    if !opened.verify_deltatable_existence().await.map_err(fault("open"))? {
        // Where another process makes it at the same time, one of the two fails, and finds what the other has made.
        if let Err(source) = create(&opened, table).await
            && !opened.verify_deltatable_existence().await.map_err(fault("open"))?
        {
            return Err(fault("make")(source));
        }
    }
    opened.load().await.map_err(fault("open"))?;
    widen(opened, table).await.map_err(fault("add columns to"))
}

/// Opens a table below `root` for reading, at its newest version; nothing where it is missing.
pub async fn find(root: &Url, options: &Options, table: Table) -> Result<Option<DeltaTable>, Error> {
    register();
    let url = location(root, table);
    if url.scheme() == "file" && url.to_file_path().is_ok_and(|folder| !folder.exists()) {
        return Ok(None);
    }
    let load = async {
        let mut found = builder(&url, options)?.build()?;
        if !found.verify_deltatable_existence().await? {
            return Ok(None);
        }
        found.load().await?;
        Ok(Some(found))
    };
    let fault =
        |source| Error { doing: "open", table: table.name(), url: url.to_string(), source: Box::new(source) };
    load.await.map_err(fault)
}

/// The store of all tables, by paths that begin at `root`: for who reads files that the log has named to another.
pub fn store(root: &Url, options: &Options) -> Result<Arc<dyn ObjectStore>, Error> {
    register();
    let store = StorageConfig::parse_options(options).and_then(|config| logstore_for(root, config));
    let fault =
        |source| Error { doing: "open", table: "files", url: root.to_string(), source: Box::new(source) };
    Ok(store.map_err(fault)?.object_store(None))
}

/// Where a table lies.
pub fn location(root: &Url, table: Table) -> Url {
    let mut url = root.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().push(table.name());
    }
    url
}

/// Writes a file that no version names yet; what names it. It is created and never overwritten: one that stood still for long must not
/// put other bytes where a version looks.
pub async fn write(
    table: &DeltaTable,
    path: &str,
    file: Encoded,
    now_ms: i64,
) -> Result<Add, tables_store::Error> {
    let size = i64::try_from(file.bytes.len()).unwrap_or(i64::MAX);
    let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    table.object_store().put_opts(&Path::from(path), file.bytes.into(), create).await?;
    Ok(Add {
        path: path.to_owned(),
        partition_values: HashMap::from([(DATE.to_owned(), Some(file.date))]),
        size,
        modification_time: now_ms,
        data_change: true,
        stats: Some(file.stats),
        tags: None,
        deletion_vector: None,
        base_row_id: None,
        default_row_commit_version: None,
        clustering_provider: None,
    })
}

fn builder(url: &Url, options: &Options) -> DeltaResult<DeltaTableBuilder> {
    Ok(DeltaTableBuilder::from_url(url.clone())?.with_storage_options(options.clone()))
}

fn fields(table: Table) -> DeltaResult<Vec<StructField>> {
    let schema = table.schema();
    let fields = schema.fields().iter().map(|field| field.as_ref().try_into_kernel());
    Ok(fields.collect::<Result<_, _>>()?)
}

async fn create(opened: &DeltaTable, table: Table) -> DeltaResult<DeltaTable> {
    let properties = [
        ("delta.appendOnly", "false"),
        ("delta.checkpointInterval", CHECKPOINT_EVERY),
        ("delta.dataSkippingNumIndexedCols", INDEXED_COLUMNS),
    ];
    CreateBuilder::new()
        .with_log_store(opened.log_store())
        .with_table_name(table.name())
        .with_columns(fields(table)?)
        .with_partition_columns([DATE])
        .with_configuration(properties.map(|(name, value)| (name, Some(value))))
        .with_save_mode(SaveMode::Ignore)
        // Tried again it would not make the table but write its columns a second time.
        .with_commit_properties(CommitProperties::default().with_max_retries(0))
        .await
}

/// Adds the columns that a table of an older version lacks.
async fn widen(opened: DeltaTable, table: Table) -> DeltaResult<DeltaTable> {
    let schema = opened.snapshot()?.schema();
    let missing: Vec<_> =
        fields(table)?.into_iter().filter(|field| schema.field(field.name()).is_none()).collect();
    if missing.is_empty() {
        return Ok(opened);
    }
    opened.add_columns().with_fields(missing).await
}

/// Makes `s3://` known to the table format: plain conditional puts, without an SDK and without a lock table.
fn register() {
    let Ok(scheme) = Url::parse("s3://") else { return };
    object_store_factories().insert(scheme.clone(), Arc::new(S3));
    logstore_factories().insert(scheme, Arc::new(S3));
}

struct S3;

impl ObjectStoreFactory for S3 {
    fn parse_url_opts(&self, url: &Url, config: &StorageConfig) -> DeltaResult<(ObjectStoreRef, Path)> {
        let mut builder = aws::AmazonS3Builder::from_env().with_url(url.as_str());
        for (name, value) in config.raw() {
            let key = name.to_ascii_lowercase().parse()?;
            builder = builder.with_config(key, value);
        }
        // Commits rest on it; what does not know it must refuse rather than overwrite.
        let store = builder.with_conditional_put(aws::S3ConditionalPut::ETagMatch).build()?;
        let store: Arc<dyn ObjectStore> = Arc::new(store);
        Ok((store, Path::from_url_path(url.path())?))
    }
}

impl LogStoreFactory for S3 {
    fn with_options(
        &self,
        prefixed: ObjectStoreRef,
        root: ObjectStoreRef,
        location: &Url,
        options: &StorageConfig,
    ) -> DeltaResult<Arc<dyn LogStore>> {
        Ok(default_logstore(prefixed, root, location, options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s3(options: &[(&str, &str)]) -> DeltaResult<(ObjectStoreRef, Path)> {
        let url = location(&Url::parse("s3://bucket/log/").unwrap(), Table::Outcomes);
        S3.parse_url_opts(&url, &StorageConfig::parse_options(options.iter().copied()).unwrap())
    }

    #[test]
    fn a_table_on_s3_lies_below_its_bucket() {
        let (store, path) =
            s3(&[("aws_region", "eu-central-1"), ("aws_endpoint", "http://127.0.0.1:1")]).unwrap();
        assert!(store.to_string().contains("bucket"), "{store}");
        assert_eq!(path.as_ref(), "log/outcomes");
        let refused = s3(&[("aws_regoin", "eu-central-1")]).unwrap_err().to_string();
        assert!(refused.contains("aws_regoin"), "{refused}");
    }

    #[tokio::test]
    async fn a_place_that_cannot_be_written_to_is_named() {
        let root = Url::parse("file:///proc/tables/").unwrap();
        let refused = open(&root, &Options::new(), Table::Labels).await.unwrap_err().to_string();
        assert!(refused.contains("could not make table labels at file:///proc/tables/labels"), "{refused}");
        assert!(find(&root, &Options::new(), Table::Labels).await.unwrap().is_none());
    }
}
