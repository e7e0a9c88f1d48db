"""Projections of the same activations as one matrix product, for decoding.

A decoded token is a vector, and its products with the kernels are bound by memory. XLA's CPU
backend computes a small one on one core, and on a GPU each is a launch of its own; query, key and
value, or gate and up, read the same vector and are one larger product (`qkv_proj` and
`gate_up_proj` of vLLM, Kwon et al., 2309.06180).
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, PyTree

from swe_prune.arguments import checked
from swe_prune.calibration.batching import check_arrays
from swe_prune.config import ModelConfig
from swe_prune.models.layers import dense

JOINED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Name of a fused layer, and of the layers whose outputs it has one after another."""


@checked
def fuse(params: PyTree) -> PyTree:
    """Returns parameters whose projections of the same activations are one layer.

    The decoders of `models.gpt` compute the same with them, up to rounding, and decode faster:
    "query", "key" and "value" become "query_key_value", and "gate" and "up" become "gate_up", with
    kernels D x (HK + 2 GK) and D x 2F. Everything else is shared with `params`; what is fused takes
    its memory once more until `params` is dropped. Fused parameters are fused already.

    They are for `generate`, `decode` and timing alone: cutting, pruning and exporting know the
    layers by their own names.

    Args:
        params: Parameters of a decoder, with any dtypes; a layer of several copies, such as the
            experts, is left as it is.

    >>> import jax
    >>> from swe_prune.config import ModelConfig
    >>> from swe_prune.models import gpt
    >>> model = gpt.build(ModelConfig(layers=1, heads=2, width=8, context=4), vocab_size=5)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    >>> gpt.fuse(params)["block_0"]["attention"]["query_key_value"]["kernel"].shape
    (8, 24)
    """
    check_arrays("params", params)
    return _fused(params)


def _fused(params: Any) -> Any:
    if not isinstance(params, Mapping):
        return params
    found = {name: _fused(one) for name, one in params.items()}
    for joined, names in JOINED.items():
        if _joinable([found.get(name) for name in names]):
            layers = [found.pop(name) for name in names]
            found[joined] = {
                part: jnp.concatenate([layer[part] for layer in layers], axis=-1)
                for part in layers[0]
            }
    return found


def _joinable(layers: list[Any]) -> bool:
    """Returns whether all are plain dense layers with the same parts, inputs and dtypes."""
    if not all(isinstance(one, Mapping) and "kernel" in one for one in layers):
        return False
    if any(not hasattr(x, "dtype") for one in layers for x in one.values()):
        return False
    facts = [{part: (jnp.shape(x)[:-1], x.dtype) for part, x in one.items()} for one in layers]
    return all(one == facts[0] for one in facts) and len(facts[0]["kernel"][0]) == 1


def projections(
    module: nn.Module,
    cfg: ModelConfig,
    x_NxD: Array,
    features: Mapping[str, int],
    use_bias: bool | None,
) -> dict[str, Array]:
    """Returns the outputs of dense layers that read the same activations, by name.

    Args:
        module: Module that has the layers, in its compact method: each one, or the fused one.
        cfg: Config of the model.
        x_NxD: What the layers read.
        features: Number of outputs by name of the layer.
        use_bias: Whether the layers have a bias. If None, `cfg.use_bias`.
    """
    joined = next((name for name, names in JOINED.items() if names == tuple(features)), None)
    if joined is None or not module.has_variable("params", joined):
        return {name: dense(cfg, n, name, use_bias)(x_NxD) for name, n in features.items()}
    y_NxC = dense(cfg, sum(features.values()), joined, use_bias)(x_NxD)
    ends = [*itertools.accumulate(features.values())][:-1]
    return dict(zip(features, jnp.split(y_NxC, ends, axis=-1), strict=True))
