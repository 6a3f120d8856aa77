//! Masks: which query sees which key, the order of operations on a logit, and the conventions of other libraries.
//!
//! This page defines [`AttentionOptions`](crate::AttentionOptions) (in C: `kvl_attention_params`) where libraries
//! differ, often by one, and translates their conventions.
//!
//! # The order
//! ```text
//! x = q . k * scale
//! x = softcap * tanh(x / softcap)          if there is a softcap
//! x = x + slope[head] * (j - p)            if there are ALiBi slopes
//! x = x + bias[b, i, head, j]              if there is a bias
//! masked keys are removed
//! weights = softmax over the remaining keys, and the head's sink logit if there is one, in f32
//! ```
//! A key is masked by its position, by a mask, or by a bias of -inf, never by its logit. So a mask cannot leak through
//! the softcap, and a logit of -inf or NaN is an ordinary logit.
//!
//! # Positions
//! Key j of a sequence is its token number j, in the slot that the [`Layout`](crate::Layout) defines. Query i of a sequence has
//! the position `p = i + offset`. The default offset is `length - queries`: the last query is at the last key (bottom-right
//! alignment), as a cache needs it. Every sequence has its own `length`, `kv_start` and `offset`.
//!
//! `query_positions` gives queries other positions: p is then the entry of the list. Key `i + offset` is the query's own token and has
//! the same position. Causality, windows and ALiBi use that position for the key, instead of j. Lengths, first keys, prefixes, masks
//! and biases use the number of the key. If the queries are not in the cache, give an `offset` of `length` or more.
//!
//! | option | key j is visible if | precisely |
//! | --- | --- | --- |
//! | length n | `j < n` | n counts keys |
//! | first key s (`kv_starts`) | `j >= s` | s is the first visible key |
//! | causal | `j <= p` | the own position is visible |
//! | left window w | `j >= p - w` | w keys before the own position, and the own position: w + 1 keys |
//! | right window w | `j <= p + w` | w keys after the own position |
//! | prefix n | `j < n` | n counts keys; overrides causality and windows, not lengths, first keys or masks |
//! | mask, bit mask | the entry is not 0 | entry `[b, i, head, j]`, with i and j counted within the sequence, ragged or not |
//! | bit mask with first key f | bit `j - f` is 1, or `j < f` | bit 0 is of key f |
//! | bias | it is not -inf | otherwise it is added |
//! | ring of c slots, s of them for sink tokens, after n > c tokens | `j < s` or `j >= n - (c - s)` | the newest c - s tokens |
//!
//! All conditions apply together, in every combination. Impossible combinations are an error: a window, a prefix or a
//! second query that reaches tokens which a ring has overwritten, a bit mask that ends before a sequence's last key, a
//! table entry that is not a page of the pool.
//!
//! A query that sees no key has output 0 and LSE -inf, or with a sink logit, that logit.
//!
//! # From other conventions
//! | theirs | ours |
//! | --- | --- |
//! | **ONNX** `Attention` `is_causal` | `causal`, `offset` = past length; with `nonpad_kv_seqlen` the default offset |
//! | ONNX `left_window_size` W, `right_window_size` W | `window_left` = W, `window_right` = W; -1 is none |
//! | ONNX `attn_mask` of bool, of float | `mask`, `bias`; pad a last axis that is too short with false or -inf |
//! | ONNX `nonpad_kv_seqlen` | `lengths` |
//! | **Hugging Face** `sliding_window` W (the own position counts) | `window_left` = W - 1 |
//! | Hugging Face `attention_mask` with zeros on the left, on the right | `kv_starts`, `lengths` |
//! | Hugging Face `cache_position` | RoPE positions; attention needs `offsets` only if the last query is not at the last key |
//! | **PyTorch** `scaled_dot_product_attention(is_causal=True)` (top-left) | `causal`, `offset` = 0 |
//! | PyTorch `attn_mask` of bool (true is visible), of float | `mask`, `bias` |
//! | **FlashInfer**, **FlashAttention** `causal` (bottom-right) | `causal` |
//! | FlashInfer `window_left` W, FlashAttention `window_size` (L, R) | `window_left` = W; `window_left` = L, `window_right` = R |
//! | FlashInfer `packed_custom_mask` (lowest bit first) | `bit_mask` with a bit offset and stride per sequence: [below](#flattened-masks) |
//! | FlashInfer `qo_indptr`, `kv_indptr`, `cu_seqlens_q`, `cu_seqlens_k` | `cu_seqlens_q`, [`Layout::Ragged`](crate::Layout::Ragged) |
//! | FlashInfer LSE (base 2) | ours times log2(e) |
//! | **vLLM** `sliding_window` W, `block_table`, `slot_mapping` | `window_left` = W - 1, [`Layout::Paged`](crate::Layout::Paged), slots of a paged write |
//! | **ONNX Runtime** `GroupQueryAttention` `seqlens_k` (total - 1) | `lengths` = `seqlens_k` + 1 |
//! | ONNX Runtime `local_window_size` W (the own position counts; in older versions it did not) | `window_left` = W - 1 |
//! | ONNX Runtime `head_sink`, `softcap` | `sink_logits`, `softcap` |
//! | **ggml** `flash_attn_ext` mask (added, f16) | `bias`; or its origin: `causal`, `kv_starts`, windows |
//! | ggml `max_bias` | `alibi_slopes` of [`alibi_slopes`](crate::alibi_slopes) for a `max_bias` of 8; ggml multiplies the slope with the mask, kvlane with j - p |
//! | ggml sinks | `sink_logits` |
//! | **Grok-1** memory mask times causal mask | `lengths`, `causal` |
//! | **x-transformers** `seq_start_pos` | `kv_starts` |
//!
//! # Flattened masks
//! FlashInfer stores the masks of a ragged batch one after another, each `[queries, keys]` of its request. Such a
//! buffer is a [`BitMask`](crate::BitMask::per_sequence) with a bit offset and a stride of queries for every sequence:
//!
//! | theirs | `bit_offsets[b]`, in bits | `query_strides[b]`, in bits |
//! | --- | --- | --- |
//! | `packed_custom_mask`: every request begins at a byte, `mask_indptr` counts bytes | `8 * mask_indptr[b]` | keys of request b |
//! | `custom_mask` (one boolean per entry), packed as one row of bits, lowest first | sum of queries times keys of the earlier requests | keys of request b |
//!
//! The shape is `[requests, most queries, heads, most keys]`, with stride 0 for heads. `cu_seqlens_q` is `qo_indptr`, and `lengths`
//! are the keys of each request.
//!
//! ```
//! use kvlane::*;
//! let context = Context::new()?;
//! // One query that sees keys 0 and 2 of three, and two that see all but the last, or the first, of four.
//! let (packed_custom_mask, mask_indptr) = ([0b101u8, 0b1110_0111], [0i64, 1, 2]);
//! let (qo_indptr, lengths) = ([0, 1, 3], [3, 4]);
//! let bit_offsets: Vec<i64> = mask_indptr[..2].iter().map(|byte| 8 * byte).collect();
//! let query_strides: Vec<i64> = lengths.iter().map(|&n| n.into()).collect();
//! let bits = BitMask::per_sequence(&packed_custom_mask, &bit_offsets, &query_strides, 0, [2, 2, 1, 4])?;
//! let keys = vec![0.5f32; 2 * 4 * 4];
//! let values: Vec<f32> = (0..8).flat_map(|token| [token as f32; 4]).collect();
//! let (q, mut out) = (vec![0.0f32; 3 * 4], vec![0.0f32; 3 * 4]);
//! let tensors = AttentionTensors::new(
//!     View::new(&q, [1, 3, 1, 4])?,
//!     View::new(&keys, [2, 4, 1, 4])?,
//!     View::new(&values, [2, 4, 1, 4])?,
//!     ViewMut::new(&mut out, [1, 3, 1, 4])?,
//! );
//! let options = AttentionOptions::new().cu_seqlens_q(&qo_indptr).lengths(&lengths).bit_mask(bits);
//! attention(&context, &Serial, &mut Workspace::new(), tensors, &options)?;
//! // All weights are equal: means of tokens 0 and 2, of 4 to 6, and of 5 to 7.
//! for (query, mean) in [1.0, 5.0, 6.0].into_iter().enumerate() {
//!     assert!((out[4 * query] - mean).abs() < 1e-6);
//! }
//! # Ok::<(), kvlane::Error>(())
//! ```
//!
//! # A tree of guesses
//! Speculative decoding appends n guessed tokens to the cache, each a child of an earlier one, and verifies them in one call.
//! With T tokens in the cache before them: `lengths` = T + n, no causality, and a [`BitMask`](crate::BitMask) of n bits per query
//! with first key T. Bit j of query i is 1 if i is j or a descendant of j. Earlier keys are visible to all guesses. This works with
//! every layout. Rejected guesses are dropped by the lengths alone.
//!
//! Guesses of one depth are in different slots, but have the same position. Windows and ALiBi must use that position, not the slot:
//! pass `query_positions` with T + depth for each guess. The keys of the guesses then have these positions too, and each guess has
//! the output that it has if only its ancestors follow the cache. Causality can be on or off, because the mask masks more.
//!
//! ```
//! use kvlane::*;
//! let context = Context::new()?;
//! // Five tokens in the cache, and the guesses 0 -> 1, 0 -> 2.
//! let (cached, n) = ([5], 3);
//! let tree = [0b001u8, 0b011, 0b101];
//! let keys = vec![0.5f32; 8 * 4];
//! let values: Vec<f32> = (0..8).flat_map(|token| [token as f32; 4]).collect();
//! let q = vec![0.0f32; n * 4];
//! let mut out = vec![0.0f32; n * 4];
//! let bits = BitMask::strided(&tree, 0, [1, n, 1, n], [0, 8, 0])?.with_first_keys(&cached);
//! let depths = [5, 6, 6];
//! let options = AttentionOptions::new().bit_mask(bits).query_positions(&depths).window_left(5);
//! let tensors = AttentionTensors::new(
//!     View::new(&q, [1, n, 1, 4])?,
//!     View::new(&keys, [1, 8, 1, 4])?,
//!     View::new(&values, [1, 8, 1, 4])?,
//!     ViewMut::new(&mut out, [1, n, 1, 4])?,
//! );
//! attention(&context, &Serial, &mut Workspace::new(), tensors, &options)?;
//! // All weights are equal: means of tokens 0 to 5, of 1 to 6, and of 1 to 5 and 7. The window leaves out token 0.
//! for (query, mean) in [2.5, 3.5, 22.0 / 6.0].into_iter().enumerate() {
//!     assert!((out[4 * query] - mean).abs() < 1e-6);
//! }
//! # Ok::<(), kvlane::Error>(())
//! ```
