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
    ($name:ident: matrices $($matrix:ident)*; $(magnitude $magnitude:ident;)? words $($word:ident)*) => {
        impl $name {
            fn write(&self, out: &mut Vec<u8>) {
                $(out.extend(self.$matrix.ptr.to_ne_bytes());
                  out.extend(self.$matrix.row_stride.to_ne_bytes());)*
                $(self.$magnitude.write(out);)?
                $(out.extend(self.$word.to_ne_bytes());)*
            }
        }
        const _: () = assert!(size_of::<$name>() == 0 $(+ { let _ = stringify!($matrix); 16 })*
            $(+ { let _ = stringify!($magnitude); size_of::<LoraMagnitude>() })? $(+ write_fields!(@size $word))*);
    };
    // Dropout, routes, split factors and projections come last, in structs that have them.
    ($name:ident: matrices $($matrix:ident)*; words $($word:ident)*; variant, projections $projection:ident) => {
        impl $name {
            fn write(&self, out: &mut Vec<u8>) {
                $(out.extend(self.$matrix.ptr.to_ne_bytes());
                  out.extend(self.$matrix.row_stride.to_ne_bytes());)*
                $(out.extend(self.$word.to_ne_bytes());)*
                self.dropout.write(out);
                out.extend(self.routes.to_ne_bytes());
                self.split.write(out);
                self.projections.iter().for_each(|projection| projection.write(out));
            }
        }
        const _: () = assert!(size_of::<$name>() == size_of::<LoraDropout>() + 8 + size_of::<LoraSplit>()
            + LORA_MAX_PROJECTIONS as usize * size_of::<$projection>()
            $(+ { let _ = stringify!($matrix); 16 })* $(+ write_fields!(@size $word))*);
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

impl LoraSplit {
    fn write(&self, out: &mut Vec<u8>) {
        for matrix in [self.a].iter().chain(&self.b).chain([&self.pairs]) {
            out.extend(matrix.ptr.to_ne_bytes());
            out.extend(matrix.row_stride.to_ne_bytes());
        }
        [self.split_a, self.split_b].iter().for_each(|word| out.extend(word.to_ne_bytes()));
        let words = [self.split_a_stride, self.split_b_stride].into_iter().chain(self.ranks);
        let words = words.chain([self.r, self.a_units, self.units, self.tickets]);
        words.for_each(|word| out.extend(word.to_ne_bytes()));
    }
}
const _: () = assert!(
    size_of::<LoraSplit>()
        == (2 + LORA_MAX_PROJECTIONS as usize) * 16 + 2 * 8 + (6 + LORA_MAX_PROJECTIONS as usize) * 4
);

write_fields!(LoraForwardProjection: matrices w b y; words bias gain n r first_rank first_block scale padding);
write_fields!(LoraForwardParams: matrices x a h;
    words sync m k r projection_count m_blocks n_blocks h_units units group_m flag_shift sync_words padding;
    variant, projections LoraForwardProjection);
write_fields!(LoraBackwardProjection: matrices dy w b db; magnitude magnitude;
    words dbias gain n r first_rank n_blocks first_step first_narrow first_db_tile flags scale padding);
write_fields!(LoraBackwardParams: matrices a x h dh dx da;
    words partials sync m k r projection_count n_steps m_blocks k_blocks dh_units dx_end db_end units chunks chunk_rows
    partial_stride counters group_m flag_shift sync_words flags padding; variant, projections LoraBackwardProjection);
write_fields!(LoraSm90ForwardProjection: matrices; words bias gain n r first_rank first_block scale padding);
write_fields!(LoraSm90ForwardParams: matrices h;
    words sync m k r projection_count m_groups n_blocks r_blocks h_units h_tickets tickets group_m flag_shift sync_words
    padding; variant, projections LoraSm90ForwardProjection);
write_fields!(LoraSm90BackwardProjection: matrices db; magnitude magnitude;
    words dbias gain n r first_rank n_groups first_narrow first_db_tile flags scale);
write_fields!(LoraSm90BackwardParams: matrices dh dx da;
    words partials sync m k r most_r projection_count n_steps m_groups k_groups k_blocks dh_blocks dh_units dh_tickets
    dx_end db_end tickets chunks chunk_rows partial_stride counters group_m flag_shift sync_words flags padding;
    variant, projections LoraSm90BackwardProjection);
write_fields!(LoraMergeParams: matrices w a b merged; words gain n k r scale k_blocks flags);
write_fields!(LoraRoundParams: matrices a b rounded_a rounded_b;
    words divisor n k r scale a_units k_blocks r_blocks flags);
write_fields!(LoraGainParams: matrices w a b; words magnitude earlier norm gain n k r scale flags padding);
