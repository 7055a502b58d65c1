//! The thread of a session, which alone uses its connection to DuckDB. It has a low priority, so
//! that readers never starve the replicator.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use pgwire::api::Type;
use tokio::sync::oneshot;

use super::{
    Shared,
    control::{Control, Open},
    error::SqlError,
    guard::{PATTERN_HINT, PATTERN_REFUSED, is_plain_text},
    output::{Encoder, Output},
    pg_type,
    rewrite::rewrite,
    rows::{Pushed, RowQueue},
    tokens::{Kind, Token, text as text_of},
    turns::Turn,
};
use crate::olap::{
    Cells, ErrorKind, Pass, SessionConnection, SqlType, Statement, StatementError, Value, names,
};

/// How long a statement waits for a file that is closed.
const CLOSED_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client may leave rows unread before its statement ends: it holds up upkeep.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(300);

/// The most columns of a result, as in PostgreSQL (`MaxTupleAttributeNumber`).
const MAX_COLUMNS: usize = 1664;

/// The most schemas that names are looked up in.
const MAX_SCHEMAS: usize = 100;

/// The number of a statement that is prepared; those that run have others.
const PREPARING: u64 = 0;

/// The stack of a thread: some functions of DuckDB go as deep as the text they read.
const STACK_BYTES: usize = 64 << 20;

type Job = Box<dyn FnOnce(&mut Reading) + Send>;

/// The thread, as the session uses it.
pub struct Reader {
    jobs: mpsc::Sender<Job>,
    pub control: Arc<Control>,
}

impl Reader {
    /// Starts the thread.
    ///
    /// # Errors
    /// DuckDB opens no connection, or the copy is not ready.
    pub fn start(shared: &Arc<Shared>) -> Result<Self, SqlError> {
        let connection = shared.file.connect()?;
        let control = Arc::new(Control::new(connection.interrupter()));
        let (jobs, waiting) = mpsc::channel::<Job>();

        let reading = Reading {
            shared: Arc::clone(shared),
            connection,
            control: Arc::clone(&control),
            jobs: jobs.clone(),
            transaction: Transaction::None,
            serialise: None,
        };

        let nice = shared.options.nice;
        let alive = Arc::clone(&shared.readers);
        std::thread::Builder::new()
            .name("rhei-reader".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _alive = alive;
                // Dropped before `_alive`, whose end says that the connection is closed.
                let mut reading = reading;
                // Without the right to do so the thread works as it is.
                let _ = rustix::process::setpriority_process(None, nice);
                while let Ok(job) = waiting.recv() {
                    job(&mut reading);
                }
            })
            .map_err(|error| SqlError::fatal("53000", format!("no thread: {error}")))?;
        Ok(Self { jobs, control })
    }

    /// Has the thread do some work, after what it does now.
    pub async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Reading) -> Result<R, SqlError> + Send + 'static,
    ) -> Result<R, SqlError> {
        let (reply, done) = oneshot::channel();
        self.start_job(move |reading| {
            // Sending the reply fails when the caller was dropped with its connection.
            let _ = reply.send(work(reading));
        })?;
        done.await.map_err(|_| SqlError::lost())?
    }

    /// Has the thread do some work, without waiting for it.
    pub fn start_job(
        &self,
        work: impl FnOnce(&mut Reading) + Send + 'static,
    ) -> Result<(), SqlError> {
        self.jobs.send(Box::new(work)).map_err(|_| SqlError::lost())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.control.end(SqlError::fatal("57P01", "the session has ended"));
        // The thread ends when all senders of jobs are dropped; it holds one of them itself.
        let _ = self.start_job(|reading| {
            reading.roll_back();
            reading.jobs = mpsc::channel().0;
        });
    }
}

/// A statement that is checked, and known by its parameters and columns.
pub struct Query {
    statement: Mutex<Statement>,
    /// Values of parameters may be patterns of LIKE.
    has_pattern: bool,
    pub parameters: Vec<Type>,
    pub fields: Vec<Field>,
}

/// A column of a result.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    pub name: String,
    pub of: Type,
    pub typmod: i32,
}

impl Field {
    fn of((name, sql): &(String, SqlType)) -> Self {
        let (of, typmod) = pg_type::of_result(sql);
        Self { name: name.clone(), of, typmod }
    }
}

/// What the thread works with.
pub struct Reading {
    /// Serialises a statement for the guard.
    serialise: Option<Statement>,
    transaction: Transaction,
    connection: SessionConnection,
    control: Arc<Control>,
    jobs: mpsc::Sender<Job>,
    /// Dropped last, after the connection.
    shared: Arc<Shared>,
}

enum Transaction {
    None,
    /// The pass is held for as long as the transaction is open.
    Open(#[expect(dead_code, reason = "held, not read")] Pass),
    /// The transaction was ended from outside, for this reason.
    Lost(SqlError),
}

impl Reading {
    /// Sets the connection up. The file has to be open for that.
    pub fn enter_file(&mut self, search_path: &[String]) -> Result<(), SqlError> {
        let _pass = self.pass()?;
        self.shared.catalog.make(&self.connection)?;
        // Arrow is to say what it cannot hold in a type of its own, as of UUID and HUGEINT.
        self.connection.execute("SET TimeZone = 'UTC'; SET arrow_lossless_conversion = true")?;
        self.set_search_path_now(search_path)
    }

    /// Has names without a schema looked up in these schemas.
    pub fn set_search_path(&mut self, schemas: &[String]) -> Result<(), SqlError> {
        let _pass = match &self.transaction {
            Transaction::Open(_) => None,
            _ => Some(self.pass()?),
        };
        self.set_search_path_now(schemas)
    }

    fn set_search_path_now(&self, schemas: &[String]) -> Result<(), SqlError> {
        // As in PostgreSQL, a schema that is not there is passed over.
        let mut known = self.connection.prepare(
            "SELECT any_value(schema_name) FROM duckdb_schemas() WHERE database_name = \
             'rhei_target' AND schema_name = $1",
        )?;
        let mut path = Vec::new();
        for schema in schemas.iter().take(MAX_SCHEMAS) {
            if first_text(&mut known, &[Value::Text(schema.clone())])?.is_some() {
                path.push(format!("{}.{}", names::CATALOG, names::quoted(schema)));
            }
        }
        path.push(format!("{}.main", super::catalog::DATABASE));

        let path = names::literal(&path.join(","));
        Ok(self.connection.execute(&format!("SET search_path = {path}"))?)
    }

    fn pass(&self) -> Result<Pass, SqlError> {
        let (control, jobs) = (Arc::clone(&self.control), self.jobs.clone());
        let reason = || {
            SqlError::new(
                "40001",
                "canceling statement: the copy's file has to be closed for upkeep",
            )
            .hint("begin the transaction again")
        };
        let end = move || {
            control.end(reason());
            let _ = jobs.send(Box::new(move |reading: &mut Reading| reading.lose(reason())));
        };
        self.shared.file.gate().enter(CLOSED_TIMEOUT, Box::new(end)).ok_or_else(|| {
            SqlError::new("57P03", "the copy's file is closed for upkeep: try again in a moment")
        })
    }

    /// Ends a transaction from outside.
    fn lose(&mut self, reason: SqlError) {
        if matches!(self.transaction, Transaction::Open(_)) {
            self.roll_back();
            self.transaction = Transaction::Lost(reason);
        }
    }

    /// Begins a transaction, which sees the copy as it is now.
    pub fn begin(&mut self) -> Result<(), SqlError> {
        if matches!(self.transaction, Transaction::Open(_)) {
            return Ok(());
        }
        let pass = self.pass()?;
        self.connection.execute("BEGIN TRANSACTION READ ONLY")?;

        // DuckDB takes the snapshot of a file with the first read from it.
        let pinned = self.connection.execute("SELECT 1 FROM rhei_target._rhei.pipeline");
        self.transaction = Transaction::Open(pass);
        self.control.set_open(Open::Transaction);
        if let Err(error) = pinned {
            self.roll_back();
            return Err(error.into());
        }
        self.control.finish(true);
        Ok(())
    }

    /// Ends the transaction, if there is one. Nothing was written, so it does not matter how.
    pub fn roll_back(&mut self) {
        if matches!(self.transaction, Transaction::Open(_)) {
            // The ROLLBACK fails when an error has ended the transaction already.
            let _ = self.connection.execute("ROLLBACK");
            self.control.set_open(Open::Nothing);
        }
        self.transaction = Transaction::None;
        self.control.finish(false);
    }

    /// Does the work of one statement, which may be ended from outside, and may take this time.
    fn controlled<R>(
        &mut self,
        number: u64,
        within: Option<Duration>,
        work: impl FnOnce(&mut Self) -> Result<R, SqlError>,
    ) -> Result<R, SqlError> {
        self.control.begin(number, within);
        let done = work(self);
        let is_open = matches!(self.transaction, Transaction::Open(_));
        let ended = self.control.finish(is_open);

        let done = match (done, ended) {
            (Err(_), Some(reason)) => Err(reason),
            (done, _) => done,
        };
        // A file that has to be closed waits for this transaction.
        if let Err(error) = &done
            && error.code == "40001"
        {
            self.lose(error.clone());
        }
        // A bug that DuckDB has met while it ran a statement ends it for the whole process.
        if let Err(error) = &done
            && error.code == "XX000"
            && self.connection.execute("SELECT 1").is_err_and(|e| e.kind == ErrorKind::Fatal)
        {
            self.shared.broken.cancel();
        }
        done
    }

    /// Returns an error when the statement was ended from outside.
    fn check_ended(&self) -> Result<(), SqlError> {
        // The reason takes the place of this error.
        if self.control.is_over() {
            Err(SqlError::new("57014", "canceling statement"))
        } else {
            Ok(())
        }
    }

    fn take_turn(&self) -> Result<Turn, SqlError> {
        let turn = self.shared.turns.take(|| self.control.is_over());
        turn.ok_or_else(|| SqlError::new("57014", "canceling statement"))
    }

    /// Checks and prepares a statement, within this time. `declared` are the types that the client
    /// gave its parameters.
    pub fn prepare(
        &mut self,
        statement: Vec<Token>,
        declared: &[Option<Type>],
        within: Option<Duration>,
    ) -> Result<Query, SqlError> {
        let plan = |reading: &mut Self| reading.plan(statement, declared);
        let began = Instant::now();
        let planned = self.controlled(PREPARING, within, plan);
        if planned.is_err() {
            self.shared.meter.statement(began.elapsed(), false);
        }
        planned
    }

    fn plan(
        &mut self,
        statement: Vec<Token>,
        declared: &[Option<Type>],
    ) -> Result<Query, SqlError> {
        let statement = rewrite(statement, &self.shared.names);
        let sql = text_of(&statement);
        self.check_ended()?;

        let _pass = match &self.transaction {
            Transaction::Lost(reason) => return Err(reason.clone()),
            Transaction::Open(_) => None,
            Transaction::None => Some(self.pass()?),
        };
        // Planning is work too: some statements take longer to plan than to run.
        let _turn = self.take_turn()?;

        self.check(&sql)?;
        let is_pattern = |token: &Token| {
            ["like", "ilike", "glob"].iter().any(|word| token.is(word)) || token.text.contains('~')
        };
        let has_pattern = statement.iter().any(is_pattern);

        self.check_ended()?;
        let mut prepared = self.connection.prepare(&sql)?;
        if !prepared.is_select {
            return Err(SqlError::new("25006", "this copy is read-only"));
        }

        let parameters = parameter_types(&self.inferred(&prepared, &statement)?, declared);
        let mut sql = sql;
        if !parameters.is_empty() {
            sql = text_of(&with_casts(statement, &parameters));
            self.check_ended()?;
            prepared = self.connection.prepare(&sql)?;
        }
        if !prepared.columns.iter().all(|(_, of)| of.is_readable()) {
            self.check_ended()?;
            prepared = self.connection.prepare(&as_text(&sql, &prepared.columns))?;
        }

        let fields: Vec<Field> = prepared.columns.iter().map(Field::of).collect();
        if fields.len() > MAX_COLUMNS {
            return Err(SqlError::new("54011", "a result has at most 1664 columns"));
        }
        Ok(Query { statement: Mutex::new(prepared), has_pattern, parameters, fields })
    }

    /// Returns what a statement makes of its parameters.
    fn inferred(
        &self,
        prepared: &Statement,
        statement: &[Token],
    ) -> Result<Vec<SqlType>, SqlError> {
        let mut inferred = prepared.parameters.clone();
        let (items, lists) = with_items_for_lists(statement);
        if lists.is_empty() {
            return Ok(inferred);
        }

        self.check_ended()?;
        let of_items = self.connection.prepare(&text_of(&items))?.parameters;
        for number in lists {
            let at = number.wrapping_sub(1);
            if let (Some(list), Some(item)) = (inferred.get_mut(at), of_items.get(at)) {
                *list = SqlType::List(Box::new(item.clone()));
            }
        }
        Ok(inferred)
    }

    /// Has the guard look at a statement.
    fn check(&mut self, sql: &str) -> Result<(), SqlError> {
        let serialise = match self.serialise.take() {
            Some(serialise) => serialise,
            None => self.connection.prepare("SELECT json_serialize_sql($1::VARCHAR)")?,
        };
        let serialise = self.serialise.insert(serialise);
        let json = first_text(serialise, &[Value::Text(sql.to_owned())])?.unwrap_or_default();

        let exists = |name: &str| {
            let found = self.connection.prepare(
                "SELECT any_value(table_name) FROM duckdb_tables() WHERE database_name = \
                 'rhei_target' AND lower(table_name) = lower($1)",
            );
            found
                .and_then(|mut found| first_text(&mut found, &[Value::Text(name.to_owned())]))
                .is_ok_and(|found| found.is_some())
        };
        self.shared.guard.check(&json, &exists)
    }

    /// Runs a query to its end. The rows, and how it ended, go into the queue.
    pub fn run(
        &mut self,
        query: &Query,
        (values, within): (&[Value], Option<Duration>),
        output: &Output,
        queue: &RowQueue,
    ) {
        if queue.is_abandoned() {
            return queue.finish(Ok(()));
        }
        if query.has_pattern && !values.iter().all(is_plain_value) {
            let refused = SqlError::new("42501", PATTERN_REFUSED).hint(PATTERN_HINT);
            return queue.finish(Err(refused));
        }
        let run = |reading: &mut Self| reading.run_in_transaction(query, values, output, queue);
        let began = Instant::now();
        let done = self.controlled(queue.number, within, run);
        self.shared.meter.statement(began.elapsed(), done.is_ok());
        queue.finish(done);
    }

    fn run_in_transaction(
        &mut self,
        query: &Query,
        values: &[Value],
        output: &Output,
        queue: &RowQueue,
    ) -> Result<(), SqlError> {
        let is_alone = match &self.transaction {
            Transaction::Lost(reason) => return Err(reason.clone()),
            Transaction::Open(_) => false,
            Transaction::None => true,
        };
        let _pass = if is_alone { Some(self.pass()?) } else { None };
        let turn = self.take_turn()?;

        if is_alone {
            self.control.shielded(|| {
                let begun = self.connection.execute("BEGIN TRANSACTION READ ONLY");
                if begun.is_err() {
                    let _ = self.connection.execute("ROLLBACK");
                }
                begun
            })?;
            self.control.set_open(Open::Statement);
        }
        let done =
            self.check_ended().and_then(|()| self.send_rows(query, values, output, queue, turn));
        if is_alone {
            // Fails when an error has ended the transaction already; nothing was written.
            let _ = self.control.shielded(|| self.connection.execute("ROLLBACK"));
            self.control.set_open(Open::Nothing);
        }
        done
    }

    fn send_rows(
        &self,
        query: &Query,
        values: &[Value],
        output: &Output,
        queue: &RowQueue,
        turn: Turn,
    ) -> Result<(), SqlError> {
        let mut turn = Some(turn);
        let mut statement = query.statement.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows = statement.run(values)?;

        let types = rows.types().to_vec();
        let is_same = types.len() == query.fields.len()
            && types
                .iter()
                .zip(&query.fields)
                .all(|(of, field)| pg_type::of_result(of).0 == field.of);
        if !is_same {
            return Err(SqlError::new("0A000", "cached plan must not change result type"));
        }

        let mut encoder = Encoder::of(output, &types, &query.fields, &mut rows)?;
        let mut pushed = queue.push(encoder.head(&query.fields))?;
        while let Some(chunk) = rows.next_chunk()? {
            if pushed == Pushed::Full {
                // Others may run while the client reads.
                drop(turn.take());
                self.wait_for_client(queue)?;
                turn = self.shared.turns.take(|| self.control.is_over());
            }
            if pushed == Pushed::Abandoned || self.control.is_over() {
                return Err(SqlError::new("57014", "canceling statement"));
            }
            pushed = queue.push(encoder.rows(&chunk)?)?;
            queue.rows.fetch_add(chunk.rows() as u64, Ordering::Relaxed);
        }
        queue.push(encoder.tail()?)?;
        Ok(())
    }

    fn wait_for_client(&self, queue: &RowQueue) -> Result<(), SqlError> {
        self.control.pause();
        let has_room = queue.wait_for_room(UNREAD_TIMEOUT, || self.control.is_over());
        self.control.resume();
        if has_room {
            return Ok(());
        }
        Err(SqlError::new("57014", "canceling statement: the client does not read its rows"))
    }
}

fn is_plain_value(value: &Value) -> bool {
    !matches!(value, Value::Text(text) if !is_plain_text(text))
}

/// Returns the first value of a statement's first row.
pub fn first_text(
    statement: &mut Statement,
    values: &[Value],
) -> Result<Option<String>, StatementError> {
    let mut rows = statement.run(values)?;
    let Some(chunk) = rows.next_chunk()? else { return Ok(None) };
    let columns = chunk.columns();
    Ok(match columns.first() {
        Some(column) if !column.is_null(0) => match &column.cells {
            Cells::Text(values) | Cells::Json(values) => {
                Some(String::from_utf8_lossy(values.get(0)).into_owned())
            }
            _ => None,
        },
        _ => None,
    })
}

/// Returns the types of parameters: what the client said, else what the statement makes of them,
/// else text.
fn parameter_types(inferred: &[SqlType], declared: &[Option<Type>]) -> Vec<Type> {
    let of = |(at, inferred): (usize, &SqlType)| {
        let declared = declared.get(at).cloned().flatten();
        match declared.filter(|of| ![Type::UNKNOWN].contains(of) && of.oid() != 0) {
            Some(declared) => declared,
            None => pg_type::of_result(inferred).0,
        }
    };
    inferred.iter().enumerate().map(of).collect()
}

/// Returns a statement with `= $1` in the place of `= ANY($1)`, and the numbers of these
/// parameters: DuckDB infers the type of one item then, and does not infer that of a list.
fn with_items_for_lists(statement: &[Token]) -> (Vec<Token>, Vec<usize>) {
    let (mut items, mut numbers, mut at) = (Vec::new(), Vec::new(), 0);
    while let Some(token) = statement.get(at) {
        let is_list = (token.is("any") || token.is("all") || token.is("some"))
            && statement.get(at + 1).is_some_and(|token| token.is_sign("("))
            && statement.get(at + 3).is_some_and(|token| token.is_sign(")"));
        let parameter = statement.get(at + 2).filter(|token| token.kind == Kind::Parameter);
        let number = parameter.and_then(|token| token.text.strip_prefix('$')?.parse().ok());

        if let (true, Some(number), Some(parameter)) = (is_list, number, parameter) {
            items.push(Token { is_spaced: true, ..parameter.clone() });
            numbers.push(number);
            at += 4;
        } else {
            items.push(token.clone());
            at += 1;
        }
    }
    (items, numbers)
}

/// Replaces each parameter by a cast of it.
fn with_casts(statement: Vec<Token>, parameters: &[Type]) -> Vec<Token> {
    let cast = |mut token: Token| {
        let number = token.text.strip_prefix('$').and_then(|number| number.parse::<usize>().ok());
        if let (Kind::Parameter, Some(number)) = (token.kind, number)
            && let Some(of) = number.checked_sub(1).and_then(|at| parameters.get(at))
            && let Some(to) = pg_type::cast_of(of)
        {
            token.text = format!("CAST(${number} AS {to})");
        }
        token
    };
    statement.into_iter().map(cast).collect()
}

/// Returns a statement that gives columns which cannot be read as text.
fn as_text(sql: &str, columns: &[(String, SqlType)]) -> String {
    let (mut names, mut selected) = (Vec::new(), Vec::new());
    for (at, (name, of)) in columns.iter().enumerate() {
        let column = format!("c{at}");
        let value =
            if of.is_readable() { column.clone() } else { format!("CAST({column} AS VARCHAR)") };
        selected.push(format!("{value} AS {}", names::quoted(name)));
        names.push(column);
    }
    format!("SELECT {} FROM ({sql}) AS _rhei({})", selected.join(", "), names.join(", "))
}
