//! Metrics of a process that holds a guest, for Prometheus: GET /metrics, over HTTP/1.0.
//!
//! The figures are those of `pcvm status`; what QEMU's `query-migrate` has too carries its name. A
//! scrape takes nothing from the data plane: it reads what the pager has published by itself.
//! A client has a bounded request, a bounded time, and there is a bounded number of them.

mod text;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::args::resolve;
use crate::states::Host;

/// Longest request, its headers among them.
const MAX_REQUEST: usize = 8 << 10;
/// How long a client may take to ask, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients at the same time; others wait to be accepted.
const MAX_CLIENTS: usize = 16;
/// How long to wait when no connection can be accepted.
const RETRY: Duration = Duration::from_millis(100);

/// Serves the metrics of `host` at `address`, if there is one, as long as the process runs.
///
/// Errors: it is no address, or cannot be listened on.
pub(crate) async fn serve(address: Option<&str>, host: &Arc<Host>) -> anyhow::Result<()> {
    let Some(address) = address else { return Ok(()) };
    let listener = TcpListener::bind(resolve(address)?).await.with_context(|| {
        format!("cannot serve metrics on {address}; choose another address with --metrics")
    })?;
    tokio::spawn(accept(listener, host.clone()));
    Ok(())
}

async fn accept(listener: TcpListener, host: Arc<Host>) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let host = host.clone();
                tokio::spawn(async move {
                    let _place = place;
                    if tokio::time::timeout(PATIENCE, attend(stream, &host)).await.is_err() {
                        tracing::debug!("a client of the metrics was too slow");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "metrics");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Answers one request and closes. A client that goes away loses its answer and nothing else.
async fn attend(mut stream: TcpStream, host: &Host) -> std::io::Result<()> {
    let answer = match request(&mut stream).await? {
        Some(request) => answer(&request, || text::render(&host.status(), &host.progress.borrow())),
        None => http("400 Bad Request", "no request, or longer than 8 KiB\n"),
    };
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

/// Everything up to the empty line that ends a request; `None` if it does not end.
async fn request(stream: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while request.len() < MAX_REQUEST {
        match stream.read(&mut piece).await? {
            0 => return Ok(None),
            read => request.extend(&piece[..read]),
        }
        if request.windows(4).any(|end| end == b"\r\n\r\n") || request.windows(2).any(|end| end == b"\n\n") {
            return Ok(Some(request));
        }
    }
    Ok(None)
}

/// The answer to a request's first line; the others say nothing that matters here.
fn answer(request: &[u8], metrics: impl FnOnce() -> String) -> String {
    let line = request.split(|byte| *byte == b'\r' || *byte == b'\n').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, path, version) = (words.next(), words.next().unwrap_or_default(), words.next());
    let path = path.split(|byte| *byte == b'?').next().unwrap_or_default();
    if !version.is_some_and(|version| version.starts_with(b"HTTP/1.")) || words.next().is_some() {
        return http("400 Bad Request", "this is HTTP/1.0\n");
    }
    match (method, path) {
        (Some(b"GET"), b"/metrics") => http("200 OK", &metrics()),
        (Some(b"GET"), _) => http("404 Not Found", "there is only /metrics\n"),
        _ => http("405 Method Not Allowed", "there is only GET\n"),
    }
}

fn http(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Allow: GET\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_metrics_are_served() {
        let status = |request: &[u8]| {
            let answer = answer(request, || "figures\n".into());
            assert!(answer.contains("\r\n\r\n"), "{answer}");
            answer.split(' ').nth(1).unwrap_or_default().to_owned()
        };
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), "200");
        assert_eq!(status(b"GET /metrics?a=b HTTP/1.0\n\n"), "200");
        assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(status(b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405");
        for bad in
            [&b""[..], b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"\xff\xfe \x00 HTTP/2\n\n", b"a b HTTP/1.1 c\n"]
        {
            assert_eq!(status(bad), "400", "{bad:?}");
        }
    }
}
