"""Model families that the decoder supports, with their settings in config.json.

A family is a table of keys with the defaults of transformers for missing keys, so that a config has
the same meaning as in transformers.

Source: https://github.com/huggingface/transformers, models/*/configuration_*.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

from swe_prune.interop.family import INVERSE_ROOT, Family, Key, LayerKinds, RopeKeys, choice

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Names in `ModelConfig` by name in config.json; of several, the first is written."""


def _sizes(*keys: Key, context: int, tied: bool = False) -> tuple[Key, ...]:
    return (
        Key("hidden_size", "width"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("max_position_embeddings", "context", default=context),
        Key("tie_word_embeddings", "tied_head", bool, tied),
        *keys,
    )


def _llama_like(
    *keys: Key,
    context: int,
    epsilon: float = 1e-6,
    kv_heads: int | None = None,
    head_width: int | None = None,
    activation: Key | None = None,
    tied: bool = False,
) -> tuple[Key, ...]:
    return _sizes(
        Key("intermediate_size", "hidden"),
        Key("num_key_value_heads", "kv_heads", default=kv_heads),
        Key("head_dim", "head_width", default=head_width),
        Key("rms_norm_eps", "norm_epsilon", float, epsilon),
        activation or Key("hidden_act", "activation", str, "silu"),
        *keys,
        context=context,
        tied=tied,
    )


def _as(field: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda fields: fields[field]


_GATED = {
    "use_bias": False,
    "head_bias": False,
    "gated": True,
    "norm": "rms",
    "positions": "rope",
}
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
_ATTENTION_BIAS = Key("attention_bias", "qkv_bias", bool, False)
_MLP_BIAS = Key("mlp_bias", "mlp_bias", bool, False)
_OUT_AS_QKV = {"out_bias": _as("qkv_bias")}
_WINDOW = Key("sliding_window", "window", default=4096)

# The window of Qwen's models is off unless the switch is on, and then in the later layers.
_QWEN_LAYERS = LayerKinds(
    lambda hf, layer: layer >= hf.get("max_window_layers", 28), switch="use_sliding_window"
)

_GEMMA = _GATED | {
    "mlp_bias": False,
    "norm_plus_one": True,
    "norms": "sandwich",
}
_GEMMA_KEYS = (
    _ATTENTION_BIAS,
    _WINDOW,
    Key("query_pre_attn_scalar", "attention_scale", float, 256.0, INVERSE_ROOT),
)
_GEMMA_ACTIVATION = Key("hidden_activation", "activation", str, "gelu_pytorch_tanh")
_GEMMA_DERIVED = _OUT_AS_QKV | {"embedding_scale": lambda fields: fields["width"] ** 0.5}

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        (
            Key("n_embd", "width"),
            Key("n_inner", "hidden", default=None),
            Key("n_layer", "layers"),
            Key("n_head", "heads"),
            Key("n_positions", "context", default=1024),
            Key("layer_norm_epsilon", "norm_epsilon", float, 1e-5),
            Key("activation_function", "activation", str, "gelu_new"),
            Key("tie_word_embeddings", "tied_head", bool, True),
        ),
        {
            "use_bias": True,
            "head_bias": False,
            "gated": False,
            "norm": "layer",
            "positions": "learned",
        },
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "add_cross_attention": (False, None),
        },
        derived={"hidden": lambda fields: fields["hidden"] or 4 * fields["width"]},
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _llama_like(_ATTENTION_BIAS, _MLP_BIAS, context=2048),
        _GATED,
        derived=_OUT_AS_QKV,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _llama_like(_WINDOW, context=4096 * 32, kv_heads=8),
        _GATED | _NO_BIAS,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _llama_like(Key("sliding_window", "window", default=None), epsilon=1e-5, context=4096),
        _GATED | _NO_BIAS,
        rope=RopeKeys(share="partial_rotary_factor"),
    ),
    "phi3_v": Family(
        "Phi3VForCausalLM",
        _llama_like(Key("sliding_window", "window", default=None), epsilon=1e-5, context=4096),
        _GATED | _NO_BIAS,
        rope=RopeKeys(share="partial_rotary_factor"),
        vision=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _llama_like(_WINDOW, context=32768, kv_heads=32),
        _GATED | {"qkv_bias": True, "out_bias": False, "mlp_bias": False},
        layers=_QWEN_LAYERS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _llama_like(_ATTENTION_BIAS, _WINDOW, context=32768, kv_heads=32, head_width=128),
        _GATED | {"mlp_bias": False, "head_norm": "head"},
        derived=_OUT_AS_QKV,
        layers=_QWEN_LAYERS,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _llama_like(
            _ATTENTION_BIAS,
            _MLP_BIAS,
            Key("embedding_multiplier", "embedding_scale", float, 1.0),
            Key("residual_multiplier", "residual_scale", float, 1.0),
            Key("attention_multiplier", "attention_scale", float, 1.0),
            Key("logits_scaling", "logit_divisor", float, 1.0),
            context=2048,
        ),
        _GATED,
        derived=_OUT_AS_QKV,
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        _sizes(
            Key("intermediate_size", "hidden"),
            Key("num_key_value_heads", "kv_heads", default=32),
            Key("layer_norm_eps", "norm_epsilon", float, 1e-5),
            Key("hidden_act", "activation", str, "silu"),
            Key("use_qkv_bias", "qkv_bias", bool, False),
            Key("qk_layernorm", "head_norm", bool, False, choice("none", "each_head")),
            Key(
                "use_parallel_residual",
                "residual",
                bool,
                False,
                choice("sequential", "parallel_one_norm"),
            ),
            context=4096,
        ),
        _GATED | {"use_bias": True, "norm": "layer", "out_bias": False, "mlp_bias": False},
        rope=RopeKeys(share="partial_rotary_factor", default_share=0.25),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _llama_like(
            _ATTENTION_BIAS,
            _MLP_BIAS,
            Key("sliding_window", "window", default=None),
            context=32768,
            kv_heads=4,
            tied=True,
        ),
        _GATED,
        derived=_OUT_AS_QKV,
        rope=RopeKeys(default_theta=2e6),
        # Where the switch is on, the layers without rotary positions have the window.
        layers=LayerKinds(
            lambda hf, layer: not rotates(hf, layer), switch="use_sliding_window", rotary=True
        ),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _llama_like(_ATTENTION_BIAS, epsilon=1e-5, context=2048),
        _GATED | {"mlp_bias": False, "norms": "post", "head_norm": "projection"},
        derived=_OUT_AS_QKV,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _sizes(
            Key("intermediate_size", "hidden"),
            Key("layer_norm_eps", "norm_epsilon", float, 1e-5),
            Key("hidden_act", "activation", str, "gelu"),
            Key("attention_bias", "qkv_bias", bool, True),
            Key("use_parallel_residual", "residual", bool, True, choice("sequential", "parallel")),
            context=2048,
        ),
        _GATED | {"use_bias": True, "gated": False, "norm": "layer", "mlp_bias": True},
        derived=_OUT_AS_QKV,
        rope=RopeKeys("rotary_emb_base", share="rotary_pct", default_share=0.25),
    ),
    "opt": Family(
        "OPTForCausalLM",
        _sizes(
            Key("ffn_dim", "hidden"),
            Key("activation_function", "activation", str, "relu"),
            Key("enable_bias", "qkv_bias", bool, True),
            context=2048,
            tied=True,
        ),
        {
            "use_bias": True,
            "head_bias": False,
            "gated": False,
            "norm": "layer",
            "positions": "learned",
            "position_offset": 2,
        },
        {
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False, None),
            "layer_norm_elementwise_affine": (True,),
        },
        same={"word_embed_proj_dim": "hidden_size"},
        derived=_OUT_AS_QKV | {"mlp_bias": _as("qkv_bias")},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _llama_like(
            *_GEMMA_KEYS,
            Key("attn_logit_softcapping", "attention_cap", float, 50.0),
            Key("final_logit_softcapping", "logit_cap", float, 30.0),
            context=8192,
            kv_heads=4,
            head_width=256,
            activation=_GEMMA_ACTIVATION,
            tied=True,
        ),
        _GEMMA,
        {"use_bidirectional_attention": (False, None)},
        derived=_GEMMA_DERIVED,
        layers=LayerKinds(lambda hf, layer: layer % 2 == 0),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _llama_like(
            *_GEMMA_KEYS,
            Key("final_logit_softcapping", "logit_cap", float, None),
            context=131072,
            kv_heads=4,
            head_width=256,
            activation=_GEMMA_ACTIVATION,
            tied=True,
        ),
        _GEMMA | {"head_norm": "head"},
        # Transformers reads attn_logit_softcapping of Gemma 3, but does not use it.
        {"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
        derived=_GEMMA_DERIVED,
        rope=RopeKeys(default_theta=1e6, sliding_theta="rope_local_base_freq"),
        layers=LayerKinds(lambda hf, layer: (layer + 1) % hf.get("sliding_window_pattern", 6) != 0),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _llama_like(
            Key("sliding_window", "window", default=None),
            Key("num_local_experts", "experts", default=8),
            Key("num_experts_per_tok", "experts_per_token", default=2),
            epsilon=1e-5,
            context=4096 * 32,
            kv_heads=8,
        ),
        _GATED | _NO_BIAS,
        rope=RopeKeys(default_theta=1e6),
    ),
}
"""The supported values of `model_type`."""


def rotates(hf: Mapping[str, Any], layer: int) -> bool:
    """Returns whether a layer of a SmolLM3 has rotary positions."""
    given = hf.get("no_rope_layers")
    if given is not None:
        return bool(given[layer])
    return (layer + 1) % hf.get("no_rope_layer_interval", 4) != 0
