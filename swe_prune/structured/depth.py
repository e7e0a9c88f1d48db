"""Scores of whole blocks, by how much each of them turns the residual stream."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.blockwise import block_graph, nnx_blocks
from swe_prune.calibration.batching import check_arrays, each, nothing_given, sequences
from swe_prune.calibration.layer_inputs import applied
from swe_prune.errors import InputError, check_choice
from swe_prune.layout.trace import variables_of

DEPTH = ("block_influence", "angular_distance")


@checked
def depth_scores(
    states: Callable[[PyTree, PyTree], Sequence[Array]],
    params: PyTree,
    batches: Iterable[PyTree],
    kind: str = "block_influence",
) -> Float[Array, " layers"]:
    """Returns how much each block turns the residual stream, the score of layers for `choose`.

    "block_influence": the mean over the tokens of 1 − cos(x, y), x what goes into a block and y
    what comes out (Men et al., "ShortGPT", 2024). "angular_distance": of arccos(cos(x, y)) / π
    (Gromov et al., "The unreasonable ineffectiveness of the deeper layers", 2024).

    Args:
        states: Function of (params, batch) to the residual stream before the first block and after
            each block, arrays of one shape with the features last; see `residual_states`.
        params: Parameters of the function.
        batches: Pytrees of arrays whose first axis runs over the sequences.
        kind: One of `DEPTH`.

    Raises:
        InputError: An unknown kind, no batch, fewer than two states, or states with NaN.

    >>> turn = [jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 2.0]])]
    >>> depth_scores(lambda params, batch: turn, {}, [jnp.ones(1)]).tolist()
    [1.0, 0.0]
    """
    check_choice(kind, DEPTH, "kind")
    check_arrays("params", params)

    @jax.jit
    def turned(params: PyTree, batch: PyTree) -> tuple[Array, int]:
        found = states(params, batch)
        if len(found) < 2 or len({jnp.shape(x) for x in found}) > 1:
            raise InputError(
                "states must return the residual stream before the first block and after each "
                f"block, two or more arrays of one shape, got {[jnp.shape(x) for x in found]}"
            )
        x = jnp.stack([one.reshape(-1, one.shape[-1]).astype(jnp.float32) for one in found])
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
        cosine = jnp.clip((x[1:] * x[:-1]).sum(-1), -1, 1)
        score = 1 - cosine if kind == "block_influence" else jnp.arccos(cosine) / jnp.pi
        return score.sum(-1), x.shape[1]

    total, tokens = None, 0
    for number, batch in enumerate(each(batches)):
        sequences(batch, number)
        sums, number = turned(params, batch)
        total = sums if total is None else total + sums
        tokens += int(number)
    if total is None:
        raise nothing_given()
    if not bool(jnp.all(jnp.isfinite(total))):
        raise InputError("the residual stream has NaN or inf on the calibration batches; find why")
    return total / tokens


@checked
def residual_states(
    model: Any, blocks: str | Sequence[str]
) -> Callable[[PyTree, PyTree], list[Array]]:
    """Returns the function of (params, batch) for `depth_scores`, of a Linen or NNX module.

    Args:
        model: Module that calls its blocks one after the other, outside of nn.remat and nn.scan.
            What a block is called with first and returns first are the residual stream.
        blocks: Rule that matches the blocks' whole paths, or their paths.

    Raises (the function):
        InputError: No block matches, or one cannot be intercepted.
    """

    def states(params: PyTree, batch: PyTree) -> list[Array]:
        is_nnx = isinstance(model, nnx.Module)
        variables = nnx_blocks.variables_of(model, params) if is_nnx else variables_of(params)
        names = [name for name, _ in tree.named_leaves(variables["params"])]
        paths = block_graph.find(names, blocks)
        run = nnx_blocks.runner(model, paths, None) if is_nnx else None
        return block_graph.residuals(
            lambda: applied(model, variables, batch) if run is None else run(variables, batch),
            paths,
        )

    return states
