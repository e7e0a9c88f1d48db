"""Low-rank adapters of a pruned model that preserve its zeros; only the adapters are trained.

A kernel W of R inputs and C outputs gets two factors, `down` R x A and `up` A x C, with rank A:

    (W + scale · down up) · mask,  scale = alpha / rank

The mask applies to the product too, so a pruned weight is exactly 0 both during training and after
merging. This needs an array of W's size. Computing x down up would avoid it, but then merging the
adapters would fill the zeros of W.

Source: Hu, Shen, Wallis, Allen-Zhu, Li, Wang and Chen, "LoRA: low-rank adaptation of large language
models", 2021. Their W is (out, in), their A and B are `down` and `up` transposed.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from swe_prune import masks as masks_lib
from swe_prune import patterns, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.layout import Axes, conventional_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """Factors of all adapted kernels: a pytree for any optax chain and for `TrainState.params`.

    Attributes:
        down: Float32 factors R x A, a pytree like the parameters, None where nothing is adapted.
        up: Float32 factors A x C, a pytree like the parameters, None where nothing is adapted.
        scale: Constant alpha / rank, which is static and not trained.
    """

    down: PyTree
    up: PyTree
    scale: float = dataclasses.field(metadata={"static": True})


@checked
def init(
    params: PyTree,
    rank: int,
    alpha: float,
    key: Array,
    targets: str | Sequence[str] | None = None,
) -> Adapters:
    """Returns new adapters: `down` is normal with variance 1 / R, and `up` is 0.

    New adapters do not change the model. The values drawn for a kernel depend only on the key and
    the name of the kernel.

    Args:
        params: Parameters of the base model, concrete or abstract.
        rank: Rank A, from 1 to the smaller side of every adapted kernel as a matrix, with the input
            axes of `layout.conventional_axes`, or all axes but the last.
        alpha: Scale of the product, divided by the rank.
        key: Typed JAX random key.
        targets: Path rules of the weights to adapt, pruned or dense. Each rule must match a
            floating-point weight with two or more axes that is not a bias. If None,
            `tree.prunable(params)`.

    Raises:
        InputError: If a rule matches nothing, or the rank or alpha is out of range.

    >>> adapters = init({"up": {"kernel": jnp.ones((4, 6))}}, 2, 4.0, jax.random.key(0))
    >>> adapters.down["up"]["kernel"].shape, adapters.up["up"]["kernel"].shape, adapters.scale
    ((4, 2), (2, 6), 2.0)
    """
    if not 0 < alpha < math.inf:
        raise InputError(f"lora alpha must be a finite number above 0, got {alpha}")
    # Check the rank against every adapted kernel before drawing.
    adapted = {name: leaf.shape for name, leaf in _targets(params, targets)}
    sides = {name: _sides(name, shape) for name, shape in adapted.items()}
    for name, (inputs, outputs) in sides.items():
        if rank > min(inputs, outputs):
            raise InputError(
                f"lora rank = {rank} is more than the smaller side of {name!r}, {inputs} x "
                f"{outputs}; lower it to {min(inputs, outputs)} or leave {name!r} dense"
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
    """Returns the adapted weights to run the model with, exactly 0 where a mask is False.

    An adapted kernel has the wider dtype of base and adapters, for example float32 for a bf16 base,
    so that small changes are not lost in rounding; the model casts it to its computation dtype.

    Args:
        params: Parameters of the base model, of any floating dtypes.
        adapters: Adapters from `init`.
        masks: Bool pytree like `params`, None where dense. If None, nothing is pruned.

    Raises:
        InputError: If adapters or masks belong to another model.
    """

    def adapted(name: str, weight: Any, down_RxA: Any, up_AxC: Any) -> Any:
        if down_RxA is None:
            return weight
        if (down_RxA.shape[0], up_AxC.shape[1]) != _sides(name, weight.shape):
            raise InputError(
                f"the adapters of {name!r} are for a matrix of {down_RxA.shape[0]} x "
                f"{up_AxC.shape[1]}, but the weight has shape {weight.shape}; create them with "
                "lora.init from these parameters"
            )
        delta_RxC = adapters.scale * jnp.matmul(
            down_RxA, up_AxC, precision=jax.lax.Precision.HIGHEST
        )
        axes = _matrix_axes(name, weight.shape)
        return weight + patterns.from_matrix(delta_RxC, weight.shape, axes)

    whole = tree.map_named(adapted, params, adapters.down, adapters.up)
    return whole if masks is None else masks_lib.apply(whole, masks)


def merge(params: PyTree, adapters: Adapters, masks: PyTree | None = None) -> PyTree:
    """Merges adapters into parameters with the dtypes of the base, 0 where a mask is False.

    Rounding to a narrower base dtype is the only difference from `apply`.

    Args:
        params: Parameters of the base model.
        adapters: Adapters from `init`.
        masks: Bool pytree like `params`, None where dense. If None, nothing is pruned.

    Raises:
        InputError: If adapters or masks belong to another model.

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
    """Returns the names and weights to adapt."""
    # By default, adapt the prunable weights.
    if targets is None:
        flags = dict(tree.named_leaves(tree.prunable(params)))
        return [(name, leaf) for name, leaf in tree.named_leaves(params) if flags[name]]
    # Otherwise every rule must match a weight that can be adapted.
    rules = [targets] if isinstance(targets, str) else list(targets)
    if not rules:
        raise InputError("lora targets= names no rule, so nothing is adapted; give a rule or None")
    bias = tree.DENSE_BY_DEFAULT["bias"]
    kernels = {
        name: leaf
        for name, leaf in tree.named_leaves(params)
        if tree.is_weight(leaf) and leaf.ndim >= 2 and not tree.rule_matches(bias, name)
    }
    tree.matched(rules, kernels, "lora target rule", "weight of two axes or more")
    return [
        (name, leaf)
        for name, leaf in kernels.items()
        if any(tree.rule_matches(rule, name) for rule in rules)
    ]


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the inputs and outputs of a kernel as a matrix."""
    axes = _matrix_axes(name, shape)
    inputs = math.prod(shape[axis] for axis in axes.inputs)
    return inputs, math.prod(shape) // max(inputs, 1)


def _matrix_axes(name: str, shape: tuple[int, ...]) -> Axes:
    """Returns the axes of the matrix that is factored; any split makes an adapter."""
    known = conventional_axes(name, shape)
    if known is not None:
        return known
    # The projections of attention are (in, heads, width), wider than the model or not.
    first = re.search(r"(^|/)(query|key|value)/kernel(/value)?$", name) and len(shape) == 3
    inputs = 1 if first else len(shape) - 1
    return Axes(tuple(range(inputs)), tuple(range(inputs, len(shape))))
