"""DSMoE: an MLP partitioned into blocks, each with a gate that the token opens or not.

The hidden units of a trained MLP are split into n consecutive blocks, and a new router gates them
(2502.12455; no public code is known). With x the input, o_i what block i gives, and Y (D, n) new:

    q = sigmoid(x Y + bias)      G(q) = q if q > tau else 0      S(q) = sg(G(q)) + q - sg(q)
    y = n / max(1, #{i : q_i > tau}) · sum_i S(q_i) o_i          loss + mean over layers, n, tokens
                                                                 of G(q)

With all gates 1, the sum of the blocks is the dense MLP. S has the value of G and the gradient of q
(straight-through), so a gate that is closed still learns while the weights of its block do not; the
penalty pulls at open gates alone. In training every block is computed. `skipped` computes a block
on its own tokens alone.

Ours: the mean of the penalty over the tokens, the guard against no open gate, and `bias`, which is
constant and 0 in the paper: there all gates start at 0.5, which is the paper's tau.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from swe_prune.arguments import checked
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError, check_choice
from swe_prune.models.block import MLP
from swe_prune.models.gpt import GPT
from swe_prune.models.layers import ACTIVATIONS
from swe_prune.training import losses

INIT_STDDEV = ModelConfig.init_stddev  # of a router's kernel

Weights = Mapping[str, Mapping[str, Array]]
"""Kernels (and biases, if any) of an MLP: "up", "down", and "gate" where it is gated."""


@checked
def thresholded(q: Float[Array, "..."], tau: float) -> Float[Array, "..."]:
    """Returns G(q): q where it is above tau, else 0."""
    q = jnp.asarray(q, jnp.float32)
    return jnp.where(q <= tau, 0.0, q)  # a NaN is not a closed gate


@checked
def factors(
    q: Float[Array, "N n"], tau: float, *, scaled: bool = True, straight: bool = True
) -> Float[Array, "N n"]:
    """Returns what each block's output is multiplied by.

    Args:
        q: Gates in [0, 1].
        tau: Threshold in [0, 1), above which a gate is open.
        scaled: Whether to multiply by n / (number of open gates), as dropout does.
        straight: Whether gradients pass the threshold. Otherwise closed gates do not learn.

    Raises:
        InputError: If tau is out of its range.

    >>> [f"{one:.1f}" for one in factors(jnp.array([[0.9, 0.6, 0.2, 0.1]]), 0.5)[0]]
    ['1.8', '1.2', '0.0', '0.0']
    """
    _check_tau(tau)
    gate = thresholded(q, tau)
    if straight:
        gate = q + jax.lax.stop_gradient(gate - q)
    if not scaled:
        return gate
    return gate * (q.shape[-1] / jnp.maximum((q > tau).sum(-1, keepdims=True), 1))


@checked
def computed(
    x: Float[Array, "N D"], weights: Weights, factor: Float[Array, "N n"], activation: str = "gelu"
) -> Float[Array, "N D"]:
    """Returns the sum of all blocks by their factors; every block is computed.

    Args:
        x: Input.
        weights: Weights of the dense MLP.
        factor: Factor of each block.
        activation: Name in `models.gpt.ACTIVATIONS`.

    Raises:
        InputError: If the blocks do not divide the hidden units, the weights do not fit, or the
            activation is unknown.
    """
    check_choice(activation, ACTIVATIONS, "activation")
    blocks = factor.shape[1]
    _check(weights, blocks, x.shape[1])
    x = _floats(x)
    h_NxF = _hidden(x, weights, activation)
    h_NxnxF = h_NxF.reshape(len(x), blocks, h_NxF.shape[1] // blocks)
    h_NxF = (h_NxnxF * factor[..., None].astype(x.dtype)).reshape(h_NxF.shape)
    return _dense(h_NxF, weights["down"])


class Blocks(NamedTuple):
    """The weights of an MLP by block.

    Attributes:
        parts: Weights of each block, those of a smaller MLP.
        bias: Bias of the output, which belongs to no block.
    """

    parts: tuple[Weights, ...]
    bias: Array | None


@checked
def partitioned(weights: Weights, blocks: int) -> Blocks:
    """Returns the weights by block, in arrays of their own.

    Args:
        weights: Weights of the dense MLP.
        blocks: Number n of blocks.

    Raises:
        InputError: If the blocks do not divide the hidden units, or the weights do not fit.
    """
    _check(weights, blocks)
    split = {
        name: {what: jnp.split(leaf, blocks, axis=-1) for what, leaf in weights[name].items()}
        for name in ("up", "gate")
        if name in weights
    }
    down = jnp.split(weights["down"]["kernel"], blocks)
    parts = tuple(
        {name: {what: some[at] for what, some in layer.items()} for name, layer in split.items()}
        | {"down": {"kernel": down[at]}}
        for at in range(blocks)
    )
    return Blocks(parts, weights["down"].get("bias"))


@checked
def skipped(
    x: Float[Array, "N D"],
    blocks: Blocks,
    q: Float[Array, "N n"],
    tau: float,
    *,
    scaled: bool = True,
    activation: str = "gelu",
    rungs: int = 8,
) -> Float[Array, "N D"]:
    """Returns what `computed` does, where each block is computed on its own tokens alone.

    The tokens of a block are gathered into an array of the smallest of rungs + 1 sizes, 0 to N,
    that has room for them; a block without tokens costs nothing. No token is dropped.

    Args:
        x: Input.
        blocks: Weights, from `partitioned`.
        q: Gates.
        tau: Threshold, as in `factors`.
        scaled: Whether to multiply by n / (number of open gates), as dropout does.
        activation: Name in `models.gpt.ACTIVATIONS`.
        rungs: Number of sizes above 0, each of which is compiled.

    Raises:
        InputError: Errors of `computed` and `factors`, or if there are no or more than 64 rungs.
    """
    if len(blocks.parts) != q.shape[1] or not blocks.parts:
        raise InputError(
            f"q must have a gate for each of the {len(blocks.parts)} blocks, got {q.shape[1]}"
        )
    if not 1 <= rungs <= 64:
        raise InputError(f"rungs must be between 1 and 64 sizes, got {rungs}")
    x, q, count = _floats(x), jnp.asarray(q), len(x)
    factor_Nxn = factors(q, tau, scaled=scaled).astype(x.dtype)
    sizes = sorted({-(-count * rung // rungs) for rung in range(rungs + 1)})
    y_NxD = jnp.zeros((count, blocks.parts[0]["down"]["kernel"].shape[1]), x.dtype)
    for at, own in enumerate(blocks.parts):
        open_N, factor = ~(q[:, at] <= tau), factor_Nxn[:, at : at + 1]
        run = functools.partial(_on_its_tokens, x, own, open_N, factor, activation)
        rung = jnp.searchsorted(jnp.asarray(sizes), open_N.sum())
        y_NxD = jax.lax.switch(rung, [functools.partial(run, size) for size in sizes], y_NxD)
    return y_NxD if blocks.bias is None else y_NxD + blocks.bias


def _on_its_tokens(
    x: Array, own: Weights, open_N: Array, factor: Array, activation: str, size: int, y: Array
) -> Array:
    """Returns y plus what a block gives, computed on as many rows as the size."""
    if size == 0:
        return y
    if size == len(x):
        return y + computed(x, own, factor, activation)
    # Row r of the block is the token rows[r]; token t is row place[t], if it is open.
    (rows,) = jnp.nonzero(open_N, size=size, fill_value=0)
    part = computed(x[rows], own, factor[rows], activation)
    place = jnp.maximum(jnp.cumsum(open_N) - 1, 0)
    return y + jnp.where(open_N[:, None], part[place], 0)


@checked
@dataclasses.dataclass(frozen=True)
class Gated:
    """A decoder whose MLPs are partitioned into gated blocks; a model like the dense one.

    Attributes:
        model: Dense model.
        blocks: Number n of blocks of each MLP.
        tau: Threshold in [0, 1).
        bias: Constant added to the router's output.
        scaled: Whether to multiply by n / (number of open gates), as dropout does.
        straight: Whether gradients pass the threshold. Otherwise closed gates do not learn.
        skip: Whether `apply` skips closed blocks (`skipped`), for inference.

    Raises:
        InputError: If the blocks do not divide the hidden units of a layer, tau is out of its
            range, or the model has experts or scanned layers.
    """

    model: GPT
    blocks: int
    tau: float = 0.5
    bias: float = 0.0
    scaled: bool = True
    straight: bool = True
    skip: bool = False

    def __post_init__(self) -> None:
        """Checks the settings."""
        config = self.model.config
        _check_tau(self.tau)
        if config.experts is not None or config.scan_layers:
            raise InputError(
                "the MLPs of a model with experts or scanned layers cannot be gated; build the "
                "model with experts=None and scan_layers=False"
            )
        for layer in range(config.layers):
            _check_blocks(config.of_layer(layer).hidden_size, self.blocks)

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Initializes the model and its routers."""
        with nn.intercept_methods(self._intercept):
            return self.model.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the model."""
        with nn.intercept_methods(self._intercept):
            return self.model.apply(*args, **kwargs)

    def gates(self, params: PyTree, inputs: Array) -> tuple[Array, dict[str, Array]]:
        """Returns the logits, and the gates q (N, n) of each layer's MLP by its name."""
        logits, kept = self.apply({"params": params}, inputs, mutable=["intermediates"])
        found = {name: one["mlp"]["q"][0] for name, one in kept["intermediates"].items()}
        return logits, found

    def loss(self, params: PyTree, batch: Any) -> Float[Array, ""]:
        """Returns the mean loss of a batch in nats per token, plus the mean thresholded gate."""
        logits, q = self.gates(params, batch["inputs"])
        penalty = thresholded(jnp.stack(list(q.values())), self.tau).mean()
        return losses.cross_entropy(logits, batch["targets"]).mean() + penalty

    def active(self, params: PyTree, inputs: Array) -> dict[str, Array]:
        """Returns the share of open gates by layer."""
        return {name: (q > self.tau).mean() for name, q in self.gates(params, inputs)[1].items()}

    def _check_routers(self, weights: Mapping[str, Any]) -> None:
        kernel = weights.get("router", {}).get("kernel")
        if kernel is None or kernel.shape[1] != self.blocks:
            said = "none" if kernel is None else f"those of {kernel.shape[1]}"
            raise InputError(
                f"params must have routers of {self.blocks} blocks, got {said}; add them by "
                f"with_routers(params, {self.blocks})"
            )

    def _intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if not isinstance(layer, MLP) or context.method_name != "__call__":
            return call(*args, **kwargs)
        (x,) = args
        if not layer.is_initializing():
            self._check_routers(layer.variables["params"])
        router = nn.Dense(
            self.blocks,
            use_bias=False,
            kernel_init=nn.initializers.normal(INIT_STDDEV),
            name="router",
        )
        q = jax.nn.sigmoid(router(x).astype(jnp.float32) + self.bias)
        layer.sow("intermediates", "q", q)
        if layer.is_initializing():
            return call(x)
        weights, activation = layer.variables["params"], layer.config.activation
        if self.skip:
            blocks = partitioned(weights, self.blocks)
            return skipped(x, blocks, q, self.tau, scaled=self.scaled, activation=activation)
        factor = factors(q, self.tau, scaled=self.scaled, straight=self.straight)
        return computed(x, weights, factor, activation)


@checked
def with_routers(params: PyTree, blocks: int, *, seed: int = 0) -> PyTree:
    """Returns a dense model's parameters with new routers, from which training goes on.

    Args:
        params: Parameters of a dense `models.gpt`.
        blocks: Number n of blocks of each MLP.
        seed: Seed of the routers.

    Raises:
        InputError: If there is no MLP, or the blocks do not divide its hidden units.
    """
    numbers = itertools.count()

    def added(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        found = {name: added(one) for name, one in part.items()}
        if {"up", "down"} <= set(found):
            shape = np.shape(found["up"].get("kernel", 0)) if isinstance(found["up"], dict) else ()
            if len(shape) != 2:
                raise InputError(
                    f"an MLP must have a kernel 'up' of two axes, got shape {shape}; experts and "
                    "scanned layers cannot be gated"
                )
            width, hidden = shape
            _check_blocks(hidden, blocks)
            key = jax.random.fold_in(jax.random.key(seed), next(numbers))
            kernel = INIT_STDDEV * jax.random.normal(key, (width, blocks))
            found["router"] = {"kernel": kernel}
        return found

    made = added(params)
    if next(numbers) == 0:
        raise InputError("params has no MLP with 'up' and 'down'; give those of a models.gpt")
    return made


def _floats(x: Any) -> Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def _hidden(x: Array, weights: Weights, activation: str) -> Array:
    h, act = _dense(x, weights["up"]), ACTIVATIONS[activation]
    return act(_dense(x, weights["gate"])) * h if "gate" in weights else act(h)


def _dense(x: Array, layer: Mapping[str, Array]) -> Array:
    y = x @ layer["kernel"].astype(x.dtype)
    return y + layer["bias"].astype(x.dtype) if "bias" in layer else y


def _check(weights: Weights, blocks: int, width: int | None = None) -> None:
    shapes = {name: layer["kernel"].shape for name, layer in weights.items() if "kernel" in layer}
    up, down = shapes.get("up", ()), shapes.get("down", ())
    width = up[0] if up and width is None else width
    fit = len(up) == 2 and down == up[::-1] and up[0] == width and shapes.get("gate", up) == up
    for name, layer in weights.items():
        fit = fit and ("bias" not in layer or layer["bias"].shape == shapes[name][1:])
    if not fit:
        raise InputError(
            "weights must have kernels 'up' (D, F), 'down' (F, D), and 'gate' like 'up' if any, "
            f"D being the width of the input, and biases that fit, got {shapes}"
        )
    _check_blocks(down[0], blocks)


def _check_blocks(hidden: int, blocks: int) -> None:
    if blocks < 1 or hidden % blocks:
        raise InputError(
            f"blocks must be a divisor of the {hidden} hidden units of the MLP, got {blocks}"
        )


def _check_tau(tau: float) -> None:
    if not 0 <= tau < 1:
        raise InputError(f"tau must be a threshold in [0, 1), got {tau}")
