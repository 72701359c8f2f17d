//! Containerd's filter language over records.
//!
//! ```text
//! filter   := selector ("," selector)*            all must match; an empty filter matches
//! selector := path [("==" | "!=" | "~=") value]   without an operator: there is such a field
//! path     := field ("." field)*                  kind, name, parent, labels.KEY
//! field    := quoted | [A-Za-z0-9_]+
//! value    := quoted | anything up to "," or a space
//! quoted   := "..." with Go's escapes; for "~=" also /.../ and |...|
//! ```
//!
//! Pure. Invariant: what does not parse is an error that says where, never a filter that
//! matches something else; lengths, counts and the size of a regular expression are bounded.

mod quote;
#[cfg(test)]
mod tests;

use regex::{Regex, RegexBuilder};

use super::{Kind, Record};
use crate::{Error, Result};

/// Longest filter, bytes: two labels at their limit.
const FILTER_LEN_MAX: usize = 8192;
/// Most filters of one list, and selectors of one filter.
const COUNT_MAX: usize = 64;
/// Largest compiled regular expression, bytes.
const REGEX_BYTES_MAX: usize = 1 << 20;

/// Several filters, one of which must match. None of them matches everything.
#[derive(Debug, Clone)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Reads filters.
    ///
    /// # Errors
    /// `Invalid` with the filter and what is wrong in it.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self> {
        if filters.len() > COUNT_MAX {
            return Err(invalid("", "there are more than 64"));
        }
        let parse = |filter: &S| Parser::new(filter.as_ref()).filter();
        Ok(Self(filters.iter().map(parse).collect::<Result<_>>()?))
    }

    /// Whether one of them matches.
    pub fn matches(&self, record: &Record) -> bool {
        let one = |filter: &Vec<Selector>| filter.iter().all(|selector| selector.matches(record));
        self.0.is_empty() || self.0.iter().any(one)
    }
}

impl Selector {
    /// A field that is not there equals nothing, and so differs from everything.
    fn matches(&self, record: &Record) -> bool {
        let value = field(&self.path, record);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted.as_str()),
            Test::NotEqual(other) => value != Some(other.as_str()),
            Test::Matches(regex) => value.is_some_and(|value| regex.is_match(value)),
        }
    }
}

fn field<'a>(path: &[String], record: &'a Record) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match (first.as_str(), rest) {
        ("kind", []) => Some(match record.kind {
            Kind::Active => "active",
            Kind::View => "view",
            Kind::Committed => "committed",
        }),
        ("name" | "key", []) => Some(&record.key),
        ("parent", []) => Some(record.parent.as_deref().unwrap_or_default()),
        // A key that was not quoted came apart at its dots.
        ("labels", [_, ..]) => record.labels.get(&rest.join(".")).map(String::as_str),
        _ => None,
    }
}

struct Parser<'a> {
    whole: &'a str,
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn new(whole: &'a str) -> Self {
        Self { whole, rest: whole }
    }

    fn filter(mut self) -> Result<Vec<Selector>> {
        let mut selectors = Vec::new();
        if self.whole.is_empty() {
            return Ok(selectors);
        }
        if self.whole.len() > FILTER_LEN_MAX {
            return Err(self.error("it is longer than 8192 bytes"));
        }
        loop {
            if selectors.len() == COUNT_MAX {
                return Err(self.error("it has more than 64 parts"));
            }
            selectors.push(self.selector()?);
            if self.rest.is_empty() {
                return Ok(selectors);
            }
            if !self.eat(",") {
                return Err(self.error("a comma is expected between its parts"));
            }
        }
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.field()?];
        while self.eat(".") {
            path.push(self.field()?);
        }
        let test = if self.eat("==") {
            Test::Equal(self.value(&['"'])?)
        } else if self.eat("!=") {
            Test::NotEqual(self.value(&['"'])?)
        } else if self.eat("~=") {
            Test::Matches(self.regex()?)
        } else {
            Test::Present
        };
        self.space();
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String> {
        self.space();
        if self.rest.starts_with('"') {
            return self.quoted('"');
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        match self.take_while(plain) {
            "" => Err(self.error("a field's name is expected")),
            name => Ok(name.to_owned()),
        }
    }

    fn value(&mut self, quotes: &[char]) -> Result<String> {
        self.space();
        if let Some(quote) = self.rest.chars().next().filter(|c| quotes.contains(c)) {
            return self.quoted(quote);
        }
        if self.rest.starts_with(['"', '/', '|', ',', '=', '!', '~']) || self.rest.is_empty() {
            return Err(self.error("a value is expected after an operator"));
        }
        let plain = |c: char| c != ',' && !c.is_whitespace() && !c.is_control();
        Ok(self.take_while(plain).to_owned())
    }

    fn regex(&mut self) -> Result<Regex> {
        let text = self.value(&['"', '/', '|'])?;
        RegexBuilder::new(&text)
            .size_limit(REGEX_BYTES_MAX)
            .build()
            .map_err(|_| self.error("its regular expression is malformed or too large"))
    }

    fn quoted(&mut self, quote: char) -> Result<String> {
        let (text, rest) = quote::unquote(self.rest, quote)
            .ok_or_else(|| self.error("a quoted text is malformed or has no end"))?;
        self.rest = rest;
        Ok(text)
    }

    fn eat(&mut self, token: &str) -> bool {
        self.space();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn error(&self, detail: &'static str) -> Error {
        invalid(self.whole, detail)
    }
}

fn invalid(filter: &str, detail: &'static str) -> Error {
    Error::Invalid {
        what: "filter",
        input: filter.chars().take(256).collect(),
        detail,
    }
}
