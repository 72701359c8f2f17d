//! What runs a script, by its first line.
//!
//! Invariant: pure. Whatever the bytes say, at most two names follow, of at most
//! [`LINE_BYTES_MAX`] bytes. What does not begin with `#!` has none.

/// What the kernel looks at.
const LINE_BYTES_MAX: usize = 256;

/// The interpreter, and what that is told to run if it is `env`.
pub(super) fn programs(head: &[u8]) -> Vec<Vec<u8>> {
    let head = head.get(..LINE_BYTES_MAX).unwrap_or(head);
    let Some(line) = head.strip_prefix(b"#!") else {
        return Vec::new();
    };
    // A line that goes on beyond is cut in a name, and names nothing.
    let line = line.split(|byte| matches!(byte, b'\n' | 0)).next();
    let words = line.unwrap_or_default().split(u8::is_ascii_whitespace);
    let mut words = words.filter(|word| !word.is_empty());
    let Some(interpreter) = words.next() else {
        return Vec::new();
    };
    let is_option = |word: &&[u8]| word.starts_with(b"-") || word.contains(&b'=');
    let named = match interpreter.rsplit(|byte| *byte == b'/').next() {
        Some(b"env") => words.find(|word| !is_option(word)),
        _ => None,
    };
    let names = [Some(interpreter), named].into_iter().flatten();
    names.map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_lines_are_read_as_the_kernel_does() {
        let of = |text: &str| {
            let names = programs(text.as_bytes()).into_iter();
            let names: Vec<String> = names.map(|n| String::from_utf8(n).unwrap()).collect();
            names.join(" ")
        };
        assert_eq!(of("#!/bin/sh\necho"), "/bin/sh");
        assert_eq!(of("#! /bin/bash -e\n"), "/bin/bash");
        assert_eq!(of("#!/usr/bin/env python3\n"), "/usr/bin/env python3");
        assert_eq!(of("#!/usr/bin/env -S A=b node -x\n"), "/usr/bin/env node");
        assert_eq!(of("#!/usr/bin/env"), "/usr/bin/env");
        for none in ["", "#", "#!", "#!\n/bin/sh", "#!  \n", " #!/bin/sh", "text"] {
            assert_eq!(of(none), "", "{none:?}");
        }
        let long = format!("#!/{}", "x".repeat(4096));
        assert!(of(&long).len() < LINE_BYTES_MAX);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_give_an_answer(rest: Vec<u8>) {
            let names = programs(&[b"#!".as_slice(), &rest].concat());
            assert!(names.len() <= 2);
            assert!(names.iter().all(|name| name.len() < LINE_BYTES_MAX && !name.is_empty()));
        }
    }
}
