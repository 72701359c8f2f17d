//! The default system call filter, compiled while an executor host waits for its container.
//!
//! libcontainer has it compiled in the container's init, where somebody waits: milliseconds, half of what
//! a container takes to be made. A document with another filter, or none, is what it is: what was
//! compiled is loaded for the very filter it was compiled for.

use libcontainer::seccomp::initialize_seccomp;
use libseccomp::Program;

use crate::spec;

/// Compiles the default filter for this process and those it forks; `None` if that fails, which shows
/// when a container asks for it.
pub(super) fn prepare() -> Option<Program> {
    let profile = spec::default_filter().ok()?;
    libseccomp::prepare(|| drop(initialize_seccomp(&profile)))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxSeccomp;

    use super::*;

    #[test]
    fn a_documents_filter_is_the_one_that_was_compiled() {
        let program = prepare().unwrap();
        assert!(!program.instructions().is_empty());
        let text = serde_json::to_string(&spec::default_filter().unwrap()).unwrap();
        let read: LinuxSeccomp = serde_json::from_str(&text).unwrap();
        let again = libseccomp::prepare(|| drop(initialize_seccomp(&read)));
        assert_eq!(again, Some(program));
    }
}
