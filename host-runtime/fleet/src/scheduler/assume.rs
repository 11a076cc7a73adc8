//! Assumptions: devices that this instance has promised to a caller and counts as taken. An
//! assumption ends when its token is canceled, when it expires, or when its host publishes that the
//! device is no longer free. This module does no IO; the view applies the result to the filter.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use virt_usb_model::DeviceId;

/// Milliseconds of this process's own clock.
pub(super) type Millis = u64;

/// Devices of one host that count as taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assumed {
    pub host: String,
    pub devices: Vec<DeviceId>,
    #[serde(skip)]
    pub until: Millis,
}

/// All assumptions, by token.
#[derive(Debug, Default)]
pub(super) struct Assumptions {
    all: BTreeMap<String, Assumed>,
    /// Tokens of the assumptions about each host.
    hosts: HashMap<String, Vec<String>>,
}

impl Assumptions {
    pub(super) fn add(&mut self, token: String, assumed: Assumed) {
        self.hosts.entry(assumed.host.clone()).or_default().push(token.clone());
        self.all.insert(token, assumed);
    }

    pub(super) fn all(&self) -> &BTreeMap<String, Assumed> {
        &self.all
    }

    /// Ends the assumption with that token. `None` if there is none.
    pub(super) fn cancel(&mut self, token: &str) -> Option<Assumed> {
        let assumed = self.all.remove(token)?;
        if let Some(tokens) = self.hosts.get_mut(&assumed.host) {
            tokens.retain(|other| other != token);
            if tokens.is_empty() {
                self.hosts.remove(&assumed.host);
            }
        }
        Some(assumed)
    }

    /// Ends all assumptions that have expired.
    pub(super) fn expire(&mut self, now: Millis) -> Vec<Assumed> {
        let expired: Vec<String> = self
            .all
            .iter()
            .filter(|(_, assumed)| assumed.until <= now)
            .map(|(token, _)| token.clone())
            .collect();
        expired.iter().filter_map(|token| self.cancel(token)).collect()
    }

    /// Whether there is an assumption about the host.
    pub(super) fn concerns(&self, host: &str) -> bool {
        self.hosts.contains_key(host)
    }

    /// Applies a document that the host has published: a device that is no longer free ends its
    /// assumption. Returns the devices that are still assumed.
    pub(super) fn published(
        &mut self,
        host: &str,
        is_free: impl Fn(DeviceId) -> bool,
    ) -> Vec<DeviceId> {
        let mut remaining = Vec::new();
        for token in self.hosts.get(host).cloned().unwrap_or_default() {
            let Some(assumed) = self.all.get_mut(&token) else { continue };
            assumed.devices.retain(|device| is_free(*device));
            remaining.extend(&assumed.devices);
            if assumed.devices.is_empty() {
                self.cancel(&token);
            }
        }
        remaining
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn device(id: u64) -> DeviceId {
        DeviceId::new(id).unwrap()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(u8, Vec<u64>, u64),
        Cancel(usize),
        Expire(u64),
        Published(u8, BTreeSet<u64>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let ids = || prop::collection::vec(1u64..6, 1..4);
        prop_oneof![
            (0u8..3, ids(), 0u64..20).prop_map(|(host, ids, until)| Step::Add(host, ids, until)),
            (0usize..8).prop_map(Step::Cancel),
            (0u64..20).prop_map(Step::Expire),
            (0u8..3, prop::collection::btree_set(1u64..6, 0..6))
                .prop_map(|(host, free)| Step::Published(host, free)),
        ]
    }

    proptest! {
        /// Compares the index with a plain list.
        #[test]
        fn assumptions_last_until_they_are_ended(steps in prop::collection::vec(step(), 0..40)) {
            let mut tested = Assumptions::default();
            let mut oracle: Vec<(String, String, u64, u64)> = Vec::new();
            for (n, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Add(host, ids, until) => {
                        let (token, host) = (format!("t{n}"), format!("h{host}"));
                        let rows = ids.iter().map(|id| (token.clone(), host.clone(), *id, until));
                        oracle.extend(rows);
                        let devices = ids.into_iter().map(device).collect();
                        tested.add(token, Assumed { host, devices, until });
                    }
                    Step::Cancel(at) => {
                        let token = format!("t{at}");
                        let is_known = oracle.iter().any(|one| one.0 == token);
                        prop_assert_eq!(tested.cancel(&token).is_some(), is_known);
                        oracle.retain(|one| one.0 != token);
                    }
                    Step::Expire(now) => {
                        let ended = tested.expire(now);
                        let ended: usize = ended.iter().map(|assumed| assumed.devices.len()).sum();
                        prop_assert_eq!(ended, oracle.iter().filter(|one| one.3 <= now).count());
                        oracle.retain(|one| one.3 > now);
                    }
                    Step::Published(host, free) => {
                        let host = format!("h{host}");
                        oracle.retain(|one| one.1 != host || free.contains(&one.2));
                        let remaining = tested.published(&host, |id| free.contains(&id.get()));
                        let mut remaining: Vec<u64> = remaining.iter().map(|id| id.get()).collect();
                        let mut expected: Vec<u64> =
                            oracle.iter().filter(|one| one.1 == host).map(|one| one.2).collect();
                        remaining.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(remaining, expected);
                    }
                }
                let left: usize = tested.all().values().map(|assumed| assumed.devices.len()).sum();
                prop_assert_eq!(left, oracle.len());
                for host in ["h0", "h1", "h2"] {
                    let is_known = oracle.iter().any(|one| one.1 == host);
                    prop_assert_eq!(tested.concerns(host), is_known);
                }
            }
        }
    }
}
