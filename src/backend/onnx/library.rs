//! `Library`: finds ONNX Runtime's shared library, loads it, and keeps it for the life of the process.
//!
//! ONNX Runtime allows one environment per process and `ort` one library, so every server and test in a process shares
//! what the first one loaded.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use ort::{
    LoadDynamicError,
    environment::{Environment, EnvironmentBuilder, GlobalThreadPoolOptions},
    logging::LogLevel,
};
use parking_lot::Mutex;

use super::threads::PoolThreads;
use crate::error::{Code, Error};

const FILE_NAME: &str = "libonnxruntime.so";

/// Where `make setup` unpacks the library, below the working directory.
const SETUP_DIRECTORY: &str = ".onnxruntime";

const ADVICE: &str = "run `make setup`, or name the library with ORT_DYLIB_PATH or --onnxruntime";

static LOADED: Mutex<Option<Arc<Library>>> = Mutex::new(None);

/// The loaded library, ready to create sessions.
pub struct Library {
    pub environment: Environment,
    pub pool: PoolThreads,
    /// Whether all sessions share one pool of operator threads.
    pub shares_threads: bool,
    pub path: PathBuf,
    pub version: String,
}

/// A place where the library may be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    File(PathBuf),
    Directory(PathBuf),
    /// Whatever the system's loader finds under this name.
    System(&'static str),
}

impl Library {
    /// The process's library, loaded if this is the first call; only then `shared_threads` counts.
    ///
    /// # Errors
    /// `NotReady` when no library can be loaded, naming every file that was tried, or when `explicit` is not the
    /// library that the process has already loaded.
    pub fn open(explicit: Option<&Path>, shared_threads: Option<usize>) -> Result<Arc<Self>, Error> {
        let mut loaded = LOADED.lock();
        let places = match explicit {
            // Made absolute here because `ort` takes a relative path as relative to the binary.
            Some(path) => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
                vec![if path.is_dir() { Place::Directory(path) } else { Place::File(path) }]
            }
            None => default_places(),
        };
        if let Some(library) = &*loaded {
            return match explicit {
                None => Ok(Arc::clone(library)),
                Some(_) => library.check(&places).map(|()| Arc::clone(library)),
            };
        }
        let library = Arc::new(Self::load(&places, shared_threads)?);
        *loaded = Some(Arc::clone(&library));
        Ok(library)
    }

    fn load(places: &[Place], shared_threads: Option<usize>) -> Result<Self, Error> {
        let mut tried = Vec::new();
        for place in places {
            let path = match place.resolve() {
                Ok(path) => path,
                Err(reason) => {
                    tried.push(reason);
                    continue;
                }
            };
            match ort::init_from(&path) {
                Ok(builder) => return Self::start(builder, place, path, shared_threads),
                Err(error) => tried.push(describe(&path, &error)),
            }
        }
        Err(not_found(&tried))
    }

    fn start(
        mut builder: EnvironmentBuilder,
        place: &Place,
        path: PathBuf,
        shared_threads: Option<usize>,
    ) -> Result<Self, Error> {
        let pool = PoolThreads::start()?;
        if let Some(threads) = shared_threads {
            let options = shared_pool(threads, &pool)
                .map_err(|error| Error::invalid(format!("onnxruntime does not take {threads} threads: {error}")))?;
            builder = builder.with_global_thread_pool(options);
        }
        let environment = builder
            .with_name("tidegate")
            .with_telemetry(false)
            .with_logger(Arc::new(log))
            .build()
            .map_err(|error| Error::internal(format!("{}: cannot start onnxruntime: {error}", path.display())))?;
        // `ort` asks for every message and leaves the sieving to the logger; formatting them all is not free.
        environment.set_log_level(LogLevel::Warning);
        let path = match place {
            Place::System(name) => mapped_path(name).unwrap_or(path),
            _ => path,
        };
        let version = version(&path);
        Ok(Self { environment, pool, shares_threads: shared_threads.is_some(), path, version })
    }

    /// Whether the loaded library is the one that `places` asks for.
    fn check(&self, places: &[Place]) -> Result<(), Error> {
        let canonical = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        for place in places {
            let path = place.resolve().map_err(|reason| not_found(&[reason]))?;
            if canonical(&path) != canonical(&self.path) {
                return Err(Error::new(
                    Code::NotReady,
                    format!(
                        "cannot load onnxruntime from {}: this process has already loaded {}",
                        path.display(),
                        self.path.display()
                    ),
                ));
            }
        }
        Ok(())
    }
}

impl Place {
    /// The file to load, or why there is none.
    fn resolve(&self) -> Result<PathBuf, String> {
        match self {
            Place::System(name) => Ok(PathBuf::from(name)),
            Place::File(path) if path.is_file() => Ok(path.clone()),
            Place::File(path) => Err(format!("{}: no such file", path.display())),
            Place::Directory(directory) => newest_in(directory).ok_or_else(|| {
                format!("{}: no such file, nor a {FILE_NAME}.1.* beside it", directory.join(FILE_NAME).display())
            }),
        }
    }
}

fn default_places() -> Vec<Place> {
    let beside_binary = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let setup = std::env::current_dir().ok().map(|directory| directory.join(SETUP_DIRECTORY));
    let directories = beside_binary.into_iter().chain(setup).map(Place::Directory);
    directories.chain([Place::System(FILE_NAME), Place::System("libonnxruntime.so.1")]).collect()
}

/// `libonnxruntime.so` in `directory`, or else the file of that name with the highest 1.x version behind it.
fn newest_in(directory: &Path) -> Option<PathBuf> {
    let plain = directory.join(FILE_NAME);
    if plain.is_file() {
        return Some(plain);
    }
    fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter_map(|path| Some((version_in_name(&path)?, path)))
        .filter(|(version, path)| version.first() == Some(&1) && path.is_file())
        .max()
        .map(|(_, path)| path)
}

/// The numbers behind `libonnxruntime.so.`, most significant first.
fn version_in_name(path: &Path) -> Option<Vec<u64>> {
    let numbers = path.file_name()?.to_str()?.strip_prefix(FILE_NAME)?.strip_prefix('.')?;
    numbers.split('.').map(|number| number.parse().ok()).collect()
}

/// The file that the loader found for `name`, so that operators see which library serves.
fn mapped_path(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])))
        .find_map(|path| path.file_name()?.to_str()?.starts_with(name).then(|| path.to_owned()))
}

/// The library's version, as its file is named or as its symbols are marked; `ort` keeps `GetVersionString` to itself.
fn version(path: &Path) -> String {
    let file = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let named = version_in_name(&file).map(|numbers| numbers.iter().map(u64::to_string).collect::<Vec<_>>().join("."));
    named.or_else(|| version_in_symbols(&fs::read(&file).ok()?)).unwrap_or_else(|| "unknown".to_owned())
}

/// The version behind `VERS_`, the mark that the linker puts on every exported symbol.
fn version_in_symbols(library: &[u8]) -> Option<String> {
    const MARK: &[u8] = b"VERS_1.";
    let start = library.windows(MARK.len()).position(|window| window == MARK)? + b"VERS_".len();
    let version = library[start..].iter().take(16).take_while(|byte| byte.is_ascii_digit() || **byte == b'.');
    Some(version.map(|&byte| char::from(byte)).collect())
}

fn describe(path: &Path, error: &LoadDynamicError) -> String {
    match error {
        LoadDynamicError::Dlopen { error, .. } => format!("{}: {error}", path.display()),
        LoadDynamicError::MissingApi { .. } => format!("{}: not onnxruntime (no OrtGetApiBase)", path.display()),
        LoadDynamicError::BadVersion { version_str, .. } => {
            format!("{}: version {version_str} is older than 1.{}", path.display(), ort::MINOR_VERSION)
        }
        error => format!("{}: {error}", path.display()),
    }
}

fn not_found(tried: &[String]) -> Error {
    Error::new(Code::NotReady, format!("cannot load onnxruntime; tried {}; {ADVICE}", tried.join("; ")))
}

/// Passes ONNX Runtime's messages on to `tracing`.
fn log(level: LogLevel, category: &str, id: &str, location: &str, message: &str) {
    match level {
        LogLevel::Error | LogLevel::Fatal => {
            tracing::error!(target: "onnxruntime", category, session = id, location, "{message}");
        }
        LogLevel::Warning => tracing::warn!(target: "onnxruntime", category, session = id, location, "{message}"),
        LogLevel::Info | LogLevel::Verbose => {
            tracing::trace!(target: "onnxruntime", category, session = id, location, "{message}");
        }
    }
}

/// One pool of operator threads for all sessions.
fn shared_pool(threads: usize, pool: &PoolThreads) -> ort::Result<GlobalThreadPoolOptions> {
    GlobalThreadPoolOptions::default()
        .with_intra_threads(threads)?
        .with_inter_threads(1)?
        .with_spin_control(false)?
        .with_thread_manager(pool.clone())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::backend::onnx::testing;

    /// Set for the child process in which `a_file_that_is_no_library_is_refused` can load afresh.
    const CHILD: &str = "TIDEGATE_TEST_BAD_LIBRARY";

    #[test]
    fn the_newest_library_of_a_directory_is_chosen() {
        let directory = tempfile::tempdir().unwrap();
        let touch = |name: &str| fs::write(directory.path().join(name), "").unwrap();
        assert_eq!(newest_in(directory.path()), None);
        for name in [
            "libonnxruntime.so.1.9.0",
            "libonnxruntime.so.1.31.1",
            "libonnxruntime.so.1.31.0",
            "libonnxruntime.so.2.0.0",
            "libonnxruntime.so.1.99.bak",
            "libonnxruntime_providers_shared.so",
        ] {
            touch(name);
        }
        assert_eq!(newest_in(directory.path()), Some(directory.path().join("libonnxruntime.so.1.31.1")));
        touch("libonnxruntime.so");
        assert_eq!(newest_in(directory.path()), Some(directory.path().join("libonnxruntime.so")));
    }

    #[test]
    fn a_missing_library_says_what_was_tried_and_what_to_do() {
        let error = Library::open(Some(Path::new("/nowhere/lib.so")), None).err().unwrap();
        assert_eq!(error.code, Code::NotReady);
        assert_eq!(
            error.message,
            "cannot load onnxruntime; tried /nowhere/lib.so: no such file; \
             run `make setup`, or name the library with ORT_DYLIB_PATH or --onnxruntime"
        );
        let directory = tempfile::tempdir().unwrap();
        let message = Library::open(Some(directory.path()), None).err().unwrap().message;
        let expected = format!("tried {}/libonnxruntime.so: no such file", directory.path().display());
        assert!(message.contains(&expected), "{message}");
    }

    #[test]
    fn a_file_that_is_no_library_is_refused() {
        if let Some(path) = std::env::var_os(CHILD) {
            let error = Library::open(Some(Path::new(&path)), None).err().unwrap();
            assert_eq!(error.code, Code::NotReady);
            assert!(error.message.contains(&*path.to_string_lossy()), "{error}");
            assert!(error.message.contains("make setup"), "{error}");
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "not a library").unwrap();
        // libc is a library and not ONNX Runtime.
        let libc = mapped_path("libc.so").unwrap();
        for path in [file.path(), &libc] {
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "backend::onnx::library::tests::a_file_that_is_no_library_is_refused", "--nocapture"])
                .env(CHILD, path)
                .output()
                .unwrap();
            assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
            assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"));
        }
    }

    #[test]
    fn the_version_is_read_from_the_symbols_too() {
        assert_eq!(version_in_symbols(b"\0VERS_1.31.1\0OrtGetApiBase").as_deref(), Some("1.31.1"));
        assert_eq!(version_in_symbols(b"\0VERS_"), None);
        let library = fs::read(testing::runtime().path()).unwrap();
        assert_eq!(version_in_symbols(&library).as_deref(), Some(testing::runtime().version()));
    }

    #[test]
    fn one_library_serves_the_process() {
        let runtime = testing::runtime();
        let (path, version) = (runtime.path(), runtime.version());
        assert!(version.starts_with("1."), "{version}");
        assert_eq!(Library::open(Some(path), None).unwrap().path, path);
        assert_eq!(Library::open(None, None).unwrap().path, path);
        let message = Library::open(Some(&mapped_path("libc.so").unwrap()), None).err().unwrap().message;
        assert!(message.contains("already loaded"), "{message}");
    }
}
