//! Tells the service manager how the daemon is, as sd_notify(3) describes. Without one (no `NOTIFY_SOCKET` in the
//! environment) nothing is told.

use sd_notify::NotifyState;

/// The variable that names the service manager's socket.
pub(super) const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// The mount answers.
pub(super) fn ready(status: &str) {
    tell(NotifyState::Ready, status);
}

/// The end has begun.
pub(super) fn stopping(status: &str) {
    tell(NotifyState::Stopping, status);
}

fn tell(state: NotifyState<'_>, status: &str) {
    // A line is a message: a path must not begin another.
    let status: String = status.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if let Err(e) = sd_notify::notify(&[state, NotifyState::Status(&status)]) {
        log::warn!("service manager: {e}");
    }
}
