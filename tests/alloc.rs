//! No operation allocates, as a counting allocator shows.

mod common;

use common::attention::{Case, MaskTensor, Shape, random_bias};
use common::runners::Backwards;
use common::{Layout, Place, Rng, Tensor};
use kvlane::{Layout as Slots, *};
use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(block) }
    }
    unsafe fn alloc_zeroed(&self, block: Block) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(block) }
    }
    unsafe fn realloc(&self, at: *mut u8, block: Block, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.realloc(at, block, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, block: Block) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The number of allocations while `run` runs. This binary has one test, so that no other test allocates.
fn allocations(run: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    run();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// Attention over every layout, without a plan and with one that advances. Returns the most allocations of one call.
fn layouts_and_plans(context: &Context, runner: &dyn Runner, rng: &mut Rng, dtype: DType) -> usize {
    // More than a chunk, except where an emulator makes that too slow.
    let room: usize = if common::scale() < 0.5 { 96 } else { 1120 };
    let long = room as i32 - 30;
    let mut most = 0;
    let q = Tensor::random(rng, DType::F32, [2, 1, 6, 64], Layout::BSHD, Place::Heap);
    let pages: Vec<i32> = (0..2 * room as i32 / 16).rev().collect();
    let rows: Vec<i32> = (0..2 * room as i32).map(|i| i / 5 % 2).collect();
    let starts = [0, room as i32, 2 * room as i32];
    let tree = [1u8; 2];
    let mut workspace = Workspace::new();
    let mut out = Tensor::output(dtype, [2, 1, 6, 64], Layout::BSHD, Place::Heap);
    for (axes, layout) in [
        ([2, room], Slots::Contiguous),
        ([2, room / 4], Slots::ring(4)),
        ([2 * room / 16, 16], Slots::paged(&pages, room / 16)),
        ([2, room], Slots::indirect(&rows)),
        ([1, 2 * room], Slots::ragged(&starts)),
    ] {
        let shape = [axes[0], axes[1], 2, 64];
        let k = Tensor::random(rng, dtype, shape, Layout::BSHD, Place::Heap);
        let v = Tensor::random(rng, dtype, shape, Layout::BSHD, Place::Heap);
        let mut attend = |options: &AttentionOptions| {
            let tensors = AttentionTensors::new(q.view(), k.view(), v.view(), out.view_mut());
            attention(context, runner, &mut workspace, tensors, options).unwrap();
        };
        let lengths = [long, 40];
        let options = AttentionOptions::new().causal(true).lengths(&lengths).prefix_lengths(&[4, 0]).layout(layout);
        let firsts = [long - 1, 39];
        let bits = BitMask::strided(&tree, 0, [2, 1, 6, 1], [8, 0, 0]).unwrap().with_first_keys(&firsts);
        let mut plan = AttentionPlan::new([2, 1, 6, 64], shape, &options).unwrap();
        // The first call grows the workspace.
        attend(&options);
        most = most.max(allocations(|| attend(&options)));
        most = most.max(allocations(|| attend(&options.bit_mask(bits))));
        most = most.max(allocations(|| plan.advance(&[1, 3]).unwrap()));
        most = most.max(allocations(|| attend(&AttentionOptions::new().plan(&plan))));
        most = most.max(allocations(|| plan.update([2, 1, 6, 64], shape, &options).unwrap()));
        let masked = options.bit_mask(bits);
        plan.update([2, 1, 6, 64], shape, &masked).unwrap();
        most = most.max(allocations(|| plan.update([2, 1, 6, 64], shape, &masked).unwrap()));
        most = most.max(allocations(|| attend(&AttentionOptions::new().plan(&plan))));
    }
    let k = Tensor::random(rng, dtype, [2, 40, 2, 64], Layout::BSHD, Place::Heap);
    let shared = Tensor::random(rng, dtype, [1, room - 20, 2, 64], Layout::BSHD, Place::Heap);
    let mut cascade = || {
        let prefix = SharedPrefix::new(shared.view(), shared.view());
        let tensors = AttentionTensors::new(q.view(), k.view(), k.view(), out.view_mut());
        let options = AttentionOptions::new().causal(true).lengths(&[40, 7]);
        attention_with_prefix(context, runner, &mut workspace, prefix, tensors, &options).unwrap();
    };
    cascade();
    most = most.max(allocations(cascade));

    let k = Tensor::random(rng, dtype, [2, room, 2, 64], Layout::BSHD, Place::Heap);
    let mut states = vec![0.0; chunk_states_len(q.shape, room, 64)];
    let lengths = [long, 40];
    let options = AttentionOptions::new().causal(true).lengths(&lengths);
    let threads = runner.num_threads();
    let mut workspace =
        Workspace::with_capacity(attention_chunks_workspace_size(q.shape, [2, room, 2, 64], 64, threads));
    most = most.max(allocations(|| {
        let tensors = (q.view(), k.view(), k.view());
        attention_chunks(context, runner, &mut workspace, tensors, &options, &mut states).unwrap();
    }));
    let size = merge_chunks_workspace_size(out.shape, 2, 2 * states.len(), threads);
    let mut workspace = Workspace::with_capacity(size);
    let merge = ChunkMerge::new(2, dtype, dtype);
    most.max(allocations(|| {
        let spans = [&states[..], &states[..]];
        merge_chunks(context, runner, &mut workspace, &spans, &merge, out.view_mut(), None).unwrap();
    }))
}

/// One call of every operation, for every type. Returns the most allocations of one call.
fn all_operations(context: &Context, runner: &dyn Runner) -> usize {
    let mut rng = Rng::new(1);
    let mut most = 0;
    for dtype in DType::ALL {
        for (tokens, keys) in common::thin(vec![(1, 70), (40, 200), (1, 1100)]) {
            let shape = Shape { batch: 2, tokens, kv_heads: 2, group: 3, keys, dim: 64, v_dim: 40 };
            let plain = Case::new(&mut rng, shape, dtype);
            let mut full = Case::new(&mut rng, shape, dtype).moved([Layout::STEP2; 4], Place::Heap, Default::default());
            let strides = Layout::BSHD.strides(shape.scores());
            full.options.mask = Some(MaskTensor::new(shape.scores(), strides, Place::Heap, |at| at[3] % 3 != 0));
            full.options.bias = Some(random_bias(&mut rng, dtype, shape.scores(), strides, Place::Heap, 0.1));
            full.options.alibi = Some(alibi_slopes(6));
            full.options.sink_logits = Some(vec![0.5; 6]);
            full.options.softcap = Some(30.0);
            full.options.causal = true;
            for case in [&plain, &full] {
                let threads = runner.num_threads();
                let size = attention_workspace_size(shape.q(), shape.k(), shape.v_dim, threads);
                let mut workspace = Workspace::with_capacity(size);
                let mut out = Tensor::output(dtype, [2, tokens, 6, 40], case.out_layout, Place::Heap);
                let mut lse = vec![0.0; 2 * tokens * 6];
                let tensors =
                    AttentionTensors::new(case.q.view(), case.k.view(), case.v.view(), out.view_mut()).lse(&mut lse);
                let options = case.options.borrow();
                let made = allocations(|| attention(context, runner, &mut workspace, tensors, &options).unwrap());
                most = most.max(made);
            }
        }
        most = most.max(layouts_and_plans(context, runner, &mut rng, dtype));
        // With 260 tokens the operations use several workers.
        for (layout, seq) in [(Layout::BSHD, 3), (Layout::STEP2, if common::scale() < 0.5 { 5 } else { 260 })] {
            let shape = [2, seq, 4, 64];
            let x = Tensor::random(&mut rng, DType::F32, shape, layout, Place::Heap);
            let same = Tensor::random(&mut rng, dtype, shape, layout, Place::Heap);
            let mut y = Tensor::output(dtype, shape, layout, Place::Heap);
            let mut k_cache = Tensor::output(dtype, [2, seq + 9, 4, 64], layout, Place::Heap);
            let mut v_cache = Tensor::output(dtype, [2, seq + 9, 4, 64], layout, Place::Heap);
            let mut repeated = Tensor::output(dtype, [2, seq, 8, 64], layout, Place::Heap);
            let lse = vec![0.5; 2 * seq * 4];
            let mut joint = vec![0.5; 2 * seq * 4];
            let frequencies = RopeFrequencies::new(64, 1e4, &RopeScaling::None).unwrap();
            let options = Rope::new(Pairing::Interleaved, 64, &frequencies, Positions::Offsets(&[5, 0]));
            for rotation in [None, Some(options)] {
                let mut write = KvWrite::new(
                    x.view(),
                    x.view(),
                    k_cache.view_mut(),
                    v_cache.view_mut(),
                    Destination::positions(&[5, 0]).sequences(&[1, 0]),
                );
                write.rope = rotation;
                most = most.max(allocations(|| kv_write(context, runner, write).unwrap()));
            }
            // Every layout, by positions and by slots in random order, with values in pairs and with a fused norm.
            let norm = RmsNorm::new(1e-6);
            let slots: Vec<i32> = (0..2 * seq as i32).rev().collect();
            let room = (seq + 9).next_multiple_of(2);
            let pages: Vec<i32> = (0..2 * room as i32).rev().collect();
            let ends = [0, room as i32, 2 * room as i32];
            let positions: &[i32] = &[5, 0];
            let size = 2 * room;
            for (slots, axes, layout) in [
                (None, [2, 300], Slots::ring(4)),
                (None, [size, 2], Slots::paged(&pages, room)),
                (Some(&slots[..]), [size, 2], Slots::paged(&[], 0)),
                (None, [1, size], Slots::ragged(&ends)),
            ] {
                for rotation in [None, Some(options)] {
                    let mut k_cache = Tensor::output(dtype, [axes[0], axes[1], 4, 64], Layout::BSHD, Place::Heap);
                    let mut v_cache = Tensor::output(dtype, [axes[0], axes[1] / 2, 4, 128], Layout::BSHD, Place::Heap);
                    let mut to = Destination::positions(positions).layout(layout);
                    to.slots = slots;
                    let mut write = KvWrite::new(x.view(), x.view(), k_cache.view_mut(), v_cache.view_mut(), to)
                        .k_norm(norm)
                        .v_packing(Packing::RowPairs);
                    write.rope = rotation;
                    most = most.max(allocations(|| kv_write(context, runner, write).unwrap()));
                }
            }
            // Tokens that share scales, quantised again, with keys that are turned.
            let (size, room) = ([2, seq + 9 - (seq + 9) % 4, 4, 64], seq + 9 - (seq + 9) % 4);
            let (mut units, mut scales) = (vec![0u8; 2 * room * 4 * 64], vec![0.5f32; 2 * (room / 4) * 4 * 64]);
            let written = AffineScales::written(ViewMut::new(&mut scales, [2, room / 4, 4, 64]).unwrap());
            let of = Affine::new(Integers::Signed);
            let k = CacheViewMut::affine(&mut units, CacheFormat::Affine8, size, of, written).unwrap();
            let mut layers = [KvLayer::keys(k)];
            let mut lengths = [room as i32, 2];
            let mut cache = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
            let turns = [Some(KeyRotation::new(Pairing::Interleaved, &frequencies))];
            most = most.max(allocations(|| cache.evict(context, runner, 0, 1..2, &turns).unwrap()));
            most = most.max(allocations(|| cache.copy_prefix(context, runner, 0, &[1], room - 1).unwrap()));
            let (from, to) = (x.view(), y.view_mut());
            most = most.max(allocations(|| rms_norm(context, runner, from, to, &norm).unwrap()));
            let to = y.view_mut();
            most = most.max(allocations(|| rms_norm_rope_in_place(context, runner, to, &norm, &options).unwrap()));
            let mut packed = Tensor::output(dtype, [2, seq.div_ceil(2), 4, 128], Layout::BSHD, Place::Heap);
            let (from, to) = (same.view(), packed.view_mut());
            most = most.max(allocations(|| pack_row_pairs(context, runner, from, to).unwrap()));
            let (from, to) = (packed.view(), y.view_mut());
            most = most.max(allocations(|| unpack_row_pairs(context, runner, from, to).unwrap()));
            let (from, to) = (x.view(), y.view_mut());
            most = most.max(allocations(|| rope(context, runner, from, to, &options).unwrap()));
            let to = y.view_mut();
            most = most.max(allocations(|| rope_in_place(context, runner, to, &options).unwrap()));
            let (from, to) = (same.view(), repeated.view_mut());
            most = most.max(allocations(|| repeat_kv(context, runner, from, to).unwrap()));
            let states = [AttentionState::new(same.view(), &lse); 3];
            let to = y.view_mut();
            most = most.max(allocations(|| merge_states(context, runner, &states, to, Some(&mut joint)).unwrap()));
        }
    }
    most
}

#[test]
fn no_operation_allocates() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let context = Context::with_max_isa(isa).unwrap();
        assert_eq!(all_operations(&context, &Serial), 0, "{isa}, on the calling thread");
        // A runner that does not allocate, to test the path of several workers.
        assert_eq!(all_operations(&context, &Backwards(4)), 0, "{isa}, four workers");
    }
    #[cfg(feature = "rayon")]
    {
        let context = Context::new().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        // The queues of the pool grow at first, and occasionally by a block for jobs from other threads.
        all_operations(&context, &Rayon::pool(&pool));
        let most = all_operations(&context, &Rayon::pool(&pool));
        println!("a call on a rayon pool: at most {most} allocations");
        assert!(most <= 4, "a call on a rayon pool made {most} allocations");
    }
}
