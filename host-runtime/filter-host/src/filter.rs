//! A filter's file, loaded: compiled, checked, and with its limits.

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
    /// The most memory of an instance, in bytes. A fleet of 1 million devices takes some 100 MB.
    pub memory: usize,
    /// A call may compute for one epoch, and is stopped before it has computed for two: processor
    /// time of its thread, so that a busy machine stops no call. The first call after a change of
    /// the fleet feeds the instance in several calls, each with a time of its own.
    pub epoch: Duration,
}

impl Default for Limits {
    /// 1 GiB, and 250 ms.
    fn default() -> Self {
        Self { memory: 1 << 30, epoch: Duration::from_millis(250) }
    }
}

/// How a filter is loaded.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Limits of the filter's resources.
    pub limits: Limits,
    /// The SHA-256 that the file must have.
    pub sha256: Option<[u8; 32]>,
}

/// A filter, compiled. Cheap to clone; any number of threads may make sessions of it.
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
    /// Loads a component, or one that [`Filter::precompile`] has made of it, and checks that it is
    /// a filter.
    ///
    /// # Errors
    /// Each [`LoadError`] names the file and the requirement that it does not meet.
    pub fn load(path: impl AsRef<Path>, options: &Options) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let engine = engine().map_err(|e| LoadError::Engine(cause(&e)))?;
        let read = |source| LoadError::Read { path: path.to_owned(), source };
        let unpinned = options.sha256.is_none();
        let (component, sha256) = match detect(path)? {
            // Mapped and not read: that is what makes it quick.
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
        // Nothing is linked: there is nothing that a filter could call.
        let pre = Linker::new(&engine).instantiate_pre(&component).map_err(world)?;
        let pre = FilterPre::new(pre).map_err(world)?;
        tick(&engine, options.limits.epoch).map_err(|e| LoadError::Engine(e.to_string()))?;
        let (path, limits) = (path.to_owned(), options.limits);
        Ok(Self { loaded: Arc::new(Loaded { path, sha256, limits, component, pre }) })
    }

    /// The filter as machine code: for [`Filter::load`] of this very version of the library, on
    /// this kind of machine. Loading it takes a hundredth of the time.
    ///
    /// # Errors
    /// If it cannot be serialised.
    pub fn precompile(&self) -> Result<Vec<u8>, LoadError> {
        self.loaded.component.serialize().map_err(|e| LoadError::Engine(cause(&e)))
    }

    /// The file that it was loaded from.
    pub fn path(&self) -> &Path {
        &self.loaded.path
    }

    /// The file's SHA-256; none of a precompiled one that was not pinned, which is not read as a
    /// whole.
    pub fn sha256(&self) -> Option<[u8; 32]> {
        self.loaded.sha256
    }

    /// Limits of the filter's resources.
    pub fn limits(&self) -> Limits {
        self.loaded.limits
    }

    /// A session for one thread, which knows the fleet.
    pub fn session(&self, fleet: &Fleet) -> Session {
        Session::new(self.clone(), fleet.clone())
    }

    pub(crate) fn instance(&self) -> Result<Instance, Error> {
        Instance::new(self, &self.loaded.pre)
    }
}

/// How wasmtime is set up; a precompiled filter fits no other.
fn engine() -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config.epoch_interruption(true);
    // The same answer on every machine.
    config.wasm_relaxed_simd(false);
    #[cfg(feature = "compile")]
    config.cranelift_nan_canonicalization(true);
    Engine::new(&config)
}

#[cfg(feature = "compile")]
fn compile(path: &Path, engine: &Engine, bytes: &[u8]) -> Result<Component, LoadError> {
    // wasmtime would take text as well, were it built so.
    if !bytes.starts_with(b"\0asm") {
        return Err(invalid(path, "it is not WebAssembly"));
    }
    if bytes.get(4..8) == Some(&[1, 0, 0, 0]) {
        return Err(invalid(
            path,
            "it is a core module, wanted a component: the file beside it, perhaps",
        ));
    }
    Component::new(engine, bytes).map_err(|e| invalid(path, &cause(&e)))
}

#[cfg(not(feature = "compile"))]
fn compile(path: &Path, _: &Engine, _: &[u8]) -> Result<Component, LoadError> {
    let why = "it is not precompiled, and this program was built without a compiler".to_owned();
    Err(LoadError::Foreign { path: path.to_owned(), why })
}

/// Whether the file is machine code, by its header.
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

/// Determines what the bytes of the file are.
fn component(
    path: &Path,
    engine: &Engine,
    bytes: &[u8],
    unpinned: bool,
) -> Result<Component, LoadError> {
    match Engine::detect_precompiled(bytes) {
        None => compile(path, engine, bytes),
        Some(Precompiled::Module) => {
            Err(invalid(path, "it is a precompiled module, and no component"))
        }
        // It was none when it was looked at before.
        Some(Precompiled::Component) if unpinned => {
            Err(invalid(path, "it changes while it is read"))
        }
        Some(Precompiled::Component) => pinned(path, engine, bytes),
    }
}

#[allow(unsafe_code, reason = "taking machine code from a file is what wasmtime calls unsafe")]
fn pinned(path: &Path, engine: &Engine, bytes: &[u8]) -> Result<Component, LoadError> {
    // SAFETY: these very bytes have the digest that the caller trusts. wasmtime itself checks its
    // version and settings.
    unsafe { Component::deserialize(engine, bytes) }.map_err(|e| foreign(path, &e))
}

/// Machine code is executed unchanged, so its file must be as trustworthy as the program's own.
#[allow(unsafe_code, reason = "taking machine code from a file is what wasmtime calls unsafe")]
fn mapped(path: &Path, engine: &Engine) -> Result<Component, LoadError> {
    let real = trusted(path)?;
    // SAFETY: only root and this user can have written the file or can change it now, and they can
    // replace this program as well. wasmtime itself checks its version and settings.
    unsafe { Component::deserialize_file(engine, real) }.map_err(|e| foreign(path, &e))
}

fn foreign(path: &Path, e: &wasmtime::Error) -> LoadError {
    LoadError::Foreign { path: path.to_owned(), why: cause(e) }
}

/// The file itself, whatever links lead to it.
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

/// Counts epochs for as long as anybody uses the engine.
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

/// The whole chain in one line.
pub(crate) fn cause(e: &wasmtime::Error) -> String {
    let chain: Vec<String> =
        e.chain().map(|c| c.to_string().lines().collect::<Vec<_>>().join(" ")).collect();
    chain.join(": ")
}

/// The SHA-256 of bytes, to pin a filter by.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// A digest in hexadecimal digits.
pub fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
