//! What follows the flags of `laz run`: an image, and the words of a command.
//!
//! Invariant: flags end at the image, as docker's do: whatever comes behind it is the
//! command's, `--` and flags that `laz` has as well. One positional takes all of it: clap
//! goes on looking for flags between two.

use clap::builder::TypedValueParser as _;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, value_parser};
use lazarette_fetcher::types::Reference;

/// Name of the positional among the matches.
const ID: &str = "words";
/// The positional's name says nothing of the command, which may be left out.
const USAGE: &str = "laz run [OPTIONS] <REF> [COMMAND]...";
const HELP: &str = "\
{about-with-newline}
{usage-heading} {usage}

Arguments:
  <REF>         Image
  [COMMAND]...  Command and arguments instead of the image's; flags behind REF are the command's

Options:
{options}{after-help}";

/// An image, and what to run of it.
#[derive(Debug, Clone)]
pub struct Words {
    /// The image.
    pub reference: Reference,
    /// Command and arguments instead of the image's; empty keeps those.
    pub command: Vec<String>,
}

fn image() -> Arg {
    Arg::new(ID).value_name("REF").required(true)
}

impl Args for Words {
    fn augment_args(command: Command) -> Command {
        let words = image()
            .num_args(1..)
            .trailing_var_arg(true)
            .hide(true)
            .value_parser(value_parser!(String));
        command.arg(words).override_usage(USAGE).help_template(HELP)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Words {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut words = matches.get_many::<String>(ID).into_iter().flatten();
        let reference = words.next().map(String::as_ref).unwrap_or_default();
        // As clap would parse it: a bad one is told as any bad value is.
        let reference =
            Reference::parse.parse_ref(&Command::new("run"), Some(&image()), reference)?;
        Ok(Self {
            reference,
            command: words.cloned().collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
