"""Layers that differ, in config.json and in `ModelConfig`: a window in some, no rotary positions.

Source: https://github.com/huggingface/transformers, models/*/configuration_*.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from swe_prune.config import ModelConfig, RopeConfig
from swe_prune.errors import InputError, shown
from swe_prune.interop.families import rotates
from swe_prune.interop.family import Family

SLIDING, FULL = "sliding_attention", "full_attention"
_LEAST = {"max_window_layers": 0, "sliding_window_pattern": 1, "no_rope_layer_interval": 1}
"""Least value of settings that are integers."""

UNUSED_WINDOW = 4096
"""Window that is written for a model none of whose layers has one, where null is an error."""


def read_layers(hf: Mapping[str, Any], family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields `window`, `sliding` and `rotary` of `ModelConfig`.

    Args:
        hf: Content of config.json.
        family: Family of the model.
        fields: Fields that were already read, `layers` and `window` among them.

    Raises:
        InputError: If a setting has the wrong type or length, or a layer is of an unknown kind.
    """
    if family.layers is None:
        _check_alike(hf)
        return {}
    for name, least in _LEAST.items():
        value = hf.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(
                f"{name} in config.json must be an integer of at least {least}, got {shown(value)}"
            )
    layers, window = fields["layers"], fields["window"]
    if family.layers.switch is not None and not hf.get(family.layers.switch):
        window = None
    kinds = _list(hf, "layer_types", layers)
    if kinds is None:
        off = family.layers.switch is not None and window is None
        sliding = [not off and family.layers.slides(hf, layer) for layer in range(layers)]
    else:
        if unknown := {str(kind) for kind in kinds} - {SLIDING, FULL}:
            raise InputError(
                f"config.json has layers of the types {', '.join(sorted(unknown))}; supported are "
                f"{FULL} and {SLIDING}"
            )
        sliding = [kind == SLIDING for kind in kinds]
    if any(sliding) and window is None:
        needed = "sliding_window" if hf.get("sliding_window") is None else family.layers.switch
        raise InputError(f"config.json has layers of the type {SLIDING} without {needed}; add it")
    found: dict[str, Any] = {"window": window, "sliding": tuple(sliding)}
    if family.layers.rotary:
        _list(hf, "no_rope_layers", layers)
        found["rotary"] = tuple(rotates(hf, layer) for layer in range(layers))
    return found


def write_layers(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the settings of config.json for layers that differ, the inverse of `read_layers`."""
    if family.layers is None:
        return {}
    sliding = config.sliding or (config.window is not None,) * config.layers
    written: dict[str, Any] = {"layer_types": [SLIDING if one else FULL for one in sliding]}
    if family.layers.switch is not None:
        written[family.layers.switch] = any(sliding)
        if not family.layers.rotary:  # transformers before 4.53 reads this
            written["max_window_layers"] = [*sliding, True].index(True)
    elif config.window is None:
        written["sliding_window"] = UNUSED_WINDOW
    if family.layers.rotary:
        rotary = config.rotary or (True,) * config.layers
        written["no_rope_layers"] = [int(one) for one in rotary]
    return written


def simplified(config: ModelConfig) -> ModelConfig:
    """Normalizes settings of layers that are alike after all."""
    changes: dict[str, Any] = {}
    theta = config.sliding_theta
    own = config.rope if theta is None else RopeConfig(theta=theta, share=config.rope.share)
    if config.window is None or (config.sliding and not any(config.sliding)):
        changes = {"window": None, "sliding": (), "sliding_theta": None}
    elif config.sliding and all(config.sliding):
        changes = {"sliding": (), "sliding_theta": None, "rope": own}
    elif own == dataclasses.replace(config.rope, original_context=None):
        changes = {"sliding_theta": None}
    if config.rotary and all(config.rotary):
        changes["rotary"] = ()
    return dataclasses.replace(config, **changes)


def _list(hf: Mapping[str, Any], name: str, layers: int) -> list[Any] | None:
    value = hf.get(name)
    if value is None:
        return None
    # Transformers ignores further entries of no_rope_layers.
    fits = len(value) if isinstance(value, list | tuple) else 0
    if fits < layers or (fits > layers and name != "no_rope_layers"):
        raise InputError(
            f"{name} in config.json must be a list with one entry for each of the {layers} layers, "
            f"got {shown(value)}"
        )
    return list(value)


def _check_alike(hf: Mapping[str, Any]) -> None:
    given = hf.get("layer_types") or ()
    if not isinstance(given, list | tuple):
        raise InputError(f"layer_types in config.json must be a list, got {shown(given)}")
    kinds = {str(kind) for kind in given}
    wanted = SLIDING if hf.get("sliding_window") else FULL
    if kinds - {wanted}:
        raise InputError(
            f"config.json has layers of the types {', '.join(sorted(kinds))}; "
            f"supported is {wanted} in all of them with this sliding_window"
        )
