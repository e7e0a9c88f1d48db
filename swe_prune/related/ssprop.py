"""ssProp: back-propagation through a part of the output channels.

The forward pass is dense. In the backward pass a layer keeps the output channels with the largest
mean |dY| and computes the gradients of the kernel, the bias and the input from these alone (arXiv
2408.12561; https://github.com/lujiazho/ssProp). Nothing is rescaled. With all channels the gradient
is exact.

    idx = top_k(mean |dY_c|, k = max(1, floor(keep C)))
    dW[:, idx] = Xᵀ dY[:, idx]      db[idx] = sum dY[:, idx]      dX = dY[:, idx] W[:, idx]ᵀ

`keep` is static: each value is a program of its own, and the schedules that alternate between a
dense and a sparse step need two.
"""

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice

Product = Callable[[Array, Array], Array]
Kind = Literal["constant", "linear", "cosine", "bar"]


@checked
def dense(
    x: Float[Array, "... D"],
    kernel: Float[Array, "D O"],
    bias: Float[Array, " O"] | None = None,
    *,
    keep: float,
    key: Array | None = None,
    only_weights: bool = False,
) -> Float[Array, "... O"]:
    """Returns x @ kernel + bias, with a sparse backward pass.

    Args:
        x: Input.
        kernel: Kernel (D, O).
        bias: Bias (O,).
        keep: Share of the output channels that gradients pass through, in (0, 1]; static.
        key: Random key, for random channels in place of the largest.
        only_weights: Whether the gradient of x is exact all the same.

    Raises:
        InputError: If `keep` is out of its range, or the shapes do not fit.
    """
    return _linear(jnp.matmul, x, kernel, bias, keep, key, only_weights)


@checked
def conv(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "h w I O"],
    bias: Float[Array, " O"] | None = None,
    *,
    keep: float,
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    key: Array | None = None,
    only_weights: bool = False,
) -> Float[Array, "B G V O"]:
    """Returns a two-dimensional convolution plus bias, with a sparse backward pass.

    Args:
        x: Images, channels last.
        kernel: Kernel (height, width, input channels, output channels).
        bias: Bias (O,).
        keep: Share of the output channels that gradients pass through, in (0, 1]; static.
        strides: Strides.
        padding: "SAME", "VALID" or pairs.
        key: Random key, for random channels in place of the largest.
        only_weights: Whether the gradient of x is exact all the same.

    Raises:
        InputError: If `keep`, the strides or the padding are out of their range.
    """
    if isinstance(padding, str):
        pads, fine = padding, padding in ("SAME", "VALID")
    else:
        pads = tuple((low, high) for low, high in padding)
        fine = len(pads) == 2 and min(min(pair) for pair in pads) >= 0
    if len(strides) != 2 or min(strides) < 1 or not fine:
        raise InputError(
            "strides must be two integers of at least 1 and padding 'SAME', 'VALID' or two pairs "
            f"of at least 0, got {strides!r} and {padding!r}"
        )
    product = _conv(tuple(strides), pads)
    return _linear(product, x, kernel, bias, keep, key, only_weights)


@functools.cache
def _conv(strides: tuple[int, ...], padding: Any) -> Product:
    return functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@checked
def channels(keep: float, count: int) -> int:
    """Returns the number of channels that gradients pass through.

    Raises:
        InputError: If `keep` is not a number in (0, 1].

    >>> channels(0.2, 64), channels(0.01, 64), channels(1.0, 64), channels(0.29, 100)
    (12, 1, 64, 29)
    """
    number = isinstance(keep, numbers.Real) and not isinstance(keep, bool)
    if not number or not 0 < keep <= 1:
        raise InputError(
            f"keep must be a share of the output channels in (0, 1], got {keep!r}; it is static, "
            "so give a number and not a traced value"
        )
    # A share such as 0.29 of 100 is 29 of them, and its product 28.999999999999996.
    return max(1, math.floor((keep + 1e-6) * count)) if keep < 1 else count


def _linear(
    product: Product,
    x: Array,
    kernel: Array,
    bias: Array | None,
    keep: float,
    key: Array | None,
    only_weights: bool,
) -> Array:
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=None)
    kept = channels(keep, kernel.shape[-1])
    shift = jnp.zeros(kernel.shape[-1], kernel.dtype) if bias is None else bias
    if kept == kernel.shape[-1]:
        return product(x, kernel) + shift
    return _sparse(product, kept, only_weights, x, kernel, shift, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sparse(
    product: Product,
    kept: int,
    only_weights: bool,
    x: Array,
    kernel: Array,
    bias: Array,
    key: Array | None,
) -> Array:
    return product(x, kernel) + bias


def _forward(product, kept, only_weights, x, kernel, bias, key):
    y = _sparse(product, kept, only_weights, x, kernel, bias, key)
    return y, (x, kernel, bias, key)


def _backward(product, kept, only_weights, saved, dy):
    x, kernel, bias, key = saved
    if key is None:
        size = jnp.abs(dy.astype(jnp.float32)).mean(tuple(range(dy.ndim - 1)))
        _, index = jax.lax.top_k(size, kept)
    else:
        index = jax.random.choice(key, kernel.shape[-1], (kept,), replace=False)
    # The gradient of the product of the kept channels, a dense one of fewer columns.
    part = jnp.take(dy, index, axis=-1)
    _, pull = jax.vjp(product, x, jnp.take(kernel, index, axis=-1))
    dx, dkernel = pull(part)
    if only_weights:
        dx = jax.vjp(lambda x: product(x, kernel), x)[1](dy)[0]
    dbias = part.sum(tuple(range(part.ndim - 1)))
    return (
        dx,
        jnp.zeros_like(kernel).at[..., index].set(dkernel),
        jnp.zeros_like(bias).at[index].set(dbias.astype(bias.dtype)),
        None,
    )


_sparse.defvjp(_forward, _backward)


@checked
def interceptor(keep: float, skip: Sequence[str] = ("head", "router")) -> Callable[..., Any]:
    """Returns an interceptor for `nn.intercept_methods` that gives Linen's layers this backward.

    `nn.Dense` and two-dimensional `nn.Conv` without groups or dilation are computed by `dense` and
    `conv`; other layers as ever.

        with nn.intercept_methods(ssprop.interceptor(0.2)):
            logits = model.apply(variables, tokens)

    Args:
        keep: Share of the output channels that gradients pass through.
        skip: Names of layers whose gradients stay exact.

    Raises:
        InputError: If `keep` is out of its range.
    """
    channels(keep, 1)

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        plain = context.method_name == "__call__" and not layer.is_initializing()
        if not plain or layer.name in skip or not _covered(layer):
            return call(*args, **kwargs)
        (x,) = args
        kernel = layer.get_variable("params", "kernel")
        bias = layer.get_variable("params", "bias") if layer.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=layer.dtype)
        if isinstance(layer, nn.Dense):
            return dense(x, kernel, bias, keep=keep)
        strides = layer.strides or 1
        strides = (strides, strides) if isinstance(strides, int) else strides
        return conv(x, kernel, bias, keep=keep, strides=strides, padding=layer.padding)

    return intercept


def _covered(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Dense):
        return True
    return (
        isinstance(layer, nn.Conv)
        and not isinstance(layer.kernel_size, int)
        and len(layer.kernel_size) == 2
        and layer.feature_group_count == 1
        and layer.input_dilation in (1, None, (1, 1))
        and layer.kernel_dilation in (1, None, (1, 1))
        and layer.mask is None
        and isinstance(layer.padding, str)
        and layer.padding in ("SAME", "VALID")
    )


@checked
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Share of the channels that is kept, by step or by epoch.

    Attributes:
        keep: Share at the beginning, in (0, 1].
        last: Share at the end. None: `keep`.
        length: Number of steps or epochs in all.
        kind: "constant", "linear", "cosine" from the first share to the last, or "bar": the first
            share for one half and the last for the other.
        warmup: Number of steps or epochs at the beginning that keep all.
        interleaved: Whether every other step or epoch keeps all, the first after the warm-up too.

    Raises:
        InputError: If a setting is out of its range.

    >>> alternating = Schedule(0.2, length=4, interleaved=True)
    >>> [alternating(step) for step in range(4)]
    [1.0, 0.2, 1.0, 0.2]
    """

    keep: float
    last: float | None = None
    length: int = 1
    kind: Kind = "constant"
    warmup: int = 0
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_choice(self.kind, typing.get_args(Kind), "kind")
        channels(self.keep, 1)
        if self.last is not None:
            channels(self.last, 1)
            if self.kind == "constant" and self.last != self.keep:
                raise InputError(
                    f"a constant schedule has no last share, got {self.last}; give kind='linear', "
                    "'cosine' or 'bar'"
                )
        if self.length < 1 or self.warmup < 0:
            raise InputError(
                f"length must be 1 or more and warmup 0 or more, got {self.length}, {self.warmup}"
            )

    @checked
    def __call__(self, at: int) -> float:
        """Returns the share of a step or epoch, counted from 0.

        Raises:
            InputError: If it is not a step number.
        """
        if at < self.warmup:
            return 1.0
        if self.interleaved and (at - self.warmup) % 2 == 0:
            return 1.0
        first, last = self.keep, self.keep if self.last is None else self.last
        done = min(1.0, at / max(1, self.length - 1))
        if self.kind == "constant":
            return first
        if self.kind == "linear":
            return first + (last - first) * done
        if self.kind == "cosine":
            return last + (first - last) / 2 * (1 + math.cos(math.pi * done))
        return first if at < self.length / 2 else last

    @property
    def mean(self) -> float:
        """Mean share over the whole length."""
        return sum(map(self, range(self.length))) / self.length
