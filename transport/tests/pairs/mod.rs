//! Connected pairs on this host, in clear and under TLS.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use postcopy_transport::tcp::Stream;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

/// Who dials, and who listens.
pub(crate) fn stream_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

/// The same under TLS: who dials is its client, as a source is of its destination.
pub(crate) fn tls_pair() -> (Stream, Stream) {
    let (dials, listens, _) = tls_pair_and_socket();
    (dials, listens)
}

/// And the socket of the one who dials, below TLS.
pub(crate) fn tls_pair_and_socket() -> (Stream, Stream, TcpStream) {
    let key = rcgen::generate_simple_self_signed(["peer".to_owned()]).unwrap();
    let certificate: CertificateDer = key.cert.der().clone();
    let mut authorities = RootCertStore::empty();
    authorities.add(certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let client = client.unwrap().with_root_certificates(authorities).with_no_client_auth();
    let server = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let own = PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let server = server.unwrap().with_no_client_auth().with_single_cert(vec![certificate], own).unwrap();
    let (mut dials, mut listens) = stream_pair();
    let serving = std::thread::spawn(move || {
        let mut connection: Connection = ServerConnection::new(Arc::new(server)).unwrap().into();
        connection.complete_io(&mut listens).unwrap();
        Stream::under_tls(listens, connection)
    });
    let name = "peer".try_into().unwrap();
    let mut connection: Connection = ClientConnection::new(Arc::new(client), name).unwrap().into();
    while connection.is_handshaking() {
        connection.complete_io(&mut dials).unwrap();
    }
    let below = dials.try_clone().unwrap();
    (Stream::under_tls(dials, connection), serving.join().unwrap(), below)
}
