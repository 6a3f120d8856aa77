//! AVX2 with AVX-VNNI: products of bytes, added up in 32 bits (`vpdpbusd` on 256 bits), which Intel's CPUs without AVX-512 have from the
//! twelfth generation on.
//!
//! A partial level: attention over keys in int8 and in blocks at [`Precision::Integer`](super::api::Precision), with values of any
//! format. Only the scores are of this level; the rest of the kernel is AVX2's. Keys become unsigned as in [`avx512vnni`](super::avx512vnni).
//!
//! Never timed. With `--cfg kvlane_emulate_avxvnni` the instruction is emulated, and the level is available wherever AVX2 is.

use super::avx2::bytes::Bytes;
use super::avx2::{Avx2, shells};
use super::partial::{integer_kernels, with_features};

/// The kernels, compiled with the features of a level.
macro_rules! kernels {
    ($level:ident) => {
        integer_kernels!(AvxVnni, $level, Avx2, Bytes::<true>, floats 1e-5,
            Int8 "attention_int8_integer_avxvnni"
            Q8_0 "attention_q8_0_integer_avxvnni"
            Q4_0 "attention_q4_0_integer_avxvnni"
            Q4_1 "attention_q4_1_integer_avxvnni"
            Q5_0 "attention_q5_0_integer_avxvnni"
            Q5_1 "attention_q5_1_integer_avxvnni"
            Iq4Nl "attention_iq4_nl_integer_avxvnni"
        );
    };
}
#[cfg(not(kvlane_emulate_avxvnni))]
kernels!(AvxVnni);
#[cfg(kvlane_emulate_avxvnni)]
kernels!(Avx2);
