//! The files of an image that are read together: a program, what runs it, the libraries it
//! is linked to, and what every start looks at.
//!
//! Each layer foresees what is read of its own files; which files belong together goes over
//! the layers of an image, so it is told here.
//!
//! Invariant: only tells layers what to expect; what comes of it is theirs. Holds no layer,
//! and nothing holds it. Pure but for that.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use lazarette_fetcher::layer::{Layer, Needs, Priority};
use lazarette_snapshotter::tree::Tree;
use lazarette_snapshotter::tree::merged::{Found, Merged};
use parking_lot::Mutex;

use crate::spec::Named;

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

/// What whoever makes the container waits for first.
const ACCOUNTS: [&str; 2] = ["/etc/passwd", "/etc/group"];
/// What the loader reads at every start.
const CACHE: &str = "/etc/ld.so.cache";

/// The layers of one image as they open, and what is expected of them.
pub(super) struct Companions {
    named: Named,
    opened: Mutex<Vec<Option<Opened>>>,
    all: Mutex<Option<Arc<Stack>>>,
}

type Opened = (Weak<Layer>, Arc<Tree>);

/// All layers of an image, base first.
struct Stack {
    layers: Vec<Weak<Layer>>,
    merged: Merged,
    /// Directories in which programs are looked for.
    search: Vec<String>,
}

impl Companions {
    /// Of an image of `layers`, started by a command that names these files.
    pub(super) fn new(layers: usize, named: Named) -> Self {
        Self {
            named,
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
        let stack = Arc::new(Stack {
            layers,
            merged,
            search: self.named.search.clone(),
        });
        stack.listen();
        let accounts = ACCOUNTS
            .iter()
            .filter_map(|path| stack.find(path.as_bytes()));
        stack.expect(accounts.collect(), Priority::OnDemand);
        let first = |paths: &Vec<String>| paths.iter().find_map(|path| stack.find(path.as_bytes()));
        let named = self.named.files.iter().filter_map(first);
        let named = named.chain(stack.find(CACHE.as_bytes()));
        stack.expect(named.collect(), Priority::Profile);
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
        let programs = needs.programs.iter().filter_map(|name| self.program(name));
        let dirs = search_dirs(needs);
        let library = |name: &Vec<u8>| dirs.iter().find_map(|dir| self.find(&join(dir, name)));
        let libraries = needs.libraries.iter().filter_map(library);
        self.expect(programs.chain(libraries).collect(), Priority::Profile);
    }

    /// A program, looked for as the container does if its name alone is given.
    fn program(&self, name: &[u8]) -> Option<Found> {
        if name.contains(&b'/') {
            return self.find(name);
        }
        let mut dirs = self.search.iter();
        dirs.find_map(|dir| self.find(&join(dir.as_bytes(), name)))
    }

    fn find(&self, path: &[u8]) -> Option<Found> {
        self.merged.file(path)
    }

    /// Expects these files, those of each layer together.
    fn expect(&self, files: Vec<Found>, urgency: Priority) {
        let mut of_layers = BTreeMap::<usize, Vec<u64>>::new();
        for file in files.iter().filter(|file| file.size > 0) {
            of_layers
                .entry(file.layer)
                .or_default()
                .push(file.data_offset);
        }
        for (layer, offsets) in of_layers {
            if let Some(layer) = self.layers.get(layer).and_then(Weak::upgrade) {
                layer.expect_files(offsets, urgency);
            }
        }
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
            programs: Vec::new(),
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
