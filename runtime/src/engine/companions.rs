//! The files of an image that are read together: a program, what runs it, the libraries it
//! is linked to, and what every start looks at.
//!
//! Each layer foresees what is read of its own files; which files belong together goes over
//! the layers of an image, so it is told here.
//!
//! Invariant: only tells layers what to expect; what comes of it is theirs. Holds no layer,
//! and nothing holds it. Pure but for that.

use std::sync::{Arc, Weak};

use lazarette_fetcher::layer::{Layer, Needs};
use lazarette_snapshotter::tree::Tree;
use lazarette_snapshotter::tree::merged::Merged;
use parking_lot::Mutex;

/// Where libraries are looked for after the directories that a program names: those of
/// Debian's and others' loaders, 64-bit first.
const LIBRARY_DIRS: &[&str] = &[
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/lib",
    "/usr/lib64",
    "/usr/lib",
    "/lib64",
    "/lib",
];

/// What the engine reads of every image, and the loader at every start.
const ALWAYS: &[&str] = &["/etc/passwd", "/etc/group", "/etc/ld.so.cache"];

/// The layers of one image as they open, and what is expected of them.
pub(super) struct Companions {
    /// Where the program may be, the likeliest first.
    programs: Vec<String>,
    opened: Mutex<Vec<Option<Opened>>>,
    all: Mutex<Option<Arc<Stack>>>,
}

type Opened = (Weak<Layer>, Arc<Tree>);

/// All layers of an image, base first.
struct Stack {
    layers: Vec<Weak<Layer>>,
    merged: Merged,
}

impl Companions {
    /// Of an image of `layers`, in which one of `programs` is run: the first that is there.
    pub(super) fn new(layers: usize, programs: Vec<String>) -> Self {
        Self {
            programs,
            opened: Mutex::new((0..layers).map(|_| None).collect()),
            all: Mutex::default(),
        }
    }

    /// Whether nobody has said yet that layer `number` can be read.
    pub(super) fn lacks(&self, number: usize) -> bool {
        self.opened.lock().get(number).is_some_and(Option::is_none)
    }

    /// Layer `number` can be read. With the last of them, what the start reads is expected;
    /// `true` then.
    pub(super) fn opened(&self, number: usize, layer: &Arc<Layer>, tree: &Arc<Tree>) -> bool {
        let mut opened = self.opened.lock();
        let Some(place) = opened.get_mut(number) else {
            return false;
        };
        *place = Some((Arc::downgrade(layer), Arc::clone(tree)));
        if opened.iter().any(Option::is_none) {
            return false;
        }
        let (layers, trees): (Vec<_>, Vec<_>) = opened.drain(..).flatten().unzip();
        let merged = Merged::new(trees);
        let stack = Arc::new(Stack { layers, merged });
        stack.listen();
        stack.expect_first(self.programs.iter().map(String::as_str));
        stack.expect_all(ALWAYS);
        *self.all.lock() = Some(stack);
        true
    }

    /// Expects nothing more, and forgets the layers.
    pub(super) fn close(&self) {
        self.opened.lock().clear();
        self.all.lock().take();
    }
}

impl Stack {
    /// Has every layer tell what its programs need.
    fn listen(self: &Arc<Self>) {
        for layer in self.layers.iter().filter_map(Weak::upgrade) {
            let stack: Weak<Self> = Arc::downgrade(self);
            layer.on_needs(Some(Arc::new(move |needs| {
                if let Some(stack) = stack.upgrade() {
                    stack.expect_needs(&needs);
                }
            })));
        }
    }

    fn expect_needs(&self, needs: &Needs) {
        if let Some(interpreter) = &needs.interpreter {
            self.expect(interpreter);
        }
        let dirs = search_dirs(needs);
        for library in &needs.libraries {
            let paths = dirs.iter().map(|dir| join(dir, library));
            let _ = paths.into_iter().any(|path| self.expect(&path));
        }
    }

    fn expect_first<'a>(&self, mut paths: impl Iterator<Item = &'a str>) {
        paths.any(|path| self.expect(path.as_bytes()));
    }

    fn expect_all(&self, paths: &[&str]) {
        for path in paths {
            self.expect(path.as_bytes());
        }
    }

    /// Expects the file at `path`, if there is one.
    fn expect(&self, path: &[u8]) -> bool {
        let Some(found) = self.merged.file(path) else {
            return false;
        };
        if let Some(layer) = self.layers.get(found.layer).and_then(Weak::upgrade)
            && found.size > 0
        {
            layer.expect_file(found.data_offset);
        }
        true
    }
}

/// Directories to look for a program's libraries in, in this order.
fn search_dirs(needs: &Needs) -> Vec<Vec<u8>> {
    let origin = match needs.path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => needs.path.get(..at).unwrap_or_default(),
        None => &[],
    };
    let own = needs.search.iter().map(|dir| with_origin(dir, origin));
    let common = LIBRARY_DIRS.iter().map(|dir| dir.as_bytes().to_vec());
    own.chain(common).collect()
}

/// `dir`, in which `$ORIGIN` stands for `origin`.
fn with_origin(dir: &[u8], origin: &[u8]) -> Vec<u8> {
    for name in [&b"$ORIGIN"[..], b"${ORIGIN}"] {
        if let Some(rest) = dir.strip_prefix(name) {
            return [origin, rest].concat();
        }
    }
    dir.to_vec()
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    [dir, b"/", name].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_looked_for_where_the_loader_does() {
        let needs = Needs {
            path: b"opt/app/bin/run".to_vec(),
            interpreter: None,
            libraries: Vec::new(),
            search: vec![
                b"$ORIGIN/../lib".to_vec(),
                b"${ORIGIN}".to_vec(),
                b"/opt/other".to_vec(),
            ],
        };
        let dirs = search_dirs(&needs);
        let text = |dir: &Vec<u8>| String::from_utf8(dir.clone()).unwrap();
        let first: Vec<String> = dirs.iter().take(4).map(text).collect();
        let own = ["opt/app/bin/../lib", "opt/app/bin", "/opt/other"];
        assert_eq!(first[..3], own);
        assert_eq!(first[3], LIBRARY_DIRS[0]);
        assert_eq!(dirs.len(), own.len() + LIBRARY_DIRS.len());
    }
}
