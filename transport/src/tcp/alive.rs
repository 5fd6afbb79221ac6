//! When a connection counts as lost, though nothing says so: a host that vanished, a cable that was drawn.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_user_timeout,
};

/// How long a peer may leave what it was sent or asked without acknowledgement. Left to themselves, connections
/// wait for some 15 minutes (tcp_retries2), or for ever where nothing is on its way from here.
pub const LOST_AFTER: Duration = Duration::from_secs(20);

/// Questions to a peer that says nothing, before it counts as lost.
const QUESTIONS: u32 = 3;

/// Has a connection fail once its peer has not been heard for [`LOST_AFTER`].
///
/// Errors: the system refuses a socket option.
pub fn watch_over(stream: impl AsFd) -> io::Result<()> {
    let step = LOST_AFTER / (QUESTIONS + 1);
    set_socket_keepalive(&stream, true)?;
    set_tcp_keepidle(&stream, step)?;
    set_tcp_keepintvl(&stream, step)?;
    set_tcp_keepcnt(&stream, QUESTIONS)?;
    Ok(set_tcp_user_timeout(&stream, LOST_AFTER.as_millis() as u32)?)
}
