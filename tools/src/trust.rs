//! The flags that say whom to speak with.

use std::path::PathBuf;

use clap::Args;
use postcopy_engine::session::{SourceTls, TlsError};

/// Whom to speak with: who dials says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args, serde::Serialize, serde::Deserialize)]
pub struct TrustArgs {
    /// Speak with the other side under TLS, and only if one authority has signed its certificate: the folder of its
    /// `ca-cert.pem` and of this host's `client-cert.pem` and `client-key.pem`, as for QEMU. Pages are encrypted too over
    /// tcp, which is what is used then if nothing else is said; over verbs they are not. See docs/tls.md.
    #[arg(long, value_name = "FOLDER")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<PathBuf>,
    /// The name that the other side's certificate has to have. If not given: the IP address that is dialed.
    #[arg(long, value_name = "NAME", requires = "tls")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_hostname: Option<String>,
}

impl TrustArgs {
    /// Errors: the certificates cannot be used.
    pub fn read(&self) -> Result<Option<SourceTls>, TlsError> {
        self.tls.as_deref().map(|folder| SourceTls::read(folder, self.tls_hostname.as_deref())).transpose()
    }

    /// The same for a process with another working folder.
    pub fn absolute(&self) -> std::io::Result<Self> {
        let tls = self.tls.as_deref().map(std::path::absolute).transpose()?;
        Ok(Self { tls, tls_hostname: self.tls_hostname.clone() })
    }
}
