//! The scheduler's filter as WebAssembly, in two forms from the same engine: a component of the
//! world in `wit/` (feature `component`), and a core module with a small C ABI and no import at all
//! (feature `module`), for hosts that know no components. `./build` makes both.

#[cfg(feature = "component")]
mod component;
#[cfg(feature = "module")]
mod module;
