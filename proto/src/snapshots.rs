//! `containerd.services.snapshots.v1`: what a snapshotter is asked.
//!
//! Invariant: as `proto/services/snapshots/v1/snapshots.proto` has it.

use crate::message::messages;
use crate::service::service;
use crate::types::{Empty, FieldMask, Mount, Timestamp};

/// Numbers of a snapshot's states.
pub mod kind {
    /// None was given.
    pub const UNKNOWN: i32 = 0;
    /// A read-only look at a committed one.
    pub const VIEW: i32 = 1;
    /// Writable.
    pub const ACTIVE: i32 = 2;
    /// Finished.
    pub const COMMITTED: i32 = 3;
}

messages! {
    /// Asks for a writable snapshot.
    pub struct PrepareSnapshotRequest {
        /// Which snapshotter is meant, of several behind one socket.
        snapshotter: text = 1,
        /// Its key.
        key: text = 2,
        /// The committed snapshot below it; empty for none.
        parent: text = 3,
        /// Its labels.
        labels: labels = 4,
    }

    /// Where to write.
    pub struct PrepareSnapshotResponse {
        /// In this order.
        mounts: many<Mount> = 1,
    }

    /// Asks for a read-only look.
    pub struct ViewSnapshotRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Its key.
        key: text = 2,
        /// The committed snapshot that is looked at; empty for none.
        parent: text = 3,
        /// Its labels.
        labels: labels = 4,
    }

    /// What to look at.
    pub struct ViewSnapshotResponse {
        /// In this order.
        mounts: many<Mount> = 1,
    }

    /// Asks again for the mounts of an active snapshot or a view.
    pub struct MountsRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Its key.
        key: text = 2,
    }

    /// The mounts.
    pub struct MountsResponse {
        /// In this order.
        mounts: many<Mount> = 1,
    }

    /// Asks to forget a snapshot.
    pub struct RemoveSnapshotRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Its key or name.
        key: text = 2,
    }

    /// Asks to finish an active snapshot.
    pub struct CommitSnapshotRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Its name from now on.
        name: text = 2,
        /// Its key so far.
        key: text = 3,
        /// Its labels from now on.
        labels: labels = 4,
        /// What it shall lie on, if it was prepared on nothing.
        parent: text = 5,
    }

    /// Asks what is known of a snapshot.
    pub struct StatSnapshotRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Its key or name.
        key: text = 2,
    }

    /// What is known of a snapshot.
    pub struct Info {
        /// Its key or name.
        name: text = 1,
        /// What it lies on.
        parent: text = 2,
        /// One of [`kind`].
        kind: choice = 3,
        /// When it was made.
        created_at: one<Timestamp> = 4,
        /// When it last changed.
        updated_at: one<Timestamp> = 5,
        /// Its labels.
        labels: labels = 6,
    }

    /// What is known of a snapshot.
    pub struct StatSnapshotResponse {
        /// That.
        info: one<Info> = 1,
    }

    /// Asks to change what may change of a snapshot: its labels.
    pub struct UpdateSnapshotRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Its name, and what it shall have.
        info: one<Info> = 2,
        /// Which fields; all if empty.
        update_mask: one<FieldMask> = 3,
    }

    /// What is known of it now.
    pub struct UpdateSnapshotResponse {
        /// That.
        info: one<Info> = 1,
    }

    /// Asks which snapshots there are.
    pub struct ListSnapshotsRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Those that match any of these; all if there is none.
        filters: texts = 2,
    }

    /// Some of them.
    pub struct ListSnapshotsResponse {
        /// In no order.
        info: many<Info> = 1,
    }

    /// Asks for the disk space of a snapshot.
    pub struct UsageRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
        /// Its key or name.
        key: text = 2,
    }

    /// Disk space of a snapshot, without those below it.
    pub struct UsageResponse {
        /// Bytes.
        size: int64 = 1,
        /// Files.
        inodes: int64 = 2,
    }

    /// Asks to remove what removed snapshots left.
    pub struct CleanupRequest {
        /// Which snapshotter is meant.
        snapshotter: text = 1,
    }
}

service! {
    /// A snapshotter.
    Snapshots, SnapshotsServer, SnapshotsClient, "containerd.services.snapshots.v1.Snapshots" {
        /// Makes a writable snapshot.
        unary Prepare prepare(PrepareSnapshotRequest) -> PrepareSnapshotResponse;
        /// Makes a read-only look at one.
        unary View view(ViewSnapshotRequest) -> ViewSnapshotResponse;
        /// What to mount to see one.
        unary Mounts mounts(MountsRequest) -> MountsResponse;
        /// Finishes an active one.
        unary Commit commit(CommitSnapshotRequest) -> Empty;
        /// Forgets one.
        unary Remove remove(RemoveSnapshotRequest) -> Empty;
        /// What is known of one.
        unary Stat stat(StatSnapshotRequest) -> StatSnapshotResponse;
        /// Changes labels.
        unary Update update(UpdateSnapshotRequest) -> UpdateSnapshotResponse;
        /// All, or those that match.
        stream List list(ListSnapshotsRequest) -> ListSnapshotsResponse;
        /// Disk space of one.
        unary Usage usage(UsageRequest) -> UsageResponse;
        /// Removes what removed ones left.
        unary Cleanup cleanup(CleanupRequest) -> Empty;
    }
}
