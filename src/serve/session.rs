//! One session: what its client asks for, and what is open in it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering},
    time::Duration,
};

use bytes::BytesMut;
use futures_util::{Stream, stream};
use pgwire::api::Type;

use super::{
    Shared,
    command::{Command, CopyKind, Count},
    control::Control,
    error::SqlError,
    output::Output,
    reader::{Field, Query, Reader},
    rows::{RowQueue, SpoolSpace},
    settings::{Scope, Settings},
    tokens::{Token, tokens},
};
use crate::olap::Value;

/// The most results of a session that its client has not read to the end. Each keeps some rows in
/// memory.
const MAX_OPEN_RESULTS: usize = 32;

/// The most bytes of rows that one FETCH with a number gathers.
const MAX_FETCHED: usize = 64 << 20;

/// A session of a client.
pub struct Session {
    reader: Reader,
    /// The longest time that a statement may work.
    timeout: Option<Duration>,
    spools: Arc<SpoolSpace>,
    open: Mutex<Open>,
    settings: Mutex<Settings>,
}

#[derive(Default)]
struct Open {
    /// The result that the reader's thread may still be at.
    result: Option<Arc<RowQueue>>,
    /// All results of the session; one that is read to its end, or closed, is gone.
    results: Vec<Weak<RowQueue>>,
    cursors: HashMap<String, Cursor>,
    /// Where DuckDB looks names up.
    search_path: Vec<String>,
}

/// A cursor that was declared.
struct Cursor {
    rows: RowStream,
    fields: Arc<Vec<Field>>,
    is_held: bool,
}

/// A statement that is ready to run.
#[derive(Clone)]
pub enum Prepared {
    Query(Arc<Query>),
    CopyOut { query: Arc<Query>, format: super::command::CopyFormat },
    Declare { name: String, query: Arc<Query>, is_held: bool },
    Fetch { name: String, count: Count, moves_only: bool, fields: Arc<Vec<Field>> },
    Show { name: String, value: String },
    Begin,
    End { tag: &'static str },
    Set { name: String, value: String, scope: Scope },
    Close(Option<String>),
    Reset { name: Option<String>, tag: &'static str },
    Nothing(&'static str),
}

/// The answer to a statement.
pub enum Answer {
    Rows {
        fields: Arc<Vec<Field>>,
        rows: RowStream,
        tag: &'static str,
    },
    /// Rows that were read already.
    Fetched {
        fields: Arc<Vec<Field>>,
        rows: Vec<BytesMut>,
        tag: &'static str,
    },
    Copy(CopyOut),
    Value {
        name: String,
        value: String,
    },
    Began,
    Ended(&'static str),
    Done {
        tag: &'static str,
        rows: Option<usize>,
    },
}

/// The rows of a COPY, a message each.
pub struct CopyOut {
    pub columns: usize,
    pub is_binary: bool,
    pub rows: RowStream,
}

/// The rows of a statement. Dropping it ends the statement.
pub struct RowStream {
    queue: Arc<RowQueue>,
    control: Arc<Control>,
    /// Rows that came with others and are not wanted yet.
    left: std::vec::IntoIter<BytesMut>,
}

impl RowStream {
    /// Returns a stream without rows.
    fn empty(control: Arc<Control>, spools: &Arc<SpoolSpace>) -> Self {
        let queue = RowQueue::new(Arc::clone(spools));
        queue.finish(Ok(()));
        Self { queue, control, left: Vec::new().into_iter() }
    }

    pub async fn next(&mut self) -> Option<Result<BytesMut, SqlError>> {
        loop {
            if let Some(row) = self.left.next() {
                return Some(Ok(row));
            }
            match self.queue.next().await? {
                Ok(rows) => self.left = rows.into_iter(),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Returns how many rows the thread has handed over.
    pub fn count(&self) -> u64 {
        self.queue.rows.load(Ordering::Relaxed)
    }

    /// Returns the rows as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<BytesMut, SqlError>> + Send + 'static {
        stream::unfold(self, |mut rows| async move {
            let next = rows.next().await?;
            Some((next, rows))
        })
    }
}

impl Drop for RowStream {
    fn drop(&mut self) {
        // An interrupt would end the whole transaction: the thread notices at its next rows.
        if self.queue.abandon() && !self.control.is_in_transaction() {
            let reason = SqlError::new("57014", "canceling statement");
            self.control.end_statement(self.queue.number, reason);
        }
    }
}

impl Session {
    /// Opens a session. `settings` are those of the client's startup message.
    ///
    /// # Errors
    /// The copy is not ready, or closed.
    pub async fn open(
        shared: &Arc<Shared>,
        settings: BTreeMap<String, String>,
    ) -> Result<Self, SqlError> {
        let reader = Reader::start(shared)?;
        let settings = Settings::new(settings);
        let search_path = settings.search_path();
        let schemas = search_path.clone();
        reader.call(move |reading| reading.enter_file(&schemas)).await?;
        let timeout = shared.options.statement_timeout;
        Ok(Self {
            reader,
            timeout,
            spools: Arc::clone(&shared.spools),
            open: Mutex::new(Open { search_path, ..Open::default() }),
            settings: Mutex::new(settings),
        })
    }

    /// Returns what ends a statement of this session.
    pub fn control(&self) -> &Arc<Control> {
        &self.reader.control
    }

    fn settings_now(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_now(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees the reader's thread from a result that its client has not read to the end.
    fn free_reader(&self) {
        let result = self.open_now().result.take();
        if let Some(result) = result.filter(|result| !result.has_ended()) {
            result.read_to_end();
        }
    }

    /// Prepares a statement.
    ///
    /// # Errors
    /// The statement is refused, or DuckDB does not understand it.
    pub async fn prepare(
        &self,
        statement: Vec<Token>,
        declared: Vec<Option<Type>>,
    ) -> Result<Prepared, SqlError> {
        Ok(match Command::of(statement)? {
            Command::Query(statement) => {
                Prepared::Query(self.prepare_query(statement, declared).await?)
            }
            Command::CopyOut { query, format } => {
                let query = self.prepare_query(query, declared).await?;
                Prepared::CopyOut { query, format }
            }
            Command::Declare { name, query, is_held } => {
                let query = self.prepare_query(query, declared).await?;
                Prepared::Declare { name, query, is_held }
            }
            Command::Fetch { name, count, moves_only } => {
                let fields = self.cursor_fields(&name)?;
                Prepared::Fetch { name, count, moves_only, fields }
            }
            Command::Show(name) if name == "rhei_lsn" => {
                let query = tokens("SELECT lsn AS rhei_lsn FROM _rhei.freshness");
                Prepared::Query(self.prepare_query(query, Vec::new()).await?)
            }
            Command::Show(name) => {
                let value = self.settings_now().shown(&name);
                Prepared::Show { name, value }
            }
            Command::Begin => Prepared::Begin,
            Command::Commit => Prepared::End { tag: "COMMIT" },
            Command::Rollback => Prepared::End { tag: "ROLLBACK" },
            Command::Set { name, value, scope } => Prepared::Set { name, value, scope },
            Command::Close(name) => Prepared::Close(name),
            Command::Reset { name, tag } => Prepared::Reset { name, tag },
            Command::Deallocate => Prepared::Nothing("DEALLOCATE"),
            Command::Nothing(tag) => Prepared::Nothing(tag),
        })
    }

    async fn prepare_query(
        &self,
        statement: Vec<Token>,
        declared: Vec<Option<Type>>,
    ) -> Result<Arc<Query>, SqlError> {
        self.bring_path().await?;
        self.free_reader();
        let within = self.time_limit();
        let work = move |reading: &mut super::reader::Reading| {
            reading.prepare(statement, &declared, within)
        };
        self.reader.call(work).await.map(Arc::new)
    }

    /// Runs a statement.
    ///
    /// # Errors
    /// The statement is refused. An error of a query that runs comes with its rows.
    pub async fn run(
        &self,
        prepared: &Prepared,
        values: Vec<Value>,
        binary: Vec<bool>,
    ) -> Result<Answer, SqlError> {
        self.control().touch();
        match prepared {
            Prepared::Query(query) => {
                let fields = Arc::new(query.fields.clone());
                let rows = self.start(query, values, Output::Rows { binary })?;
                Ok(Answer::Rows { fields, rows, tag: "SELECT" })
            }
            Prepared::CopyOut { query, format } => {
                let rows = self.start(query, values, Output::Copy(format.clone()))?;
                Ok(Answer::Copy(CopyOut {
                    columns: query.fields.len(),
                    is_binary: matches!(format.kind, CopyKind::Binary | CopyKind::Arrow),
                    rows,
                }))
            }
            Prepared::Declare { name, query, is_held } => {
                self.declare(name, query, values, *is_held)?;
                Ok(Answer::Done { tag: "DECLARE CURSOR", rows: None })
            }
            Prepared::Fetch { name, fields, .. } if self.cursor_fields(name)? != *fields => {
                let message = format!("cursor \"{name}\" has other columns by now");
                Err(SqlError::new("0A000", message))
            }
            Prepared::Fetch { name, count: Count::All, moves_only: false, fields } => {
                let rows = self.take_rest(name)?;
                Ok(Answer::Rows { fields: Arc::clone(fields), rows, tag: "FETCH" })
            }
            Prepared::Fetch { name, count, moves_only, fields } => {
                let rows = self.fetch(name, *count).await?;
                if *moves_only {
                    return Ok(Answer::Done { tag: "MOVE", rows: Some(rows.len()) });
                }
                Ok(Answer::Fetched { fields: Arc::clone(fields), rows, tag: "FETCH" })
            }
            Prepared::Show { name, value } => {
                Ok(Answer::Value { name: name.clone(), value: value.clone() })
            }
            Prepared::Begin => {
                self.free_reader();
                self.reader.call(super::reader::Reading::begin).await?;
                self.settings_now().begin();
                Ok(Answer::Began)
            }
            Prepared::End { tag } => {
                self.end(*tag == "COMMIT").await?;
                Ok(Answer::Ended(tag))
            }
            Prepared::Set { name, value, scope } => {
                self.set(name, value, *scope).await?;
                Ok(Answer::Done { tag: "SET", rows: None })
            }
            Prepared::Close(name) => {
                self.close(name.as_deref())?;
                Ok(Answer::Done { tag: "CLOSE CURSOR", rows: None })
            }
            Prepared::Reset { name, tag } => {
                self.change_settings(|settings| settings.reset(name.as_deref())).await?;
                Ok(Answer::Done { tag, rows: None })
            }
            Prepared::Nothing(tag) => Ok(Answer::Done { tag, rows: None }),
        }
    }

    fn declare(
        &self,
        name: &str,
        query: &Arc<Query>,
        values: Vec<Value>,
        is_held: bool,
    ) -> Result<(), SqlError> {
        if self.open_now().cursors.contains_key(name) {
            return Err(SqlError::new("42P03", format!("cursor \"{name}\" already exists")));
        }
        let binary = vec![false; query.fields.len()];
        let fields = Arc::new(query.fields.clone());
        let rows = self.start(query, values, Output::Rows { binary })?;
        self.open_now().cursors.insert(name.to_owned(), Cursor { rows, fields, is_held });
        Ok(())
    }

    /// Has the reader's thread run a query.
    fn start(
        &self,
        query: &Arc<Query>,
        values: Vec<Value>,
        output: Output,
    ) -> Result<RowStream, SqlError> {
        {
            let mut open = self.open_now();
            open.results.retain(|result| result.strong_count() > 0);
            if open.results.len() >= MAX_OPEN_RESULTS {
                return Err(SqlError::new("54000", "too many open cursors and portals")
                    .hint("close some of them first"));
            }
        }
        self.free_reader();
        let queue = RowQueue::new(Arc::clone(&self.spools));
        let (query, rows) = (Arc::clone(query), Arc::clone(&queue));
        let within = self.time_limit();
        self.reader
            .start_job(move |reading| reading.run(&query, (&values, within), &output, &rows))?;

        {
            let mut open = self.open_now();
            open.result = Some(Arc::clone(&queue));
            open.results.push(Arc::downgrade(&queue));
        }
        let control = Arc::clone(self.control());
        Ok(RowStream { queue, control, left: Vec::new().into_iter() })
    }

    /// Ends the transaction, and with it the cursors that are not held.
    async fn end(&self, is_commit: bool) -> Result<(), SqlError> {
        self.open_now().cursors.retain(|_, cursor| cursor.is_held);
        self.free_reader();
        self.reader
            .call(|reading| {
                reading.roll_back();
                Ok(())
            })
            .await?;

        {
            let mut settings = self.settings_now();
            if is_commit { settings.commit() } else { settings.roll_back() }
        }
        // The transaction has ended either way; the next statement tries again.
        let _ = self.bring_path().await;
        Ok(())
    }

    /// Has DuckDB look names up where the settings say.
    async fn bring_path(&self) -> Result<(), SqlError> {
        let wanted = self.settings_now().search_path();
        if self.open_now().search_path == wanted {
            return Ok(());
        }
        self.free_reader();
        let schemas = wanted.clone();
        self.reader.call(move |reading| reading.set_search_path(&schemas)).await?;
        self.open_now().search_path = wanted;
        Ok(())
    }

    /// Changes settings, unless DuckDB does not take them.
    async fn change_settings(&self, change: impl FnOnce(&mut Settings)) -> Result<(), SqlError> {
        let before = {
            let mut settings = self.settings_now();
            let before = settings.clone();
            change(&mut settings);
            before
        };
        let brought = self.bring_path().await;
        if brought.is_err() {
            *self.settings_now() = before;
        }
        brought
    }

    /// Returns the columns of a cursor.
    pub fn cursor_fields(&self, name: &str) -> Result<Arc<Vec<Field>>, SqlError> {
        let open = self.open_now();
        let cursor = open.cursors.get(name).ok_or_else(|| no_cursor(name))?;
        Ok(Arc::clone(&cursor.fields))
    }

    /// Takes all rows that a cursor still has; the cursor stays at its end.
    fn take_rest(&self, name: &str) -> Result<RowStream, SqlError> {
        let control = Arc::clone(self.control());
        let mut open = self.open_now();
        let cursor = open.cursors.get_mut(name).ok_or_else(|| no_cursor(name))?;
        Ok(std::mem::replace(&mut cursor.rows, RowStream::empty(control, &self.spools)))
    }

    /// Returns the next rows of a cursor, which have to fit in memory.
    async fn fetch(&self, name: &str, count: Count) -> Result<Vec<BytesMut>, SqlError> {
        // The cursor is out of its place while rows are waited for.
        let taken = self.open_now().cursors.remove(name);
        let mut cursor = taken.ok_or_else(|| no_cursor(name))?;
        let mut rows = Vec::new();
        let limit = match count {
            Count::Rows(rows) => usize::try_from(rows).unwrap_or(usize::MAX),
            Count::All => usize::MAX,
        };

        let mut bytes = 0;
        while rows.len() < limit {
            let Some(row) = cursor.rows.next().await else { break };
            let row = row?;
            bytes += row.len();
            if bytes > MAX_FETCHED {
                return Err(SqlError::new("54000", "FETCH returns too much: fetch less at a time")
                    .hint("FETCH ALL has no limit"));
            }
            rows.push(row);
        }
        self.open_now().cursors.insert(name.to_owned(), cursor);
        Ok(rows)
    }

    fn close(&self, name: Option<&str>) -> Result<(), SqlError> {
        let mut open = self.open_now();
        match name {
            None => open.cursors.clear(),
            Some(name) => {
                open.cursors.remove(name).ok_or_else(|| no_cursor(name))?;
            }
        }
        Ok(())
    }

    async fn set(&self, name: &str, value: &str, scope: Scope) -> Result<(), SqlError> {
        if name == "client_encoding"
            && !["utf8", "utf-8", "unicode"].contains(&value.to_lowercase().as_str())
        {
            return Err(SqlError::new("22023", "the only client_encoding here is UTF8"));
        }
        self.change_settings(|settings| settings.set(name, value, scope)).await
    }

    /// Returns how long a statement may work.
    fn time_limit(&self) -> Option<Duration> {
        self.settings_now().statement_timeout().into_iter().chain(self.timeout).min()
    }
}

fn no_cursor(name: &str) -> SqlError {
    SqlError::new("34000", format!("cursor \"{name}\" does not exist"))
}
