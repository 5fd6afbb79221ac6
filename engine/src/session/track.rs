//! What lanes run on: connections of their own between the hosts of a session, in clear or under TLS as it is.

use std::net::IpAddr;

use postcopy_transport::tcp::Stream;
use tokio::net::TcpStream;

use super::SessionError;
use super::channel::agreed;
use super::tls::{DestinationTls, Shown, SourceTls};

/// Of a connection that this side has dialed to `peer`; it has been greeted.
pub(super) async fn dialed(
    stream: TcpStream,
    peer: IpAddr,
    tls: Option<&SourceTls>,
) -> Result<Stream, SessionError> {
    let Some(tls) = tls else { return Ok(plain(stream)?.into()) };
    let (stream, connection) = agreed(tls.dial(stream, peer)).await?.into_inner();
    Ok(Stream::under_tls(plain(stream)?, connection))
}

/// Of one that this side has accepted, and greeted, from the source that has `shown` that certificate.
pub(super) async fn accepted(
    stream: TcpStream,
    tls: Option<&DestinationTls>,
    shown: Option<Shown>,
) -> Result<Stream, SessionError> {
    let Some(tls) = tls else { return Ok(plain(stream)?.into()) };
    let (stream, connection) = agreed(tls.accept(stream)).await?.into_inner();
    if Shown::by(&connection) != shown {
        return Err(SessionError::Protocol("a lane under another certificate than its session"));
    }
    Ok(Stream::under_tls(plain(stream)?, connection))
}

/// Takes a connection away from the control plane.
fn plain(stream: TcpStream) -> Result<std::net::TcpStream, SessionError> {
    stream.into_std().map_err(|source| SessionError::Connection { source })
}
