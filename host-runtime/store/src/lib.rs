//! x
/// The database's name inside `state_dir`.
pub const FILE_NAME: &str = "inventory.sqlite";
