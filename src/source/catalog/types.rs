//! Types as the catalogs describe them.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::Client;

use super::{CatalogError, CompositeFields, EnumLabel, SourceColumn, xmin};
use crate::types::{FieldInfo, TypeCatalog, TypeInfo};

/// The parts of the types of a table's columns that can change under old rows.
#[derive(Default)]
pub(super) struct TypeParts {
    pub labels: BTreeMap<u32, EnumLabel>,
    pub composites: BTreeMap<u32, CompositeFields>,
}

pub(super) async fn type_parts(
    client: &Client,
    columns: &HashMap<u32, Vec<SourceColumn>>,
) -> Result<HashMap<u32, TypeParts>, CatalogError> {
    let mut parts: HashMap<u32, TypeParts> = HashMap::new();
    // Only types of users are read; those of the system do not change.
    const FIRST_USER_OID: u32 = 16384;

    let (mut tables, mut types): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    for (&table, columns) in columns {
        for column in columns.iter().filter(|column| column.type_oid >= FIRST_USER_OID) {
            tables.push(table);
            types.push(column.type_oid);
        }
    }

    if types.is_empty() {
        return Ok(parts);
    }

    let rows = client
        .query(
            &format!(
                "WITH RECURSIVE uses(tab, oid) AS (SELECT * FROM unnest($2::oid[], $1::oid[]) \
                 UNION \
                 SELECT uses.tab, part FROM uses JOIN pg_type t ON t.oid = uses.oid {TYPE_PARTS}) \
                 SELECT uses.tab, true, e.oid, e.enumlabel::text, e.enumtypid, \
                 e.xmin::text::bigint, e.xmin = t.xmin \
                 FROM uses JOIN pg_enum e ON e.enumtypid = uses.oid \
                 JOIN pg_type t ON t.oid = e.enumtypid \
                 UNION ALL SELECT uses.tab, false, a.attrelid, \
                 string_agg(format('%s %s %s %s', a.attnum, a.attname, a.atttypid, a.xmin), ',' \
                 ORDER BY a.attnum), \
                 0::oid, 0::bigint, bool_and(a.xmin = t.xmin) FROM uses \
                 JOIN pg_type t ON t.oid = uses.oid JOIN pg_attribute a \
                 ON a.attrelid = t.typrelid AND t.typrelid <> 0 AND a.attnum > 0 AND NOT \
                 a.attisdropped GROUP BY uses.tab, a.attrelid"
            ),
            &[&types, &tables],
        )
        .await?;

    for row in rows {
        let entry = parts.entry(row.try_get(0)?).or_default();
        let (oid, text): (u32, String) = (row.try_get(2)?, row.try_get(3)?);
        let is_original = row.try_get(6)?;

        if row.try_get(1)? {
            let (type_oid, xmin) = (row.try_get(4)?, xmin(row.try_get(5)?));
            entry.labels.insert(oid, EnumLabel { type_oid, name: text, xmin, is_original });
        } else {
            entry.composites.insert(oid, CompositeFields { fields: text, is_original });
        }
    }

    Ok(parts)
}

/// The parts of a type: elements, bases of domains, bounds of ranges, fields of composites.
const TYPE_PARTS: &str = "CROSS JOIN LATERAL (SELECT unnest(ARRAY[t.typelem, t.typbasetype]) \
       UNION ALL SELECT rngsubtype FROM pg_range WHERE rngtypid = t.oid \
       UNION ALL SELECT rngtypid FROM pg_range WHERE rngmultitypid = t.oid \
       UNION ALL SELECT a.atttypid FROM pg_attribute a \
         WHERE a.attrelid = t.typrelid AND t.typrelid <> 0 AND a.attnum > 0 AND NOT \
         a.attisdropped) parts(part) \
     WHERE part <> 0";

/// Returns these types, and all types that they are made of.
pub async fn types(client: &Client, oids: &[u32]) -> Result<TypeCatalog, CatalogError> {
    let rows = client
        .query(
            &format!(
                "WITH RECURSIVE needed(oid) AS (SELECT unnest($1::oid[]) UNION \
                 SELECT part FROM needed JOIN pg_type t ON t.oid = needed.oid {TYPE_PARTS}) \
                 SELECT t.oid, n.nspname::text, t.typname::text, t.typtype, t.typcategory, \
                 CASE WHEN t.typlen = -1 AND t.typsubscript = 'array_subscript_handler'::regproc \
                 THEN t.typelem ELSE 0::oid END, \
                 t.typdelim, t.typbasetype, t.typtypmod, t.typndims, coalesce(r.rngsubtype, \
                 0::oid), t.typrelid \
                 FROM needed JOIN pg_type t ON t.oid = needed.oid \
                 JOIN pg_namespace n ON n.oid = t.typnamespace \
                 LEFT JOIN pg_range r ON r.rngtypid = t.oid"
            ),
            &[&oids],
        )
        .await?;

    let mut catalog = TypeCatalog { money_scale: 2, ..TypeCatalog::default() };
    let composites: Vec<u32> =
        rows.iter().map(|row| row.try_get::<_, u32>(11)).collect::<Result<_, _>>()?;

    let mut fields: HashMap<u32, Vec<FieldInfo>> = HashMap::new();
    for row in client
        .query(
            "SELECT attrelid, attname::text, atttypid, atttypmod, attndims::int FROM pg_attribute \
             WHERE attrelid = ANY($1) AND attrelid <> 0 AND attnum > 0 AND NOT attisdropped ORDER \
             BY attrelid, attnum",
            &[&composites],
        )
        .await?
    {
        fields.entry(row.try_get(0)?).or_default().push(FieldInfo {
            name: row.try_get(1)?,
            type_oid: row.try_get(2)?,
            typmod: row.try_get(3)?,
            ndims: row.try_get(4)?,
        });
    }

    for row in rows {
        let info = TypeInfo {
            oid: row.try_get(0)?,
            schema: row.try_get(1)?,
            name: row.try_get(2)?,
            kind: row.try_get::<_, i8>(3)? as u8,
            category: row.try_get::<_, i8>(4)? as u8,
            element_oid: row.try_get(5)?,
            delimiter: row.try_get::<_, i8>(6)? as u8,
            base_oid: row.try_get(7)?,
            base_typmod: row.try_get(8)?,
            base_ndims: row.try_get(9)?,
            range_of: row.try_get(10)?,
            fields: fields.remove(&row.try_get(11)?).unwrap_or_default(),
        };

        catalog.types.insert(info.oid, info);
    }

    Ok(catalog)
}
