//! A process that holds a guest or waits for one: its console, its log, and waiting for what they say.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::PATIENCE;

/// See the module. Ended when dropped.
pub struct Process {
    child: Mutex<Child>,
    console: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts it with its standard error in `log`, and waits until it has made the file `ready`. Its
    /// guest prints to `console`, as the command says.
    pub fn start(command: &mut Command, console: PathBuf, log: PathBuf, ready: &Path) -> Self {
        let started = Self::spawn(command.stdout(Stdio::null()), console, log);
        let name = started.name();
        let begin = Instant::now();
        while !ready.exists() {
            let ended = started.child().try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended at its start: {}", started.log());
            assert!(begin.elapsed() < PATIENCE, "{name} does not start: {}", started.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        started
    }

    /// Starts one that holds no guest: its console is what itself prints.
    pub fn start_printing(command: &mut Command, console: PathBuf, log: PathBuf) -> Self {
        let stdout = std::fs::File::create(&console).unwrap();
        Self::spawn(command.stdout(stdout), console, log)
    }

    fn spawn(command: &mut Command, console: PathBuf, log: PathBuf) -> Self {
        let stderr = std::fs::File::create(&log).unwrap();
        let child = command.stdin(Stdio::null()).stderr(stderr).spawn().unwrap();
        Self { child: Mutex::new(child), console, log }
    }

    fn name(&self) -> String {
        self.log.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Whether it has not ended.
    pub fn lives(&self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// All that can be told of it when something has failed: whether it lives, and what it and its
    /// guest have said. Waits for its end, but not long: it may have been about to say why.
    pub fn story(&self) -> String {
        let begin = Instant::now();
        let mut ended = self.child().try_wait().unwrap();
        while ended.is_none() && begin.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(10));
            ended = self.child().try_wait().unwrap();
        }
        let fate = ended.map_or_else(|| "lives".to_owned(), |status| format!("ended: {status}"));
        format!("{fate}\nconsole:\n{}\nlog:\n{}\n{}", self.console(), self.log(), self.threads())
    }

    /// What the guest has printed here.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// What the process has said on stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What each thread is doing, for the report of something that hangs.
    fn threads(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let line = |task: PathBuf| {
            let stat = read(task.join("stat"));
            let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
            let (name, place) = (read(task.join("comm")), read(task.join("wchan")));
            let times = fields.get(11..13).unwrap_or_default().join("+");
            format!("{} {} in {place}, {times} ticks\n", name.trim(), fields.first().unwrap_or(&"gone"))
        };
        tasks.map(|task| line(task.path())).collect()
    }

    /// Waits until `reached` says so.
    pub fn wait_until(&self, what: &str, reached: impl Fn() -> bool) {
        let begin = Instant::now();
        while !reached() {
            assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}; it {}", self.story());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the guest has printed `text` here.
    pub fn wait_for_console(&self, text: &str) {
        self.wait_until(text, || self.console().contains(text));
    }

    /// Waits until the guest prints something more.
    pub fn wait_for_progress(&self) {
        let lines = self.console().lines().count();
        self.wait_until("the guest goes on", || self.console().lines().count() > lines + 1);
    }

    /// Waits for the process to end; returns whether it succeeded, and what it said.
    pub fn wait_for_end(&self) -> (bool, String) {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child().try_wait().unwrap() {
                return (status.success(), self.log());
            }
            assert!(begin.elapsed() < PATIENCE, "{} does not end; it {}", self.name(), self.story());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}
