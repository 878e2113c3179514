//! SQL over the tables of a root: a DataFusion session with our functions, views and guards.
//!
//! Each query reads the newest version of each table that it names, and of one table one version only, however often it names it. A
//! table that nobody has made yet is empty, and one that is made of another says all that this one says.
//!
//! Invariant: nothing is written, registered or set by a query; two queries share only the memory and disk that they may take.

mod inline;
mod late;
mod null_keys;
mod regroup;

use crate::cluster::{self, Cluster, scan::Shared};
use crate::functions::{self, Prices, Share};
use crate::guards::{self, Extent, Guarded, Limits, Refused, Scope};
use crate::kafka_table;
use crate::lake;
use crate::live::{self, Live};
use crate::rollup;
use crate::table::{DATE, Table};
use crate::views::{VIEWS, View};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{
    CatalogProvider, CatalogProviderList, MemoryCatalogProvider, MemoryCatalogProviderList,
    MemorySchemaProvider, SchemaProvider, TableProvider, view::ViewTable,
};
use datafusion::common::runtime::SpawnedTask;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DataFusionError, ParamValues, ScalarValue};
use datafusion::datasource::{empty::EmptyTable, provider_as_source, source_as_provider};
use datafusion::execution::disk_manager::DiskManagerBuilder;
use datafusion::execution::memory_pool::{FairSpillPool, TrackConsumersPool};
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::session_state::{SessionState, SessionStateBuilder};
use datafusion::execution::{FunctionRegistry, SendableRecordBatchStream};
use datafusion::logical_expr::{LogicalPlan, LogicalPlanBuilder, TableType, cast, lit};
use datafusion::optimizer::{Optimizer, OptimizerRule};
use datafusion::physical_optimizer::{PhysicalOptimizerRule, optimizer::PhysicalOptimizer};
use datafusion::prelude::{DataFrame, SessionConfig, SessionContext, col};
use datafusion::sql::parser::{DFParserBuilder, Statement};
use datafusion::sql::sqlparser::parser::ParserError;
use deltalake_core::DeltaTable;
use futures::StreamExt as _;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::warn;
use url::Url;

/// The catalog in which all tables lie; PostgreSQL's clients call it the database.
pub(crate) const CATALOG: &str = "forebay";
/// The schema in which they lie there.
pub(crate) const SCHEMA: &str = "public";
/// Where more groups than this share of the rows are met at first, rows are not added up before they are brought together by group: it
/// would cost a second table of groups and save little. The engine's own 0.8 cost *distinct prompts* a fifth: tests/bench.
const ADD_UP_FIRST_MAX: f64 = 0.3;
/// A query comes in so many parts more than there are threads: where one waits for its file, its thread goes on with another.
const PARTS_BEYOND_THREADS: usize = 1;
/// How many of those who hold memory an error names.
const CONSUMERS_NAMED: usize = 3;
/// How many batches a query may be ahead of who reads them.
const BATCHES_AHEAD: usize = 2;
/// The longest text of queries at once.
const SQL_BYTES_MAX: usize = 1 << 20;

/// Why a query has no answer, or a session could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something in the query is not as it must be.
    #[error("{}{message}", place(*.at))]
    Query {
        /// What.
        message: String,
        /// Line and column, from 1, where they are known.
        at: Option<(u64, u64)>,
    },
    /// It is not answered, and the text says what would be.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It took too long.
    #[error("the query ran for {} and was stopped; bound its time, or raise --deadline", humantime::format_duration(*.0))]
    Deadline(Duration),
    /// It took too much memory.
    #[error(
        "the query needs more memory than its {} MiB, also with what it wrote to disk; select fewer columns or groups, bound its time, or \
         raise --memory ({detail})",
        .limit >> 20
    )]
    Memory {
        /// What it may take, in bytes.
        limit: usize,
        /// Who wanted more.
        detail: String,
    },
    /// A table could not be read.
    #[error(transparent)]
    Lake(#[from] Box<lake::Error>),
    /// Those who would work it out do not.
    #[error(transparent)]
    Cluster(#[from] Box<cluster::Error>),
    /// The session could not be made.
    #[error("could not prepare SQL")]
    Prepare(#[source] DataFusionError),
}

fn place(at: Option<(u64, u64)>) -> String {
    at.map(|(line, column)| format!("line {line}, column {column}: ")).unwrap_or_default()
}

/// A session over the tables of one root, of one user.
#[derive(Clone)]
pub struct Session {
    workers: Arc<Workers>,
    lake: Arc<Lake>,
    /// Functions, limits and settings, without a catalog.
    base: SessionState,
    limits: Limits,
    scope: Scope,
    /// Who works queries out; this process where there is none.
    cluster: Option<Cluster>,
    /// Whether somebody said in how many parts.
    is_parted: bool,
}

/// Rows as they come. Dropped, it stops the query.
pub struct Answer {
    /// Their columns.
    pub schema: SchemaRef,
    rows: mpsc::Receiver<Result<RecordBatch, DataFusionError>>,
    /// What sends them; taken when it has ended.
    running: Option<SpawnedTask<bool>>,
    limits: Limits,
    until: Instant,
}

impl Session {
    /// Opens a session. Nothing is read before the first query.
    pub fn open(
        root: Url,
        options: lake::Options,
        limits: Limits,
        scope: Scope,
        prices: Option<Arc<Prices>>,
        live: Option<Live>,
    ) -> Result<Self, Error> {
        let base = state(&limits, prices).map_err(Error::Prepare)?;
        let lake = Arc::new(Lake { root, options, live, tables: Mutex::default() });
        let workers = Arc::new(Workers::start().map_err(|fault| Error::Prepare(fault.into()))?);
        Ok(Self { workers, lake, base, limits, scope: Scope::All, cluster: None, is_parted: false }
            .scoped(scope))
    }

    /// The same session with an option of the engine, such as `datafusion.execution.target_partitions`.
    pub fn with_option(mut self, name: &str, value: &str) -> Result<Self, Error> {
        let set = self.base.config_mut().options_mut().set(name, value);
        set.map_err(|error| explained(error, self.limits))?;
        self.is_parted |= name == "datafusion.execution.target_partitions";
        Ok(self)
    }

    /// The same session, whose queries are worked out by others.
    pub fn on(mut self, cluster: Cluster) -> Self {
        let config = cluster::planned(self.base.config().clone());
        self.base = SessionStateBuilder::new_from_existing(self.base).with_config(config).build();
        self.cluster = Some(cluster);
        let scope = self.scope.clone();
        self.scoped(scope)
    }

    /// Waits until queries that were given up are given up by all who worked on them, and asks no more.
    pub(crate) async fn leave(&self) {
        if let Some(cluster) = &self.cluster {
            cluster.leave().await;
        }
    }

    /// A session of another user, with the same tables, memory and limits.
    pub fn scoped(&self, scope: Scope) -> Self {
        let kafka = self.lake.live.as_ref().map(|live| live.kafka().clone());
        let (messages, is_far) = (self.limits.messages, self.cluster.is_some());
        let topics = kafka_table::Function { kafka, scope: scope.clone(), messages, is_far };
        let mut base = self.base.clone();
        base.register_udtf("kafka", Arc::new(topics));
        Self { base, scope, ..self.clone() }
    }

    /// Whose rows are seen.
    pub(crate) fn scope(&self) -> &Scope {
        &self.scope
    }

    /// What a query may take.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The queries in a text, which are separated by semicolons.
    pub fn parse(&self, sql: &str) -> Result<VecDeque<Statement>, Error> {
        if sql.len() > SQL_BYTES_MAX {
            let message = format!("the query has {} bytes; it may have {SQL_BYTES_MAX}", sql.len());
            return Err(Error::Query { message, at: None });
        }
        let statements = DFParserBuilder::new(sql).build().and_then(|mut parser| parser.parse_statements());
        statements.map_err(|error| explained(error, self.limits))
    }

    /// Answers one query.
    pub async fn query(&self, statement: Statement) -> Result<Answer, Error> {
        self.answer(self.context(), statement, None).await
    }

    /// Answers one query in a context of this session in which nothing was asked yet, with these values for its parameters.
    pub(crate) async fn answer(
        &self,
        context: SessionContext,
        statement: Statement,
        parameters: Option<ParamValues>,
    ) -> Result<Answer, Error> {
        let until = Instant::now() + self.limits.deadline;
        let (session, within) = (self.clone(), context.clone());
        let starting = self.workers.spawn(async move { session.start(&within, statement, parameters).await });
        let started = tokio::time::timeout_at(until, starting.join()).await;
        let started = started.map_err(|_| Error::Deadline(self.limits.deadline))?;
        let died = |fault| explained(DataFusionError::External(Box::new(fault)), self.limits);
        let mut rows = started.map_err(died)??;
        let schema = rows.schema();
        let (to, from) = mpsc::channel(BATCHES_AHEAD);
        let running = self.workers.spawn(async move {
            // Lists of tables look the tables up while they are read.
            let _within = context;
            let sent = async {
                while let Some(batch) = rows.next().await {
                    if to.send(batch).await.is_err() {
                        break;
                    }
                }
            };
            // Also where nobody reads on: what it holds is given back then.
            tokio::time::timeout_at(until, sent).await.is_ok()
        });
        Ok(Answer { schema, rows: from, running: Some(running), limits: self.limits, until })
    }

    /// Answers the queries of a text, whose rows must be few enough to hold.
    pub async fn collect(&self, sql: &str) -> Result<Vec<RecordBatch>, Error> {
        let mut batches = Vec::new();
        for statement in self.parse(sql)? {
            let mut answer = self.query(statement).await?;
            while let Some(batch) = answer.next().await? {
                batches.push(batch);
            }
        }
        Ok(batches)
    }

    /// The columns of a table or view, in order; nothing where there is none of that name.
    pub async fn columns(&self, name: &str) -> Result<Option<SchemaRef>, Error> {
        let context = self.context();
        let schema = context.state().schema_for_ref(name).map_err(|error| explained(error, self.limits))?;
        let table = schema.table(name).await.map_err(|error| explained(error, self.limits))?;
        Ok(table.map(|table| table.schema()))
    }

    /// The names of all functions.
    pub fn functions(&self) -> Vec<String> {
        let base = &self.base;
        let scalar = base.scalar_functions().keys();
        scalar
            .chain(base.aggregate_functions().keys())
            .chain(base.window_functions().keys())
            .cloned()
            .collect()
    }

    async fn start(
        &self,
        context: &SessionContext,
        statement: Statement,
        parameters: Option<ParamValues>,
    ) -> Result<SendableRecordBatchStream, Error> {
        let explained = |error| explained(error, self.limits);
        let mut state = context.state();
        let mut plan = state.statement_to_plan(statement).await.map_err(explained)?;
        guards::check(&plan, &self.scope)?;
        if let Some(parameters) = parameters {
            plan = plan.replace_params_with_values(&parameters).map_err(explained)?;
        }
        let Some(cluster) = &self.cluster else {
            return DataFrame::new(state, plan).execute_stream().await.map_err(explained);
        };
        if !self.is_parted && reads_files(&plan).map_err(explained)? {
            state.config_mut().options_mut().execution.target_partitions = cluster.parts().await;
        }
        let task = state.task_ctx();
        let plan = state.create_physical_plan(&plan).await.map_err(explained)?;
        cluster.execute(plan, task).await.map_err(explained)
    }

    /// A context of its own for a query, in which no table has been read.
    pub(crate) fn context(&self) -> SessionContext {
        let snapshot = Arc::new(Snapshot {
            lake: Arc::clone(&self.lake),
            limits: self.limits,
            scope: self.scope.clone(),
            is_far: self.cluster.is_some(),
            pinned: tokio::sync::Mutex::default(),
            found: Mutex::default(),
            state: OnceLock::new(),
        });
        let catalog = MemoryCatalogProvider::new();
        let catalogs = MemoryCatalogProviderList::new();
        // Neither can be taken: both are new.
        let _ = catalog.register_schema(SCHEMA, Arc::clone(&snapshot) as Arc<dyn SchemaProvider>);
        catalogs.register_catalog(CATALOG.to_owned(), Arc::new(catalog));
        let state = SessionStateBuilder::new_from_existing(self.base.clone())
            .with_catalog_list(Arc::new(catalogs))
            .build();
        let context = SessionContext::new_with_state(state);
        let state = context.state_weak_ref();
        let _ = snapshot.state.set(Box::new(move || state.upgrade().map(|state| state.read().clone())));
        context
    }
}

impl Answer {
    /// The next rows; none behind the last.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>, Error> {
        match tokio::time::timeout_at(self.until, self.rows.recv()).await {
            Ok(Some(batch)) => batch.map(Some).map_err(|error| explained(error, self.limits)),
            Ok(None) => match self.running.take() {
                // Rows that end because their task died are not all there are.
                Some(running) => match running.join().await {
                    Ok(true) => Ok(None),
                    Ok(false) => Err(Error::Deadline(self.limits.deadline)),
                    Err(fault) => Err(explained(DataFusionError::External(Box::new(fault)), self.limits)),
                },
                None => Ok(None),
            },
            Err(_) => Err(Error::Deadline(self.limits.deadline)),
        }
    }
}

/// Whether a query reads tables that have files.
fn reads_files(plan: &LogicalPlan) -> Result<bool, DataFusionError> {
    let mut has_files = false;
    plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node {
            let table = source_as_provider(&scan.source)?;
            let table: &dyn TableProvider = table.as_ref();
            has_files |= table.downcast_ref::<Guarded>().is_some_and(|table| table.extent.bytes > 0);
        }
        Ok(if has_files { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    })?;
    Ok(has_files)
}

/// Threads of their own for queries: a join may work for minutes before it gives way, and deadlines and Ctrl-C must be heard meanwhile.
struct Workers(Option<Runtime>);

impl Workers {
    fn start() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("sql").enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    /// Starts work that stops when its task is dropped.
    fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> SpawnedTask<T> {
        let _entered = self.0.as_ref().map(Runtime::enter);
        SpawnedTask::spawn(work)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Without waiting for work that does not give way.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn state(limits: &Limits, prices: Option<Arc<Prices>>) -> Result<SessionState, DataFusionError> {
    // Shares memory among those who can write to disk, so that one sort does not starve the next.
    let pool = FairSpillPool::new(limits.memory_bytes);
    let named = NonZeroUsize::new(CONSUMERS_NAMED).unwrap_or(NonZeroUsize::MIN);
    let runtime = RuntimeEnvBuilder::new()
        .with_memory_pool(Arc::new(TrackConsumersPool::new(pool, named)))
        .with_disk_manager_builder(
            DiskManagerBuilder::default().with_max_temp_directory_size(limits.spill_bytes),
        )
        .build_arc()?;
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let config = SessionConfig::new()
        .with_target_partitions(threads + PARTS_BEYOND_THREADS)
        .with_default_catalog_and_schema(CATALOG, SCHEMA)
        .with_create_default_catalog_and_schema(false)
        .with_information_schema(true)
        .set_bool("datafusion.sql_parser.collect_spans", true)
        .set(
            "datafusion.execution.skip_partial_aggregation_probe_ratio_threshold",
            &ScalarValue::from(ADD_UP_FIRST_MAX),
        );
    let own: [Arc<dyn OptimizerRule + Send + Sync>; 2] = [Arc::new(regroup::Regroup), Arc::new(Share)];
    let mut state = SessionStateBuilder::new_with_default_features()
        .with_config(config)
        .with_runtime_env(runtime)
        .with_optimizer_rules(own.into_iter().chain(Optimizer::new().rules).collect())
        .with_physical_optimizer_rules(physical_rules())
        .build();
    register(&mut state, prices)?;
    Ok(state)
}

/// The engine's own rules, and ours before those that end in a plan which must not be taken apart any more.
fn physical_rules() -> Vec<Arc<dyn PhysicalOptimizerRule + Send + Sync>> {
    let mut rules = PhysicalOptimizer::new().rules;
    let last = rules.iter().position(|rule| rule.name() == "EnsureCooperative").unwrap_or(rules.len());
    rules.splice(last..last, [Arc::new(null_keys::NullKeys) as _, Arc::new(inline::InlineStrings) as _]);
    rules
}

/// Makes our functions known, by the clock of the system.
pub(crate) fn register(
    registry: &mut dyn FunctionRegistry,
    prices: Option<Arc<Prices>>,
) -> Result<(), DataFusionError> {
    functions::register(registry, prices, now_us)
}

/// Now, in µs since 1970.
pub(crate) fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

/// The tables as they were last seen, so that the next query reads only what was committed since.
struct Lake {
    root: Url,
    options: lake::Options,
    live: Option<Live>,
    tables: Mutex<BTreeMap<Table, DeltaTable>>,
}

impl Lake {
    async fn newest(&self, table: Table) -> Result<Option<DeltaTable>, lake::Error> {
        let seen = self.lock().get(&table).cloned();
        let newest = match seen {
            Some(mut seen) => match seen.update_state().await {
                Ok(()) => Some(seen),
                // It may have been made anew; then it is opened as if never seen.
                Err(_) => lake::find(&self.root, &self.options, table).await?,
            },
            None => lake::find(&self.root, &self.options, table).await?,
        };
        if let Some(newest) = &newest {
            self.lock().insert(table, newest.clone());
        }
        Ok(newest)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Table, DeltaTable>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tables and views as one query sees them.
struct Snapshot {
    lake: Arc<Lake>,
    limits: Limits,
    scope: Scope,
    /// Whether others read the files.
    is_far: bool,
    /// The version of each table that the query sees; nothing where there is no table.
    pinned: tokio::sync::Mutex<HashMap<Table, Option<DeltaTable>>>,
    found: Mutex<HashMap<String, Arc<dyn TableProvider>>>,
    /// In which views are planned; it holds the state weakly, as that holds us.
    state: OnceLock<Box<dyn Fn() -> Option<SessionState> + Send + Sync>>,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tables at {}", self.lake.root)
    }
}

impl Snapshot {
    fn state(&self) -> Result<SessionState, DataFusionError> {
        let state = self.state.get().and_then(|state| state());
        state.ok_or_else(|| DataFusionError::Plan("the query has ended".to_owned()))
    }

    /// The version that the query sees: the newest when the table was first named.
    async fn version(&self, table: Table) -> Result<Option<DeltaTable>, DataFusionError> {
        let mut pinned = self.pinned.lock().await;
        if let Some(version) = pinned.get(&table) {
            return Ok(version.clone());
        }
        let newest =
            self.lake.newest(table).await.map_err(|error| DataFusionError::External(Box::new(error)))?;
        pinned.insert(table, newest.clone());
        Ok(newest)
    }

    async fn of_table(&self, table: Table) -> Result<Arc<dyn TableProvider>, DataFusionError> {
        match self.version(table).await? {
            Some(version) => self.days(table, &version, |_| true),
            None => Ok(Arc::new(EmptyTable::new(table.schema()))),
        }
    }

    /// The rows of some days of a version.
    fn days(
        &self,
        table: Table,
        version: &DeltaTable,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Arc<dyn TableProvider>, DataFusionError> {
        version.update_datafusion_session(&self.state()?)?;
        let snapshot = version.snapshot()?;
        let mut extent = Extent::default();
        let (mut days, mut paths, mut has_all) = (BTreeSet::new(), Vec::new(), true);
        for file in snapshot.log_data().iter() {
            let day = file.partition_values_map().remove(DATE).flatten();
            if !day.as_deref().is_none_or(&wanted) {
                has_all = false;
                continue;
            }
            extent.bytes = extent.bytes.saturating_add(u64::try_from(file.size()).unwrap_or(0));
            paths.push(file.path().into_owned());
            days.insert(day);
        }
        extent.days = days.len();
        if self.is_far {
            let rows = Shared::new(table, version, wanted)?;
            return Ok(self.guarded(table, Arc::new(rows), extent));
        }
        let rows = late::Rows::new(table, snapshot, (!has_all).then_some(paths))?;
        Ok(self.guarded(table, Arc::new(rows), extent))
    }

    fn guarded(&self, table: Table, inner: Arc<dyn TableProvider>, extent: Extent) -> Arc<dyn TableProvider> {
        // Days that are rolled up are there to be read by the year.
        let scan_days = if table.source().is_some() { u32::MAX } else { self.limits.scan_days };
        let limits = Limits { scan_days, ..self.limits };
        Arc::new(Guarded { table, inner, extent, limits, scope: self.scope.clone() })
    }

    /// A roll-up: what is stored of it, and behind that, worked out now, the days of which that does not say all.
    async fn of_rollup(
        &self,
        rollup: Table,
        source: Table,
    ) -> Result<Arc<dyn TableProvider>, DataFusionError> {
        let (stored, facts) = (self.version(rollup).await?, self.version(source).await?);
        let columns = rollup.columns();
        let mut parts = Vec::new();
        let mut days = BTreeSet::new();
        if let Some(stored) = &stored {
            let facts = facts.as_ref().map(DeltaTable::snapshot).transpose()?;
            days = rollup::days_stored(stored.snapshot()?, facts);
            let rows = self.days(rollup, stored, |day| days.contains(day))?;
            let stored = rows.schema();
            let scan = LogicalPlanBuilder::scan(rollup.name(), provider_as_source(rows), None)?;
            // A column that came later is added by who next writes to the table.
            let shown = columns.iter().map(|column| match stored.field_with_name(column.name) {
                Ok(_) => col(column.name),
                Err(_) => cast(lit(ScalarValue::Null), column.kind.arrow()).alias(column.name),
            });
            parts.push(scan.project(shown)?);
        }
        let rest = match &facts {
            Some(facts) => self.days(source, facts, |day| !days.contains(day))?,
            None => Arc::new(EmptyTable::new(source.schema())),
        };
        let worked_out = self.planned_over(source, rest, &rollup::sql(rollup, source, None)).await?;
        let types = parts.first().map(|stored| Arc::clone(stored.schema().inner()));
        let shown = columns.iter().enumerate().map(|(index, column)| {
            let name = col(column.name);
            match &types {
                Some(types) => cast(name, types.field(index).data_type().clone()).alias(column.name),
                None => name,
            }
        });
        let worked_out = LogicalPlanBuilder::from(worked_out).project(shown)?;
        let plan = match parts.pop() {
            Some(stored) => stored.union(worked_out.build()?)?,
            None => worked_out,
        };
        Ok(Arc::new(ViewTable::new(plan.build()?, None)))
    }

    /// A query over other rows of a table than all of them.
    async fn planned_over(
        &self,
        table: Table,
        rows: Arc<dyn TableProvider>,
        sql: &str,
    ) -> Result<LogicalPlan, DataFusionError> {
        let (schema, catalog, catalogs) =
            (MemorySchemaProvider::new(), MemoryCatalogProvider::new(), MemoryCatalogProviderList::new());
        schema.register_table(table.name().to_owned(), rows)?;
        catalog.register_schema(SCHEMA, Arc::new(schema))?;
        catalogs.register_catalog(CATALOG.to_owned(), Arc::new(catalog));
        let state = SessionStateBuilder::new_from_existing(self.state()?);
        state.with_catalog_list(Arc::new(catalogs)).build().create_logical_plan(sql).await
    }

    /// The rows of a table, and behind them those that are not in it yet.
    async fn of_live(&self) -> Result<Arc<dyn TableProvider>, DataFusionError> {
        if self.is_far {
            return Err(Refused::Local { what: live::NAME, instead: ", or ask outcomes" }.into());
        }
        let stored = self.of_table(live::TABLE).await?;
        let Some(live) = &self.lake.live else {
            warn!("there is no Kafka, so {} is what is in table {} already", live::NAME, live::TABLE.name());
            return Ok(stored);
        };
        let version = self.version(live::TABLE).await?;
        let tail = Arc::new(live.tail(version.as_ref(), stored.schema()).await?);
        let tail = self.guarded(live::TABLE, tail, Extent::default());
        let rows = |rows| LogicalPlanBuilder::scan(live::NAME, provider_as_source(rows), None);
        let plan = rows(stored)?.union(rows(tail)?.build()?)?.build()?;
        Ok(Arc::new(ViewTable::new(plan, None)))
    }

    async fn of_view(&self, view: View) -> Result<Arc<dyn TableProvider>, DataFusionError> {
        let plan = self.state()?.create_logical_plan(view.sql).await?;
        Ok(Arc::new(ViewTable::new(plan, Some(view.sql.to_owned()))))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<dyn TableProvider>>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl SchemaProvider for Snapshot {
    fn table_names(&self) -> Vec<String> {
        let tables = Table::ALL.iter().chain(Table::ROLLUPS).map(|table| table.name());
        tables.chain(VIEWS.iter().map(|view| view.name)).chain([live::NAME]).map(str::to_owned).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>, DataFusionError> {
        if let Some(found) = self.lock().get(name) {
            return Ok(Some(Arc::clone(found)));
        }
        let found = match (Table::find(name), View::find(name)) {
            (Some(table), _) => match table.source() {
                Some(source) => self.of_rollup(table, source).await?,
                None => self.of_table(table).await?,
            },
            (None, Some(view)) => self.of_view(view).await?,
            (None, None) if name == live::NAME => self.of_live().await?,
            (None, None) => return Ok(None),
        };
        // Who came first keeps its version, so that all who name the table see one.
        Ok(Some(Arc::clone(self.lock().entry(name.to_owned()).or_insert(found))))
    }

    async fn table_type(&self, name: &str) -> Result<Option<TableType>, DataFusionError> {
        let table = Table::find(name).map(|_| TableType::Base);
        Ok(table.or_else(|| self.table_exist(name).then_some(TableType::View)))
    }

    fn table_exist(&self, name: &str) -> bool {
        Table::find(name).is_some() || View::find(name).is_some() || name == live::NAME
    }
}

/// The same error in words for who wrote the query, with its place there.
fn explained(error: DataFusionError, limits: Limits) -> Error {
    let error = match unwrapped(error) {
        Ok(own) => return own,
        Err(error) => error,
    };
    if let DataFusionError::ResourcesExhausted(detail) = error.find_root() {
        return Error::Memory {
            limit: limits.memory_bytes,
            detail: detail.lines().next().unwrap_or_default().to_owned(),
        };
    }
    if let Some(diagnostic) = error.diagnostic() {
        let mut message = diagnostic.message.clone();
        for help in diagnostic
            .notes
            .iter()
            .map(|note| &note.message)
            .chain(diagnostic.helps.iter().map(|help| &help.message))
        {
            message = format!("{message}; {help}");
        }
        let at =
            diagnostic.span.map(|span| (span.start.line, span.start.column)).filter(|(line, _)| *line > 0);
        return Error::Query { message, at };
    }
    let message = match error.find_root() {
        DataFusionError::SQL(error, _) => match error.as_ref() {
            ParserError::ParserError(text) | ParserError::TokenizerError(text) => text.clone(),
            other => other.to_string(),
        },
        other => other.message().into_owned(),
    };
    let (message, at) = split_place(&message);
    Error::Query { message, at }
}

/// One of our own errors, which came through DataFusion as a stranger.
fn unwrapped(error: DataFusionError) -> Result<Error, DataFusionError> {
    match error {
        DataFusionError::External(inner) => {
            let inner = match inner.downcast::<Refused>() {
                Ok(refused) => return Ok(Error::Refused(*refused)),
                Err(inner) => inner,
            };
            let inner = match inner.downcast::<cluster::Error>() {
                Ok(fault) => return Ok(Error::Cluster(fault)),
                Err(inner) => inner,
            };
            match inner.downcast::<lake::Error>() {
                Ok(fault) => Ok(Error::Lake(fault)),
                Err(inner) => Err(DataFusionError::External(inner)),
            }
        }
        DataFusionError::Context(text, inner) => {
            unwrapped(*inner).map_err(|inner| DataFusionError::Context(text, Box::new(inner)))
        }
        DataFusionError::Diagnostic(diagnostic, inner) => {
            unwrapped(*inner).map_err(|inner| DataFusionError::Diagnostic(diagnostic, Box::new(inner)))
        }
        other => Err(other),
    }
}

/// The parser says its place at the end of its message: "… at Line: 1, Column: 15".
fn split_place(message: &str) -> (String, Option<(u64, u64)>) {
    let place = || {
        let (text, place) = message.rsplit_once(" at Line: ")?;
        let (line, rest) = place.split_once(", Column: ")?;
        let digits = rest.len() - rest.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
        let column = rest.get(..digits)?;
        Some((text.to_owned(), Some((line.parse().ok()?, column.parse().ok()?))))
    };
    place().unwrap_or_else(|| (message.to_owned(), None))
}

#[cfg(test)]
pub(crate) mod tests;
