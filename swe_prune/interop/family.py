"""What a model family is: its settings in config.json and what they mean in `ModelConfig`.

Source: https://github.com/huggingface/transformers, models/*/configuration_*.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

NEEDED = object()
"""Marker for a key without a default, which every config of the family must have."""


@dataclasses.dataclass(frozen=True)
class Code:
    """A setting that `ModelConfig` writes in another way.

    Attributes:
        read: Function from the value in config.json to that in `ModelConfig`.
        write: Its inverse.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def choice(of_false: str, of_true: str) -> Code:
    """Returns the code of a choice of two that config.json writes as false and true."""
    return Code(lambda value: of_true if value else of_false, lambda value: value == of_true)


def _inverse_square(scale: float) -> float:
    square = round(scale**-2, 6)  # 6 ** -0.5 squared is not quite 6
    return int(square) if square.is_integer() else square


INVERSE_ROOT = Code(lambda value: value**-0.5, _inverse_square)
"""A factor 1 / sqrt(x) that is written as x."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting of config.json.

    Attributes:
        name: Name in config.json.
        field: Name of the field of `ModelConfig`.
        kind: Type of the value.
        default: Value if the key is missing, or `NEEDED`. None is written as null and means the
            same as None in `ModelConfig`.
        code: Conversion of the value. If None, it is the same in `ModelConfig`.
    """

    name: str
    field: str
    kind: type = int
    default: Any = NEEDED
    code: Code | None = None


@dataclasses.dataclass(frozen=True)
class RopeKeys:
    """Names and defaults of the rotary positions.

    Attributes:
        theta: Name of the base of the frequencies.
        default_theta: Its default.
        share: Name of the fraction of a head that is rotated, or None if it is always 1.
        default_share: Its default.
        sliding_theta: Name of the base in layers with a window, or None if it is the same. The
            group `rope_parameters` is then one for each kind of layer.
        default_sliding_theta: Its default.
    """

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    share: str | None = None
    default_share: float = 1.0
    sliding_theta: str | None = None
    default_sliding_theta: float = 10000.0


@dataclasses.dataclass(frozen=True)
class LayerKinds:
    """Which layers have a window, and which have rotary positions.

    Attributes:
        slides: Function of the config.json and a layer's index that returns whether the layer has
            the window, where `layer_types` is missing.
        switch: Name of the setting without which no layer has the window, or None.
        rotary: Whether `no_rope_layers` names layers without rotary positions.
    """

    slides: Callable[[Mapping[str, Any], int], bool]
    switch: str | None = None
    rotary: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """Settings in config.json of one `model_type`.

    Attributes:
        architecture: Transformers class that loads the model with a language-model head.
        keys: Settings that become fields of `ModelConfig`.
        fixed: Fields with the same value for all models of the family.
        only: Supported values of settings that the decoder supports only in part.
        same: Settings that must equal another setting, or be null.
        derived: Functions from all fields to the value of a field that depends on others.
        rope: Names and defaults of the rotary positions.
        layers: Which layers differ, or None if all are alike.
        vision: Whether the model has a vision tower.
    """

    architecture: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = dataclasses.field(
        default_factory=dict
    )
    rope: RopeKeys = RopeKeys()
    layers: LayerKinds | None = None
    vision: bool = False

    @property
    def rotary(self) -> bool:
        """Whether the positions are rotary."""
        return self.fixed["positions"] == "rope"
