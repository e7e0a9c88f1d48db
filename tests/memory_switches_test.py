"""Rematerialisation, the scan over layers and accumulation: the plain run's loss and gradients.

Everything goes through the train step, whose optimizer here stores the gradients and does no more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swe_prune.config import ModelConfig
from swe_prune.models import gpt
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib

SYMBOLS = 7
CONFIG = ModelConfig(layers=2, heads=2, width=16, context=8, use_bias=True, tied_head=False)
STORING = optax.trace(0.0)
REMAT = {"remat": True}
SCAN = {"scan_layers": True}
BOTH = REMAT | SCAN
SWITCHES = [(REMAT, 1), (SCAN, 1), (BOTH, 1), ({}, 2), ({}, 4), (BOTH, 2)]
# The compiler may keep float32 between two operations that are written in bfloat16, and does so in
# another way for each program. As written, the programs can be compared. Each runs once, so it is
# not worth optimizing.
AS_WRITTEN = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}


def state_of(config):
    """Returns a train state none of whose parameters is at its special initial value, 0 or 1."""
    params = state_lib.init_params(gpt.build(config, SYMBOLS), 0, config.context)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    moved = [x + 0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return state_lib.create(structure.unflatten(moved), STORING, 0)


def batch_of(config, rows=4):
    shape = (rows, config.context + 1)
    tokens_BxM = np.random.default_rng(1).integers(0, SYMBOLS, shape, np.int32)
    return {"inputs": tokens_BxM[:, :-1], "targets": tokens_BxM[:, 1:]}


def lowered(config, accumulate=1):
    step = functools.partial(
        step_lib.train_step,
        model=gpt.build(config, SYMBOLS),
        optimizer=STORING,
        track_every=1,
        accumulate=accumulate,
    )
    state = jax.eval_shape(lambda: state_of(config))
    return jax.jit(step).lower(state, batch_of(config))


def loss_and_gradients(config, accumulate=1):
    compiled = lowered(config, accumulate).compile(AS_WRITTEN)
    state, metrics = compiled(state_of(config), batch_of(config))
    return jax.device_get((metrics["loss"], state.opt_state.trace))


@functools.cache
def plain(**changes):
    return loss_and_gradients(dataclasses.replace(CONFIG, **changes))


def assert_same(got, expected):
    # atol: sums in another order, of terms up to 0.1, and those of a key's bias cancel to 0.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


@pytest.mark.quick(2)
@pytest.mark.parametrize(("changes", "accumulate"), SWITCHES)
def test_loss_and_gradients_are_those_of_the_plain_run(changes, accumulate):
    got = loss_and_gradients(dataclasses.replace(CONFIG, **changes), accumulate)
    assert_same(got, plain())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [REMAT, SCAN, BOTH])
def test_in_bfloat16_they_are_those_of_the_plain_run_in_bfloat16(changes):
    got = loss_and_gradients(dataclasses.replace(CONFIG, dtype="bfloat16", **changes))
    assert_same(got, plain(dtype="bfloat16"))


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32():
    (loss, grads), (exact, exact_grads) = plain(dtype="bfloat16"), plain()
    # Through two layers and back a value is rounded some 50 times by up to 2**-9, and the errors
    # add like a random walk: to at most 2**-6. Those of the loss average out over its 32 tokens.
    assert loss == pytest.approx(exact, rel=2**-9)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, grads, exact_grads))
    assert 0 < error < 2**-6 * optax.tree.norm(exact_grads)


@pytest.mark.quick(1)
@pytest.mark.parametrize("changes", [REMAT, SCAN, BOTH])
def test_the_parameters_keep_their_names_shapes_and_values(changes):
    switched = dataclasses.replace(CONFIG, **changes)
    jax.tree.map(np.testing.assert_array_equal, state_of(switched).params, state_of(CONFIG).params)


@pytest.mark.slow
def test_remat_draws_the_plain_runs_dropout_and_scan_its_own():
    dropout = dataclasses.replace(CONFIG, dropout=0.3)
    scanned = loss_and_gradients(dataclasses.replace(dropout, **SCAN))
    assert_same(loss_and_gradients(dataclasses.replace(dropout, **REMAT)), plain(dropout=0.3))
    # The pass that runs a block again draws what the first one drew.
    assert_same(loss_and_gradients(dataclasses.replace(dropout, **BOTH)), scanned)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(scanned))
    assert scanned[0] != plain(dropout=0.3)[0]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, SCAN, BOTH])
def test_two_layers_of_equal_weights_drop_different_activations(changes):
    """Each block adds ones that dropout doubles or drops, and nothing else is there.

    So a sum over two layers is 0, 2 or 4, and 2 only where one kept what the other dropped.
    """
    config = ModelConfig(
        layers=2, heads=2, width=16, context=8, use_bias=True, tied_head=False, dropout=0.5
    )
    model = gpt.build(dataclasses.replace(config, **changes), 16)
    params = jax.tree.map(jnp.zeros_like, state_lib.init_params(model, 0, 8))
    for name in ("block_0", "block_1"):
        params[name]["mlp"]["down"]["bias"] = jnp.ones(16)
    params["final_norm"]["scale"] = jnp.ones(16)
    params["head"]["kernel"] = jnp.eye(16)
    logits_BxLxV = model.apply(
        {"params": params}, jnp.zeros((4, 8), jnp.int32), train=True,
        rngs={"dropout": jax.random.key(0)},
    )  # fmt: skip
    # The norm keeps equal values equal, whatever it makes of them.
    counts = [len(np.unique(row)) for row in np.asarray(logits_BxLxV).round(3).reshape(-1, 16)]
    assert set(counts) <= {2, 3}
    assert np.mean(np.equal(counts, 3)) > 0.5


@pytest.mark.quick(1)
@pytest.mark.parametrize("changes", [SCAN, BOTH])
def test_scanned_layers_are_one_block_of_program(changes):
    three, six = (dataclasses.replace(CONFIG, layers=layers) for layers in (3, 6))
    scanned = products(dataclasses.replace(three, **changes))
    assert products(dataclasses.replace(six, **changes)) == scanned
    assert products(six) > 1.8 * products(three) > 1.8 * scanned


@pytest.mark.slow
@pytest.mark.parametrize("scan", [{}, SCAN])
def test_with_remat_the_backward_pass_is_given_what_enters_each_block(scan):
    config = dataclasses.replace(CONFIG, layers=8, context=64, **scan)
    params = jax.eval_shape(lambda: state_of(config)).params
    entering = 4 * config.layers * 4 * config.context * config.width  # bytes of float32, 4 rows
    kept = {}
    for remat in (False, True):
        model = gpt.build(dataclasses.replace(config, remat=remat), SYMBOLS)

        def loss_of(params, model=model):
            return step_lib.eval_step(params, batch_of(config), model=model)

        # A pullback is a pytree of what it keeps.
        pullback = jax.eval_shape(lambda params, loss=loss_of: jax.vjp(loss, params)[1], params)
        kept[remat] = bytes_of(pullback) - bytes_of(params)
    # One array for each block; the ends of the model keep some more in either case.
    assert entering < kept[True] < 2 * entering
    assert kept[False] > 8 * entering


def bytes_of(values):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(values))


@pytest.mark.slow
def test_scan_with_remat_takes_less_memory():
    """Of the unscanned layers XLA on CPU runs all of them again at once, and saves nothing."""
    config = dataclasses.replace(CONFIG, layers=8, context=64, **SCAN)
    plain, remat = (
        lowered(one).compile(AS_WRITTEN).memory_analysis().temp_size_in_bytes
        for one in (config, dataclasses.replace(config, **REMAT))
    )
    assert remat < plain / 2


def products(config):
    return lowered(config).as_text().count("stablehlo.dot_general")
