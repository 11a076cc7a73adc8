//! Loads a filter's file: compiles and checks it, and sets its limits.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use wasmtime::component::{Component, Linker};
use wasmtime::{Config, Engine, Precompiled};

use crate::bindings::FilterPre;
use crate::instance::{Instance, State};
use crate::{Error, Fleet, LoadError, Session};

/// Limits of a filter's resources. Each instance has its own share.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum memory of an instance in bytes. A fleet of 1 million devices needs about 100 MB.
    pub memory: usize,
    /// Minimum processor time of a call. A call is stopped before it has used twice this time.
    /// Processor time of the thread counts, so that a busy machine does not stop a call. Feeding
    /// changes of the fleet takes calls of their own.
    pub epoch: Duration,
}

impl Default for Limits {
    /// Limits of 1 GiB and 250 ms.
    fn default() -> Self {
        Self { memory: 1 << 30, epoch: Duration::from_millis(250) }
    }
}

/// Options for loading a filter.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Limits of the filter's resources.
    pub limits: Limits,
    /// Pinned SHA-256 of the file.
    pub sha256: Option<[u8; 32]>,
}

/// A compiled filter. Clones are cheap; any number of threads may create sessions of it.
#[derive(Clone)]
pub struct Filter {
    loaded: Arc<Loaded>,
}

struct Loaded {
    path: PathBuf,
    sha256: Option<[u8; 32]>,
    limits: Limits,
    component: Component,
    pre: FilterPre<State>,
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filter")
            .field("path", &self.loaded.path)
            .field("sha256", &self.loaded.sha256.as_ref().map(hex))
            .field("limits", &self.loaded.limits)
            .finish_non_exhaustive()
    }
}

impl Filter {
    /// Loads a component, or the machine code that [`Filter::precompile`] has made from one, and
    /// checks that it is a filter.
    ///
    /// # Errors
    /// A [`LoadError`] that names the file and the unmet requirement.
    pub fn load(path: impl AsRef<Path>, options: &Options) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let engine = engine().map_err(|e| LoadError::Engine(cause(&e)))?;
        let read = |source| LoadError::Read { path: path.to_owned(), source };
        let unpinned = options.sha256.is_none();
        let (component, sha256) = match detect(path)? {
            // Mapping the file is faster than reading it.
            Some(Precompiled::Component) if unpinned => (mapped(path, &engine)?, None),
            _ => {
                let bytes = std::fs::read(path).map_err(read)?;
                let found = sha256(&bytes);
                if let Some(wanted) = options.sha256.filter(|wanted| *wanted != found) {
                    let (found, wanted) = (hex(&found), hex(&wanted));
                    return Err(LoadError::Digest { path: path.to_owned(), found, wanted });
                }
                (component(path, &engine, &bytes, unpinned)?, Some(found))
            }
        };
        let kind = component.component_type();
        let imports: Vec<&str> = kind.imports(&engine).map(|(name, _)| name).collect();
        if !imports.is_empty() {
            return Err(LoadError::Imports { path: path.to_owned(), imports: imports.join(", ") });
        }
        let world = |e: wasmtime::Error| LoadError::World { path: path.to_owned(), why: cause(&e) };
        // Nothing is linked, so a filter cannot call anything.
        let pre = Linker::new(&engine).instantiate_pre(&component).map_err(world)?;
        let pre = FilterPre::new(pre).map_err(world)?;
        tick(&engine, options.limits.epoch).map_err(|e| LoadError::Engine(e.to_string()))?;
        let (path, limits) = (path.to_owned(), options.limits);
        Ok(Self { loaded: Arc::new(Loaded { path, sha256, limits, component, pre }) })
    }

    /// Returns the filter as machine code, which loads about 100 times faster. [`Filter::load`]
    /// accepts it only with this version of the library, and on this type of machine.
    ///
    /// # Errors
    /// If the machine code cannot be serialized.
    pub fn precompile(&self) -> Result<Vec<u8>, LoadError> {
        self.loaded.component.serialize().map_err(|e| LoadError::Engine(cause(&e)))
    }

    /// Path of the filter's file.
    pub fn path(&self) -> &Path {
        &self.loaded.path
    }

    /// SHA-256 of the file. `None` for a precompiled filter that was not pinned, because its file
    /// is mapped and not read.
    pub fn sha256(&self) -> Option<[u8; 32]> {
        self.loaded.sha256
    }

    /// Limits of the filter's resources.
    pub fn limits(&self) -> Limits {
        self.loaded.limits
    }

    /// Creates a session that follows `fleet`, for one thread.
    pub fn session(&self, fleet: &Fleet) -> Session {
        Session::new(self.clone(), fleet.clone())
    }

    pub(crate) fn instance(&self) -> Result<Instance, Error> {
        Instance::new(self, &self.loaded.pre)
    }
}

/// Creates wasmtime's engine. A precompiled filter needs the same configuration.
fn engine() -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config.epoch_interruption(true);
    // Results must not depend on the machine.
    config.wasm_relaxed_simd(false);
    #[cfg(feature = "compile")]
    config.cranelift_nan_canonicalization(true);
    Engine::new(&config)
}

#[cfg(feature = "compile")]
fn compile(path: &Path, engine: &Engine, bytes: &[u8]) -> Result<Component, LoadError> {
    // Depending on its features, wasmtime would also accept the text format.
    if !bytes.starts_with(b"\0asm") {
        return Err(invalid(path, "it is not WebAssembly"));
    }
    if bytes.get(4..8) == Some(&[1, 0, 0, 0]) {
        return Err(invalid(
            path,
            "it is a core module, wanted a component, such as virt-usb-filter.wasm",
        ));
    }
    Component::new(engine, bytes).map_err(|e| invalid(path, &cause(&e)))
}

#[cfg(not(feature = "compile"))]
fn compile(path: &Path, _: &Engine, _: &[u8]) -> Result<Component, LoadError> {
    let why = "it is not precompiled, and this program was built without a compiler".to_owned();
    Err(LoadError::Foreign { path: path.to_owned(), why })
}

/// Detects machine code by the file's header.
fn detect(path: &Path) -> Result<Option<Precompiled>, LoadError> {
    let read = |source| LoadError::Read { path: path.to_owned(), source };
    let mut start = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(4).read_to_end(&mut start))
        .map_err(read)?;
    // wasmtime keeps machine code in ELF files.
    match start == b"\x7fELF" {
        true => Engine::detect_precompiled_file(path).map_err(|e| invalid(path, &cause(&e))),
        false => Ok(None),
    }
}

/// Loads a component from the bytes of a file.
fn component(
    path: &Path,
    engine: &Engine,
    bytes: &[u8],
    unpinned: bool,
) -> Result<Component, LoadError> {
    match Engine::detect_precompiled(bytes) {
        None => compile(path, engine, bytes),
        Some(Precompiled::Module) => {
            Err(invalid(path, "it is a precompiled module, wanted a component"))
        }
        // `detect` has not found a precompiled component, so the file was changed since.
        Some(Precompiled::Component) if unpinned => {
            Err(invalid(path, "it was changed while it was read"))
        }
        Some(Precompiled::Component) => pinned(path, engine, bytes),
    }
}

#[allow(unsafe_code, reason = "taking machine code from a file is what wasmtime calls unsafe")]
fn pinned(path: &Path, engine: &Engine, bytes: &[u8]) -> Result<Component, LoadError> {
    // SAFETY: the bytes have the digest that the caller trusts. wasmtime checks its own version and
    // settings.
    unsafe { Component::deserialize(engine, bytes) }.map_err(|e| foreign(path, &e))
}

/// Maps machine code. It is executed unchanged, so its file must be as trustworthy as this program.
#[allow(unsafe_code, reason = "taking machine code from a file is what wasmtime calls unsafe")]
fn mapped(path: &Path, engine: &Engine) -> Result<Component, LoadError> {
    let real = trusted(path)?;
    // SAFETY: only root and this user can write to the file, and they can replace this program as
    // well. wasmtime checks its own version and settings.
    unsafe { Component::deserialize_file(engine, real) }.map_err(|e| foreign(path, &e))
}

fn foreign(path: &Path, e: &wasmtime::Error) -> LoadError {
    LoadError::Foreign { path: path.to_owned(), why: cause(e) }
}

/// Resolves links, and checks that only root and this user can change the file.
fn trusted(path: &Path) -> Result<PathBuf, LoadError> {
    use std::os::unix::fs::MetadataExt;
    let untrusted = |why: String| Err(LoadError::Untrusted { path: path.to_owned(), why });
    let look = |at: &Path| {
        std::fs::metadata(at).map_err(|source| LoadError::Read { path: at.to_owned(), source })
    };
    let me = look(Path::new("/proc/self"))?.uid();
    let real =
        path.canonicalize().map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
    // A user who may write to a folder on the path can replace the file.
    for at in real.ancestors() {
        let seen = look(at)?;
        if seen.uid() != 0 && seen.uid() != me {
            return untrusted(format!("{} belongs to user {}", at.display(), seen.uid()));
        }
        // In a sticky folder, such as /tmp, users cannot replace files of other users.
        let sticky = seen.is_dir() && seen.mode() & 0o1000 != 0;
        if seen.mode() & 0o022 != 0 && !sticky {
            return untrusted(format!(
                "{} can be written to by others (mode {:o})",
                at.display(),
                seen.mode() & 0o7777
            ));
        }
    }
    Ok(real)
}

/// Starts a thread that counts epochs as long as the engine is in use.
fn tick(engine: &Engine, epoch: Duration) -> std::io::Result<()> {
    let weak = engine.weak();
    let count = move || {
        loop {
            std::thread::sleep(epoch);
            match weak.upgrade() {
                Some(engine) => engine.increment_epoch(),
                None => break,
            }
        }
    };
    std::thread::Builder::new().name("virt-usb-epochs".to_owned()).spawn(count).map(drop)
}

fn invalid(path: &Path, why: &str) -> LoadError {
    LoadError::Invalid { path: path.to_owned(), why: why.to_owned() }
}

/// Message of an error with all its causes, in one line.
pub(crate) fn cause(e: &wasmtime::Error) -> String {
    let chain: Vec<String> =
        e.chain().map(|c| c.to_string().lines().collect::<Vec<_>>().join(" ")).collect();
    chain.join(": ")
}

/// Computes the SHA-256 of a file's content, to pin a filter.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Formats a digest in hexadecimal digits.
pub fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
