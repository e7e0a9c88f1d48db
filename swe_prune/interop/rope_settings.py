"""Conversion between the rotary positions in config.json and `RopeConfig`.

Two formats are in use: `rope_theta` next to a `rope_scaling` group, and, since transformers 5, a
group `rope_parameters` that includes the theta. Both are read. The first is written, since every
version of transformers reads it.

Source: https://github.com/huggingface/transformers, modeling_rope_utils.py and
models/phi3/configuration_phi3.py.
"""

from collections.abc import Mapping
from typing import Any

from swe_prune.config import RANGES, ModelConfig, RopeConfig
from swe_prune.errors import InputError, shown
from swe_prune.interop.families import FAMILIES
from swe_prune.interop.family import Family

SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
"""Supported values of `rope_type`."""

PHI3 = ("phi3", "phi3_v")
PHI3_ORIGINAL = 4096  # default of transformers for Phi-3
_NUMBERS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all",
    },
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency",
        "high_freq_factor": "high_frequency",
    },
    "longrope": {"factor": "factor", "attention_factor": "attention_factor"},
}
"""For each scaling, names in `RopeConfig` by name in config.json."""

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_WITH_ORIGINAL = ("yarn", "llama3", "longrope")


def read_rope(hf: Mapping[str, Any], family: str) -> RopeConfig:
    """Returns the rotary positions of a config.json.

    Args:
        hf: Content of config.json.
        family: Value of `model_type`; Phi-3 has separate names and defaults.

    Raises:
        InputError: If the scaling is unknown, lacks a number, or differs between layers.
    """
    keys = FAMILIES[family].rope
    group = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(group, Mapping):
        raise InputError(f"the rope settings in config.json must be a mapping, got {shown(group)}")
    # A group per kind of layer is supported where the family has them.
    if keys.sliding_theta is not None and hf.get("rope_parameters"):
        group = _of_kind(group, "full_attention")
    if any(isinstance(value, Mapping) for value in group.values()):
        raise InputError(
            "config.json has rope settings per kind of layer; only one for all layers is supported"
        )
    kind = _first(group.get("rope_type"), group.get("type"), "default")
    if kind == "su" or (kind == "yarn" and family in PHI3):
        kind = "longrope"  # the name in early Phi-3 models
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise InputError(
            f"config.json has the rope type {shown(kind)}; supported are {', '.join(SCALINGS)}"
        )
    found: dict[str, Any] = {
        "theta": _number(
            _first(group.get("rope_theta"), hf.get(keys.theta), keys.default_theta), keys.theta
        ),
        "share": _share(group, hf, family),
        "scaling": "none" if kind == "default" else kind,
    }
    # Required and optional numbers of the scaling.
    for name in _NEEDED.get(kind, ()):
        if group.get(name) is None:
            raise InputError(f"config.json has rope type {kind!r} without {name!r}; add it")
    for name, field in _NUMBERS.get(kind, {}).items():
        if group.get(name) is not None:
            found[field] = _number(group[name], name, field)
    # Settings that only some scalings have.
    if kind in _WITH_ORIGINAL:
        found["original_context"] = _original(group, hf, family)
    if kind == "yarn":
        found["truncate"] = group.get("truncate") is not False
    if kind == "longrope":
        for length in ("short", "long"):
            factors = group[f"{length}_factor"]
            if not isinstance(factors, list | tuple):
                raise InputError(
                    f"{length}_factor in config.json must be a list, got {shown(factors)}"
                )
            found[f"{length}_factors"] = tuple(
                _number(f, f"{length}_factor", f"{length}_factors") for f in factors
            )
    return RopeConfig(**found)


def read_sliding_theta(hf: Mapping[str, Any], family: Family) -> float | None:
    """Returns the theta of the layers with a window, or None if it is that of all layers.

    Raises:
        InputError: If these layers have a scaling.
    """
    name = family.rope.sliding_theta
    if name is None:
        return None
    group: Mapping[str, Any] = {}
    if hf.get("rope_parameters"):
        group = _of_kind(hf["rope_parameters"], "sliding_attention")
    kind = group.get("rope_type") or group.get("type") or "default"
    if kind != "default":
        raise InputError(
            f"config.json has the rope type {kind!r} in layers of the type sliding_attention; "
            "supported is 'default'"
        )
    value = _first(group.get("rope_theta"), hf.get(name), family.rope.default_sliding_theta)
    return _number(value, name)


def _of_kind(groups: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    group = groups.get(kind)
    if not isinstance(group, Mapping):
        raise InputError(
            f"rope_parameters in config.json must have a mapping for {kind!r}, got {group!r}"
        )
    return group


def write_rope(config: ModelConfig, family: str) -> dict[str, Any]:
    """Returns the settings of config.json for `config.rope`, the inverse of `read_rope`."""
    rope, keys = config.rope, FAMILIES[family].rope
    written: dict[str, Any] = {keys.theta: rope.theta, "rope_scaling": None}
    if rope.share != 1 or keys.share is not None:
        written[keys.share or "partial_rotary_factor"] = rope.share
    if keys.sliding_theta is not None:
        written[keys.sliding_theta] = config.sliding_theta or rope.theta
    original = rope.original_context or config.context
    if family in PHI3:
        written["original_max_position_embeddings"] = original
    if rope.scaling == "none":
        return written
    scaling = "su" if family == "phi3_v" and rope.scaling == "longrope" else rope.scaling
    group: dict[str, Any] = {"type" if family in PHI3 else "rope_type": scaling}
    for name, field in _NUMBERS[rope.scaling].items():
        if getattr(rope, field) is not None:
            group[name] = getattr(rope, field)
    if rope.scaling == "yarn":
        group["truncate"] = rope.truncate
    if rope.scaling in _WITH_ORIGINAL and family not in PHI3:
        group["original_max_position_embeddings"] = original
    if rope.scaling == "longrope":
        # Before transformers 5, Phi-3's group may contain only the type and these.
        group |= {"short_factor": [*rope.short_factors], "long_factor": [*rope.long_factors]}
    return written | {"rope_scaling": group}


def _share(group: Mapping[str, Any], hf: Mapping[str, Any], family: str) -> float:
    keys = FAMILIES[family].rope
    name = keys.share or "partial_rotary_factor"
    share = _first(group.get("partial_rotary_factor"), hf.get(name), keys.default_share)
    if share != 1 and keys.share is None:
        able = ", ".join(name for name, one in FAMILIES.items() if one.rope.share is not None)
        raise InputError(
            f"config.json has partial_rotary_factor = {shown(share)}, which model_type {family!r} "
            f"does not use; supported is 1, and any fraction for {able}"
        )
    return _number(share, name, "share")


def _original(group: Mapping[str, Any], hf: Mapping[str, Any], family: str) -> int | None:
    name = "original_max_position_embeddings"
    default = PHI3_ORIGINAL if family in PHI3 else None
    value = _first(hf.get(name), group.get(name), default)
    if value is not None:
        RANGES["rope.original_context"].check(value, f"{name} in config.json")
    return value


def _number(value: Any, name: str, field: str = "theta") -> float:
    RANGES[f"rope.{field}"].check(value, f"{name} in config.json")
    return float(value)


def _first(*values: Any) -> Any:
    """Returns the first value that is given; 0 is."""
    return next((one for one in values if one is not None), None)
