//! Arguments of `laz`, in the words docker and containerd users know.
//!
//! Invariant: every value is parsed into its type here, so a bad one fails before
//! anything has been started.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use lazarette_fetcher::index::write::{Flavour, Format};
use lazarette_fetcher::types::Reference;
use lazarette_snapshotter::fuse::Backend;

use super::words::Words;
use crate::size::parse_size;
use crate::spec::{Network, Volume};

/// Lazily started containers.
#[derive(Debug, Parser)]
#[command(name = "laz", version, about, propagate_version = true)]
pub struct Args {
    /// Directory of the store [default: /var/lib/lazarette]
    #[arg(long, global = true, value_name = "DIR", env = "LAZARETTE_ROOT")]
    pub root: Option<PathBuf>,
    /// Directory of mountpoints and bundles [default: /run/lazarette]
    #[arg(long, global = true, value_name = "DIR", env = "LAZARETTE_STATE")]
    pub state: Option<PathBuf>,
    /// Config file [default: /etc/lazarette/config.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE", env = "LAZARETTE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Log what happens to standard error
    #[arg(long, global = true)]
    pub debug: bool,
    /// How results are printed
    #[arg(long, global = true, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a container and wait for it, fetching its image lazily
    Run(Box<RunArgs>),
    /// Make an image ready to start; with --full, fetch all of it
    Pull(PullArgs),
    /// List pulled images
    Images,
    /// Remove images and the layers nothing else uses
    Rmi(RmiArgs),
    /// Look at the store, and keep it small and sound
    Store(StoreArgs),
    /// Work on images
    Image(ImageArgs),
}

/// Arguments of `laz run`.
#[derive(Debug, ClapArgs)]
pub struct RunArgs {
    /// Accepted for docker's sake: containers are always removed when they end
    #[arg(long)]
    pub rm: bool,
    /// Keep standard input open
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set an environment variable; without a value, pass ours on
    #[arg(short, long, value_name = "K=V")]
    pub env: Vec<String>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// User, and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Mount a directory or file of the host, with what is mounted below it
    #[arg(short, long, value_name = "SRC:DST[:ro]")]
    pub volume: Vec<Volume>,
    /// Network: the host's, or none but loopback
    #[arg(long, value_enum, default_value_t = Net::Host)]
    pub net: Net,
    /// Host name in the container [default: the container's id]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Memory limit: bytes, or with k, m, g
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// CPU limit in cores
    #[arg(long, value_name = "N", value_parser = parse_cpus)]
    pub cpus: Option<f64>,
    /// Most processes and threads
    #[arg(long, value_name = "N")]
    pub pids_limit: Option<NonZeroU32>,
    /// Mount the root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Fetch the whole image before starting
    #[arg(long)]
    pub full: bool,
    /// Neither use what earlier starts read, nor record what this one does
    #[arg(long)]
    pub no_profile: bool,
    /// What shows the layers' files; auto is erofs where the kernel can, else fuse
    /// [default: auto, or what the config says]
    #[arg(long, value_enum)]
    pub backend: Option<BackendName>,
    /// External OCI runtime (runc, crun, or a path) instead of the built-in one
    #[arg(long, value_name = "RUNTIME")]
    pub runtime: Option<String>,
    /// Print where the time went when the container has ended
    #[arg(long)]
    pub trace: bool,
    /// Write the cold-start record as JSON to a file
    #[arg(long, value_name = "FILE")]
    pub trace_file: Option<PathBuf>,
    /// Image and command
    #[command(flatten)]
    pub words: Words,
}

/// Networks that `laz run` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Net {
    /// The host's.
    Host,
    /// None but loopback.
    None,
}

impl From<Net> for Network {
    fn from(net: Net) -> Self {
        match net {
            Net::Host => Self::Host,
            Net::None => Self::None,
        }
    }
}

/// What shows the layers' files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// EROFS where the kernel can, else FUSE.
    Auto,
    /// EROFS, its data served through FUSE.
    Erofs,
    /// FUSE alone.
    Fuse,
}

impl From<BackendName> for Backend {
    fn from(name: BackendName) -> Self {
        match name {
            BackendName::Auto => Self::Auto,
            BackendName::Erofs => Self::Erofs,
            BackendName::Fuse => Self::Fuse,
        }
    }
}

/// Arguments of `laz pull`.
#[derive(Debug, ClapArgs)]
pub struct PullArgs {
    /// Fetch every byte, not only what lazy starts need first
    #[arg(long)]
    pub full: bool,
    /// Image
    #[arg(value_name = "REF")]
    pub reference: Reference,
}

/// Arguments of `laz rmi`.
#[derive(Debug, ClapArgs)]
pub struct RmiArgs {
    /// Images
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<Reference>,
}

/// Arguments of `laz store`.
#[derive(Debug, ClapArgs)]
pub struct StoreArgs {
    /// What to do
    #[command(subcommand)]
    pub command: StoreCommand,
}

/// Commands on the store.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Show what each layer takes, and what the store may take
    Df(DfArgs),
    /// Read everything, drop what is not right, and say so (exit code 1 if any stays missing)
    Check(CheckArgs),
    /// Remove layers and blobs that no image and no container uses
    Prune,
    /// Drop bytes that can be fetched again; running containers fetch what they read
    Evict(EvictArgs),
}

/// Arguments of `laz store df`.
#[derive(Debug, ClapArgs)]
pub struct DfArgs {
    /// Show only what all layers take together, and may take
    #[arg(long)]
    pub summary: bool,
}

/// Arguments of `laz store check`.
#[derive(Debug, ClapArgs)]
pub struct CheckArgs {
    /// Fetch again what is dropped, where an image still names it; where it cannot be told what
    /// was there, all of the layer
    #[arg(long)]
    pub repair: bool,
}

/// Arguments of `laz store evict`.
#[derive(Debug, ClapArgs)]
#[group(required = true, multiple = false)]
pub struct EvictArgs {
    /// Everything
    #[arg(long)]
    pub all: bool,
    /// As much as it takes until the layers take at most this
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub to: Option<u64>,
    /// Everything of these images
    #[arg(value_name = "REF")]
    pub references: Vec<Reference>,
}

/// Arguments of `laz image`.
#[derive(Debug, ClapArgs)]
pub struct ImageArgs {
    /// What to do
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// Commands on images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Write an image anew in a lazily loadable format
    Convert(ConvertArgs),
    /// Make indexes of an image's layers, so that they load lazily from then on
    Index(IndexArgs),
    /// Look at what starts of an image read, or exchange it
    Profile(ProfileArgs),
}

/// Arguments of `laz image index`.
#[derive(Debug, ClapArgs)]
pub struct IndexArgs {
    /// Push the indexes beside the image, for nodes that trust the key
    #[arg(long, requires = "key")]
    pub push: bool,
    /// Private Ed25519 key in PEM that signs what is pushed
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Image
    #[arg(value_name = "REF")]
    pub reference: Reference,
}

/// Arguments of `laz image profile`.
#[derive(Debug, ClapArgs)]
pub struct ProfileArgs {
    /// What to do
    #[command(subcommand)]
    pub command: ProfileCommand,
}

/// Commands on profiles.
#[derive(Debug, Subcommand)]
pub enum ProfileCommand {
    /// Show which commands were recorded and what they read
    Show {
        /// Image
        #[arg(value_name = "REF")]
        reference: Reference,
    },
    /// Write an image's profiles to a file
    Export {
        /// Image
        #[arg(value_name = "REF")]
        reference: Reference,
        /// Where to
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Put an image's profiles beside it in its registry, for other nodes' first starts
    Push {
        /// Image
        #[arg(value_name = "REF")]
        reference: Reference,
    },
    /// Add the profiles that the registry has beside the image
    Pull {
        /// Image
        #[arg(value_name = "REF")]
        reference: Reference,
    },
    /// Add profiles that another node exported
    Import {
        /// Image
        #[arg(value_name = "REF")]
        reference: Reference,
        /// Where from
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// Arguments of `laz image convert`.
#[derive(Debug, ClapArgs)]
pub struct ConvertArgs {
    /// Target format
    #[arg(long, value_enum)]
    pub to: ConvertFormat,
    /// Whose zstd:chunked: each reads the other's as plain zstd
    #[arg(long, value_enum, default_value_t = ZstdFlavour::ContainersStorage)]
    pub zstd_flavour: ZstdFlavour,
    /// Put the files listed in FILE, one path a line, first, and cut all others coarsely
    #[arg(long, value_name = "FILE")]
    pub prioritize: Option<PathBuf>,
    /// Put what the last recorded start of SRC read first, and cut all else coarsely
    #[arg(long, conflicts_with = "prioritize")]
    pub profile: bool,
    /// Image to read
    pub src: Reference,
    /// Reference to push the result to
    pub dst: Reference,
}

/// Formats the converter writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConvertFormat {
    /// eStargz: gzip that every runtime reads, lazily loadable.
    Estargz,
    /// zstd:chunked: smaller and faster to decode, lazily loadable.
    ZstdChunked,
    /// Plain gzip layers, without anything that lazy loading adds.
    Oci,
}

/// The two kinds of zstd:chunked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ZstdFlavour {
    /// Podman's, buildah's and CRI-O's.
    ContainersStorage,
    /// stargz-snapshotter's.
    Stargz,
}

impl ConvertArgs {
    /// What the layers become.
    pub fn format(&self) -> Format {
        match (self.to, self.zstd_flavour) {
            (ConvertFormat::Estargz, _) => Format::Estargz,
            (ConvertFormat::Oci, _) => Format::Gzip,
            (ConvertFormat::ZstdChunked, ZstdFlavour::ContainersStorage) => {
                Format::ZstdChunked(Flavour::ContainersStorage)
            }
            (ConvertFormat::ZstdChunked, ZstdFlavour::Stargz) => {
                Format::ZstdChunked(Flavour::Stargz)
            }
        }
    }
}

fn parse_cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if (0.01..=1024.0).contains(&cpus) => Ok(cpus),
        _ => Err("expected a number of cores from 0.01 to 1024".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_definitions_are_sound() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }

    fn parsed(words: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(["laz", "run"].iter().chain(words))
    }

    #[test]
    fn everything_after_the_reference_is_the_command() {
        let commands: [&[&str]; 9] = [
            &[],
            &["ls", "--rm", "-l"],
            &["-v", "https://x"],
            &["--version"],
            &["-h"],
            &["--help", "run"],
            &["-e", "A=b", "--debug", "--root=/x"],
            &["--", "ls", "--"],
            &["--no-such-flag"],
        ];
        for command in commands {
            for before in [
                &["--rm", "-it", "debian"][..],
                &["--rm", "-it", "--", "debian"],
            ] {
                let args = parsed(&[before, command].concat()).unwrap();
                let (debug, root) = (args.debug, args.root);
                let Command::Run(run) = args.command else {
                    panic!("not run")
                };
                assert!(run.rm && run.interactive && run.tty);
                assert!(run.env.is_empty() && run.volume.is_empty());
                assert_eq!((debug, root), (false, None), "{command:?}");
                assert_eq!(
                    run.words.reference.to_string(),
                    "docker.io/library/debian:latest"
                );
                assert_eq!(run.words.command, command);
            }
        }
    }

    #[test]
    fn flags_before_the_reference_are_ours() {
        use clap::error::ErrorKind;
        let table: [(&[&str], ErrorKind, &str); 6] = [
            (
                &["--no-such-flag", "debian"],
                ErrorKind::UnknownArgument,
                "--no-such-flag",
            ),
            (&["-x", "debian"], ErrorKind::UnknownArgument, "'-x'"),
            (&["--version", "debian"], ErrorKind::DisplayVersion, "laz"),
            (
                &["-h", "debian"],
                ErrorKind::DisplayHelp,
                "<REF> [COMMAND]...",
            ),
            (&["--rm"], ErrorKind::MissingRequiredArgument, "<REF>"),
            (
                &["Debian", "ls"],
                ErrorKind::ValueValidation,
                "'Debian' for '<REF>'",
            ),
        ];
        for (words, kind, text) in table {
            let error = parsed(words).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn a_bad_reference_says_why() {
        let error = Args::try_parse_from(["laz", "pull", "Debian"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("must be lower case"), "{error}");
    }
}
