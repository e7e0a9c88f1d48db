"""A stand-in for RetriKT: a small student that looks up what its teacher stored.

RetriKT (2310.15594) has a large model write a store of labelled examples, from which a small one
retrieves; its prompt tuning, its reward and its sizes are not public. This file is not that system.
It keeps the idea, knowledge that moves into a store in place of the weights, in the form of kNN-LM
(Khandelwal et al., 1911.00172), for a student that is a pruned language model:

    store            for every position of a text: its key, and as value the next token or the
                     teacher's distribution of it
    p_kNN(v | x)     ∝ sum over the k nearest keys of exp(-||key - query||² / T) · value(v)
    p(v | x)         = λ p_kNN(v | x) + (1 - λ) p_student(v | x)

Keys and queries are what the model's last norm gives. Keys of the teacher's own states put the two
into different spaces; keys of the student's states with values of the teacher do not.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.bounds import POSITIVE
from swe_prune.errors import InputError
from swe_prune.evaluation.token_losses import check_tokens

AT_ONCE = 2**24
"""Distances that are computed at a time, 64 MiB."""
SUMS_TO = 0.02
"""Error of a distribution's sum, which bfloat16 may have."""
MOST_SYMBOLS = 2**24


class Store(NamedTuple):
    """What is retrieved from.

    Attributes:
        keys: Float32 (M, D).
        values: Distributions (M, V), float32.
    """

    keys: Array
    values: Array

    @property
    def size(self) -> int:
        """Number of entries M."""
        return len(self.keys)

    @property
    def bytes(self) -> int:
        """Memory of its arrays."""
        return self.keys.nbytes + self.values.nbytes


@checked
def store(
    keys: Float[Array, "M D"],
    values: Float[Array, "M V"] | Int[Array, " M"],
    symbols: int | None = None,
) -> Store:
    """Returns a store.

    Args:
        keys: Key of each entry.
        values: Distribution of each, or its token.
        symbols: Number of symbols V, where the values are tokens.

    Raises:
        InputError: If there is no entry, keys and values differ in number, tokens are not below the
            number of symbols, a key is not finite, or values are not distributions.
    """
    if len(keys) != len(values) or not len(keys):
        raise InputError(
            f"a store must have one value for each key, and at least one, got {len(keys)} keys and "
            f"{len(values)} values"
        )
    tree.check_finite("the array of keys", keys, "check the model that they are from")
    values = jnp.asarray(values)
    if symbols is not None and not 1 <= symbols <= MOST_SYMBOLS:
        raise InputError(f"symbols must be between 1 and {MOST_SYMBOLS}, got {symbols}")
    if values.ndim == 2:
        if symbols not in (None, values.shape[1]):
            raise InputError(f"values must have symbols = {symbols} columns, got {values.shape[1]}")
        _check_distributions("values", values)
    else:
        if symbols is None:
            raise InputError("values that are tokens need symbols=, the number of them")
        low, high = (0, 0) if isinstance(values, Tracer) else (int(values.min()), int(values.max()))
        if low < 0 or high >= symbols:
            raise InputError(
                f"values must be tokens from 0 and below symbols = {symbols}, got {low} to {high}"
            )
        values = jax.nn.one_hot(values, symbols)
    return Store(jnp.asarray(keys, jnp.float32), values.astype(jnp.float32))


def _check_distributions(what: str, values: Array) -> None:
    if isinstance(values, Tracer):
        return
    sums = np.asarray(values, np.float64).sum(1)
    if not ((np.asarray(values) >= 0).all() and (abs(sums - 1) <= SUMS_TO).all()):
        raise InputError(
            f"{what} must be distributions, no number below 0 and sums of 1, got sums from "
            f"{sums.min():g} to {sums.max():g}; apply softmax to logits"
        )


@checked
def retrieved(
    entries: Store, queries: Float[Array, "N D"], *, k: int = 16, temperature: float = 1.0
) -> Float[Array, "N V"]:
    """Returns the distribution p_kNN for each query, exact: all distances are computed.

    Args:
        entries: Store.
        queries: Query of each position.
        k: Number of neighbors; of equally near ones the first count.
        temperature: T, in the units of a squared distance.

    Raises:
        InputError: If k is not a number of entries of the store, the widths differ, or the
            temperature is not above 0.
    """
    if not 1 <= k <= entries.size:
        raise InputError(f"k must be between 1 and the store's {entries.size} entries, got {k}")
    if queries.shape[1] != entries.keys.shape[1]:
        raise InputError(
            f"queries must be as wide as the keys, {entries.keys.shape[1]}, got {queries.shape[1]}"
        )
    POSITIVE.check(temperature, "temperature")
    return _retrieved(entries, jnp.asarray(queries, jnp.float32), k, temperature)


@functools.partial(jax.jit, static_argnames="k")
def _retrieved(entries: Store, queries: Array, k: int, temperature: float) -> Array:
    # Distances from a far origin would differ by less than their rounding.
    center_D = entries.keys.mean(0)
    keys_MxD = entries.keys - center_D
    norms_M = (keys_MxD**2).sum(1)

    def of(query_D: Array) -> Array:
        # Minus the squared distance, up to query².
        near_M = 2 * (keys_MxD @ (query_D - center_D)) - norms_M
        near_k, at_k = jax.lax.top_k(near_M, k)
        return jax.nn.softmax((near_k - near_k[0]) / temperature) @ entries.values[at_k]

    batch = max(1, min(len(queries), AT_ONCE // entries.size))
    return jax.lax.map(of, queries, batch_size=batch)


@checked
def interpolated(
    logits: Float[Array, "N V"], found: Float[Array, "N V"], share: float
) -> Float[Array, "N V"]:
    """Returns log(λ p_kNN + (1 - λ) p_student).

    Args:
        logits: Logits of the student.
        found: Probabilities p_kNN, from `retrieved`.
        share: λ, in [0, 1]. With 0 it is the student's.

    Raises:
        InputError: If the share is out of its range, the shapes differ, or `found` is
            not a distribution.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be between 0 and 1, got {share}")
    _check_distributions("found", found)
    log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    with_found = jnp.log(share) + jnp.log(jnp.asarray(found))
    return jnp.logaddexp(with_found, jnp.log1p(-share) + log_p)


@checked
def states(model: Any, params: PyTree, tokens: Int[Array, "B L"]) -> tuple[Array, Array]:
    """Returns what the last norm gives, (B L, D), and the logits, (B L, V); float32.

    Args:
        model: Decoder, such as `models.gpt.build` returns.
        params: Its parameters.
        tokens: Tokens.

    Raises:
        InputError: If a token is none of the model's vocabulary, or the model has no "final_norm".
    """
    if not isinstance(tokens, Tracer) and np.size(tokens):
        check_tokens(model, np.asarray(tokens), "tokens")
    logits, kept = model.apply(
        {"params": params},
        tokens,
        capture_intermediates=lambda module, _: module.name == "final_norm",
        mutable=["intermediates"],
    )
    if "final_norm" not in kept.get("intermediates", {}):
        raise InputError("model must have a layer 'final_norm', such as those of models.gpt have")
    (hidden,) = kept["intermediates"]["final_norm"]["__call__"]
    return hidden.astype(jnp.float32), logits.reshape(-1, logits.shape[-1])
