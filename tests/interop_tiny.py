"""Tiny pretrained models of every family, made without torch: config.json, weights, folders."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from swe_prune import tree
from swe_prune.interop import hf_config, slices
from swe_prune.interop.exporting import export
from swe_prune.interop.pretrained import Pretrained
from swe_prune.models import gpt

VOCAB = 24
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHER = {key: value for key, value in LLAMA.items() if key != "model_type"}
NEOX = OTHER | {"model_type": "gpt_neox", "layer_norm_eps": 1e-5, "rotary_pct": 0.5}
OPT = OTHER | {"model_type": "opt", "ffn_dim": 20, "pad_token_id": 0}
GEMMA = OTHER | {
    "head_dim": 6,
    "sliding_window": 5,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}

CONFIGS = {
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"tie_word_embeddings": False, "activation_function": "relu"},
    "gpt2 n_inner": GPT2 | {"n_inner": 24, "activation_function": "gelu"},
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True, "head_dim": 6},
    "llama biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "llama linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama dynamic": LLAMA
    | {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama yarn": LLAMA | {"rope_scaling": YARN, "rope_theta": 500.0},
    "llama llama3": LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}},
    "llama longrope": LLAMA
    | {"rope_scaling": LONG | {"original_max_position_embeddings": 16, "attention_factor": 1.0}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "mistral tied": LLAMA
    | {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "phi3": LLAMA | {"model_type": "phi3", "pad_token_id": 0, "sliding_window": 7},
    "phi3 longrope": LLAMA
    | {
        "model_type": "phi3",
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "rope_scaling": LONG,
        "tie_word_embeddings": True,
    },
    "qwen2": OTHER | {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    "qwen2 window": OTHER
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": OTHER | {"model_type": "qwen3", "head_dim": 6, "rope_theta": 1e6},
    "qwen3 biases": OTHER
    | {
        "model_type": "qwen3",
        "head_dim": 4,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": OTHER
    | {
        "model_type": "granite",
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.3,
        "logits_scaling": 4.0,
        "mlp_bias": True,
    },
    "stablelm": OTHER
    | {"model_type": "stablelm", "layer_norm_eps": 1e-5, "use_qkv_bias": True}
    | {"partial_rotary_factor": 0.5},
    "stablelm parallel": OTHER
    | {
        "model_type": "stablelm",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "smollm3": OTHER | {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": 0},
    "smollm3 window": OTHER
    | {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "olmo2": OTHER | {"model_type": "olmo2", "rope_theta": 500.0, "pad_token_id": 0},
    "olmo2 biases": OTHER | {"model_type": "olmo2", "attention_bias": True, "pad_token_id": 0},
    "gpt_neox": NEOX,
    "gpt_neox sequential": NEOX
    | {"use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500}
    | {"attention_bias": False, "tie_word_embeddings": True, "hidden_act": "relu"},
    "opt": OPT,
    "opt plain": OPT
    | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"}
    | {"word_embed_proj_dim": 16},
    "gemma2": GEMMA | {"model_type": "gemma2", "num_hidden_layers": 3},
    "gemma2 biases": GEMMA
    | {
        "model_type": "gemma2",
        "attention_bias": True,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "gemma3_text": GEMMA
    | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "num_hidden_layers": 3,
        "sliding_window_pattern": 2,
        "rope_theta": 2000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gemma3_text nested": GEMMA
    | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 5.0,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 700.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    },
    "mixtral": OTHER | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "mixtral window": OTHER
    | {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "sliding_window": 5,
        "rope_theta": 200.0,
    },
}
"""A config.json of each thing that the families can be."""


def random_params(config, vocab_size=VOCAB, dtype="float32", seed=0):
    """Parameters large enough that attention is far from even, and that every part matters."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in slices.param_shapes(config, vocab_size).items():
        values = rng.normal(size=shape) * (0.2 if name.endswith(("scale", "bias")) else 0.4)
        around = name.endswith("scale") and not config.norm_plus_one
        made[name] = jnp.asarray(values + around, dtype)
    return tree.nested(made)


def stored(tensor, params):
    """A stored tensor, joined of the parameters given by name."""
    return tensor.join([part.of(params[part.name]) for part in tensor.parts])


def model(name, dtype="float32", **changes):
    """A Pretrained with random parameters, as if it had been loaded."""
    hf = CONFIGS[name] | changes
    family, config, vocab_size = hf_config.read_config(hf)
    params = random_params(config, vocab_size, dtype)
    return Pretrained(config, vocab_size, params, None, family, Path("nowhere"), "safetensors", hf)


def folder(path, name, dtype="float32", **settings):
    """Writes a folder of random weights and returns its path and the model."""
    made = model(name, dtype)
    return export(path, made, **settings), made


def logits(made, tokens_BxL, valid_BxL=None):
    """Logits of a Pretrained, float32."""
    decoder = gpt.build(made.config, made.vocab_size)
    valid = {} if valid_BxL is None else {"valid_BxL": jnp.asarray(valid_BxL)}
    run = jax.jit(decoder.apply)
    return np.asarray(run({"params": made.params}, jnp.asarray(tokens_BxL), **valid))


def decoded(made, tokens_BxL, prompt, valid_BxL=None):
    """The same logits by a prompt and then one token at a time."""
    decoder = gpt.build(made.config, made.vocab_size)
    batch, length = tokens_BxL.shape
    cache = gpt.empty_cache(made.config, batch, length)
    steps = [slice(0, prompt), *(slice(at, at + 1) for at in range(prompt, length))]
    run, found = jax.jit(decoder.apply, static_argnames="method"), []
    for step in steps:
        valid = None if valid_BxL is None else jnp.asarray(valid_BxL[:, step])
        variables = {"params": made.params}
        out, cache = run(variables, jnp.asarray(tokens_BxL[:, step]), cache, valid, method="decode")
        found.append(np.asarray(out))
    return np.concatenate(found, axis=1)


def left_padded(batch_of_lengths, length, seed=0):
    """Random tokens, and which of them are valid: each row ends with so many."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (len(batch_of_lengths), length)).astype(np.int32)
    valid = np.arange(length) >= length - np.asarray(batch_of_lengths)[:, None]
    return tokens, valid


def assert_logits_close(found, wanted):
    """As the issue asks: rtol 1e-4, and where a logit is near 0, 1e-5 of the largest."""
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def assert_same_params(one, two):
    """Bit for bit, in shape, dtype and structure."""
    from swe_prune import tree

    one, two = dict(tree.named_leaves(one)), dict(tree.named_leaves(two))
    assert one.keys() == two.keys()
    for name in one:
        first, second = np.asarray(one[name]), np.asarray(two[name])
        assert first.dtype == second.dtype, name
        assert first.shape == second.shape, name
        assert first.tobytes() == second.tobytes(), name
