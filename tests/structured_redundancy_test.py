"""Redundant units: the order of removal, its reasons, clusters, and folding."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune import structured
from swe_prune.errors import InputError
from swe_prune.layout import Axes
from swe_prune.structured import Group, redundancy
from swe_prune.structured.folding import fold, fold_units
from swe_prune.structured.redundancy import Removal, SaturatedWarning, rank
from swe_prune.structured.redundant_units import redundancy_scores, redundant_units
from swe_prune.structured.unit_clusters import clusters_of

RNG = np.random.default_rng(0)
FREE = RNG.normal(size=(60, 4))
# Units 4, 5, 6 are functions of 0, 1 and 2; unit 7 is constant.
Z = np.c_[FREE, 3 * FREE[:, 0] - 1, np.tanh(FREE[:, 1]), FREE[:, 2] ** 3, np.full(60, 2.0)]
Z = Z.astype(np.float32)
IMPORTANCE = np.arange(8.0, 0, -1)  # of a pair the one of the higher index goes


def similar(kind="mutual_information", z=Z, width="median", **options):
    return redundancy.similarity(z, kind, width=width, **options)


@pytest.mark.parametrize("kind", redundancy.SIMILARITIES)
@pytest.mark.parametrize("method", redundancy.METHODS)
def test_functions_of_other_units_go_first_and_name_their_partner(kind, method):
    found = rank(similar(kind), IMPORTANCE, method=method, threshold=None, patience=200)
    assert len(found.removed) == 7
    assert found.removed[0] == Removal(7, None, 0.0)
    first = {(removal.unit, removal.partner) for removal in found.removed[1:4]}
    assert first == {(4, 0), (5, 1), (6, 2)}
    assert found.keep(4).tolist() == [0, 1, 2, 3]
    assert np.argsort(found.scores())[:4].tolist() == [
        removal.unit for removal in found.removed[:4]
    ]
    assert json.loads(json.dumps(found.as_json()))["removed"][0]["partner"] is None


def test_greedy_takes_the_closest_remaining_pair_each_time():
    values = RNG.random((9, 9)).astype(np.float32)
    values = (values + values.T) / 2
    given = redundancy.Similarity(values, "correlation", np.zeros(9, bool), None, 6.0)
    importance = RNG.random(9)
    found = rank(given, importance)
    alive = set(range(9))
    for removal in found.removed:
        pairs = {(values[a, b], a, b) for a in alive for b in alive if a < b}
        value, a, b = max(pairs)
        assert {removal.unit, removal.partner} == {a, b}
        assert removal.unit == min((a, b), key=lambda unit: importance[unit])
        assert removal.similarity == np.float32(value)
        alive.remove(removal.unit)


def test_pairs_are_above_the_threshold_which_falls_when_none_is_left():
    found = rank(similar(), IMPORTANCE, method="pairs", threshold=0.5, patience=300, remove=7)
    values = [removal.similarity for removal in found.removed[1:]]
    assert min(values[:3]) > 0.5
    assert found.last_threshold < 0.5
    assert min(values) > found.last_threshold
    again = rank(similar(), IMPORTANCE, method="pairs", threshold=0.5, patience=300)
    assert again.removed == found.removed
    orders = {
        tuple(r.unit for r in rank(similar(), IMPORTANCE, method="pairs", seed=s).removed[1:4])
        for s in range(6)
    }
    assert len(orders) > 1
    few = rank(similar(), IMPORTANCE, method="pairs", threshold=0.5, remove=2)
    assert (len(few.removed), few.last_threshold) == (2, 0.5)


@pytest.mark.parametrize("method", redundancy.METHODS)
def test_pairs_are_of_one_cluster_as_long_as_there_are_any(method):
    clusters = np.array([0, 0, 1, 1, 1, 2, 2, 3])
    found = rank(similar(), IMPORTANCE, method=method, clusters=clusters, patience=50)
    within = [clusters[r.unit] == clusters[r.partner] for r in found.removed[1:]]
    assert within == [True] * 4 + [False] * 2


def test_clusters_join_units_that_go_together():
    base = RNG.normal(size=(40, 3))
    z = np.concatenate([base + 0.05 * RNG.normal(size=(40, 3)) for _ in range(5)], axis=1)
    found = clusters_of(z * RNG.uniform(1, 9, 15), 3).reshape(5, 3)
    assert (found == found[0]).all()
    assert len(set(found[0])) == 3
    assert set(clusters_of(Z, 8)) <= set(range(8))


def test_saturation_at_either_end_is_warned_of():
    with pytest.warns(SaturatedWarning, match="too small to compare.* wider rule"):
        similar(width="silverman", gamma=1e-4)
    with pytest.warns(SaturatedWarning, match="too large to compare.* narrower rule"):
        similar(width="silverman", gamma=1e4)


def test_normalized_is_1_for_a_unit_and_its_multiple():
    assert (
        abs(similar("normalized").values_FxF[0, 4] - similar("normalized").values_FxF[0, 0]) < 1e-4
    )


@pytest.mark.parametrize("with_bias", [True, False])
def test_folding_is_exact_for_what_is_linear_in_its_partner(with_bias):
    """Unit 1 is 2 z_0 + 1, and unit 2 is z_1 + z_0 after that: both end in unit 0."""
    z = RNG.normal(size=(30, 1))
    z = np.c_[
        z, 2 * z + (1 if with_bias else 0), 6 * z + (3 if with_bias else 0), RNG.normal(size=30)
    ]
    kernel, bias = RNG.normal(size=(4, 2)), RNG.normal(size=2)
    removals = [Removal(2, 1, 1.0), Removal(1, 0, 1.0)]
    new, shifted = fold(kernel, z, removals, bias if with_bias else None)
    assert (new[1:3] == 0).all()
    outputs = z @ new + (shifted if with_bias else 0)
    np.testing.assert_allclose(outputs, z @ kernel + (bias if with_bias else 0), atol=1e-10)


def test_a_constant_unit_is_folded_into_the_bias():
    new, shifted = fold(np.eye(8), Z, [Removal(7, None, 0.0)], np.zeros(8))
    np.testing.assert_allclose(Z @ new + shifted, Z, atol=1e-6)


PARAMS = {
    "up": {"kernel": jnp.ones((2, 8))},
    "down": {"kernel": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), "bias": jnp.zeros(3)},
}
GROUPS = {"mlp": Group(8, {r"up/kernel$": -1, r"down/kernel$": 0})}
SAMPLES = {"down/kernel": jnp.asarray(Z)}


def test_the_seed_nearest_to_the_dense_model_is_taken():
    apart = {3: 0.5, 4: 0.25, 5: 0.75}

    def distance(found):
        return apart[found["mlp"].seed]

    best = redundant_units(
        GROUPS, PARAMS, SAMPLES, method="pairs", seeds=[3, 4, 5], distance=distance, width="median"
    )["mlp"]
    assert (best.seed, best.distance) == (4, 0.25)
    alone = redundant_units(GROUPS, PARAMS, SAMPLES, method="pairs", seeds=[4], width="median")
    assert alone["mlp"].removed == best.removed


def test_units_of_a_model_are_chosen_and_folded_by_their_redundancy():
    """The default width is aligned to the outputs; what goes first is what others tell."""
    found = redundant_units(GROUPS, PARAMS, SAMPLES)
    keep = structured.choose(GROUPS, redundancy_scores(GROUPS, found), sparsity=0.5)
    assert sorted(unit % 4 for unit in keep["mlp"]) == [0, 1, 2, 3]
    new = fold_units(PARAMS, GROUPS, keep, found, SAMPLES)
    outputs = Z @ np.asarray(PARAMS["down"]["kernel"])
    gone = np.setdiff1d(np.arange(8), keep["mlp"])
    assert (new["down"]["kernel"][gone] == 0).all()
    plain = np.where(np.isin(np.arange(8), gone)[:, None], 0, PARAMS["down"]["kernel"])

    def lost(kernel, bias=0):
        return np.square(Z @ np.asarray(kernel) + bias - outputs).sum()

    assert lost(new["down"]["kernel"], np.asarray(new["down"]["bias"])) < 0.5 * lost(plain)


def test_within_clusters_other_units_may_go():
    seen = []
    found = redundant_units(
        GROUPS, PARAMS, SAMPLES, "correlation", clusters=8, progress=lambda *one: seen.append(one)
    )
    assert len(found["mlp"].removed) == 7
    assert seen == [("mlp", found["mlp"])]


def test_each_copy_has_an_order_of_its_own():
    groups = {"mlp": Group(8, {"down": structured.Along(1, copies=0)}, copies=2)}
    params = {"down": jnp.stack([PARAMS["down"]["kernel"]] * 2)}
    samples = {"down": jnp.stack([Z, Z[:, ::-1]])}
    layout = {"down": Axes((1,), (2,), (0,))}
    found = redundant_units(groups, params, samples, "correlation", layout=layout)
    assert set(found) == {"mlp[0]", "mlp[1]"}
    scores = redundancy_scores(groups, found)["mlp"]
    assert scores.shape == (2, 8)
    assert (scores[0].argmin(), scores[1].argmin()) == (7, 0)


GIVEN = redundancy.Similarity(np.eye(3), "correlation", np.zeros(3, bool), None, 5.0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: similar("mutual"), "did you mean 'mutual_information'"),
        (lambda: similar(width="mean"), "width must be one of"),
        (lambda: similar(z=np.ones((4, 3))), "all 4 samples are equal"),
        (lambda: similar(z=Z[:1]), "two or more rows"),
        (lambda: similar(z=np.where(Z[3, 1] == Z, np.nan, Z)), "array of samples has NaN or inf"),
        (lambda: rank(GIVEN, np.ones(3), method="best"), "method must be one of"),
        (lambda: rank(GIVEN, np.ones(2)), "must have 3 values"),
        (lambda: rank(GIVEN, np.ones(3), remove=3), "leave one or more of 3 units, got 3"),
        (
            lambda: rank(GIVEN, np.ones(3), method="pairs", threshold=0),
            "threshold must be positive",
        ),
        (lambda: rank(GIVEN, np.ones(3), method="pairs", patience=0), "patience must be"),
        (lambda: rank(GIVEN, np.ones(3)).keep(0), "of 3 units 1 to 3 can stay, got 0"),
        (lambda: rank(GIVEN, np.ones(3), remove=1).keep(1), "2 to 3 can stay, got 1"),
        (lambda: clusters_of(Z, 9), "must be 1 to 8, the number of units, got 9"),
        (lambda: redundant_units(GROUPS, PARAMS, SAMPLES, seeds=[0, 1]), "with distance="),
        (lambda: redundant_units(GROUPS, PARAMS, {}), "were not sampled; give"),
        (
            lambda: redundant_units(GROUPS, PARAMS, {"down/kernel": Z[:, :4]}),
            r"shape \(60, 4\), and it has inputs \(8,\)",
        ),
        (
            lambda: redundant_units(
                {"heads": Group(4, {r"down/kernel$": structured.Along(0, 2)})}, PARAMS, SAMPLES
            ),
            "not a single activation",
        ),
        (
            lambda: redundant_units(
                GROUPS, PARAMS, SAMPLES, "correlation", distance=lambda found: np.nan
            ),
            "is NaN",
        ),
        (
            lambda: fold_units(
                PARAMS,
                GROUPS,
                {"mlp": [0, 7]},
                redundant_units(GROUPS, PARAMS, SAMPLES, "correlation"),
                SAMPLES,
            ),
            "not what the order of removal leaves",
        ),
    ],
)
def test_what_cannot_be_ranked_is_said(call, said):
    with pytest.raises(InputError, match=said):
        call()
