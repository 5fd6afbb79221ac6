//! Who may speak to whom: connections under TLS 1.3, on which both ends have shown a certificate that one
//! authority has signed.
//!
//! A folder has what a host needs, by the names that QEMU's `tls-creds-x509` has for them: `ca-cert.pem`; for a source,
//! which dials, `client-cert.pem` and `client-key.pem`; for a destination `server-cert.pem` and `server-key.pem`; and, if
//! there is one, `ca-crl.pem`: the certificates that the authority has taken back.
//!
//! The guest's state, the keys of its memory and all that the two sides say are encrypted, and so are pages that cross over TCP.
//! Over RDMA they are not: a device that reads by itself knows nothing of TLS.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use postcopy_transport::Transport;
use postcopy_transport::tcp::Stream;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName,
};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::STEP_PATIENCE;

/// The authority's certificate.
const AUTHORITY: &str = "ca-cert.pem";
/// What it has taken back.
const TAKEN_BACK: &str = "ca-crl.pem";
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
        let Identity { authorities, taken_back, chain, key } = Identity::read(folder, CLIENT)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(authorities, provider())
            .with_crls(taken_back)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build();
        let verifier = verifier.map_err(|error| no_list(folder, &error))?;
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| of(folder, &error))?.with_webpki_verifier(verifier);
        let config = builder.with_client_auth_cert(chain, key).map_err(|error| of(folder, &error))?;
        let name = hostname.map(|name| {
            let named = ServerName::try_from(name.to_owned());
            named.map_err(|error| of(folder, &format_args!("the host name `{name}`: {error}")))
        });
        Ok(Self { config: Arc::new(config), name: name.transpose()? })
    }

    /// Speaks TLS over a connection for a lane that was dialed to `peer`, as a session does over its own; for who has no
    /// session. The socket must be one that waits, and how long is its timeouts' matter.
    ///
    /// Errors: the two do not trust each other, or the connection fails or times out.
    pub fn dial_lane(&self, mut socket: std::net::TcpStream, peer: IpAddr) -> io::Result<Stream> {
        let mut connection =
            ClientConnection::new(self.config.clone(), self.name_of(peer)).map_err(io::Error::other)?;
        connection.complete_io(&mut socket)?;
        Ok(Stream::under_tls(socket, connection))
    }

    pub(super) async fn dial(
        &self,
        stream: TcpStream,
        peer: IpAddr,
    ) -> io::Result<client::TlsStream<TcpStream>> {
        TlsConnector::from(self.config.clone()).connect(self.name_of(peer), stream).await
    }

    fn name_of(&self, peer: IpAddr) -> ServerName<'static> {
        self.name.clone().unwrap_or_else(|| ServerName::IpAddress(peer.into()))
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
        let Identity { authorities, taken_back, chain, key } = Identity::read(folder, SERVER)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(authorities, provider())
            .with_crls(taken_back)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build();
        let verifier = verifier.map_err(|error| no_list(folder, &error))?;
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| of(folder, &error))?.with_client_cert_verifier(verifier);
        let mut config = builder.with_single_cert(chain, key).map_err(|error| of(folder, &error))?;
        // Who comes again shows its certificate again.
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    /// As [`SourceTls::dial_lane`], at the other end.
    ///
    /// Errors: as there.
    pub fn accept_lane(&self, mut socket: std::net::TcpStream) -> io::Result<Stream> {
        let mut connection = ServerConnection::new(self.0.clone()).map_err(io::Error::other)?;
        connection.complete_io(&mut socket)?;
        Ok(Stream::under_tls(socket, connection))
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

/// The certificate that a source has shown, which its lanes have to show too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown(CertificateDer<'static>);

impl Shown {
    /// None: it has shown nothing.
    pub(super) fn by(connection: &ServerConnection) -> Option<Self> {
        connection.peer_certificates()?.first().cloned().map(Self)
    }
}

/// Whether a side that nobody has told which transports to use takes this one, between hosts. Who wants TLS does not
/// expect pages to be in clear.
pub(super) fn taken_unasked(transport: Transport, tls: bool) -> bool {
    transport != Transport::Verbs || !tls
}

/// What one side is, and whom it trusts.
struct Identity {
    authorities: Arc<RootCertStore>,
    /// Lists of what some of them have taken back. A list that is out of date says nothing, so nobody is trusted on it;
    /// of an authority without one nothing is taken back.
    taken_back: Vec<CertificateRevocationListDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn read(folder: &Path, [chain, key]: [&str; 2]) -> Result<Self, TlsError> {
        let authority = folder.join(AUTHORITY);
        let mut authorities = RootCertStore::empty();
        for certificate in all::<CertificateDer>(&authority, "certificate")? {
            authorities.add(certificate).map_err(|error| of(&authority, &error))?;
        }
        let taken_back = folder.join(TAKEN_BACK);
        let taken_back = match taken_back.try_exists() {
            Ok(false) => Vec::new(),
            _ => all(&taken_back, "list of certificates that were taken back (X509 CRL)")?,
        };
        let chain = all(&folder.join(chain), "certificate")?;
        let file = folder.join(key);
        let key = PrivateKeyDer::from_pem_file(&file).map_err(|error| match error {
            pem::Error::NoItemsFound => of(&file, &"it has no private key in PEM"),
            other => of(&file, &other),
        })?;
        Ok(Self { authorities: Arc::new(authorities), taken_back, chain, key })
    }
}

/// All of a kind that a file has.
fn all<T: PemObject>(file: &Path, what: &str) -> Result<Vec<T>, TlsError> {
    let read = T::pem_file_iter(file).and_then(Iterator::collect);
    let found: Vec<_> = read.map_err(|error| of(file, &error))?;
    if found.is_empty() {
        return Err(of(file, &format_args!("it has no {what} in PEM")));
    }
    Ok(found)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn no_list(folder: &Path, error: &VerifierBuilderError) -> TlsError {
    of(
        &folder.join(TAKEN_BACK),
        &format_args!("{error}; it has to be of version 2 (RFC 5280), see docs/tls.md"),
    )
}

fn of(file: &Path, reason: &dyn std::fmt::Display) -> TlsError {
    TlsError { file: file.into(), reason: reason.to_string() }
}
