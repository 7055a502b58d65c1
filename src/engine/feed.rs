//! The changes of a source without a copy of it, for programs that do something else with them.

#![deny(missing_docs)]

use std::{collections::HashMap, sync::Arc};

use super::{attach, session::spool_folder};
use crate::{
    Lsn,
    backfill::create_slot,
    change::{
        ChangeBatch, TableSpec,
        followed::{SchemaQuery, SchemaResolution, fits},
    },
    checkpoint::DurableLsn,
    pipeline::{
        Context, EngineError, Options,
        tables::{
            self, PlanOptions,
            selection::{no_matching_tables, table_settings, types_of, wanted_tables},
        },
    },
    source::{
        BatchLimits, CdcConsumer, Delivery, LsnBarrier, SourceError,
        catalog::{self, SourceTable},
        connection::SqlClient,
        pg_consumer::{PgConsumer, StreamOptions},
        wire::SlotKind,
    },
};

/// Follows the tables of a source, and returns their changes as Arrow batches.
///
/// A feed makes the publication and the slot that `options` name when they are missing. It begins
/// where the slot stands: changes that were committed before the slot was made are not in it.
///
/// A table whose shape changes comes in [`ChangeBatch::failed`] with the reason, and brings no more
/// changes until the feed is opened again: the rows before and after the change have different
/// Arrow schemas.
pub struct Feed {
    consumer: PgConsumer,
    limits: BatchLimits,
    tables: HashMap<u32, Arc<TableSpec>>,
    /// The end of the last batch that the caller received.
    delivered: Lsn,
    /// The end of the last batch that the caller has stored.
    acknowledged: Lsn,
}

impl Feed {
    /// Connects, and starts the stream. Of the target in `options` only its folder is used: it
    /// holds large transactions until they end.
    ///
    /// # Errors
    /// The source cannot be reached, does not permit logical replication, publishes no table that
    /// `options` choose, or its slot is in use.
    pub async fn open(options: &Options) -> Result<Self, EngineError> {
        let (events, _) = tokio::sync::mpsc::unbounded_channel();
        let context = Context::new(options.clone(), events);

        let mut source = attach::connect(&context).await?;
        attach::publication(&context, &source.sql).await?;

        let slot = catalog::slot(&source.sql, &options.slot).await?;
        let checkpoint = match slot.and_then(|slot| slot.confirmed_flush_lsn) {
            Some(confirmed) => confirmed,
            None => {
                let (name, kind) = (&options.slot, SlotKind::Permanent);
                let (sql, replication) = (&source.sql, &mut source.replication);
                create_slot(&context, sql, replication, name, kind).await?.consistent_point
            }
        };

        let tables = planned(options, &source.sql).await?;
        let stream = StreamOptions {
            slot: options.slot.clone(),
            publications: options.publications.clone(),
            system_id: source.identity.system_id,
            timeline: source.identity.timeline,
            checkpoint,
            tables: tables.clone(),
            ddl_secret: None,
            hold: LsnBarrier::default(),
            figures: context.meter.stream().clone(),
            queue_bytes: options.memory_limit_bytes / 4,
            spool_folder: spool_folder(&options.target.path),
            no_streaming_in_progress: false,
        };

        let limits = BatchLimits {
            max_rows: options.max_batch_rows,
            max_bytes: options.memory_limit_bytes / 8,
            linger: options.interval,
            until: None,
            stop_after_one: false,
            request_keepalives: false,
        };

        let consumer = PgConsumer::start(&options.source, stream).await?;
        let tables = tables.into_iter().map(|spec| (spec.oid, spec)).collect();
        Ok(Self { consumer, limits, tables, delivered: checkpoint, acknowledged: checkpoint })
    }

    /// Waits for the next changes. A batch holds whole source transactions, reduced to their net
    /// effect; a transaction that is too large for memory comes in parts
    /// ([`ChangeBatch::is_part`]).
    ///
    /// # Errors
    /// The stream broke. Open the feed again: what was not acknowledged comes again.
    pub async fn next(&mut self) -> Result<ChangeBatch, EngineError> {
        loop {
            match self.consumer.next_batch(&self.limits).await? {
                Delivery::Batch(batch) if batch.is_idle() => {
                    // The slot must not keep WAL that holds no change of these tables.
                    if self.acknowledged >= self.delivered {
                        self.delivered = batch.end_lsn;
                        self.acknowledge(batch.end_lsn);
                    }
                }
                Delivery::Batch(batch) => {
                    self.delivered = batch.end_lsn;
                    return Ok(batch);
                }
                Delivery::SchemaQuery(question) => {
                    let answer = self.resolution(&question);
                    self.consumer.answer(answer);
                }
                Delivery::Ended => return Err(SourceError::StreamEnded.into()),
            }
        }
    }

    /// Lets the source forget everything up to `lsn`, the [`ChangeBatch::end_lsn`] of a batch whose
    /// changes are stored for good. The next feed of this slot begins there.
    pub fn acknowledge(&mut self, lsn: Lsn) {
        self.acknowledged = lsn;
        self.consumer.acknowledge(DurableLsn::committed(lsn));
    }

    /// Tells the source what was acknowledged last, and ends the connection.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn close(self) -> Result<(), EngineError> {
        Ok(self.consumer.shutdown().await?)
    }

    fn resolution(&self, question: &SchemaQuery) -> SchemaResolution {
        match self.tables.get(&question.relation.oid) {
            Some(spec) if !fits(spec, &question.relation) => SchemaResolution::Copy(
                "its columns are others since the feed was opened".to_owned(),
            ),
            _ => SchemaResolution::Same,
        }
    }
}

/// Describes the tables as they are now; the stream asks about each shape that differs.
async fn planned(options: &Options, sql: &SqlClient) -> Result<Vec<Arc<TableSpec>>, EngineError> {
    let tables = wanted_tables(options, sql).await?;
    if tables.is_empty() {
        return Err(no_matching_tables(options));
    }
    let types = types_of(sql, &tables).await?;

    let plan = |table: &SourceTable| {
        let settings = table_settings(options, &table.name);
        let null_unrepresentable = options.null_unrepresentable;
        let plan_options = PlanOptions { settings: &settings, null_unrepresentable, before: None };
        tables::plan(table, &types, plan_options).map(Arc::new)
    };
    tables
        .iter()
        .map(plan)
        .collect::<Result<_, _>>()
        .map_err(|error| EngineError::Setup(error.to_string()))
}
