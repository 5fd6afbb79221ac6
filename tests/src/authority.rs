//! An authority that signs certificates, and the folders that hosts keep theirs in.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
    SerialNumber, date_time_ymd,
};

use crate::Scratch;

/// See the module.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Default for Authority {
    fn default() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }
}

impl Authority {
    /// Makes a folder with all that a host needs, which is `host` to others and trusts this authority.
    pub fn folder(&self, scratch: &Scratch, name: &str, host: &str) -> PathBuf {
        let folder = scratch.file(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("ca-cert.pem"), &self.certificate).unwrap();
        for role in ["client", "server"] {
            self.sign(&folder, role, host);
        }
        folder
    }

    /// Puts another certificate of such a role, and its key, into a folder.
    pub fn sign(&self, folder: &Path, role: &str, host: &str) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([host.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        std::fs::write(folder.join(format!("{role}-cert.pem")), certificate).unwrap();
        std::fs::write(folder.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
    }

    /// Puts a list of certificates that were taken back into a folder: none, and it was good until the end of 2024.
    pub fn stale_list(&self, folder: &Path) {
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2024, 12, 31),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer).unwrap().pem().unwrap();
        std::fs::write(folder.join("ca-crl.pem"), list).unwrap();
    }
}
