//! The scheduler's filter as WebAssembly, in two forms of the same engine: a component of the world
//! in `wit/` (feature `component`), and a core module with a small C ABI and without imports
//! (feature `module`), for hosts without support for components. `./build` makes both.

#[cfg(feature = "component")]
mod component;
#[cfg(feature = "module")]
mod module;
