//! The xenstore of a Xen host, as far as `reap` needs it: whether the backend of a guest's disk is still there.

use std::time::Duration;

use crate::cli::attach::registry::Owner;
use crate::cli::attach::tool::{command, run};
use crate::error::{Error, ErrorKind, Result};

/// Owners that the hotplug script names: this, and the backend's path in the xenstore.
const OWNER_PREFIX: &str = "xen:";

const LIMIT: Duration = Duration::from_secs(5);

/// What `xenstore-read` says when it has asked and there is nothing.
const ABSENT: &str = "couldn't read path";

/// The path of the backend that an owner is; `None` for any other owner.
pub fn backend_of(owner: &Owner) -> Option<&str> {
    owner.as_str().strip_prefix(OWNER_PREFIX)
}

/// Whether a backend is still there: libxl makes it before it calls the script, and deletes it when the disk is gone.
///
/// # Errors
/// `NotFound` without the xenstore's programs, `Unavailable` when it does not answer: then nothing is known.
pub fn is_there(backend: &str) -> Result<bool> {
    let mut read = command("xenstore-read");
    read.arg(format!("{backend}/frontend-id"));
    let output = run(read, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stderr);
    match (output.status.success(), said.contains(ABSENT)) {
        (true, _) => Ok(true),
        (false, true) => Ok(false),
        (false, false) => {
            let said = said.lines().next().unwrap_or("failed and said nothing").trim();
            Err(Error::new(ErrorKind::Unavailable, format!("xenstore-read: {said}")))
        }
    }
}
