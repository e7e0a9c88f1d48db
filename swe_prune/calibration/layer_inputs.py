"""Norms and Hessians of the layer inputs of a Linen model on calibration data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import linen as nn
from jaxtyping import Array, PyTree

from swe_prune import tree
from swe_prune.calibration import batching, intercept
from swe_prune.errors import InputError

Call = Callable[[Any, Any, Any], Any]


def inputs(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    *,
    hessian: bool = False,
    call: Call | None = None,
    prunable: PyTree | None = None,
    dense_like: tuple[type, ...] = (),
) -> dict[str, PyTree]:
    """Measures the layer inputs of a model on calibration batches, for `importance.score`.

        input_norm_j = √(Σ x_j² / n)        hessian = (2 / n) Σ x xᵀ

    The sums run over all tokens of all sequences, and n counts sequences, as in Wanda and
    SparseGPT. Batches are streamed: one compiled step per batch shape accumulates the sums on the
    device in float32. Batches may be sharded over devices along their first axis. For a layer that
    is used several times, the sums run over all its inputs.

    Args:
        model: Linen module. Its Dense, DenseGeneral (and so Flax's attention) and ungrouped Conv
            layers are measured, also inside `nn.remat`, and inside an `nn.scan` or `nn.vmap` that
            lists "calibration" in its variable_axes.
        variables: Variables of the model, {"params": …} and other collections.
        batches: Pytrees of arrays whose first axis runs over the sequences.
        hessian: Whether to measure the Hessian too, R² numbers for a kernel of R inputs.
        call: Function (model, variables, batch) that runs the model; its result is ignored. If
            None, applies the model to the batch, or to batch["inputs"] if the batch is a mapping
            that has it.
        prunable: Bool pytree that selects the kernels to measure. If None,
            `tree.prunable(params)`.
        dense_like: Custom layer classes that compute x @ kernel over the last axis.

    Returns:
        Pytrees like the parameters, None where nothing was measured. "input_norm": float32, with
        the kernel's shape along its inputs and 1 along its outputs. With `hessian`, "hessian":
        float32, R x R over the kernel's inputs in their order.

    Raises:
        InputError: If there is no batch, the model cannot be run on a batch, a layer input has NaN
            or inf, or no layer used a kernel to be measured.

    Sources: Sun et al., "A simple and effective pruning approach for large language models", 2024;
    Frantar and Alistarh, "SparseGPT", 2023.

    >>> variables = {"params": {"kernel": jnp.ones((2, 1))}}
    >>> norm = inputs(nn.Dense(1, use_bias=False), variables, [jnp.array([[3.0, 0], [4, 0]])])
    >>> (norm["input_norm"]["kernel"] ** 2).ravel().tolist()
    [12.5, 0.0]
    """
    params = params_of(variables)
    wanted = wanted_shapes(params, prunable)
    # Accumulate sums over the batches, then normalize them.
    step = make_measure_fn(model, call or applied, wanted, hessian=hessian, dense_like=dense_like)
    sums, n = accumulate(step, variables, batches)
    check_used(wanted, sums)
    return normalize_sums(params, sums, n, hessian=hessian)


def applied(model: nn.Module, variables: Any, batch: Any) -> Any:
    """Returns the model applied to a batch, or to the batch's "inputs"."""
    has_inputs = isinstance(batch, Mapping) and "inputs" in batch
    return model.apply(variables, batch["inputs"] if has_inputs else batch)


def params_of(variables: Any) -> PyTree:
    """Returns variables["params"].

    Raises:
        InputError: If there is none.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise InputError("variables= holds no 'params'; give {'params': params}, as to model.apply")
    return variables["params"]


def wanted_shapes(params: PyTree, prunable: PyTree | None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the prunable weights by name.

    Raises:
        InputError: If no weight is prunable.
    """
    found = tree.prunable_leaves(params, prunable, "measure")
    return {name: leaf.shape for name, leaf in found.items()}


def make_measure_fn(
    model: nn.Module,
    call: Call,
    wanted: Mapping[str, Any],
    *,
    hessian: bool,
    dense_like: tuple[type, ...] = (),
) -> Callable[[Any, Any], dict[str, dict[str, Array]]]:
    """Returns a function of (variables, batch) that computes `intercept.sums`, not yet compiled."""

    def measure(variables: Any, batch: Any) -> dict[str, dict[str, Array]]:
        return intercept.sums(
            lambda: call(model, variables, batch), wanted, hessian=hessian, dense_like=dense_like
        )

    return measure


def make_accumulate_step(measure: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Returns a compiled step that adds a batch to the sums, donating the previous ones."""

    def add(variables: Any, state: Any, batch: Any, number: Any) -> Any:
        # Besides the sums, track the first batch with a non-finite input, for the error message.
        sums, first_bad = state
        new = measure(variables, batch)
        bad = {name: ~jnp.all(jnp.isfinite(leaf["square"])) for name, leaf in new.items()}
        first_bad = {
            name: jnp.where((at < 0) & bad[name], number, at) for name, at in first_bad.items()
        }
        return jax.tree.map(jnp.add, sums, new), first_bad

    return jax.jit(add, donate_argnums=1)


def accumulate(
    measure: Callable[[Any, Any], Any],
    variables: PyTree,
    batches: Iterable[PyTree],
    *,
    step: Callable[..., Any] | None = None,
    count: Callable[[PyTree, int], int] = batching.sequences,
    known: dict[str, Any] | None = None,
) -> tuple[dict[str, dict[str, Array]], int]:
    """Returns the sums over all batches, and the number of sequences in them.

    Args:
        measure: Function of (variables, batch) from `make_measure_fn`.
        variables: Variables of the model.
        batches: Calibration batches, consumed one by one.
        step: Compiled step from `make_accumulate_step(measure)`, to share compilations. If None, a
            new one is created.
        count: Function (batch, index of the batch) that returns its number of sequences.
        known: Abstract results of `measure` by batch shapes, from earlier calls with variables of
            the same shapes; new ones are added. If None, starts empty.

    Raises:
        InputError: If there is no batch, the model cannot be run on a batch, or a layer input has
            NaN or inf.
    """
    known = {} if known is None else known
    step = make_accumulate_step(measure) if step is None else step
    state, total = None, 0
    for number, batch in enumerate(batches):
        total += count(batch, number)
        shapes = str(batching.shapes(batch))
        if shapes not in known:  # find a batch that does not fit before running it
            known[shapes] = traced(measure, variables, batch, number)
        # The sums start at zero with the shapes of the first batch.
        state = _zeros(known[shapes]) if state is None else state
        _check_same(state[0], known[shapes], number)
        state = step(variables, state, batch, number)
    if state is None:
        raise batching.nothing_given()
    sums, first_bad = state
    _reject_not_finite(jax.device_get(first_bad))
    return sums, total


def traced(run: Callable[[Any, Any], Any], variables: Any, batch: Any, number: int) -> Any:
    """Returns the abstract result of `run(variables, batch)`.

    Args:
        run: Function to trace.
        variables: Variables of the model.
        batch: Calibration batch, concrete or abstract.
        number: Index of the batch, for error messages.

    Raises:
        InputError: If the model cannot be run on this batch.
    """
    try:
        return jax.eval_shape(run, variables, batch)
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, KeyError, flax_errors.FlaxError) as error:
        raise InputError(
            f"calibration batch {number}, {tree.described(batch)}, cannot be run through the "
            f"model ({type(error).__name__}: {str(error).splitlines()[0]}); give batches with the "
            "shape and dtype that the model takes, or call= with a function that runs it"
        ) from error


def _zeros(new: Any) -> Any:
    return (
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), new),
        {name: jnp.int32(-1) for name in new},
    )


def _check_same(sums: Any, new: Any, number: int) -> None:
    shapes = [jax.tree.map(lambda leaf: leaf.shape, each) for each in (sums, new)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"calibration batch {number} uses other layers, or other input shapes, than batch 0; "
            "give batches that run through the same layers"
        )


def _reject_not_finite(first_bad: Mapping[str, Any]) -> None:
    bad = {name: int(at) for name, at in first_bad.items() if at >= 0}
    if bad:
        name = min(bad, key=lambda name: bad[name])
        raise InputError(
            f"the input of {name!r} has NaN or inf (or squares beyond float32) in calibration "
            f"batch {bad[name]}; find the batch or the weight that causes it"
        )


def check_used(wanted: Mapping[str, Any], sums: Mapping[str, Any]) -> None:
    """Raises InputError if no layer used a wanted kernel."""
    missing = [name for name in wanted if name not in sums]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"no Dense-like layer used {missing[0]!r}{more} on the calibration batches; leave it "
            "out with prunable=, or let call= run all of the model"
        )


def normalize_sums(
    params: PyTree, sums: Mapping[str, Mapping[str, Array]], n: int, *, hessian: bool
) -> dict[str, PyTree]:
    """Converts sums over n sequences to input norms and Hessians, pytrees like the parameters."""

    def norm(name: str, weight: Any) -> Any:
        if name not in sums:
            return None
        square = sums[name]["square"]
        if weight.shape[: square.ndim] != square.shape:
            raise InputError(
                f"{name!r} has shape {weight.shape} and its inputs {square.shape}; scan the "
                "parameters along axis 0, or leave it out with prunable="
            )
        return jnp.sqrt(square / n).reshape(square.shape + (1,) * (weight.ndim - square.ndim))

    measured = {"input_norm": tree.map_named(norm, params)}
    if hessian:
        measured["hessian"] = tree.map_named(
            lambda name, _: sums[name]["outer"] * (2 / n) if name in sums else None, params
        )
    return measured
