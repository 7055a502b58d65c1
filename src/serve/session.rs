//! One session: what its client asks for, and what is open in it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::BytesMut;
use futures_util::{Stream, stream};
use pgwire::api::Type;

use super::{
    Shared,
    command::{Command, Count},
    control::Control,
    error::SqlError,
    reader::{Field, Output, Query, Reader},
    rows::RowQueue,
    tokens::{Token, tokens},
};
use crate::olap::Value;

/// The most bytes of rows that one FETCH with a number gathers.
const MAX_FETCHED: usize = 64 << 20;

/// A session of a client.
pub struct Session {
    reader: Reader,
    /// The longest time that a statement may work.
    timeout: Option<Duration>,
    open: Mutex<Open>,
    settings: Mutex<BTreeMap<String, String>>,
    /// The settings of the startup message.
    startup: BTreeMap<String, String>,
}

#[derive(Default)]
struct Open {
    /// The result that the reader's thread may still be at.
    result: Option<Arc<RowQueue>>,
    cursors: HashMap<String, Cursor>,
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
    Set { name: String, value: String },
    Close(Option<String>),
    Reset(&'static str),
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
    Copy {
        columns: usize,
        is_binary: bool,
        rows: RowStream,
    },
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

/// The rows of a statement. Dropping it ends the statement.
pub struct RowStream {
    queue: Arc<RowQueue>,
    control: Arc<Control>,
    /// Rows that came with others and are not wanted yet.
    left: std::vec::IntoIter<BytesMut>,
}

impl RowStream {
    /// Returns a stream without rows.
    fn empty(control: Arc<Control>) -> Self {
        let queue = RowQueue::new();
        queue.finish(Ok(()));
        Self { queue, control, left: Vec::new().into_iter() }
    }

    async fn next(&mut self) -> Option<Result<BytesMut, SqlError>> {
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
        if self.queue.abandon() {
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
        let search_path = settings.get("search_path").map_or("public", String::as_str);
        let schemas = schemas_of(search_path);
        reader.call(move |reading| reading.enter_file(&schemas)).await?;
        let timeout = shared.options.statement_timeout;
        Ok(Self {
            reader,
            timeout,
            open: Mutex::default(),
            settings: Mutex::new(settings.clone()),
            startup: settings,
        })
    }

    /// Returns what ends a statement of this session.
    pub fn control(&self) -> &Arc<Control> {
        &self.reader.control
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
                let value = self.setting(&name);
                Prepared::Show { name, value }
            }
            Command::Begin => Prepared::Begin,
            Command::Commit => Prepared::End { tag: "COMMIT" },
            Command::Rollback => Prepared::End { tag: "ROLLBACK" },
            Command::Set { name, value } => Prepared::Set { name, value },
            Command::Close(name) => Prepared::Close(name),
            Command::Reset(tag) => Prepared::Reset(tag),
            Command::Deallocate => Prepared::Nothing("DEALLOCATE"),
            Command::Nothing(tag) => Prepared::Nothing(tag),
        })
    }

    async fn prepare_query(
        &self,
        statement: Vec<Token>,
        declared: Vec<Option<Type>>,
    ) -> Result<Arc<Query>, SqlError> {
        self.free_reader();
        let work =
            move |reading: &mut super::reader::Reading| reading.prepare(statement, &declared);
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
                let (columns, is_binary) =
                    (query.fields.len(), format.kind == super::command::CopyKind::Binary);
                let rows = self.start(query, values, Output::Copy(format.clone()))?;
                Ok(Answer::Copy { columns, is_binary, rows })
            }
            Prepared::Declare { name, .. } if self.open_now().cursors.contains_key(name) => {
                Err(SqlError::new("42P03", format!("cursor \"{name}\" already exists")))
            }
            Prepared::Declare { name, query, is_held } => {
                let binary = vec![false; query.fields.len()];
                let fields = Arc::new(query.fields.clone());
                let rows = self.start(query, values, Output::Rows { binary })?;
                let cursor = Cursor { rows, fields, is_held: *is_held };
                self.open_now().cursors.insert(name.clone(), cursor);
                Ok(Answer::Done { tag: "DECLARE CURSOR", rows: None })
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
                Ok(Answer::Began)
            }
            Prepared::End { tag } => {
                self.end().await?;
                Ok(Answer::Ended(tag))
            }
            Prepared::Set { name, value } => self.set(name, value).await,
            Prepared::Close(name) => {
                self.close(name.as_deref())?;
                Ok(Answer::Done { tag: "CLOSE CURSOR", rows: None })
            }
            Prepared::Reset(tag) => {
                self.reset().await?;
                Ok(Answer::Done { tag, rows: None })
            }
            Prepared::Nothing(tag) => Ok(Answer::Done { tag, rows: None }),
        }
    }

    /// Has the reader's thread run a query.
    fn start(
        &self,
        query: &Arc<Query>,
        values: Vec<Value>,
        output: Output,
    ) -> Result<RowStream, SqlError> {
        self.free_reader();
        let queue = RowQueue::new();
        let (query, rows) = (Arc::clone(query), Arc::clone(&queue));
        let within = self.timeout;
        let within =
            self.own_timeout().map_or(within, |own| Some(within.map_or(own, |w| w.min(own))));
        self.reader
            .start_job(move |reading| reading.run(&query, (&values, within), &output, &rows))?;

        self.open_now().result = Some(Arc::clone(&queue));
        let control = Arc::clone(self.control());
        Ok(RowStream { queue, control, left: Vec::new().into_iter() })
    }

    /// Ends the transaction, and with it the cursors that are not held.
    async fn end(&self) -> Result<(), SqlError> {
        self.open_now().cursors.retain(|_, cursor| cursor.is_held);
        self.free_reader();
        self.reader
            .call(|reading| {
                reading.roll_back();
                Ok(())
            })
            .await
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
        Ok(std::mem::replace(&mut cursor.rows, RowStream::empty(control)))
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

    /// Brings the settings back to those of the startup message.
    async fn reset(&self) -> Result<(), SqlError> {
        let schemas = schemas_of(self.startup.get("search_path").map_or("public", String::as_str));
        self.free_reader();
        self.reader.call(move |reading| reading.set_search_path(&schemas)).await?;
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        settings.clone_from(&self.startup);
        Ok(())
    }

    async fn set(&self, name: &str, value: &str) -> Result<Answer, SqlError> {
        if name == "search_path" {
            let schemas = schemas_of(value);
            self.free_reader();
            self.reader.call(move |reading| reading.set_search_path(&schemas)).await?;
        }
        if name == "client_encoding"
            && !["utf8", "utf-8", "unicode"].contains(&value.to_lowercase().as_str())
        {
            return Err(SqlError::new("22023", "the only client_encoding here is UTF8"));
        }
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        settings.insert(name.to_owned(), value.to_owned());
        Ok(Answer::Done { tag: "SET", rows: None })
    }

    /// Returns the limit that the client has set with `SET statement_timeout`: milliseconds, or a
    /// number with a unit.
    fn own_timeout(&self) -> Option<Duration> {
        let settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let text = settings.get("statement_timeout")?.replace(' ', "");
        let limit = match text.parse::<u64>() {
            Ok(millis) => Duration::from_millis(millis),
            Err(_) => humantime::parse_duration(&text).ok()?,
        };
        (!limit.is_zero()).then_some(limit)
    }

    /// Returns a setting as SHOW prints it.
    fn setting(&self, name: &str) -> String {
        let settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let fixed = FIXED_SETTINGS.iter().find(|(fixed, _)| *fixed == name);
        match (fixed, settings.get(name)) {
            (Some((_, value)), _) => (*value).to_owned(),
            (None, Some(value)) => value.clone(),
            (None, None) => DEFAULTS
                .iter()
                .find(|(default, _)| *default == name)
                .map_or_else(String::new, |(_, value)| (*value).to_owned()),
        }
    }
}

fn no_cursor(name: &str) -> SqlError {
    SqlError::new("34000", format!("cursor \"{name}\" does not exist"))
}

/// What holds here whatever a client sets: values are printed in UTC, as ISO.
const FIXED_SETTINGS: [(&str, &str); 8] = [
    ("timezone", "UTC"),
    ("datestyle", "ISO, MDY"),
    ("server_version", super::startup::SERVER_VERSION),
    ("server_version_num", "160000"),
    ("transaction_isolation", "repeatable read"),
    ("transaction_read_only", "on"),
    ("server_encoding", "UTF8"),
    ("client_encoding", "UTF8"),
];

const DEFAULTS: [(&str, &str); 9] = [
    ("search_path", "public"),
    ("standard_conforming_strings", "on"),
    ("max_identifier_length", "63"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "repeatable read"),
    ("lc_collate", "C.UTF-8"),
    ("max_index_keys", "32"),
    ("statement_timeout", "0"),
    ("extra_float_digits", "1"),
];

/// Returns the schemas of a search path.
fn schemas_of(path: &str) -> Vec<String> {
    tokens(path).iter().filter_map(Token::name).collect()
}
