//! The replication protocol: frames, the client that speaks the protocol, its authentication, the
//! stream and its acknowledgement, and COPY.

mod auth;
pub mod client;
pub mod copy_client;
pub mod feedback;
pub mod frame;
pub mod socket;
pub mod stream;

pub use client::{CreatedSlot, IdentifySystem, ReplicationClient, Row, SlotKind};
pub use frame::{Frame, FrameReader, ServerMessage, WireError};
