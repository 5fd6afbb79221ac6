//! The devices that this VMM emulates itself, and the port bus that finds them.
//!
//! Interrupt controllers and the timer are in the kernel; here are a serial port and what is
//! needed of a keyboard controller to reset the machine. Ports that nobody answers read as ones.

pub(crate) mod i8042;
pub(crate) mod serial;

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use i8042::I8042;
use serial::{SerialDevice, SerialSnapshot};

const COM1: u16 = 0x3f8;
const COM1_LAST: u16 = COM1 + 7;

/// What the guest asked the VMM for by a port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BusEvent {
    None,
    Reset,
}

/// State of all devices here, as saved.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DeviceState {
    pub(crate) serial: SerialSnapshot,
    pub(crate) i8042: I8042,
}

/// The port bus.
pub(crate) struct Devices {
    serial: Mutex<SerialDevice>,
    i8042: Mutex<I8042>,
}

impl Devices {
    pub(crate) fn new(serial: SerialDevice, i8042: I8042) -> Self {
        Self { serial: Mutex::new(serial), i8042: Mutex::new(i8042) }
    }

    pub(crate) fn serial(&self) -> MutexGuard<'_, SerialDevice> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn i8042(&self) -> MutexGuard<'_, I8042> {
        self.i8042.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest wrote `data` to `port`.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> BusEvent {
        match port {
            COM1..=COM1_LAST => {
                let mut serial = self.serial();
                data.iter().for_each(|byte| serial.write((port - COM1) as u8, *byte));
                BusEvent::None
            }
            i8042::DATA | i8042::COMMAND => match data {
                [value] => self.i8042().write(port, *value),
                _ => BusEvent::None,
            },
            _ => BusEvent::None,
        }
    }

    /// The guest reads `data` from `port`.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        match port {
            COM1..=COM1_LAST => {
                let mut serial = self.serial();
                data.iter_mut().for_each(|byte| *byte = serial.read((port - COM1) as u8));
            }
            i8042::DATA | i8042::COMMAND => data.fill(self.i8042().read(port)),
            _ => data.fill(0xff),
        }
    }

    pub(crate) fn save(&self) -> DeviceState {
        DeviceState { serial: self.serial().save(), i8042: self.i8042().clone() }
    }
}
