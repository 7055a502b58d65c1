//! What the source's schema is like, as far as valid statements have to know.

use std::fmt::Write;

use crate::bed::cluster::{quote, tested_major};

pub const MOOD: &str = "public.mood";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Int,
    Bigint,
    /// numeric(precision,3).
    Decimal(u8),
    /// numeric(digits,digits): every value lies between -1 and 1.
    Fraction(u8),
    Numeric,
    Double,
    Text,
    /// text of STORAGE EXTERNAL and 12,800 bytes.
    Big,
    Varchar(u8),
    /// Padded.
    Char(u8),
    Bit(u8),
    Varbit(u8),
    Timestamp,
    Timestamptz,
    /// Of timestamps, or of timestamps with a zone.
    Stamps(bool),
    /// Several of its values are one to whoever takes a month for 30 days and a day for 24 hours.
    Interval,
    Bool,
    Jsonb,
    Uuid,
    Bytea,
    Cidr,
    Inet,
    List,
    Mood,
    Moods,
    /// A domain over int, and an array of it.
    Small,
    Smalls,
    /// A domain over text[].
    Words,
}

impl Kind {
    pub const ALL: [Kind; 34] = [
        Kind::Int,
        Kind::Int,
        Kind::Int,
        Kind::Bigint,
        Kind::Decimal(12),
        Kind::Fraction(3),
        Kind::Fraction(3),
        Kind::Numeric,
        Kind::Double,
        Kind::Text,
        Kind::Text,
        Kind::Big,
        Kind::Big,
        Kind::Varchar(10),
        Kind::Varchar(10),
        Kind::Char(6),
        Kind::Bit(8),
        Kind::Varbit(8),
        Kind::Timestamp,
        Kind::Timestamptz,
        Kind::Stamps(false),
        Kind::Interval,
        Kind::Interval,
        Kind::Bool,
        Kind::Jsonb,
        Kind::Uuid,
        Kind::Bytea,
        Kind::Cidr,
        Kind::List,
        Kind::Mood,
        Kind::Moods,
        Kind::Small,
        Kind::Smalls,
        Kind::Words,
    ];

    pub fn sql(self) -> String {
        match self {
            Kind::Int => "int".to_owned(),
            Kind::Bigint => "bigint".to_owned(),
            Kind::Decimal(precision) => format!("numeric({precision},3)"),
            Kind::Fraction(digits) => format!("numeric({digits},{digits})"),
            Kind::Numeric => "numeric".to_owned(),
            Kind::Double => "float8".to_owned(),
            Kind::Text | Kind::Big => "text".to_owned(),
            Kind::Varchar(length) => format!("varchar({length})"),
            Kind::Char(length) => format!("char({length})"),
            Kind::Bit(length) => format!("bit({length})"),
            Kind::Varbit(length) => format!("varbit({length})"),
            Kind::Timestamp => "timestamp".to_owned(),
            Kind::Timestamptz => "timestamptz".to_owned(),
            Kind::Stamps(false) => "timestamp[]".to_owned(),
            Kind::Stamps(true) => "timestamptz[]".to_owned(),
            Kind::Interval => "interval".to_owned(),
            Kind::Bool => "bool".to_owned(),
            Kind::Jsonb => "jsonb".to_owned(),
            Kind::Uuid => "uuid".to_owned(),
            Kind::Bytea => "bytea".to_owned(),
            Kind::Cidr => "cidr".to_owned(),
            Kind::Inet => "inet".to_owned(),
            Kind::List => "text[]".to_owned(),
            Kind::Mood => MOOD.to_owned(),
            Kind::Moods => format!("{MOOD}[]"),
            Kind::Small => "public.small".to_owned(),
            Kind::Smalls => "public.small[]".to_owned(),
            Kind::Words => "public.words".to_owned(),
        }
    }

    /// Other types that a column of this one can be given, with what the new values are (`{}` is
    /// the column), if that has to be said.
    pub fn others(self) -> Vec<(Kind, &'static str)> {
        match self {
            Kind::Int => vec![
                (Kind::Bigint, ""),
                (Kind::Bigint, ""),
                (Kind::Int, "({} % 10000) * 100"),
                (Kind::Text, "{}::text"),
            ],
            Kind::Decimal(12) => vec![(Kind::Decimal(14), "")],
            Kind::Fraction(3) => {
                vec![(Kind::Numeric, ""), (Kind::Numeric, ""), (Kind::Decimal(12), "")]
            }
            Kind::Varchar(10) => {
                vec![(Kind::Text, ""), (Kind::Varchar(20), ""), (Kind::Varchar(6), "left({}, 6)")]
            }
            Kind::Varchar(_) => vec![(Kind::Text, "")],
            Kind::Char(6) => vec![(Kind::Char(9), ""), (Kind::Text, ""), (Kind::Varchar(10), "")],
            Kind::Bit(8) => vec![(Kind::Bit(12), "{}::bit(12)")],
            Kind::Varbit(8) => vec![(Kind::Varbit(16), "")],
            Kind::Timestamp => vec![(Kind::Timestamptz, "")],
            Kind::Timestamptz => vec![(Kind::Timestamp, "")],
            Kind::Stamps(is_zoned) => vec![(Kind::Stamps(!is_zoned), "")],
            Kind::Cidr => vec![(Kind::Inet, "")],
            Kind::Mood => vec![(Kind::Text, "{}::text")],
            _ => Vec::new(),
        }
    }

    /// PostgreSQL rewrites it in other zones than UTC, and old values become others.
    pub fn depends_on_zone(self) -> bool {
        matches!(self, Kind::Timestamp | Kind::Timestamptz | Kind::Stamps(_))
    }
}

/// Only plain columns are dropped, filled with anything, or lose their NOT NULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A number; unique in the table unless rows were duplicated.
    Id,
    /// The second column of a key.
    Second,
    /// What the table is, or was, partitioned by.
    Part,
    /// Computed from the id by the source, and stored.
    Generated,
    Plain,
}

#[derive(Debug, Clone)]
pub struct Column {
    pub name: String,
    pub kind: Kind,
    pub role: Role,
    pub not_null: bool,
    pub has_default: bool,
    /// GENERATED BY DEFAULT AS IDENTITY.
    pub is_identity: bool,
}

impl Column {
    pub fn is_plain(&self) -> bool {
        self.role == Role::Plain
    }

    /// Its default and its NOT NULL may be changed.
    pub fn is_free(&self) -> bool {
        self.is_plain() && !self.is_identity
    }

    pub fn definition(&self) -> String {
        format!(
            "{} {}{}",
            quote(&self.name),
            self.kind.sql(),
            if self.not_null { " NOT NULL" } else { "" }
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// With no key, or none that counts: INSERT and TRUNCATE only.
    Default,
    Full,
    Index,
}

impl Identity {
    pub fn keyword(self) -> &'static str {
        match self {
            Identity::Full => "FULL",
            Identity::Default | Identity::Index => "DEFAULT",
        }
    }
}

#[derive(Debug, Clone)]
pub struct Key {
    /// None when the server chose the name.
    pub constraint: Option<String>,
    pub is_deferrable: bool,
}

#[derive(Debug, Clone)]
pub struct Leaf {
    pub schema: String,
    pub name: String,
    pub constraint: Option<String>,
    pub value: u64,
}

impl Leaf {
    pub fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }
}

#[derive(Debug, Clone)]
pub struct Partitions {
    pub by_range: bool,
    pub leaves: Vec<Leaf>,
    pub next: u64,
}

impl Partitions {
    pub fn bound(&self, value: u64) -> String {
        match self.by_range {
            true => format!("FOR VALUES FROM ({value}) TO ({})", value + 1),
            false => format!("FOR VALUES IN ({value})"),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Table {
    pub schema: String,
    pub name: String,
    pub columns: Vec<Column>,
    pub identity: Identity,
    pub key: Option<Key>,
    pub unique_index: Option<String>,
    pub partitions: Option<Partitions>,
    /// Named by the publication, where one names its tables.
    pub is_named: bool,
}

impl Table {
    pub fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    /// UPDATE and DELETE are refused at the source otherwise.
    pub fn can_change(&self) -> bool {
        match self.identity {
            Identity::Default => self.key.as_ref().is_some_and(|key| !key.is_deferrable),
            // 18 refuses both when the identity has a column that is not published.
            Identity::Full => !self.has(Role::Generated) || tested_major() < 18,
            Identity::Index => true,
        }
    }

    pub fn is_unique(&self) -> bool {
        self.key.is_some() || self.unique_index.is_some()
    }

    pub fn is_deferrable(&self) -> bool {
        self.key.as_ref().is_some_and(|key| key.is_deferrable)
    }

    pub fn has(&self, role: Role) -> bool {
        self.columns.iter().any(|column| column.role == role)
    }

    /// The quoted name of the column of this role.
    pub fn of_role(&self, role: Role) -> Option<String> {
        self.columns.iter().find(|column| column.role == role).map(|column| quote(&column.name))
    }

    pub fn id(&self) -> String {
        self.of_role(Role::Id).expect("every table has an id")
    }

    pub fn leaves(&self) -> &[Leaf] {
        match &self.partitions {
            Some(partitions) => &partitions.leaves,
            None => &[],
        }
    }

    pub fn key_columns(&self) -> String {
        let is_key = |column: &&Column| matches!(column.role, Role::Id | Role::Second | Role::Part);
        self.columns
            .iter()
            .filter(is_key)
            .map(|column| quote(&column.name))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// What a row can be inserted with.
    pub fn given_columns(&self) -> String {
        let mut list = String::new();
        for column in self.columns.iter().filter(|column| column.role != Role::Generated) {
            let comma = if list.is_empty() { "" } else { ", " };
            let _ = write!(list, "{comma}{}", quote(&column.name));
        }
        list
    }
}

pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", quote(schema), quote(name))
}

/// What is published, and how tables come into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publishing {
    All,
    /// Both schemas that there are.
    Schemas,
    /// Tables by name; new ones are added.
    Named,
    /// Roots by name in one publication, leaves in another one that does not publish by the root.
    RootsAndNamedLeaves,
    /// Roots by name in one publication, and everything in another one that does not publish by the
    /// root.
    RootsAndAll,
}

impl Publishing {
    pub const ALL: [Publishing; 8] = [
        Publishing::All,
        Publishing::All,
        Publishing::All,
        Publishing::Schemas,
        Publishing::Named,
        Publishing::Named,
        Publishing::RootsAndNamedLeaves,
        Publishing::RootsAndAll,
    ];

    pub fn names_tables(self) -> bool {
        !matches!(self, Publishing::All | Publishing::Schemas)
    }

    pub fn has_two(self) -> bool {
        matches!(self, Publishing::RootsAndNamedLeaves | Publishing::RootsAndAll)
    }
}

/// What a rollback takes back.
#[derive(Debug, Clone, Default)]
pub struct World {
    pub tables: Vec<Table>,
    pub labels: Vec<String>,
    /// Labels that may be used only after the transaction that added them.
    pub fresh_labels: Vec<String>,
    /// Names that tables had once.
    pub free_names: Vec<String>,
    pub keyword_is_used: bool,
    /// Source of names and keys.
    ///
    /// Keys are changed by adding a million to some, or by negating or adding one to all. So the
    /// difference of two keys of a table is never a multiple of a million, and keys never meet.
    pub counter: u64,
}
