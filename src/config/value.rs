//! Values of options: how numbers and sizes are read, and how what is out of range is refused.

use std::ops::RangeInclusive;

use super::ConfigError;

/// Smallest and largest qcow2 cluster, in bytes.
pub(super) const CLUSTER_BYTES: RangeInclusive<u64> = 512..=2 << 20;

/// The largest virtual disk: host and guest offsets are signed on every interface below us.
pub(super) const DISK_BYTES_MAX: u64 = i64::MAX as u64 & !511;

pub(super) fn refuse(option: &'static str, given: &str, allowed: &'static str) -> ConfigError {
    ConfigError::Value {
        option,
        given: given.to_owned(),
        allowed,
    }
}

pub(super) fn number(
    option: &'static str,
    given: u32,
    range: RangeInclusive<u32>,
    allowed: &'static str,
) -> Result<u32, ConfigError> {
    if range.contains(&given) {
        return Ok(given);
    }
    Err(refuse(option, &given.to_string(), allowed))
}

/// Fits a number that was found in range into the type its user has.
pub(super) fn narrow<T, U>(
    option: &'static str,
    given: T,
    allowed: &'static str,
) -> Result<U, ConfigError>
where
    T: Copy + ToString,
    U: TryFrom<T>,
{
    match U::try_from(given) {
        Ok(narrow) => Ok(narrow),
        Err(_) => Err(refuse(option, &given.to_string(), allowed)),
    }
}

pub(super) fn size(
    option: &'static str,
    given: &str,
    range: RangeInclusive<u64>,
    allowed: &'static str,
) -> Result<u64, ConfigError> {
    parse_size(given)
        .filter(|bytes| range.contains(bytes))
        .ok_or_else(|| refuse(option, given, allowed))
}

pub(super) fn power_of_two(
    option: &'static str,
    given: &str,
    range: RangeInclusive<u64>,
    allowed: &'static str,
) -> Result<u64, ConfigError> {
    let bytes = size(option, given, range, allowed)?;
    if bytes.is_power_of_two() {
        Ok(bytes)
    } else {
        Err(refuse(option, given, allowed))
    }
}

/// Reads a size as QEMU's tools do: decimal with an optional suffix, with a fraction if the suffix
/// makes a unit larger than a byte; or hexadecimal with `0x`. Part of a byte is cut off.
fn parse_size(text: &str) -> Option<u64> {
    let only_digits = |digits: &str, radix| digits.chars().all(|digit| digit.is_digit(radix));
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return only_digits(digits, 16)
            .then(|| u64::from_str_radix(digits, 16).ok())
            .flatten();
    }
    let (digits, shift) = match text.bytes().last()?.to_ascii_lowercase() {
        b'b' => (&text[..text.len() - 1], 0),
        b'k' => (&text[..text.len() - 1], 10),
        b'm' => (&text[..text.len() - 1], 20),
        b'g' => (&text[..text.len() - 1], 30),
        b't' => (&text[..text.len() - 1], 40),
        b'p' => (&text[..text.len() - 1], 50),
        b'e' => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let (whole, fraction) = match digits.split_once('.') {
        Some((whole, fraction)) if shift > 0 && !fraction.is_empty() => (whole, fraction),
        Some(_) => return None,
        None => (digits, ""),
    };
    // Below 10^18 the products here stay far below 2^128.
    if whole.is_empty() || fraction.len() > 18 {
        return None;
    }
    if !only_digits(whole, 10) || !only_digits(fraction, 10) {
        return None;
    }
    let unit = 1u128 << shift;
    let whole = u128::from(whole.parse::<u64>().ok()?) * unit;
    let parts: u64 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    u64::try_from(whole + u128::from(parts) * unit / scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        let cases = [
            ("0", 0),
            ("513", 513),
            ("1b", 1),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("1.5k", 1536),
            ("1.3k", 1331),
            ("1M", 1 << 20),
            ("1G", 1 << 30),
            ("1T", 1 << 40),
            ("1P", 1 << 50),
            ("1E", 1 << 60),
            ("0x10", 16),
            ("18446744073709551615", u64::MAX),
        ];
        assert_eq!(
            cases.map(|(text, _)| parse_size(text)),
            cases.map(|(_, bytes)| Some(bytes))
        );
    }

    #[test]
    fn what_is_no_size_is_refused() {
        let cases = [
            "",
            "k",
            "-1",
            "+1",
            "1.3",
            "1.k",
            ".5k",
            "1kB",
            "1Q",
            "1e3",
            "1 k",
            "0x",
            "0x+1",
            "0xg",
            "16E",
            "18446744073709551616",
            "1.1.1k",
            "\u{664}",
            "1\u{e9}",
        ];
        assert_eq!(cases.map(parse_size), [None; 19]);
    }
}
