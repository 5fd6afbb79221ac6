//! The guest's network: an address for its interface, and an echo on TCP.
//!
//! Not for the host: [`set_up`] changes the machine that it runs on.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::ioctl::{Opcode, Setter, ioctl};
use rustix::net::{AddressFamily, SocketType, socket};

/// How long an interface may take to appear: its driver has just been loaded.
const PATIENCE: Duration = Duration::from_secs(10);

const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFADDR: Opcode = 0x8916;
const SIOCSIFNETMASK: Opcode = 0x891c;

const AF_INET: u16 = 2;
const IFF_UP: u16 = 1;
const IFF_MULTICAST: u16 = 0x1000;

/// An IPv4 address and how much of it is the network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Net {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits of the network, at most 32.
    pub prefix: u8,
}

impl Ipv4Net {
    /// From `ADDRESS/PREFIX`.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
        Some(Self { address: address.parse().ok()?, prefix })
    }

    fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0))
    }
}

/// `struct ifreq` of the kernel: an interface and what to make of it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: [u8; 24],
}

impl Request {
    fn new(name: &str, value: &[u8]) -> io::Result<Self> {
        let mut request = Self { name: [0; 16], value: [0; 24] };
        if name.len() >= request.name.len() || value.len() > request.value.len() {
            return Err(io::Error::other(format!("no interface has a name as long as {name}")));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.value[..value.len()].copy_from_slice(value);
        Ok(request)
    }

    /// `struct sockaddr_in` without a port.
    fn address(name: &str, address: Ipv4Addr) -> io::Result<Self> {
        let mut value = [0; 8];
        value[..2].copy_from_slice(&AF_INET.to_ne_bytes());
        value[4..].copy_from_slice(&address.octets());
        Self::new(name, &value)
    }

    fn flags(name: &str, flags: u16) -> io::Result<Self> {
        Self::new(name, &flags.to_ne_bytes())
    }
}

/// Has the kernel do one of the requests above.
fn set<const OPCODE: Opcode>(socket: &OwnedFd, request: Request) -> io::Result<()> {
    // SAFETY: each opcode of this module sets what a `struct ifreq` tells, which Request is laid
    // out as: 40 bytes, 16 of them the name.
    let setter = unsafe { Setter::<OPCODE, Request>::new(request) };
    // SAFETY: as above; the kernel only reads the request.
    Ok(unsafe { ioctl(socket, setter) }?)
}

/// The first interface by name that is not the loopback, once there is one.
fn interface() -> io::Result<String> {
    let begin = Instant::now();
    loop {
        let all = std::fs::read_dir("/sys/class/net")?.flatten();
        let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
        match names.filter(|name| name != "lo").min() {
            Some(name) => return Ok(name),
            None if begin.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(10)),
            None => return Err(io::Error::other("there is no network interface")),
        }
    }
}

/// Gives this machine's first interface an address, and brings it up. Returns its name.
///
/// Errors: there is none, or the kernel refuses.
pub fn set_up(net: Ipv4Net) -> io::Result<String> {
    let name = interface()?;
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    set::<SIOCSIFADDR>(&socket, Request::address(&name, net.address)?)?;
    set::<SIOCSIFNETMASK>(&socket, Request::address(&name, net.mask())?)?;
    set::<SIOCSIFFLAGS>(&socket, Request::flags(&name, IFF_UP | IFF_MULTICAST)?)?;
    Ok(name)
}

/// Sends back at once all that comes on connections to a port, for ever. Returns the port, which is
/// of the kernel's choice for 0.
///
/// Errors: the port is in use.
pub fn start_echo(port: u16) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || echo(stream));
        }
    });
    Ok(port)
}

/// Until the peer ends it, or it breaks.
fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    loop {
        let got = stream.read(&mut buffer)?;
        if got == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..got])?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_their_networks() {
        let net = Ipv4Net::parse("10.77.0.2/20").unwrap();
        assert_eq!((net.address, net.mask()), (Ipv4Addr::new(10, 77, 0, 2), Ipv4Addr::new(255, 255, 240, 0)));
        assert_eq!(Ipv4Net::parse("1.2.3.4/0").unwrap().mask(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(Ipv4Net::parse("1.2.3.4/32").unwrap().mask(), Ipv4Addr::BROADCAST);
        for bad in ["", "10.0.0.1", "10.0.0.1/33", "10.0.0/8", "10.0.0.1/-1", "/8"] {
            assert_eq!(Ipv4Net::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        assert_eq!(size_of::<Request>(), 40);
        let request = Request::address("eth0", Ipv4Addr::new(10, 77, 0, 2)).unwrap();
        assert_eq!(&request.name, b"eth0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(request.value[..10], [2, 0, 0, 0, 10, 77, 0, 2, 0, 0]);
        assert!(Request::flags("sixteen letters!", IFF_UP).is_err());
    }

    #[test]
    fn what_is_sent_to_the_echo_comes_back() {
        let port = start_echo(0).unwrap();
        let mut streams = [(); 2].map(|()| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap());
        for text in ["one\n", "2", "three\nfour\n"] {
            for stream in &mut streams {
                stream.write_all(text.as_bytes()).unwrap();
                let mut back = vec![0; text.len()];
                stream.read_exact(&mut back).unwrap();
                assert_eq!(back, text.as_bytes());
            }
        }
    }
}
