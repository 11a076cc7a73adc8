//! What was promised to somebody and is not published yet: devices that this instance counts as
//! taken, each until its token is cancelled, its time is up, or its host says what has become of
//! it. Pure: whoever holds it tells the filter.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use virt_usb_model::DeviceId;

/// Milliseconds of this process's own clock.
pub(super) type Millis = u64;

/// Devices of one host, counted as taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assumed {
    pub host: String,
    pub devices: Vec<DeviceId>,
    #[serde(skip)]
    pub until: Millis,
}

/// All of them, by token.
#[derive(Debug, Default)]
pub(super) struct Assumptions {
    all: BTreeMap<String, Assumed>,
    /// The tokens that concern each host.
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

    /// Ends one; none: there is none of that token.
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

    /// Ends those whose time is up.
    pub(super) fn expire(&mut self, now: Millis) -> Vec<Assumed> {
        let over: Vec<String> = self
            .all
            .iter()
            .filter(|(_, assumed)| assumed.until <= now)
            .map(|(token, _)| token.clone())
            .collect();
        over.iter().filter_map(|token| self.cancel(token)).collect()
    }

    /// Whether anything is assumed of the host.
    pub(super) fn concerns(&self, host: &str) -> bool {
        self.hosts.contains_key(host)
    }

    /// The host has said how its devices are: what it does not offer any more is not assumed any
    /// more, for its own word counts. Returns what is assumed still.
    pub(super) fn published(
        &mut self,
        host: &str,
        is_free: impl Fn(DeviceId) -> bool,
    ) -> Vec<DeviceId> {
        let mut still = Vec::new();
        for token in self.hosts.get(host).cloned().unwrap_or_default() {
            let Some(assumed) = self.all.get_mut(&token) else { continue };
            assumed.devices.retain(|device| is_free(*device));
            still.extend(&assumed.devices);
            if assumed.devices.is_empty() {
                self.cancel(&token);
            }
        }
        still
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
        /// Against a list that is searched through.
        #[test]
        fn what_is_assumed_is_what_nothing_has_ended(steps in prop::collection::vec(step(), 0..40)) {
            let mut tested = Assumptions::default();
            let mut oracle: Vec<(String, String, u64, u64)> = Vec::new();
            for (n, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Add(host, ids, until) => {
                        let (token, host) = (format!("t{n}"), format!("h{host}"));
                        oracle.extend(ids.iter().map(|id| (token.clone(), host.clone(), *id, until)));
                        let devices = ids.into_iter().map(device).collect();
                        tested.add(token, Assumed { host, devices, until });
                    }
                    Step::Cancel(at) => {
                        let token = format!("t{at}");
                        prop_assert_eq!(tested.cancel(&token).is_some(), oracle.iter().any(|one| one.0 == token));
                        oracle.retain(|one| one.0 != token);
                    }
                    Step::Expire(now) => {
                        let ended: usize = tested.expire(now).iter().map(|assumed| assumed.devices.len()).sum();
                        prop_assert_eq!(ended, oracle.iter().filter(|one| one.3 <= now).count());
                        oracle.retain(|one| one.3 > now);
                    }
                    Step::Published(host, free) => {
                        let host = format!("h{host}");
                        oracle.retain(|one| one.1 != host || free.contains(&one.2));
                        let mut still: Vec<u64> =
                            tested.published(&host, |id| free.contains(&id.get())).iter().map(|id| id.get()).collect();
                        let mut expected: Vec<u64> =
                            oracle.iter().filter(|one| one.1 == host).map(|one| one.2).collect();
                        still.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(still, expected);
                    }
                }
                let left: usize = tested.all().values().map(|assumed| assumed.devices.len()).sum();
                prop_assert_eq!(left, oracle.len());
                for host in ["h0", "h1", "h2"] {
                    prop_assert_eq!(tested.concerns(host), oracle.iter().any(|one| one.1 == host));
                }
            }
        }
    }
}
