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
from jaxtyping import Array, Float, Int, PyTree

from swe_prune.arguments import checked
from swe_prune.errors import InputError

AT_ONCE = 2**24
"""Distances that are computed at a time, 64 MiB."""


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
        InputError: If there is no entry, keys and values differ in number, or tokens are not below
            the number of symbols.
    """
    if len(keys) != len(values) or not len(keys):
        raise InputError(
            f"a store must have one value for each key, and at least one, got {len(keys)} keys and "
            f"{len(values)} values"
        )
    values = jnp.asarray(values)
    if values.ndim == 1:
        if symbols is None:
            raise InputError("values that are tokens need symbols=, the number of them")
        if not 0 <= int(values.min()) <= int(values.max()) < symbols:
            raise InputError(f"values must be tokens below symbols = {symbols}, got {values.max()}")
        values = jax.nn.one_hot(values, symbols)
    return Store(jnp.asarray(keys, jnp.float32), values.astype(jnp.float32))


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
        InputError: If k is no number of entries of the store, the widths differ, or the temperature
            is not above 0.
    """
    if not 1 <= k <= entries.size:
        raise InputError(f"k must be between 1 and the store's {entries.size} entries, got {k}")
    if queries.shape[1] != entries.keys.shape[1]:
        raise InputError(
            f"queries must be as wide as the keys, {entries.keys.shape[1]}, got {queries.shape[1]}"
        )
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, got {temperature}")
    return _retrieved(entries, jnp.asarray(queries, jnp.float32), k, temperature)


@functools.partial(jax.jit, static_argnames="k")
def _retrieved(entries: Store, queries: Array, k: int, temperature: float) -> Array:
    norms_M = (entries.keys**2).sum(1)

    def of(query_D: Array) -> Array:
        near_M = 2 * (entries.keys @ query_D) - norms_M  # minus the squared distance, up to query²
        near_k, at_k = jax.lax.top_k(near_M, k)
        return jax.nn.softmax(near_k / temperature) @ entries.values[at_k]

    batch = max(1, min(len(queries), AT_ONCE // entries.size))
    return jax.lax.map(of, queries, batch_size=batch)


@checked
def interpolated(
    logits: Float[Array, "N V"], found: Float[Array, "N V"], share: float
) -> Float[Array, "N V"]:
    """Returns log(λ p_kNN + (1 - λ) p_student).

    Args:
        logits: Logits of the student.
        found: p_kNN, from `retrieved`.
        share: λ, in [0, 1]. With 0 it is the student's.

    Raises:
        InputError: If the share is out of its range, or the shapes differ.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be between 0 and 1, got {share}")
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
    """
    logits, kept = model.apply(
        {"params": params},
        tokens,
        capture_intermediates=lambda module, _: module.name == "final_norm",
        mutable=["intermediates"],
    )
    (hidden,) = kept["intermediates"]["final_norm"]["__call__"]
    return hidden.astype(jnp.float32), logits.reshape(-1, logits.shape[-1])
