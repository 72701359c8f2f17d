//! A filter as it was asked for, and the program that it becomes.

use std::cell::{Cell, RefCell};
use std::os::fd::RawFd;

use crate::ask::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpSyscall};
use crate::error::SeccompError;
use crate::{newer, sys};

type Result<T> = std::result::Result<T, SeccompError>;

/// Flags of seccomp(2) that a filter is loaded with.
const TSYNC: u32 = 1;
const LOG: u32 = 1 << 1;
const SPEC_ALLOW: u32 = 1 << 2;
const NEW_LISTENER: u32 = 1 << 3;
const TSYNC_ESRCH: u32 = 1 << 4;
const WAIT_KILLABLE_RECV: u32 = 1 << 5;

/// Everything that a filter is asked to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    /// What becomes of a system call that no rule is for.
    pub(crate) default: ScmpAction,
    /// Beside the native one.
    pub(crate) architectures: Vec<ScmpArch>,
    pub(crate) rules: Vec<Rule>,
    flags: u32,
}

/// What becomes of a system call whose arguments meet every condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) action: ScmpAction,
    pub(crate) syscall: ScmpSyscall,
    pub(crate) conditions: Vec<ScmpArgCompare>,
}

impl Filter {
    fn compile(&self) -> Result<Program> {
        let mut program = Vec::new();
        if newer::is_told_apart(self.default) {
            program = newer::refuse(&sys::last_numbers(self));
        }
        program.extend(sys::compile(self)?);
        Ok(Program(program))
    }

    /// The flags to load it with: the kernel wants to be told of a filter that notifies.
    fn load_flags(&self) -> u32 {
        let notifies = self
            .rules
            .iter()
            .any(|rule| rule.action == ScmpAction::Notify);
        match (notifies, self.flags & TSYNC != 0) {
            (false, _) => self.flags,
            (true, false) => self.flags | NEW_LISTENER,
            (true, true) => self.flags | NEW_LISTENER | TSYNC_ESRCH,
        }
    }
}

/// What the kernel runs: instructions of 8 bytes each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program(pub(crate) Vec<u8>);

impl Program {
    /// The instructions, as `struct sock_filter` of linux/filter.h in this machine's byte order.
    #[must_use]
    pub fn instructions(&self) -> &[u8] {
        &self.0
    }
}

/// Whether loading is for later, and what was made for then.
enum Prepared {
    Nothing,
    Wanted,
    Ready(Filter, Program),
}

thread_local! {
    /// A process that is forked has what the forking thread had.
    static PREPARED: RefCell<Prepared> = const { RefCell::new(Prepared::Nothing) };
}

/// Runs `ask`, which builds a filter and loads it on this thread, with the difference that it is not
/// loaded: its program is kept, for when the same filter is loaded by this thread or by that of a
/// process which this one forks. That program; `None` if none was asked for, or none could be made.
///
/// One is kept, the last. It costs what loading would have, and makes that one quick.
pub fn prepare(ask: impl FnOnce()) -> Option<Program> {
    let wanting = Wanting::begin();
    ask();
    drop(wanting);
    PREPARED.with_borrow(|prepared| match prepared {
        Prepared::Ready(_, program) => Some(program.clone()),
        Prepared::Nothing | Prepared::Wanted => None,
    })
}

/// Ends with [`prepare`], however that ends: later, whoever loads a filter means it.
struct Wanting;

impl Wanting {
    fn begin() -> Self {
        PREPARED.set(Prepared::Wanted);
        Self
    }
}

impl Drop for Wanting {
    fn drop(&mut self) {
        PREPARED.with_borrow_mut(|prepared| {
            if matches!(prepared, Prepared::Wanted) {
                *prepared = Prepared::Nothing;
            }
        });
    }
}

/// A filter that is being asked for.
#[derive(Debug)]
pub struct ScmpFilterContext {
    filter: Filter,
    notify: Cell<Option<RawFd>>,
}

impl ScmpFilterContext {
    /// A filter without a rule, for the native architecture.
    ///
    /// # Errors
    /// None; libseccomp answers when all is asked for, in [`ScmpFilterContext::load`].
    pub fn new(default: ScmpAction) -> Result<Self> {
        let filter = Filter {
            default,
            architectures: Vec::new(),
            rules: Vec::new(),
            flags: 0,
        };
        Ok(Self {
            filter,
            notify: Cell::new(None),
        })
    }

    /// Adds an architecture, which may be there.
    ///
    /// # Errors
    /// None, as for all that is asked for.
    pub fn add_arch(&mut self, arch: ScmpArch) -> Result<&mut Self> {
        self.filter.architectures.push(arch);
        Ok(self)
    }

    /// Adds a rule for all calls of `syscall`.
    ///
    /// # Errors
    /// None, as for all that is asked for.
    pub fn add_rule(&mut self, action: ScmpAction, syscall: ScmpSyscall) -> Result<&mut Self> {
        self.add_rule_conditional(action, syscall, &[])
    }

    /// Adds a rule for calls of `syscall` that meet all `conditions`.
    ///
    /// # Errors
    /// None, as for all that is asked for.
    pub fn add_rule_conditional(
        &mut self,
        action: ScmpAction,
        syscall: ScmpSyscall,
        conditions: &[ScmpArgCompare],
    ) -> Result<&mut Self> {
        self.filter.rules.push(Rule {
            action,
            syscall,
            conditions: conditions.to_vec(),
        });
        Ok(self)
    }

    /// Whether all actions but allowing are logged.
    ///
    /// # Errors
    /// None, as for all that is asked for.
    pub fn set_ctl_log(&mut self, on: bool) -> Result<&mut Self> {
        self.flag(LOG, on)
    }

    /// Whether every thread of the process gets the filter.
    ///
    /// # Errors
    /// None, as for all that is asked for.
    pub fn set_ctl_tsync(&mut self, on: bool) -> Result<&mut Self> {
        self.flag(TSYNC, on)
    }

    /// Whether the mitigation of speculative store bypass is left off.
    ///
    /// # Errors
    /// None, as for all that is asked for.
    pub fn set_ctl_ssb(&mut self, on: bool) -> Result<&mut Self> {
        self.flag(SPEC_ALLOW, on)
    }

    /// Whether a call that waits for a supervisor can be killed only.
    ///
    /// # Errors
    /// None, as for all that is asked for.
    pub fn set_ctl_waitkill(&mut self, on: bool) -> Result<&mut Self> {
        self.flag(WAIT_KILLABLE_RECV, on)
    }

    /// Whether loading sets `no_new_privs` first. It never does here: who wants it has set it.
    ///
    /// # Errors
    /// If it is asked to.
    pub fn set_ctl_nnp(&mut self, on: bool) -> Result<&mut Self> {
        if on {
            let source = std::io::Error::from(std::io::ErrorKind::Unsupported);
            return Err(SeccompError::new("set no_new_privs with a filter", source));
        }
        Ok(self)
    }

    fn flag(&mut self, flag: u32, on: bool) -> Result<&mut Self> {
        if on {
            self.filter.flags |= flag;
        } else {
            self.filter.flags &= !flag;
        }
        Ok(self)
    }

    /// Puts the filter on this thread, for good; or keeps its program, below [`prepare`].
    ///
    /// # Errors
    /// If libseccomp cannot make a program of what was asked for, or the kernel refuses it.
    pub fn load(&self) -> Result<()> {
        PREPARED.with_borrow_mut(|prepared| match prepared {
            Prepared::Ready(filter, program) if *filter == self.filter => self.install(program),
            Prepared::Ready(..) | Prepared::Nothing => self.install(&self.filter.compile()?),
            Prepared::Wanted => {
                *prepared = Prepared::Ready(self.filter.clone(), self.filter.compile()?);
                Ok(())
            }
        })
    }

    fn install(&self, program: &Program) -> Result<()> {
        self.notify
            .set(sys::install(program, self.filter.load_flags())?);
        Ok(())
    }

    /// The descriptor that a supervisor reads, of a filter that is loaded and notifies. It is the
    /// caller's.
    ///
    /// # Errors
    /// If there is none.
    pub fn get_notify_fd(&self) -> Result<RawFd> {
        self.notify.take().ok_or_else(|| {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            SeccompError::new("get a descriptor for notifications", source)
        })
    }
}
