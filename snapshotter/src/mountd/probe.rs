//! Whether this kernel asks before it reads the data file of an EROFS, found out by having it
//! show and read a small layer.
//!
//! Invariant: nothing is left mounted, whatever fails, also when this process is killed half
//! way: the mounts are in no tree, and end with the descriptors. Nothing here waits for longer
//! than [`ANSWER_WAIT`].

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use lazarette_mountd::fanotify::{Group, QUESTIONS_BYTES};

use super::choose::Trial;
use super::sample::{Bytes, CUT, Sample, WHOLE, is_content, read_block};
use crate::fuse::create_image;
use crate::sys;

/// How long the kernel may take to ask, or to read some bytes. It takes microseconds.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Whether it asks before an EROFS reads its data file, and keeps to the answer; found out in
/// `dir` on the file system that holds the store. Takes milliseconds and blocks for them.
pub(super) fn probe(dir: &Path) -> Trial {
    let sample = match Sample::new(dir, "probe") {
        Ok(sample) => sample,
        Err(error) => return Trial::Untried(error.to_string()),
    };
    match run(&sample) {
        Ok(()) => Trial::Works {
            fails_short_reads: true,
        },
        Err(why) => Trial::Fails(why),
    }
}

/// Has the kernel ask, deny and allow.
///
/// # Errors
/// What it does otherwise than it must, in words.
fn run(sample: &Sample) -> Result<(), String> {
    let group = Group::new().map_err(|e| format!("no fanotify group: {e}"))?;
    let mounted = mount(sample, &group)?;
    let read = |name: &str| {
        let path = sys::path_of(mounted.as_fd()).join(name);
        move || read_block(&path)
    };
    let by_name = sample.data();
    let (asked, bytes) = ask(&group, Answer::Deny, move || read_block(&by_name))?;
    if asked || !is_content(&bytes) {
        return Err("it asks about the data file by its name, too".to_owned());
    }
    let (asked, bytes) = ask(&group, Answer::Deny, read(WHOLE))?;
    if !asked {
        return Err("it reads the data file of an erofs without asking".to_owned());
    }
    if bytes.is_ok() {
        return Err("it reads what was denied".to_owned());
    }
    let (asked, bytes) = ask(&group, Answer::Allow, read(WHOLE))?;
    if !asked || !is_content(&bytes) {
        return Err("it does not read what was allowed".to_owned());
    }
    let (_, bytes) = ask(&group, Answer::Allow, read(CUT))?;
    match bytes {
        Err(_) => Ok(()),
        Ok(_) => Err("it takes what it could not read for zeros".to_owned()),
    }
}

/// An EROFS in no tree, about whose data `group` is asked.
fn mount(sample: &Sample, group: &Group) -> Result<OwnedFd, String> {
    let data = File::open(sample.data()).map_err(|e| format!("cannot open a file: {e}"))?;
    let own = sys::mount_of_its_own(&data);
    let own = own.map_err(|e| format!("no mount of one file: {e}"))?;
    let marked = group.mark(own.as_fd());
    let at = sample.dir().display();
    marked.map_err(|e| format!("it cannot ask before it reads {at}: {e}"))?;
    let files = [sample.image(), sys::path_of(own.as_fd())];
    create_image(&files, sample.dir()).map_err(|e| e.to_string())
}

#[derive(Clone, Copy)]
enum Answer {
    Allow,
    Deny,
}

/// Runs `read` in a thread and answers what is asked meanwhile; whether something was, and what
/// was read.
fn ask(
    group: &Group,
    answer: Answer,
    read: impl FnOnce() -> Bytes + Send + 'static,
) -> Result<(bool, Bytes), String> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| format!("no pair of sockets: {e}"))?;
    let reader = std::thread::Builder::new().spawn(move || {
        let bytes = read();
        // Its end is what tells.
        drop(theirs);
        bytes
    });
    let reader = reader.map_err(|e| format!("no thread: {e}"))?;
    let mut asked = false;
    let mut buf = vec![0; QUESTIONS_BYTES];
    loop {
        let ready = group.wait(ours.as_fd(), ANSWER_WAIT);
        match ready.map_err(|e| format!("cannot wait for questions: {e}"))? {
            [false, false] => return Err("a read takes too long".to_owned()),
            [true, _] => {}
            // It has ended, and nothing is left to be answered.
            [false, true] => break,
        }
        // One that another thread has read is none of ours; there is no other.
        for question in group.next(&mut buf).unwrap_or_default() {
            asked = true;
            match answer {
                Answer::Allow => group.allow(question.unique),
                Answer::Deny => group.deny(question.unique),
            }
        }
    }
    let bytes = reader.join();
    Ok((asked, bytes.map_err(|_| "a thread panicked".to_owned())?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::test_util::must_be_root;

    #[test]
    fn privileged_this_kernel_asks_before_it_reads() {
        if !must_be_root("privileged_this_kernel_asks_before_it_reads") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let works = Trial::Works {
            fails_short_reads: true,
        };
        assert_eq!(
            probe(dir.path()),
            works,
            "layers are shown another way here"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(dir.path().to_str().unwrap()));
    }

    #[test]
    fn privileged_a_file_system_that_cannot_ask_says_so() {
        if !must_be_root("privileged_a_file_system_that_cannot_ask_says_so") {
            return;
        }
        // What is there is memory, on every kernel.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let refused = probe(dir.path());
        assert!(
            matches!(&refused, Trial::Fails(why) if why.contains("before it reads")),
            "{refused:?}"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
