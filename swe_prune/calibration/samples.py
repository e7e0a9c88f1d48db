"""A random sample of the activations that each weight is multiplied with, streamed."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.calibration import batching
from swe_prune.calibration import layer_inputs as measuring
from swe_prune.calibration.products import Reduce, input_sums
from swe_prune.errors import InputError
from swe_prune.layout.notes import Product

TOKENS = 256


@checked
def samples(
    fn: Any,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    leaves: str | Sequence[str],
    tokens: int = TOKENS,
    seed: int = 0,
    call: measuring.Call | None = None,
) -> dict[str, Float[Array, "*copies N R"]]:
    """Returns the inputs of weights at tokens drawn at random from all batches.

    Every token of the batches is as likely as any other, padding (`weights` of 0 in a batch) is
    none, and all weights get the same tokens. Batches are streamed: in memory are the samples and
    what a forward pass takes. With the leaf of an MLP's down projection, these are the values of
    its hidden units after the activation.

    Args:
        fn: Function of (params, batch), a Linen module or an NNX module, as in `inputs`.
        params: Parameters of the function, as in `inputs`.
        batches: Pytrees of arrays whose first axis runs over the sequences.
        leaves: Path rules (`re.search`) of the weights to sample, each of which must match.
        tokens: Number of tokens to draw; all of them if the batches have fewer.
        seed: Seed of the draw.
        call: Function (module, variables, batch) that runs a Linen module in another way.

    Returns:
        Samples by leaf name, float32, one row a token, for each copy of a weight (a layer of a
        scan, an expert).

    Raises:
        InputError: If a rule matches no weight, no product reads a weight that one matches, or more
            than one does, there are fewer than two tokens, or an activation has NaN or inf.

    >>> found = samples(lambda w, x: x @ w, jnp.ones((2, 1)), [jnp.array([[3.0, 0], [4, 0]])],
    ...                 leaves="")
    >>> sorted(found[""].tolist())
    [[3.0, 0.0], [4.0, 0.0]]
    """
    if tokens < 2:
        raise InputError(f"tokens must be 2 or more, which a comparison takes, got {tokens!r}")
    weights, variables, tracing = measuring.separated(fn, params, call)
    wanted = rows_wanted(weights, leaves)
    key = jax.random.key(seed)

    def measure(variables: Any, batch: Any, number: Any) -> dict[str, dict[str, Array]]:
        traced, given = tracing(variables, batch), (measuring.others(variables), batch)
        pick = _picking(batch, jax.random.fold_in(key, number), tokens)
        return input_sums(traced, variables["params"], given, wanted, reduce=pick)

    @jax.jit
    def step(variables: Any, state: Any, batch: Any, number: Any) -> Any:
        return jax.tree.map(
            _merged, state, measure(variables, batch, number), is_leaf=lambda x: "rows" in x
        )

    state, kind = None, None
    for number, batch in enumerate(batches):
        batching.sequences(batch, number)
        shapes = str(batching.shapes(batch))
        if shapes != kind:  # find a batch that does not fit before running it
            run = functools.partial(measure, number=number)
            found = measuring.traced(run, variables, batch, number)
            if state is None:
                state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
            kind = shapes
        state = step(variables, state, batch, number)
    if state is None:
        raise batching.nothing_given()
    measuring.check_used(wanted, state)
    return {name: _checked(name, jax.device_get(kept)) for name, kept in state.items()}


def rows_wanted(params: PyTree, leaves: str | Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights that path rules name."""
    return measuring.wanted_shapes(params, tree.prunable(params, leaves, ()))


def _picking(batch: PyTree, key: PRNGKeyArray, tokens: int) -> Reduce:
    """Returns a function that picks random rows of an activation.

    The pick has "rows", (copies, tokens, R), and for each a "priority" in (0, 1], 0 of a row that
    is none. The rows of the highest priorities over all batches are the sample.
    """

    def pick(x_KxNxR: Array, product: Product) -> dict[str, Array]:
        if product.groups is not None:
            raise InputError(
                "the rows of a ragged product are in the order of its groups, so they cannot be "
                "sampled; name other leaves"
            )
        *copies, rows, _ = x_KxNxR.shape
        priority_N = 1 - jax.random.uniform(key, (rows,))
        counted_N = batching.counted_rows(batch, rows)
        if counted_N is not None:
            priority_N = jnp.where(counted_N, priority_N, 0)
        best_T, row_T = jax.lax.top_k(priority_N, min(tokens, rows))
        missing = max(tokens - rows, 0)
        best_T, row_T = (jnp.pad(x, (0, missing)) for x in (best_T, row_T))
        return {
            "rows": jnp.take(x_KxNxR, row_T, axis=-2),
            "priority": jnp.broadcast_to(best_T, (*copies, tokens)),
            "uses": jnp.ones(copies),
        }

    return pick


def _merged(kept: Mapping[str, Array], new: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the rows of the highest priorities of two picks."""
    tokens = kept["priority"].shape[-1]
    both = jnp.concatenate([kept["priority"], new["priority"]], axis=-1)
    rows = jnp.concatenate([kept["rows"], new["rows"]], axis=-2)
    priority, order = jax.lax.top_k(both, tokens)
    return {
        "rows": jnp.take_along_axis(rows, order[..., None], axis=-2),
        "priority": priority,
        "uses": jnp.maximum(kept["uses"], new["uses"]),
    }


def _checked(name: str, kept: Mapping[str, np.ndarray]) -> Array:
    """Returns the rows of a sample that there are."""
    if kept["uses"].max() > 1.5:
        raise InputError(
            f"{name!r} is used in {kept['uses'].max():g} products of one call, so a token has more "
            "than one value; name leaves that are used once"
        )
    found = int((kept["priority"] > 0).sum(-1).min())
    if found < 2:
        raise InputError(
            f"the calibration batches hold {found} tokens that count, and a comparison takes two; "
            "give more text"
        )
    rows = kept["rows"][..., :found, :]
    if not np.isfinite(rows).all():
        raise InputError(
            f"the input of {name!r} has NaN or inf on the calibration batches; find the batch or "
            "the weight that causes it"
        )
    return jnp.asarray(rows)
