//! Layout of the keys in etcd. All keys begin with the configured prefix.
//!
//! | key | value | written by | removed by |
//! |---|---|---|---|
//! | `hosts/NAME` | the host document | that host | its lease |
//! | `servers/NAME` | the host's guests with owner and run state | that host | its lease |
//! | `requests/NAME/ID` | a request to the host | the API of another host | its lease (deadline) |
//! | `answers/NAME/ID` | "begun", then the result | that host | a lease of its own |
//! | `flavors/NAME` | a flavor's JSON | any host | any host |
//! | `grants/NAME` | a grant's JSON | any host | any host |
//! | `nodes/N` | [`Node`]: the machine and host with number N | `fleet join` | `fleet leave` |
//! | `names/NAME` | the number of the host with that name | `fleet join` | `fleet leave` |
//! | `machines/ID` | the permanent number of that machine | `fleet join` | never |
//! | `next` | the next free number | `fleet join` | never |

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Names of the keys below one prefix.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Creates the names below `prefix`, which ends with a slash.
    pub const fn new(prefix: String) -> Self {
        Self { prefix }
    }

    /// Prefix of the keys of all host documents.
    pub fn hosts(&self) -> String {
        format!("{}hosts/", self.prefix)
    }

    /// Key of the document of a host.
    pub fn host(&self, name: &str) -> String {
        format!("{}hosts/{name}", self.prefix)
    }

    /// Prefix of the keys of all numbers.
    pub fn nodes(&self) -> String {
        format!("{}nodes/", self.prefix)
    }

    /// Key of the host with this number.
    pub fn node(&self, node: u64) -> String {
        format!("{}nodes/{node}", self.prefix)
    }

    /// Prefix of all keys.
    pub fn all(&self) -> &str {
        &self.prefix
    }

    /// Key of the guests of a host.
    pub fn servers(&self, host: &str) -> String {
        format!("{}servers/{host}", self.prefix)
    }

    /// Prefix of the keys of all requests to a host.
    pub fn requests(&self, host: &str) -> String {
        format!("{}requests/{host}/", self.prefix)
    }

    /// Key of the answer to a request.
    pub fn answer(&self, host: &str, request: &str) -> String {
        format!("{}answers/{host}/{request}", self.prefix)
    }

    /// Prefix of the keys of one shared kind, `flavors` or `grants`.
    pub fn shared(&self, kind: &str) -> String {
        format!("{}{kind}/", self.prefix)
    }

    /// Key of a shared flavor or grant.
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

/// The machine and host that have a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The machine's name in the fleet; see [`machine`].
    pub machine: String,
    /// Name of the host.
    pub host: String,
}

impl Node {
    /// The value as stored in etcd. The publisher compares it byte for byte.
    pub fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A machine's name in the fleet: a digest of its machine id. The id itself is confidential
/// (machine-id(5)) and does not leave the host.
pub fn machine(id: &str) -> String {
    let digest = Sha256::new_with_prefix("virt-usb fleet 1\n").chain_update(id.trim()).finalize();
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a host with this name can join a fleet. The name becomes part of keys and of etcd roles.
pub fn is_name(host: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=253).contains(&host.len()) && host.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_name_does_not_reveal_its_id() {
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
