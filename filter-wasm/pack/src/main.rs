//! The last step of `filter-wasm/build`: makes a component from a module, and refuses files with
//! imports.
//!
//! ```text
//! virt-usb-filter-pack component MODULE OUT    make a component, then check it
//! virt-usb-filter-pack module MODULE OUT       check only
//! ```
//! A filter with imports could act on its host, so a scheduler would have to trust it.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use wasmparser::{Encoding, Parser, Payload, Validator, WasmFeatures};
use wit_component::ComponentEncoder;

/// All features of wasmparser, except those whose results depend on the machine.
fn features() -> WasmFeatures {
    WasmFeatures::default().difference(WasmFeatures::RELAXED_SIMD)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["component", from, to] => pack(from, to, component),
        ["module", from, to] => pack(from, to, |module| Ok(module.to_vec())),
        _ => Err(anyhow::anyhow!("usage: virt-usb-filter-pack component|module MODULE OUT")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            use std::io::Write;
            drop(writeln!(std::io::stderr(), "virt-usb-filter-pack: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

fn pack(from: &str, to: &str, make: fn(&[u8]) -> Result<Vec<u8>>) -> Result<()> {
    let module = std::fs::read(from).with_context(|| format!("cannot read {from}"))?;
    let packed = make(&module).with_context(|| format!("cannot pack {from}"))?;
    check(&packed).with_context(|| format!("{from} is not packed"))?;
    // Write to a second file and rename it, so that a concurrent reader gets the old or the new
    // file.
    let beside = Path::new(to).with_extension("part");
    std::fs::write(&beside, packed)
        .with_context(|| format!("cannot write {}", beside.display()))?;
    std::fs::rename(&beside, to)
        .with_context(|| format!("cannot move {} to {to}", beside.display()))
}

fn component(module: &[u8]) -> Result<Vec<u8>> {
    ComponentEncoder::default().validate(true).module(module)?.encode()
}

/// Checks that a module or component is valid, and imports nothing.
///
/// # Errors
/// If it imports anything, is not valid WebAssembly, or uses features whose results depend on the
/// machine.
fn check(wasm: &[u8]) -> Result<()> {
    Validator::new_with_features(features()).validate_all(wasm).context("it is not valid")?;
    let mut found = Vec::new();
    // Modules inside a component import from the component itself. Only the outermost level counts.
    let mut outer = None;
    let mut depth = 0usize;
    for payload in Parser::new(0).parse_all(wasm) {
        match payload? {
            Payload::Version { encoding, .. } => {
                depth += 1;
                outer.get_or_insert(encoding);
            }
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ImportSection(section) if depth == 1 => {
                for import in section.into_imports() {
                    let import = import?;
                    found.push(format!("{}.{}", import.module, import.name));
                }
            }
            Payload::ComponentImportSection(section) if depth == 1 => {
                for import in section {
                    found.push(import?.name.name.to_owned());
                }
            }
            _ => {}
        }
    }
    if outer.is_none() || !matches!(outer, Some(Encoding::Module | Encoding::Component)) {
        bail!("it is neither a module nor a component");
    }
    if !found.is_empty() {
        bail!(
            "it imports {}: a filter must import nothing, so that it need not be trusted",
            found.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wat: &str) -> Result<(), String> {
        super::check(&wat::parse_str(wat).unwrap()).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn imports_are_refused() {
        assert_eq!(check("(module)"), Ok(()));
        assert_eq!(check("(component)"), Ok(()));
        let error = check(r#"(module (import "env" "now" (func)))"#).unwrap_err();
        assert!(error.contains("it imports env.now"), "{error}");
        let error =
            check(r#"(component (import "wasi:clocks/wall-clock" (instance)))"#).unwrap_err();
        assert!(error.contains("it imports wasi:clocks/wall-clock"), "{error}");
    }

    #[test]
    fn a_module_may_import_from_its_own_component() {
        let inner = r#"(component
            (core module $a (func (export "f")))
            (core module $b (import "a" "f" (func)))
            (core instance $a (instantiate $a))
            (core instance (instantiate $b (with "a" (instance $a)))))"#;
        assert_eq!(check(inner), Ok(()));
    }

    #[test]
    fn features_that_depend_on_the_machine_are_refused() {
        let relaxed = r#"(module (func (param v128 v128) (result v128)
            local.get 0 local.get 1 i8x16.relaxed_swizzle))"#;
        assert!(check(relaxed).unwrap_err().contains("not valid"));
    }
}
