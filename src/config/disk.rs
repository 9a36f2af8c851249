//! The disk that the guest sees: its blocks, names and virtqueues.

use super::ConfigError;
use super::value::{narrow, number, power_of_two, refuse};
use crate::args::ServeArgs;

/// The most virtqueues: the framework keeps sets of them in 64-bit masks.
pub const QUEUE_COUNT_MAX: u32 = u64::BITS;

/// The largest virtqueue that virtio 1.x allows, in descriptors.
pub const QUEUE_SIZE_MAX: u32 = 1 << 15;

/// Length of the serial number in virtio-blk, in bytes.
pub const SERIAL_BYTES_MAX: usize = 20;

/// Length of a QEMU node name, in bytes.
pub const ID_BYTES_MAX: usize = 31;

/// Smallest and largest logical block, in bytes.
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 512..=64 << 10;

/// The disk that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Logical block size.
    pub block_bytes: u32,
    /// Serial number, at most [`SERIAL_BYTES_MAX`] bytes; empty for none.
    pub serial: String,
    /// Name on the control socket.
    pub id: String,
    /// Virtqueues offered, at most [`QUEUE_COUNT_MAX`].
    pub queue_count: u16,
    /// Largest virtqueue accepted, at most [`QUEUE_SIZE_MAX`].
    pub queue_size_max: u16,
}

pub(super) fn disk(args: &ServeArgs) -> Result<DiskConfig, ConfigError> {
    const BLOCK_ALLOWED: &str = "a power of two from 512 to 64k";
    const QUEUE_SIZE_ALLOWED: &str = "a power of two from 2 to 32768";
    let block_bytes = power_of_two("--block-size", &args.block_size, BLOCK_BYTES, BLOCK_ALLOWED)?;
    let queue_count = number(
        "--num-queues",
        args.num_queues,
        1..=QUEUE_COUNT_MAX,
        "a number from 1 to 64",
    )?;
    let queue_size = number(
        "--queue-size",
        args.queue_size,
        2..=QUEUE_SIZE_MAX,
        QUEUE_SIZE_ALLOWED,
    )?;
    if !queue_size.is_power_of_two() {
        return Err(refuse(
            "--queue-size",
            &queue_size.to_string(),
            QUEUE_SIZE_ALLOWED,
        ));
    }
    Ok(DiskConfig {
        block_bytes: narrow("--block-size", block_bytes, BLOCK_ALLOWED)?,
        serial: serial(args.serial.as_deref().unwrap_or_default())?,
        id: id(&args.id)?,
        queue_count: narrow("--num-queues", queue_count, "a number from 1 to 64")?,
        queue_size_max: narrow("--queue-size", queue_size, QUEUE_SIZE_ALLOWED)?,
    })
}

fn serial(given: &str) -> Result<String, ConfigError> {
    let is_printable = given
        .bytes()
        .all(|byte| byte == b' ' || byte.is_ascii_graphic());
    if given.len() > SERIAL_BYTES_MAX || !is_printable {
        return Err(refuse(
            "--serial",
            given,
            "up to 20 printable ASCII characters",
        ));
    }
    Ok(given.to_owned())
}

fn id(given: &str) -> Result<String, ConfigError> {
    let starts_well = given.starts_with(|first: char| first.is_ascii_alphabetic());
    let goes_on_well = given
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if given.len() > ID_BYTES_MAX || !starts_well || !goes_on_well {
        let allowed = "up to 31 letters, digits, '-', '.' or '_', the first one a letter";
        return Err(refuse("--id", given, allowed));
    }
    Ok(given.to_owned())
}

#[cfg(test)]
mod tests {
    use crate::config::tests::accepted;

    #[test]
    fn a_serial_has_at_most_20_printable_characters() {
        let values = [
            "12345678901234567890",
            "123456789012345678901",
            "caf\u{e9}",
            "\u{7f}",
        ];
        assert_eq!(accepted("--serial", &values), [true, false, false, false]);
    }

    #[test]
    fn an_id_is_one_that_qemu_takes() {
        let longest = "a".repeat(31);
        let too_long = "a".repeat(32);
        let values = [
            longest.as_str(),
            "a-b_c.1",
            too_long.as_str(),
            "1a",
            "a/b",
            "#block0",
        ];
        assert_eq!(
            accepted("--id", &values),
            [true, true, false, false, false, false]
        );
    }
}
