//! The state of vCPUs and devices on its way: at either side it passes between the thread in which a VMM saves or loads
//! it and the control connection, in pieces, so that the destination loads while the source still saves.

use std::io::{self, BufWriter, ErrorKind, Read, Write};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

use super::message::{MAX_STATE, STATE_PIECE};

/// Pieces that wait to be sent. What saves waits for the connection.
const TO_SEND: usize = 4;

/// A way from a VMM that saves to the connection.
pub(super) fn outgoing() -> (BufWriter<Outgoing>, mpsc::Receiver<Bytes>) {
    let (pieces, sent) = mpsc::channel(TO_SEND);
    (BufWriter::with_capacity(STATE_PIECE, Outgoing { pieces, length: 0 }), sent)
}

/// Where a source's VMM writes, piece by piece.
pub(super) struct Outgoing {
    pieces: mpsc::Sender<Bytes>,
    length: usize,
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(STATE_PIECE)];
        if self.length + piece.len() > MAX_STATE {
            let limit = MAX_STATE >> 20;
            let said = format!(
                "it is longer than {limit} MiB: does the VMM copy memory of a large device in it, a display's?"
            );
            return Err(io::Error::other(said));
        }
        let gone = |_| io::Error::new(ErrorKind::BrokenPipe, "the destination takes no more of it");
        self.pieces.blocking_send(Bytes::copy_from_slice(piece)).map_err(gone)?;
        self.length += piece.len();
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What has come of the state.
pub(super) enum Came {
    Piece(Bytes),
    /// All of it has.
    End,
}

/// A way from the connection to a VMM that loads. It holds all that has come: loading may wait for memory, which
/// comes only when the connection is heard further.
pub(super) fn incoming() -> (mpsc::UnboundedSender<Came>, Loading) {
    let (pieces, came) = mpsc::unbounded_channel();
    (pieces, Loading { came, piece: Bytes::new(), ended: false })
}

/// Where a destination's VMM reads.
pub(super) struct Loading {
    came: mpsc::UnboundedReceiver<Came>,
    piece: Bytes,
    ended: bool,
}

impl Read for Loading {
    /// Errors: the rest does not come.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.came.blocking_recv() {
                Some(Came::Piece(piece)) => self.piece = piece,
                Some(Came::End) => self.ended = true,
                None => return Err(io::Error::new(ErrorKind::UnexpectedEof, "the rest of it did not come")),
            }
        }
        let taken = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..taken]);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_come_whole_is_no_state() {
        let (pieces, mut state) = incoming();
        let piece =
            |bytes: &'static [u8]| assert!(pieces.send(Came::Piece(Bytes::from_static(bytes))).is_ok());
        piece(b"sta");
        piece(b"");
        piece(b"te");
        let mut read = vec![0; 5];
        state.read_exact(&mut read).unwrap();
        assert_eq!(read, b"state");
        drop(pieces);
        assert_eq!(state.read(&mut read).unwrap_err().kind(), ErrorKind::UnexpectedEof);

        let (pieces, mut state) = incoming();
        assert!(
            pieces.send(Came::Piece(Bytes::from_static(b"state"))).is_ok() && pieces.send(Came::End).is_ok()
        );
        drop(pieces);
        let mut read = Vec::new();
        assert_eq!((state.read_to_end(&mut read).unwrap(), &*read), (5, &b"state"[..]));
    }

    #[test]
    fn who_saves_hears_that_nobody_takes_it_and_that_it_is_too_long() {
        let (mut saving, sent) = outgoing();
        drop(sent);
        saving.write_all(&[0; 2 * STATE_PIECE]).unwrap_err();

        let (mut saving, mut sent) = outgoing();
        let taken = std::thread::spawn(move || {
            let mut taken = 0;
            while let Some(piece) = sent.blocking_recv() {
                assert!(piece.len() <= STATE_PIECE);
                taken += piece.len();
            }
            taken
        });
        let piece = vec![7; MAX_STATE / 2];
        saving.write_all(&piece).unwrap();
        saving.write_all(&piece).unwrap();
        let said = saving.write_all(&[7; 2 * STATE_PIECE]).unwrap_err().to_string();
        assert!(said.contains("longer than"), "{said}");
        drop(saving);
        assert_eq!(taken.join().unwrap(), MAX_STATE);
    }
}
