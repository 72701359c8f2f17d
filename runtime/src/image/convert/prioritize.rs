//! The file that lists what to put first.
//!
//! Invariant: pure and bounded. Whether a path exists is not known here.

use lazarette_fetcher::{Error, Result};

/// Most paths; beyond it "first" means nothing.
const PATHS_MAX: usize = 100_000;
/// Longest path in bytes: the kernel's PATH_MAX.
const PATH_BYTES_MAX: usize = 4096;

/// Parses a list of paths: one a line, absolute or relative to the root of the image,
/// most urgent first. Empty lines and lines that start with `#` are skipped. `what` names
/// the list in errors.
pub fn parse_prioritized(what: &str, text: &str) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let path = line.trim();
        if path.is_empty() || path.starts_with('#') {
            continue;
        }
        if path.len() > PATH_BYTES_MAX {
            let detail = format!(
                "line {} has {} bytes, at most {PATH_BYTES_MAX}",
                number + 1,
                path.len()
            );
            return Err(Error::limit(what, detail));
        }
        if paths.len() == PATHS_MAX {
            return Err(Error::limit(what, format!("more than {PATHS_MAX} paths")));
        }
        paths.push(path.to_owned());
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_comments_and_keeps_order() {
        let text = "# start\n/b\r\n\n  a/c d \n./e#1\n";
        assert_eq!(
            parse_prioritized("list", text).unwrap(),
            ["/b", "a/c d", "./e#1"]
        );
    }

    #[test]
    fn has_limits() {
        let long = "x".repeat(PATH_BYTES_MAX + 1);
        let many = "x\n".repeat(PATHS_MAX + 1);
        for text in [long, many] {
            let refused = parse_prioritized("list", &text).unwrap_err();
            assert!(matches!(refused, Error::Limit { .. }));
        }
    }
}
