//! Where log lines go: standard error, a file, or the system log of a daemon.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

use env_logger::{Builder, Logger, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};

/// Variables that set the level, the first one wins.
const VARIABLES: [&str; 2] = ["SNAPFS_LOG", "RUST_LOG"];

const SYSTEM_LOG: &str = "/dev/log";

/// Where log lines go.
#[derive(Debug)]
pub enum LogTarget {
    /// To the terminal, or whatever standard error is.
    Stderr,
    /// To a file, with the time.
    File(File),
    /// To a file or else the system log, and to standard error too as long as somebody listens there: until the
    /// daemon has let go of it.
    Background(Option<File>),
}

/// Starts logging. Called once, by the program; later calls change nothing.
pub fn init_logging(target: LogTarget, default_level: LevelFilter) {
    let mut outlets = Vec::new();
    match target {
        LogTarget::Stderr => outlets.push(to_stderr(default_level)),
        LogTarget::File(file) => outlets.push(to_file(file, default_level)),
        LogTarget::Background(file) => {
            outlets.push(to_stderr(default_level));
            match file {
                Some(file) => outlets.push(to_file(file, default_level)),
                None => outlets.extend(SystemLog::open().map(|log| to_system_log(log, default_level))),
            }
        }
    }
    let level = outlets.iter().map(Logger::filter).max().unwrap_or(LevelFilter::Off);
    if log::set_boxed_logger(Box::new(Outlets(outlets))).is_ok() {
        log::set_max_level(level);
    }
}

struct Outlets(Vec<Logger>);

impl Log for Outlets {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.iter().any(|outlet| outlet.enabled(metadata))
    }

    fn log(&self, record: &Record<'_>) {
        for outlet in &self.0 {
            outlet.log(record);
        }
    }

    fn flush(&self) {
        for outlet in &self.0 {
            outlet.flush();
        }
    }
}

fn builder(default_level: LevelFilter) -> Builder {
    let mut builder = Builder::new();
    builder.filter(None, default_level);
    // What matters of the transport comes back as an error or is logged by the adapter; the rest is every reply
    // that found its caller killed.
    builder.filter(Some("fuser"), LevelFilter::Off);
    if let Some(filters) = VARIABLES.iter().find_map(|name| std::env::var(name).ok()) {
        builder.parse_filters(&filters);
    }
    builder
}

fn to_stderr(default_level: LevelFilter) -> Logger {
    let mut builder = builder(default_level);
    builder.target(Target::Stderr);
    builder.format(|out, record| writeln!(out, "snapfs: {} {}", record.level(), one_line(record)));
    builder.build()
}

fn to_file(file: File, default_level: LevelFilter) -> Logger {
    let mut builder = builder(default_level);
    builder.target(Target::Pipe(Box::new(file)));
    let pid = std::process::id();
    builder.format(move |out, record| {
        let time = out.timestamp_seconds();
        writeln!(out, "{time} snapfs[{pid}]: {} {}", record.level(), one_line(record))
    });
    builder.build()
}

fn to_system_log(log: SystemLog, default_level: LevelFilter) -> Logger {
    let mut builder = builder(default_level);
    builder.target(Target::Pipe(Box::new(log)));
    let pid = std::process::id();
    builder
        .format(move |out, record| writeln!(out, "<{}>snapfs[{pid}]: {}", priority(record.level()), one_line(record)));
    builder.build()
}

/// A message is one line: some causes have more.
fn one_line(record: &Record<'_>) -> String {
    record.args().to_string().replace('\n', " ")
}

/// syslog(3): facility "daemon" (3) times 8, and the severity.
fn priority(level: Level) -> u8 {
    let severity = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    3 * 8 + severity
}

/// The socket of the system log: one line is one datagram.
struct SystemLog(UnixDatagram);

impl SystemLog {
    fn open() -> Option<Self> {
        let socket = UnixDatagram::unbound().ok()?;
        socket.connect(SYSTEM_LOG).ok()?;
        // A system log that hangs must not hang the mount.
        socket.set_nonblocking(true).ok()?;
        Some(Self(socket))
    }
}

impl Write for SystemLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        if self.0.send(text).is_err() {
            // The system log was started anew: its socket is another one.
            let _ = self.0.connect(SYSTEM_LOG).and_then(|()| self.0.send(text));
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_those_of_syslog() {
        assert_eq!([Level::Error, Level::Warn, Level::Info, Level::Debug].map(priority), [27, 28, 30, 31]);
    }
}
