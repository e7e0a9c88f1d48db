"""The ADMM weight update against float64 numpy, and restoring masks block after block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from swe_prune import blockwise, importance, masks, recipe, tree
from swe_prune.blockwise import admm
from swe_prune.errors import InputError


@functools.cache
def layer(rows=24, columns=10, samples=90, dead=0):
    """A kernel, and the Hessian of correlated inputs of different scales."""
    rng = np.random.default_rng(rows + dead)
    mix = rng.normal(size=(rows, rows)) / np.sqrt(rows) + np.eye(rows)
    x_NxR = rng.normal(size=(samples, rows)) @ mix * np.exp(rng.normal(size=rows))
    x_NxR[:, :dead] = 0
    hessian = 2 / samples * x_NxR.T @ x_NxR
    return rng.normal(size=(rows, columns)).astype(np.float32), hessian.astype(np.float32)


def float64(x):
    return np.asarray(x, np.float64)


def largest(score, kept):
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score.ravel(), kind="stable")[:kept]] = True
    return mask.reshape(score.shape)


def groups_of_four(score):
    grouped = score.reshape(-1, 4, score.shape[1])
    rank = np.argsort(np.argsort(-grouped, axis=1, kind="stable"), axis=1)
    return (rank < 2).reshape(score.shape)


def reference(weight, hessian, removed, mask=None, n_of_m=False, iterations=20, damping=0.1):
    """The algorithm of METHODS 19 by the book, in float64."""
    weight, hessian = float64(weight), float64(hessian)
    scale = np.sqrt(np.diag(hessian))[:, None] + 1e-8
    gram = hessian / (scale * scale.T)
    gram = gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    values = weight * scale
    wanted, inverse = gram @ values, np.linalg.inv(gram + np.eye(len(gram)))
    dual, keep = np.zeros_like(values), mask
    for step in range(iterations):
        if mask is None and step < 15:
            score = np.abs(values + dual)
            if n_of_m:
                score = np.where(groups_of_four(score), np.inf, score)
            ramp = 1 - (1 - (step + 1) / 15) ** 3
            now = removed if step == 14 else int(removed * ramp)
            keep = largest(score, score.size - now)
        pruned = np.where(keep, values + dual, 0)
        dual = dual + values - pruned
        values = inverse @ (wanted + pruned - dual)
    return np.where(keep, (values + dual) / scale, 0), keep


def error(kernel, weight, hessian):
    apart = float64(kernel) - float64(weight)
    return float((apart * (float64(hessian) @ apart)).sum())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, None])
def test_mask_and_weights_are_those_of_the_reference(sparsity):
    weight, hessian = layer()
    pattern = "2:4" if sparsity is None else None
    kernel, mask, report = admm(weight, hessian, sparsity, pattern)
    removed = weight.size // 2 if sparsity is None else int(weight.size * sparsity + 0.5)
    wanted, keep = reference(weight, hessian, removed, n_of_m=sparsity is None)
    np.testing.assert_array_equal(mask, keep)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-4, atol=1e-5)
    assert report.removed == removed == int((~mask).sum())
    np.testing.assert_allclose(report.error, error(kernel, weight, hessian), rtol=1e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_given_mask_is_restored_nearly_to_least_squares(sparsity):
    weight, hessian = layer()
    mask = largest(np.abs(weight), int(weight.size * (1 - sparsity)))
    kernel, kept, report = admm(weight, hessian, mask=jnp.asarray(mask))
    wanted, _ = reference(weight, hessian, None, mask=mask)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-4, atol=1e-5)
    best = np.zeros_like(float64(weight))
    for column, keep in enumerate(mask.T):
        own = float64(hessian)[np.ix_(keep, keep)]
        right = float64(hessian)[keep] @ float64(weight)[:, column]
        best[keep, column] = np.linalg.lstsq(own, right, rcond=None)[0]
    alone, least = (error(x, weight, hessian) for x in (np.where(mask, weight, 0), best))
    assert least <= report.error <= least + 0.1 * (alone - least)


def test_its_error_is_below_that_of_sparsegpt():
    weight, hessian = layer()
    for options in ({"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}):
        ours, theirs = (
            error(f(weight, hessian, **options)[0], weight, hessian)
            for f in (admm, blockwise.sparsegpt)
        )
        assert ours < 0.8 * theirs


def test_dead_inputs_go_first_and_everything_stays_finite():
    weight, hessian = layer(dead=3)
    kernel, mask, report = admm(weight, hessian, 0.5)
    assert report.dead == 3
    assert not np.asarray(mask)[:3].any()
    assert np.isfinite(kernel).all()
    kernel, _, _ = admm(weight.astype(jnp.bfloat16), np.zeros_like(hessian), 0.5)
    assert kernel.dtype == jnp.bfloat16
    assert np.isfinite(float64(kernel)).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "neither a sparsity nor a pattern"),
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\)"),
        ({"sparsity": 0.5, "iterations": 0}, "iterations must be an integer of at least 1, got 0"),
        ({"sparsity": 0.5, "damping": float("nan")}, "damping must be a finite number, got nan"),
        (
            {"sparsity": 0.5, "mask": np.ones((24, 10), bool)},
            "must be None with mask=, got 0.5 and None; leave",
        ),
        (
            {"mask": np.ones((24, 10))},
            r"mask must be a bool array of shape \(R, C\) or None, got float64",
        ),
        ({"pattern": "3:5"}, "24 inputs, which are not a multiple"),
    ],
)
def test_what_cannot_be_solved_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        admm(*layer(), **arguments)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x)))


X = np.random.default_rng(0).normal(size=(60, 8)) @ np.random.default_rng(1).normal(size=(8, 8))
X = X.astype(np.float32)
BATCHES = [X[at : at + 10] for at in range(0, 60, 10)]


@functools.cache
def variables():
    return jax.jit(Model().init)(jax.random.key(0), X)


def drift(params):
    """Squared distance of the model's outputs from those of the dense one."""
    apart = Model().apply({"params": params}, X) - Model().apply(variables(), X)
    return float(jnp.sum(apart**2))


def restored(mask, **options):
    return blockwise.prune_blocks(
        Model(), variables(), BATCHES, blocks=r"block_\d", mask=mask, restore="admm", **options
    )


def test_masks_that_someone_else_chose_are_restored_block_after_block():
    params = variables()["params"]
    mask = masks.by_sparsity(importance.score("magnitude", params), 0.5, "global")
    pruned, kept, reports = restored(mask, holdout=())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), kept, mask))
    assert all(report.solver is not None for report in reports)
    for name, leaf in tree.named_leaves(pruned):
        keep = dict(tree.named_leaves(mask))[name]
        if keep is not None:
            assert not np.asarray(leaf)[~np.asarray(keep)].any()
    assert drift(pruned) < 0.5 * drift(masks.apply(params, mask))


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_every_methods_mask_can_be_restored(method):
    arguments = {"blocks": r"block_\d", "sparsity": 0.5, "method": method}
    plain, first, _ = blockwise.prune_blocks(Model(), variables(), BATCHES, **arguments)
    better, mask, _ = blockwise.prune_blocks(
        Model(), variables(), BATCHES, restore="admm", holdout=(), **arguments
    )
    # The mask of the first kernel is the method's; the next sees what the restored one gives.
    np.testing.assert_array_equal(mask["block_0"]["up"]["kernel"], first["block_0"]["up"]["kernel"])
    assert drift(better) < drift(plain)


def test_masks_that_do_not_fit_are_refused_before_any_work():
    params = variables()["params"]
    mask = masks.by_sparsity(importance.score("magnitude", params), 0.5)
    with pytest.raises(InputError, match="must be None with mask="):
        restored(mask, sparsity=0.5)
    with pytest.raises(InputError, match="'block_0/down/kernel' is of float32, not bool"):
        restored(tree.map_tracked(lambda keep: keep.astype(jnp.float32), mask))
    with pytest.raises(InputError, match="restore must be one of"):
        blockwise.prune_blocks(
            Model(), variables(), BATCHES, blocks=r"block_\d", sparsity=0.5, restore="adm"
        )


def test_what_does_not_hold_on_held_out_batches_is_not_kept():
    params = variables()["params"]
    mask = masks.by_sparsity(importance.score("magnitude", params), 0.5)
    # The same batches agree; batches of other inputs, on which the update is a guess, do not.
    _, _, reports = restored(mask, holdout=BATCHES)
    assert all(report.restored for report in reports)
    others = np.random.default_rng(5).normal(size=(40, 8)).astype(np.float32)
    few = [X[:3]]
    arguments = {"blocks": r"block_\d", "mask": mask, "restore": "admm"}
    blind, _, _ = blockwise.prune_blocks(Model(), variables(), few, **arguments)
    guarded, _, reports = blockwise.prune_blocks(
        Model(), variables(), few, holdout=[others], **arguments
    )
    assert not all(report.restored for report in reports)
    assert {report.gave_up for report in reports} - {None}
    assert all(report.restored == (report.gave_up is None) for report in reports)
    alone = masks.apply(params, mask)
    for report in reports:
        before, everything, kept = report.held_out
        assert kept <= min(before, everything)
        if not report.restored:
            got, wanted = (dict(tree.named_leaves(one))[report.name] for one in (guarded, alone))
            np.testing.assert_array_equal(got, wanted)

    def drift_on_others(params):
        return float(
            jnp.sum(
                (Model().apply({"params": params}, others) - Model().apply(variables(), others))
                ** 2
            )
        )

    assert drift_on_others(guarded) < drift_on_others(blind)


def test_a_recipe_restores_the_mask_of_its_criterion():
    request = recipe.Recipe("magnitude", sparsity=0.5, scope="global", restore="admm")
    assert request.name == "magnitude+admm"
    assert request.reads_batches
    params = variables()["params"]
    # The last batch judges what the others, all of X, restore.
    arguments = {"model": Model(), "blocks": r"block_\d", "batches": [*BATCHES, X[50:]]}
    pruned, mask = recipe.prune(request, params, **arguments)
    alone, same = recipe.prune(dataclasses.replace(request, restore=None), params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), mask, same))
    assert drift(pruned) < 0.5 * drift(alone)
    with pytest.raises(InputError, match="restore 'admm' goes block by block; give model="):
        recipe.prune(request, params)
    with pytest.raises(InputError, match="restore must be one of"):
        recipe.check(dataclasses.replace(request, restore="sgd"))
