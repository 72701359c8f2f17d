//! The files that a command line names: its program, and what its other words may be.
//!
//! Most containers run something that runs something else: `tini -- server`,
//! `sh -c "migrate && exec server"`, `java -jar app.jar`. What is named so is opened soon.
//!
//! Invariant: pure, and guesses only. A word that names no file costs a look at the tree.
//! Bounded in number, whatever the words are.

use super::{ContainerOptions, ImageConfig, PATH_DEFAULT, command_line};

/// Words that are looked at.
const WORDS_MAX: usize = 64;
/// Programs whose `-c` is followed by a script.
const SHELLS: [&str; 6] = ["sh", "bash", "dash", "ash", "zsh", "busybox"];
/// What stands between the words of a script, or around them.
const BETWEEN: &str = ";|&()<>{}`'\"";

/// What a command line may open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Named {
    /// For each file the paths, as the container sees them, where it may be: the first that
    /// is there is meant.
    pub(crate) files: Vec<Vec<String>>,
    /// Directories in which programs are looked for.
    pub(crate) search: Vec<String>,
}

/// Of the words that will be run.
pub(crate) fn named(options: &ContainerOptions, image: &ImageConfig) -> Named {
    let search = search(options, image);
    let words = command_line(options, image).unwrap_or_default();
    let cwd = cwd(options, image);
    let paths = |word: &str, is_program: bool| match word {
        word if word.starts_with('/') => vec![word.to_owned()],
        word if word.contains('/') => vec![format!("{cwd}/{word}")],
        word => {
            let here = (!is_program).then_some(&cwd);
            let dirs = here.into_iter().chain(&search);
            dirs.map(|dir| format!("{dir}/{word}")).collect()
        }
    };
    let program = words.iter().take(1).map(|word| paths(word, true));
    let others = arguments(&words).map(|word| paths(word, false));
    let files = program.chain(others).take(WORDS_MAX).collect();
    Named { files, search }
}

/// What the words behind the first may name.
fn arguments(words: &[String]) -> impl Iterator<Item = &str> {
    let pairs = words.iter().zip(words.iter().skip(1)).enumerate();
    pairs.flat_map(|(at, (before, word))| {
        let is_script =
            is_command_option(before) && words.iter().take(at).any(|word| is_shell(word));
        let split: fn(char) -> bool = match is_script {
            true => |c| c.is_whitespace() || BETWEEN.contains(c),
            // Options with a value, and lists of paths.
            false => |c| matches!(c, '=' | ':' | ','),
        };
        let is_option = |part: &&str| part.is_empty() || part.starts_with('-');
        word.split(split).filter(move |part| !is_option(part))
    })
}

/// Whether a script follows: `-c`, also with others before it, as in `-ec`.
fn is_command_option(word: &str) -> bool {
    word.starts_with('-') && !word.starts_with("--") && word.ends_with('c')
}

fn is_shell(word: &str) -> bool {
    let name = word.rsplit('/').next();
    name.is_some_and(|name| SHELLS.contains(&name))
}

/// The container's search path.
fn search(options: &ContainerOptions, image: &ImageConfig) -> Vec<String> {
    let variables = image.env.iter().chain(&options.env).rev();
    let path = variables.into_iter().find_map(|v| v.strip_prefix("PATH="));
    let dirs = path.unwrap_or(PATH_DEFAULT).split(':');
    dirs.map(str::to_owned).collect()
}

/// Where the container's first process begins.
fn cwd(options: &ContainerOptions, image: &ImageConfig) -> String {
    match (&options.cwd, image.working_dir.as_str()) {
        (Some(dir), _) => dir.display().to_string(),
        (None, "") => "/".to_owned(),
        (None, dir) => dir.to_owned(),
    }
}
