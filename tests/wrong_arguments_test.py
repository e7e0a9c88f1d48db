"""Library calls with wrong arguments: InputError with a sentence, or a right result."""

import inspect
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swe_prune
from swe_prune import (
    allocation,
    annotations,
    blockwise,
    importance,
    masks,
    recipe,
    select,
    trajectory,
    tree,
)
from swe_prune.errors import InputError

PARAMS = {"up": {"kernel": jnp.arange(16.0).reshape(4, 4) - 7.5, "bias": jnp.ones(4)}}
SCORES = {"up": {"kernel": jnp.abs(PARAMS["up"]["kernel"]), "bias": None}}
MASK = masks.by_sparsity(SCORES, 0.5)
STATS = trajectory.update(trajectory.init(PARAMS), PARAMS)

RIGHT = {
    masks.by_std: {"scores": SCORES, "rate": 1.0},
    masks.by_sparsity: {"scores": SCORES, "sparsity": 0.5, "scope": "tensor", "pattern": None},
    masks.apply: {"params": PARAMS, "mask": MASK},
    masks.summary: {"mask": MASK},
    masks.revived: {"params": PARAMS, "mask": MASK},
    masks.of_zeros: {"params": PARAMS, "prunable": None},
    trajectory.init: {"params": PARAMS, "measures": ("late_mean",), "prunable": None,
                      "power": 0.5, "window_start": 1, "vote_rate": 1.0},
    trajectory.update: {"stats": STATS, "params": PARAMS},
    trajectory.merge: {"a": STATS, "b": STATS},
    trajectory.read: {"stats": STATS, "measure": "late_mean"},
    importance.score: {"name": "magnitude", "params": PARAMS, "stats": None, "prunable": None},
    tree.prunable: {"params": PARAMS, "include": ("kernel",), "exclude": ("bias",)},
    select.top_k_mask: {"x": jnp.arange(4.0), "k": 2},
    allocation.allocate: {"name": "uniform", "scores": SCORES, "sparsity": 0.5},
    recipe.check: {"recipe": recipe.Recipe(criterion="magnitude", sparsity=0.5)},
    swe_prune.prune: {"params": PARAMS, "sparsity": 0.5, "criterion": "magnitude",
                      "scope": "tensor", "pattern": None},
}  # fmt: skip
"""Arguments with which each call works."""

WRONG = [
    None, True, 3, -1, 0.5, -0.5, float("nan"), float("inf"), 10**40, 1j, "", "x", "a/b", b"x", (),
    [], {}, [None], ["x", 3], {"a": "b"}, {"up": {"kernel": jnp.array(7.0)}}, {1: 2}, object(),
    np.array("x"), jnp.zeros((2, 2), complex), {"up": {"kernel": "x", "bias": "y"}},
    {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, lambda: None, {"up": SCORES}, type,
    {"up": {"kernel": jnp.full((4, 4), 1j), "bias": jnp.ones(4)}}, STATS, MASK, np, 10**5000,
    {1: jnp.ones((2, 2)), "a": jnp.ones((2, 2))}, jnp.float32,
]  # fmt: skip


@pytest.mark.parametrize("call", RIGHT, ids=lambda call: f"{call.__module__}.{call.__name__}")
def test_a_wrong_argument_is_a_sentence(call):
    right = RIGHT[call]
    call(**right)
    found = {}
    for name in right:
        assert name in inspect.signature(call).parameters
        for number, value in enumerate(WRONG):
            try:
                jax.block_until_ready(call(**(right | {name: value})))
            except Exception as error:
                found[name, number] = error
    others = {at: error for at, error in found.items() if not isinstance(error, InputError)}
    assert not others
    assert not [at for at, error in found.items() if "\n" in str(error)]


def test_what_was_taken_silently_is_refused():
    with pytest.raises(InputError):
        masks.apply(PARAMS, SCORES)
    with pytest.raises(InputError):
        trajectory.update(STATS, {"up": {"kernel": jnp.array(7.0), "bias": jnp.ones(4)}})
    with pytest.raises(InputError):
        tree.prunable({"a/b": jnp.ones((2, 2)), "a": {"b": jnp.zeros((2, 2))}})


def test_arrays_and_sequences_of_numbers_are_alike_and_nothing_may_be_pruned():
    want = allocation.water_fill([1.0, 2.0], [4, 4], 0.5)
    assert allocation.water_fill(np.array([1.0, 2.0]), np.array([4, 4]), 0.5) == want
    nothing = jax.tree.map(lambda _: None, PARAMS)
    assert int(masks.revived(PARAMS, nothing)) == 0


@pytest.mark.parametrize("value", [float("nan"), "x", None, True, [1.0], float("inf")])
def test_options_of_a_criterion_are_numbers(value):
    with pytest.raises(InputError, match="option horizon"):
        importance.score("forecast", PARAMS, stats=STATS, horizon=value)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Sequence[tuple[int, int]], "a sequence of tuples of 2 integers"),
        (Sequence[Sequence[int]], "a sequence of sequences of integers"),
        (
            Mapping[str, Mapping[str, int]],
            "a mapping of strings to mappings of strings to integers",
        ),
        (Sequence[float] | None, "a sequence of finite numbers or None"),
    ],
)
def test_nested_annotations_are_told_in_their_plurals(hint, words):
    assert annotations.in_words(hint) == words


@pytest.mark.parametrize("zero", [0, np.int32(0), np.asarray(0), jnp.asarray(0)], ids=repr)
def test_an_integer_keeps_its_range_as_an_array(zero):
    with pytest.raises(InputError, match="iterations must be an integer of at least 1, got 0"):
        blockwise.admm(jnp.ones((2, 2)), jnp.eye(2), 0.5, iterations=zero)
