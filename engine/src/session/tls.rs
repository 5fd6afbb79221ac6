//! Who may speak to whom: control connections under TLS 1.3, on which both ends have shown a certificate that one
//! authority has signed.
//!
//! A folder has what a host needs, by the names that QEMU's `tls-creds-x509` has for them: `ca-cert.pem`; for a source,
//! which dials, `client-cert.pem` and `client-key.pem`; for a destination `server-cert.pem` and `server-key.pem`.
//!
//! The guest's state, the keys of its memory and all that the two sides say are encrypted. Lanes are not: pages cross as they
//! are, over RDMA as over TCP.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::STEP_PATIENCE;

/// The authority's certificate.
const AUTHORITY: &str = "ca-cert.pem";
/// Certificate and key of who dials, and of who listens.
const CLIENT: [&str; 2] = ["client-cert.pem", "client-key.pem"];
const SERVER: [&str; 2] = ["server-cert.pem", "server-key.pem"];

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub struct TlsError {
    /// Which file, or the folder if it is about several.
    pub file: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// What a source shows to destinations, and asks of them.
#[derive(Clone, Debug)]
pub struct SourceTls {
    config: Arc<ClientConfig>,
    /// The name that the destination's certificate must have; else the address that was dialed.
    name: Option<ServerName<'static>>,
}

impl SourceTls {
    /// Reads a folder. The destination's certificate must be for `hostname`, or else for the IP address that is dialed.
    ///
    /// Errors: a file is missing or malformed, the key is another certificate's, or that is no host name.
    pub fn read(folder: &Path, hostname: Option<&str>) -> Result<Self, TlsError> {
        let Identity { authorities, chain, key } = Identity::read(folder, CLIENT)?;
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| of(folder, &error))?.with_root_certificates(authorities);
        let config = builder.with_client_auth_cert(chain, key).map_err(|error| of(folder, &error))?;
        let name = hostname.map(|name| {
            let named = ServerName::try_from(name.to_owned());
            named.map_err(|error| of(folder, &format_args!("the host name `{name}`: {error}")))
        });
        Ok(Self { config: Arc::new(config), name: name.transpose()? })
    }

    pub(super) async fn dial(
        &self,
        stream: TcpStream,
        peer: IpAddr,
    ) -> io::Result<client::TlsStream<TcpStream>> {
        let name = self.name.clone().unwrap_or_else(|| ServerName::IpAddress(peer.into()));
        TlsConnector::from(self.config.clone()).connect(name, stream).await
    }
}

/// What a destination shows to sources, and asks of them.
#[derive(Clone, Debug)]
pub struct DestinationTls(Arc<ServerConfig>);

impl DestinationTls {
    /// Reads a folder.
    ///
    /// Errors: a file is missing or malformed, or the key is another certificate's.
    pub fn read(folder: &Path) -> Result<Self, TlsError> {
        let Identity { authorities, chain, key } = Identity::read(folder, SERVER)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider()).build();
        let verifier = verifier.map_err(|error| of(folder, &error))?;
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| of(folder, &error))?.with_client_cert_verifier(verifier);
        let mut config = builder.with_single_cert(chain, key).map_err(|error| of(folder, &error))?;
        // Who comes again shows its certificate again.
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
        let accepted = TlsAcceptor::from(self.0.clone()).accept(stream).into_fallible().await;
        let (error, mut stream) = match accepted {
            Ok(line) => return Ok(line),
            Err(refused) => refused,
        };
        // It was told why, and has said more meanwhile: closed over that, the connection would lose what it was told.
        let goodbye = async {
            stream.shutdown().await?;
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
        };
        let _ = tokio::time::timeout(STEP_PATIENCE, goodbye).await;
        Err(error)
    }
}

/// What one side is, and whom it trusts.
struct Identity {
    authorities: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn read(folder: &Path, [chain, key]: [&str; 2]) -> Result<Self, TlsError> {
        let authority = folder.join(AUTHORITY);
        let mut authorities = RootCertStore::empty();
        for certificate in certificates(&authority)? {
            authorities.add(certificate).map_err(|error| of(&authority, &error))?;
        }
        let chain = certificates(&folder.join(chain))?;
        let file = folder.join(key);
        let key = PrivateKeyDer::from_pem_file(&file).map_err(|error| match error {
            pem::Error::NoItemsFound => of(&file, &"it has no private key in PEM"),
            other => of(&file, &other),
        })?;
        Ok(Self { authorities, chain, key })
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
    let found: Vec<_> = read.map_err(|error| of(file, &error))?;
    if found.is_empty() {
        return Err(of(file, &"it has no certificate in PEM"));
    }
    Ok(found)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn of(file: &Path, reason: &dyn std::fmt::Display) -> TlsError {
    TlsError { file: file.into(), reason: reason.to_string() }
}
