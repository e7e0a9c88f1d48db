"""Low-rank adapters of a pruned model, whose zeros stay: they are trained, the base is not.

A kernel W of R inputs and C outputs gets two factors, `down` R x A and `up` A x C, A the rank:

    (W + scale · down up) · mask,  scale = alpha / rank

The mask is on the product too, so a pruned weight is exactly 0 while the adapters are trained and
after they are merged. That costs an array of W's size, which x down up would do without, but the
zeros of that sum are not zeros of any kernel that it could be merged into.

Source: Hu, Shen, Wallis, Allen-Zhu, Li, Wang and Chen, "LoRA: low-rank adaptation of large language
models", 2021. Their W is (out, in), their A and B are `down` and `up` transposed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import masks as masks_lib
from swe_prune import patterns, tree
from swe_prune.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """Factors of every adapted kernel: a pytree for any optax chain and for `TrainState.params`.

    Attributes:
        down: float32 R x A each, a pytree like the parameters, None where nothing is adapted.
        up: float32 A x C each, likewise.
        scale: alpha / rank, no leaf and so not trained.
    """

    down: PyTree
    up: PyTree
    scale: float = dataclasses.field(metadata={"static": True})


def init(
    params: PyTree,
    rank: int,
    alpha: float,
    key: Array,
    targets: str | Sequence[str] | None = None,
) -> Adapters:
    """Returns fresh adapters: `down` is normal with variance 1 / R, `up` is 0.

    So at first they change nothing. What is drawn for a kernel depends on the key and its name.

    Args:
        params: of the base; arrays, or abstract ones.
        rank: A, at least 1 and at most the smaller side of every adapted kernel as a matrix, whose
            inputs `tree.input_axes` tells.
        alpha: what the product is scaled by, over the rank.
        key: a typed jax random key.
        targets: path rules of what to adapt, pruned or dense: floating-point weights of two axes or
            more but biases; each rule must match one. None: `tree.prunable(params)`.

    Raises:
        InputError: a rule that matches nothing, or a rank or alpha that cannot be used.

    >>> adapters = init({"up": {"kernel": jnp.ones((4, 6))}}, 2, 4.0, jax.random.key(0))
    >>> adapters.down["up"]["kernel"].shape, adapters.up["up"]["kernel"].shape, adapters.scale
    ((4, 2), (2, 6), 2.0)
    """
    if rank < 1:
        raise InputError(f"lora rank = {rank} adapts nothing; give 1 or more")
    if not 0 < alpha < math.inf:
        raise InputError(f"lora alpha = {alpha} cannot scale adapters; give a number above 0")
    adapted = {name: leaf.shape for name, leaf in _targets(params, targets)}
    sides = {name: _sides(name, shape) for name, shape in adapted.items()}
    for name, (inputs, outputs) in sides.items():
        if rank > min(inputs, outputs):
            raise InputError(
                f"lora rank = {rank} is more than the smaller side of {name!r}, {inputs} x "
                f"{outputs}; lower it to {min(inputs, outputs)} or leave that out with targets="
            )

    def down(name: str, _: Any) -> Array | None:
        if name not in sides:
            return None
        draw = jax.random.normal(tree.named_key(key, name), (sides[name][0], rank), jnp.float32)
        return draw / math.sqrt(sides[name][0])

    def up(name: str, _: Any) -> Array | None:
        return jnp.zeros((rank, sides[name][1]), jnp.float32) if name in sides else None

    return Adapters(tree.map_named(down, params), tree.map_named(up, params), alpha / rank)


def apply(params: PyTree, adapters: Adapters, masks: PyTree | None = None) -> PyTree:
    """Returns the weights to run the model with: adapted, and exactly 0 where a mask is False.

    An adapted kernel comes in the wider dtype of base and adapters, float32 over a bf16 base, so
    that a small change is not lost in rounding; the model casts it to what it computes in.

    Args:
        params: of the base, any floating dtypes; nothing of it is changed.
        adapters: as `init` makes them.
        masks: bool pytree, None where dense; None: nothing is pruned.

    Raises:
        InputError: adapters or masks of another model.
    """

    def adapted(name: str, weight: Any, down_RxA: Any, up_AxC: Any) -> Any:
        if down_RxA is None:
            return weight
        if (down_RxA.shape[0], up_AxC.shape[1]) != _sides(name, weight.shape):
            raise InputError(
                f"the adapters of {name!r} make {down_RxA.shape[0]} x {up_AxC.shape[1]} and the "
                f"weight is {weight.shape}; make them with lora.init from these parameters"
            )
        delta_RxC = adapters.scale * jnp.matmul(
            down_RxA, up_AxC, precision=jax.lax.Precision.HIGHEST
        )
        axes = tree.input_axes(name, weight.shape)
        return weight + patterns.from_matrix(delta_RxC, weight.shape, axes)

    whole = tree.map_named(adapted, params, adapters.down, adapters.up)
    return whole if masks is None else masks_lib.apply(whole, masks)


def merge(params: PyTree, adapters: Adapters, masks: PyTree | None = None) -> PyTree:
    """Returns parameters of the base's dtypes that need no adapters, zeros where a mask is False.

    Rounding to a narrower base is the only difference to `apply`.

    Raises:
        InputError: adapters or masks of another model.

    >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
    >>> mask = {"kernel": params["kernel"] != 0}
    >>> adapters = init(params, 1, 1.0, jax.random.key(0))
    >>> trained = dataclasses.replace(adapters, up={"kernel": jnp.ones((1, 2))})
    >>> (merge(params, trained, mask)["kernel"] != 0).tolist()
    [[True, False], [False, True]]
    """
    whole = apply(params, adapters, masks)
    return tree.map_named(lambda _, new, base: jnp.asarray(new, base.dtype), whole, params)


def _targets(params: PyTree, targets: str | Sequence[str] | None) -> list[tuple[str, Any]]:
    """Returns the name and weight of everything to adapt."""
    if targets is None:
        flags = dict(tree.named_leaves(tree.prunable(params)))
        return [(name, leaf) for name, leaf in tree.named_leaves(params) if flags[name]]
    rules = [targets] if isinstance(targets, str) else list(targets)
    if not rules:
        raise InputError("lora targets= names no rule, so nothing is adapted; give one or None")
    bias = tree.DENSE_BY_DEFAULT["bias"]
    kernels = {
        name: leaf
        for name, leaf in tree.named_leaves(params)
        if tree.is_weight(leaf) and leaf.ndim >= 2 and not tree.rule_matches(bias, name)
    }
    for rule in rules:
        if not any(tree.rule_matches(rule, name) for name in kernels):
            raise InputError(
                f"lora target rule {rule!r} matches no weight of two axes or more; correct it to "
                f"match one, such as {next(iter(kernels), 'none here')!r}"
            )
    return [
        (name, leaf)
        for name, leaf in kernels.items()
        if any(tree.rule_matches(rule, name) for rule in rules)
    ]


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the inputs and outputs of a kernel as a matrix."""
    axes = tree.input_axes(name, shape)
    inputs = math.prod(shape[axis] for axis in axes)
    return inputs, math.prod(shape) // max(inputs, 1)
