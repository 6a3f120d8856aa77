//! Every error has a code and a sentence with the argument and both numbers, and nothing has been written.

use crate::common::attention::{Case, MaskTensor, Shape};
use crate::common::runners::Broken;
use crate::common::{Layout, Place, Rng, Tensor};
use crate::harness::tests;
use crate::write::Write;
use kvlane::{Layout as Slots, *};

tests! {
    levels: ;
    once: views, masks, attention_shapes, attention_options, attention_overlap, write_destinations, write_layouts,
        write_packings, write_norms, write_shapes, rope_options, norm_options, pack_shapes, repeat_shapes, merge_shapes, runners, contexts, status_values;
}

#[track_caller]
fn assert_error<T>(result: Result<T>, status: Status, pieces: &[&str]) {
    let Err(error) = result else { panic!("no error, but should be {status:?} {pieces:?}") };
    assert_eq!(error.status(), status, "{error}");
    for piece in pieces {
        assert!(error.message().contains(piece), "{error}: does not say {piece:?}");
    }
    assert_eq!(error.to_string(), format!("{}: {}", status.description(), error.message()));
}

fn context() -> Context {
    Context::new().expect("a context")
}

fn views() {
    let mut data = [0f32; 24];
    assert_error(View::new(&data, [1, 2, 3, 5]), Status::Bounds, &["[1, 2, 3, 5]", "element 30", "24"]);
    assert_error(View::strided(&data, 25, [1; 4], [0; 4]), Status::Bounds, &["offset 25", "24"]);
    assert_error(
        View::strided(&data, 3, [1, 1, 1, 5], [0, 0, 0, -1]),
        Status::Bounds,
        &["-1", "offset 3", "1 elements before"],
    );
    let span = View::strided(&data, 0, [2; 4], [i64::MAX, i64::MAX, i64::MIN, 1]);
    assert_error(span, Status::Stride, &["[2, 2, 2, 2]", "address space"]);
    assert_error(View::new(&data, [1 << 31, 1, 1, 0]), Status::Shape, &["axis 0", "2147483648", "2147483647"]);
    assert_error(
        ViewMut::strided(&mut data, 0, [2, 1, 1, 4], [3, 0, 0, 1]),
        Status::Stride,
        &["[2, 1, 1, 4]", "[3, 0, 0, 1]"],
    );
    assert_error(ViewMut::strided(&mut data, 0, [2, 1, 1, 1], [0; 4]), Status::Stride, &["share memory"]);
    let view = View::new(&data, [1, 2, 3, 4]).unwrap();
    assert_error(view.heads(2, 2), Status::Shape, &["2 + 2", "heads", "3"]);
    assert_error(view.seq(3, 0), Status::Shape, &["3 + 0", "seq", "2"]);
    assert_error(view.batch(usize::MAX, 2), Status::Shape, &["batch", "1"]);
    // A shape without elements touches no memory, whatever its offset.
    assert!(View::strided(&data, 24, [0, 1 << 30, 1 << 30, 1 << 30], [i64::MAX; 4]).is_ok());
}

fn masks() {
    let data = [true; 12];
    assert_error(Mask::new(&data, [1, 2, 1, 7]), Status::Bounds, &["mask", "[1, 2, 1, 7]", "12"]);
    assert_error(Mask::strided(&data, 13, [1; 4], [0; 4]), Status::Bounds, &["mask", "13", "12"]);
    assert_error(Mask::strided(&data, 2, [1, 1, 1, 4], [0, 0, 0, -1]), Status::Bounds, &["mask", "offset 2"]);
    assert_error(Mask::strided(&data, 0, [3; 4], [i64::MAX; 4]), Status::Stride, &["mask", "address space"]);
    assert_error(Mask::new(&data, [1, 1 << 31, 1, 1]), Status::Shape, &["mask", "axis 1", "2147483648"]);
}

/// A valid call, changed.
#[track_caller]
fn attention_fails(change: impl FnOnce(&mut Case), status: Status, pieces: &[&str]) {
    let shape = Shape { batch: 2, tokens: 3, kv_heads: 2, group: 2, keys: 10, dim: 8, v_dim: 6 };
    let mut case = Case::new(&mut Rng::new(70), shape, DType::F32);
    change(&mut case);
    // `run_with` checks that the output is untouched.
    assert_error(case.run_with(&context(), &Serial).map(|_| ()), status, pieces);
}

fn tensor(dtype: DType, shape: [usize; 4]) -> Tensor {
    Tensor::random(&mut Rng::new(71), dtype, shape, Layout::BSHD, Place::Heap)
}

fn attention_shapes() {
    use Status::Shape;
    let f32s = |shape| tensor(DType::F32, shape);
    attention_fails(|c| c.k = f32s([3, 10, 2, 8]), Shape, &["k has batch = 3", "q has 2"]);
    attention_fails(|c| c.k = f32s([2, 10, 2, 7]), Shape, &["k has dim = 7", "q has 8"]);
    attention_fails(|c| c.v = f32s([1, 10, 2, 6]), Shape, &["v has batch = 1", "k has 2"]);
    attention_fails(|c| c.v = f32s([2, 11, 2, 6]), Shape, &["v has seq = 11", "k has 10"]);
    attention_fails(|c| c.v = f32s([2, 10, 1, 6]), Shape, &["v has heads = 1", "k has 2"]);
    attention_fails(|c| c.q = f32s([2, 3, 5, 8]), Shape, &["q has 5 heads", "2 of k"]);
    attention_fails(|c| (c.k, c.v) = (f32s([2, 10, 0, 8]), f32s([2, 10, 0, 6])), Shape, &["q has 4 heads", "0 of k"]);
    attention_fails(
        |c| (c.q, c.k) = (f32s([2, 3, 4, 1025]), f32s([2, 10, 2, 1025])),
        Shape,
        &["k has dim = 1025", "1024"],
    );
    attention_fails(|c| (c.q, c.k) = (f32s([2, 3, 4, 0]), f32s([2, 10, 2, 0])), Shape, &["k has dim = 0", "1"]);
    attention_fails(|c| c.v = f32s([2, 10, 2, 1100]), Shape, &["v has dim = 1100", "1024"]);

    // Output and LSE of the wrong shape.
    let (q, k, v) = (f32s([1, 2, 2, 8]), f32s([1, 5, 1, 8]), f32s([1, 5, 1, 6]));
    for (shape, lse, pieces) in [
        ([1, 2, 2, 7], 4, ["out has dim = 7", "v has 6"]),
        ([1, 3, 2, 6], 4, ["out has seq = 3", "q has 2"]),
        ([2, 2, 2, 6], 4, ["out has batch = 2", "q has 1"]),
        ([1, 2, 1, 6], 4, ["out has heads = 1", "q has 2"]),
        ([1, 2, 2, 6], 5, ["lse has 5 entries", "q has 4 rows"]),
    ] {
        let mut out = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
        let mut lse = vec![7.0; lse];
        let tensors = AttentionTensors::new(q.view(), k.view(), v.view(), out.view_mut()).lse(&mut lse);
        let done = attention(&context(), &Serial, &mut Workspace::new(), tensors, &AttentionOptions::default());
        assert_error(done, Shape, &pieces);
        out.assert_untouched();
        assert!(lse.iter().all(|&x| x == 7.0));
    }
}

fn attention_options() {
    use Status::{InvalidValue, OutOfRange, Shape};
    attention_fails(|c| c.options.lengths = Some(vec![1]), Shape, &["lengths has 1 entries", "batch = 2"]);
    attention_fails(|c| c.options.lengths = Some(vec![10, 11]), OutOfRange, &["lengths[1] is 11", "seq = 10"]);
    attention_fails(|c| c.options.lengths = Some(vec![-1, 1]), OutOfRange, &["lengths[0] is -1", "seq = 10"]);
    attention_fails(|c| c.options.kv_starts = Some(vec![0, 0, 0]), Shape, &["kv_starts has 3 entries", "batch = 2"]);
    attention_fails(|c| c.options.kv_starts = Some(vec![0, -4]), OutOfRange, &["kv_starts[1] is -4", "seq = 10"]);
    attention_fails(|c| c.options.kv_starts = Some(vec![99, 0]), OutOfRange, &["kv_starts[0] is 99", "seq = 10"]);
    attention_fails(|c| c.options.offsets = Some(vec![]), Shape, &["offsets has 0 entries", "batch = 2"]);
    attention_fails(|c| c.options.alibi = Some(vec![0.0; 2]), Shape, &["alibi_slopes has 2 entries", "q has 4 heads"]);
    attention_fails(
        |c| c.options.sink_logits = Some(vec![0.0; 5]),
        Shape,
        &["sink_logits has 5 entries", "q has 4 heads"],
    );
    attention_fails(|c| c.options.scale = Some(f32::NAN), InvalidValue, &["scale is NaN"]);
    attention_fails(|c| c.options.scale = Some(f32::INFINITY), InvalidValue, &["scale is inf"]);
    attention_fails(|c| c.options.softcap = Some(-1.0), InvalidValue, &["softcap is -1"]);
    attention_fails(|c| c.options.softcap = Some(f32::NAN), InvalidValue, &["softcap is NaN"]);
    let wrong = [2, 3, 4, 9];
    attention_fails(
        |c| c.options.mask = Some(MaskTensor::new(wrong, Layout::BSHD.strides(wrong), Place::Heap, |_| true)),
        Shape,
        &["mask has shape [2, 3, 4, 9]", "[2, 3, 4, 10]"],
    );
    attention_fails(
        |c| c.options.bias = Some(tensor(DType::F16, [2, 3, 2, 10])),
        Shape,
        &["bias has shape [2, 3, 2, 10]", "[2, 3, 4, 10]"],
    );
}

/// Views of one buffer that do not overlap but are interleaved must pass.
fn attention_overlap() {
    // Q, K, V of a token side by side, and the output beside them: `split_at_mut` would not give this; disjoint buffers do.
    let shape = Shape { tokens: 4, keys: 4, dim: 8, v_dim: 8, ..Shape::default() };
    let mut case = Case::new(&mut Rng::new(72), shape, DType::F32);
    let plain = case.run(&context()).all_bits();
    for tensor in [&mut case.q, &mut case.k, &mut case.v] {
        *tensor = tensor.to(Layout::FUSED, Place::Heap);
    }
    assert_eq!(case.run(&context()).all_bits(), plain);
}

fn small_write(batch: usize, seq: usize) -> Write {
    Write {
        k: tensor(DType::F32, [batch, seq, 2, 4]),
        v: tensor(DType::F32, [batch, seq, 2, 3]),
        k_cache: Tensor::output(DType::F16, [3, 8, 2, 4], Layout::BSHD, Place::Heap),
        v_cache: Tensor::output(DType::F16, [3, 8, 2, 3], Layout::BSHD, Place::Heap),
        v_packing: Packing::Rows,
    }
}

#[track_caller]
fn write_fails(mut write: Write, to: Destination, status: Status, pieces: &[&str]) {
    let level = crate::harness::Level {
        isa: context().isa(),
        precision: Default::default(),
        quantised: [None; 2],
        context: context(),
    };
    assert_error(write.run(&level, &Serial, to), status, pieces);
    write.k_cache.assert_untouched();
    write.v_cache.assert_untouched();
}

fn write_destinations() {
    use Status::{Capacity, DuplicateSlot, OutOfRange, Shape};
    let at = |positions| Destination::positions(positions);
    // Row 1 causes the error; row 0 must not have been written either.
    write_fails(small_write(2, 3), at(&[0, 6]), Capacity, &["sequence 1", "3 tokens", "position 6", "holds 8"]);
    write_fails(small_write(2, 3), at(&[0, i32::MAX]), Capacity, &["sequence 1", "position 2147483647", "holds 8"]);
    write_fails(small_write(2, 9), at(&[0, 0]), Capacity, &["sequence 0", "9 tokens", "holds 8"]);
    write_fails(small_write(2, 3), at(&[0, -1]), OutOfRange, &["positions[1] is -1", "negative"]);
    write_fails(small_write(2, 3), at(&[0, i32::MIN]), OutOfRange, &["positions[1] is -2147483648"]);
    write_fails(small_write(2, 3), at(&[0]), Shape, &["positions has 1 entries", "batch = 2"]);
    write_fails(small_write(4, 1), at(&[0; 4]), OutOfRange, &["sequence 3", "sequence 3 of the cache", "3 sequences"]);

    let base = Destination::positions(&[0, 0]);
    let fails = |to, status, pieces: &[&str]| write_fails(small_write(2, 3), to, status, pieces);
    fails(base.counts(&[3]), Shape, &["counts has 1 entries", "batch = 2"]);
    fails(base.counts(&[3, 4]), OutOfRange, &["counts[1] is 4", "seq = 3"]);
    fails(base.counts(&[-1, 3]), OutOfRange, &["counts[0] is -1", "seq = 3"]);
    fails(base.sequences(&[0, 1, 2]), Shape, &["sequences has 3 entries", "batch = 2"]);
    fails(base.sequences(&[0, 3]), OutOfRange, &["sequence 1", "sequence 3 of the cache", "3 sequences"]);
    fails(base.sequences(&[0, -1]), OutOfRange, &["sequence 1", "sequence -1 of the cache", "3 sequences"]);
    fails(base.sequences(&[2, 2]), DuplicateSlot, &["[0, 0]", "[1, 0]", "slot 0", "sequence 2"]);
    let rows = Destination::positions(&[4, 2]).sequences(&[2, 2]);
    fails(rows, DuplicateSlot, &["[0, 0]", "[1, 2]", "slot 4", "sequence 2"]);
    fails(Destination::slots(&[0; 5]), Shape, &["slots has 5 entries", "batch * seq = 6"]);
    fails(Destination::slots(&[0, 1, 2, 0, 8, 1]), Capacity, &["slots[1, 1] is 8", "holds 8"]);
    fails(Destination::slots(&[0, 1, 2, 0, 3, -2]), OutOfRange, &["slots[1, 2] is -2", "-1"]);
    fails(Destination::slots(&[0, 1, 2, 5, 3, 5]), DuplicateSlot, &["[1, 0]", "[1, 2]", "slot 5", "sequence 1"]);
    let slots = Destination::slots(&[0, 1, 2, 5, 2, 4]).sequences(&[1, 1]);
    fails(slots, DuplicateSlot, &["[0, 2]", "[1, 1]", "slot 2", "sequence 1"]);
}

/// Tokens for caches with these first two axes.
fn write_into(batch: usize, seq: usize, axes: [usize; 2]) -> Write {
    Write {
        k_cache: Tensor::output(DType::F16, [axes[0], axes[1], 2, 4], Layout::BSHD, Place::Heap),
        v_cache: Tensor::output(DType::F16, [axes[0], axes[1], 2, 3], Layout::BSHD, Place::Heap),
        ..small_write(batch, seq)
    }
}

fn write_layouts() {
    use Status::{Capacity, DuplicateSlot, InvalidValue, OutOfRange, Shape};
    let to = Destination::positions(&[0, 0]);
    let fails = |axes, to, status, pieces: &[&str]| write_fails(write_into(2, 3, axes), to, status, pieces);

    let ring_at = |positions, sinks| Destination::positions(positions).layout(Slots::ring(sinks));
    let ring = |sinks| ring_at(&[0, 0], sinks);
    fails([2, 8], ring(8), Capacity, &["8 sink tokens", "k_cache has 8 slots"]);
    fails([2, 4], ring_at(&[0, 9], 2), DuplicateSlot, &["sequence 1 writes 3", "ring of 2 slots"]);
    fails([2, 4], ring_at(&[9, -1], 1), OutOfRange, &["positions[1] is -1", "negative"]);
    fails(
        [2, 4],
        ring_at(&[0, i32::MAX - 1], 0),
        Capacity,
        &["sequence 1 writes 3 tokens at position 2147483646", "holds 2147483647"],
    );
    let same = ring_at(&[6, 13], 0).sequences(&[1, 1]);
    fails([2, 8], same, DuplicateSlot, &["tokens [0, 0] and [1, 1]", "slot 6 of sequence 1 of the cache"]);

    let paged = |pages, pages_per_row| to.layout(Slots::paged(pages, pages_per_row));
    fails([4, 2], paged(&[0, 1, 2], 2), Shape, &["page_table has 3 entries", "pages_per_sequence = 2"]);
    fails([4, 2], paged(&[3], 0), Shape, &["page_table has 1 entries", "pages_per_sequence = 0"]);
    fails([4, 2], paged(&[], 0), Capacity, &["sequence 0 writes 3 tokens at position 0", "holds 0"]);
    fails([4, 0], paged(&[0, 1], 1), Shape, &["k_cache has seq = 0"]);
    fails([4, 2], paged(&[0, 1], 2), OutOfRange, &["sequence 1", "sequence 1 of the cache", "1 sequences"]);
    fails([4, 2], paged(&[0, 1, 2, 4], 2), OutOfRange, &["page_table[1, 1] is 4", "k_cache has batch = 4"]);
    fails([4, 2], paged(&[0, 1, -1, 3], 2), OutOfRange, &["page_table[1, 0] is -1", "k_cache has batch = 4"]);
    let late = Destination::positions(&[0, 2]).layout(Slots::paged(&[0, 1, 2, 3], 2));
    fails([4, 2], late, Capacity, &["sequence 1 writes 3 tokens at position 2", "holds 4"]);
    fails([4, 2], paged(&[0, 1, 2, 1], 2), DuplicateSlot, &["tokens [0, 2] and [1, 2]", "slot 0 of page 1"]);
    fails([4, 2], paged(&[3, 3, 0, 1], 2), DuplicateSlot, &["tokens [0, 0] and [0, 2]", "slot 0 of page 3"]);
    let rows = paged(&[0, 1, 2, 3], 2).sequences(&[1, 1]);
    fails([4, 2], rows, DuplicateSlot, &["tokens [0, 0] and [1, 0]", "slot 0 of page 2"]);
    let rows = paged(&[0, 1, 2, 3], 2).sequences(&[0, 2]);
    fails([4, 2], rows, OutOfRange, &["sequence 1", "sequence 2 of the cache", "2 sequences"]);

    let slots = |slots| Destination::slots(slots).layout(Slots::paged(&[], 0));
    fails([4, 2], slots(&[0, 1, 2, 3, 4, 8]), Capacity, &["slots[1, 2] is 8", "holds 8"]);
    fails([4, 2], slots(&[0, 1, 2, 3, 4, -2]), OutOfRange, &["slots[1, 2] is -2", "-1"]);
    fails([4, 2], slots(&[0, 1, 2, -1, 7, 1]), DuplicateSlot, &["[0, 1] and [1, 2]", "slot 1 of the pool"]);
    fails([4, 0], slots(&[0, -1, -1, -1, -1, -1]), Capacity, &["slots[0, 0] is 0", "holds 0"]);
    let rows = slots(&[0, 1, 2, 3, 4, 5]).sequences(&[0, 1]);
    fails([4, 2], rows, InvalidValue, &["sequences is given", "no sequence"]);

    let ragged = |starts| to.layout(Slots::ragged(starts));
    fails([2, 8], ragged(&[0, 4, 8]), Shape, &["k_cache has batch = 2", "batch of one"]);
    fails([1, 8], ragged(&[0, 4, 9]), OutOfRange, &["cu_seqlens ends at 9", "k_cache has seq = 8"]);
    fails([1, 8], ragged(&[4, 3, 8]), OutOfRange, &["cu_seqlens[1] is 3", "cu_seqlens[0] is 4"]);
    fails([1, 8], ragged(&[0, 4]), OutOfRange, &["sequence 1", "sequence 1 of the cache", "1 sequences"]);
    fails([1, 8], ragged(&[0, 4, 6]), Capacity, &["sequence 1 writes 3 tokens at position 0", "holds 2"]);
    let rows = ragged(&[0, 4, 8]).sequences(&[1, 1]);
    fails([1, 8], rows, DuplicateSlot, &["tokens [0, 0] and [1, 0]", "slot 4 of sequence 0 of the cache"]);

    let indirect = to.layout(Slots::indirect(&[0; 16]));
    fails([2, 8], indirect, InvalidValue, &["indirect", "contiguous"]);
}

fn write_packings() {
    use Status::{InvalidValue, Shape};
    let to = Destination::positions(&[0, 0]);
    let packed = |axes: [usize; 2], values: [usize; 4]| Write {
        v_cache: Tensor::output(DType::F16, values, Layout::BSHD, Place::Heap),
        v_packing: Packing::RowPairs,
        ..write_into(2, 3, axes)
    };
    let fails = |axes, values, to, status, pieces: &[&str]| write_fails(packed(axes, values), to, status, pieces);
    fails([2, 7], [2, 3, 2, 6], to, Shape, &["k_cache has seq = 7", "odd"]);
    fails([2, 8], [2, 8, 2, 6], to, Shape, &["v_cache has seq = 8", "8 slots of k_cache make 4"]);
    fails([2, 8], [2, 4, 2, 3], to, Shape, &["v_cache has dim = 3", "pairs of v have 6"]);
    fails([2, 8], [1, 4, 2, 6], to, Shape, &["k_cache has batch = 2", "v_cache has 1"]);
    fails([2, 8], [2, 4, 1, 6], to, Shape, &["v has heads = 2", "v_cache has 1"]);
    let ring = to.layout(Slots::ring(3));
    fails([2, 8], [2, 4, 2, 6], ring, InvalidValue, &["3 sink tokens", "odd"]);
    let ragged = to.layout(Slots::ragged(&[0, 5, 8]));
    fails([1, 8], [1, 4, 2, 6], ragged, InvalidValue, &["cu_seqlens[1] is 5", "odd"]);
    let paged = to.layout(Slots::paged(&[0, 1], 1));
    fails([2, 5], [2, 2, 2, 6], paged, Shape, &["k_cache has seq = 5", "odd"]);
}

fn write_norms() {
    use Status::{InvalidValue, Shape};
    let f = RopeFrequencies::new(2, 1e4, &RopeScaling::None).unwrap();
    let turn = Rope::new(Pairing::HalfSplit, 2, &f, Positions::Offsets(&[0, 0]));
    let norm = |eps| RmsNorm::new(eps).weight(&[1.0; 4]);
    for rope in [None, Some(turn)] {
        for (k_norm, status, pieces) in [
            (RmsNorm::new(0.0).weight(&[1.0; 3]), Shape, ["weight has 3 entries", "k has dim = 4"]),
            (norm(-1e-6), InvalidValue, ["eps is -0.000001", "from 0"]),
            (norm(f32::NAN), InvalidValue, ["eps is NaN", "from 0"]),
            (norm(f32::INFINITY), InvalidValue, ["eps is inf", "from 0"]),
        ] {
            let mut write = small_write(2, 3);
            let mut call = KvWrite::new(
                write.k.view(),
                write.v.view(),
                write.k_cache.view_mut(),
                write.v_cache.view_mut(),
                Destination::positions(&[0, 0]),
            )
            .k_norm(k_norm);
            call.rope = rope;
            assert_error(kv_write(&context(), &Serial, call), status, &pieces);
            write.k_cache.assert_untouched();
            write.v_cache.assert_untouched();
        }
    }
}

fn norm_options() {
    use Status::{InvalidValue, Shape};
    let x = tensor(DType::F32, [2, 3, 2, 6]);
    let output = |shape| Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
    let good = RmsNorm::new(1e-6).weight(&[1.0; 6]);
    let f = RopeFrequencies::new(4, 1e4, &RopeScaling::None).unwrap();
    let turn = Rope::new(Pairing::HalfSplit, 4, &f, Positions::Offsets(&[0, 0]));
    for (norm, status, pieces) in [
        (good.weight(&[1.0; 7]), Shape, ["weight has 7 entries", "src has dim = 6"]),
        (good.eps(-1.0), InvalidValue, ["eps is -1", "from 0"]),
        (good.eps(f32::NAN), InvalidValue, ["eps is NaN", "from 0"]),
    ] {
        let mut y = output(x.shape);
        assert_error(rms_norm(&context(), &Serial, x.view(), y.view_mut(), &norm), status, &pieces);
        assert_error(rms_norm_in_place(&context(), &Serial, y.view_mut(), &norm), status, &pieces);
        assert_error(rms_norm_rope(&context(), &Serial, x.view(), y.view_mut(), &norm, &turn), status, &pieces);
        assert_error(rms_norm_rope_in_place(&context(), &Serial, y.view_mut(), &norm, &turn), status, &pieces);
        y.assert_untouched();
    }
    for (shape, pieces) in [
        ([1, 3, 2, 6], ["batch = 2", "1"]),
        ([2, 4, 2, 6], ["seq = 3", "4"]),
        ([2, 3, 1, 6], ["heads = 2", "1"]),
        ([2, 3, 2, 7], ["dim = 6", "7"]),
    ] {
        let mut y = output(shape);
        assert_error(rms_norm(&context(), &Serial, x.view(), y.view_mut(), &good), Shape, &pieces);
        assert_error(rms_norm_rope(&context(), &Serial, x.view(), y.view_mut(), &good, &turn), Shape, &pieces);
        y.assert_untouched();
    }
    // Errors of the rotation are errors here too.
    let mut y = output(x.shape);
    let wrong = turn.rotary_dim(8);
    let done = rms_norm_rope(&context(), &Serial, x.view(), y.view_mut(), &good, &wrong);
    assert_error(done, Shape, &["rotary_dim 8", "head size 6"]);
    y.assert_untouched();
    // Heads that are too large for the stack.
    let long = tensor(DType::F32, [1, 1, 1, 4097]);
    let mut y = output(long.shape);
    let norm = RmsNorm::new(1e-6);
    let once = turn.positions(Positions::Offsets(&[0]));
    let done = rms_norm_rope(&context(), &Serial, long.view(), y.view_mut(), &norm, &once);
    assert_error(done, Shape, &["src has dim = 4097", "4096"]);
    y.assert_untouched();
}

fn pack_shapes() {
    use Status::Shape;
    let v = tensor(DType::F32, [2, 5, 2, 4]);
    for (dtype, shape, status, pieces) in [
        (DType::F32, [2, 2, 2, 8], Shape, ["dst has seq = 2", "5 tokens of src make 3"]),
        (DType::F32, [2, 5, 2, 8], Shape, ["dst has seq = 5", "5 tokens of src make 3"]),
        (DType::F32, [2, 3, 2, 4], Shape, ["dst has dim = 4", "pairs of src have 8"]),
        (DType::F32, [2, 3, 1, 8], Shape, ["src has heads = 2", "dst has 1"]),
        (DType::F32, [1, 3, 2, 8], Shape, ["src has batch = 2", "dst has 1"]),
        (DType::F16, [2, 3, 2, 8], Status::DType, ["src is f32", "dst is f16"]),
    ] {
        let mut y = Tensor::output(dtype, shape, Layout::BSHD, Place::Heap);
        assert_error(pack_row_pairs(&context(), &Serial, v.view(), y.view_mut()), status, &pieces);
        y.assert_untouched();
    }
    let packed = tensor(DType::F32, [2, 3, 2, 8]);
    for (shape, pieces) in [
        ([2, 4, 2, 4], ["src has seq = 3", "4 tokens of dst make 2"]),
        ([2, 7, 2, 4], ["src has seq = 3", "7 tokens of dst make 4"]),
        ([2, 5, 2, 8], ["src has dim = 8", "pairs of dst have 16"]),
    ] {
        let mut y = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
        assert_error(unpack_row_pairs(&context(), &Serial, packed.view(), y.view_mut()), Shape, &pieces);
        y.assert_untouched();
    }
}

fn write_shapes() {
    use Status::Shape;
    let to = Destination::positions(&[0, 0]);
    let output = |shape| Tensor::output(DType::F16, shape, Layout::BSHD, Place::Heap);
    let changed = |change: &dyn Fn(&mut Write)| {
        let mut write = small_write(2, 3);
        change(&mut write);
        write
    };
    let f32s = |shape| tensor(DType::F32, shape);
    write_fails(changed(&|w| w.k_cache = output([3, 8, 1, 4])), to, Shape, &["k has heads = 2", "k_cache has 1"]);
    write_fails(changed(&|w| w.k_cache = output([3, 8, 2, 5])), to, Shape, &["k has dim = 4", "k_cache has 5"]);
    write_fails(changed(&|w| w.v_cache = output([3, 8, 2, 4])), to, Shape, &["v has dim = 3", "v_cache has 4"]);
    write_fails(changed(&|w| w.v_cache = output([2, 8, 2, 3])), to, Shape, &["k_cache has batch = 3", "v_cache has 2"]);
    write_fails(changed(&|w| w.v_cache = output([3, 9, 2, 3])), to, Shape, &["k_cache has seq = 8", "v_cache has 9"]);
    write_fails(changed(&|w| w.v = f32s([2, 2, 2, 3])), to, Shape, &["k has seq = 3", "v has 2"]);
    write_fails(changed(&|w| w.v = f32s([1, 3, 2, 3])), to, Shape, &["k has batch = 2", "v has 1"]);

    // A rotation with wrong shapes.
    let f = RopeFrequencies::new(6, 1e4, &RopeScaling::None).unwrap();
    let mut write = small_write(2, 3);
    let rope = Rope::new(Pairing::HalfSplit, 6, &f, Positions::Offsets(&[0, 0]));
    let done = kv_write(
        &context(),
        &Serial,
        KvWrite::new(write.k.view(), write.v.view(), write.k_cache.view_mut(), write.v_cache.view_mut(), to).rope(rope),
    );
    assert_error(done, Shape, &["rotary_dim 6", "head size 4"]);
    write.k_cache.assert_untouched();
    write.v_cache.assert_untouched();
}

fn rope_options() {
    use Status::{InvalidValue, OutOfRange, Shape};
    let f = RopeFrequencies::new(4, 1e4, &RopeScaling::None).unwrap();
    let good = Rope::new(Pairing::HalfSplit, 4, &f, Positions::Offsets(&[0, 0]));
    let table = [0.0; 20];
    let by_table = good.angles(RopeAngles::table(&table, &table));
    let x = tensor(DType::F32, [2, 3, 2, 6]);
    for (options, status, pieces) in [
        (good.rotary_dim(3), InvalidValue, vec!["rotary_dim is 3", "even"]),
        (good.rotary_dim(0), InvalidValue, vec!["rotary_dim is 0", "even"]),
        (good.rotary_dim(8), Shape, vec!["rotary_dim 8", "head size 6"]),
        (good.rotary_dim(2), Shape, vec!["2 frequencies", "rotary_dim 2", "1 pairs"]),
        (good.positions(Positions::Offsets(&[0])), Shape, vec!["offsets has 1", "batch 2", "need 2"]),
        (good.positions(Positions::Explicit(&[0; 5])), Shape, vec!["positions has 5", "seq 3", "need 6"]),
        (by_table.positions(Positions::Offsets(&[0, 8])), OutOfRange, vec!["sequence 1", "8..=10", "10 rows"]),
        (by_table.positions(Positions::Offsets(&[-1, 0])), OutOfRange, vec!["sequence 0", "-1..=1", "10 rows"]),
        (
            by_table.positions(Positions::Explicit(&[0, 1, 2, 3, 10, 5])),
            OutOfRange,
            vec!["sequence 1", "3..=10", "10 rows"],
        ),
        (good.angles(RopeAngles::table(&table, &table[..18])), Shape, vec!["cos has 20", "sin 18", "rows of 2"]),
        (good.angles(RopeAngles::table(&table[..19], &table[..19])), Shape, vec!["cos has 19", "rows of 2"]),
    ] {
        let mut y = Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap);
        assert_error(rope(&context(), &Serial, x.view(), y.view_mut(), &options), status, &pieces);
        assert_error(rope_in_place(&context(), &Serial, y.view_mut(), &options), status, &pieces);
        y.assert_untouched();
    }
    for (shape, pieces) in [
        ([1, 3, 2, 6], ["batch = 2", "1"]),
        ([2, 4, 2, 6], ["seq = 3", "4"]),
        ([2, 3, 1, 6], ["heads = 2", "1"]),
        ([2, 3, 2, 7], ["dim = 6", "7"]),
    ] {
        let mut y = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
        assert_error(rope(&context(), &Serial, x.view(), y.view_mut(), &good), Shape, &pieces);
        y.assert_untouched();
    }
}

fn repeat_shapes() {
    use Status::Shape;
    let x = tensor(DType::F32, [2, 3, 2, 6]);
    for (dtype, shape, status, pieces) in [
        (DType::F32, [2, 3, 5, 6], Shape, ["dst has 5 heads", "2 of src"]),
        (DType::F32, [1, 3, 4, 6], Shape, ["src has batch = 2", "dst has 1"]),
        (DType::F32, [2, 4, 4, 6], Shape, ["src has seq = 3", "dst has 4"]),
        (DType::F32, [2, 3, 4, 7], Shape, ["src has dim = 6", "dst has 7"]),
        (DType::F16, [2, 3, 4, 6], Status::DType, ["src is f32", "dst is f16"]),
    ] {
        let mut y = Tensor::output(dtype, shape, Layout::BSHD, Place::Heap);
        assert_error(repeat_kv(&context(), &Serial, x.view(), y.view_mut()), status, &pieces);
        y.assert_untouched();
    }
    let none = Tensor::input(DType::F32, [2, 3, 0, 6], Layout::BSHD, Place::Heap);
    let mut y = Tensor::output(DType::F32, [2, 3, 4, 6], Layout::BSHD, Place::Heap);
    assert_error(repeat_kv(&context(), &Serial, none.view(), y.view_mut()), Shape, &["dst has 4 heads", "0 of src"]);
    y.assert_untouched();
}

fn merge_shapes() {
    use Status::{InvalidValue, Shape};
    let (x, other, half) =
        (tensor(DType::F32, [1, 2, 2, 6]), tensor(DType::F32, [1, 2, 2, 5]), tensor(DType::F16, [1, 2, 2, 6]));
    let lse = [0.0; 4];
    let good = AttentionState::new(x.view(), &lse);
    let mut out = Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap);
    let mut fails = |states: &[AttentionState], joint: usize, status, pieces: &[&str]| {
        let mut joint = vec![7.0; joint];
        assert_error(merge_states(&context(), &Serial, states, out.view_mut(), Some(&mut joint)), status, pieces);
        out.assert_untouched();
        assert!(joint.iter().all(|&x| x == 7.0));
    };
    fails(&[], 4, InvalidValue, &["0 states", "256"]);
    fails(&[good; 257], 4, InvalidValue, &["257 states", "256"]);
    fails(&[good, good], 3, Shape, &["lse has 3 entries", "4 rows"]);
    fails(&[good, AttentionState::new(good.out, &lse[..3])], 4, Shape, &["state 1 has 3 entries", "4 rows"]);
    fails(&[good, AttentionState::new(other.view(), &lse)], 4, Shape, &["dim = 5", "out has 6"]);
    fails(&[good, AttentionState::new(half.view(), &lse)], 4, Status::DType, &["is f16", "out is f32"]);
}

/// A runner that does not run its tasks is an error.
fn runners() {
    let shape = Shape { batch: 2, tokens: 4, kv_heads: 2, group: 2, keys: 2100, ..Shape::default() };
    let case = Case::new(&mut Rng::new(73), shape, DType::F32);
    assert_error(case.run_with(&context(), &Broken).map(|_| ()), Status::Parallel, &["0 of", "workers"]);

    /// Runs tasks twice, and indices that do not exist.
    struct Careless;
    impl Runner for Careless {
        fn num_threads(&self) -> usize {
            2
        }
        fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
            // Workers must not share scratch memory.
            (0..n).chain(0..n).chain([n, n + 7, usize::MAX]).for_each(task);
            true
        }
    }
    let want = case.run(&context()).all_bits();
    assert!(case.run_with(&context(), &Careless).expect("a result").all_bits() == want);
}

fn contexts() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_built()) {
        assert_error(
            Context::with_max_isa(isa).map(|_| ()),
            Status::Unsupported,
            &[isa.name(), std::env::consts::ARCH],
        );
    }
    // The environment variable lowers the level or is an error. A process of its own, because threads share the
    // environment.
    let run = |value: &str| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["no test has this name"]).env(Isa::ENV, value).env_remove("KVLANE_REQUIRE_ISA");
        let output = command.output().ok()?;
        Some((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
    };
    // Without a ceiling the process must succeed; under an emulator it cannot be started.
    if !run("").is_some_and(|(ok, printed)| ok && printed.contains("running 0 tests")) {
        println!("not tested: {} in a process of its own, which cannot be started here", Isa::ENV);
        if cfg!(target_arch = "x86_64") {
            panic!("this binary starts again on x86-64");
        }
        return;
    }
    let (ok, printed) = run("scalar").unwrap();
    assert!(ok && printed.contains("level scalar: 0 kernel checks"), "{printed}");
    for isa in Isa::ALL.into_iter().filter(|&isa| isa.is_available() && isa != Isa::Scalar) {
        assert!(printed.contains(&format!("level {isa}: not run (lowered by KVLANE_MAX_ISA)")), "{printed}");
    }
    assert!(!run("avx9000").unwrap().0, "no level, no context");
}

fn status_values() {
    for (i, status) in Status::ALL.into_iter().enumerate() {
        assert_eq!(status as usize, i + 1);
        assert!(!status.description().is_empty());
    }
}
