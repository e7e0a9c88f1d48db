"""The families of models that the decoder computes: what each has in config.json.

A family is a table of keys with what transformers takes where a key is absent, so that a config
means here what it means there.

Source: https://github.com/huggingface/transformers, models/*/configuration_*.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

NEEDED = object()
"""The default of a key that has none: a config without it is no config of this family."""

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
"""Names in config.json, and in `ModelConfig`; of several, the first is written."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting of config.json: its name there, its field of `ModelConfig`, its kind and default.

    A default of None is written as null and means what None means in `ModelConfig`.
    """

    name: str
    field: str
    kind: type = int
    default: Any = NEEDED


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` has in config.json.

    Attributes:
        architecture: the class of transformers that loads it with a language-model head.
        keys: the settings that become fields of `ModelConfig`.
        fixed: fields that all models of the family share.
        only: settings of which the decoder computes nothing but the values listed.
    """

    architecture: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary."""
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
