//! Parameters as the bytes that a kernel reads.

use super::*;

impl Params {
    /// The bytes the kernel reads, in the order of the header.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        match self {
            Params::Forward(p) => p.write(&mut out),
            Params::Backward(p) => p.write(&mut out),
            Params::Sm90Forward(p) => p.write(&mut out),
            Params::Sm90Backward(p) => p.write(&mut out),
            Params::Merge(p) => p.write(&mut out),
            Params::Round(p) => p.write(&mut out),
            Params::Gain(p) => p.write(&mut out),
        }
        out
    }
}

/// Appends fields in order. No struct has padding: u64s first, then an even number of u32s (asserted below).
macro_rules! write_fields {
    ($name:ident: matrices $($matrix:ident)*; words $($word:ident)*) => {
        impl $name {
            fn write(&self, out: &mut Vec<u8>) {
                $(out.extend(self.$matrix.ptr.to_ne_bytes());
                  out.extend(self.$matrix.row_stride.to_ne_bytes());)*
                $(out.extend(self.$word.to_ne_bytes());)*
            }
        }
        const _: () = assert!(size_of::<$name>() == 0 $(+ { let _ = stringify!($matrix); 16 })* $(+ write_fields!(@size $word))*);
    };
    // What not every call has comes last: dropout, routes, the gain, and in backward the magnitude.
    ($name:ident: matrices $($matrix:ident)*; words $($word:ident)*; variant $($magnitude:ident)?) => {
        impl $name {
            fn write(&self, out: &mut Vec<u8>) {
                $(out.extend(self.$matrix.ptr.to_ne_bytes());
                  out.extend(self.$matrix.row_stride.to_ne_bytes());)*
                $(out.extend(self.$word.to_ne_bytes());)*
                self.dropout.write(out);
                out.extend(self.routes.to_ne_bytes());
                out.extend(self.gain.to_ne_bytes());
                $(self.$magnitude.write(out);)?
            }
        }
        const _: () = assert!(size_of::<$name>() == size_of::<LoraDropout>() + 16
            $(+ { let _ = stringify!($magnitude); size_of::<LoraMagnitude>() })? $(+ { let _ = stringify!($matrix); 16 })*
            $(+ write_fields!(@size $word))*);
    };
    (@size seed) => { 8 };
    (@size offset) => { 8 };
    (@size state) => { 8 };
    (@size bias) => { 8 };
    (@size dbias) => { 8 };
    (@size partials) => { 8 };
    (@size sync) => { 8 };
    (@size magnitude) => { 8 };
    (@size dm) => { 8 };
    (@size earlier) => { 8 };
    (@size norm) => { 8 };
    (@size gain) => { 8 };
    (@size divisor) => { 8 };
    (@size $word:ident) => { 4 };
}

write_fields!(LoraDropout: matrices; words seed offset state threshold padding);
write_fields!(LoraMagnitude: matrices y; words bias magnitude dm);
write_fields!(LoraForwardParams: matrices x w a b h y;
    words bias sync m n k r scale m_blocks n_blocks h_units units group_m flag_shift sync_words; variant);
write_fields!(LoraBackwardParams: matrices dy w a b x h dh dx da db;
    words dbias partials sync m n k r scale m_blocks n_blocks k_blocks dh_units dx_end db_end units chunks chunk_rows
    partial_stride counters group_m flag_shift sync_words flags; variant magnitude);
write_fields!(LoraSm90ForwardParams: matrices h;
    words bias sync m n k r scale m_groups n_blocks r_blocks h_units h_tickets tickets group_m flag_shift sync_words; variant);
write_fields!(LoraSm90BackwardParams: matrices dh dx da db;
    words dbias partials sync m n k r scale m_groups n_groups k_groups k_blocks r_blocks dh_units dh_tickets
    dx_end db_end tickets chunks chunk_rows partial_stride counters group_m flag_shift sync_words flags padding; variant magnitude);
write_fields!(LoraMergeParams: matrices w a b merged; words gain n k r scale k_blocks flags);
write_fields!(LoraRoundParams: matrices a b rounded_a rounded_b;
    words divisor n k r scale a_units k_blocks r_blocks flags);
write_fields!(LoraGainParams: matrices w a b; words magnitude earlier norm gain n k r scale flags padding);
