"""What a model costs, and a limit of it."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.bounds import COUNT
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.structured.cutting import cut
from swe_prune.structured.decoder import UNITS, cut_config
from swe_prune.structured.group import Groups

Measure = Callable[[ModelConfig], float]
"""Function from the config of a candidate to its latency in seconds."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limit of one cost of the cut model; exactly one of the first four is given.

    Attributes:
        params: Number of parameters.
        flops: Floating-point operations of one token in a forward pass; see `flops`.
        bytes: Memory of the parameters in bytes, in their dtypes.
        latency: Seconds that `measure` returns.
        measure: Function from a config to seconds, which times a candidate of that config. It is
            called for some ten candidates.
        context: Number of tokens of a sequence, for `flops`. None: the model's context.
    """

    params: float | None = None
    flops: float | None = None
    bytes: float | None = None
    latency: float | None = None
    measure: Measure | None = None
    context: int | None = None

    @property
    def limit(self) -> tuple[str, float]:
        """Name and value of the limit.

        Raises:
            InputError: Not exactly one was given, or it is not a number above 0.

        >>> Budget(params=1e6).limit
        ('params', 1000000.0)
        """
        names = ("params", "flops", "bytes", "latency")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) != 1:
            raise InputError(
                f"a budget must have one of {', '.join(names)}, got {', '.join(given) or 'none'}"
            )
        ((name, value),) = given.items()
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise InputError(f"budget {name} must be a number above 0, got {value!r}")
        if (name == "latency") != (self.measure is not None):
            raise InputError(
                "a budget of latency needs measure=, a function from a config to seconds, and "
                "others do not; give both or neither"
            )
        if self.context is not None:
            COUNT.check(self.context, "context of a budget")
        return name, float(value)

    def cost(
        self, groups: Groups, params: PyTree | None, config: ModelConfig | None
    ) -> Callable[[Mapping[str, Any]], float]:
        """Returns the function from kept units to the cost that is limited.

        Args:
            groups: Groups by name.
            params: Parameters before the cut, which may be abstract.
            config: Config before the cut.

        Raises:
            InputError: What the cost is computed from is missing.
        """
        name, _ = self.limit
        if name != "latency" and params is None:
            raise InputError(f"a budget of {name} needs params=; give the model's parameters")
        if name in ("latency", "flops") and config is None:
            raise InputError(f"a budget of {name} needs config=; give the model's config")
        other = next((name for name in groups if name.rpartition("/")[2] not in UNITS), None)
        if name in ("latency", "flops") and other is not None:
            raise InputError(
                f"a budget of {name} is for the groups of structured.groups(config), and {other!r} "
                "is another; give a budget of params or bytes, or a sparsity"
            )
        if name == "latency":
            assert config is not None
            assert self.measure is not None
            measure = self.measure
            return lambda keep: measure(cut_config(config, keep))
        shapes = tree.map_tracked(abstract, params)
        if name == "flops":
            assert config is not None
            return lambda keep: flops(
                cut_config(config, keep), cut(shapes, groups, keep), self.context
            )
        size = tree.size if name == "params" else memory
        return lambda keep: size(cut(shapes, groups, keep))


def abstract(leaf: Any) -> Any:
    """Returns the shape and dtype of an array, other leaves as they are."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


@checked
def memory(params: PyTree) -> int:
    """Returns the size of arrays in bytes.

    >>> memory({"w": jnp.zeros((2, 3), jnp.bfloat16)})
    12
    """
    arrays = [leaf for _, leaf in tree.named_leaves(params) if hasattr(leaf, "dtype")]
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in arrays)


@checked
def flops(config: ModelConfig, params: PyTree, context: int | None = None) -> float:
    """Returns the floating-point operations of one token in a forward pass of the decoder.

    Two for each weight of a kernel and of the output head, and two for each number of the scores
    and of the weighted values of attention, over the keys that a token of a sequence attends to on
    average. Of sparse experts those count that a token is sent to, and of a model of images and
    text the decoder alone, since its tower runs once for an image.

    Args:
        config: Config of the decoder.
        params: Parameters, which may be abstract.
        context: Number of tokens of the sequence. None: the model's context.
    """
    length = config.context if context is None else context
    total = 0.0
    for name, leaf in tree.named_leaves(params):
        if config.vision is not None and re.search(r"(?:^|/)(vision|projection)/", name):
            continue
        used = 1.0
        if config.experts is not None and re.search(r"mlp/(up|gate|down)/kernel$", name):
            used = config.experts_per_token / config.experts
        table = config.tied_head and name.endswith("embedding/embedding")
        if name.endswith("/kernel") or table:
            total += 2 * used * math.prod(leaf.shape)
    for layer in range(config.layers):
        own = config.of_layer(layer)
        window = min(length, own.window or length)
        # The first tokens attend to fewer keys than the window has.
        keys = window * (length - (window - 1) / 2) / length
        total += 4 * own.heads * own.head_size * keys
    return total
