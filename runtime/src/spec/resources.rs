//! Resource limits, as far as this host's controllers can enforce them.

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxPidsBuilder,
    LinuxResources, LinuxResourcesBuilder,
};
use tracing::warn;

use super::{Controllers, Limits, SpecError};

/// Below this a container cannot even start: its init and page tables need it.
const MEMORY_BYTES_MIN: u64 = 6 << 20;
/// The kernel's default bandwidth period; shorter ones cost, longer ones stall.
const CPU_PERIOD_US: u64 = 100_000;
/// The kernel's smallest quota (1 ms per period).
const CPUS_MIN: f64 = 0.01;
/// More CPUs than any kernel supports; keeps the quota far from overflow.
const CPUS_MAX: f64 = 8192.0;

/// The resources section for `limits`. A limit whose controller is missing is dropped
/// with a warning; devices are always closed except the runtime's default set.
pub(super) fn resources(
    limits: &Limits,
    controllers: Controllers,
) -> Result<LinuxResources, SpecError> {
    let close_all = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .access("rwm")
        .build()?;
    let mut resources = LinuxResourcesBuilder::default()
        .devices(vec![close_all])
        .build()?;
    if let Some(bytes) = limits.memory_bytes {
        let limit = memory_limit(bytes)?;
        if controllers.memory {
            let mut memory = LinuxMemoryBuilder::default().limit(limit).build()?;
            // The sum of memory and swap: as much swap again as memory.
            memory.set_swap(controllers.swap.then(|| limit.saturating_mul(2)));
            resources.set_memory(Some(memory));
        } else {
            warn!(
                bytes,
                "memory limit dropped: this host has no memory controller"
            );
        }
    }
    if let Some(cpus) = limits.cpus {
        let quota = cpu_quota(cpus)?;
        if controllers.cpu {
            let cpu = LinuxCpuBuilder::default()
                .quota(quota)
                .period(CPU_PERIOD_US)
                .build()?;
            resources.set_cpu(Some(cpu));
        } else {
            warn!(cpus, "cpu limit dropped: this host has no cpu controller");
        }
    }
    if let Some(pids) = limits.pids {
        let limit = i64::from(pids.get());
        if controllers.pids {
            resources.set_pids(Some(LinuxPidsBuilder::default().limit(limit).build()?));
        } else {
            warn!(
                limit,
                "pids limit dropped: this host has no pids controller"
            );
        }
    }
    Ok(resources)
}

/// Whether there can be such limits.
pub(super) fn check(limits: &Limits) -> Result<(), SpecError> {
    limits.memory_bytes.map(memory_limit).transpose()?;
    limits.cpus.map(cpu_quota).transpose()?;
    Ok(())
}

fn memory_limit(bytes: u64) -> Result<i64, SpecError> {
    let reason = "memory must be at least 6 MiB and fit in 63 bits";
    let limit = i64::try_from(bytes)
        .ok()
        .filter(|_| bytes >= MEMORY_BYTES_MIN);
    limit.ok_or(SpecError::Limit { reason })
}

fn cpu_quota(cpus: f64) -> Result<i64, SpecError> {
    if !(CPUS_MIN..=CPUS_MAX).contains(&cpus) {
        return Err(SpecError::Limit {
            reason: "cpus must be between 0.01 and 8192",
        });
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most 8192 * 100000, checked above"
    )]
    Ok((cpus * 100_000.0).round() as i64)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    const ALL: Controllers = Controllers {
        memory: true,
        swap: true,
        cpu: true,
        pids: true,
    };

    fn limits() -> Limits {
        Limits {
            memory_bytes: Some(64 << 20),
            cpus: Some(1.5),
            pids: NonZeroU32::new(7),
        }
    }

    #[test]
    fn limits_become_resources() {
        check(&limits()).unwrap();
        let resources = resources(&limits(), ALL).unwrap();
        let memory = resources.memory().unwrap();
        assert_eq!(
            (memory.limit(), memory.swap()),
            (Some(64 << 20), Some(128 << 20))
        );
        let cpu = resources.cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(150_000), Some(100_000)));
        assert_eq!(resources.pids().unwrap().limit(), 7);
    }

    #[test]
    fn missing_controllers_drop_limits_but_not_the_device_rule() {
        let resources = resources(&limits(), Controllers::default()).unwrap();
        assert!(resources.memory().is_none());
        assert!(resources.cpu().is_none() && resources.pids().is_none());
        assert_eq!(resources.devices().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn silly_limits_are_refused() {
        for (memory_bytes, cpus) in [
            (Some(1), None),
            (Some(u64::MAX), None),
            (None, Some(0.0)),
            (None, Some(-1.0)),
            (None, Some(f64::NAN)),
            (None, Some(f64::INFINITY)),
        ] {
            let limits = Limits {
                memory_bytes,
                cpus,
                pids: None,
            };
            assert!(resources(&limits, ALL).is_err(), "{limits:?}");
            assert!(check(&limits).is_err(), "{limits:?}");
        }
    }
}
