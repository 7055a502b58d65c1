//! The protocol, by the `pgwire` crate: each message becomes a call of the session.

use std::{fmt::Debug, sync::Arc};

use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::{Sink, SinkExt, StreamExt, stream};
use pgwire::{
    api::{
        ClientInfo, ClientPortalStore, DEFAULT_NAME, PgWireConnectionState, Type,
        cancel::CancelHandler,
        portal::{Format, Portal, PortalExecutionState},
        query::{
            ExtendedQueryHandler, SimpleQueryHandler, send_describe_response,
            send_execution_response, send_partial_query_response, send_query_response,
        },
        results::{DescribePortalResponse, FieldFormat, FieldInfo, QueryResponse, Response, Tag},
        stmt::QueryParser,
        store::{Entry, PortalStore},
    },
    error::{PgWireError, PgWireResult},
    messages::{
        PgWireBackendMessage,
        cancel::CancelRequest,
        copy::{CopyData, CopyDone, CopyOutResponse},
        data::DataRow,
        extendedquery::{Describe, Execute, Sync as PgSync, TARGET_TYPE_BYTE_PORTAL},
        response::{EmptyQueryResponse, ReadyForQuery, TransactionStatus},
        simplequery::Query,
    },
};

use super::{
    Shared,
    error::SqlError,
    params, pg_type,
    reader::Field,
    session::{Answer, CopyOut, Prepared, Session},
    startup::Startup,
    tokens::{statements, tokens},
};

/// The handlers of all connections.
pub struct Handlers {
    pub shared: Arc<Shared>,
    pub startup: Arc<Startup>,
}

/// Does what messages ask for.
pub struct Queries;

/// Prepares statements.
pub struct Parser;

fn session_of<C: ClientInfo>(client: &C) -> PgWireResult<Arc<Session>> {
    client.session_extensions().get::<Session>().ok_or_else(|| SqlError::lost().into())
}

/// A transaction that has failed takes nothing but its end.
fn check_state<C: ClientInfo>(client: &C, prepared: &Prepared) -> Result<(), SqlError> {
    let has_failed = client.transaction_status() == TransactionStatus::Error;
    if has_failed && !matches!(prepared, Prepared::End { .. }) {
        return Err(failed_transaction());
    }
    Ok(())
}

/// A transaction that has failed is rolled back, whatever ends it.
fn as_rollback<'a, C: ClientInfo>(client: &C, prepared: &'a Prepared) -> &'a Prepared {
    let has_failed = client.transaction_status() == TransactionStatus::Error;
    if has_failed { &Prepared::End { tag: "ROLLBACK" } } else { prepared }
}

fn failed_transaction() -> SqlError {
    SqlError::new(
        "25P02",
        "current transaction is aborted, commands ignored until end of transaction block",
    )
}

fn field_info(field: &Field, format: FieldFormat) -> FieldInfo {
    FieldInfo::new(field.name.clone(), None, None, field.of.clone(), format)
        .with_type_modifier(field.typmod)
        .with_type_size(pg_type::size(&field.of))
}

fn schema(fields: &[Field], format: &Format) -> Vec<FieldInfo> {
    let info = |(at, field)| field_info(field, format.format_for(at));
    fields.iter().enumerate().map(info).collect()
}

/// The one column of SHOW.
fn shown(name: &str) -> Vec<Field> {
    vec![Field { name: name.to_owned(), of: Type::TEXT, typmod: -1 }]
}

/// What a client gets for a statement.
enum Reply {
    Rows(QueryResponse),
    Copy(CopyOut),
    Done(Tag),
}

/// Returns what a client gets.
fn reply(answer: Answer, format: &Format) -> Reply {
    let rows = |fields: &[Field], format: &Format, rows, tag: &str| {
        let mut response = QueryResponse::new(Arc::new(schema(fields, format)), rows);
        response.set_command_tag(tag);
        Reply::Rows(response)
    };
    let row = |row: BytesMut, columns: usize| {
        DataRow::new(row, i16::try_from(columns).unwrap_or(i16::MAX))
    };

    match answer {
        Answer::Rows { fields, rows: stream, tag } => {
            let columns = fields.len();
            let stream = stream
                .into_stream()
                .map(move |next| next.map(|bytes| row(bytes, columns)).map_err(PgWireError::from));
            rows(&fields, format, stream.boxed(), tag)
        }
        Answer::Fetched { fields, rows: fetched, tag } => {
            let columns = fields.len();
            let stream =
                stream::iter(fetched.into_iter().map(move |bytes| Ok(row(bytes, columns))));
            // A cursor gives text, whatever a client asks of FETCH.
            rows(&fields, &Format::UnifiedText, stream.boxed(), tag)
        }
        Answer::Value { name, value } => {
            let mut bytes = BytesMut::new();
            bytes.extend_from_slice(&(value.len() as u32).to_be_bytes());
            bytes.extend_from_slice(value.as_bytes());
            rows(&shown(&name), format, stream::iter([Ok(row(bytes, 1))]).boxed(), "SHOW")
        }
        Answer::Copy(copy) => Reply::Copy(copy),
        Answer::Began => Reply::Done(Tag::new("BEGIN")),
        Answer::Ended(tag) => Reply::Done(Tag::new(tag)),
        Answer::Done { tag, rows: None } => Reply::Done(Tag::new(tag)),
        Answer::Done { tag, rows: Some(rows) } => Reply::Done(Tag::new(tag).with_rows(rows)),
    }
}

/// Has later statements, also of the same message, and errors know of a transaction.
fn note_transaction<C: ClientInfo>(client: &mut C, answer: &Answer) {
    match answer {
        Answer::Began => client.set_transaction_status(TransactionStatus::Transaction),
        Answer::Ended(_) => client.set_transaction_status(TransactionStatus::Idle),
        _ => {}
    }
}

#[async_trait]
impl SimpleQueryHandler for Queries {
    /// Runs the statements of a message one after the other, and sends what each gives before the
    /// next one begins. (The crate's own way gathers the answers first.)
    async fn on_query<C>(&self, client: &mut C, query: Query) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        if !matches!(client.state(), PgWireConnectionState::ReadyForQuery) {
            return Err(PgWireError::NotReadyForQuery);
        }
        check_length(&query.query)?;
        client.set_state(PgWireConnectionState::QueryInProgress);

        let statements = statements(tokens(&query.query));
        if statements.is_empty() {
            let empty = EmptyQueryResponse::new();
            client.feed(PgWireBackendMessage::EmptyQueryResponse(empty)).await?;
        }
        let session = session_of(client)?;
        for statement in statements {
            match answer_simple(client, &session, statement).await? {
                Reply::Rows(rows) => send_query_response(client, rows, true).await?,
                Reply::Copy(copy) => send_copy(client, copy).await?,
                Reply::Done(tag) => send_execution_response(client, tag).await?,
            }
        }

        client.set_state(PgWireConnectionState::ReadyForQuery);
        let status = client.transaction_status();
        client.send(PgWireBackendMessage::ReadyForQuery(ReadyForQuery::new(status))).await?;
        Ok(())
    }

    async fn do_query<C>(&self, _client: &mut C, _query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        // Only the crate's own `on_query` calls it.
        Err(SqlError::new("XX000", "a query outside of its message").into())
    }
}

/// Sends the rows of a COPY. An error in the middle ends them as it ends those of any statement.
async fn send_copy<C>(client: &mut C, mut copy: CopyOut) -> PgWireResult<()>
where
    C: Sink<PgWireBackendMessage> + Unpin,
    C::Error: Debug,
    PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
{
    let columns = i16::try_from(copy.columns).unwrap_or(i16::MAX);
    let formats = vec![i16::from(copy.is_binary); copy.columns];
    let begun = CopyOutResponse::new(i8::from(copy.is_binary), columns, formats);
    client.feed(PgWireBackendMessage::CopyOutResponse(begun)).await?;

    while let Some(next) = copy.rows.next().await {
        let data = CopyData::new(next?.freeze());
        client.feed(PgWireBackendMessage::CopyData(data)).await?;
    }

    let rows = usize::try_from(copy.rows.count()).unwrap_or(usize::MAX);
    client.feed(PgWireBackendMessage::CopyDone(CopyDone::new())).await?;
    send_execution_response(client, Tag::new("COPY").with_rows(rows)).await
}

/// Each sign of a statement may become a token.
fn check_length(sql: &str) -> Result<(), SqlError> {
    const MAX_BYTES: usize = 1 << 20;
    if sql.len() > MAX_BYTES {
        return Err(SqlError::new("54000", "a statement has at most a megabyte here"));
    }
    Ok(())
}

async fn answer_simple<C: ClientInfo + ClientPortalStore>(
    client: &mut C,
    session: &Session,
    statement: Vec<super::tokens::Token>,
) -> Result<Reply, SqlError>
where
    C::PortalStore: PortalStore,
{
    let has_failed = client.transaction_status() == TransactionStatus::Error;
    if has_failed && !ends_transaction(&statement) {
        return Err(failed_transaction());
    }
    let prepared = session.prepare(statement, Vec::new()).await?;
    let columns = match &prepared {
        Prepared::Query(query) => query.fields.len(),
        _ => 0,
    };
    let prepared = as_rollback(client, &prepared);
    close_portals(client, prepared);
    let answer = session.run(prepared, Vec::new(), vec![false; columns]).await?;
    note_transaction(client, &answer);
    Ok(reply(answer, &Format::UnifiedText))
}

/// `ROLLBACK TO` does not end a transaction, and there are no savepoints to go back to.
fn ends_transaction(statement: &[super::tokens::Token]) -> bool {
    if statement.get(1).is_some_and(|token| token.is("to")) {
        return false;
    }
    let is = |word: &str| statement.first().is_some_and(|token| token.is(word));
    ["commit", "end", "rollback", "abort"].into_iter().any(is)
}

#[async_trait]
impl QueryParser for Parser {
    type Statement = Arc<Prepared>;

    async fn parse_sql<C>(
        &self,
        client: &C,
        sql: &str,
        types: &[Option<Type>],
    ) -> PgWireResult<Option<Self::Statement>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        check_length(sql)?;
        let mut all = statements(tokens(sql));
        if all.len() > 1 {
            let message = "cannot insert multiple commands into a prepared statement";
            return Err(SqlError::new("42601", message).into());
        }
        let Some(statement) = all.pop() else { return Ok(None) };
        if client.transaction_status() == TransactionStatus::Error && !ends_transaction(&statement)
        {
            return Err(failed_transaction().into());
        }
        let prepared = session_of(client)?.prepare(statement, types.to_vec()).await?;
        Ok(Some(Arc::new(prepared)))
    }

    fn get_parameter_types(&self, statement: &Self::Statement) -> PgWireResult<Vec<Type>> {
        Ok(match &**statement {
            Prepared::Query(query)
            | Prepared::CopyOut { query, .. }
            | Prepared::Declare { query, .. } => query.parameters.clone(),
            _ => Vec::new(),
        })
    }

    fn get_result_schema(
        &self,
        statement: &Self::Statement,
        format: Option<&Format>,
    ) -> PgWireResult<Vec<FieldInfo>> {
        let format = format.unwrap_or(&Format::UnifiedText);
        formats(format, columns_of(statement))?;
        Ok(match &**statement {
            Prepared::Query(query) => schema(&query.fields, format),
            Prepared::Fetch { fields, moves_only: false, .. } => {
                schema(fields, &Format::UnifiedText)
            }
            Prepared::Show { name, .. } => schema(&shown(name), format),
            _ => Vec::new(),
        })
    }
}

#[async_trait]
impl ExtendedQueryHandler for Queries {
    type Statement = Arc<Prepared>;
    type QueryParser = Parser;

    fn query_parser(&self) -> Arc<Parser> {
        Arc::new(Parser)
    }

    /// Describes also a cursor that SQL declared, which clients take for a portal.
    async fn on_describe<C>(&self, client: &mut C, message: Describe) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        if let Some(name) = message.name.as_deref()
            && message.target_type == TARGET_TYPE_BYTE_PORTAL
            && client.portal_store().get_portal(name).is_none()
            && let Ok(fields) = session_of(client)?.cursor_fields(name)
        {
            let described = DescribePortalResponse::new(schema(&fields, &Format::UnifiedText));
            return send_describe_response(client, &described).await;
        }
        self._on_describe(client, message).await
    }

    /// Sends rows as they come: the crate's own way gathers all of them first.
    async fn on_execute<C>(&self, client: &mut C, message: Execute) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        if !matches!(client.state(), PgWireConnectionState::ReadyForQuery) {
            return Err(PgWireError::NotReadyForQuery);
        }
        client.set_state(PgWireConnectionState::QueryInProgress);
        let name = message.name.as_deref().unwrap_or(DEFAULT_NAME);
        let max_rows = usize::try_from(message.max_rows).unwrap_or(0);

        match client.portal_store().get_portal(name) {
            None => return Err(PgWireError::PortalNotFound(name.to_owned())),
            Some(Entry::Empty) => {
                client
                    .feed(PgWireBackendMessage::EmptyQueryResponse(EmptyQueryResponse::new()))
                    .await?;
            }
            Some(Entry::Value(portal)) => self.execute(client, &portal, max_rows).await?,
        }
        client.set_state(PgWireConnectionState::ReadyForQuery);
        Ok(())
    }

    /// Portals live as long as their transaction, so that one outside of any ends here.
    async fn on_sync<C>(&self, client: &mut C, _message: PgSync) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let status = client.transaction_status();
        if status == TransactionStatus::Idle {
            client.portal_store().clear_portals();
        } else {
            client.portal_store().rm_portal(DEFAULT_NAME);
        }
        client.send(PgWireBackendMessage::ReadyForQuery(ReadyForQuery::new(status))).await?;
        Ok(())
    }

    async fn do_query<C>(
        &self,
        _client: &mut C,
        _portal: &Portal<Self::Statement>,
        _max_rows: usize,
    ) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        // Only the crate's own `on_execute` calls it.
        Err(SqlError::new("XX000", "a portal outside of its message").into())
    }
}

impl Queries {
    /// Runs a portal, or goes on with it.
    async fn execute<C>(
        &self,
        client: &mut C,
        portal: &Portal<Arc<Prepared>>,
        max_rows: usize,
    ) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let state = portal.state();
        let mut state = state.lock().await;
        if matches!(*state, PortalExecutionState::Initial) {
            match start(client, portal).await? {
                Reply::Rows(rows) => *state = PortalExecutionState::Suspended(rows),
                Reply::Copy(copy) => return send_copy(client, copy).await,
                Reply::Done(tag) => return send_execution_response(client, tag).await,
            }
        }

        let is_open = match &mut *state {
            PortalExecutionState::Suspended(rows) => {
                send_partial_query_response(client, rows, max_rows).await?
            }
            _ => {
                send_execution_response(client, Tag::new("SELECT").with_rows(0)).await?;
                false
            }
        };
        if !is_open {
            *state = PortalExecutionState::Finished;
        }
        Ok(())
    }
}

/// Portals end with their transaction: what they still had is not waited for.
fn close_portals<C: ClientPortalStore>(client: &C, prepared: &Prepared)
where
    C::PortalStore: PortalStore,
{
    if matches!(prepared, Prepared::End { .. }) {
        client.portal_store().clear_portals();
    }
}

/// Runs the statement of a portal.
async fn start<C: ClientInfo + ClientPortalStore>(
    client: &mut C,
    portal: &Portal<Arc<Prepared>>,
) -> PgWireResult<Reply>
where
    C::PortalStore: PortalStore,
{
    let prepared = &portal.statement.statement;
    check_state(client, prepared)?;

    let parameters = Parser.get_parameter_types(prepared)?;
    let binary = formats(&portal.result_column_format, columns_of(prepared))?;
    if matches!(&**prepared, Prepared::Fetch { .. }) && binary.contains(&true) {
        let message = "FETCH gives text here: use a portal with a row limit for binary rows";
        return Err(SqlError::new("0A000", message).into());
    }
    let values = values(portal, &parameters)?;

    let prepared = as_rollback(client, prepared);
    close_portals(client, prepared);
    let answer = session_of(client)?.run(prepared, values, binary).await?;
    note_transaction(client, &answer);
    Ok(reply(answer, &portal.result_column_format))
}

/// Returns how many columns the answer to a statement has.
fn columns_of(prepared: &Prepared) -> usize {
    match prepared {
        Prepared::Query(query) => query.fields.len(),
        Prepared::Fetch { fields, moves_only: false, .. } => fields.len(),
        Prepared::Show { .. } => 1,
        _ => 0,
    }
}

/// Returns which columns a client wants in binary.
fn formats(format: &Format, columns: usize) -> Result<Vec<bool>, SqlError> {
    if let Format::Individual(codes) = format
        && codes.len() != columns
        && columns > 0
    {
        let message = format!(
            "bind message has {} result formats but query has {columns} columns",
            codes.len()
        );
        return Err(SqlError::new("08P01", message));
    }
    Ok((0..columns).map(|at| format.is_binary(at)).collect())
}

fn values(
    portal: &Portal<Arc<Prepared>>,
    types: &[Type],
) -> Result<Vec<crate::olap::Value>, SqlError> {
    let given = portal.parameters.len();
    if given != types.len() {
        let message = format!(
            "bind message supplies {given} parameters, but statement requires {}",
            types.len()
        );
        return Err(SqlError::new("08P01", message));
    }
    if let Format::Individual(codes) = &portal.parameter_format
        && codes.len() != given
    {
        return Err(SqlError::new("08P01", "bind message has another number of parameter formats"));
    }

    let value = |(at, of): (usize, &Type)| {
        let bytes = portal.parameters.get(at).and_then(Option::as_deref);
        params::value(of, bytes, portal.parameter_format.is_binary(at))
    };
    types.iter().enumerate().map(value).collect()
}

#[async_trait]
impl CancelHandler for Handlers {
    async fn on_cancel_request(&self, request: CancelRequest) {
        self.shared.cancel(request.pid, &request.secret_key);
    }
}
