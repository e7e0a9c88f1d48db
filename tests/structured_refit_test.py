"""The refit of the projections that read cut units, against float64 and on a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import calibration, structured
from swe_prune.blockwise import prune_blocks
from swe_prune.blockwise.least_squares import least_squares
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.layout import Axes
from swe_prune.models import gpt
from swe_prune.structured import Along, Group
from swe_prune.structured.refit import DAMPING, refit

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 8)) @ RNG.normal(size=(8, 8)) + 0.5
W = RNG.normal(size=(8, 3))
KEEP = np.array([1, 0, 1, 1, 0, 1, 1, 1], bool)


def oracle(gram, weight, keep, damping):
    kept = gram[np.ix_(keep, keep)]
    ridge = kept + damping * np.trace(kept) / len(kept) * np.eye(len(kept))
    new = np.zeros_like(weight)
    new[keep] = weight[keep] + np.linalg.solve(ridge, gram[np.ix_(keep, ~keep)] @ weight[~keep])
    return new


def lost(x, new, shift=0.0):
    return ((x @ (new - W) + shift) ** 2).sum()


@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_least_squares_are_those_of_float64(damping):
    new, report = least_squares(jnp.array(W, jnp.float32), jnp.array(X.T @ X), KEEP, damping)
    wanted = oracle(X.T @ X, W, KEEP, damping)
    np.testing.assert_allclose(new, wanted, rtol=1e-4, atol=1e-5)
    assert (np.asarray(new)[~KEEP] == 0).all()
    np.testing.assert_allclose(report.error, lost(X, wanted), rtol=1e-3)
    assert report.removed == 6
    assert lost(X, np.asarray(new)) < lost(X, np.where(KEEP[:, None], W, 0))


def test_nothing_removed_changes_no_bit_and_dead_inputs_stay():
    weight = jnp.array(W, jnp.bfloat16)
    new, _ = least_squares(weight, jnp.array(X.T @ X), np.ones(8, bool))
    assert new.dtype == jnp.bfloat16
    assert (new == weight).all()
    dead = X.copy()
    dead[:, 3] = 0
    new, report = least_squares(jnp.array(W, jnp.float32), jnp.array(dead.T @ dead), KEEP)
    assert report.dead == 1
    assert (new[3] == W[3].astype(np.float32)).all()


def moments_of(x, gram=True):
    x = jnp.asarray(x, jnp.float32)
    mean, square = x.mean(0), (x**2).mean(0)
    return calibration.Moments(
        jnp.array(len(x)), mean, square, mean, x.T @ x / len(x) if gram else None
    )


GROUPS = {"mlp": Group(8, {r"up/kernel$": -1, r"down/kernel$": 0})}
PARAMS = {
    "up": {"kernel": jnp.ones((2, 8))},
    "down": {"kernel": jnp.array(W, jnp.float32), "bias": jnp.ones(3)},
}
KEPT = {"mlp": np.flatnonzero(KEEP)}
DOWN = "down/kernel"


def test_a_bias_takes_up_the_mean():
    new, (report,) = refit(PARAMS, GROUPS, KEPT, {DOWN: moments_of(X)}, damping=0.0)
    solution = np.linalg.lstsq(np.c_[X[:, KEEP], np.ones(50)], X @ W + 1, rcond=None)[0]
    np.testing.assert_allclose(new["down"]["kernel"][KEEP], solution[:-1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(new["down"]["bias"], solution[-1], rtol=1e-3, atol=1e-3)
    without = {"up": PARAMS["up"], "down": {"kernel": PARAMS["down"]["kernel"]}}
    alone, (plain,) = refit(without, GROUPS, KEPT, {DOWN: moments_of(X)}, damping=0.0)
    assert report.after < plain.after < plain.before
    whole = ((X @ W) ** 2).sum()
    np.testing.assert_allclose(
        plain.after, lost(X, np.asarray(alone["down"]["kernel"])) / whole, rtol=1e-3
    )
    assert (report.name, report.removed, report.inputs, report.refitted) == (DOWN, 2, 8, True)
    # What calibration.inputs measures has no means, and gives the same refit of the kernel.
    hessian = {
        "hessian": {"up": {"kernel": None}, "down": {"kernel": jnp.array(X.T @ X), "bias": None}}
    }
    other, _ = refit(without, GROUPS, KEPT, hessian, damping=0.0)
    np.testing.assert_allclose(
        other["down"]["kernel"], alone["down"]["kernel"], rtol=1e-3, atol=1e-4
    )


def test_a_refit_that_is_worse_on_other_text_is_not_kept():
    """On held-out inputs that are not correlated, the removed ones cannot be predicted."""
    few = X[:4]  # fits these 4 tokens perfectly, and nothing else
    measured, other = {DOWN: moments_of(few)}, {DOWN: moments_of(RNG.normal(size=(400, 8)))}
    kept, (used,) = refit(PARAMS, GROUPS, KEPT, measured, damping=1e-6)
    new, (report,) = refit(PARAMS, GROUPS, KEPT, measured, holdout=other, damping=1e-6)
    assert used.refitted
    assert not report.refitted
    assert report.after == report.before
    np.testing.assert_array_equal(
        new["down"]["kernel"], np.where(KEEP[:, None], PARAMS["down"]["kernel"], 0)
    )
    np.testing.assert_array_equal(new["down"]["bias"], PARAMS["down"]["bias"])
    assert (kept["down"]["bias"] != new["down"]["bias"]).all()


def test_of_several_dampings_the_best_on_other_text_is_taken():
    measured, other = {DOWN: moments_of(X[:9])}, {DOWN: moments_of(X[9:])}
    dampings = (1e-6, 0.1, 1e3)
    after = [
        refit(PARAMS, GROUPS, KEPT, measured, holdout=other, damping=one)[1][0].after
        for one in dampings
    ]
    _, (report,) = refit(PARAMS, GROUPS, KEPT, measured, holdout=other, damping=dampings)
    assert report.after == min(after) < max(after)


def test_nothing_removed_changes_nothing():
    new, reports = refit(PARAMS, GROUPS, {"mlp": np.arange(8)}, {})
    assert reports == ()
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(PARAMS), strict=True))


def test_each_layer_of_a_stack_is_refitted_alone():
    stacked = jnp.stack([PARAMS["down"]["kernel"], PARAMS["down"]["kernel"][::-1]])
    groups = {"mlp": Group(8, {"down": Along(1, copies=0)}, copies=2)}
    keep = {"mlp": np.stack([KEPT["mlp"], np.arange(6)])}
    both = [moments_of(X), moments_of(X[::-1, ::-1])]
    stack = calibration.Moments(
        *(jnp.stack(some) for some in zip(*(vars(one).values() for one in both), strict=True))
    )
    layout = {"down": Axes((1,), (2,), (0,))}
    new, reports = refit({"down": stacked}, groups, keep, {"down": stack}, layout=layout)
    assert [report.name for report in reports] == ["down[0]", "down[1]"]
    for at in range(2):
        rows = np.isin(np.arange(8), keep["mlp"][at])
        wanted = oracle(
            np.asarray(both[at].gram, np.float64),
            np.asarray(stacked[at], np.float64),
            rows,
            DAMPING,
        )
        np.testing.assert_allclose(new["down"][at], wanted, rtol=1e-4, atol=1e-5)


CONFIG = ModelConfig(layers=2, heads=4, kv_heads=2, width=16, context=16, hidden=32)


@pytest.mark.slow
@pytest.mark.parametrize("units", ["neurons", "heads"])
def test_a_cut_model_is_nearer_to_the_dense_one_with_the_refit(units):
    module = gpt.build(CONFIG, vocab_size=11)
    batches = RNG.integers(0, 11, (4, 4, 16)).astype(np.int32)
    params = jax.jit(module.init)(jax.random.key(0), batches[0])["params"]
    # Larger weights, so that the blocks change the logits.
    params = jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, params)
    leaves = {"neurons": r"down/kernel$", "heads": r"attention/out/kernel$"}[units]
    found = calibration.moments(module, params, batches[:3], leaves=leaves, gram=True)
    groups = structured.groups(CONFIG, units)
    units_of = {name: RNG.random(group.units) for name, group in groups.items()}
    keep = structured.choose(groups, units_of, sparsity=0.5)
    new, reports = refit(params, groups, keep, found)
    assert len(reports) == 2
    assert all(report.refitted and report.after < report.before for report in reports)
    smaller = gpt.build(structured.cut_config(CONFIG, keep), vocab_size=11)

    dense, cut = (jax.jit(lambda p, x, m=m: m.apply({"params": p}, x)) for m in (module, smaller))
    for tokens in (batches[0], batches[3]):  # calibrated on, and held out
        plain, refitted = (
            np.square(
                cut(structured.cut(some, groups, keep), tokens) - dense(params, tokens)
            ).mean()
            for some in (params, new)
        )
        assert refitted < plain


def test_block_after_block_the_first_block_is_refitted_as_at_once():
    """What goes into the first block's projection is that of the dense model either way."""
    module = gpt.build(CONFIG, vocab_size=11)
    batches = list(RNG.integers(0, 11, (2, 4, 16)).astype(np.int32))
    params = jax.jit(module.init)(jax.random.key(0), batches[0])["params"]
    groups = structured.groups(CONFIG)
    keep = {name: np.arange(8, 32) for name in groups}
    mask = structured.unit_mask(params, groups, keep)
    found = calibration.moments(module, params, batches, leaves=r"down/kernel$", gram=True)
    once, _ = refit(params, groups, keep, found)
    after, _, reports = prune_blocks(
        module,
        {"params": params},
        batches,
        blocks=gpt.BLOCKS,
        mask=mask,
        restore="least_squares",
        holdout=(),
    )
    first, second = (
        [some[block]["mlp"]["down"]["kernel"] for some in (once, after)]
        for block in ("block_0", "block_1")
    )
    np.testing.assert_allclose(*first, rtol=1e-4, atol=1e-6)
    assert not np.allclose(*second, rtol=1e-4, atol=1e-6)
    assert (after["block_0"]["mlp"]["up"]["kernel"][:, :8] == 0).all()
    assert all(report.restored for report in reports)
    single = jax.tree.map(lambda m: m.at[-1, -1].set(False), mask)
    for options, said in (
        ({"mask": single}, "'block_0/mlp/down/kernel' removes single weights"),
        ({"sparsity": 0.5}, "there is no mask"),
    ):
        with pytest.raises(InputError, match=said):
            prune_blocks(
                module, {"params": params}, batches, blocks=gpt.BLOCKS, restore="least_squares",
                **options,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: refit(PARAMS, GROUPS, KEPT, {}, damping=(0.1, 1)), "choose from on holdout="),
        (lambda: refit(PARAMS, GROUPS, KEPT, {}), "the inputs of 'down/kernel' were not measured"),
        (lambda: refit(PARAMS, GROUPS, KEPT, {DOWN: moments_of(X, gram=False)}), "not measured"),
        (lambda: refit(PARAMS, GROUPS, {"mlp": []}, {}), "integer indices|keeps nothing"),
        (
            lambda: refit(PARAMS, GROUPS, KEPT, {DOWN: moments_of(X[:, :4])}),
            r"shape \(4, 4\), and it has inputs \(8,\)",
        ),
        (
            lambda: least_squares(jnp.ones((2, 1)), jnp.eye(2), np.zeros(2, bool)),
            "one or more stay",
        ),
        (
            lambda: least_squares(jnp.ones((2, 1)), jnp.eye(2), np.ones(3, bool)),
            "each of the 2 inputs",
        ),
        (lambda: least_squares(jnp.ones((2, 1)), jnp.eye(2), KEEP[:2], -1.0), "damping"),
        (lambda: least_squares(jnp.ones((2, 1)), jnp.full((2, 2), jnp.nan), KEEP[:2]), "NaN"),
    ],
)
def test_what_cannot_be_refitted_is_said(call, said):
    with pytest.raises(InputError, match=said):
        call()
