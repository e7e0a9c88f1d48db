"""Groups of the decoder of `models.gpt`, and the config of what a cut leaves of it.

A model of images and text (`models.phi3v`) has such a decoder under "decoder", and a vision tower,
of which the neurons can be cut.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from swe_prune.arguments import checked
from swe_prune.config import ModelConfig, VisionConfig
from swe_prune.errors import InputError, check_choice
from swe_prune.structured.group import Along, Group, check_keep

LAYERS = "layers"
VISION_NEURONS = "vision_neurons"
UNITS = ("neurons", "heads", "query_heads", VISION_NEURONS, LAYERS)
"""What `groups` can be asked for."""

MULTIPLE = 8
"""Number that the count of hidden units should be a multiple of: odd widths are slow."""


@checked
def groups(config: ModelConfig, units: str = "neurons") -> dict[str, Group]:
    """Returns the groups of a decoder, "block_0/neurons" and so on, or "layers".

    Args:
        config: Config of the decoder before the cut.
        units: "neurons": hidden units of each MLP; where it has experts, each expert chooses its
            own. "heads": key-value heads, each with its query heads. "query_heads": query heads, of
            which each key-value head loses the same number. "layers": whole blocks.
            "vision_neurons": hidden units of each MLP of the vision tower, all of whose blocks must
            keep the same number, the last one too, which no decoder reads.

    Raises:
        InputError: The choice is unknown, or the model has no such units.

    >>> config = ModelConfig(layers=2, heads=4, width=32)
    >>> groups(config, "heads")["block_1/heads"].units
    4
    """
    check_choice(units, UNITS, "units")
    if not isinstance(config, ModelConfig):
        raise InputError(
            f"groups must have the ModelConfig of a decoder, got {type(config).__name__}; declare "
            "structured.Group for other models"
        )
    if config.layers < 1:
        raise InputError(f"the model must have at least one layer to cut, got {config.layers}")
    if units == VISION_NEURONS:
        return _of_tower(config)
    inside = "(?:^|/)" if config.vision is None else "(?:^|/)decoder/"
    if units == LAYERS:
        return {LAYERS: Group(config.layers, {rf"{inside}block_([0-9]+)/": None})}
    make = {"neurons": _neurons, "heads": _heads, "query_heads": _query_heads}[units]
    return {
        f"block_{layer}/{units}": make(config.of_layer(layer), rf"{inside}block_{layer}/")
        for layer in range(config.layers)
    }


def _of_tower(config: ModelConfig) -> dict[str, Group]:
    """Returns the groups of the vision tower's neurons."""
    if config.vision is None:
        raise InputError(
            "the model has no vision tower, whose neurons units = 'vision_neurons' are; use units "
            "= 'neurons'"
        )
    block = ModelConfig(hidden=config.vision.hidden, use_bias=True)
    return {
        f"block_{layer}/{VISION_NEURONS}": _neurons(block, rf"(?:^|/)vision/block_{layer}/")
        for layer in range(config.vision.layers)
    }


@checked
def cut_config(config: ModelConfig, keep: Mapping[str, Any]) -> ModelConfig:
    """Returns the config of a decoder after a cut.

    If the layers differ in their widths, it has `layer_hidden` or `layer_heads`: `models.gpt`
    computes such a model, but stock transformers cannot load it, so it cannot be exported.

    Args:
        config: Config before the cut.
        keep: Indices of kept units by group, for groups that `groups` returns.

    Raises:
        InputError: A group that the config does not have, impossible indices, or blocks of a vision
            tower that would differ in their widths.

    >>> config = ModelConfig(layers=2, heads=4, width=32)
    >>> cut_config(config, {"layers": [1]}).layers
    1
    """
    known: dict[str, Group] = {}
    for units in UNITS:
        if any(name.rpartition("/")[2] == units for name in keep):
            known |= groups(config, units)
    kept = check_keep(known or groups(config), keep)
    layers = [int(layer) for layer in kept.get(LAYERS, range(config.layers))]
    changes: dict[str, Any] = {"layers": len(layers)}
    for field in ("sliding", "rotary"):
        if getattr(config, field):
            changes[field] = tuple(getattr(config, field)[layer] for layer in layers)
    # Widths of the layers that stay; one number for all if they are alike.
    hidden, heads, key_heads = [], [], []
    for layer in layers:
        own = config.of_layer(layer)
        of_key_head = own.heads // own.key_heads
        by_unit = {units: kept.get(f"block_{layer}/{units}") for units in UNITS}
        hidden.append(_count(by_unit["neurons"], own.hidden_size))
        key_heads.append(_count(by_unit["heads"], own.key_heads))
        heads.append(_count(by_unit["query_heads"], of_key_head) * key_heads[-1])
    if hidden != [config.hidden_size] * len(layers):
        changes |= {"hidden": hidden[0], "layer_hidden": _if_they_differ(hidden)}
    if (heads, key_heads) != ([config.heads] * len(layers), [config.key_heads] * len(layers)):
        differ = len({*zip(heads, key_heads, strict=True)}) > 1
        changes |= {
            "heads": heads[0],
            "kv_heads": key_heads[0],
            "head_width": config.head_size,
            "layer_heads": tuple(heads) if differ else (),
            "layer_kv_heads": tuple(key_heads) if differ else (),
        }
    if any(name.endswith(VISION_NEURONS) for name in kept):
        changes["vision"] = _cut_tower(config.vision, kept)
    return dataclasses.replace(config, **changes)


def _cut_tower(vision: VisionConfig | None, kept: Mapping[str, Any]) -> VisionConfig:
    assert vision is not None  # else there were no such groups
    hidden = {
        _count(kept.get(f"block_{layer}/{VISION_NEURONS}"), vision.hidden)
        for layer in range(vision.layers)
    }
    if len(hidden) > 1:
        raise InputError(
            "the blocks of a vision tower have one number of neurons, got "
            f"{', '.join(map(str, sorted(hidden)))}; cut all of them, and choose with uniform=True"
        )
    return dataclasses.replace(vision, hidden=hidden.pop())


def _count(indices: Any, otherwise: int) -> int:
    return otherwise if indices is None else indices.shape[-1]


def _if_they_differ(counts: list[int]) -> tuple[int, ...]:
    return tuple(counts) if len(set(counts)) > 1 else ()


def _neurons(config: ModelConfig, block: str) -> Group:
    stacked = None if config.experts is None else -3  # the axis of the experts
    axes = {f"{block}mlp/up/kernel$": Along(-1, copies=stacked)}
    if config.gated:
        axes[f"{block}mlp/gate/kernel$"] = Along(-1, copies=stacked)
    if config.use_bias if config.mlp_bias is None else config.mlp_bias:
        axes |= {f"{block}mlp/{name}/bias$": Along(-1) for name in ("up", "gate")[: len(axes)]}
    axes[f"{block}mlp/down/kernel$"] = Along(-2, copies=stacked)
    return Group(config.hidden_size, axes, config.experts, MULTIPLE)


def _heads(config: ModelConfig, block: str) -> Group:
    width, of_key_head = config.head_size, config.heads // config.key_heads
    widths = {"query": width * of_key_head, "key": width, "value": width}
    axes: dict[str, Along] = {}
    for name, columns in widths.items():
        axes |= _projection(config, f"{block}attention/{name}", Along(-1, columns))
    axes[f"{block}attention/out/kernel$"] = Along(-2, width * of_key_head)
    if config.head_norm == "each_head":
        axes[f"{block}attention/query_norm/scale$"] = Along(-2, of_key_head)
        axes[f"{block}attention/key_norm/scale$"] = Along(-2)
    return Group(config.key_heads, axes)


def _query_heads(config: ModelConfig, block: str) -> Group:
    of_key_head = config.heads // config.key_heads
    if of_key_head == 1:
        raise InputError(
            "the model has one query head for each key-value head, so units = 'query_heads' would "
            "break the key-value grouping; use units = 'heads'"
        )
    along = Along(-1, config.head_size, copies=-1)
    axes = _projection(config, f"{block}attention/query", along)
    axes[f"{block}attention/out/kernel$"] = Along(-2, config.head_size, copies=-2)
    if config.head_norm == "each_head":
        axes[f"{block}attention/query_norm/scale$"] = Along(-2, copies=-2)
    return Group(of_key_head, axes, config.key_heads)


def _projection(config: ModelConfig, name: str, along: Along) -> dict[str, Along]:
    """Returns the rules of queries, keys or values, with the norm over all their heads if any.

    Such a norm divides by the root of the mean square over all heads, cut or zero. A factor on the
    kernel and its inverse on the scale make the two equal, whatever the norm's epsilon.
    """
    normed = config.head_norm == "projection" and not name.endswith("value")
    if normed and config.norm == "layer":
        raise InputError(
            "the model has a layer norm over all heads of queries and keys, whose mean depends on "
            "the heads that are cut; cut neurons or layers"
        )
    kernel = dataclasses.replace(along, power=0.5) if normed else along
    axes = {f"{name}/kernel$": kernel}
    if config.use_bias if config.qkv_bias is None else config.qkv_bias:
        axes[f"{name}/bias$"] = kernel
    if normed:
        axes[f"{name}_norm/scale$"] = dataclasses.replace(along, power=-0.5)
    return axes
