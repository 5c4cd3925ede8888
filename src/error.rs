//! The one error type: a kind that says what the caller can do, a context for people, and the cause.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// What the caller can do about an error. Few and coarse; boundaries match on it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The named thing does not exist.
    NotFound,
    /// The named thing exists already and is not replaced.
    Exists,
    /// Stored bytes are not what was written. Do not retry; run `snapfs check`.
    Corrupt,
    /// The outcome is unknown or the medium does not answer. May be retried.
    Unavailable,
    /// Another holder is at work. Try again when it is done.
    Busy,
    /// No room left on the medium.
    NoSpace,
    /// Written by a newer version, or not possible on this medium.
    Unsupported,
    /// The request itself is wrong. Fix the request.
    Invalid,
    /// The thing is immutable: a sealed snapshot.
    Sealed,
    /// The store or the mount is read-only.
    ReadOnly,
    /// The caller lacks the permission.
    Denied,
    /// The snapshot was forgotten while it was open, and its bytes are gone.
    Stale,
    /// A folder that must be empty is not.
    NotEmpty,
    /// The move would leave the VM.
    CrossVm,
    /// A name or a size is over its limit.
    TooLong,
    /// An image would grow over `limits::IMAGE_BYTES_MAX`.
    TooLarge,
    /// A folder where a file is wanted.
    IsFolder,
    /// A file where a folder is wanted.
    NotFolder,
}

/// An error of any part of snapfs. See [`ErrorKind`] for what to do about it.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// `std::result::Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind`; `context` says what and where, lower case, no full stop, values last.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Keeps `cause` as the source. The context need not repeat it.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(cause.into());
        self
    }

    /// Wraps an operating system error; its kind follows from the error number.
    pub fn io(context: impl Into<String>, cause: io::Error) -> Self {
        let kind = match cause.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EEXIST) => ErrorKind::Exists,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            Some(libc::EACCES | libc::EPERM) => ErrorKind::Denied,
            Some(libc::EBUSY | libc::ETXTBSY) => ErrorKind::Busy,
            Some(libc::ENAMETOOLONG) => ErrorKind::TooLong,
            Some(libc::EFBIG) => ErrorKind::TooLarge,
            Some(libc::EISDIR) => ErrorKind::IsFolder,
            Some(libc::ENOTDIR) => ErrorKind::NotFolder,
            Some(libc::ENOTEMPTY) => ErrorKind::NotEmpty,
            Some(libc::EINVAL) => ErrorKind::Invalid,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unsupported,
            _ => match cause.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::AlreadyExists => ErrorKind::Exists,
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => ErrorKind::Corrupt,
                io::ErrorKind::InvalidInput => ErrorKind::Invalid,
                _ => ErrorKind::Unavailable,
            },
        };
        Self::new(kind, context).because(cause)
    }

    /// Puts `context` in front: what was being done when the error came up. The kind stays.
    #[must_use]
    pub fn within(mut self, context: impl fmt::Display) -> Self {
        self.context = format!("{context}: {}", self.context);
        self
    }

    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error with another kind, where a layer knows better what it means.
    #[must_use]
    pub fn as_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// A copy for a second reader: kind and whole message; the source becomes text.
    pub fn duplicate(&self) -> Self {
        Self { kind: self.kind, context: self.to_string(), source: None }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.context)?;
        let mut cause = self.source.as_deref().map(|s| s as &dyn StdError);
        while let Some(this) = cause {
            write!(out, ": {this}")?;
            cause = this.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}

/// Shorthands for the kinds that decoders and checks use everywhere.
macro_rules! shorthand {
    ($(#[$doc:meta] $name:ident => $kind:ident),* $(,)?) => {$(
        #[$doc]
        pub fn $name(context: impl Into<String>) -> Error {
            Error::new(ErrorKind::$kind, context)
        }
    )*};
}

shorthand! {
    /// An error of kind `Corrupt`.
    corrupt => Corrupt,
    /// An error of kind `Invalid`.
    invalid => Invalid,
    /// An error of kind `NotFound`.
    not_found => NotFound,
    /// An error of kind `Busy`.
    busy => Busy,
    /// An error of kind `Unsupported`.
    unsupported => Unsupported,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_with_its_causes() {
        let error = Error::io("vms/web01/log/1", io::Error::from_raw_os_error(libc::ENOSPC)).within("commit");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.to_string(), "commit: vms/web01/log/1: No space left on device (os error 28)");
        assert_eq!(error.duplicate().to_string(), error.to_string());
    }
}
