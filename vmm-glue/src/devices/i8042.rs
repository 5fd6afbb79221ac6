//! As much of a keyboard controller as a kernel needs to find one, and to reset the machine.
//!
//! No keyboard and no mouse are attached. Commands that answer with a byte do so at once; all
//! others are taken and forgotten.

use serde::{Deserialize, Serialize};

use super::BusEvent;

pub(crate) const DATA: u16 = 0x60;
pub(crate) const COMMAND: u16 = 0x64;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;

const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const SELF_TEST: u8 = 0xaa;
const SELF_TEST_PASSED: u8 = 0x55;
const PULSE_RESET: u8 = 0xfe;

/// The controller, which is its own saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct I8042 {
    control: u8,
    output: Option<u8>,
    expects_control: bool,
}

impl I8042 {
    pub(super) fn write(&mut self, port: u16, value: u8) -> BusEvent {
        if port == DATA {
            if std::mem::take(&mut self.expects_control) {
                self.control = value;
            }
            return BusEvent::None;
        }
        match value {
            READ_CONTROL => self.output = Some(self.control),
            WRITE_CONTROL => self.expects_control = true,
            SELF_TEST => self.output = Some(SELF_TEST_PASSED),
            PULSE_RESET => return BusEvent::Reset,
            _ => {}
        }
        BusEvent::None
    }

    pub(super) fn read(&mut self, port: u16) -> u8 {
        match port {
            DATA => self.output.take().unwrap_or(0),
            _ if self.output.is_some() => STATUS_SYSTEM | STATUS_OUTPUT_FULL,
            _ => STATUS_SYSTEM,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_byte_is_kept_and_reset_is_an_event() {
        let mut controller = I8042::default();
        assert_eq!(controller.write(COMMAND, WRITE_CONTROL), BusEvent::None);
        assert_eq!(controller.write(DATA, 0x47), BusEvent::None);
        controller.write(COMMAND, READ_CONTROL);
        assert_eq!(controller.read(COMMAND) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        assert_eq!(controller.read(DATA), 0x47);
        assert_eq!(controller.read(COMMAND) & STATUS_OUTPUT_FULL, 0);
        assert_eq!(controller.write(COMMAND, PULSE_RESET), BusEvent::Reset);
    }
}
