//! The containers' names for a decoder's tensors.

/// The names of the tensors in a container, and how it stores the norms.
pub(super) struct Names {
    pub embedding: &'static str,
    pub output_norm: &'static str,
    pub output: &'static str,
    pub layer: &'static str,
    pub attn_norm: &'static str,
    pub qk_norm: [&'static str; 2],
    pub qkv: [&'static str; 3],
    pub attn_out: &'static str,
    pub attn_post_norm: &'static str,
    pub ffn_norm: &'static str,
    pub gate_up: [&'static str; 2],
    pub down: &'static str,
    pub router: &'static str,
    /// Gate, up and down of expert `{}`.
    pub experts: [&'static str; 3],
    /// Gate, up and down of all experts in one tensor each, which a file may have instead.
    pub stacked_experts: Option<[&'static str; 3]>,
    pub ffn_post_norm: &'static str,
    /// Added to the weights of every norm; some checkpoints store them minus 1.
    pub norm_offset: f32,
    /// Ends of the names of tensors that no weight uses, and that are not an error.
    pub known: &'static [&'static str],
}

pub(super) static GGUF_NAMES: Names = Names {
    embedding: "token_embd.weight",
    output_norm: "output_norm.weight",
    output: "output.weight",
    layer: "blk.",
    attn_norm: "attn_norm.weight",
    qk_norm: ["attn_q_norm.weight", "attn_k_norm.weight"],
    qkv: ["attn_q.weight", "attn_k.weight", "attn_v.weight"],
    attn_out: "attn_output.weight",
    attn_post_norm: "post_attention_norm.weight",
    ffn_norm: "ffn_norm.weight",
    gate_up: ["ffn_gate.weight", "ffn_up.weight"],
    down: "ffn_down.weight",
    router: "ffn_gate_inp.weight",
    experts: ["ffn_gate.{}.weight", "ffn_up.{}.weight", "ffn_down.{}.weight"],
    stacked_experts: Some(["ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"]),
    ffn_post_norm: "post_ffw_norm.weight",
    norm_offset: 0.0,
    known: &["rope_freqs.weight"],
};

pub(super) static GGUF_GROK_NAMES: Names =
    Names { attn_post_norm: "attn_output_norm.weight", ffn_post_norm: "post_ffw_norm.weight", ..GGUF_NAMES };

/// Grok-1 in files of the first converters.
pub(super) static GGUF_OLD_GROK_NAMES: Names = Names { ffn_post_norm: "layer_output_norm.weight", ..GGUF_GROK_NAMES };

pub(super) static HF_LLAMA_NAMES: Names = Names {
    embedding: "model.embed_tokens.weight",
    output_norm: "model.norm.weight",
    output: "lm_head.weight",
    layer: "model.layers.",
    attn_norm: "input_layernorm.weight",
    qk_norm: ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
    qkv: ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    attn_out: "self_attn.o_proj.weight",
    attn_post_norm: "",
    ffn_norm: "post_attention_layernorm.weight",
    gate_up: ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    down: "mlp.down_proj.weight",
    router: "mlp.gate.weight",
    experts: ["mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight"],
    stacked_experts: None,
    ffn_post_norm: "",
    norm_offset: 0.0,
    // Some files have the head although it is tied. Old files have the frequencies, which follow from the base.
    known: &["rotary_emb.inv_freq", "lm_head.weight"],
};

// Gemma's checkpoints store norm weights minus 1; GGUF files store them with 1 added.
pub(super) static HF_GEMMA_NAMES: Names = Names {
    attn_post_norm: "post_attention_layernorm.weight",
    ffn_norm: "pre_feedforward_layernorm.weight",
    ffn_post_norm: "post_feedforward_layernorm.weight",
    norm_offset: 1.0,
    ..HF_LLAMA_NAMES
};

/// Grok-1 with the names of its original code.
pub(super) static HF_GROK_NAMES: Names = Names {
    embedding: "transformer.in_out_embed.weight",
    output_norm: "transformer.rms_norm.weight",
    layer: "transformer.decoder_layer.",
    attn_norm: "rms_norm.weight",
    qkv: ["multi_head_attention.query.weight", "multi_head_attention.key.weight", "multi_head_attention.value.weight"],
    attn_out: "multi_head_attention.linear.weight",
    attn_post_norm: "rms_norm_1.weight",
    ffn_norm: "rms_norm_2.weight",
    router: "router.weight",
    experts: ["moe.{}.linear.weight", "moe.{}.linear_v.weight", "moe.{}.linear_1.weight"],
    ffn_post_norm: "rms_norm_3.weight",
    ..HF_LLAMA_NAMES
};

/// Grok-1 with the names of ColossalAI's conversion.
pub(super) static HF_GROK_BLOCK_NAMES: Names = Names {
    output_norm: "model.norm.scale",
    attn_norm: "pre_attn_norm.scale",
    qkv: ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"],
    attn_out: "attn.o_proj.weight",
    attn_post_norm: "post_attn_norm.scale",
    ffn_norm: "pre_moe_norm.scale",
    router: "moe_block.gate.weight",
    experts: [
        "moe_block.experts.{}.linear.weight",
        "moe_block.experts.{}.linear_v.weight",
        "moe_block.experts.{}.linear_1.weight",
    ],
    ffn_post_norm: "post_moe_norm.scale",
    ..HF_LLAMA_NAMES
};
