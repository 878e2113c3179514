//! Queries on more machines than one: Ballista's scheduler and executors, with our tables, functions and guards.
//!
//! A query is planned by who asks, as ever: tables are opened, guards and scopes applied, and files chosen there. What is left is sent
//! to a scheduler, which cuts it at its exchanges into stages, and to executors, which read the files and know our functions. So a
//! cluster is told which rows to read and never decides it.
//!
//! Invariant: a job that nobody waits for is told to end. An answer is whole or an error, and no row of it is handed over twice.

mod codec;
pub(crate) mod executor;
pub(crate) mod scan;
pub(crate) mod scheduler;

use crate::guards::Refused;
use ballista_core::{
    client::BallistaClient,
    extension::{SessionConfigExt as _, SessionConfigHelperExt as _},
    serde::protobuf::{
        CancelJobParams, CleanJobDataParams, ExecuteQueryParams, GetJobStatusParams, KeyValuePair,
        PartitionLocation, RemoveSessionParams, execute_query_failure_result::Failure,
        execute_query_params::Query, execute_query_result, job_status::Status,
        scheduler_grpc_client::SchedulerGrpcClient,
    },
    utils::{GrpcClientConfig, create_grpc_client_endpoint},
    version,
};
use codec::Codec;
use datafusion::{
    arrow::{
        array::{RecordBatch, RecordBatchOptions, new_null_array},
        datatypes::Schema,
    },
    common::{
        DataFusionError,
        tree_node::{Transformed, TreeNode as _},
    },
    datasource::{memory::MemorySourceConfig, source::DataSourceExec},
    execution::{SendableRecordBatchStream, TaskContext},
    physical_plan::{
        ExecutionPlan, analyze::AnalyzeExec, empty::EmptyExec, placeholder_row::PlaceholderRowExec,
        stream::RecordBatchReceiverStream, streaming::StreamingTableExec,
    },
    prelude::SessionConfig,
};
use datafusion_proto::{physical_plan::AsExecutionPlan as _, protobuf::PhysicalPlanNode};
use futures::StreamExt as _;
use std::{
    convert::Infallible,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    runtime::Handle,
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tonic::transport::Channel;
use uuid::Uuid;

/// Where a scheduler listens unless somebody says otherwise: on this machine alone.
pub(crate) const SCHEDULER: &str = "127.0.0.1:50050";
/// In how many parts rows are exchanged where nobody says how many tasks the executors take at a time.
const PARTS: usize = 16;
/// The most parts: each stage writes as many files as the parts of the one before times its own.
const PARTS_MAX: usize = 256;
/// The largest message between two processes. A plan names each of its files in about 200 bytes, so it holds some hundred thousand.
const MESSAGE_BYTES_MAX: u32 = 64 << 20;
/// How long a scheduler may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// How long a scheduler may be without executors: one that just starts finds them in a second or two.
const EXECUTORS_WAIT: Duration = Duration::from_secs(10);
/// How often it is asked meanwhile.
const EXECUTORS_EVERY: Duration = Duration::from_millis(200);
/// How often a job is looked at: soon at first, and less often the longer it runs.
const LOOK_EVERY_MIN: Duration = Duration::from_millis(5);
const LOOK_EVERY_MAX: Duration = Duration::from_millis(100);
/// How often a query is asked before it is given up, where an executor died with rows that were not handed over yet.
const TRIES: u32 = 3;
/// How long jobs that are told to end may take to hear it.
const END_WAIT: Duration = Duration::from_secs(2);
/// The way out that needs nobody else.
const WITHOUT: &str = "or leave --scheduler out, and it is answered here";
/// How the scheduler says that a job failed as nobody was left to work on it.
const EXECUTORS_GONE: &str = "all executors were lost";
/// How many batches the network may be ahead of who reads them.
const BATCHES_AHEAD: usize = 2;

/// Why a cluster does not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens there.
    #[error(
        "there is no scheduler at {address}, so the query was not asked; see whether `forebay sql scheduler` runs there and ask again, {WITHOUT}"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// It was there, and is no more.
    #[error(
        "the scheduler at {address} was lost {} ({message}); the query was not answered, and nothing was changed; see whether \
         `forebay sql scheduler` runs there and ask again, {WITHOUT}",
        when.as_str()
    )]
    Gone {
        /// Where.
        address: String,
        /// How far it had come.
        when: When,
        /// What happened.
        message: String,
    },
    /// Something else listens there.
    #[error("{address} is no scheduler of SQL: it answered {answer:?}; check --scheduler")]
    Stranger {
        /// Where.
        address: String,
        /// The first line of its answer.
        answer: String,
    },
    /// There is nobody to do the work.
    #[error(
        "the scheduler at {address} has no executor, and none came within {}; start some by `forebay sql executor --scheduler {address}` \
         and ask again, {WITHOUT}",
        humantime::format_duration(EXECUTORS_WAIT)
    )]
    NoExecutors {
        /// Where.
        address: String,
    },
    /// There was somebody to do the work, and no more.
    #[error(
        "the scheduler at {address} lost all its executors while they worked on the query, and none came again; it was not answered, and \
         nothing was changed; start some by `forebay sql executor --scheduler {address}` and ask again, {WITHOUT}"
    )]
    ExecutorsGone {
        /// Where.
        address: String,
    },
    /// It was spoken to and did not understand.
    #[error(
        "the scheduler at {address} could not {doing}: {message}; the query was not answered; ask again, {WITHOUT}"
    )]
    Scheduler {
        /// Where.
        address: String,
        /// What it was asked.
        doing: &'static str,
        /// What it said.
        message: String,
    },
    /// Tasks failed for good.
    #[error("the executors could not answer: {message}{}", hint(message))]
    Failed {
        /// What the first of them said.
        message: String,
    },
    /// The answer was there, and its executor is gone.
    #[error(
        "the scheduler at {address} lost an executor with the answer, {TRIES} times: {message}; ask again, {WITHOUT}"
    )]
    Lost {
        /// Where.
        address: String,
        /// What happened.
        message: String,
    },
    /// Rows were handed over already.
    #[error(
        "the scheduler at {address} lost an executor in the middle of the answer, so what was shown is not all of it: {message}; ask again"
    )]
    Broken {
        /// Where.
        address: String,
        /// What happened.
        message: String,
    },
}

/// How far a query had come.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// Nobody knows whether it was taken.
    Asking,
    /// It was worked on.
    Working,
    /// Some of the rows were handed over.
    Answering,
}

impl When {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Asking => "before it said that it took the query",
            Self::Working => "while the query ran",
            Self::Answering => "in the middle of the answer, so that what was shown is not all of it",
        }
    }
}

fn hint(message: &str) -> &'static str {
    let is_full = message.contains("Resources exhausted") || message.contains("ResourcesExhausted");
    if is_full {
        "; select fewer columns or groups, bound its time, or raise --memory of the executors"
    } else {
        ""
    }
}

impl From<Error> for DataFusionError {
    fn from(error: Error) -> Self {
        Self::External(Box::new(error))
    }
}

/// The scheduler that queries of a session are sent to.
#[derive(Clone, Debug)]
pub struct Cluster {
    address: String,
    /// Jobs are told to end there: also those of a runtime that is about to stop.
    runtime: Handle,
    /// What each job holds until it has ended.
    jobs: Arc<Jobs>,
}

#[derive(Debug)]
struct Jobs {
    running: Mutex<Option<mpsc::Sender<Infallible>>>,
    ended: tokio::sync::Mutex<mpsc::Receiver<Infallible>>,
}

impl Cluster {
    /// The cluster of a scheduler, `host:port`. Nothing is sent before the first query; to be called within a runtime that outlives them.
    pub fn new(address: String) -> Self {
        let (running, ended) = mpsc::channel(1);
        let jobs = Jobs { running: Mutex::new(Some(running)), ended: tokio::sync::Mutex::new(ended) };
        Self { address, runtime: Handle::current(), jobs: Arc::new(jobs) }
    }

    /// Waits until jobs that are told to end have heard it, and sends no others.
    pub async fn leave(&self) {
        self.jobs.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Nothing is ever sent; it ends when the last job has.
        let _ = timeout(END_WAIT, self.jobs.ended.lock().await.recv()).await;
    }

    /// The rows of a plan that [`scan`] made; of any other, those that this process works out itself.
    pub(crate) async fn execute(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        task: Arc<TaskContext>,
    ) -> Result<SendableRecordBatchStream, DataFusionError> {
        if !plan.exists(|node| Ok(scan::is_shared(node.as_ref())))? {
            return datafusion::physical_plan::execute_stream(plan, task);
        }
        if plan.exists(|node| Ok(node.is::<AnalyzeExec>()))? {
            return Err(Refused::Local { what: "EXPLAIN ANALYZE", instead: ", or write EXPLAIN" }.into());
        }
        // Lists of tables are this process's own.
        if plan.exists(|node| Ok(node.is::<StreamingTableExec>()))? {
            let what = "information_schema, together with tables,";
            return Err(Refused::Local { what, instead: ", or each on its own" }.into());
        }
        let plan = without_bare_leaves(plan)?;
        let mut bytes = Vec::new();
        PhysicalPlanNode::try_from_physical_plan(Arc::clone(&plan), &Codec::sending())?
            .try_encode(&mut bytes)?;
        let settings = task.session_config().to_key_value_pairs();
        let mut rows = RecordBatchReceiverStream::builder(plan.schema(), BATCHES_AHEAD);
        let (to, cluster) = (rows.tx(), self.clone());
        rows.spawn(async move { Ok(cluster.answer(&bytes, &settings, &to).await?) });
        Ok(rows.build())
    }

    /// Has the query answered, again where an executor took the answer with it.
    async fn answer(
        &self,
        plan: &[u8],
        settings: &[KeyValuePair],
        to: &mpsc::Sender<Result<RecordBatch, DataFusionError>>,
    ) -> Result<(), Error> {
        let mut tried = 0;
        loop {
            self.wait_for_executors().await?;
            let mut job = self.submit(plan, settings).await?;
            let places = job.done().await?;
            match self.hand_over(places, to).await {
                Ok(()) => return Ok(()),
                Err(Error::Lost { .. }) if tried + 1 < TRIES => tried += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// In how many parts rows are best exchanged: one for each task that the executors take at a time. More only cost, each a task and a
    /// file for each other; fewer leave executors idle.
    pub(crate) async fn parts(&self) -> usize {
        // Where it is away, whoever sends the plan says so.
        let tasks = self.tasks().await.ok().flatten();
        tasks.filter(|tasks| *tasks > 0).map_or(PARTS, |tasks| tasks.min(PARTS_MAX))
    }

    async fn wait_for_executors(&self) -> Result<(), Error> {
        let until = Instant::now() + EXECUTORS_WAIT;
        while self.tasks().await?.is_none() {
            if Instant::now() >= until {
                return Err(Error::NoExecutors { address: self.address.clone() });
            }
            sleep(EXECUTORS_EVERY).await;
        }
        Ok(())
    }

    /// How many tasks are worked on at a time; none where there is no executor. A scheduler tells it to whoever probes it.
    async fn tasks(&self) -> Result<Option<usize>, Error> {
        let asked = async {
            let mut connection = TcpStream::connect(&self.address).await?;
            let request = format!("GET /readyz HTTP/1.0\r\nhost: {}\r\n\r\n", self.address);
            connection.write_all(request.as_bytes()).await?;
            let mut answer = Vec::new();
            let read = connection.take(1_024).read_to_end(&mut answer).await;
            // Who hangs up on what was asked has answered all the same.
            if !answer.contains(&b'\n') {
                read?;
            }
            io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
        };
        let answer = timeout(ANSWER_WAIT, asked).await.unwrap_or_else(|late| Err(late.into()));
        let address = || self.address.clone();
        let answer = answer.map_err(|source| Error::Unreachable { address: address(), source })?;
        let first = answer.lines().next().unwrap_or_default();
        match first.split(' ').nth(1) {
            Some("200") => {
                let tasks = answer.trim_end().strip_suffix(" tasks").and_then(|told| told.rsplit(' ').next());
                Ok(Some(tasks.and_then(|tasks| tasks.parse().ok()).unwrap_or(0)))
            }
            Some("503") => Ok(None),
            _ => Err(Error::Stranger { address: address(), answer: first.to_owned() }),
        }
    }

    /// Sends the plan by a task of its own: where nobody waits for it any more, what the scheduler has taken is known all the same, and is
    /// told to end. Its connection outlives the threads of the query.
    async fn submit(&self, plan: &[u8], settings: &[KeyValuePair]) -> Result<Job, Error> {
        let (cluster, plan, settings) = (self.clone(), plan.to_vec(), settings.to_vec());
        let sent = self.runtime.spawn(async move { cluster.send(plan, settings).await });
        sent.await.map_err(|cut_off| self.fault("take the query")(cut_off.to_string()))?
    }

    async fn send(&self, plan: Vec<u8>, settings: Vec<KeyValuePair>) -> Result<Job, Error> {
        let fault = |doing| self.fault(doing);
        let unreachable = || {
            let source = io::Error::other("the session has ended");
            Error::Unreachable { address: self.address.clone(), source }
        };
        let held = self.jobs.running.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let held = held.ok_or_else(unreachable)?;
        let gone = |message| Error::Gone { address: self.address.clone(), when: When::Asking, message };
        let mut scheduler = connect(&self.address).await.map_err(|error| gone(format!("{error:#}")))?;
        // A session each: what one leaves behind there must not reach the next.
        let session_id = Uuid::now_v7().to_string();
        let mut request = tonic::Request::new(ExecuteQueryParams {
            query: Some(Query::PhysicalPlan(plan)),
            settings,
            session_id: session_id.clone(),
            operation_id: session_id.clone(),
        });
        version::insert_version_header(request.metadata_mut());
        let answer = scheduler.execute_query(request).await;
        let answer = answer.map_err(|status| match is_gone(&status) {
            true => gone(told(&status)),
            false => fault("take the query")(told(&status)),
        })?;
        let job_id = match answer.into_inner().result {
            Some(execute_query_result::Result::Success(success)) => success.job_id,
            Some(execute_query_result::Result::Failure(failure)) => {
                let message = match failure.failure {
                    Some(
                        Failure::PlanParsingFailure(message)
                        | Failure::SessionNotFound(message)
                        | Failure::SqlParsingFailure(message),
                    ) => message,
                    None => String::new(),
                };
                return Err(fault("take the query")(message));
            }
            None => return Err(fault("take the query")("it said nothing".to_owned())),
        };
        let runtime = self.runtime.clone();
        Ok(Job {
            job_id,
            session_id,
            address: self.address.clone(),
            scheduler,
            is_done: false,
            runtime,
            held,
        })
    }

    fn fault(&self, doing: &'static str) -> impl FnOnce(String) -> Error + '_ {
        move |message| Error::Scheduler { address: self.address.clone(), doing, message }
    }

    /// Reads the answer where it lies, through the scheduler: who asks need not reach the executors.
    async fn hand_over(
        &self,
        places: Vec<PartitionLocation>,
        to: &mpsc::Sender<Result<RecordBatch, DataFusionError>>,
    ) -> Result<(), Error> {
        let mut has_rows = false;
        for place in places {
            let mut rows = match self.fetch(place).await {
                Ok(rows) => rows,
                Err(message) => return Err(self.lost(has_rows, message).await),
            };
            while let Some(batch) = rows.next().await {
                let batch = match batch {
                    Ok(batch) => batch,
                    Err(fault) => return Err(self.lost(has_rows, fault.to_string()).await),
                };
                if to.send(Ok(batch)).await.is_err() {
                    return Ok(());
                }
                has_rows = true;
            }
        }
        Ok(())
    }

    /// Who was lost with rows of an answer: the scheduler, through which they come, or an executor.
    async fn lost(&self, has_rows: bool, message: String) -> Error {
        let address = self.address.clone();
        match (self.tasks().await, has_rows) {
            (Err(Error::Unreachable { .. }), true) => Error::Gone { address, when: When::Answering, message },
            (Err(Error::Unreachable { .. }), false) => Error::Gone { address, when: When::Working, message },
            (_, true) => Error::Broken { address, message },
            (_, false) => Error::Lost { address, message },
        }
    }

    async fn fetch(&self, place: PartitionLocation) -> Result<SendableRecordBatchStream, String> {
        let layout = place.layout();
        let (Some(executor), Some(partition)) = (place.executor_meta, place.partition_id.map(Into::into))
        else {
            return Err("the scheduler did not say where the answer lies".to_owned());
        };
        let (host, port) = self.address.rsplit_once(':').ok_or("the address has no port")?;
        let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
        let GrpcClientConfig { io_retries_times, io_retry_wait_time_ms, .. } = grpc();
        let (bytes_max, retries, pause_ms) =
            (MESSAGE_BYTES_MAX as usize, io_retries_times, io_retry_wait_time_ms);
        let connected =
            BallistaClient::try_new(host, port, bytes_max, false, None, retries, pause_ms, 0, 0).await;
        let mut client = connected.map_err(|error| error.to_string())?;
        let executor_port = u16::try_from(executor.port).map_err(|fault| fault.to_string())?;
        let fetched = client.fetch_partition_proxied(
            &executor.id,
            &partition,
            place.file_id,
            layout,
            &executor.host,
            executor_port,
            true,
        );
        fetched.await.map_err(|error| error.to_string())
    }
}

/// A query that a scheduler works on. Dropped, it is told to end, and what it left behind to go.
struct Job {
    job_id: String,
    session_id: String,
    address: String,
    scheduler: SchedulerGrpcClient<Channel>,
    is_done: bool,
    runtime: Handle,
    held: mpsc::Sender<Infallible>,
}

impl Job {
    /// Waits until it is done; where its rows lie.
    async fn done(&mut self) -> Result<Vec<PartitionLocation>, Error> {
        let (mut pause, mut known) = (LOOK_EVERY_MIN, Instant::now());
        let address = || self.address.clone();
        let gone = |message| Error::Gone { address: address(), when: When::Working, message };
        loop {
            let asked =
                self.scheduler.get_job_status(GetJobStatusParams { job_id: self.job_id.clone() }).await;
            let status = asked.map_err(|status| match is_gone(&status) {
                true => gone(told(&status)),
                false => {
                    let doing = "tell of the query";
                    Error::Scheduler { address: address(), doing, message: told(&status) }
                }
            })?;
            match status.into_inner().status.and_then(|status| status.status) {
                Some(Status::Successful(done)) => {
                    self.is_done = true;
                    return Ok(done.partition_location);
                }
                Some(Status::Failed(failed)) => {
                    self.is_done = true;
                    return Err(match failed.error.contains(EXECUTORS_GONE) {
                        true => Error::ExecutorsGone { address: address() },
                        false => Error::Failed { message: failed.error },
                    });
                }
                Some(Status::Queued(_) | Status::Running(_)) => known = Instant::now(),
                // A query that was just taken is not known at once. One that stays unknown was another scheduler's, at whose address
                // a new one was started.
                None if known.elapsed() < ANSWER_WAIT => {}
                None => return Err(gone("a new one there does not know the query".to_owned())),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LOOK_EVERY_MAX);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let (mut scheduler, held) = (self.scheduler.clone(), self.held.clone());
        let (job_id, session_id, is_done) = (self.job_id.clone(), self.session_id.clone(), self.is_done);
        // A scheduler that does not hear it ends the job by its own deadline, and forgets the rest in minutes.
        self.runtime.spawn(async move {
            let told = async {
                if is_done {
                    let _ = scheduler
                        .clean_job_data(CleanJobDataParams { job_id, remove_stage_ids: Vec::new() })
                        .await;
                } else {
                    let _ = scheduler.cancel_job(CancelJobParams { job_id }).await;
                }
                let _ = scheduler.remove_session(RemoveSessionParams { session_id }).await;
            };
            let _ = timeout(END_WAIT, told).await;
            drop(held);
        });
    }
}

/// Whether a scheduler did not answer, rather than answered that it could not. What it says itself has no cause on this side.
fn is_gone(status: &tonic::Status) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, Unavailable};
    let is_silence = matches!(status.code(), Cancelled | DeadlineExceeded | Unavailable);
    is_silence || std::error::Error::source(status).is_some()
}

/// What a status says, with its causes.
fn told(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(next) = cause {
        let said = next.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = next.source();
    }
    text
}

async fn connect(address: &str) -> anyhow::Result<SchedulerGrpcClient<Channel>> {
    let limits = GrpcClientConfig { max_message_size: MESSAGE_BYTES_MAX as usize, ..grpc() };
    let endpoint = create_grpc_client_endpoint(format!("http://{address}"), Some(&limits));
    let channel = endpoint?.connect().await?;
    Ok(SchedulerGrpcClient::new(channel)
        .max_encoding_message_size(MESSAGE_BYTES_MAX as usize)
        .max_decoding_message_size(MESSAGE_BYTES_MAX as usize))
}

/// How queries are planned that are sent to a cluster: without what would need two stages to share memory.
pub(crate) fn planned(config: SessionConfig) -> SessionConfig {
    config.upgrade_for_ballista().with_target_partitions(PARTS)
}

/// The same plan with the rows that it makes itself, one or none, as rows in memory.
///
/// Ballista 55.0 puts such rows in the place of these two leaves where a task has no part of them, as beneath UNION ALL. But they count
/// nothing and rows in memory do, and a stage whose tasks count differently never ends.
fn without_bare_leaves(plan: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>, DataFusionError> {
    let replaced = plan.transform_up(|node| {
        let is_row = node.is::<PlaceholderRowExec>();
        if !is_row && !node.is::<EmptyExec>() {
            return Ok(Transformed::no(node));
        }
        // Nobody reads what is in the one row, whatever its columns are said to be.
        let fields = node
            .schema()
            .fields()
            .iter()
            .map(|field| field.as_ref().clone().with_nullable(true))
            .collect::<Vec<_>>();
        let schema = if is_row { Arc::new(Schema::new(fields)) } else { node.schema() };
        let mut rows = Vec::new();
        if is_row {
            let nulls = schema.fields().iter().map(|field| new_null_array(field.data_type(), 1)).collect();
            let one = RecordBatchOptions::new().with_row_count(Some(1));
            rows.push(RecordBatch::try_new_with_options(Arc::clone(&schema), nulls, &one)?);
        }
        let rows = MemorySourceConfig::try_new(&[rows], schema, None)?;
        Ok(Transformed::yes(DataSourceExec::from_data_source(rows) as Arc<dyn ExecutionPlan>))
    });
    Ok(replaced?.data)
}

fn grpc() -> GrpcClientConfig {
    GrpcClientConfig::from(&SessionConfig::new_with_ballista().ballista_config())
}

#[cfg(test)]
mod tests;
