//! Processes under measurement: started on one core, listened to, and ended whatever happens.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{machine::on_cores, stub::Stub};

const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Of the log, this much is shown when a process does not start.
const TAIL: usize = 2000;
/// With this line the server has said what there is to say, and so has the echo.
const LAST_LINE: &str = "  try ";

/// In a process's folder.
const LOG: &str = "log";

static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Where the programs and files are that are measured.
#[derive(Clone)]
pub struct Programs {
    /// The release binary.
    pub server: PathBuf,
    /// The ONNX Runtime library, or its folder.
    pub onnxruntime: PathBuf,
    /// The core that everything measured runs on.
    pub core: usize,
    /// The core that the generator runs on.
    pub generator: usize,
    /// Whether what is measured may use both.
    pub both: bool,
}

/// A server, ours or the echo, until this is dropped.
pub struct Process {
    running: Running,
    lines: Lines,
    pub rest: SocketAddr,
    pub grpc: SocketAddr,
    /// Only of the server.
    pub ops: SocketAddr,
    /// From before it was started to its saying that it is ready.
    pub ready_after: Duration,
    home: TempDir,
}

/// A child that does not outlive this.
struct Running(Child);

type Lines = Receiver<(Instant, String)>;

impl Programs {
    /// Starts `tidegate serve` with a folder of models.
    ///
    /// # Errors
    /// When it is not ready within a minute with every model; the message has the end of its log.
    pub fn serve(&self, models: &Path) -> Result<Process> {
        self.serve_with(models, &[])
    }

    /// The same programs on two cores.
    pub fn on_both(&self) -> Self {
        Self { both: true, ..self.clone() }
    }

    /// Starts `tidegate serve` with more flags.
    ///
    /// # Errors
    /// As `serve`.
    pub fn serve_with(&self, models: &Path, flags: &[&str]) -> Result<Process> {
        let home = tempfile::tempdir()?;
        let mut command = Command::new(&self.server);
        command.arg("serve").arg("--models").arg(models).arg("--data").arg(home.path().join("data"));
        for port in ["--rest", "--grpc", "--ops"] {
            command.args([port, "127.0.0.1:0"]);
        }
        command.args(flags);
        self.start(command, home)
    }

    /// Starts the echo.
    ///
    /// # Errors
    /// As `serve`.
    pub fn echo(&self) -> Result<Process> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("echo");
        self.start(command, tempfile::tempdir()?)
    }

    /// Starts the server with a stub for a model.
    ///
    /// # Errors
    /// As `serve`.
    pub fn stub(&self, stub: &Stub) -> Result<Process> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(stub.arguments());
        self.start(command, tempfile::tempdir()?)
    }

    /// Seconds that a process of its own takes to load the library and one session of the model in `files`.
    ///
    /// # Errors
    /// When it fails.
    pub fn session_load(&self, files: &Path) -> Result<f64> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("load").arg(files);
        let home = tempfile::tempdir()?;
        command.env("ORT_DYLIB_PATH", &self.onnxruntime);
        let (_running, lines) = spawn(&mut command, &self.cores(), home.path())?;
        let line = lines.recv_timeout(START_TIMEOUT).map(|(_, line)| line);
        let seconds = line.ok().and_then(|line| line.parse().ok());
        seconds.with_context(|| format!("a process of its own did not load {}: {}", files.display(), tail(home.path())))
    }

    fn cores(&self) -> Vec<usize> {
        if self.both { vec![self.core, self.generator] } else { vec![self.core] }
    }

    fn start(&self, mut command: Command, home: TempDir) -> Result<Process> {
        command.env("ORT_DYLIB_PATH", &self.onnxruntime);
        start(command, &self.cores(), home)
    }
}

/// Starts a server on `cores`, with `home` as its folder.
///
/// # Errors
/// When it is not ready within a minute with every model; the message has the end of its log.
pub fn start(mut command: Command, cores: &[usize], home: TempDir) -> Result<Process> {
    let begun = Instant::now();
    let (running, lines) = spawn(&mut command, cores, home.path())?;
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut process = Process { running, lines, rest: any, grpc: any, ops: any, ready_after: Duration::ZERO, home };
    let ready = process.listen().with_context(|| {
        format!("{:?} did not start; its log ends:\n{}", command.get_program(), tail(process.home.path()))
    })?;
    process.ready_after = ready - begun;
    Ok(process)
}

/// Starts `command` on `cores`; its lines follow, and its log is in `home`.
fn spawn(command: &mut Command, cores: &[usize], home: &Path) -> Result<(Running, Lines)> {
    // Servers find out for themselves how many cores they have.
    command.env_remove("RAYON_NUM_THREADS");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TIDEGATE_")) {
        command.env_remove(name);
    }
    command.current_dir(home);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(home.join(LOG))?);
    // A process inherits the core of the thread that starts it, and so finds only one from its first moment on.
    let mut running = on_cores(cores, || {
        let mut all = RUNNING.lock();
        let child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        all.push(child.id());
        Ok(Running(child))
    })?;
    let pipe = running.0.stdout.take().context("a process has no standard output")?;
    Ok((running, lines(pipe)))
}

/// The end of a process's log.
fn tail(home: &Path) -> String {
    let log = std::fs::read_to_string(home.join(LOG)).unwrap_or_default();
    let start = log.char_indices().rev().nth(TAIL).map_or(0, |(start, _)| start);
    log[start..].to_owned()
}

/// Lines of a pipe, each with the moment it came. The pipe is read on, so that its writer never waits.
fn lines(pipe: impl std::io::Read + Send + 'static) -> Lines {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            // Nobody listens once the process is ready.
            let _ = sender.send((Instant::now(), line));
        }
    });
    receiver
}

impl Process {
    pub fn id(&self) -> u32 {
        self.running.0.id()
    }

    /// Its folder.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Sends it a line; the line that it answers with.
    ///
    /// # Errors
    /// When it does not answer within a minute.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        let input = self.running.0.stdin.as_mut().context("a process has no standard input")?;
        writeln!(input, "{line}")?;
        let answer = self.lines.recv_timeout(START_TIMEOUT).map(|(_, answer)| answer);
        answer.with_context(|| format!("no answer to '{line}'; the log ends:\n{}", tail(self.home())))
    }

    /// Closes its standard input and waits until it has ended; its folder is kept.
    ///
    /// # Errors
    /// When it fails.
    pub fn finish(mut self) -> Result<TempDir> {
        drop(self.running.0.stdin.take());
        // Its standard output ends when it does.
        let end = loop {
            match self.lines.recv_timeout(START_TIMEOUT) {
                Ok(_) => {}
                Err(end) => break end,
            }
        };
        ensure!(end == RecvTimeoutError::Disconnected, "a process does not end; its log ends:\n{}", tail(self.home()));
        let status = self.running.0.wait()?;
        ensure!(status.success(), "a process ended with {status}; its log ends:\n{}", tail(self.home()));
        Ok(self.home)
    }

    /// Reads addresses until the process is ready; when that was.
    fn listen(&mut self) -> Result<Instant> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let (at, line) = self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .context("it ended, or said nothing for too long")?;
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["REST", address] => self.rest = address.trim_start_matches("http://").parse()?,
                ["gRPC", address] => self.grpc = address.parse()?,
                ["ops", address] => self.ops = address.trim_start_matches("http://").parse()?,
                ["model", name, version, state, ..] if *state != "ready" => {
                    bail!("model {name} {version} is {state}: {line}")
                }
                _ if line.starts_with(LAST_LINE) => return Ok(at),
                _ => {}
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Forgotten first: after the wait the number may belong to somebody else.
        RUNNING.lock().retain(|&pid| pid != self.0.id());
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From now on ^C and SIGTERM end what was started, and then this process.
///
/// # Errors
/// When signals cannot be listened to.
pub fn end_children_on_signals() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let interrupted = runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            let mut hangup = signal(SignalKind::hangup())?;
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            anyhow::Ok(())
        });
        if let Err(error) = interrupted {
            let _ = writeln!(std::io::stderr(), "signals are not listened to: {error}");
            return;
        }
        // The lock is kept: nothing is started any more.
        let running = RUNNING.lock();
        for pid in running.iter().filter_map(|&pid| Pid::from_raw(pid as i32)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::process::exit(130);
    })?;
    Ok(())
}
