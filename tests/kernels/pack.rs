//! Values in pairs of slots: every bit in its place, and no other byte changed.

use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, scaled};
use crate::harness::{Level, tests};
use crate::write::{Write, random_tensor};
use kvlane::{DType, Destination, Op, Packing, Serial, pack_row_pairs, unpack_row_pairs};

tests! {
    levels: there_and_back, a_write_packs_as_packing_does;
    once:;
}

fn there_and_back(level: &Level) {
    let mut rng = Rng::new(96);
    for round in 0..scaled(60) {
        let dtype = DType::ALL[round % 3];
        let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
        let shape = [rng.between(1, 3), rng.between(0, 40), rng.between(1, 3), rng.between(1, 300)];
        let [batch, n, heads, dim] = shape;
        let layouts = [(); 3].map(|()| Layout::random(&mut rng));
        let v = random_tensor(&mut rng, dtype, shape, layouts[0], place);
        let mut packed = Tensor::output(dtype, [batch, n.div_ceil(2), heads, 2 * dim], layouts[1], place);
        let untouched = Tensor::output(dtype, [1; 4], Layout::BSHD, Place::Heap).bits([0; 4]);
        pack_row_pairs(&level.context, &Serial, v.view(), packed.view_mut()).expect("a valid call");
        level.checked(Op::KvWrite, dtype, dtype);
        for at in indices(packed.shape) {
            let token = 2 * at[1] + at[3] % 2;
            let wanted = if token < n { v.bits([at[0], token, at[2], at[3] / 2]) } else { untouched };
            assert_eq!(packed.bits(at), wanted, "{dtype} {shape:?} {at:?}");
        }
        packed.assert_gaps();
        let mut back = Tensor::output(dtype, shape, layouts[2], place);
        unpack_row_pairs(&level.context, &Serial, packed.view(), back.view_mut()).expect("a valid call");
        assert_eq!(back.all_bits(), v.all_bits(), "{dtype} {shape:?}");
        back.assert_gaps();
    }
}

/// Writing into a packed cache gives the bits of writing into a plain cache and packing it.
fn a_write_packs_as_packing_does(level: &Level) {
    let mut rng = Rng::new(97);
    for src in DType::ALL {
        for dst in DType::ALL {
            let layout = Layout::random(&mut rng);
            let dim = rng.pick(&[33, 7, 128, 2 * 16 + 5]);
            let (k, v) = ([2, 7, 3, 5], [2, 7, 3, dim]);
            let mut write = Write {
                k: random_tensor(&mut rng, src, k, Layout::BSHD, Place::Heap),
                v: random_tensor(&mut rng, src, v, layout, Place::Heap),
                k_cache: Tensor::output(dst, [2, 10, 3, 5], Layout::BSHD, Place::Heap),
                v_cache: Tensor::output(dst, [2, 10, 3, dim], Layout::BSHD, Place::Heap),
                v_packing: Packing::Rows,
            };
            let to = Destination::positions(&[3, 0]);
            write.check(level, to);
            let mut packed = Tensor::output(dst, [2, 5, 3, 2 * dim], Layout::BSHD, Place::Heap);
            pack_row_pairs(&level.context, &Serial, write.v_cache.view(), packed.view_mut()).expect("a valid call");
            write.v_cache = Tensor::output(dst, [2, 5, 3, 2 * dim], Layout::PADDED, Place::GuardAfter);
            write.v_packing = Packing::RowPairs;
            write.check(level, to);
            assert_eq!(write.v_cache.all_bits(), packed.all_bits(), "{src} {dst}");
        }
    }
}
