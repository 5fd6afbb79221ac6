//! A relay between source and destination that cuts the control connection after so many messages.
//!
//! It knows of the protocol only what `docs/wire-format.md` says of framing: a 32-byte greeting
//! each way, then frames of length, checksum and body. Lanes pass through untouched.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

const GREETING: usize = 32;
const FRAME_HEADER: usize = 8;

/// Relays connections to `target` and cuts each control connection when `messages` messages have
/// passed, counting both directions. Returns the port to connect to. Lives until the test ends.
pub fn cut_after(messages: i64, target: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            if let Ok(server) = TcpStream::connect(("127.0.0.1", target)) {
                std::thread::spawn(move || relay(client, server, messages));
            }
        }
    });
    port
}

fn relay(mut client: TcpStream, mut server: TcpStream, messages: i64) -> std::io::Result<()> {
    let mut greeting = [0; GREETING];
    client.read_exact(&mut greeting)?;
    server.write_all(&greeting)?;
    let is_control = greeting[10] == 0;
    let left = Arc::new(AtomicI64::new(messages));
    if is_control {
        server.read_exact(&mut greeting)?;
        client.write_all(&greeting)?;
    }
    let (mut client_too, mut server_too) = (client.try_clone()?, server.try_clone()?);
    if !is_control {
        std::thread::spawn(move || std::io::copy(&mut server_too, &mut client_too));
        std::io::copy(&mut client, &mut server)?;
        return Ok(());
    }
    let back = left.clone();
    std::thread::spawn(move || pass_frames(&mut server_too, &mut client_too, &back));
    pass_frames(&mut client, &mut server, &left)
}

fn pass_frames(from: &mut TcpStream, to: &mut TcpStream, left: &AtomicI64) -> std::io::Result<()> {
    let mut header = [0; FRAME_HEADER];
    loop {
        let ended = left.load(Ordering::Acquire) <= 0;
        let read = if ended { Err(std::io::ErrorKind::Other.into()) } else { from.read_exact(&mut header) };
        if read.is_err() || left.fetch_sub(1, Ordering::AcqRel) <= 0 {
            from.shutdown(Shutdown::Both)?;
            return to.shutdown(Shutdown::Both);
        }
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut frame = header.to_vec();
        frame.resize(FRAME_HEADER + length as usize, 0);
        from.read_exact(&mut frame[FRAME_HEADER..])?;
        to.write_all(&frame)?;
    }
}
