"""Conversion between Hugging Face's config.json and `ModelConfig`, by the tables of `families`.

Settings that the decoder does not support raise an error; they are never ignored.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from swe_prune.arguments import checked
from swe_prune.bounds import COUNT, POSITIVE
from swe_prune.config import RANGES, ComputeDtype, ModelConfig, VisionConfig
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.interop.families import ACTIVATIONS, FAMILIES
from swe_prune.interop.family import NEEDED, Family, Key
from swe_prune.interop.layer_kinds import read_layers, simplified, write_layers
from swe_prune.interop.rope_settings import read_rope, read_sliding_theta, write_rope
from swe_prune.interop.vision_settings import read_vision, write_vision
from swe_prune.models.checks import check

_KINDS = {bool: "true or false", str: "a name"}
# Fields whose None has a meaning in `ModelConfig`.
_NULLABLE = ("hidden", "head_width", "kv_heads", "window", "attention_cap", "logit_cap")


@checked
def read_config(
    hf: Mapping[str, Any], compute_dtype: str = "float32"
) -> tuple[str, ModelConfig, int]:
    """Returns the family, the decoder's settings, and the vocabulary size of a config.json.

    Args:
        hf: Content of config.json.
        compute_dtype: Dtype of the computation, "float32" or "bfloat16".

    Raises:
        InputError: If the architecture is not supported, the weights are quantized, or a setting is
            missing, has the wrong type, or is not supported.

    >>> read_config({"model_type": "gpt2", "vocab_size": 9, "n_embd": 4, "n_layer": 1, "n_head": 2})
    ... # doctest: +ELLIPSIS
    ('gpt2', ModelConfig(layers=1, heads=2, width=4, context=1024, ...), 9)
    """
    check_choice(compute_dtype, typing.get_args(ComputeDtype), "compute_dtype")
    name = hf.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise InputError(
            f"config.json has model_type {name!r}, which is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    _refuse(hf, str(name), family)
    # Read the keys of the family, then resolve defaults that depend on other settings.
    fields = {key.field: _value(hf, key) for key in family.keys} | dict(family.fixed)
    fields |= {"activation": _activation(fields["activation"]), "dtype": compute_dtype}
    fields |= {field: value(fields) for field, value in family.derived.items()}
    fields |= read_layers(hf, family, fields)
    if family.rotary:
        fields["rope"] = rope = read_rope(hf, str(name))
        fields["sliding_theta"] = read_sliding_theta(hf, family)
        if rope.scaling == "dynamic":  # it applies beyond the context in config.json
            fields["rope"] = dataclasses.replace(rope, original_context=fields["context"])
            context = fields["context"] * (rope.factor or 1)
            POSITIVE.check(context, "max_position_embeddings * factor in config.json")
            fields["context"] = int(context)
            COUNT.check(fields["context"], "max_position_embeddings * factor in config.json")
    if family.vision:
        fields["vision"] = read_vision(hf)
    config = ModelConfig(**fields)
    try:
        check(config)
    except InputError as error:
        raise InputError(f"config.json has settings that do not fit together: {error}") from None
    config = canonical(config)
    return str(name), config, _value(hf, Key("vocab_size", "vocab_size"))


@checked
def write_config(config: ModelConfig, vocab_size: int, family: str | None = None) -> dict[str, Any]:
    """Returns a config.json for the decoder's settings that transformers loads.

    Args:
        config: Settings of the decoder; the computation dtype is not written.
        vocab_size: Size V of the vocabulary.
        family: Model family, a key of `FAMILIES`. If None, the first that can express all settings.

    Raises:
        InputError: If no family, or not the given one, can express all settings.
    """
    check_choice(family, (*FAMILIES, None), "family")
    _refuse_widths(config, family)
    # Use the first family whose config.json reads back as the same settings.
    for name in FAMILIES if family is None else (family,):
        written = _written(config, vocab_size, name)
        try:
            complete = read_config(written, config.dtype)[1] == canonical(config)
        except InputError:
            complete = False
        if complete:
            return written
    raise InputError(
        f"the model's settings cannot be written as a config.json of {family or 'any family'}: "
        f"supported are {', '.join(FAMILIES)}, and this combination fits none of them; {config}"
    )


def _refuse_widths(config: ModelConfig, family: str | None) -> None:
    """Refuses widths that a cut may leave and that no config.json of the family can say."""
    if config.layer_hidden or config.layer_heads:
        raise InputError(
            "the model's layers differ in their widths, which transformers cannot load; cut it "
            "with uniform=True, or store it in a checkpoint"
        )
    if family is None or config.head_size * config.heads == config.width:
        return
    # Transformers checks the factors of a Phi-3's longrope against width / heads.
    by_width = family == "phi3" and config.rope.scaling == "longrope"
    if by_width or not any(key.field == "head_width" for key in FAMILIES[family].keys):
        kind = f"{family} with longrope" if by_width else family
        raise InputError(
            f"in a {kind} the width of a head is width / heads, so a model with {config.heads} "
            f"heads of {config.head_size} and width {config.width} cannot be written as its "
            "config.json; cut neurons or layers, or store it in a checkpoint"
        )


def _written(config: ModelConfig, vocab_size: int, name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    written: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": vocab_size,
    }
    whole = dataclasses.replace(
        config,
        hidden=config.hidden_size,
        kv_heads=config.key_heads,
        head_width=config.head_size,
        attention_scale=config.attention_scale or config.head_size**-0.5,
    )
    for key in family.keys:
        value = getattr(whole, key.field)
        if key.kind is bool and value is None:
            value = config.use_bias
        written[key.name] = value if key.code is None else key.code.write(value)
    written |= write_layers(config, family)
    if family.rotary and config.rope.scaling == "dynamic":
        written["max_position_embeddings"] = config.rope.original_context or config.context
    activation = next(key.name for key in family.keys if key.field == "activation")
    written[activation] = next(
        (hf for hf, own in ACTIVATIONS.items() if own == config.activation), config.activation
    )
    if family.vision and config.vision is not None:
        written |= write_vision(config.vision)
    return written | (write_rope(config, name) if family.rotary else {})


def canonical(config: ModelConfig) -> ModelConfig:
    """Normalizes equivalent settings, and resets those that config.json does not contain."""
    config = simplified(config)
    scale = config.attention_scale
    normalized = {
        "attention_scale": None if scale == config.head_size**-0.5 else scale,
        "hidden": config.hidden_size,
        "hidden_ratio": ModelConfig.hidden_ratio,
        "kv_heads": None if config.key_heads == config.heads else config.key_heads,
        "head_width": None if config.head_size * config.heads == config.width else config.head_size,
        "vocab_size": None,
        "dropout": 0.0,
        "remat": False,
        "scan_layers": False,
    }
    for field in ("qkv_bias", "out_bias", "mlp_bias", "head_bias"):
        value = getattr(config, field)
        normalized[field] = config.use_bias if value is None else value
    if config.vision is not None:  # crops are in another file
        vision = dataclasses.replace(config.vision, crops=VisionConfig.crops)
        normalized["vision"] = vision
    rope = config.rope
    if config.positions == "rope" and rope.original_context is None:
        normalized["rope"] = dataclasses.replace(rope, original_context=config.context)
    return dataclasses.replace(config, **normalized)


def _refuse(hf: Mapping[str, Any], name: str, family: Family) -> None:
    if hf.get("quantization_config"):
        raise InputError(
            "config.json has a quantization_config, and quantized safetensors are not supported; "
            "supported are float32, float16 and bfloat16, and quantized GGUF files"
        )
    for key, allowed in family.only.items():
        if key in hf and hf[key] not in allowed:
            raise InputError(
                f"config.json has {key} = {hf[key]!r}, which the decoder does not support; "
                f"supported for {name} is {allowed[0]!r}"
            )
    for key, other in family.same.items():
        if hf.get(key) is not None and hf[key] != hf.get(other):
            raise InputError(
                f"config.json has {key} = {hf[key]!r}, which the decoder does not support; "
                f"supported for {name} is {other}, {hf.get(other)!r}"
            )


def _value(hf: Mapping[str, Any], key: Key) -> Any:
    value = hf.get(key.name, key.default)
    if value is NEEDED:
        raise InputError(
            f"config.json lacks {key.name!r}, which a {hf['model_type']} needs; add it, or "
            "download the file again"
        )
    if value is None and (key.field in _NULLABLE or key.default is None):
        return None
    # JSON may write a float without a decimal point.
    if key.kind is float and type(value) is int:
        value = float(value)
    name = f"{key.name} in config.json"
    if key.field in RANGES:
        RANGES[key.field].check(value, name)
    elif type(value) is not key.kind:
        raise InputError(f"{name} must be {_KINDS[key.kind]}, got {shown(value)}")
    return value if key.code is None else key.code.read(value)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(
            f"config.json has the activation {name!r}, which the decoder does not support; "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
