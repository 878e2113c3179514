//! The PostgreSQL wire protocol: psql, Grafana, Metabase and the drivers of all languages ask as they ask PostgreSQL.
//!
//! A user of the file of users logs in by name, with the token as password. It comes in clear text, so this listens on the machine itself
//! or behind what ends TLS. Cursors are not known, and nothing can be written.
//!
//! Invariant: every query passes the guards of its user's [`Session`] and sees the newest tables, each in one version. Connections are
//! bounded, and one whose client reads nothing more ends.

use crate::guards::{self, Users};
use crate::session::{CATALOG, Error as SessionError, SCHEMA, Session};
use crate::stall::{STALL_MAX, Stalling};
use arrow::array::StringArray;
use arrow::datatypes::DataType;
use async_trait::async_trait;
use datafusion::catalog::SchemaProvider;
use datafusion::common::cast::as_string_array;
use datafusion::common::{DataFusionError, ParamValues, ScalarValue};
use datafusion::logical_expr::{ColumnarValue, LogicalPlan, ScalarUDF, Volatility, create_udf};
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::Statement;
use datafusion_postgres::arrow_pg::datatypes::{
    arrow_schema_to_pg_fields, df::deserialize_parameters_with_server_types, encode_recordbatch,
};
use datafusion_postgres::datafusion_pg_catalog::pg_catalog::{
    PgCatalogSchemaProvider, PgCatalogStaticTables, context::EmptyContextProvider, setup_pg_catalog,
};
use datafusion_postgres::hooks::{
    HookClient, QueryHook, set_show::SetShowHook, transactions::TransactionStatementHook,
};
use datafusion_postgres::pgwire::api::auth::{
    DefaultServerParameterProvider, StartupHandler, finish_authentication, protocol_negotiation,
    save_startup_parameters_to_metadata,
};
use datafusion_postgres::pgwire::api::cancel::DefaultCancelHandler;
use datafusion_postgres::pgwire::api::portal::{Format, Portal};
use datafusion_postgres::pgwire::api::query::{ExtendedQueryHandler, SimpleQueryHandler};
use datafusion_postgres::pgwire::api::results::{FieldInfo, QueryResponse, Response};
use datafusion_postgres::pgwire::api::stmt::QueryParser;
use datafusion_postgres::pgwire::api::store::PortalStore;
use datafusion_postgres::pgwire::api::{
    ClientInfo, ClientPortalStore, ConnectionGuard, ConnectionHandle, ConnectionManager, DefaultClient,
    METADATA_USER, NoopHandler, PgWireConnectionState, PidSecretKeyGenerator, RandomPidSecretKeyGenerator,
    Type,
};
use datafusion_postgres::pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use datafusion_postgres::pgwire::messages::response::{GssEncResponse, SslResponse};
use datafusion_postgres::pgwire::messages::startup::Authentication;
use datafusion_postgres::pgwire::messages::{
    PgWireBackendMessage, PgWireFrontendMessage, SslNegotiationMetaMessage,
};
use datafusion_postgres::pgwire::tokio::server::{PgWireMessageServerCodec, process_error, process_message};
use datafusion_postgres::pgwire::types::format::FormatOptions;
use datafusion_postgres::{DfSessionService, Parser};
use futures::{Sink, SinkExt as _, StreamExt as _, stream};
use std::collections::HashMap;
use std::fmt::Debug;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::codec::Framed;
use tracing::{debug, info, warn};

/// Connections at once; who comes when all are taken is turned away.
const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to log in.
const LOGIN_MAX: Duration = Duration::from_secs(60);
/// How long connections may still be used once the process ends.
const GRACE: Duration = Duration::from_secs(5);

/// Serves until `shutdown`. `session` lends its tables, memory and limits; whose rows are seen is by user.
pub async fn serve(
    listener: TcpListener,
    session: Session,
    users: Users,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let (session, users) = (Arc::new(session), Arc::new(users));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let cancels = Arc::new(ConnectionManager::new());
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let (socket, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(fault) => {
                    // Such as no descriptor left: it passes, and accepting again at once would only fail again.
                    warn!(error = %fault, "could not accept a connection of the PostgreSQL protocol");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
            () = &mut shutdown => break,
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            warn!(%peer, connections = CONNECTIONS_MAX, "turned a connection away: all places are taken");
            continue;
        };
        let login = Login {
            session: Arc::clone(&session),
            users: Arc::clone(&users),
            cancels: Arc::clone(&cancels),
            queries: Arc::new(Queries { user: OnceLock::new(), describing: describing() }),
        };
        connections.spawn(async move {
            if let Err(fault) = converse(login, socket, peer).await {
                debug!(%peer, error = %fault, "a connection ended");
            }
            drop(place);
        });
    }
    let _ = tokio::time::timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
    Ok(())
}

/// Answers message after message. As pgwire does it for a bare socket, which may stall for ever; TLS is not offered.
async fn converse(login: Login, socket: TcpStream, peer: SocketAddr) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let codec = PgWireMessageServerCodec::new(DefaultClient::new(peer, false));
    let mut socket = Framed::new(Stalling::new(socket, STALL_MAX), codec);
    let login_until = tokio::time::Instant::now() + LOGIN_MAX;
    // Clients ask for TLS and for GSS, each once at most, before they say who they are.
    for _ in 0..2 {
        let asked = tokio::time::timeout_at(login_until, socket.next()).await?;
        let refusal = match asked {
            Some(Ok(PgWireFrontendMessage::SslNegotiation(SslNegotiationMetaMessage::PostgresSsl(_)))) => {
                PgWireBackendMessage::SslResponse(SslResponse::Refuse)
            }
            Some(Ok(PgWireFrontendMessage::SslNegotiation(SslNegotiationMetaMessage::PostgresGss(_)))) => {
                PgWireBackendMessage::GssEncResponse(GssEncResponse::Refuse)
            }
            _ => break,
        };
        socket.send(refusal).await?;
    }
    socket.set_state(PgWireConnectionState::AwaitingStartup);
    let queries = Arc::clone(&login.queries);
    let cancel = Arc::new(DefaultCancelHandler::new(Arc::clone(&login.cancels)));
    let (login, copy) = (Arc::new(login), Arc::new(NoopHandler));
    loop {
        let is_at_the_door = matches!(
            socket.state(),
            PgWireConnectionState::AwaitingStartup | PgWireConnectionState::AuthenticationInProgress
        );
        let message = match is_at_the_door {
            true => tokio::time::timeout_at(login_until, socket.next()).await?,
            false => socket.next().await,
        };
        let message = match message {
            None | Some(Err(_) | Ok(PgWireFrontendMessage::Terminate(_))) => return Ok(()),
            Some(Ok(message)) => message,
        };
        let is_extended = message.is_extended_query();
        let answered = process_message(
            message,
            &mut socket,
            Arc::clone(&login),
            Arc::clone(&queries),
            Arc::clone(&queries),
            Arc::clone(&copy),
            Arc::clone(&cancel),
        );
        if let Err(fault) = answered.await {
            process_error(&mut socket, fault, is_extended).await?;
        }
    }
}

/// Asks for the token, and opens the user's session.
struct Login {
    session: Arc<Session>,
    users: Arc<Users>,
    cancels: Arc<ConnectionManager>,
    queries: Arc<Queries>,
}

#[async_trait]
impl StartupHandler for Login {
    async fn on_startup<C>(&self, client: &mut C, message: PgWireFrontendMessage) -> PgWireResult<()>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        match message {
            PgWireFrontendMessage::Startup(startup) => {
                protocol_negotiation(client, &startup).await?;
                save_startup_parameters_to_metadata(client, &startup);
                client.set_state(PgWireConnectionState::AuthenticationInProgress);
                let ask = PgWireBackendMessage::Authentication(Authentication::CleartextPassword);
                client.send(ask).await?;
            }
            PgWireFrontendMessage::PasswordMessageFamily(given) => {
                let given = given.into_password()?;
                let named = client.metadata().get(METADATA_USER).cloned().unwrap_or_default();
                // One answer for a wrong name and a wrong token, or names could be found out.
                let known = self.users.by_token(&given.password).filter(|(user, _)| *user == named);
                let Some((user, scope)) = known else { return Err(PgWireError::InvalidPassword(named)) };
                info!(user, "a connection of the PostgreSQL protocol");
                let _ = self.queries.user.set(Arc::new(User::new(self.session.scoped(scope))?));
                let (pid, secret) = RandomPidSecretKeyGenerator::default().generate(client);
                client.set_pid_and_secret_key(pid, secret.clone());
                let (handle, guard) = self.cancels.register(pid, secret);
                client.session_extensions().insert::<Arc<ConnectionHandle>>(handle);
                client.session_extensions().insert::<ConnectionGuard>(guard);
                finish_authentication(client, &DefaultServerParameterProvider::default()).await?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whose connection it is.
struct User {
    session: Session,
    /// PostgreSQL's own tables, which number all others. One for the connection: clients ask for a table's number first, and by that
    /// number for its columns.
    names: Arc<dyn SchemaProvider>,
    /// What `names` looks tables up in.
    _named: SessionContext,
}

impl User {
    fn new(session: Session) -> PgWireResult<Self> {
        let named = session.context();
        let catalogs = Arc::clone(named.state().catalog_list());
        let tables = Arc::new(PgCatalogStaticTables::try_new().map_err(internal)?);
        let names =
            PgCatalogSchemaProvider::try_new(catalogs, tables, EmptyContextProvider).map_err(internal)?;
        Ok(Self { session, names: Arc::new(names), _named: named })
    }

    /// A context for one query, which sees the newest tables, those of PostgreSQL's catalog among them.
    fn context(&self) -> PgWireResult<SessionContext> {
        let context = self.session.context();
        setup_pg_catalog(&context, CATALOG, EmptyContextProvider).map_err(|fault| internal(*fault))?;
        context.register_udf(current_setting());
        if let Some(catalog) = context.catalog(CATALOG) {
            catalog.register_schema("pg_catalog", Arc::clone(&self.names)).map_err(internal)?;
        }
        Ok(context)
    }

    /// Answers one query, and sends its rows as they come.
    async fn answer(
        &self,
        statement: &Statement,
        parameters: Option<ParamValues>,
        format: &Format,
        client: &HashMap<String, String>,
    ) -> PgWireResult<Response> {
        let statement = DfStatement::Statement(Box::new(statement.clone()));
        let answer = self.session.answer(self.context()?, statement, parameters).await.map_err(refused)?;
        let options = Arc::new(FormatOptions::from_client_metadata(client));
        let fields = Arc::new(arrow_schema_to_pg_fields(&answer.schema, format, Some(options))?);
        let batches = stream::unfold(Some(answer), |answer| async move {
            let mut answer = answer?;
            match answer.next().await {
                Ok(Some(batch)) => Some((Ok(batch), Some(answer))),
                Ok(None) => None,
                Err(fault) => Some((Err(refused(fault)), None)),
            }
        });
        let shown = Arc::clone(&fields);
        let rows = batches.flat_map(move |batch| {
            let (rows, fault) = match batch {
                Ok(batch) => (Some(encode_recordbatch(Arc::clone(&shown), batch)), None),
                Err(fault) => (None, Some(Err(fault))),
            };
            stream::iter(rows.into_iter().flatten().chain(fault))
        });
        Ok(Response::Query(QueryResponse::new(fields, rows)))
    }
}

/// `current_setting(name)`, by which Grafana asks how new a PostgreSQL it speaks to. Null where there is no such setting.
fn current_setting() -> ScalarUDF {
    let setting = |name: &str| match name {
        // As the server says when a client logs in.
        "server_version_num" => Some("160006"),
        "search_path" => Some(SCHEMA),
        _ => None,
    };
    let settings = move |arguments: &[ColumnarValue]| match arguments {
        [ColumnarValue::Scalar(name)] => {
            let value = name.try_as_str().flatten().and_then(setting);
            Ok(ColumnarValue::Scalar(ScalarValue::from(value)))
        }
        [ColumnarValue::Array(names)] => {
            let values: StringArray =
                as_string_array(names)?.iter().map(|name| name.and_then(setting)).collect();
            Ok(ColumnarValue::Array(Arc::new(values)))
        }
        _ => Err(DataFusionError::Plan("current_setting takes one argument".to_owned())),
    };
    create_udf(
        "current_setting",
        vec![DataType::Utf8],
        DataType::Utf8,
        Volatility::Stable,
        Arc::new(settings),
    )
}

/// Answers the queries of a connection.
struct Queries {
    /// Set when it is known.
    user: OnceLock<Arc<User>>,
    /// Describes statements, for which it needs no tables.
    describing: Arc<Parser>,
}

/// A query as it was sent, and its plan; nothing where it is empty.
type Prepared = (String, Option<(Statement, LogicalPlan)>);

impl Queries {
    fn user(&self) -> PgWireResult<&Arc<User>> {
        self.user.get().ok_or_else(|| error("28000", "log in first".to_owned()))
    }

    /// What understands settings, transactions and the dialect, for one query.
    fn service(&self) -> PgWireResult<DfSessionService> {
        let user = self.user()?;
        let hooks: Vec<Arc<dyn QueryHook>> = vec![
            Arc::new(Limited),
            Arc::new(SetShowHook),
            Arc::new(TransactionStatementHook),
            Arc::new(Guarded(Arc::clone(user))),
        ];
        Ok(DfSessionService::new_with_hooks(Arc::new(user.context()?), hooks))
    }
}

fn describing() -> Arc<Parser> {
    DfSessionService::new_with_hooks(Arc::new(SessionContext::new()), Vec::new()).query_parser()
}

#[async_trait]
impl SimpleQueryHandler for Queries {
    async fn do_query<C>(&self, client: &mut C, query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        SimpleQueryHandler::do_query(&self.service()?, client, query).await.map_err(told)
    }
}

#[async_trait]
impl ExtendedQueryHandler for Queries {
    type Statement = Prepared;
    type QueryParser = Preparing;

    fn query_parser(&self) -> Arc<Preparing> {
        // A service of its own for each statement: its plan holds the tables that it was made with.
        Arc::new(Preparing { service: self.service(), describing: Arc::clone(&self.describing) })
    }

    async fn do_query<C>(
        &self,
        client: &mut C,
        portal: &Portal<Prepared>,
        rows_max: usize,
    ) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Prepared>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let (_, Some((statement @ (Statement::Query(_) | Statement::Explain { .. }), plan))) =
            &portal.statement.statement
        else {
            // Settings and transactions, which the hooks answer; anything else they refuse.
            let service = self.service()?;
            return ExtendedQueryHandler::do_query(&service, client, portal, rows_max).await.map_err(told);
        };
        let types = self.describing.get_parameter_types(&portal.statement.statement)?;
        let types: Vec<_> = types.iter().map(Some).collect();
        let mut known: Vec<_> = plan.get_parameter_types().map_err(internal)?.into_iter().collect();
        known.sort_by_key(|(name, _)| name.trim_start_matches('$').parse::<usize>().unwrap_or(usize::MAX));
        let known: Vec<_> = known.iter().map(|(_, kind)| kind.as_ref()).collect();
        let parameters = deserialize_parameters_with_server_types(portal, &known, &types)?;
        // Planned anew: a statement may be kept for days, and its plan holds the tables of the day on which it was prepared.
        self.user()?
            .answer(statement, Some(parameters), &portal.result_column_format, client.metadata())
            .await
    }
}

/// Prepares one statement.
struct Preparing {
    service: PgWireResult<DfSessionService>,
    describing: Arc<Parser>,
}

#[async_trait]
impl QueryParser for Preparing {
    type Statement = Prepared;

    async fn parse_sql<C>(
        &self,
        client: &C,
        sql: &str,
        types: &[Option<Type>],
    ) -> PgWireResult<Option<Prepared>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        let service = self.service.as_ref().map_err(|fault| error("28000", fault.to_string()))?;
        service.query_parser().parse_sql(client, sql, types).await.map_err(told)
    }

    fn get_parameter_types(&self, statement: &Prepared) -> PgWireResult<Vec<Type>> {
        self.describing.get_parameter_types(statement)
    }

    fn get_result_schema(
        &self,
        statement: &Prepared,
        columns: Option<&Format>,
    ) -> PgWireResult<Vec<FieldInfo>> {
        self.describing.get_result_schema(statement, columns)
    }
}

/// The first hook: nobody sets what the engine may take.
struct Limited;

impl Limited {
    fn refuse(statement: &Statement) -> Option<PgWireError> {
        let is_set = matches!(statement, Statement::Set(_) | Statement::Reset(_));
        let is_ours = is_set && statement.to_string().to_ascii_lowercase().contains("datafusion.");
        is_ours
            .then(|| error("42501", "what queries may take is set by the flags of `forebay sql`".to_owned()))
    }
}

#[async_trait]
impl QueryHook for Limited {
    async fn handle_simple_query(
        &self,
        statement: &Statement,
        _: &SessionContext,
        _: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        Self::refuse(statement).map(Err)
    }

    async fn handle_extended_parse_query(
        &self,
        statement: &Statement,
        _: &SessionContext,
        _: &(dyn ClientInfo + Send + Sync),
    ) -> Option<PgWireResult<LogicalPlan>> {
        Self::refuse(statement).map(Err)
    }

    async fn handle_extended_query(
        &self,
        statement: &Statement,
        _: &LogicalPlan,
        _: &ParamValues,
        _: &SessionContext,
        _: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        Self::refuse(statement).map(Err)
    }
}

/// The last hook: whatever is no setting and no transaction is the session's to answer, behind its guards.
struct Guarded(Arc<User>);

#[async_trait]
impl QueryHook for Guarded {
    async fn handle_simple_query(
        &self,
        statement: &Statement,
        _: &SessionContext,
        client: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        Some(self.0.answer(statement, None, &Format::UnifiedText, client.metadata()).await)
    }

    async fn handle_extended_parse_query(
        &self,
        statement: &Statement,
        context: &SessionContext,
        _: &(dyn ClientInfo + Send + Sync),
    ) -> Option<PgWireResult<LogicalPlan>> {
        let statement = DfStatement::Statement(Box::new(statement.clone()));
        let session = &self.0.session;
        let state = context.state();
        let planned = tokio::time::timeout(session.limits().deadline, state.statement_to_plan(statement));
        Some(match planned.await {
            Ok(Ok(plan)) => match guards::check(&plan, session.scope()) {
                Ok(()) => Ok(plan),
                Err(refused) => Err(error("42501", refused.to_string())),
            },
            Ok(Err(fault)) => Err(internal(fault)),
            Err(_) => Err(refused(SessionError::Deadline(session.limits().deadline))),
        })
    }

    async fn handle_extended_query(
        &self,
        statement: &Statement,
        _: &LogicalPlan,
        parameters: &ParamValues,
        _: &SessionContext,
        client: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        let parameters = Some(parameters.clone());
        Some(self.0.answer(statement, parameters, &Format::UnifiedText, client.metadata()).await)
    }
}

/// An answer that the session did not give, under the code by which drivers tell what to do.
fn refused(fault: SessionError) -> PgWireError {
    let code = match &fault {
        SessionError::Query { .. } => "42000",
        SessionError::Refused(_) => "42501",
        SessionError::Deadline(_) => "57014",
        SessionError::Memory { .. } => "53200",
        SessionError::Lake(_) | SessionError::Cluster(_) | SessionError::Prepare(_) => "58000",
    };
    let mut text = fault.to_string();
    let mut cause = std::error::Error::source(&fault);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    error(code, text)
}

fn internal(fault: DataFusionError) -> PgWireError {
    told(PgWireError::ApiError(Box::new(fault)))
}

/// Errors of the engine are the query's: a driver that is told of an internal error gives the connection up.
fn told(fault: PgWireError) -> PgWireError {
    let PgWireError::ApiError(cause) = fault else { return fault };
    let code = match cause.downcast_ref::<DataFusionError>().map(DataFusionError::find_root) {
        Some(DataFusionError::SQL(..)) => "42601",
        Some(DataFusionError::ResourcesExhausted(_)) => "53200",
        Some(DataFusionError::Plan(_) | DataFusionError::SchemaError(..)) => "42000",
        Some(DataFusionError::NotImplemented(_)) => "0A000",
        _ => "XX000",
    };
    let text = match cause.downcast_ref::<DataFusionError>() {
        Some(fault) => fault.message().into_owned(),
        None => cause.to_string(),
    };
    error(code, text)
}

fn error(code: &str, text: String) -> PgWireError {
    PgWireError::UserError(Box::new(ErrorInfo::new("ERROR".to_owned(), code.to_owned(), text)))
}

#[cfg(test)]
mod tests;
