//! All profiles of one image as a document.
//!
//! ```text
//! {"mediaType": "application/vnd.lazarette.profile.v1+json",
//!  "manifest": "sha256:…", "layers": ["sha256:…", …],
//!  "commands": [{"command": "sha256:…", "program": "python3", "runs": 3, "updatedAt": 1760000000,
//!                "blocks": [[layer, block, pages, seen, born], …]}, …]}
//! ```
//!
//! `layers` are the image's, base first; a block is 64 KiB of a layer's data file, `pages`
//! its sixteen 4 KiB pages as bits. Blocks are in the order of their first read.
//!
//! Invariant: what [`ImageProfiles::parse`] returns is within every limit here and refers
//! only to layers it lists. Command lines are not in it, only their digests: they may hold
//! secrets, and profiles travel.

use lazarette_fetcher::prefetch::Place;
use lazarette_fetcher::types::Digest;
use lazarette_fetcher::{Error, Result};
use serde::{Deserialize, Serialize};

/// What the document calls itself, here and in a registry.
pub const MEDIA_TYPE: &str = "application/vnd.lazarette.profile.v1+json";
/// Largest document, bytes: what the limits below come to with the largest layers whose
/// reads are recorded.
pub const DOCUMENT_BYTES_MAX: u64 = 16 << 20;
/// Most commands of an image that are remembered; the least recently started go first.
pub const COMMANDS_MAX: usize = 8;
/// Most blocks of a command, 4 GiB of data. A start that reads more is not waiting for the
/// first of them.
pub const BLOCKS_MAX: usize = 64 << 10;
/// Most starts that a document from elsewhere may count: enough for ever, and with as many to
/// come before the count ends.
pub const RUNS_MAX: u32 = 1 << 24;
/// Most layers, as images have.
const LAYERS_MAX: usize = 499;
/// Longest program name that is kept, bytes. It is shown and compared, never run.
const PROGRAM_BYTES_MAX: usize = 256;

/// What a start is known by, within one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// SHA-256 of the words of the command line, a zero byte after each. Environment, user
    /// and directory are not in it: they change from start to start and rarely what is read.
    pub digest: Digest,
    /// Its first word.
    pub program: String,
}

/// A block of a data file that starts read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u32, u16, u32, u32)", into = "(u32, u32, u16, u32, u32)")]
pub struct Block {
    /// Position of the layer, from the base.
    pub layer: u32,
    /// Where in its data file.
    pub place: Place,
    /// Starts that read it.
    pub seen: u32,
    /// Number of the first start that did.
    pub born: u32,
}

/// What the starts of one command read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CommandProfile {
    /// See [`Command::digest`].
    pub command: Digest,
    /// See [`Command::program`].
    pub program: String,
    /// Starts that were recorded.
    pub runs: u32,
    /// When the last of them was, seconds since 1970.
    pub updated_at: u64,
    /// Blocks in the order of their first read, none twice.
    pub blocks: Vec<Block>,
}

/// The profiles of one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageProfiles {
    /// [`MEDIA_TYPE`].
    pub media_type: String,
    /// The image's manifest.
    pub manifest: Digest,
    /// Its layers by blob digest, base first.
    pub layers: Vec<Digest>,
    /// One profile per command.
    pub commands: Vec<CommandProfile>,
}

impl Command {
    /// The command of this command line.
    pub fn new(words: &[String]) -> Self {
        let mut bytes = Vec::new();
        for word in words {
            bytes.extend_from_slice(word.as_bytes());
            bytes.push(0);
        }
        let mut program = words.first().cloned().unwrap_or_default();
        program.retain(|c| !c.is_control());
        program.truncate(program.floor_char_boundary(PROGRAM_BYTES_MAX));
        Self {
            digest: Digest::sha256(&bytes),
            program,
        }
    }
}

impl From<(u32, u32, u16, u32, u32)> for Block {
    fn from((layer, block, pages, seen, born): (u32, u32, u16, u32, u32)) -> Self {
        let place = Place { block, pages };
        Self {
            layer,
            place,
            seen,
            born,
        }
    }
}

impl From<Block> for (u32, u32, u16, u32, u32) {
    fn from(block: Block) -> Self {
        let Place { block: at, pages } = block.place;
        (block.layer, at, pages, block.seen, block.born)
    }
}

impl CommandProfile {
    /// No starts yet.
    pub fn empty(command: &Command) -> Self {
        Self {
            command: command.digest,
            program: command.program.clone(),
            runs: 0,
            updated_at: 0,
            blocks: Vec::new(),
        }
    }

    /// Bytes of the pages it names.
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.place.bytes()).sum()
    }
}

impl ImageProfiles {
    /// No profiles yet.
    pub fn empty(manifest: Digest, layers: Vec<Digest>) -> Self {
        Self {
            media_type: MEDIA_TYPE.to_owned(),
            manifest,
            layers,
            commands: Vec::new(),
        }
    }

    /// Parses and checks the document called `what`, from anywhere.
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            let detail = format!("{} bytes, at most {DOCUMENT_BYTES_MAX}", bytes.len());
            return Err(Error::limit(what, detail));
        }
        let profiles: Self =
            serde_json::from_slice(bytes).map_err(|e| Error::malformed(what, e.to_string()))?;
        profiles.check(what)?;
        if let Some(profile) = profiles.commands.iter().find(|one| one.runs > RUNS_MAX) {
            let detail = format!("{} starts, at most {RUNS_MAX}", profile.runs);
            return Err(Error::limit(what, detail));
        }
        Ok(profiles)
    }

    /// Checks every rule of the document called `what`.
    pub fn check(&self, what: &str) -> Result<()> {
        if self.media_type != MEDIA_TYPE {
            let detail = format!("its media type is {:?}, not {MEDIA_TYPE}", self.media_type);
            return Err(Error::malformed(what, detail));
        }
        let within = |n: usize, max: usize, of: &str| match n <= max {
            true => Ok(()),
            false => Err(Error::limit(what, format!("{n} {of}, at most {max}"))),
        };
        within(self.layers.len(), LAYERS_MAX, "layers")?;
        within(self.commands.len(), COMMANDS_MAX, "commands")?;
        let mut commands: Vec<&Digest> = self.commands.iter().map(|c| &c.command).collect();
        commands.sort_unstable();
        commands.dedup();
        if commands.len() < self.commands.len() {
            return Err(Error::malformed(what, "it has a command twice"));
        }
        for profile in &self.commands {
            within(profile.blocks.len(), BLOCKS_MAX, "blocks")?;
            profile
                .check(self.layers.len())
                .map_err(|rule| Error::malformed(what, rule))?;
        }
        Ok(())
    }

    /// The profile of this command.
    pub fn of(&self, command: &Command) -> Option<&CommandProfile> {
        self.commands
            .iter()
            .find(|profile| profile.command == command.digest)
    }

    /// The profile to start this command with: its own, or else, as a guess (`true`), that
    /// of the last start of the same program. Starts of other programs share too little
    /// with it: what a guess has wrong is fetched for nothing.
    pub fn choose(&self, command: &Command) -> Option<(&CommandProfile, bool)> {
        if let Some(own) = self.of(command) {
            return Some((own, false));
        }
        let same = self.commands.iter();
        same.filter(|profile| !command.program.is_empty() && profile.program == command.program)
            .max_by_key(|profile| profile.updated_at)
            .map(|profile| (profile, true))
    }

    /// The same, of which nothing was later than `now`, seconds since 1970. What is to come,
    /// by a clock that was wrong or somebody's word, would be the last to make room for ever.
    #[must_use]
    pub fn not_after(mut self, now: u64) -> Self {
        for profile in &mut self.commands {
            profile.updated_at = profile.updated_at.min(now);
        }
        self
    }

    /// Sets the profile of a command; the least recently started one makes room, of several
    /// one that was there before.
    pub fn put(&mut self, profile: CommandProfile) {
        self.commands
            .retain(|other| other.command != profile.command);
        self.commands.insert(0, profile);
        self.commands
            .sort_by_key(|profile| std::cmp::Reverse(profile.updated_at));
        self.commands.truncate(COMMANDS_MAX);
    }
}

impl CommandProfile {
    fn check(&self, layers: usize) -> Result<(), String> {
        if self.program.len() > PROGRAM_BYTES_MAX || self.program.contains(char::is_control) {
            return Err("a program's name is too long or has control characters".to_owned());
        }
        let mut places = std::collections::HashSet::new();
        for block in &self.blocks {
            let known = usize::try_from(block.layer).is_ok_and(|layer| layer < layers);
            if !known {
                return Err(format!(
                    "a block of layer {}, which is not there",
                    block.layer
                ));
            }
            if block.place.pages == 0 {
                return Err("a block without pages".to_owned());
            }
            let most = (self.runs.checked_sub(block.born)).map(|later| later.saturating_add(1));
            let could = block.born > 0 && most.is_some_and(|most| block.seen <= most);
            if !could || block.seen == 0 {
                return Err(format!(
                    "a block that {} of {} starts read, from number {} on",
                    block.seen, self.runs, block.born
                ));
            }
            if !places.insert((block.layer, block.place.block)) {
                return Err(format!("block {} of a layer twice", block.place.block));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
