//! Completion tokens: what kind in the top bits, then kind-specific.

const KIND_SHIFT: u32 = 56;
const SLOT_SHIFT: u32 = 32;
const KIND_REQUEST: u64 = 1;
const KIND_KICK: u64 = 2;
const KIND_DOORBELL: u64 = 3;

/// What a completion is about.
pub(super) enum Token {
    /// An operation of a request slot that should have moved `len` bytes.
    Request { slot: u32, len: u32 },
    /// A vring's kick descriptor was read.
    Kick { position: usize },
    /// The doorbell was read.
    Doorbell,
}

pub(super) fn request(slot: u32, len: u32) -> u64 {
    KIND_REQUEST << KIND_SHIFT | u64::from(slot) << SLOT_SHIFT | u64::from(len)
}

pub(super) fn kick(position: usize) -> u64 {
    KIND_KICK << KIND_SHIFT | position as u64
}

pub(super) const DOORBELL: u64 = KIND_DOORBELL << KIND_SHIFT;

#[expect(
    clippy::cast_possible_truncation,
    reason = "takes the fields apart again"
)]
pub(super) fn decode(token: u64) -> Token {
    match token >> KIND_SHIFT {
        KIND_REQUEST => Token::Request {
            slot: (token >> SLOT_SHIFT) as u32 & 0x00ff_ffff,
            len: token as u32,
        },
        KIND_KICK => Token::Kick {
            position: token as u32 as usize,
        },
        _ => Token::Doorbell,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were_made() {
        assert!(matches!(
            decode(request(255, 1 << 30)),
            Token::Request { slot: 255, len } if len == 1 << 30
        ));
        assert!(matches!(decode(kick(63)), Token::Kick { position: 63 }));
        assert!(matches!(decode(DOORBELL), Token::Doorbell));
    }
}
