//! Tables for people, JSON for programs.
//!
//! Invariant: a result is printed once, whole, to standard output, or the command fails. A
//! closed pipe ends the output quietly, as `head` expects.

use std::io::{self, Write as _};

use serde::Serialize;

use super::OutputFormat;
use crate::{Error, Result};

/// Prints `rows` as JSON, or as a table with `header` and the cells `row` makes of each.
pub(super) fn print_rows<T: Serialize, const N: usize>(
    format: OutputFormat,
    rows: &[T],
    header: [&str; N],
    row: impl Fn(&T) -> [String; N],
) -> Result<()> {
    match format {
        OutputFormat::Json => print_json(&rows),
        OutputFormat::Table => {
            let cells: Vec<[String; N]> = rows.iter().map(row).collect();
            emit(&table(header, &cells))
        }
    }
}

/// Prints one value as JSON.
pub(super) fn print_json<T: Serialize>(value: &T) -> Result<()> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| unwritten(io::Error::other(error)))?;
    text.push('\n');
    emit(&text)
}

/// Prints text as it is.
pub(super) fn emit(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(unwritten(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn unwritten(error: io::Error) -> Error {
    Error::io("write to", "standard output", error)
}

fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: [&str; N]| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 3));
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(header);
    for row in rows {
        line(row.each_ref().map(String::as_str));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            ["a".to_owned(), "22".to_owned()],
            ["long name".to_owned(), String::new()],
        ];
        assert_eq!(
            table(["NAME", "N"], &rows),
            "NAME        N\na           22\nlong name\n"
        );
    }
}
