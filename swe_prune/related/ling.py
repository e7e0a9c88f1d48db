"""Ling: fine-grained experts with a shared one, and what keeps their training steady.

Of the recipe of Ling-Lite and Ling-Plus (2503.05139) what a small model can have:

    y = E_shared(x) + sum over the top k of g_i E_i(x)       g: softmax, top k, divided by their sum
    loss + 0.015 · E sum_i f_i P_i + 0.0001 · mean of logsumexp(s)²
                                   f: share of the choices, P: mean softmax, s: router's scores
    ŝ = a s + (1 - a)(m + d ε)     stochastic routing warm-up, a = min(step / W, 1), ε ~ N(0, 1)
    logits = x W, each symbol's column of W divided by its norm                          NormHead
    an update whose loss is a spike is dropped, its batch returns later: `related.spikes`

The experts are those of `models.experts`, so no token is dropped, and each expert computes all
tokens: fewer active parameters save no time here. Ours: m and d are mean and deviation of the
batch's scores (the paper's are running ones), and NormHead by symbol.

`loads` measures what experts do, for pruning them: REAP (2510.13999) removes those with the
smallest mean of g_i ||E_i(x)|| over the tokens that they get.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from swe_prune import structured
from swe_prune.arguments import checked
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.models import gpt
from swe_prune.models.block import MLP
from swe_prune.models.experts import ExpertDense, Experts, routed
from swe_prune.structured import Group
from swe_prune.training import losses

BALANCE, Z = 0.015, 1e-4
"""Coefficients of the two losses in the paper."""


@checked
def z_loss(scores: Float[Array, "N E"]) -> Float[Array, ""]:
    """Returns the mean squared logsumexp of the scores (ST-MoE, 2202.08906).

    Raises:
        InputError: If there is no token.
    """
    _check_some(scores)
    return (jax.nn.logsumexp(scores, axis=-1) ** 2).mean()


@checked
def balance_loss(scores: Float[Array, "N E"], per_token: int) -> Float[Array, ""]:
    """Returns E sum_i f_i P_i, which is 1 for equal loads (Switch, 2101.03961).

    Args:
        scores: Scores of the router.
        per_token: Number k of experts of a token.

    Raises:
        InputError: Errors of `routed`, or if there is no token.
    """
    _check_some(scores)
    chosen = (routed(scores, per_token) > 0).mean(0) / per_token
    return scores.shape[-1] * (chosen * jax.nn.softmax(scores).mean(0)).sum()


def _check_some(scores: Array) -> None:
    if not len(scores):
        raise InputError("scores must have at least one token, got none")


@checked
def warmed(
    scores: Float[Array, "N E"], share: float | Float[Array, ""], key: Array
) -> Float[Array, "N E"]:
    """Returns the scores mixed with noise of their mean and standard deviation.

    Args:
        scores: Scores of the router.
        share: Share a, from 0, noise alone, to 1.
        key: Random key.

    Raises:
        InputError: If the share is out of its range.
    """
    if not isinstance(share, Tracer) and not 0 <= share <= 1:
        raise InputError(f"share must be between 0 and 1, got {share}")
    scores = jnp.asarray(scores, jnp.float32)
    still = jax.lax.stop_gradient(scores)
    noise = still.mean() + still.std() * jax.random.normal(key, scores.shape, scores.dtype)
    return share * scores + (1 - share) * noise


@checked
@dataclasses.dataclass(frozen=True)
class Ling:
    """A decoder with a shared expert, NormHead and the losses of the routers.

    Attributes:
        model: Decoder with experts.
        shared: Number of hidden units of the shared expert; 0: none.
        norm_head: Whether the columns of the output head have norm 1.
        balance: Coefficient of `balance_loss`.
        z: Coefficient of `z_loss`.

    Raises:
        InputError: If the model has no experts, scanned layers, or a tied head to norm, or a number
            is below 0.
    """

    model: gpt.GPT
    shared: int
    norm_head: bool = True
    balance: float = BALANCE
    z: float = Z

    def __post_init__(self) -> None:
        """Checks the settings."""
        config = self.model.config
        if config.experts is None or config.scan_layers:
            raise InputError(
                "the model must have experts and layers that are not scanned; build it with "
                "experts=… and scan_layers=False"
            )
        if self.norm_head and config.tied_head:
            raise InputError("norm_head needs a head of its own; build it with tied_head=False")
        if min(self.shared, self.balance, self.z) < 0:
            raise InputError(
                "shared, balance and z must be 0 or more, got "
                f"{self.shared}, {self.balance} and {self.z}"
            )

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Initializes the model and its shared experts."""
        with nn.intercept_methods(functools.partial(self._intercept, None)):
            return self.model.init(*args, **kwargs)

    def apply(self, *args: Any, warm: Any = None, **kwargs: Any) -> Any:
        """Computes the model; with `warm`, a of `warmed`, it needs the rng "routing"."""
        with nn.intercept_methods(functools.partial(self._intercept, warm)):
            return self.model.apply(*args, **kwargs)

    def loss(
        self, params: PyTree, batch: Any, warm: Any = None, key: Array | None = None
    ) -> Float[Array, ""]:
        """Returns the loss of a batch in nats per token, plus the losses of the routers.

        Args:
            params: Parameters.
            batch: "inputs" and "targets".
            warm: Share a of `warmed`. None: the scores as they are.
            key: Random key of the noise.
        """
        logits, kept = self.apply(
            {"params": params},
            batch["inputs"],
            warm=warm,
            rngs={} if key is None else {"routing": key},
            mutable=["intermediates"],
        )
        per_token = self.model.config.experts_per_token
        loss = losses.cross_entropy(logits, batch["targets"]).mean()
        for block in kept["intermediates"].values():
            (scores,) = block["mlp"]["router"]["scores"]
            loss += self.balance * balance_loss(scores, per_token) + self.z * z_loss(scores)
        return loss

    def _intercept(self, warm: Any, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(layer, Experts) and self.shared:
            y = call(*args, **kwargs)
            config = dataclasses.replace(layer.config, experts=None, hidden=self.shared)
            return y + MLP(config, name="shared")(*args)
        if isinstance(layer, ExpertDense) and layer.name == "down":
            y = call(*args, **kwargs)
            layer.sow("loads", "norm", jnp.linalg.norm(y.astype(jnp.float32), axis=-1))
            return y
        if isinstance(layer, nn.Dense) and layer.name == "router":
            scores = call(*args, **kwargs).astype(jnp.float32)
            for collection in ("intermediates", "loads"):
                layer.sow(collection, "scores", scores)
            if warm is not None and not layer.has_rng("routing"):
                raise InputError("warm needs random numbers; give key, or rngs={'routing': key}")
            return scores if warm is None else warmed(scores, warm, layer.make_rng("routing"))
        if self.norm_head:
            return norm_head(call, args, kwargs, context)
        return call(*args, **kwargs)


def norm_head(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Computes a Linen model's layer "head" by `normed`: an interceptor for any untied head."""
    layer = context.module
    if layer.name != "head" or context.method_name != "__call__" or layer.is_initializing():
        return call(*args, **kwargs)
    (x,) = args
    weights = layer.variables["params"]
    y = x @ normed(weights["kernel"]).astype(x.dtype)
    return y + weights["bias"] if layer.use_bias else y


@checked
def normed(kernel: Float[Array, "D V"]) -> Float[Array, "D V"]:
    """Returns the kernel of an output head with columns of norm 1 (NormHead)."""
    size = jnp.sqrt((jnp.float32(kernel) ** 2).sum(0, keepdims=True))
    return kernel / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)


class Load(NamedTuple):
    """What the experts of a layer did on some text, an entry for each.

    Attributes:
        tokens: Number of tokens that were sent to it.
        saliency: Sum of g ||E(x)|| over them.
    """

    tokens: np.ndarray
    saliency: np.ndarray

    @property
    def reap(self) -> np.ndarray:
        """Mean of g ||E(x)|| over the tokens of the expert; 0 if it has none."""
        return self.saliency / np.maximum(self.tokens, 1)


@checked
def loads(model: Ling, params: PyTree, batches: Iterable[Any]) -> dict[str, Load]:
    """Returns what the experts do on some text, by the names of `groups`.

    Args:
        model: Model.
        params: Its parameters.
        batches: Batches with "inputs", at least one.

    Raises:
        InputError: If there is no batch, or one has no inputs.
    """
    per_token = model.model.config.experts_per_token

    @jax.jit
    def measured(params: PyTree, inputs: Array) -> dict[str, tuple[Array, Array]]:
        _, kept = model.apply({"params": params}, inputs, mutable=["loads"])
        found = {}
        for name, block in kept["loads"].items():
            weight = routed(block["mlp"]["router"]["scores"][0], per_token).T
            norm = block["mlp"]["down"]["norm"][0]
            found[f"{name}/experts"] = (weight > 0).sum(1), (weight * norm).sum(1)
        return found

    total: dict[str, Load] = {}
    for batch in batches:
        if not isinstance(batch, Mapping) or "inputs" not in batch:
            raise InputError("batches must be mappings with 'inputs', such as Dataset gives")
        for name, part in measured(params, batch["inputs"]).items():
            new = Load(*(np.asarray(one, np.float64) for one in part))
            total[name] = Load(*map(np.add, total[name], new)) if name in total else new
    if not total:
        raise InputError("batches must have at least one batch to measure loads on, got none")
    return total


def groups(config: ModelConfig) -> dict[str, Group]:
    """Returns the experts of each layer as units for `structured`.

    Raises:
        InputError: If the model has no experts.
    """
    if config.experts is None:
        raise InputError("the model has no experts to cut; give one with config.experts")
    return {
        f"block_{layer}/experts": Group(
            config.experts,
            {
                rf"block_{layer}/mlp/(up|gate|down)/kernel$": -3,
                rf"block_{layer}/mlp/router/kernel$": -1,
            },
        )
        for layer in range(config.layers)
    }


@checked
def without_experts(
    model: Ling, params: PyTree, scores: dict[str, Any], sparsity: float
) -> tuple[Ling, PyTree]:
    """Returns the model and its parameters without the experts of the lowest scores.

    Args:
        model: Model.
        params: Its parameters.
        scores: Score of each expert by the names of `groups`.
        sparsity: Share of the experts of each layer that go.

    Raises:
        InputError: If fewer experts stay than a token is sent to, or the scores do not fit.
    """
    config = model.model.config
    units = groups(config)
    keep = structured.choose(units, scores, sparsity=sparsity)
    left = len(next(iter(keep.values())))
    if left < config.experts_per_token:
        raise InputError(
            f"sparsity = {sparsity:g} leaves {left} experts, and a token is sent to "
            f"{config.experts_per_token}; give a smaller sparsity"
        )
    small = gpt.build(dataclasses.replace(config, experts=left), model.model.vocab_size)
    return dataclasses.replace(model, model=small), structured.cut(params, units, keep)
