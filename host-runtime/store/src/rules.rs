//! Facts from outside the inventory that it remembers: the content of the last configuration, which
//! reveals a truncated file, and the libvirt that ran the guests.

use crate::{Store, StoreError};

/// Whitelist keys of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rules {
    /// The configuration has no whitelist keys.
    None,
    /// Rules that give tags and the like; the switch is off.
    Off,
    /// Only what a rule matches is offered.
    On,
}

impl Store {
    /// Keys of the configuration at the last call of [`Store::note_rules`]; `Rules::None` if there
    /// was none.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn rules(&self) -> Result<Rules, StoreError> {
        let sql = "SELECT max(whitelist) FROM compute_nodes WHERE deleted = 0";
        Ok(match self.all(sql, [], |row| row.get::<_, Option<i64>>(0))?.pop().flatten() {
            Some(2) => Rules::On,
            Some(1) => Rules::Off,
            _ => Rules::None,
        })
    }

    /// Remembers what the configuration says. Before the first discovery there is nothing to
    /// remember it with.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn note_rules(&mut self, rules: Rules) -> Result<(), StoreError> {
        let number = match rules {
            Rules::None => 0,
            Rules::Off => 1,
            Rules::On => 2,
        };
        let sql = "SELECT 1 FROM compute_nodes WHERE deleted = 0 AND whitelist IS NOT ?1";
        if self.all(sql, [number], |_| Ok(()))?.is_empty() {
            return Ok(());
        }
        self.write(|tx, _| {
            tx.execute("UPDATE compute_nodes SET whitelist = ?1 WHERE deleted = 0", [number])?;
            Ok(())
        })
    }

    /// The libvirt that ran the guests with devices, as it describes itself.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn libvirt(&self) -> Result<Option<String>, StoreError> {
        let sql = "SELECT max(libvirt) FROM compute_nodes WHERE deleted = 0";
        Ok(self.all(sql, [], |row| row.get::<_, Option<String>>(0))?.pop().flatten())
    }

    /// Remembers which libvirt runs the guests. Before the first discovery there is nothing to
    /// remember it with.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn note_libvirt(&mut self, libvirt: &str) -> Result<(), StoreError> {
        self.write(|tx, _| {
            tx.execute("UPDATE compute_nodes SET libvirt = ?1 WHERE deleted = 0", [libvirt])?;
            Ok(())
        })
    }
}
