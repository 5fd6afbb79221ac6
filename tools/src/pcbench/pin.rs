//! On which processors to measure.

use std::str::FromStr;

use anyhow::{Context, anyhow, ensure};
use postcopy_tools::machine::{self, Machine};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What `--cpu` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pin {
    /// Those of the RDMA device's NUMA node, where there is such a device and several nodes.
    Auto,
    /// Wherever the system puts us.
    None,
    /// These.
    List(Vec<usize>),
}

impl FromStr for Pin {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "auto" => Self::Auto,
            "none" => Self::None,
            list => Self::List(parse_list(list).with_context(|| {
                format!(
                    "--cpu {list} is no list of processors; write something like 2 or 2,4-6, auto or none"
                )
            })?),
        })
    }
}

/// A list as the kernel writes it: `0-3,8`.
fn parse_list(text: &str) -> anyhow::Result<Vec<usize>> {
    let mut list = Vec::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.trim().parse()?, to.trim().parse()?);
        ensure!(from <= to && to < CpuSet::MAX_CPU, "no such range");
        list.extend(from..=to);
    }
    list.sort_unstable();
    list.dedup();
    Ok(list)
}

impl Pin {
    /// Pins the process before it starts threads, where that is for all of them: `auto`.
    ///
    /// Returns the processors, if any were chosen.
    pub(crate) fn apply_to_all(&self, device: Option<&str>) -> Option<Vec<usize>> {
        if *self != Self::Auto {
            return None;
        }
        let near = near_device(&Machine::here(), device)?;
        pin(&near).ok().map(|()| near)
    }

    /// Pins the calling thread to the processors of a list.
    ///
    /// Errors: a processor that does not exist here or may not be used.
    pub(crate) fn apply(&self) -> anyhow::Result<Option<Vec<usize>>> {
        let Self::List(list) = self else { return Ok(None) };
        pin(list)?;
        Ok(Some(list.clone()))
    }

    /// Checks that every processor of a list may be used.
    ///
    /// Errors: one may not.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let Self::List(list) = self else { return Ok(()) };
        let allowed = sched_getaffinity(None)?;
        match list.iter().find(|cpu| !allowed.is_set(**cpu)) {
            Some(cpu) => {
                let usable =
                    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).map(|cpu| cpu.to_string());
                let usable: Vec<String> = usable.collect();
                Err(anyhow!("--cpu: this process may not use processor {cpu}; it has {}", usable.join(",")))
            }
            None => Ok(()),
        }
    }
}

fn pin(list: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    list.iter().for_each(|cpu| set.set(*cpu));
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on processors {list:?}"))
}

/// The usable processors of the NUMA node of the device (the first one, if none is named).
fn near_device(here: &Machine, device: Option<&str>) -> Option<Vec<usize>> {
    if here.numa_nodes < 2 {
        return None;
    }
    let port = here.rdma.iter().find(|port| device.is_none_or(|device| port.device == device))?;
    let list = machine::file(format!("/sys/devices/system/node/node{}/cpulist", port.numa_node?))?;
    let allowed = sched_getaffinity(None).ok()?;
    let near: Vec<usize> = parse_list(&list).ok()?.into_iter().filter(|cpu| allowed.is_set(*cpu)).collect();
    (!near.is_empty()).then_some(near)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        assert_eq!("2".parse::<Pin>().unwrap(), Pin::List(vec![2]));
        assert_eq!("0,4-6,5".parse::<Pin>().unwrap(), Pin::List(vec![0, 4, 5, 6]));
        for bad in ["", "x", "3-1", "1,", "99999"] {
            assert!(bad.parse::<Pin>().is_err(), "{bad}");
        }
    }
}
