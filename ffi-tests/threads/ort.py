#!/usr/bin/env python3
"""Attention on the threads of an ONNX Runtime session: compiles ort.cpp against the library installed in PREFIX and the
headers of ONNX Runtime, runs models with the operator, and compares with the calling thread to the bit, and with numpy.

    ort.py PREFIX HEADERS WORK
"""
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime

prefix, headers, work = map(pathlib.Path, sys.argv[1:])
library = work / "onnxruntime_attention.so"
subprocess.run(
    ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{prefix}/include", "-isystem", headers,
     pathlib.Path(__file__).with_name("ort.cpp"), f"{prefix}/lib/libkvlane.a", "-Wl,--exclude-libs,libkvlane.a", "-lpthread",
     "-ldl", "-lm", "-o", library], check=True)


def session(threads):
    helper, FLOAT, INT32 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    node = helper.make_node("Attention", ["q", "k", "v", "lengths"], ["out", "loops"], domain="kvlane", threads=threads)
    inputs = [helper.make_tensor_value_info(name, FLOAT, [None] * 4) for name in "qkv"]
    inputs.append(helper.make_tensor_value_info("lengths", INT32, [None]))
    outputs = [helper.make_tensor_value_info("out", FLOAT, [None] * 4), helper.make_tensor_value_info("loops", INT32, [1])]
    model = helper.make_model(helper.make_graph([node], "attention", inputs, outputs), ir_version=9,
                              opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("kvlane", 1)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # The wrong shape below is expected.
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


rng = np.random.default_rng(1)
pooled, alone = session(3), session(1)
for seq in (1, 64):
    batch, heads, kv_heads, dim, capacity = 4, 8, 2, 64, 1024
    q = rng.standard_normal((batch, seq, heads, dim), np.float32)
    k, v = (rng.standard_normal((batch, capacity, kv_heads, dim), np.float32) for _ in range(2))
    lengths = np.array([1024, 300, 700, 64], np.int32)
    feed = {"q": q, "k": k, "v": v, "lengths": lengths}
    (threads, loops), (wanted, none) = pooled.run(None, feed), alone.run(None, feed)
    assert np.array_equal(threads.view(np.uint32), wanted.view(np.uint32)), "other bits"
    assert none[0] == 0 and loops[0] > 0, f"{loops[0]} loops on the session's threads"
    keys, values = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    logits = np.einsum("bshd,bthd->bhst", q, keys) / np.sqrt(dim)
    rows = lengths[:, None] - seq + np.arange(seq)
    logits = np.where(np.arange(capacity) <= rows[:, None, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    reference = np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), values)
    error = float(np.abs(reference - wanted).max())
    assert error < 1e-5, error
    print(f"ONNX Runtime, {seq} queries per sequence: the bits of one thread, {loops[0]} loops on its pool, {error:.1e} from numpy")
try:
    pooled.run(None, {**feed, "q": q[..., :32]})
    sys.exit("a wrong shape is no error")
except onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException as error:
    assert "32" in str(error) and "64" in str(error), error
