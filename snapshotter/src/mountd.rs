//! The daemon's end of the mount server: what it has mounted, and answers to what it wants.
//!
//! The mount server (`laz-mountd`) shows a layer's data file at a directory and goes on
//! doing so when this process is gone; an EROFS of the layer is mounted over it. This side
//! only says which bytes it may serve.
//!
//! Invariant: what is granted was vouched for by the layer, with the number of evictions
//! that goes with it; the server does the rest. A want is answered exactly once, as long as
//! the connection lives. When it does not, everything that waits for the server fails, and
//! whoever mounts connects anew and attaches its layers again.

mod choose;
mod image;
mod layer;
mod link;
mod probe;
mod sample;
mod stale;
mod start;
mod try_erofs;
mod want;
mod whole;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::store::{Lent, Vouched};
use lazarette_fetcher::types::{ByteRange, Digest};
pub use lazarette_mountd::wire::Through;
use lazarette_mountd::wire::{FileId, Listed, Message};
use tokio::runtime::Handle;

pub use self::choose::{Choice, select};
pub use self::image::is_image_of;
pub use self::layer::{Place, Shown, Unattached};
use self::link::{Done, Link};
pub use self::stale::clear;
pub use self::whole::{hide_whole, is_shown_whole, show_whole};
use crate::data::LayerData;
use crate::{Error, Result};

/// Name of the file that the server shows at a mountpoint.
pub const DATA: &str = "data";
/// Name of another that has the same bytes, through which small files are read: what the kernel
/// reads of it, it keeps, and it reads a page ahead of who reads in order. Servers before this
/// version have none.
pub const SMALL: &str = "small";
/// What a server answers that has as many files open as it may.
const EMFILE: i32 = 24;
/// What is shown is the data file up to the end of its last block of this size, bytes.
const BLOCK_BYTES: u64 = 4096;

/// A layer's data that another process can serve.
pub trait LentData: LayerData {
    /// What that process needs. Each call makes open files of their own.
    fn lend(&self) -> lazarette_fetcher::Result<Lent>;

    /// `range` and what is around it, if it is present and right. Local disk only.
    fn vouch(&self, range: ByteRange) -> lazarette_fetcher::Result<Option<Vouched>>;

    /// Whether it is known what will be read of it soon: then nothing beside that is wanted,
    /// either.
    fn is_known(&self) -> bool {
        false
    }

    /// Has the data file end with a block of 4096, where it is to be read by the kernel itself.
    fn pad(&self) -> lazarette_fetcher::Result<()>;
}

impl LentData for Layer {
    fn lend(&self) -> lazarette_fetcher::Result<Lent> {
        self.file().lend()
    }

    fn vouch(&self, range: ByteRange) -> lazarette_fetcher::Result<Option<Vouched>> {
        self.file().vouch(range)
    }

    fn is_known(&self) -> bool {
        !self.foresees()
    }

    fn pad(&self) -> lazarette_fetcher::Result<()> {
        self.file().pad()
    }
}

/// A data file that the server shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Its number at this server.
    pub mount: u64,
    /// The layer; `None` for a name that is no digest, which nobody here mounted.
    pub blob_digest: Option<Digest>,
    /// The directory that shows it, as [`DATA`], or where its EROFS is.
    pub path: PathBuf,
    /// Through what the kernel gets its data.
    pub through: Through,
}

/// A connection to the mount server. Dropping it unmounts nothing.
pub struct MountServer {
    link: Arc<Link>,
    data_alone: bool,
}

impl MountServer {
    /// Connects to the server at `socket`; what it shows already, to be attached. Wants are
    /// answered on `handle`.
    ///
    /// # Errors
    /// `Environment` where no server is there, or another daemon has it.
    pub fn connect(socket: &Path, handle: Handle) -> Result<(Self, Vec<Mounted>)> {
        let (link, listed) = Link::open(socket, handle).map_err(|error| lost(&error))?;
        let mounted = |listed: Listed| Mounted {
            mount: listed.mount,
            blob_digest: std::str::from_utf8(&listed.name)
                .ok()
                .and_then(|name| Digest::parse(name).ok()),
            path: PathBuf::from(std::ffi::OsString::from_vec(listed.path)),
            through: listed.through,
        };
        let mounts = listed.into_iter().map(mounted).collect();
        let server = Self {
            link,
            data_alone: false,
        };
        Ok((server, mounts))
    }

    /// Whether small files of what is mounted from now on are read through [`DATA`], too: what
    /// comes through it comes in one piece or fails. For kernels that do not fail short reads,
    /// see [`Choice`].
    #[must_use]
    pub fn with_data_alone(mut self, data_alone: bool) -> Self {
        self.data_alone = data_alone;
        self
    }

    /// The same; where no server is there, `program` is started as one, and outlives us.
    pub fn connect_or_start(
        socket: &Path,
        program: &Path,
        handle: Handle,
    ) -> Result<(Self, Vec<Mounted>)> {
        start::ensure(socket, program)?;
        Self::connect(socket, handle)
    }

    /// Shows the layer's data file at the empty directory `path`; the mount's number. Takes
    /// milliseconds and blocks for them.
    pub fn mount(&self, blob_digest: Digest, data: Arc<dyn LentData>, path: &Path) -> Result<u64> {
        self.mount_through(Through::Fuse, blob_digest, data, path)
    }

    fn mount_through(
        &self,
        through: Through,
        blob_digest: Digest,
        data: Arc<dyn LentData>,
        path: &Path,
    ) -> Result<u64> {
        let lent = data.lend()?;
        let len = len_of(&lent.data).map_err(|e| Error::io("inspect", path, e))?;
        let message = |request| Message::Mount {
            request,
            through,
            size: len.next_multiple_of(BLOCK_BYTES),
            name: blob_digest.to_string().into_bytes(),
            path: path.as_os_str().as_bytes().to_vec(),
        };
        let fds = [lent.data.as_fd(), lent.evictions.as_fd()];
        let done = self.link.ask(message, &fds, Some(data));
        outcome(done, "show the data of a layer at", path)
    }

    /// Answers for a mount from now on, with the layer whose data file it shows.
    ///
    /// # Errors
    /// `Mount` with `ESTALE` where it shows another file: the layer was removed meanwhile.
    pub fn attach(&self, mounted: &Mounted, data: Arc<dyn LentData>) -> Result<()> {
        let lent = data.lend()?;
        let id = FileId::of(&lent.data);
        let file = id.map_err(|e| Error::io("inspect", &mounted.path, e))?;
        let mount = mounted.mount;
        let message = |request| Message::Attach {
            request,
            mount,
            file,
        };
        let done = self.link.ask(message, &[], Some(data));
        outcome(done, "answer for the mount at", &mounted.path).map(drop)
    }

    /// Ends a mount that nothing uses any more.
    ///
    /// # Errors
    /// `Mount` with `EBUSY` while its file is open, by an EROFS that is mounted for one.
    pub fn unmount(&self, mounted: &Mounted) -> Result<()> {
        let mount = mounted.mount;
        let done = self
            .link
            .ask(|request| Message::Unmount { request, mount }, &[], None);
        outcome(done, "unmount", &mounted.path)?;
        self.link.forget(mount);
        Ok(())
    }

    /// Whether the server is gone, or has been replaced: what fails then may work with the
    /// next one.
    pub fn is_closed(&self) -> bool {
        self.link.is_closed()
    }

    /// Waits until the server is gone, or has been replaced by its successor.
    pub async fn closed(&self) {
        self.link.closed().await;
    }
}

impl Drop for MountServer {
    fn drop(&mut self) {
        self.link.close();
    }
}

fn len_of(data: &File) -> io::Result<u64> {
    Ok(data.metadata()?.len())
}

/// The mount that was asked for, or why not.
fn outcome(done: lazarette_mountd::Result<Done>, op: &'static str, path: &Path) -> Result<u64> {
    let done = done.map_err(|error| lost(&error))?;
    match i32::try_from(done.errno) {
        Ok(0) => Ok(done.mount),
        errno => {
            let errno = errno.unwrap_or(i32::MAX);
            let detail = match errno {
                EMFILE => "laz-mountd has as many open as it may: raise LimitNOFILE= of its unit",
                _ => "",
            };
            Err(Error::Mount {
                op,
                path: path.to_path_buf(),
                detail: detail.to_owned(),
                source: io::Error::from_raw_os_error(errno),
            })
        }
    }
}

fn lost(error: &lazarette_mountd::Error) -> Error {
    Error::Environment {
        op: "use the mount server",
        detail: format!("{error}; see whether laz-mountd runs, and no other daemon uses it"),
    }
}
