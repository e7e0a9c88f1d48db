"""Mean, mean square and Gram matrix of what each weight is multiplied with, over all tokens."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from swe_prune.arguments import checked
from swe_prune.calibration import batching
from swe_prune.calibration import layer_inputs as measuring
from swe_prune.calibration.products import PRECISION, Reduce, input_sums
from swe_prune.calibration.samples import rows_wanted
from swe_prune.errors import InputError
from swe_prune.layout.notes import Product


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of the inputs of a weight, float32, for each of its copies.

    Attributes:
        tokens: Number of tokens n, which is 0 where a copy was not run.
        mean: Σ x / n.
        square: Σ x² / n.
        sequence: √(Σ over the sequences of (the mean of |x| over the tokens of one)²).
        gram: Σ x xᵀ / n, or None.
    """

    tokens: Float[Array, "*copies"]
    mean: Float[Array, "*copies R"]
    square: Float[Array, "*copies R"]
    sequence: Float[Array, "*copies R"]
    gram: Float[Array, "*copies R R"] | None = None

    @property
    def variance(self) -> Float[Array, "*copies R"]:
        """Variance over the tokens, 0 or more."""
        return jnp.maximum(self.square - self.mean**2, 0)


@checked
def moments(
    fn: Any,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    leaves: str | Sequence[str],
    gram: bool = False,
    call: measuring.Call | None = None,
) -> dict[str, Moments]:
    """Returns the moments of the inputs of weights over all tokens of all batches.

    Padding (`weights` of 0 in a batch) does not count. Batches are streamed, and may be sharded
    along their first axis.

    Args:
        fn: Function of (params, batch), a Linen module or an NNX module, as in `inputs`.
        params: Parameters of the function, as in `inputs`.
        batches: Pytrees of arrays whose first axis runs over the sequences.
        leaves: Path rules (`re.search`) of the weights to measure, each of which must match.
        gram: Whether to measure the Gram matrix too, R² numbers for a weight of R inputs.
        call: Function (module, variables, batch) that runs a Linen module in another way.

    Raises:
        InputError: If a rule matches no weight, no product reads a weight that one matches, there
            is no batch or no token that counts, or an activation has NaN or inf.

    >>> found = moments(lambda w, x: x @ w, jnp.ones((2, 1)), [jnp.array([[3.0, 0], [4, 0]])],
    ...                 leaves="")
    >>> found[""].mean.tolist(), found[""].variance.tolist()
    ([3.5, 0.0], [0.25, 0.0])
    """
    weights, variables, tracing = measuring.separated(fn, params, call)
    wanted = rows_wanted(weights, leaves)

    def measure(variables: Any, batch: Any) -> dict[str, dict[str, Array]]:
        traced, given = tracing(variables, batch), (measuring.others(variables), batch)
        return input_sums(traced, variables["params"], given, wanted, reduce=_summing(batch, gram))

    sums, _ = measuring.accumulate(measure, variables, batches)
    measuring.check_used(wanted, sums)
    return {name: _of_sums(name, kinds) for name, kinds in sums.items()}


def _summing(batch: PyTree, gram: bool) -> Reduce:
    """Returns a function that sums over the rows of an activation."""
    sequences = batching.sequences(batch, 0)

    def sums(x_KxNxR: Array, product: Product) -> dict[str, Array]:
        *copies, rows, width = x_KxNxR.shape
        if product.groups is not None or rows % sequences:
            raise InputError(
                f"an activation of {rows} rows cannot be divided into the {sequences} sequences of "
                "a batch, as in a ragged product; name other leaves"
            )
        counted_N = batching.counted_rows(batch, rows)
        counted_N = jnp.ones(rows) if counted_N is None else counted_N.astype(jnp.float32)
        x_KxNxR = x_KxNxR * counted_N[:, None]
        # Mean over the tokens of each sequence, of those that count.
        size_KxBxR = jnp.abs(x_KxNxR).reshape(*copies, sequences, rows // sequences, width).sum(-2)
        tokens_Bx1 = jnp.maximum(counted_N.reshape(sequences, -1).sum(-1, keepdims=True), 1)
        found = {
            "tokens": jnp.broadcast_to(counted_N.sum(), copies),
            "sum": x_KxNxR.sum(-2),
            "power": (x_KxNxR**2).sum(-2),
            "sequence": ((size_KxBxR / tokens_Bx1) ** 2).sum(-2),
        }
        if gram:
            turned_KxRxN = jnp.swapaxes(x_KxNxR, -1, -2)
            found["outer"] = jnp.matmul(turned_KxRxN, x_KxNxR, precision=PRECISION)
        return found

    return sums


def _of_sums(name: str, sums: dict[str, Array]) -> Moments:
    tokens = sums["tokens"]
    if not float(tokens.max()) > 0:
        raise InputError(f"no token of the calibration batches counts for {name!r}; give text")
    n = jnp.maximum(tokens, 1)[..., None]
    gram = sums["outer"] / n[..., None] if "outer" in sums else None
    sequence = jnp.sqrt(sums["sequence"])
    return Moments(tokens, sums["sum"] / n, sums["power"] / n, sequence, gram)
