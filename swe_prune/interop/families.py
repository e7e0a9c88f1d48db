"""Model families that the decoder supports, with their settings in config.json.

A family is a table of keys with the defaults of transformers for missing keys, so that a config has
the same meaning as in transformers.

Source: https://github.com/huggingface/transformers, models/*/configuration_*.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

NEEDED = object()
"""Marker for a key without a default, which every config of the family must have."""

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Names in `ModelConfig` by name in config.json; of several, the first is written."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting of config.json.

    Attributes:
        name: Name in config.json.
        field: Name of the field of `ModelConfig`.
        kind: Type of the value.
        default: Value if the key is missing, or `NEEDED`. None is written as null and means the
            same as None in `ModelConfig`.
    """

    name: str
    field: str
    kind: type = int
    default: Any = NEEDED


@dataclasses.dataclass(frozen=True)
class Family:
    """Settings in config.json of one `model_type`.

    Attributes:
        architecture: Transformers class that loads the model with a language-model head.
        keys: Settings that become fields of `ModelConfig`.
        fixed: Fields with the same value for all models of the family.
        only: Supported values of settings that the decoder supports only in part.
    """

    architecture: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def rotary(self) -> bool:
        """Whether the positions are rotary."""
        return self.fixed["positions"] == "rope"


def _llama_like(*keys: Key, epsilon: float, context: int) -> tuple[Key, ...]:
    return (
        Key("hidden_size", "width"),
        Key("intermediate_size", "hidden"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("head_dim", "head_width", default=None),
        Key("max_position_embeddings", "context", default=context),
        Key("rms_norm_eps", "norm_epsilon", float, epsilon),
        Key("hidden_act", "activation", str, "silu"),
        Key("tie_word_embeddings", "tied_head", bool, False),
        *keys,
    )


_GATED = {
    "use_bias": False,
    "head_bias": False,
    "gated": True,
    "norm": "rms",
    "positions": "rope",
}
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

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
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _llama_like(
            Key("num_key_value_heads", "kv_heads", default=None),
            Key("attention_bias", "qkv_bias", bool, False),
            Key("mlp_bias", "mlp_bias", bool, False),
            epsilon=1e-6,
            context=2048,
        ),
        _GATED,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _llama_like(
            Key("num_key_value_heads", "kv_heads", default=8),
            Key("sliding_window", "window", default=4096),
            epsilon=1e-6,
            context=4096 * 32,
        ),
        _GATED | _NO_BIAS,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _llama_like(
            Key("num_key_value_heads", "kv_heads", default=None),
            Key("sliding_window", "window", default=None),
            epsilon=1e-5,
            context=4096,
        ),
        _GATED | _NO_BIAS,
    ),
}
"""The supported values of `model_type`."""
