//! The serial console: a 16550 at COM1 (ttyS0) on interrupt 4, with a bounded input queue.
//!
//! The UART is vm-superio's. Around it is a queue for input that does not fit its 64-byte FIFO;
//! the queue is refilled on the guest's own accesses and is part of the saved state, so that what
//! was typed before a migration is read after it.

use std::collections::VecDeque;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// The interrupt line of COM1.
pub(crate) const SERIAL_GSI: u32 = 4;

/// Most input bytes held for a guest that does not read. More is not taken.
pub(crate) const MAX_PENDING_INPUT: usize = 64 << 10;

/// Raises the interrupt line through an irqfd.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port's registers and unread input, as saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialSnapshot {
    registers: [u8; 9],
    fifo: Vec<u8>,
    pending: Vec<u8>,
}

impl SerialSnapshot {
    fn new(state: &SerialState, pending: Vec<u8>) -> Self {
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        Self { registers, fifo: state.in_buffer.clone(), pending }
    }

    fn uart(&self) -> SerialState {
        let [low, high, enable, identification, lcr, lsr, mcr, msr, scratch] = self.registers;
        SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: self.fifo.clone(),
        }
    }
}

/// The port.
pub(crate) struct SerialDevice {
    uart: Serial<Interrupt, NoEvents, Box<dyn Write + Send>>,
    pending: VecDeque<u8>,
}

impl SerialDevice {
    /// A port as after power-on, which writes the guest's output to `out`.
    pub(crate) fn new(interrupt: EventFd, out: Box<dyn Write + Send>) -> Self {
        Self { uart: Serial::new(Interrupt(interrupt), out), pending: VecDeque::new() }
    }

    /// A port as saved. Raises the interrupt if one was pending.
    ///
    /// Errors: a state with more input than the FIFO or the queue holds, or an interrupt line
    /// that cannot be raised.
    pub(crate) fn restore(
        state: &SerialSnapshot,
        interrupt: EventFd,
        out: Box<dyn Write + Send>,
    ) -> io::Result<Self> {
        if state.pending.len() > MAX_PENDING_INPUT {
            return Err(io::Error::other("more console input than the queue holds"));
        }
        let uart = Serial::from_state(&state.uart(), Interrupt(interrupt), NoEvents, out)
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { uart, pending: state.pending.iter().copied().collect() })
    }

    pub(crate) fn save(&self) -> SerialSnapshot {
        SerialSnapshot::new(&self.uart.state(), self.pending.iter().copied().collect())
    }

    /// Queues input for the guest; returns how many bytes there was room for.
    pub(crate) fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(MAX_PENDING_INPUT - self.pending.len());
        self.pending.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    pub(crate) fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.uart.write(register, value) {
            tracing::debug!(%error, "serial output lost");
        }
        self.refill();
    }

    pub(crate) fn read(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        self.refill();
        value
    }

    /// Moves queued input into the FIFO once that is empty, so that each refill interrupts.
    fn refill(&mut self) {
        if self.pending.is_empty() || self.uart.fifo_capacity() < FIFO_BYTES {
            return;
        }
        let chunk: Vec<u8> = self.pending.iter().take(FIFO_BYTES).copied().collect();
        match self.uart.enqueue_raw_bytes(&chunk) {
            Ok(taken) => drop(self.pending.drain(..taken)),
            Err(error) => tracing::debug!(%error, "serial input waits"),
        }
    }
}

/// The UART's FIFO, all free.
const FIFO_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> SerialDevice {
        SerialDevice::new(EventFd::new(0).unwrap(), Box::new(io::sink()))
    }

    #[test]
    fn long_input_is_read_whole_and_in_order_across_a_save() {
        let text: Vec<u8> = (0..200).map(|n| b'a' + n % 26).collect();
        let mut serial = device();
        assert_eq!(serial.input(&text), text.len());
        let mut seen: Vec<u8> = (0..30).map(|_| serial.read(0)).collect();
        let state = serial.save();
        let mut serial =
            SerialDevice::restore(&state, EventFd::new(0).unwrap(), Box::new(io::sink())).unwrap();
        assert_eq!(serial.save(), state);
        while serial.read(5) & 1 == 1 {
            seen.push(serial.read(0));
        }
        assert_eq!(seen, text);
    }

    #[test]
    fn input_is_bounded() {
        let mut serial = device();
        let flood = vec![b'x'; MAX_PENDING_INPUT * 2];
        assert!(serial.input(&flood) < flood.len());
        let mut state = serial.save();
        state.fifo = vec![0; 65];
        assert!(SerialDevice::restore(&state, EventFd::new(0).unwrap(), Box::new(io::sink())).is_err());
    }
}
