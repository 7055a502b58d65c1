//! Decodes the values of one column, from the server's text or from COPY BINARY, into one Arrow
//! array.

use std::sync::Arc;

use arrow::{
    array::{
        Array, ArrayRef, BinaryBuilder, BooleanBuilder, Date32Builder, Decimal128Builder,
        FixedSizeBinaryBuilder, Float32Builder, Float64Builder, Int16Builder, Int32Builder,
        Int64Builder, ListArray, StringBuilder, StructArray, Time64MicrosecondBuilder,
        TimestampMicrosecondBuilder, UInt32Builder, UInt64Builder,
    },
    buffer::{NullBuffer, OffsetBuffer},
    datatypes::{DataType, Field, Fields},
};

use super::{
    ValueError, datetime,
    mapping::{Kind, Mapping, entry_fields, interval_fields, range_fields},
    numeric, text, variant,
};

/// Decodes the values of one column into one Arrow array.
#[derive(Debug)]
pub struct ColumnBuilder {
    target_type: String,
    pub(super) kind: Kind,
    values: Values,
}

#[derive(Debug)]
enum Values {
    Bool(BooleanBuilder),
    Int2(Int16Builder),
    Int4(Int32Builder),
    Int8(Int64Builder),
    UInt4(UInt32Builder),
    UInt8(UInt64Builder),
    Float4(Float32Builder),
    Float8(Float64Builder),
    Decimal(Decimal128Builder),
    Date(Date32Builder),
    Timestamp(TimestampMicrosecondBuilder),
    Time(Time64MicrosecondBuilder),
    Interval {
        months: Int32Builder,
        days: Int32Builder,
        micros: Int64Builder,
        valid: Vec<bool>,
    },
    Fixed(FixedSizeBinaryBuilder),
    Bytes(BinaryBuilder),
    Text(StringBuilder),
    List {
        field: Arc<Field>,
        ends: Vec<i32>,
        valid: Vec<bool>,
        element: Box<ColumnBuilder>,
    },
    /// A composite: one builder per field, all of the same length.
    Struct {
        fields: Fields,
        columns: Vec<ColumnBuilder>,
        valid: Vec<bool>,
    },
    Range {
        fields: Fields,
        bounds: Box<[ColumnBuilder; 2]>,
        flags: [BooleanBuilder; 3],
        valid: Vec<bool>,
    },
    /// An hstore as a list of entries.
    Entries {
        ends: Vec<i32>,
        valid: Vec<bool>,
        keys: StringBuilder,
        values: StringBuilder,
    },
}

impl ColumnBuilder {
    /// Makes a builder for about `capacity` values.
    pub fn new(mapping: &Mapping, capacity: usize) -> Self {
        let values = match &mapping.kind {
            Kind::Bool => Values::Bool(BooleanBuilder::with_capacity(capacity)),
            Kind::Int2 => Values::Int2(Int16Builder::with_capacity(capacity)),
            Kind::Int4 => Values::Int4(Int32Builder::with_capacity(capacity)),
            Kind::Int8 => Values::Int8(Int64Builder::with_capacity(capacity)),
            Kind::UInt4 => Values::UInt4(UInt32Builder::with_capacity(capacity)),
            Kind::UInt8 => Values::UInt8(UInt64Builder::with_capacity(capacity)),
            Kind::Float4 => Values::Float4(Float32Builder::with_capacity(capacity)),
            Kind::Float8 | Kind::NumericDouble => {
                Values::Float8(Float64Builder::with_capacity(capacity))
            }
            Kind::Decimal { .. } | Kind::Money { .. } => Values::Decimal(
                Decimal128Builder::with_capacity(capacity).with_data_type(mapping.arrow_type()),
            ),
            Kind::Date => Values::Date(Date32Builder::with_capacity(capacity)),
            Kind::Timestamp { .. } => Values::Timestamp(
                TimestampMicrosecondBuilder::with_capacity(capacity)
                    .with_data_type(mapping.arrow_type()),
            ),
            Kind::Time => Values::Time(Time64MicrosecondBuilder::with_capacity(capacity)),
            Kind::Interval => Values::Interval {
                months: Int32Builder::with_capacity(capacity),
                days: Int32Builder::with_capacity(capacity),
                micros: Int64Builder::with_capacity(capacity),
                valid: Vec::with_capacity(capacity),
            },
            Kind::Uuid => Values::Fixed(FixedSizeBinaryBuilder::with_capacity(capacity, 16)),
            Kind::Bytes => Values::Bytes(BinaryBuilder::with_capacity(capacity, capacity * 16)),
            Kind::Text | Kind::Jsonb | Kind::Printed | Kind::Cast { .. } => {
                Values::Text(StringBuilder::with_capacity(capacity, capacity * 16))
            }
            Kind::List { element, .. } => Values::List {
                field: Arc::new(element.field("item")),
                ends: Vec::with_capacity(capacity),
                valid: Vec::with_capacity(capacity),
                element: Box::new(ColumnBuilder::new(element, capacity)),
            },
            Kind::Struct { fields } => Values::Struct {
                fields: fields.iter().map(|(name, field)| field.field(name)).collect(),
                columns: fields
                    .iter()
                    .map(|(_, field)| ColumnBuilder::new(field, capacity))
                    .collect(),
                valid: Vec::with_capacity(capacity),
            },
            Kind::Range { bound } => Values::Range {
                fields: range_fields(bound),
                bounds: Box::new([0, 1].map(|_| ColumnBuilder::new(bound, capacity))),
                flags: [0, 1, 2].map(|_| BooleanBuilder::with_capacity(capacity)),
                valid: Vec::with_capacity(capacity),
            },
            Kind::Hstore => Values::Entries {
                ends: Vec::with_capacity(capacity),
                valid: Vec::with_capacity(capacity),
                keys: StringBuilder::new(),
                values: StringBuilder::new(),
            },
        };

        Self { target_type: mapping.target_type.clone(), kind: mapping.kind.clone(), values }
    }

    pub fn push_null(&mut self) {
        match &mut self.values {
            Values::Bool(builder) => builder.append_null(),
            Values::Int2(builder) => builder.append_null(),
            Values::Int4(builder) => builder.append_null(),
            Values::Int8(builder) => builder.append_null(),
            Values::UInt4(builder) => builder.append_null(),
            Values::UInt8(builder) => builder.append_null(),
            Values::Float4(builder) => builder.append_null(),
            Values::Float8(builder) => builder.append_null(),
            Values::Decimal(builder) => builder.append_null(),
            Values::Date(builder) => builder.append_null(),
            Values::Timestamp(builder) => builder.append_null(),
            Values::Time(builder) => builder.append_null(),
            Values::Interval { months, days, micros, valid } => {
                months.append_null();
                days.append_null();
                micros.append_null();
                valid.push(false);
            }
            Values::Fixed(builder) => builder.append_null(),
            Values::Bytes(builder) => builder.append_null(),
            Values::Text(builder) => builder.append_null(),
            Values::List { ends, valid, element, .. } => {
                ends.push(i32::try_from(element.len()).unwrap_or(i32::MAX));
                valid.push(false);
            }
            Values::Struct { columns, valid, .. } => {
                // After an error some fields hold a value already.
                for column in columns.iter_mut().filter(|column| column.len() <= valid.len()) {
                    column.push_null();
                }

                valid.push(false);
            }
            Values::Range { bounds, flags, valid, .. } => {
                for bound in bounds.iter_mut().filter(|bound| bound.len() <= valid.len()) {
                    bound.push_null();
                }

                flags.iter_mut().for_each(BooleanBuilder::append_null);
                valid.push(false);
            }
            Values::Entries { ends, valid, keys, .. } => {
                use arrow::array::ArrayBuilder;

                ends.push(i32::try_from(keys.len()).unwrap_or(i32::MAX));
                valid.push(false);
            }
        }
    }

    pub fn len(&self) -> usize {
        use arrow::array::ArrayBuilder;

        match &self.values {
            Values::Bool(builder) => builder.len(),
            Values::Int2(builder) => builder.len(),
            Values::Int4(builder) => builder.len(),
            Values::Int8(builder) => builder.len(),
            Values::UInt4(builder) => builder.len(),
            Values::UInt8(builder) => builder.len(),
            Values::Float4(builder) => builder.len(),
            Values::Float8(builder) => builder.len(),
            Values::Decimal(builder) => builder.len(),
            Values::Date(builder) => builder.len(),
            Values::Timestamp(builder) => builder.len(),
            Values::Time(builder) => builder.len(),
            Values::Interval { valid, .. }
            | Values::List { valid, .. }
            | Values::Struct { valid, .. }
            | Values::Range { valid, .. }
            | Values::Entries { valid, .. } => valid.len(),
            Values::Fixed(builder) => builder.len(),
            Values::Bytes(builder) => builder.len(),
            Values::Text(builder) => builder.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends a value in the server's text form.
    ///
    /// # Errors
    /// The bytes are no value of the type, or the target's type cannot hold the value. The builder
    /// appends NULL instead.
    pub fn push_text(&mut self, value: Option<&[u8]>) -> Result<(), ValueError> {
        let Some(value) = value else {
            self.push_null();
            return Ok(());
        };

        let pushed = self.push_text_value(value);
        if pushed.is_err() {
            self.push_null();
        }
        pushed
    }

    fn push_text_value(&mut self, value: &[u8]) -> Result<(), ValueError> {
        let (kind, target_type) = (&self.kind, self.target_type.as_str());

        match &mut self.values {
            Values::Bool(builder) => builder.append_value(match value {
                b"t" => true,
                b"f" => false,
                _ => return Err(ValueError::malformed("boolean", value)),
            }),
            Values::Int2(builder) => builder.append_value(text::number(value, "smallint")?),
            Values::Int4(builder) => builder.append_value(text::number(value, "integer")?),
            Values::Int8(builder) => builder.append_value(text::number(value, "bigint")?),
            Values::UInt4(builder) => builder.append_value(text::number(value, "oid")?),
            Values::UInt8(builder) => builder.append_value(text::number(value, "xid8")?),
            Values::Float4(builder) => builder.append_value(text::number(value, "real")?),
            Values::Float8(builder) => {
                builder.append_value(text::number(value, "double precision")?)
            }
            Values::Decimal(builder) => builder.append_value(match kind {
                Kind::Decimal { precision, scale } => {
                    numeric::from_text(value, *precision, *scale, target_type)?
                }
                _ => numeric::money_from_text(value, scale_of(kind))?,
            }),
            Values::Date(builder) => builder.append_value(datetime::date(value, target_type)?),
            Values::Timestamp(builder) => {
                builder.append_value(datetime::timestamp(value, target_type)?)
            }
            Values::Time(builder) => builder.append_value(datetime::time(value)?),
            Values::Interval { months, days, micros, valid } => {
                let interval = datetime::interval(value)?;
                months.append_value(interval.months);
                days.append_value(interval.days);
                micros.append_value(interval.micros);
                valid.push(true);
            }
            Values::Fixed(builder) => {
                let uuid = text::uuid(value)?;
                builder.append_value(uuid).map_err(|_| ValueError::malformed("uuid", value))?;
            }
            Values::Bytes(builder) => builder.append_value(text::bytea(value)?),
            Values::Text(builder) => {
                let text = std::str::from_utf8(value).map_err(|_| ValueError::NotUtf8)?;
                if matches!(kind, Kind::Cast { from } if from == "JSON") {
                    variant::check(text)?;
                }

                builder.append_value(text);
            }
            Values::List { ends, valid, element, .. } => {
                let Kind::List { delimiter, .. } = kind else {
                    return Err(ValueError::malformed("array", value));
                };
                text::array(value, *delimiter, element, target_type)?;

                ends.push(
                    i32::try_from(element.len())
                        .map_err(|_| ValueError::malformed("array", value))?,
                );
                valid.push(true);
            }
            Values::Struct { columns, valid, .. } => {
                let fields = text::record(value)?;
                if fields.len() != columns.len() {
                    return Err(ValueError::malformed("a composite of so many fields", value));
                }

                for (column, field) in columns.iter_mut().zip(fields) {
                    column.push_text(field.as_deref())?;
                }

                valid.push(true);
            }
            Values::Range { bounds, flags, valid, .. } => {
                let range = text::range(value)?;

                for (bound, text) in bounds.iter_mut().zip([&range.lower, &range.upper]) {
                    bound.push_text(text.as_deref())?;
                }

                for (flag, is_set) in flags.iter_mut().zip([
                    range.is_lower_inclusive,
                    range.is_upper_inclusive,
                    range.is_empty,
                ]) {
                    flag.append_value(is_set);
                }

                valid.push(true);
            }
            Values::Entries { ends, valid, keys, values } => {
                use arrow::array::ArrayBuilder;
                for (key, value) in text::hstore(value)? {
                    keys.append_value(key);
                    values.append_option(value);
                }

                ends.push(
                    i32::try_from(keys.len())
                        .map_err(|_| ValueError::malformed("hstore", value))?,
                );
                valid.push(true);
            }
        }

        Ok(())
    }

    /// Appends a field of COPY BINARY, which is text for the types that [`Mapping::copy_select`]
    /// prints.
    ///
    /// # Errors
    /// The errors of [`Self::push_text`].
    pub fn push_binary(&mut self, value: Option<&[u8]>) -> Result<(), ValueError> {
        let Some(value) = value else {
            self.push_null();
            return Ok(());
        };

        let pushed = self.push_binary_value(value);
        if pushed.is_err() {
            self.push_null();
        }
        pushed
    }

    fn push_binary_value(&mut self, value: &[u8]) -> Result<(), ValueError> {
        fn fixed<const N: usize>(
            value: &[u8],
            expected: &'static str,
        ) -> Result<[u8; N], ValueError> {
            value.try_into().map_err(|_| ValueError::malformed(expected, value))
        }

        let (kind, target_type) = (&self.kind, self.target_type.as_str());
        match (&mut self.values, kind) {
            (
                _,
                Kind::List { .. }
                | Kind::NumericDouble
                | Kind::Printed
                | Kind::Text
                | Kind::Cast { .. }
                | Kind::Struct { .. }
                | Kind::Range { .. }
                | Kind::Hstore,
            ) => return self.push_text_value(value),
            (Values::Bool(builder), _) => {
                builder.append_value(fixed::<1>(value, "boolean")? != [0])
            }
            (Values::Int2(builder), _) => {
                builder.append_value(i16::from_be_bytes(fixed(value, "smallint")?))
            }
            (Values::Int4(builder), _) => {
                builder.append_value(i32::from_be_bytes(fixed(value, "integer")?))
            }
            (Values::Int8(builder), _) => {
                builder.append_value(i64::from_be_bytes(fixed(value, "bigint")?))
            }
            (Values::UInt4(builder), _) => {
                builder.append_value(u32::from_be_bytes(fixed(value, "oid")?))
            }
            (Values::UInt8(builder), _) => {
                builder.append_value(u64::from_be_bytes(fixed(value, "xid8")?))
            }
            (Values::Float4(builder), _) => {
                builder.append_value(f32::from_be_bytes(fixed(value, "real")?))
            }
            (Values::Float8(builder), _) => {
                builder.append_value(f64::from_be_bytes(fixed(value, "double precision")?))
            }
            (Values::Decimal(builder), Kind::Decimal { precision, scale }) => {
                builder.append_value(numeric::from_binary(value, *precision, *scale, target_type)?);
            }
            (Values::Decimal(builder), _) => {
                builder.append_value(i128::from(i64::from_be_bytes(fixed(value, "money")?)));
            }
            (Values::Date(builder), _) => {
                builder.append_value(datetime::date_from_days(
                    i32::from_be_bytes(fixed(value, "date")?),
                    target_type,
                )?);
            }
            (Values::Timestamp(builder), _) => {
                builder.append_value(datetime::timestamp_from_micros(
                    i64::from_be_bytes(fixed(value, "timestamp")?),
                    target_type,
                )?)
            }
            (Values::Time(builder), _) => {
                builder.append_value(datetime::time_from_binary(&fixed(value, "time")?)?)
            }
            (Values::Interval { months, days, micros, valid }, _) => {
                let interval =
                    datetime::interval_from_binary(&fixed(value, "interval")?, target_type)?;
                months.append_value(interval.months);
                days.append_value(interval.days);
                micros.append_value(interval.micros);
                valid.push(true);
            }
            (Values::Fixed(builder), _) => {
                builder
                    .append_value(fixed::<16>(value, "uuid")?)
                    .map_err(|_| ValueError::malformed("uuid", value))?;
            }
            (Values::Bytes(builder), _) => builder.append_value(value),
            (Values::Text(builder), _) => {
                // A jsonb is one version byte, then text.
                let Some((1, text)) = value.split_first() else {
                    return Err(ValueError::malformed("jsonb", value));
                };

                builder.append_value(std::str::from_utf8(text).map_err(|_| ValueError::NotUtf8)?);
            }
            (
                Values::List { .. }
                | Values::Struct { .. }
                | Values::Range { .. }
                | Values::Entries { .. },
                _,
            ) => {
                return Err(ValueError::malformed("a nested type", value));
            }
        }

        Ok(())
    }

    /// Returns the array of the appended values, and resets the builder.
    pub fn finish(&mut self) -> ArrayRef {
        match &mut self.values {
            Values::Bool(builder) => Arc::new(builder.finish()),
            Values::Int2(builder) => Arc::new(builder.finish()),
            Values::Int4(builder) => Arc::new(builder.finish()),
            Values::Int8(builder) => Arc::new(builder.finish()),
            Values::UInt4(builder) => Arc::new(builder.finish()),
            Values::UInt8(builder) => Arc::new(builder.finish()),
            Values::Float4(builder) => Arc::new(builder.finish()),
            Values::Float8(builder) => Arc::new(builder.finish()),
            Values::Decimal(builder) => Arc::new(builder.finish()),
            Values::Date(builder) => Arc::new(builder.finish()),
            Values::Timestamp(builder) => Arc::new(builder.finish()),
            Values::Time(builder) => Arc::new(builder.finish()),
            Values::Interval { months, days, micros, valid } => {
                let nulls = NullBuffer::from(std::mem::take(valid));
                let columns: Vec<ArrayRef> = vec![
                    Arc::new(months.finish()),
                    Arc::new(days.finish()),
                    Arc::new(micros.finish()),
                ];

                Arc::new(StructArray::new(interval_fields(), columns, Some(nulls)))
            }
            Values::Fixed(builder) => Arc::new(builder.finish()),
            Values::Bytes(builder) => Arc::new(builder.finish()),
            Values::Text(builder) => Arc::new(builder.finish()),
            Values::List { field, ends, valid, element } => {
                let offsets: Vec<i32> = std::iter::once(0).chain(std::mem::take(ends)).collect();
                let nulls = NullBuffer::from(std::mem::take(valid));

                let items = element.finish();
                // Ends only grow, and the last end is the number of items.
                debug_assert_eq!(offsets.last().copied(), i32::try_from(items.len()).ok());

                Arc::new(ListArray::new(
                    Arc::clone(field),
                    OffsetBuffer::new(offsets.into()),
                    items,
                    Some(nulls),
                ))
            }
            Values::Struct { fields, columns, valid } => {
                let nulls = NullBuffer::from(std::mem::take(valid));
                let columns = columns.iter_mut().map(ColumnBuilder::finish).collect();
                Arc::new(StructArray::new(fields.clone(), columns, Some(nulls)))
            }
            Values::Range { fields, bounds, flags, valid } => {
                let nulls = NullBuffer::from(std::mem::take(valid));
                let flags = flags.iter_mut().map(|flag| Arc::new(flag.finish()) as ArrayRef);
                let columns = bounds.iter_mut().map(ColumnBuilder::finish).chain(flags).collect();
                Arc::new(StructArray::new(fields.clone(), columns, Some(nulls)))
            }
            Values::Entries { ends, valid, keys, values } => {
                let offsets: Vec<i32> = std::iter::once(0).chain(std::mem::take(ends)).collect();
                let nulls = NullBuffer::from(std::mem::take(valid));
                let columns: Vec<ArrayRef> =
                    vec![Arc::new(keys.finish()), Arc::new(values.finish())];

                let entries = Arc::new(StructArray::new(entry_fields(), columns, None));
                let field = Arc::new(Field::new("item", DataType::Struct(entry_fields()), true));
                Arc::new(ListArray::new(
                    field,
                    OffsetBuffer::new(offsets.into()),
                    entries,
                    Some(nulls),
                ))
            }
        }
    }
}

fn scale_of(kind: &Kind) -> i8 {
    match kind {
        Kind::Money { scale } | Kind::Decimal { scale, .. } => *scale,
        _ => 0,
    }
}
