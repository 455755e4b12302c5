//! The enums of the contract and of the domain, word for word: a word that one of them lacks does not compile.

use crate::domain::call::{Channel, ClickIdKind, Direction, MatchMethod, ReviewStatus, Status};
use crate::grpc::proto;

/// An enum of the domain that the wire has, too.
pub(super) trait Word: Copy {
    type Wire: TryFrom<i32> + Into<i32>;

    /// None for the unspecified word.
    fn of(wire: Self::Wire) -> Option<Self>;

    fn wire(self) -> Self::Wire;
}

/// The number is no word of the enum: its sender is newer than this server, or wrong.
pub(super) struct Unknown;

/// What a number on the wire says; none for the unspecified word.
pub(super) fn read<W: Word>(number: i32) -> Result<Option<W>, Unknown> {
    W::Wire::try_from(number).map(W::of).map_err(|_| Unknown)
}

/// The number that says it on the wire.
pub(super) fn number<W: Word>(word: W) -> i32 {
    word.wire().into()
}

macro_rules! words {
    ($($wire:ident = $domain:ident { $($word:ident),* })*) => {$(
        impl Word for $domain {
            type Wire = proto::$wire;

            fn of(wire: proto::$wire) -> Option<Self> {
                match wire {
                    proto::$wire::Unspecified => None,
                    $(proto::$wire::$word => Some(Self::$word),)*
                }
            }

            fn wire(self) -> proto::$wire {
                match self {
                    $(Self::$word => proto::$wire::$word,)*
                }
            }
        }
    )*};
}

words! {
    CallChannel = Channel { Phone, Whatsapp }
    CallDirection = Direction { Inbound, Outbound }
    CallStatus = Status { Ringing, InProgress, Failed, Busy, NoAnswer, Voicemail, Completed }
    MatchMethod = MatchMethod { Unmatched, Ambiguous, Click, Fingerprint }
    ReviewStatus = ReviewStatus { Open, Confirmed, Junk }
    ClickIdKind = ClickIdKind { Gclid, Wbraid, Gbraid, Gclsrc, Dclid, Fbclid, Ttclid, Msclkid }
}
