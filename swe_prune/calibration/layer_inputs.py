"""Norms and Hessians of what each weight is multiplied with, on calibration data."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, PyTree

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.calibration import batching
from swe_prune.calibration.products import input_sums
from swe_prune.errors import InputError, listed
from swe_prune.layout import axes_by_name
from swe_prune.layout.trace import (
    Traced,
    array_leaves,
    function_of,
    inputs_of,
    one_sentence,
    trace,
    variables_of,
)

Call = Callable[[Any, Any, Any], Any]
Run = Callable[[Any, Any], Any]


@checked
def inputs(
    fn: Any,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    hessian: bool = False,
    call: Call | None = None,
    prunable: PyTree | None = None,
) -> dict[str, PyTree]:
    """Measures what each weight is multiplied with on calibration batches.

        input_norm_j = √(Σ x_j² / n)        hessian = (2 / n) Σ x xᵀ

    The sums run over all tokens of all sequences, and n counts sequences, as in Wanda and
    SparseGPT. The function is traced, and the other operand of every product in which a weight is
    used is summed in the same computation, so nothing about it has to be changed: a Dense or
    attention layer, a convolution, an einsum over experts, a scan over layers, in Linen, NNX,
    Equinox or plain JAX. Each copy of a weight (a layer of a scan, an expert) has sums of its own,
    over the inputs that it gets: an expert those tokens that are routed to it, where the function
    gives it zeros, or nothing, in place of the others.

    Batches are streamed: one compiled step per batch shape accumulates the sums on the device in
    float32. Batches may be sharded over devices along their first axis. For a weight that is used
    several times, the sums run over all its inputs.

    Args:
        fn: Function of (params, batch), whose result is ignored, a Linen module or an NNX module.
            Modules are applied to the batch, or to batch["inputs"] if the batch is a mapping that
            has it.
        params: Parameters of the function; of a Linen module also its variables, {"params": …}
            and other collections; of an NNX module its state or the module itself.
        batches: Pytrees of arrays whose first axis runs over the sequences.
        hessian: Whether to measure the Hessian too, R² numbers for a kernel of R inputs.
        call: Function (module, variables, batch) that runs a Linen module in another way.
        prunable: Bool pytree that selects the weights to measure. If None, `tree.prunable` of the
            parameters and their traced layout.

    Returns:
        Pytrees like the parameters (of a Linen module without other collections), None where
        nothing was measured. "input_norm": float32, with the weight's shape along its copies and
        inputs and 1 along its outputs, but all of them of a grouped convolution, whose groups get
        different inputs. With `hessian`, "hessian": float32, copies x R x R over the
        weight's inputs in their order.

    Raises:
        InputError: If there is no batch, the function cannot be run on a batch, an input has NaN or
            inf, or no product used a weight to be measured.

    Sources: Sun et al., "A simple and effective pruning approach for large language models", 2024;
    Frantar and Alistarh, "SparseGPT", 2023.

    >>> norm = inputs(lambda w, x: x @ w, jnp.ones((2, 1)), [jnp.array([[3.0, 0], [4, 0]])])
    >>> (norm["input_norm"] ** 2).ravel().tolist()
    [12.5, 0.0]
    """
    weights, variables, tracing = separated(fn, params, call)
    first, batches = peeked(batches)
    if prunable is None:
        with one_sentence("calibration batch 0", first):
            axes = axes_by_name(tracing(variables, first))
        layout = tree.map_leaves(lambda name, _: axes.get(name), weights)
        prunable = tree.prunable(weights, layout=layout)
    wanted = wanted_shapes(weights, prunable)
    # Accumulate sums over the batches, then normalize them.
    measure = make_measure_fn(tracing, wanted, hessian=hessian)
    sums, n = accumulate(measure, variables, batches)
    check_used(wanted, sums)
    return normalize_sums(weights, sums, n, hessian=hessian)


def separated(
    fn: Any, params: PyTree, call: Call | None = None
) -> tuple[PyTree, dict[str, Any], "Tracing"]:
    """Returns the weights, the variables {"params": arrays, …}, and the traces of a function.

    Only arrays are arguments of a compiled program, so the weights become a dict of arrays by name
    where the pytree holds anything else.
    """
    if isinstance(fn, nn.Module):
        variables = dict(variables_of(params))
        model = call or applied
        return variables["params"], variables, Tracing(lambda own, batch: model(fn, own, batch))
    if call is not None:
        raise InputError("call= runs a Linen module in another way; give fn as that function")
    run = function_of(fn, params)
    arrays = {name: leaf for name, leaf in tree.named_leaves(params) if hasattr(leaf, "dtype")}

    def filled(own: Mapping[str, Any]) -> PyTree:
        return tree.map_leaves(lambda name, leaf: own["params"].get(name, leaf), params)

    return params, {"params": arrays}, Tracing(lambda own, batch: run(filled(own), batch))


def peeked(batches: Iterable[PyTree]) -> tuple[PyTree, Iterable[PyTree]]:
    """Returns the first batch, and all batches.

    Raises:
        InputError: If there is no batch, or one batch in place of batches.
    """
    rest = batching.each(batches)
    try:
        first = next(rest)
    except StopIteration:
        raise batching.nothing_given() from None
    return first, itertools.chain([first], rest)


def applied(model: nn.Module, variables: Any, batch: Any) -> Any:
    """Returns the model applied to a batch, or to the batch's "inputs"."""
    return model.apply(variables, inputs_of(batch))


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


class Tracing:
    """Traces of a function of (variables, batch), one for each kind of batch.

    Attributes:
        run: Function of (variables, batch), with variables {"params": …} and other collections.
    """

    def __init__(self, run: Run):
        self.run = run
        self._known: dict[str, Traced] = {}

    def __call__(self, variables: Mapping[str, Any], batch: Any) -> Traced:
        """Returns the function as traced for variables and a batch of these shapes."""
        kind = str(batching.shapes((variables, batch)))
        if kind not in self._known:
            rest, first = batching.shapes((others(variables), batch))
            traced = trace(
                lambda params, given: self.run({**given[0], "params": params}, given[1]),
                variables["params"],
                (rest, first),
            )
            # Other collections, such as running statistics, are not activations.
            of_batch = len(array_leaves(first))
            data = [at >= len(traced.data) - of_batch for at in range(len(traced.data))]
            self._known[kind] = traced._replace(data=data)
        return self._known[kind]


def others(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the collections of variables other than the parameters."""
    return {name: value for name, value in variables.items() if name != "params"}


def make_measure_fn(
    tracing: Tracing, wanted: Mapping[str, Any], *, hessian: bool, paired: bool = False
) -> Callable[[Any, Any], dict[str, dict[str, Array]]]:
    """Returns a jitted function of (variables, batch) that computes `input_sums`.

    Both its abstract result and the step that adds it up come from one trace.

    Args:
        tracing: Function that is measured.
        wanted: Mapping whose keys are the names of the weights to measure.
        hessian: Whether to sum the outer products too.
        paired: Whether a batch is a pair of one and another of the same tokens, to sum the outer
            products of the first one's inputs with the second one's too.
    """

    def measure(variables: Any, batch: Any) -> dict[str, dict[str, Array]]:
        batch, other = batch if paired else (batch, None)
        traced = tracing(variables, batch)
        given = (others(variables), batch)
        beside = (others(variables), other) if paired else None
        return input_sums(
            traced, variables["params"], given, wanted, hessian=hessian, beside=beside
        )

    return jax.jit(measure)


def make_accumulate_step(measure: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Returns a step of two compiled programs that adds a batch to the sums, which it donates."""

    @functools.partial(jax.jit, donate_argnums=1)
    def add(variables: Any, sums: Any, batch: Any) -> Any:
        return jax.tree.map(jnp.add, sums, measure(variables, batch))

    # Checked in the same program, the new sums could not be fused with what adds them up, and the
    # program would be a tenth larger. What is not finite stays so in the total.
    def step(variables: Any, state: Any, batch: Any, number: Any) -> Any:
        # Besides the sums, track the first batch with a non-finite input, for the error message.
        sums, first_bad = state
        sums = add(variables, sums, batch)
        return sums, _first_bad(sums, first_bad, number)

    return step


@jax.jit
def _first_bad(sums: Any, first_bad: Any, number: Any) -> Any:
    return jnp.where((first_bad < 0) & _not_finite(sums), number, first_bad)


def _not_finite(sums: Mapping[str, Mapping[str, Array]]) -> Bool[Array, " names"]:
    """Returns whose sums have NaN or inf, in the order of the names.

    A check of each weight by itself would be a third of the program. Outer products are finite
    where the squares are.
    """
    if not sums:
        return jnp.zeros(0, bool)
    parts = [
        [jnp.ravel(value) for kind, value in sums[name].items() if kind != "outer"]
        for name in sorted(sums)
    ]
    ends = np.cumsum([sum(value.size for value in some) for some in parts])
    bad_M = ~jnp.isfinite(jnp.concatenate([value for some in parts for value in some]))
    until = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(bad_M, dtype=jnp.int32)])[ends]
    return jnp.diff(until, prepend=0) > 0


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
    _reject_not_finite(dict(zip(sorted(sums), jax.device_get(first_bad), strict=True)))
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
    with one_sentence(f"calibration batch {number}", batch):
        return jax.eval_shape(run, variables, batch)


def _zeros(new: Any) -> Any:
    return (
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), new),
        jnp.full(len(new), -1, jnp.int32),
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
    """Raises InputError if no product used a wanted weight."""
    missing = [name for name in wanted if name not in sums]
    if missing:
        raise InputError(
            f"no product used {listed(missing, most=1)} on the calibration batches, or none that a "
            "trace can follow; exclude it with prunable=, or give a function that runs all of the "
            "model"
        )


def normalize_sums(
    params: PyTree, sums: Mapping[str, Mapping[str, Array]], n: int, *, hessian: bool
) -> dict[str, PyTree]:
    """Converts sums over n sequences to input norms and Hessians, pytrees like the parameters."""
    measured = {
        "input_norm": tree.map_named(
            lambda name, _: jnp.sqrt(sums[name]["square"] / n) if name in sums else None, params
        )
    }
    if hessian:
        measured["hessian"] = tree.map_named(
            lambda name, _: sums[name]["outer"] * (2 / n) if name in sums else None, params
        )
    return measured
