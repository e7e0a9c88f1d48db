"""Checks of the decoder's config, each with a sentence that says what to change."""

from swe_prune.bounds import check_each
from swe_prune.config import PER_LAYER, RANGES, ModelConfig, check_choices, check_width
from swe_prune.errors import InputError
from swe_prune.models import rope


def check(config: ModelConfig) -> None:
    """Checks the sizes and choices of the decoder.

    Raises:
        InputError: If a setting is unknown, or settings do not fit together.
    """
    check_choices(config, "config.model")
    check_each(config, RANGES, "config.model")
    check_width(config)
    _check_widths(config, "config.model")
    if config.positions == "rope":
        rope.check(config, config.head_size)
    _check_layers(config)
    _check_numbers(config)
    if config.experts is not None:
        _check_experts(config)


def _check_widths(config: ModelConfig, where: str) -> None:
    if config.key_heads < 1 or config.heads % config.key_heads:
        raise InputError(
            f"{where}.kv_heads must be a divisor of heads = {config.heads}, got {config.kv_heads}"
        )
    if config.hidden_size < 1:
        raise InputError(f"{where}.hidden must be at least 1, got {config.hidden_size}")


def _check_layers(config: ModelConfig) -> None:
    for name in PER_LAYER:
        given = len(getattr(config, name))
        if given not in (0, config.layers):
            raise InputError(
                f"config.model.{name} must have one entry for each of the {config.layers} layers, "
                f"or none, got {given}"
            )
    if config.scan_layers and any(getattr(config, name) for name in PER_LAYER):
        raise InputError(
            "config.model.scan_layers compiles one block for all layers, and one of "
            f"{', '.join(PER_LAYER)} makes layers that differ; set scan_layers=False"
        )
    if bool(config.layer_heads) != bool(config.layer_kv_heads):
        raise InputError(
            "config.model.layer_heads and layer_kv_heads must both be given or neither, got "
            f"{config.layer_heads} and {config.layer_kv_heads}"
        )
    for layer in range(config.layers if config.layer_hidden or config.layer_heads else 0):
        _check_widths(config.of_layer(layer), f"layer {layer}")
    if any(config.sliding) and config.window is None:
        raise InputError("config.model.sliding needs a window; set config.model.window")
    if config.sliding_theta is not None and not config.sliding:
        raise InputError("config.model.sliding_theta needs config.model.sliding; set it")


def _check_numbers(config: ModelConfig) -> None:
    if config.norm_plus_one and (config.norm != "rms" or config.head_norm == "each_head"):
        raise InputError(
            "config.model.norm_plus_one needs norm 'rms' and no head_norm 'each_head'; change one"
        )


def _check_experts(config: ModelConfig) -> None:
    assert config.experts is not None
    if not 1 <= config.experts_per_token <= config.experts:
        raise InputError(
            f"config.model.experts_per_token must be 1 to experts = {config.experts}, got "
            f"{config.experts_per_token}"
        )
    if not config.gated or config.mlp_bias or (config.mlp_bias is None and config.use_bias):
        raise InputError(
            "config.model.experts needs a gated MLP without biases; set gated=True and "
            "mlp_bias=False"
        )
