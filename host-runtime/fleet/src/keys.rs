//! What stands where in etcd. All keys begin with the configured prefix.
//!
//! | key | holds | who writes it | ends with |
//! |---|---|---|---|
//! | `hosts/NAME` | the host document | that host | its lease |
//! | `servers/NAME` | the host's guests, whose they are and whether they run | that host | its lease |
//! | `requests/NAME/ID` | what the host is to do | the API of another host | its lease: the deadline |
//! | `answers/NAME/ID` | that it has begun, then what came of it | that host | a lease of its own |
//! | `flavors/NAME` | a flavor's JSON | whoever changes one, on any host | its removal |
//! | `grants/NAME` | a grant's JSON | the same | its removal |
//! | `nodes/N` | [`Node`]: which machine and host the number N is | who joins | `fleet leave` |
//! | `names/NAME` | the number of the host of that name | who joins | `fleet leave` |
//! | `machines/ID` | the number of that machine, for good | who joins | never |
//! | `next` | the next number to be given | who joins | never |

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Keys below one prefix.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Below that prefix, which ends with a slash.
    pub const fn new(prefix: String) -> Self {
        Self { prefix }
    }

    /// What the documents' keys begin with.
    pub fn hosts(&self) -> String {
        format!("{}hosts/", self.prefix)
    }

    /// Key of the document of a host.
    pub fn host(&self, name: &str) -> String {
        format!("{}hosts/{name}", self.prefix)
    }

    /// What the numbers' keys begin with.
    pub fn nodes(&self) -> String {
        format!("{}nodes/", self.prefix)
    }

    /// Key of the host with this number.
    pub fn node(&self, node: u64) -> String {
        format!("{}nodes/{node}", self.prefix)
    }

    /// All keys begin so.
    pub fn all(&self) -> &str {
        &self.prefix
    }

    /// Key of the guests of a host.
    pub fn servers(&self, host: &str) -> String {
        format!("{}servers/{host}", self.prefix)
    }

    /// What the requests to a host begin with.
    pub fn requests(&self, host: &str) -> String {
        format!("{}requests/{host}/", self.prefix)
    }

    /// Key of the answer to a request.
    pub fn answer(&self, host: &str, request: &str) -> String {
        format!("{}answers/{host}/{request}", self.prefix)
    }

    /// What the keys of one kind of what is common begin with: `flavors`, `grants`.
    pub fn shared(&self, kind: &str) -> String {
        format!("{}{kind}/", self.prefix)
    }

    /// Key of one flavor or grant.
    pub fn shared_one(&self, kind: &str, name: &str) -> String {
        format!("{}{kind}/{name}", self.prefix)
    }

    /// Key of the number of a host name.
    pub fn name(&self, host: &str) -> String {
        format!("{}names/{host}", self.prefix)
    }

    /// Key of the number of a machine.
    pub fn machine(&self, machine: &str) -> String {
        format!("{}machines/{machine}", self.prefix)
    }

    /// Key of the next number.
    pub fn next_number(&self) -> String {
        format!("{}next", self.prefix)
    }
}

/// Who has a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The machine, as [`machine`] has it.
    pub machine: String,
    /// The host's name.
    pub host: String,
}

impl Node {
    /// As it stands in etcd: whoever publishes compares it byte for byte.
    pub fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A machine's name in the fleet: its machine id is confidential (machine-id(5)), so only a digest
/// of it leaves the host.
pub fn machine(id: &str) -> String {
    let digest = Sha256::new_with_prefix("virt-usb fleet 1\n").chain_update(id.trim()).finalize();
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a host of that name can be in a fleet: its name is a part of keys, and of etcd's roles.
pub fn is_name(host: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=253).contains(&host.len()) && host.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_name_does_not_tell_its_id() {
        let name = machine("0123456789abcdef0123456789abcdef\n");
        assert_eq!(name, machine("0123456789abcdef0123456789abcdef"));
        assert!(name.len() == 32 && name != machine("0123456789abcdef0123456789abcdee"));
        assert!(!name.contains("0123456789abcdef"));
    }

    #[test]
    fn a_name_is_a_part_of_a_key() {
        assert!(is_name("compute-1.example_2"));
        for bad in ["", "a/b", "a b", "é", "a\0"] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }
}
