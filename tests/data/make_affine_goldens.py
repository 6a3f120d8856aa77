"""Writes tests/data/affine_goldens.txt: quantised caches that ONNX Runtime, OpenVINO and Hugging Face's quanto have written, and what they
read from them.

    python -m venv env && env/bin/pip install onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 optimum-quanto==0.2.7 transformers torch
    env/bin/python tests/data/make_affine_goldens.py

Each line is a name and the bytes of an array, little-endian, in hexadecimal digits. New keys, values and queries are f16, which each
runtime is given as f32.

- ort_{8,4}_{tensor,channel}: GroupQueryAttention with a past of 3 tokens and 2 new ones, 4 query heads, 2 KV heads of 32 elements.
  q, k, v [2, heads, 32]; k_scale, v_scale; past_k, past_v and present_k, present_v [2, tokens, bytes of a head]; out [2, 4, 32].
- ov_{u8,u4}: PagedAttention over one page of 32 tokens, 2 query heads, one KV head of 32 elements; keys by channel, values by token.
  q, k, v [32, heads, 32]; key_cache: f32 scales [32], f32 zero points [32], integers [32, 32]; value_cache: 32 records of an f32 scale, an
  f32 zero point and 32 integers; out [32, 2, 32].
- quanto_{token,channel}: QuantoQuantizedLayer's way with 64 tokens of one head of 64 elements, 4 bits, groups of 64: along a head (axis 0), and
  along tokens for each channel (axis -1). x; scale, shift [64]; q [64, 64], a byte each; read [64, 64].
"""

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import torch
from onnx import TensorProto, helper
from openvino.op import _PagedAttentionExtension
from optimum.quanto import MaxOptimizer, qint4, quantize_weight

lines = []


def put(name, array):
    lines.append(f"{name} {np.ascontiguousarray(array).tobytes().hex()}")


def exact(x):
    """The nearest numbers of f16."""
    return x.astype(np.float16).astype(np.float32)


def random(rng, *shape):
    return exact(rng.standard_normal(shape))


def onnx_runtime(bits, kind):
    heads, kv_heads, dim, past, new = 4, 2, 32, 3, 2
    cache_type = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
    head_bytes = dim * bits // 8
    scale_shape = [1] if kind == "tensor" else [kv_heads, 1, dim]
    f32, i32 = TensorProto.FLOAT, TensorProto.INT32
    inputs = [
        ("query", f32, [1, new, heads * dim]),
        ("key", f32, [1, new, kv_heads * dim]),
        ("value", f32, [1, new, kv_heads * dim]),
        ("past_key", cache_type, [1, kv_heads, past, head_bytes]),
        ("past_value", cache_type, [1, kv_heads, past, head_bytes]),
        ("seqlens_k", i32, [1]),
        ("total", i32, [1]),
        ("k_scale", f32, scale_shape),
        ("v_scale", f32, scale_shape),
    ]
    names = [name for name, _, _ in inputs]
    outputs = [
        ("out", f32, [1, new, heads * dim]),
        ("present_key", cache_type, [1, kv_heads, past + new, head_bytes]),
        ("present_value", cache_type, [1, kv_heads, past + new, head_bytes]),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        names[:7] + [""] * 5 + names[7:],
        [name for name, _, _ in outputs],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        k_quant_type=f"PER_{kind.upper()}",
        v_quant_type=f"PER_{kind.upper()}",
        kv_cache_bit_width=bits,
    )
    info = helper.make_tensor_value_info
    graph = helper.make_graph([node], "attention", [info(*i) for i in inputs], [info(*o) for o in outputs])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    rng = np.random.default_rng(bits)
    q, k, v = (random(rng, new, n, dim) for n in (heads, kv_heads, kv_heads))
    # Far beyond the range, and ties.
    k[0, 0, :8] = [100, -100, 0, -0.0, 0.5, 1.5, 2.5, -2.5]
    step = 0.25 if bits == 4 else 1 / 32
    k_scale, v_scale = (np.full(math.prod(scale_shape), step, np.float32) for _ in range(2))
    if kind == "channel":
        k_scale[5:] *= 1 + rng.random(len(k_scale) - 5).astype(np.float32)
    v_scale *= np.float32(1.1)
    any_byte = rng.integers(0, 256, (2, kv_heads, past, head_bytes)).astype(np.uint8)
    past_k, past_v = any_byte.view(np.int8) if bits == 8 else any_byte
    feed = {
        "query": q.reshape(1, new, -1),
        "key": k.reshape(1, new, -1),
        "value": v.reshape(1, new, -1),
        "past_key": past_k[None],
        "past_value": past_v[None],
        "seqlens_k": np.array([past + new - 1], np.int32),
        "total": np.array([past + new], np.int32),
        "k_scale": k_scale.reshape(scale_shape),
        "v_scale": v_scale.reshape(scale_shape),
    }
    out, present_k, present_v = session.run(None, feed)
    case = f"ort_{bits}_{kind}"
    for name, array in (("q", q), ("k", k), ("v", v)):
        put(f"{case}.{name}", array.astype(np.float16))
    for name, array in (("k_scale", k_scale), ("v_scale", v_scale), ("past_k", past_k), ("past_v", past_v)):
        put(f"{case}.{name}", array)
    for name, array in (("present_k", present_k), ("present_v", present_v), ("out", out)):
        put(f"{case}.{name}", array)


def openvino(precision):
    heads, kv_heads, dim, tokens = 2, 1, 32, 32
    f32, i32 = ov.Type.f32, ov.Type.i32
    dynamic = ov.Type.dynamic

    def parameter(name, shape, dtype):
        node = ov.opset13.parameter(ov.PartialShape(shape), dtype, name=name)
        node.output(0).get_tensor().set_names({name})
        return node

    parameters = [
        parameter("query", [-1, heads * dim], f32),
        parameter("key", [-1, kv_heads * dim], f32),
        parameter("value", [-1, kv_heads * dim], f32),
        parameter("key_cache.0", [-1, kv_heads, -1, -1], dynamic),
        parameter("value_cache.0", [-1, kv_heads, -1, -1], dynamic),
        *(parameter(name, [-1], i32) for name in ("past_lens", "subsequence_begins", "block_indices", "block_begins")),
    ]
    i, f = np.int32, np.float32
    # Scale, window, ALiBi, longest context, and options that are not used.
    constants = [(1 / math.sqrt(dim), f), (0, i), ([], f), (tokens, i), (0, i), ([], i), ([], i), ([], f), ([], f), (128, i), (8, i)]
    constants += [([], f), (0, i), ([], i), ([], i), ([], i), ([], i), ([], np.uint8), ([], i)]
    nodes = parameters + [ov.opset13.constant(np.asarray(value, dtype)) for value, dtype in constants]
    attention = _PagedAttentionExtension([node.output(0) for node in nodes])
    for key, value in (("num_k_heads", kv_heads), ("k_head_size", dim), ("num_v_heads", kv_heads), ("v_head_size", dim)):
        attention.get_rt_info()[key] = value
    model = ov.Model([attention.output(0)], parameters, "attention")
    options = {"KV_CACHE_PRECISION": precision, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", options)

    rng = np.random.default_rng(3)
    q, k, v = (random(rng, tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    # A channel of outliers, one of equal elements, a token far from 0, and one of equal elements.
    k[:, 0, 5] *= 20
    k[:, 0, 7] = 1.5
    v[3] += 4
    v[4] = -0.75
    k, v = exact(k), exact(v)
    caches = []
    for number in (3, 4):
        shape = [1] + [axis.get_length() for axis in list(compiled.inputs[number].partial_shape)[1:]]
        caches.append(ov.Tensor(compiled.inputs[number].element_type, ov.Shape(shape)))
    request = compiled.create_infer_request()
    lists = [ov.Tensor(np.array(x, np.int32)) for x in ([0], [0, tokens], [0], [0, 1])]
    flat = [ov.Tensor(np.ascontiguousarray(x.reshape(tokens, -1))) for x in (q, k, v)]
    for number, tensor in enumerate([*flat, *caches, *lists]):
        request.set_input_tensor(number, tensor)
    request.infer()
    case = f"ov_{precision}"
    for name, array in (("q", q), ("k", k), ("v", v)):
        put(f"{case}.{name}", array.astype(np.float16))
    put(f"{case}.key_cache", caches[0].data.view(np.uint8))
    put(f"{case}.value_cache", caches[1].data.view(np.uint8))
    put(f"{case}.out", request.get_output_tensor(0).data)


def quanto(case, axis):
    x = random(np.random.default_rng(axis + 5), 1, 1, 64, 64)
    x[0, 0, :, 9] *= 8
    tensor = torch.from_numpy(x)
    scale, shift = MaxOptimizer()(tensor, qint4, axis, 64)
    quantised = quantize_weight(tensor, qint4, axis, scale, shift, 64, optimized=False)
    numbers = quantised._data.unpack().numpy()
    put(f"quanto_{case}.x", x.astype(np.float16))
    put(f"quanto_{case}.scale", scale.numpy())
    put(f"quanto_{case}.shift", shift.numpy())
    put(f"quanto_{case}.q", numbers)
    put(f"quanto_{case}.read", quantised.dequantize().numpy())


for bits in (8, 4):
    for kind in ("tensor", "channel"):
        onnx_runtime(bits, kind)
for precision in ("u8", "u4"):
    openvino(precision)
quanto("token", 0)
quanto("channel", -1)
Path(__file__).with_name("affine_goldens.txt").write_text("\n".join(lines) + "\n")
