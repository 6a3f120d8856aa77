#!/usr/bin/env python3
"""The operators of operators.cpp in ONNX Runtime: compiles them against the library installed in PREFIX and the headers of ONNX
Runtime, and compares them with ONNX's node tests and with ONNX Runtime's own operators. The last run is a model for which the time of
a decode step is measured with both, in turns.

    test.py PREFIX HEADERS WORK

Custom operators cannot take the place of those of another domain: `with_kvlane` changes the domain of a model's nodes.
"""
import ctypes
import pathlib
import subprocess
import sys
import time
import warnings
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

prefix, headers, work = map(pathlib.Path, sys.argv[1:])
library = work / "kvlane_ort.so"
subprocess.run(
    ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{prefix}/include", "-isystem", headers,
     pathlib.Path(__file__).with_name("operators.cpp"), f"{prefix}/lib/libkvlane.a", "-Wl,--exclude-libs,libkvlane.a", "-lpthread",
     "-ldl", "-lm", "-o", library], check=True)
OPERATORS = {("", "Attention"), ("", "RotaryEmbedding"), ("", "TensorScatter"), ("com.microsoft", "GroupQueryAttention")}
THREADS = 2


def with_kvlane(model):
    """The model with kvlane's operators."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if (node.domain, node.op_type) in OPERATORS:
            node.domain = "kvlane"
    result.opset_import.append(helper.make_opsetid("kvlane", 1))
    return result


def session(model, kvlane):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4  # Errors are expected below.
    if kvlane:
        options.register_custom_ops_library(str(library))
        options.add_session_config_entry("kvlane.threads", str(THREADS))
        model = with_kvlane(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def value(x):
    """bfloat16 has no numpy type of its own."""
    if x.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x))


def run(session, names, inputs):
    got = session.run_with_ort_values(names, {name: value(x) for name, x in inputs.items()})
    return [array(x) for x in got]


def array(x):
    if x.data_type() != "tensor(bfloat16)":
        return x.numpy()
    bits = np.ctypeslib.as_array(ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_uint16)), x.shape())
    return bits.copy().view(ml_dtypes.bfloat16)


def close(got, want, rtol, atol, what):
    assert got.shape == want.shape, (what, got.shape, want.shape)
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.allclose(got, want, rtol=rtol, atol=atol, equal_nan=True), (what, np.abs(got - want).max())


# ---------------------------------------------------------------- ONNX's node tests

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases

    cases = collect_testcases(None)
counts = Counter()
for case in cases:
    node = case.model.graph.node[0]
    if (node.domain, node.op_type) not in OPERATORS or case.name.endswith("_expanded"):
        continue
    # Scores are an output of some: kvlane computes none.
    if len(node.output) > 3:
        counts["with scores"] += 1
        continue
    case.model.ir_version = min(case.model.ir_version, 10)
    ours = session(case.model, True)
    for inputs, expected in case.data_sets:
        names = [name for name in node.output if name]
        given = dict(zip([name for name in node.input if name], map(np.asarray, inputs), strict=True))
        for name, got, want in zip(names, run(ours, names, given), expected, strict=True):
            # ONNX compares bfloat16 to within two units.
            close(got, want, max(case.rtol, 2**-6) if got.dtype == ml_dtypes.bfloat16 else case.rtol, case.atol, (case.name, name))
    counts[node.op_type] += 1
assert counts == {"Attention": 75, "RotaryEmbedding": 8, "TensorScatter": 3, "with scores": 18}, counts
print(f"ONNX's node tests: {dict(counts)}")

# ---------------------------------------------------------------- GroupQueryAttention

TYPES = {np.float32: (TensorProto.FLOAT, 2e-6), np.float16: (TensorProto.FLOAT16, 4e-3)}
rng = np.random.default_rng(1)
HEADS, KV_HEADS, DIM = 8, 2, 64


def normal(dtype, *shape):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def tables(dtype, rows, rotary_dim):
    angles = np.arange(rows)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def gqa(inputs, dtype, **attributes):
    """A model of one node, whose inputs may be absent."""
    onnx_type, _ = TYPES[dtype]
    cache_type = {0: onnx_type, 8: TensorProto.INT8, 4: TensorProto.UINT8}[attributes.get("kv_cache_bit_width", 0)]
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
             "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale"]
    while names[-1] not in inputs:
        names.pop()
    used = [name if name in inputs else "" for name in names]
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node("GroupQueryAttention", used, outputs, domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS,
                            **attributes)
    given = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in inputs.items()]
    made = [helper.make_tensor_value_info(n, t, None) for n, t in zip(outputs, (onnx_type, cache_type, cache_type))]
    return helper.make_model(helper.make_graph([node], "gqa", given, made), ir_version=10,
                             opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)])


worst = dict.fromkeys(TYPES, 0.0)
for dtype, (_, tolerance) in TYPES.items():
    for lengths, seq in (([9, 9], 9), ([5, 9], 9), ([30, 12], 1), ([30], 6), ([70, 64], 1)):
        # `lengths` with the new tokens; the first two are prompts, of which the second is padded.
        batch, total = len(lengths), max(lengths)
        for attributes, packed, extra in (
            ({}, False, ()),
            ({"do_rotary": 1}, True, ()),
            ({"do_rotary": 1, "rotary_interleaved": 1, "scale": 0.3}, False, ("rotary_dim",)),
            ({"softcap": 5.0, "local_window_size": 4}, False, ()),
            ({"smooth_softmax": 1}, False, ()),
            ({"do_rotary": 1}, False, ("sink", "ids")),
            ({}, False, ("bias",)),
        ):
            width = HEADS * DIM
            inputs = {"query": normal(dtype, batch, seq, width + 2 * KV_HEADS * DIM if packed else width)}
            if not packed:
                inputs |= {name: normal(dtype, batch, seq, KV_HEADS * DIM) for name in ("key", "value")}
            if total != seq:
                inputs |= {name: normal(dtype, batch, KV_HEADS, 80, DIM) for name in ("past_key", "past_value")}
            inputs |= {"seqlens_k": np.array(lengths, np.int32) - 1, "total_sequence_length": np.array([total], np.int32)}
            if "do_rotary" in attributes:
                cos, sin = tables(dtype, 100, 32 if "rotary_dim" in extra else DIM)
                inputs |= {"cos_cache": cos, "sin_cache": sin}
            past = np.zeros(batch, np.int64) if total == seq else np.array(lengths) - seq
            if "ids" in extra:
                inputs["position_ids"] = 3 + past[:, None] + np.arange(seq)
            if "bias" in extra:
                inputs["attention_bias"] = normal(dtype, batch, 1, seq, total)
            if "sink" in extra:
                inputs["head_sink"] = normal(dtype, HEADS)
            model = gqa(inputs, dtype, **attributes)
            ours, theirs = (run(session(model, kvlane), None, inputs) for kvlane in (True, False))
            for b in range(batch):
                # What is behind the tokens of a prompt is padding.
                rows, keys = min(lengths[b], seq), past[b] + min(lengths[b], seq)
                for name, got, want in zip(("output", "keys", "values"), ours, theirs):
                    part = (b, slice(rows)) if name == "output" else (b, slice(None), slice(keys))
                    got, want = got[part], want[part]
                    close(got, want, tolerance, tolerance, (dtype, lengths, attributes, extra, name))
                    worst[dtype] = max(worst[dtype], float(np.abs(got.astype(np.float32) - want.astype(np.float32)).max()))
print(f"GroupQueryAttention: f32 within {worst[np.float32]:.1e} and float16 within {worst[np.float16]:.1e} of ONNX Runtime's")


def quantised(bits, kinds, lengths, seq, **attributes):
    """A model whose caches are integers, and its inputs. `lengths` are those with the new tokens."""
    batch, total = len(lengths), max(lengths)
    inputs = {"query": normal(np.float32, batch, seq, HEADS * DIM)}
    inputs |= {name: normal(np.float32, batch, seq, KV_HEADS * DIM) for name in ("key", "value")}
    # An empty past says of which type caches are.
    shape = (batch, KV_HEADS, 0 if total == seq else 80, DIM * bits // 8)
    past = [rng.integers(0, 256, shape).astype(np.uint8) for _ in range(2)]
    inputs |= dict(zip(("past_key", "past_value"), (x.view(np.int8) if bits == 8 else x for x in past)))
    inputs |= {"seqlens_k": np.array(lengths, np.int32) - 1, "total_sequence_length": np.array([total], np.int32)}
    if "do_rotary" in attributes:
        inputs |= dict(zip(("cos_cache", "sin_cache"), tables(np.float32, 100, DIM)))
    for name, kind in zip(("k_scale", "v_scale"), kinds):
        of = rng.uniform(0.5, 1.5, [1] if kind == "PER_TENSOR" else [KV_HEADS, 1, DIM])
        inputs[name] = (of * (3 / 127 if bits == 8 else 3 / 7)).astype(np.float32)
    return gqa(inputs, np.float32, kv_cache_bit_width=bits, k_quant_type=kinds[0], v_quant_type=kinds[1], **attributes), inputs


far, turned = 0.0, [0, 0]
for bits in (8, 4):
    for kinds in (("PER_TENSOR", "PER_TENSOR"), ("PER_CHANNEL", "PER_CHANNEL")):
        for lengths, seq in (([9, 9], 9), ([30, 12], 1), ([30], 6)):
            for attributes in ({}, {"do_rotary": 1}):
                model, inputs = quantised(bits, kinds, lengths, seq, **attributes)
                ours, theirs = (run(session(model, kvlane), None, inputs) for kvlane in (True, False))
                same = True
                for b, length in enumerate(lengths):
                    for got, want in zip(ours[1:], theirs[1:]):
                        got, want = (x[b, :, :length] for x in (got, want))
                        # A rotation that is rounded otherwise may change an integer by one.
                        different = np.count_nonzero(got != want)
                        same &= not different
                        turned[0] += different
                        turned[1] += got.size
                        assert attributes or not different, (bits, kinds, lengths, different)
                if same:
                    close(ours[0], theirs[0], 1e-5, 1e-5, (bits, kinds, lengths, attributes))
                    far = max(far, float(np.abs(ours[0] - theirs[0]).max()))
assert turned[0] < turned[1] / 1000, turned
print(f"GroupQueryAttention: caches of int8 and int4 with the same bytes, but for {turned[0]} of {turned[1]} after a rotation; outputs "
      f"within {far:.1e}")
for change, words in (({"k_scale": np.ones(3, np.float32)}, "k_scale of shape [3] has not 1 scales"),
                      ({"past_key": np.zeros((1, KV_HEADS, 80, 8), np.int8)}, "past_key of shape [1, 2, 80, 8]")):
    _, inputs = quantised(8, ("PER_TENSOR", "PER_TENSOR"), [30], 1)
    inputs |= change
    model = gqa(inputs, np.float32, kv_cache_bit_width=8, k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR")
    try:
        run(session(model, True), None, inputs)
        sys.exit(f"{list(change)} is no error")
    except Exception as error:
        assert words in str(error), error

for change, words in (
    ({"seqlens_k": np.array([99, 11], np.int32)}, "100"),
    ({"key": normal(np.float32, 2, 1, 24)}, "12"),
    ({"position_ids": np.zeros((1, 1), np.int64)}, "[1, 1]"),
    ({"head_sink": normal(np.float32, 3)}, "[3]"),
):
    inputs = {"query": normal(np.float32, 2, 1, HEADS * DIM), "key": normal(np.float32, 2, 1, KV_HEADS * DIM),
              "value": normal(np.float32, 2, 1, KV_HEADS * DIM)}
    inputs |= {name: normal(np.float32, 2, KV_HEADS, 80, DIM) for name in ("past_key", "past_value")}
    inputs |= {"seqlens_k": np.array([29, 11], np.int32), "total_sequence_length": np.array([30], np.int32)} | change
    try:
        run(session(gqa(inputs, np.float32), True), None, inputs)
        sys.exit(f"{list(change)} is no error")
    except Exception as error:
        assert words in str(error), error


# ---------------------------------------------------------------- a decoder of the standard's operators, and of GroupQueryAttention

LAYERS, CAPACITY, WIDTH = 2, 4608, 512
HEADS, KV_HEADS, DIM = 32, 8, 128


def decoder(dtype, standard):
    """Layers of attention with residuals over caches of CAPACITY tokens: `x` [1, seq, WIDTH] at `position` [1]."""
    onnx_type, _ = TYPES[dtype]
    weights = np.random.default_rng(2)
    nodes, constants, inputs, outputs = [], [], [], []

    def constant(name, x):
        constants.append(onnx.numpy_helper.from_array(x, name))
        return name

    def node(op, given, made, domain="", **attributes):
        nodes.append(helper.make_node(op, given, made if isinstance(made, list) else [made], domain=domain, **attributes))
        return made

    cos, sin = (constant(name, x) for name, x in zip(("cos", "sin"), tables(dtype, CAPACITY, DIM)))
    zero, one, first = (constant(name, np.array(x, np.int64)) for name, x in (("zero", 0), ("one", 1), ("first", [0])))
    length = node("Add", ["position", node("Slice", [node("Shape", ["x"], "shape"), constant("at1", np.array([1])),
                                                     constant("at2", np.array([2]))], "seq")], "length")
    whole = node("Squeeze", ["seq", first], "seq0")
    ids = node("Unsqueeze", [node("Add", [node("Range", [zero, whole, one], "range"), "position"], "id"), first], "ids")
    last = node("Cast", [node("Sub", [length, one], "last64")], "last", to=TensorProto.INT32)
    total = node("Cast", [length], "total", to=TensorProto.INT32)
    x = "x"
    for i in range(LAYERS):
        name = lambda part: f"{part}{i}"
        projected = []
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            w = constant(name(f"w{part}"), (weights.standard_normal((WIDTH, heads * DIM)) / WIDTH**0.5).astype(dtype))
            projected.append(node("MatMul", [x, w], name(part)))
        q, k, v = projected
        caches, after = [name("k_cache"), name("v_cache")], [name("k_after"), name("v_after")]
        for to, names in ((inputs, caches), (outputs, after)):
            to += [helper.make_tensor_value_info(n, onnx_type, [1, KV_HEADS, CAPACITY, DIM]) for n in names]
        if standard:
            q, k = (node("RotaryEmbedding", [t, cos, sin, ids], t + "_rotated", num_heads=n) for t, n in ((q, HEADS), (k, KV_HEADS)))
            for new, cache, to in zip((k, v), caches, after):
                shape = constant(f"{new}_shape", np.array([1, -1, KV_HEADS, DIM]))
                heads = node("Transpose", [node("Reshape", [new, shape], new + "_heads")], new + "_by_heads", perm=[0, 2, 1, 3])
                node("TensorScatter", [cache, heads, "position"], to)
            shape = constant(name("q_shape"), np.array([1, -1, HEADS, DIM]))
            q = node("Transpose", [node("Reshape", [q, shape], name("q4"))], name("q_by_heads"), perm=[0, 2, 1, 3])
            y = node("Attention", [q, *after, "", "", "", length], name("y4"), is_causal=1)
            y = node("Reshape", [node("Transpose", [y], name("y3"), perm=[0, 2, 1, 3]), constant(name("flat"), np.array([1, -1, HEADS * DIM]))], name("y"))
        else:
            y = name("y")
            node("GroupQueryAttention", [q, k, v, *caches, last, total, cos, sin], [y, *after], domain="com.microsoft",
                 num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1)
        w = constant(name("wo"), (weights.standard_normal((HEADS * DIM, WIDTH)) / (HEADS * DIM) ** 0.5).astype(dtype))
        x = node("Add", [x, node("MatMul", [y, w], name("o"))], name("x"))
    inputs = [helper.make_tensor_value_info("x", onnx_type, [1, None, WIDTH]),
              helper.make_tensor_value_info("position", TensorProto.INT64, [1]), *inputs]
    outputs = [helper.make_tensor_value_info(x, onnx_type, [1, None, WIDTH]), *outputs]
    return helper.make_model(helper.make_graph(nodes, "decoder", inputs, outputs, constants), ir_version=10,
                             opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)])


class Decoder:
    """A session whose caches are input and output at once."""

    def __init__(self, model, kvlane, dtype):
        self.session, self.dtype = session(model, kvlane), dtype
        # As if tokens had been there before.
        rng = np.random.default_rng(3)
        self.caches = {i.name: value(rng.standard_normal(i.shape, np.float32).astype(dtype))
                       for i in self.session.get_inputs() if "cache" in i.name}

    def step(self, x, position):
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("x", value(x))
        binding.bind_ortvalue_input("position", value(np.array([position], np.int64)))
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("cache", "after"), cache)
        result = self.session.get_outputs()[0].name
        binding.bind_output(result)
        start = time.perf_counter()
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy(), time.perf_counter() - start


for standard in (True, False):
    for dtype, (_, tolerance) in TYPES.items():
        model = decoder(dtype, standard)
        ours, theirs = (Decoder(model, kvlane, dtype) for kvlane in (True, False))
        position, error, best = 4000, 0.0, {}
        # Some tokens of a prompt, then steps.
        for seq in [64] + [1] * 60:
            x = normal(dtype, 1, seq, WIDTH)
            (got, ours_time), (want, theirs_time) = ours.step(x, position), theirs.step(x, position)
            close(got, want, 10 * tolerance, 10 * tolerance, ("decoder", standard, dtype, position))
            error = max(error, float(np.abs(got.astype(np.float32) - want.astype(np.float32)).max()))
            position += seq
            if seq == 1:
                best = {"ours": min(best.get("ours", 1e9), ours_time), "theirs": min(best.get("theirs", 1e9), theirs_time)}
        for name, cache in ours.caches.items():
            close(cache.numpy(), theirs.caches[name].numpy(), 10 * tolerance, 10 * tolerance, ("cache", standard, dtype, name))
        ratio = best["theirs"] / best["ours"]
        kind = "RotaryEmbedding, TensorScatter, Attention" if standard else "GroupQueryAttention"
        print(f"decoder of {kind}, {np.dtype(dtype)}: within {error:.1e}; a step at {position} tokens {ratio:.2f} times as fast")
        assert ratio > 1, best
