//! What a query may not do: read another tenant's rows, read years by mistake, write, or take all memory and time.
//!
//! Every table is read through [`Guarded`], so there is no way around it: views, subqueries, functions and EXPLAIN all end in its
//! `scan`.
//!
//! Invariant: of a table no row of a tenant outside the scope leaves its scan, and nothing that a user wrote is worked out on such a row:
//! not even an error could tell of one. A refusal says which predicate or which setting is the way out.

use crate::table::{DATE, TENANT, Table};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DataFusionError, Result, ScalarValue, ToDFSchema, internal_err};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{
    BinaryExpr, Expr, LogicalPlan, Operator, TableProviderFilterPushDown, TableType, col, lit,
};
use datafusion::physical_plan::filter::FilterExecBuilder;
use datafusion::physical_plan::{
    ChildrenPropertiesMode, DisplayAs, DisplayFormatType, ExecutionPlan, PhysicalExpr, PlanProperties,
    ReplaceChildrenOptions,
};
use datafusion::prelude::SQLOptions;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The most users in a file, and the most tenants of one.
const USERS_MAX: usize = 10_000;
const TENANTS_MAX: usize = 1_000;
/// The scope of who may see all tenants.
const ALL_TENANTS: &str = "*";

/// How much one session may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory of all queries of a session together; sorts, joins and groups beyond it go to disk.
    pub memory_bytes: usize,
    /// What may lie on disk meanwhile.
    pub spill_bytes: u64,
    /// How long a query may run.
    pub deadline: Duration,
    /// How many bytes of a table a query may read without a bound on its time.
    pub scan_bytes: u64,
    /// Over how many days of a table a query may go without a bound on its time.
    pub scan_days: u32,
    /// A table of no more bytes is read whole in a moment, over however many days it goes: labels of a year are less.
    pub whole_bytes: u64,
    /// How many messages of a topic a query may read by `kafka`.
    pub messages: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 1 << 30,
            spill_bytes: 16 << 30,
            deadline: Duration::from_secs(300),
            scan_bytes: 8 << 30,
            scan_days: 92,
            whole_bytes: 256 << 20,
            messages: 10_000_000,
        }
    }
}

/// Whose rows a session may see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Everybody's: whoever can read the tables could read them without us.
    #[default]
    All,
    /// Those of these tenants.
    Tenants(Vec<String>),
}

/// Why a query is not answered, and what would be.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It would read too much by mistake.
    #[error(
        "table {table} holds {days} days and {megabytes} MB, and the query has no bound on its time; add a predicate such as \
         {time} >= now() - INTERVAL '7 days' or {DATE} >= '2026-11-01', or raise --scan-days ({scan_days}) and --scan-bytes ({scan_bytes})"
    )]
    Unbounded {
        /// Which table.
        table: &'static str,
        /// Its column of time.
        time: &'static str,
        /// What it holds.
        days: usize,
        /// What it holds.
        megabytes: u64,
        /// What may be read.
        scan_days: u32,
        /// What may be read.
        scan_bytes: u64,
    },
    /// It would change something.
    #[error("{what}; tables are only read here, and are written by the sink")]
    Writes {
        /// What it would do.
        what: String,
    },
    /// It would read too much by mistake.
    #[error(
        "the query would read {count} messages of topic {topic}; name a start such as kafka('{topic}', now() - INTERVAL '1 hour'), bound \
         partition and offset, or raise --messages ({messages_max})"
    )]
    Messages {
        /// Which.
        topic: String,
        /// How many there are.
        count: u64,
        /// What may be read.
        messages_max: u64,
    },
    /// Nobody knows whose messages are.
    #[error(
        "kafka() is for users of all tenants, since a topic does not say whose its messages are; ask requests_live"
    )]
    Topics,
    /// It would tell how many rows of others were read.
    #[error(
        "EXPLAIN ANALYZE, EXPLAIN VERBOSE and costs are for users of all tenants, since they tell of rows of others; write EXPLAIN"
    )]
    Metrics,
    /// Only the process of who asks could.
    #[error("{what} cannot be read by executors; ask without --scheduler{instead}")]
    Local {
        /// What.
        what: &'static str,
        /// What else would be answered.
        instead: &'static str,
    },
}

/// Refuses whatever is not a question.
pub fn check(plan: &LogicalPlan, scope: &Scope) -> Result<(), Refused> {
    let options = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    options.verify_plan(plan).map_err(|error| Refused::Writes { what: error.message().into_owned() })?;
    match plan {
        LogicalPlan::Analyze(_) if *scope != Scope::All => Err(Refused::Metrics),
        LogicalPlan::Explain(explain)
            if (explain.verbose || explain.show_statistics.is_some()) && *scope != Scope::All =>
        {
            Err(Refused::Metrics)
        }
        _ => Ok(()),
    }
}

/// What a table holds, by its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Days with rows.
    pub days: usize,
    /// Bytes of its files.
    pub bytes: u64,
}

/// A table behind its guards.
#[derive(Debug)]
pub struct Guarded {
    /// Which.
    pub table: Table,
    /// The rows.
    pub inner: Arc<dyn TableProvider>,
    /// What they are.
    pub extent: Extent,
    /// What may be read of them at once.
    pub limits: Limits,
    /// Whose may be read.
    pub scope: Scope,
}

impl From<Refused> for DataFusionError {
    fn from(refused: Refused) -> Self {
        Self::External(Box::new(refused))
    }
}

impl Guarded {
    fn check_bound(&self, filters: &[Expr]) -> Result<(), Refused> {
        let Limits { scan_bytes, scan_days, whole_bytes, .. } = self.limits;
        let Extent { days, bytes } = self.extent;
        let is_short = bytes <= whole_bytes || u32::try_from(days).is_ok_and(|days| days <= scan_days);
        let is_small = bytes <= scan_bytes && is_short;
        let time = self.table.time_column();
        if is_small || filters.iter().any(|filter| is_bound(filter, time)) {
            return Ok(());
        }
        let (table, megabytes) = (self.table.name(), bytes.div_ceil(1_000_000));
        Err(Refused::Unbounded { table, time, days, megabytes, scan_days, scan_bytes })
    }
}

/// Whether a predicate leaves out all that is older than something.
fn is_bound(filter: &Expr, time: &str) -> bool {
    let is_time =
        |expr: &Expr| matches!(expr, Expr::Column(column) if column.name == time || column.name == DATE);
    let is_constant = |expr: &Expr| matches!(expr, Expr::Literal(value, _) if !value.is_null());
    match filter {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => match op {
            Operator::And => is_bound(left, time) || is_bound(right, time),
            Operator::Or => is_bound(left, time) && is_bound(right, time),
            Operator::Gt | Operator::GtEq => is_time(left) && is_constant(right),
            Operator::Lt | Operator::LtEq => is_constant(left) && is_time(right),
            Operator::Eq => (is_time(left) && is_constant(right)) || (is_constant(left) && is_time(right)),
            _ => false,
        },
        Expr::Between(between) => !between.negated && is_time(&between.expr) && is_constant(&between.low),
        Expr::InList(list) => !list.negated && is_time(&list.expr) && list.list.iter().all(is_constant),
        _ => false,
    }
}

/// Whether a predicate can be worked out on any row without an error, so that it may be tried before it is known whose the row is:
/// a column compared with a constant of its type.
pub(crate) fn is_harmless(filter: &Expr) -> bool {
    let is_column = |expr: &Expr| matches!(expr, Expr::Column(_));
    let is_constant = |expr: &Expr| matches!(expr, Expr::Literal(..));
    match filter {
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::And | Operator::Or, right }) => {
            is_harmless(left) && is_harmless(right)
        }
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            let compares = matches!(
                op,
                Operator::Eq
                    | Operator::NotEq
                    | Operator::Lt
                    | Operator::LtEq
                    | Operator::Gt
                    | Operator::GtEq
            );
            compares && ((is_column(left) && is_constant(right)) || (is_constant(left) && is_column(right)))
        }
        Expr::Between(between) => {
            is_column(&between.expr) && is_constant(&between.low) && is_constant(&between.high)
        }
        Expr::InList(list) => is_column(&list.expr) && list.list.iter().all(is_constant),
        Expr::IsNull(expr) | Expr::IsNotNull(expr) => is_column(expr),
        _ => false,
    }
}

#[async_trait]
impl TableProvider for Guarded {
    fn schema(&self) -> SchemaRef {
        self.inner.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        let time = self.table.time_column();
        let inner = self.inner.supports_filters_pushdown(filters)?;
        let outer = filters.iter().zip(inner).map(|(filter, inner)| match (&self.scope, inner) {
            // A bound on time must be seen here even where the table itself has no use for it.
            (_, TableProviderFilterPushDown::Unsupported) if is_bound(filter, time) => {
                TableProviderFilterPushDown::Inexact
            }
            (Scope::All, inner) => inner,
            (_, TableProviderFilterPushDown::Unsupported) => TableProviderFilterPushDown::Unsupported,
            (_, _) if is_harmless(filter) => TableProviderFilterPushDown::Inexact,
            (_, _) => TableProviderFilterPushDown::Unsupported,
        });
        Ok(outer.collect())
    }

    async fn scan(
        &self,
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        self.check_bound(filters)?;
        let useful = self.inner.supports_filters_pushdown(&filters.iter().collect::<Vec<_>>())?;
        let useful =
            filters.iter().zip(useful).filter(|(_, use_)| *use_ != TableProviderFilterPushDown::Unsupported);
        let mut filters: Vec<Expr> = useful.map(|(filter, _)| filter.clone()).collect();
        let Scope::Tenants(tenants) = &self.scope else {
            return self.inner.scan(session, projection, &filters, limit).await;
        };
        let schema = self.inner.schema();
        let tenant = schema.index_of(TENANT)?;
        let kind = schema.field(tenant).data_type();
        let names = tenants.iter().map(|name| Ok(lit(ScalarValue::from(name.as_str()).cast_to(kind)?)));
        let of_scope = col(TENANT).in_list(names.collect::<Result<_>>()?, false);
        let wanted: Vec<usize> = projection.cloned().unwrap_or_else(|| (0..schema.fields().len()).collect());
        let mut read = wanted.clone();
        if !read.contains(&tenant) {
            read.push(tenant);
        }
        // The rows are filtered here whatever the table makes of the predicate; it may spare us whole files. Those of the user that are
        // harmless are tried here too: from above the barrier they would not be heard of where parts of files are left out.
        filters.retain(is_harmless);
        let is_read = |filter: &&Expr| {
            let mut columns = filter.column_refs().into_iter();
            columns.all(|column| read.iter().any(|index| schema.field(*index).name() == &column.name))
        };
        let tried = filters.iter().filter(is_read).cloned().fold(of_scope.clone(), Expr::and);
        filters.push(of_scope.clone());
        let can_prune = self.inner.supports_filters_pushdown(&[&of_scope])?;
        if can_prune.contains(&TableProviderFilterPushDown::Unsupported) {
            filters.pop();
        }
        let scanned = self.inner.scan(session, Some(&read), &filters, None).await?;
        let columns = scanned.schema().to_dfschema()?;
        let predicate = session.create_physical_expr(tried, &columns)?;
        let kept: Vec<usize> = (0..wanted.len()).collect();
        let filtered = FilterExecBuilder::new(predicate, scanned).apply_projection(Some(kept))?.build()?;
        Ok(Arc::new(Barrier::new(Arc::new(filtered))))
    }
}

/// Lets rows through and nothing else: no predicate of a user goes down past it, and no number of rows below it comes up.
#[derive(Debug)]
pub(crate) struct Barrier {
    input: Arc<dyn ExecutionPlan>,
}

impl Barrier {
    /// Around rows of a scope.
    pub(crate) fn new(input: Arc<dyn ExecutionPlan>) -> Self {
        Self { input }
    }
}

impl DisplayAs for Barrier {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("ScopeExec")
    }
}

impl ExecutionPlan for Barrier {
    fn name(&self) -> &str {
        "ScopeExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.input.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        match (children.pop(), children.len()) {
            (Some(input), 0) => Ok(Arc::new(Self { input })),
            (_, more) => internal_err!("ScopeExec has one child, and was given {more} more or none"),
        }
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        self.input.execute(partition, context)
    }
}

/// Who may ask, and whose rows they may see.
///
/// ```json
/// {"users": {"ana": {"tenants": ["acme", "globex"], "token_blake3": "1f2e…"}, "ops": {"tenants": ["*"]}}}
/// ```
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Users {
    users: BTreeMap<String, User>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    /// Names of tenants, or `*` alone for all.
    tenants: Vec<String>,
    /// The BLAKE3 hash of the token by which they ask over HTTP, in hexadecimal; without it they do not.
    #[serde(default)]
    token_blake3: Option<String>,
}

/// What is wrong with a file of users, or with who asks.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// It is not JSON of the form.
    #[error(
        "{file} is no file of users; it must be such as {{\"users\": {{\"ana\": {{\"tenants\": [\"acme\"]}}}}}}"
    )]
    Form {
        /// The file.
        file: String,
        /// What and where.
        #[source]
        source: serde_json::Error,
    },
    /// A user may see nothing, or too much.
    #[error(
        "{file}: user {user:?} has {given}; name 1 to {TENANTS_MAX} tenants, or \"*\" alone for all of them"
    )]
    Tenants {
        /// The file.
        file: String,
        /// The user.
        user: String,
        /// What is written there.
        given: String,
    },
    /// A hash is none.
    #[error(
        "{file}: token_blake3 of user {user:?} is no BLAKE3 hash; print one by `printf %s TOKEN | b3sum`, with a TOKEN of 32 random characters or more"
    )]
    Token {
        /// The file.
        file: String,
        /// The user.
        user: String,
    },
    /// Too many.
    #[error("{file} has {count} users; there may be {USERS_MAX}")]
    Many {
        /// The file.
        file: String,
        /// How many.
        count: usize,
    },
    /// Nobody of that name.
    #[error("there is no user {user:?} in {file}; {hint}")]
    Unknown {
        /// The file.
        file: String,
        /// Who.
        user: String,
        /// Who there is.
        hint: String,
    },
}

impl Users {
    /// The users of a file.
    pub fn read(file: &str, text: &str) -> Result<Self, UsersError> {
        let users: Self = serde_json::from_str(text)
            .map_err(|source| UsersError::Form { file: file.to_owned(), source })?;
        if users.users.len() > USERS_MAX {
            return Err(UsersError::Many { file: file.to_owned(), count: users.users.len() });
        }
        for (user, User { tenants, token_blake3 }) in &users.users {
            if token_blake3.as_ref().is_some_and(|hash| blake3::Hash::from_hex(hash).is_err()) {
                return Err(UsersError::Token { file: file.to_owned(), user: user.clone() });
            }
            let is_mixed = tenants.len() > 1 && tenants.iter().any(|tenant| tenant == ALL_TENANTS);
            let given = match tenants.len() {
                0 => "no tenants".to_owned(),
                count if count > TENANTS_MAX => format!("{count} tenants"),
                _ if is_mixed => "\"*\" among other tenants".to_owned(),
                _ if tenants.iter().any(String::is_empty) => "a tenant without a name".to_owned(),
                _ => continue,
            };
            return Err(UsersError::Tenants { file: file.to_owned(), user: user.clone(), given });
        }
        Ok(users)
    }

    /// Whose rows a user may see.
    pub fn scope(&self, file: &str, user: &str) -> Result<Scope, UsersError> {
        let Some(found) = self.users.get(user) else {
            let known: Vec<_> = self.users.keys().take(10).map(String::as_str).collect();
            let hint = if known.is_empty() {
                "it names nobody".to_owned()
            } else {
                format!("it names {}", known.join(", "))
            };
            return Err(UsersError::Unknown { file: file.to_owned(), user: user.to_owned(), hint });
        };
        Ok(found.scope())
    }

    /// The user whose token it is, and whose rows they may see.
    pub fn by_token(&self, token: &str) -> Option<(String, Scope)> {
        let given = blake3::hash(token.as_bytes());
        // Hashes are compared in constant time.
        let is_theirs = |user: &User| {
            user.token_blake3
                .as_ref()
                .is_some_and(|hash| blake3::Hash::from_hex(hash).is_ok_and(|hash| hash == given))
        };
        self.users.iter().find(|(_, user)| is_theirs(user)).map(|(name, user)| (name.clone(), user.scope()))
    }
}

impl User {
    fn scope(&self) -> Scope {
        match self.tenants.as_slice() {
            [all] if all == ALL_TENANTS => Scope::All,
            _ => Scope::Tenants(self.tenants.clone()),
        }
    }
}

#[cfg(test)]
mod tests;
