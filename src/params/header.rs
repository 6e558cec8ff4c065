//! The header that the kernels include, as bindgen reads it, against the structs here.

include!(concat!(env!("OUT_DIR"), "/params.rs"));

/// Same size and same offset of every field as in the header.
macro_rules! same_layout {
    ($name:ident: $($field:ident)*) => {
        assert!(size_of::<super::$name>() == size_of::<$name>());
        $(assert!(core::mem::offset_of!(super::$name, $field) == core::mem::offset_of!($name, $field));)*
    };
}

const _: () = {
    same_layout!(LoraMatrix: ptr row_stride);
    same_layout!(LoraDropout: seed offset state threshold padding);
    same_layout!(LoraMagnitude: y bias magnitude dm);
    same_layout!(LoraSplit: a b pairs split_a split_b split_a_stride split_b_stride ranks r a_units units tickets);
    same_layout!(LoraForwardProjection: w b y bias gain n r first_rank first_block scale padding);
    same_layout!(LoraForwardParams: x a h sync m k r projection_count m_blocks n_blocks h_units units group_m
        flag_shift sync_words padding dropout routes split projections);
    same_layout!(LoraBackwardProjection: dy w b db magnitude dbias gain n r first_rank n_blocks first_step first_narrow
        first_db_tile flags scale padding);
    same_layout!(LoraBackwardParams: a x h dh dx da partials sync m k r projection_count n_steps m_blocks k_blocks
        dh_units dx_end db_end units chunks chunk_rows partial_stride counters group_m flag_shift sync_words flags
        padding dropout routes split projections);
    same_layout!(LoraSm90ForwardProjection: bias gain n r first_rank first_block scale padding);
    same_layout!(LoraSm90ForwardParams: h sync m k r projection_count m_groups n_blocks r_blocks h_units h_tickets
        tickets group_m flag_shift sync_words padding dropout routes split projections);
    same_layout!(LoraSm90BackwardProjection: db magnitude dbias gain n r first_rank n_groups first_narrow first_db_tile flags
        scale);
    same_layout!(LoraSm90BackwardParams: dh dx da partials sync m k r most_r projection_count n_steps m_groups
        k_groups k_blocks dh_blocks dh_units dh_tickets dx_end db_end tickets chunks chunk_rows partial_stride
        counters group_m flag_shift sync_words flags padding dropout routes split projections);
    same_layout!(LoraMergeParams: w a b merged gain n k r scale k_blocks flags);
    same_layout!(LoraRoundParams: a b rounded_a rounded_b divisor n k r scale a_units k_blocks r_blocks flags);
    same_layout!(LoraGainParams: w a b magnitude earlier norm gain n k r scale flags padding);
};

/// A block as `Launch::parameter_bytes` lays it out: maps, fields, and padding to whole 128 bytes.
macro_rules! same_block {
    ($name:ident: $fields:ident after $maps:ident) => {
        assert!(core::mem::offset_of!($name, params) == $maps as usize * super::MAP_BYTES);
        assert!(
            size_of::<$name>()
                == (core::mem::offset_of!($name, params) + size_of::<super::$fields>())
                    .next_multiple_of(super::MAP_ALIGN)
        );
        assert!(align_of::<$name>() == super::MAP_ALIGN);
    };
}

const _: () = {
    same_block!(LoraSm90Forward: LoraSm90ForwardParams after LORA_SM90_FORWARD_MAPS);
    same_block!(LoraSm90Backward: LoraSm90BackwardParams after LORA_SM90_BACKWARD_MAPS);
};
