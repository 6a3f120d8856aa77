#!/usr/bin/env python3
"""Grok-1's own model code, sharded over eight devices, with kvlane inside.

    grok.py PREFIX WORK GROK-1

GROK-1 is a clone of xai-org/grok-1 at 7050ed2, used as it is. Its model has small random weights (those of make_grok.py, with
eight KV heads) and computes a prompt and steps on eight virtual CPU devices, each of which has one KV head of the cache:

- as it is;
- with the update of its caches, a dynamic_update_slice under vmap under shard_map, by kvlane;
- with rotation, update and attention by kvlane, under shard_map too.

The second has to give the bits of the first, in f32 and in bf16. The third has to give its numbers: in f32 closely, in bf16 as
closely as bf16 to f32, because the original rounds scores and weights to bf16.
"""
import os
import pathlib
import subprocess
import sys
import types
import warnings

if len(sys.argv) == 4:
    # Each type in a process of its own: the second must not see the first one's.
    for name in ("f32", "bf16"):
        subprocess.run([sys.executable, *sys.argv, name], check=True)
    sys.exit()

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import haiku as hk
import jax
import jax.numpy as jnp
import kvlane_jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

prefix, work, grok = map(pathlib.Path, sys.argv[1:4])
wide = sys.argv[4] == "f32"
if wide:
    jnp.bfloat16 = jnp.float32  # Nothing is rounded.
sys.path[:0] = [str(grok), str(pathlib.Path(__file__).parents[2] / "tests" / "data")]
import make_grok

assert len(jax.devices()) == 8
kvlane_jax.load(prefix, work)
make_grok.HEADS, make_grok.KV_HEADS = 16, 8

# The names of the JAX of 2024 that the original uses, by what they are called now.
maps, shard_map = types.ModuleType("jax.experimental.maps"), types.ModuleType("jax.experimental.shard_map")
maps.thread_resources = jax._src.mesh.thread_resources
shard_map.shard_map = lambda f, *, mesh, in_specs, out_specs, check_rep: jax.shard_map(
    f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_rep)
for module in (maps, shard_map):
    sys.modules[module.__name__] = module
    setattr(jax.experimental, module.__name__.rsplit(".", 1)[1], module)
update_config = jax.config.update
warnings.filterwarnings("ignore", "`with mesh:`", DeprecationWarning)
jax.config.update = lambda name, value: None if name == "jax_spmd_mode" else update_config(name, value)
import model

ROWS, SLOTS = 3, 16
mesh = Mesh(np.array(jax.devices()).reshape(1, 8), ("data", "model"))
heads = P("data", None, "model")
calls = {"update": 0, "attention": 0}


def kvlane_update(cache, tokens, start, axis):
    assert axis == 0 and cache.ndim == 3, "one row of the memory, under vmap"
    calls["update"] += 1
    return kvlane_jax.update(cache, tokens, start)


class MultiHeadAttention(model.MultiHeadAttention):
    """The original's attention by the library's operations, on each device for its heads. Rows have no padding."""

    def __call__(self, query, key, value, mask=None, kv_memory=None, mesh=None):
        del mask
        calls["attention"] += 1

        def project(x, size, count, name):
            return self._linear_projection(x, size, count, name=name, sharding=P("data", "model"), mesh=mesh)

        q = project(query, self.key_size, self.num_q_heads, "query")
        k = project(key, self.key_size, self.num_kv_heads, "key")
        v = project(value, self.value_size, self.num_kv_heads, "value")

        def local(q, k, v, k_cache, v_cache, step):
            q, k = kvlane_jax.rope(q, step), kvlane_jax.rope(k, step)
            k_cache, v_cache = kvlane_jax.write(k_cache, v_cache, k, v, step)
            length = step + q.shape[1]
            return kvlane_jax.attention(q, k_cache, v_cache, length, scale=self.attn_output_multiplier, softcap=30.0), k_cache, v_cache

        on_devices = jax.shard_map(local, mesh=mesh, in_specs=(heads,) * 5 + (P("data"),), out_specs=(heads,) * 3, check_vma=False)
        out, k_cache, v_cache = on_devices(q, k, v, kv_memory.k, kv_memory.v, kv_memory.step)
        memory = model.KVMemory(k=k_cache, v=v_cache, step=kv_memory.step + q.shape[1])
        last = model.Linear(self.model_size, with_bias=False, sharding=P("model", "data"), mesh=mesh)
        return model.MHAOutput(last(out.reshape(*out.shape[:2], -1)), memory)


def run():
    """The logits and the memory after a prompt that fills the rows, and after steps of rows of different lengths."""
    language_model = model.LanguageModelConfig(
        vocab_size=make_grok.VOCAB, pad_token=make_grok.PAD, eos_token=make_grok.EOS, sequence_len=SLOTS,
        output_multiplier_scale=make_grok.OUTPUT_SCALE, embedding_multiplier_scale=make_grok.EMBEDDING_SCALE,
        model=model.TransformerConfig(
            emb_size=make_grok.DIM, widening_factor=make_grok.FFN * 3 / 2 / make_grok.DIM, key_size=make_grok.HEAD_DIM,
            num_q_heads=make_grok.HEADS, num_kv_heads=make_grok.KV_HEADS, num_layers=make_grok.LAYERS,
            attn_output_multiplier=make_grok.ATTENTION_SCALE, shard_activations=True, num_experts=make_grok.EXPERTS,
            num_selected_experts=make_grok.USED))
    language_model.initialize()
    forward = hk.without_apply_rng(hk.transform(lambda tokens, memory: language_model.make(mesh=mesh)(tokens, memory)))
    new = hk.without_apply_rng(hk.transform(lambda: language_model.make(mesh=mesh).init_memory(ROWS, SLOTS, jnp.bfloat16)))
    rng, results = np.random.default_rng(2), []
    with mesh:
        memory = new.apply({})
        tokens = jnp.asarray(rng.integers(4, make_grok.VOCAB, (ROWS, SLOTS)), jnp.int32)
        params = make_grok.original_params(jax.eval_shape(forward.init, jax.random.PRNGKey(0), tokens, memory), wide)
        for name, weights in params.items():
            if name.endswith("moe/linear_1"):  # Split along the axis that its scales have, too: one of the scales per device.
                scales = jnp.repeat(weights["w"].scales, 8, axis=-2)
                weights["w"] = model.QuantizedWeight8bit(weight=weights["w"].weight, scales=scales)
        place = lambda layer: model.KVMemory(
            *(jax.device_put(x, NamedSharding(mesh, heads)) for x in (layer.k, layer.v)), layer.step.copy())
        memory = model.Memory(layers=[place(layer) for layer in memory.layers])
        apply = jax.jit(forward.apply, donate_argnums=2)

        def call(tokens):
            nonlocal memory
            output = apply(params, tokens, memory)
            memory = output.model_state
            results.append([np.asarray(x, np.float32) for x in (output.logits, *(part for l in memory.layers for part in (l.k, l.v)))])

        call(tokens)
        # Each row continues somewhere else, up to its last slot.
        lengths = jnp.asarray([4, 13, 9], jnp.int32)
        memory = model.Memory(layers=[layer._replace(step=lengths.copy()) for layer in memory.layers])
        for _ in range(3):
            call(jnp.asarray(rng.integers(4, make_grok.VOCAB, (ROWS, 1)), jnp.int32))
        for layer in memory.layers:
            shards = {shard.device: shard.data.shape for shard in layer.k.addressable_shards}
            assert len(shards) == 8 and set(shards.values()) == {(ROWS, SLOTS, 1, make_grok.HEAD_DIM)}, shards
    return results


def error(a, b):
    """The largest difference of the logits, and of the caches, as a fraction of the largest number."""
    parts = lambda index: zip(*([x[index] for x in run] for run in (a, b)))
    worst = lambda index: max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in parts(index))
    return worst(0), max(worst(i) for i in range(1, len(a[0])))


original = run()
slices = jax.lax.dynamic_update_slice_in_dim
jax.lax.dynamic_update_slice_in_dim = kvlane_update
updated = run()
jax.lax.dynamic_update_slice_in_dim = slices
assert calls["update"] > 0 and calls["attention"] == 0, calls
for a, b in zip(updated, original):
    assert all(np.array_equal(x.view(np.uint32), y.view(np.uint32)) for x, y in zip(a, b)), "other bits"
model.MultiHeadAttention = MultiHeadAttention
logits, caches = error(run(), original)
assert calls["attention"] > 0, calls
print(f"Grok-1 in {sys.argv[4]} on 8 devices: the same bits with its update by kvlane; with rotation, update and attention by kvlane, "
      f"logits {logits:.1e} and caches {caches:.1e} from its own")
kept = work / "grok_f32.npz"
if wide:
    np.savez(kept, *(x for call in original for x in call))
    rounding = 1e-5, 1e-5
else:
    exact = iter(np.load(kept).values())
    rounding = error(original, [[next(exact) for _ in call] for call in original])
assert logits <= rounding[0] and caches <= rounding[1], (logits, caches, rounding)
