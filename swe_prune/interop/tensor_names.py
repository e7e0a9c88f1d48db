"""Tables of the parameters in each tensor of a Hugging Face folder, one per family.

Import, export and tests use the same rows. A row names a stored tensor, with `{i}` for the layer,
and the parameters in it, one after another along its outputs. A fused tensor (query-key-value of
GPT-2 and Phi-3, gate and up of Phi-3) is split on import and joined on export. A row whose
parameters the model does not have (biases, an untied head) is skipped.

Source: https://github.com/huggingface/transformers, models/*/modeling_*.py.
"""

import dataclasses
import math
from collections.abc import Mapping

from swe_prune.interop.tensor_rows import IN_OUT, OUT_IN, Row, Table, dense_rows, norm_rows

_GPT2 = Table(
    (
        Row("transformer.wte.weight", ("embedding/embedding",)),
        Row("transformer.wpe.weight", ("position_embedding",)),
        *norm_rows("transformer.h.{i}.ln_1", "block_{i}/attention_norm"),
        *dense_rows(
            "transformer.h.{i}.attn.c_attn",
            "block_{i}/attention/query",
            "block_{i}/attention/key",
            "block_{i}/attention/value",
            layout=IN_OUT,
        ),
        *dense_rows("transformer.h.{i}.attn.c_proj", "block_{i}/attention/out", layout=IN_OUT),
        *norm_rows("transformer.h.{i}.ln_2", "block_{i}/mlp_norm"),
        *dense_rows("transformer.h.{i}.mlp.c_fc", "block_{i}/mlp/up", layout=IN_OUT),
        *dense_rows("transformer.h.{i}.mlp.c_proj", "block_{i}/mlp/down", layout=IN_OUT),
        *norm_rows("transformer.ln_f", "final_norm"),
        Row("lm_head.weight", ("head/kernel",), OUT_IN),
    ),
    prefix="transformer.",
    ignored=(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",),  # the causal mask
)

_LLAMA_TOPS = (
    Row("model.embed_tokens.weight", ("embedding/embedding",)),
    *norm_rows("model.norm", "final_norm"),
    Row("lm_head.weight", ("head/kernel",), OUT_IN),
)
_LLAMA_NORMS = (
    *norm_rows("model.layers.{i}.input_layernorm", "block_{i}/attention_norm"),
    *norm_rows("model.layers.{i}.post_attention_layernorm", "block_{i}/mlp_norm"),
)
_FREQUENCIES = (r"rotary_emb\.inv_freq$",)  # determined by the config

_LLAMA_PROJECTIONS = (
    *dense_rows("model.layers.{i}.self_attn.q_proj", "block_{i}/attention/query"),
    *dense_rows("model.layers.{i}.self_attn.k_proj", "block_{i}/attention/key"),
    *dense_rows("model.layers.{i}.self_attn.v_proj", "block_{i}/attention/value"),
    *dense_rows("model.layers.{i}.self_attn.o_proj", "block_{i}/attention/out"),
)
_LLAMA_ATTENTION = (
    *_LLAMA_PROJECTIONS,
    # Norms of queries and keys, of the families that have them.
    *norm_rows("model.layers.{i}.self_attn.q_norm", "block_{i}/attention/query_norm"),
    *norm_rows("model.layers.{i}.self_attn.k_norm", "block_{i}/attention/key_norm"),
)
_LLAMA_MLP = (
    *dense_rows("model.layers.{i}.mlp.gate_proj", "block_{i}/mlp/gate"),
    *dense_rows("model.layers.{i}.mlp.up_proj", "block_{i}/mlp/up"),
    *dense_rows("model.layers.{i}.mlp.down_proj", "block_{i}/mlp/down"),
)


def _llama(*rows: Row) -> Table:
    return Table(rows, prefix="model.", ignored=_FREQUENCIES)


_LLAMA = _llama(*_LLAMA_TOPS, *_LLAMA_NORMS, *_LLAMA_ATTENTION, *_LLAMA_MLP)

# OLMo 2 has norms behind attention and MLP, Gemma also before them.
_POST_NORMS = (
    *norm_rows("model.layers.{i}.post_attention_layernorm", "block_{i}/attention_out_norm"),
    *norm_rows("model.layers.{i}.post_feedforward_layernorm", "block_{i}/mlp_out_norm"),
)
_OLMO2 = _llama(*_LLAMA_TOPS, *_POST_NORMS, *_LLAMA_ATTENTION, *_LLAMA_MLP)
_GEMMA = _llama(
    *_LLAMA_TOPS,
    *norm_rows("model.layers.{i}.input_layernorm", "block_{i}/attention_norm"),
    *norm_rows("model.layers.{i}.pre_feedforward_layernorm", "block_{i}/mlp_norm"),
    *_POST_NORMS,
    *_LLAMA_ATTENTION,
    *_LLAMA_MLP,
)

# Every head has a norm of its own.
_STABLELM = _llama(
    *_LLAMA_TOPS,
    *_LLAMA_NORMS,
    *_LLAMA_PROJECTIONS,
    *_LLAMA_MLP,
    Row(
        "model.layers.{i}.self_attn.q_layernorm.norms.{e}.weight",
        ("block_{i}/attention/query_norm/scale",),
    ),
    Row(
        "model.layers.{i}.self_attn.k_layernorm.norms.{e}.weight",
        ("block_{i}/attention/key_norm/scale",),
    ),
)

_MOE = "model.layers.{i}.block_sparse_moe"
_MIXTRAL = _llama(
    *_LLAMA_TOPS,
    *_LLAMA_NORMS,
    *_LLAMA_ATTENTION,
    Row(f"{_MOE}.gate.weight", ("block_{i}/mlp/router/kernel",), OUT_IN),
    Row(f"{_MOE}.experts.{{e}}.w1.weight", ("block_{i}/mlp/gate/kernel",), OUT_IN),
    Row(f"{_MOE}.experts.{{e}}.w2.weight", ("block_{i}/mlp/down/kernel",), OUT_IN),
    Row(f"{_MOE}.experts.{{e}}.w3.weight", ("block_{i}/mlp/up/kernel",), OUT_IN),
)

_PHI3 = _llama(
    *_LLAMA_TOPS,
    *_LLAMA_NORMS,
    *dense_rows(
        "model.layers.{i}.self_attn.qkv_proj",
        "block_{i}/attention/query",
        "block_{i}/attention/key",
        "block_{i}/attention/value",
    ),
    *dense_rows("model.layers.{i}.self_attn.o_proj", "block_{i}/attention/out"),
    *dense_rows("model.layers.{i}.mlp.gate_up_proj", "block_{i}/mlp/gate", "block_{i}/mlp/up"),
    *dense_rows("model.layers.{i}.mlp.down_proj", "block_{i}/mlp/down"),
)

_CLIP = "model.vision_embed_tokens.img_processor.vision_model"
_CLIP_LAYER = f"{_CLIP}.encoder.layers.{{v}}"
_VISION = (
    Row(f"{_CLIP}.embeddings.class_embedding", ("vision/class_embedding",)),
    Row(
        f"{_CLIP}.embeddings.patch_embedding.weight",
        ("vision/patch_embedding/kernel",),
        OUT_IN,
        fold=lambda shape: (shape[0], 3, *(math.isqrt(shape[1] // 3),) * 2),  # a convolution
    ),
    Row(f"{_CLIP}.embeddings.position_embedding.weight", ("vision/position_embedding",)),
    *norm_rows(f"{_CLIP}.pre_layrnorm", "vision/pre_norm"),  # so spelled
    *norm_rows(f"{_CLIP_LAYER}.layer_norm1", "vision/block_{v}/attention_norm"),
    *dense_rows(f"{_CLIP_LAYER}.self_attn.q_proj", "vision/block_{v}/attention/query"),
    *dense_rows(f"{_CLIP_LAYER}.self_attn.k_proj", "vision/block_{v}/attention/key"),
    *dense_rows(f"{_CLIP_LAYER}.self_attn.v_proj", "vision/block_{v}/attention/value"),
    *dense_rows(f"{_CLIP_LAYER}.self_attn.out_proj", "vision/block_{v}/attention/out"),
    *norm_rows(f"{_CLIP_LAYER}.layer_norm2", "vision/block_{v}/mlp_norm"),
    *dense_rows(f"{_CLIP_LAYER}.mlp.fc1", "vision/block_{v}/mlp/up"),
    *dense_rows(f"{_CLIP_LAYER}.mlp.fc2", "vision/block_{v}/mlp/down"),
    *norm_rows(f"{_CLIP}.post_layernorm", "vision/post_norm"),
)
CLIP = Table(
    tuple(
        dataclasses.replace(row, stored=row.stored.replace(_CLIP, "vision_model"))
        for row in _VISION
    ),
    prefix="vision_model.",
    # The other half of CLIP, and numbers of positions.
    ignored=(r"position_ids$", r"^(text_model\.|text_projection|visual_projection|logit_scale)"),
)
"""Table for the folder of a CLIP model, of which the vision tower is read."""

_PHI3_V = Table(
    (
        *(
            dataclasses.replace(row, params=tuple(f"decoder/{name}" for name in row.params))
            for row in _PHI3.rows
        ),
        *_VISION,
        Row(
            "model.vision_embed_tokens.glb_GN",
            ("projection/global_separator",),
            fold=lambda shape: (1, 1, *shape),
        ),
        Row(
            "model.vision_embed_tokens.sub_GN",
            ("projection/row_separator",),
            fold=lambda shape: (1, 1, 1, *shape),
        ),
        *dense_rows("model.vision_embed_tokens.img_projection.0", "projection/first"),
        *dense_rows("model.vision_embed_tokens.img_projection.2", "projection/second"),
    ),
    prefix="model.",
    # Numbers of positions, and the embedding of words a second time.
    ignored=(*_FREQUENCIES, r"position_ids$", r"vision_embed_tokens\.wte\.weight$"),
)

_NEOX_LAYER = "gpt_neox.layers.{i}"
_NEOX = Table(
    (
        Row("gpt_neox.embed_in.weight", ("embedding/embedding",)),
        *norm_rows(f"{_NEOX_LAYER}.input_layernorm", "block_{i}/attention_norm"),
        *dense_rows(
            f"{_NEOX_LAYER}.attention.query_key_value",
            "block_{i}/attention/query",
            "block_{i}/attention/key",
            "block_{i}/attention/value",
            by_head=True,
        ),
        *dense_rows(f"{_NEOX_LAYER}.attention.dense", "block_{i}/attention/out"),
        *norm_rows(f"{_NEOX_LAYER}.post_attention_layernorm", "block_{i}/mlp_norm"),
        *dense_rows(f"{_NEOX_LAYER}.mlp.dense_h_to_4h", "block_{i}/mlp/up"),
        *dense_rows(f"{_NEOX_LAYER}.mlp.dense_4h_to_h", "block_{i}/mlp/down"),
        *norm_rows("gpt_neox.final_layer_norm", "final_norm"),
        Row("embed_out.weight", ("head/kernel",), OUT_IN),
    ),
    prefix="gpt_neox.",
    ignored=(*_FREQUENCIES, r"(^|\.)attention\.(masked_)?bias$"),  # the causal mask
)

_OPT_LAYER = "model.decoder.layers.{i}"
_OPT = Table(
    (
        Row("model.decoder.embed_tokens.weight", ("embedding/embedding",)),
        Row("model.decoder.embed_positions.weight", ("position_embedding",)),
        *norm_rows(f"{_OPT_LAYER}.self_attn_layer_norm", "block_{i}/attention_norm"),
        *dense_rows(f"{_OPT_LAYER}.self_attn.q_proj", "block_{i}/attention/query"),
        *dense_rows(f"{_OPT_LAYER}.self_attn.k_proj", "block_{i}/attention/key"),
        *dense_rows(f"{_OPT_LAYER}.self_attn.v_proj", "block_{i}/attention/value"),
        *dense_rows(f"{_OPT_LAYER}.self_attn.out_proj", "block_{i}/attention/out"),
        *norm_rows(f"{_OPT_LAYER}.final_layer_norm", "block_{i}/mlp_norm"),
        *dense_rows(f"{_OPT_LAYER}.fc1", "block_{i}/mlp/up"),
        *dense_rows(f"{_OPT_LAYER}.fc2", "block_{i}/mlp/down"),
        *norm_rows("model.decoder.final_layer_norm", "final_norm"),
        Row("lm_head.weight", ("head/kernel",), OUT_IN),
    ),
    prefix="model.",
)

SAFETENSORS: Mapping[str, Table] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _PHI3,
    "phi3_v": _PHI3_V,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "stablelm": _STABLELM,
    "smollm3": _LLAMA,
    "olmo2": _OLMO2,
    "gpt_neox": _NEOX,
    "opt": _OPT,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "mixtral": _MIXTRAL,
}
"""Tables for Hugging Face folders, by `model_type`."""
