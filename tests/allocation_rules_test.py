"""What every rule that shares a sparsity out gives, against the formulas in float64 numpy."""

import math
import zlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from swe_prune import allocation, masks, tree
from swe_prune.allocation import Allocation
from swe_prune.errors import InputError


def test_allocation_adds_up_and_prints_a_table():
    got = Allocation({"a/kernel": 1234, "b": 0}, {"a/kernel": 5000, "b": 10})
    assert (got.removed_total, got.size_total) == (1234, 5010)
    assert got.sparsity == 1234 / 5010
    assert got.sparsities == {"a/kernel": 0.2468, "b": 0.0}
    lines = str(got).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert [line.split() for line in lines] == [
        ["tensor", "removed", "of", "sparsity"],
        ["a/kernel", "1,234", "5,000", "24.68%"],
        ["b", "0", "10", "0.00%"],
        ["total", "1,234", "5,010", "24.63%"],
    ]


@pytest.mark.parametrize(
    ("removed", "sizes", "sentence"),
    [
        ({"a": 1}, {"a": 2, "b": 3}, "'b' is in only one of removed and sizes"),
        ({"a": 3}, {"a": 2}, "from 0 to the 2 weights of 'a', got 3"),
        ({"a": -1}, {"a": 2}, "from 0 to the 2 weights of 'a', got -1"),
    ],
)
def test_allocation_beyond_the_tensors_is_refused(removed, sizes, sentence):
    with pytest.raises(InputError, match=sentence):
        Allocation(removed, sizes)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.floats(0, 1)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_apportioned_parts_add_up_next_to_their_targets(parts):
    sizes = [size for size, _ in parts]
    targets = [size * share for size, share in parts]
    total = math.floor(math.fsum(targets) + 0.5)
    got = allocation.apportion(targets, sizes, total)
    assert sum(got) == total
    for part, target, size in zip(got, targets, sizes, strict=True):
        assert 0 <= part <= size
        assert abs(part - target) <= 1


def test_apportioning_makes_good_what_rounding_spoils():
    assert allocation.apportion([1.0, 1.0], [1, 5], 4) == [1, 3]
    assert allocation.apportion([2.0, 2.0], [2, 2], 1) == [1, 0]
    assert allocation.apportion([0.5, 0.5, 0.5], [1, 1, 1], 2) == [1, 1, 0], "ties by order"


# ---- rules of the shapes alone ----

SHAPES = {"a/kernel": (100, 200), "b/kernel": (200, 10), "c/kernel": (3, 3, 16, 32), "d": (7, 13)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())
share = st.floats(0, 0.999)


def exact(got, sparsity, sizes=None):
    """What every allocation owes: the total to the weight, and no tensor beyond its size."""
    sizes = SIZES if sizes is None else sizes
    assert got.sizes == sizes
    assert got.removed_total == allocation.removed_count(sum(sizes.values()), sparsity)
    assert all(0 <= got.removed[name] <= size for name, size in sizes.items())


OF_SHAPES = {
    "uniform": allocation.uniform,
    "erk": allocation.erk,
    "er, power 2": lambda shapes, s: allocation.erk(shapes, s, power=2.0, kernel=False),
    "table": lambda shapes, s: allocation.table({"a": 0.9, "b": 0.1, ".*": 0.5}, shapes, s),
}


@pytest.mark.parametrize("rule", OF_SHAPES)
@given(first=share, second=share)
@settings(max_examples=100, deadline=None)
def test_rules_of_shapes_are_exact_and_monotone(rule, first, second):
    less, more = sorted([first, second])
    low, high = OF_SHAPES[rule](SHAPES, less), OF_SHAPES[rule](SHAPES, more)
    exact(low, less)
    exact(high, more)
    # One weight may come back, as in every rounding by largest remainders.
    assert all(low.removed[name] <= high.removed[name] + 1 for name in SHAPES)


@given(
    shapes=st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.lists(st.integers(1, 50), min_size=1, max_size=4).map(tuple),
        min_size=1, max_size=6,
    ),
    sparsity=share,
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_uniform_and_erk_are_exact_on_any_shapes(shapes, sparsity):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    exact(allocation.uniform(shapes, sparsity), sparsity, sizes)
    exact(allocation.erk(shapes, sparsity), sparsity, sizes)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9])
def test_uniform_takes_the_share_of_every_tensor_to_a_weight(sparsity):
    got = allocation.uniform(SHAPES, sparsity)
    for name, size in SIZES.items():
        assert abs(got.removed[name] - size * sparsity) < 1


def test_shapes_scores_and_abstract_arrays_say_the_same():
    arrays = {"x": {"kernel": jnp.ones((4, 5)), "bias": None}, "y": jnp.ones((2, 3))}
    abstract = jax.eval_shape(lambda: arrays)
    shapes = {"x": {"kernel": (4, 5), "bias": None}, "y": (2, 3)}
    of_each = [allocation.uniform(tree, 0.4) for tree in (arrays, abstract, shapes)]
    assert of_each[0] == of_each[1] == of_each[2]
    assert of_each[0].removed == {"x/kernel": 8, "y": 2}


def erk_oracle(shapes, sparsity, power=1.0, kernel=True):
    """METHODS 15.9 by bisection of ε, where the rule solves for it and makes tensors dense."""
    dims = [np.array(shape if kernel else shape[-2:], np.float64) for shape in shapes.values()]
    raw = np.array([(d.sum() / d.prod()) ** power for d in dims])
    sizes = np.array([math.prod(shape) for shape in shapes.values()], np.float64)
    low, high = 0.0, 1e9
    for _ in range(200):
        epsilon = (low + high) / 2
        enough = (np.minimum(1, epsilon * raw) * sizes).sum() >= (1 - sparsity) * sizes.sum()
        low, high = (low, epsilon) if enough else (epsilon, high)
    return np.minimum(1, epsilon * raw), epsilon


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_erk_densities_are_those_of_the_formula(sparsity, power, kernel):
    # A total of whole weights at these sparsities, as the rule meets whole weights.
    shapes = {"a": (100, 200), "b": (200, 10), "c": (3, 3, 20, 40), "d": (20, 5, 8)}
    expected, epsilon = erk_oracle(shapes, sparsity, power, kernel)
    got, scale = allocation.erk_densities(shapes, sparsity, power=power, kernel=kernel)
    np.testing.assert_allclose(list(got.values()), expected, rtol=1e-9)
    assert scale == pytest.approx(epsilon, rel=1e-9)
    gone = allocation.erk(shapes, sparsity, power=power, kernel=kernel)
    for name, density in zip(shapes, expected, strict=True):
        assert abs(gone.removed[name] - (1 - density) * math.prod(shapes[name])) < 1 + 1e-6


def test_erk_gives_the_check_values():
    densities, scale = allocation.erk_densities({"a": (100, 200), "b": (200, 10)}, 0.8)
    assert densities == {
        "a": pytest.approx(0.129412, abs=1e-6),
        "b": pytest.approx(0.905882, abs=1e-6),
    }
    assert scale == pytest.approx(8.627451, abs=1e-6)


def test_erk_makes_small_tensors_dense_and_the_others_give():
    got = allocation.erk({"large": (1000, 1000), "small": (10, 4)}, 0.5)
    assert got.removed == {"large": 500_020, "small": 0}


def test_erk_without_sparsity_keeps_everything():
    assert allocation.erk(SHAPES, 0.0).removed_total == 0
    assert list(allocation.erk_densities(SHAPES, 0.0)[0].values()) == pytest.approx([1.0] * 4)


def test_table_gives_each_tensor_what_its_first_rule_says():
    got = allocation.table({"^a": 0.9, "kernel": 0.25, ".*": 0.0}, SHAPES)
    assert got.removed == {"a/kernel": 18_000, "b/kernel": 500, "c/kernel": 1152, "d": 0}


def test_table_scales_what_stays_to_meet_a_total():
    got = allocation.table({"^a": 0.9, "^b": 0.1, ".*": 0.5}, SHAPES, 0.85)
    keep = {"a/kernel": 0.1, "b/kernel": 0.9, "c/kernel": 0.5, "d": 0.5}
    factor = 0.15 * TOTAL / sum(keep[name] * size for name, size in SIZES.items())
    for name, size in SIZES.items():
        assert abs(size - got.removed[name] - factor * keep[name] * size) < 1
    full = allocation.table({"^a": 0.9, "^b": 0.1, ".*": 0.5}, SHAPES, 0.1)
    assert full.removed["b/kernel"] == full.removed["d"] == 0, "none keeps more than it has"
    exact(full, 0.1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: allocation.uniform(SHAPES, 1.0), "sparsity must be a number in"),
        (lambda: allocation.uniform(SHAPES, math.nan), "sparsity must be a finite number"),
        (lambda: allocation.uniform({"a": None}, 0.5), "no tensors were given"),
        (lambda: allocation.uniform({"a": (0, 3)}, 0.5), "no tensors were given"),
        (lambda: allocation.erk({"a": 3.0}, 0.5), "'a' must be an array or a shape, got 3.0"),
        (
            lambda: allocation.erk(SHAPES, 0.5, power=math.nan),
            "power must be a finite number, got nan",
        ),
        (lambda: allocation.table({"a/": 0.5}, SHAPES), "no rule of the table matches 'b/kernel'"),
        (lambda: allocation.table({".*": 0.5, "a": 0.1}, SHAPES), "rule 'a' matches no tensor"),
        (lambda: allocation.table({"(": 0.5}, SHAPES), "not a regular expression"),
        (lambda: allocation.table({".*": 1.5}, SHAPES), "sparsity must be a number in"),
    ],
)
def test_bad_shapes_and_rules_are_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


# ---- groups ----

NAMES = ["gpt2/h_0/up/kernel", "gpt2/h_0/attention/head_1/kernel", "gpt2/h_10/up/kernel",
         "encoder/layers/3/mlp/kernel", "encoder/layers/4/mlp/kernel", "block7/kernel",
         "readout/kernel"]  # fmt: skip


def test_a_block_is_the_first_numbered_component_of_the_path():
    assert allocation.grouped(NAMES) == {
        "gpt2/h_0": NAMES[:2], "gpt2/h_10": NAMES[2:3], "encoder/layers/3": NAMES[3:4],
        "encoder/layers/4": NAMES[4:5], "block7": NAMES[5:6], "readout/kernel": NAMES[6:],
    }  # fmt: skip


def test_groups_may_be_tensors_rules_or_a_function():
    assert allocation.grouped(NAMES, "tensor") == {name: [name] for name in NAMES}
    assert allocation.grouped(NAMES, {"first": "up", "rest": "."}) == {
        "first": [NAMES[0], NAMES[2]], "rest": [NAMES[1], *NAMES[3:]]
    }  # fmt: skip
    assert list(allocation.grouped(NAMES, lambda name: name[0])) == ["g", "e", "b", "r"]


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ("blok", "groups must be one of block, tensor, got 'blok'; did you mean 'block'"),
        ({"all": ".", "none": "up"}, "group 'none' has no tensors"),
        ({"some": "up"}, "is not in a group"),
        ({"some": "("}, "not a regular expression"),
    ],
)
def test_groups_that_do_not_cover_are_refused(groups, sentence):
    with pytest.raises(InputError, match=sentence):
        allocation.grouped(NAMES, groups)


# ---- rules of the scores ----


def random_scores(seed=0, ties=False):
    rng = np.random.default_rng(seed)
    scores = {
        "block_0": {"up": rng.gamma(2.0, size=(30, 40)), "down": rng.gamma(1.0, size=(40, 20))},
        "block_1": {"up": 3 * rng.gamma(0.5, size=(30, 40)), "bias": None},
        "readout": rng.random(size=(7, 11)),
    }
    return jax.tree.map(lambda x: jnp.asarray(x.round(1) if ties else x, jnp.float32), scores)


SCORES = random_scores()
SCORE_SIZES = {"block_0/down": 800, "block_0/up": 1200, "block_1/up": 1200, "readout": 77}


def flat(scores):
    """The scores as float64 numpy by name, in the order of jax's leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(scores)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in leaves
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.97])
def test_by_scores_is_what_global_selection_removes(sparsity, ties):
    scores = random_scores(ties=ties)
    got = allocation.by_scores(scores, sparsity)
    exact(got, sparsity, SCORE_SIZES)
    every = np.concatenate([x.ravel() for x in flat(scores).values()])
    # Of ties the first ones stay: the last come first among those that go.
    order = np.lexsort((-np.arange(every.size), every))[: got.removed_total]
    ends = np.cumsum(list(SCORE_SIZES.values()))
    counts = np.bincount(np.searchsorted(ends, order, side="right"), minlength=4)
    assert list(got.removed.values()) == counts.tolist()
    mask = masks.by_sparsity(scores, sparsity, "global")
    assert got.removed == {name: int((~m.astype(bool)).sum()) for name, m in flat(mask).items()}


@pytest.mark.parametrize("spread", [None, 1.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.6, 0.9])
def test_std_is_what_the_std_rule_removes(sparsity, spread):
    got = allocation.std(SCORES, sparsity, spread=spread)
    exact(got, sparsity, SCORE_SIZES)
    rate, achieved = allocation.rate_for_sparsity(SCORES, sparsity, spread=spread)
    assert achieved == got.sparsity
    for name, score in flat(SCORES).items():
        of = score.std(ddof=1) if spread is None else spread
        assert abs((score <= rate * of).sum() - got.removed[name]) <= 1, "float32 against float64"


def test_std_between_ties_takes_a_share_of_each():
    scores = {"a": jnp.array([1.0] * 6 + [9.0] * 2), "b": jnp.array([1.0] * 3 + [9.0])}
    got = [allocation.std(scores, n / 12, spread=1.0).removed for n in (0, 3, 6, 9, 10)]
    assert got == [
        {"a": 0, "b": 0}, {"a": 2, "b": 1}, {"a": 4, "b": 2}, {"a": 6, "b": 3}, {"a": 7, "b": 3}
    ]  # fmt: skip


BY_SCORE = {"by_scores": allocation.by_scores, "std": allocation.std}


@pytest.mark.parametrize("rule", BY_SCORE)
@given(first=share, second=share, ties=st.booleans())
@settings(max_examples=15, deadline=None)
def test_rules_of_scores_are_exact_and_monotone(rule, first, second, ties):
    less, more = sorted([first, second])
    scores = random_scores(ties=ties)
    low, high = BY_SCORE[rule](scores, less), BY_SCORE[rule](scores, more)
    exact(low, less, SCORE_SIZES)
    exact(high, more, SCORE_SIZES)
    slack = 0 if rule == "by_scores" else 1
    assert all(low.removed[name] <= high.removed[name] + slack for name in SCORE_SIZES)


@pytest.mark.parametrize("rule", BY_SCORE)
@pytest.mark.parametrize(
    ("scores", "sparsity", "sentence"),
    [
        ({"w": None}, 0.5, "no scores were given"),
        ({"w": jnp.zeros((0, 3))}, 0.5, "no scores were given"),
        ({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}, 0.5, "'b' have 1 NaN"),
        ({"a": jnp.ones(2, jnp.int32)}, 0.5, "must be floating-point arrays"),
        ({"a": jnp.ones(2)}, -0.5, "sparsity must be a number in"),
    ],
)
def test_bad_scores_are_refused(rule, scores, sparsity, sentence):
    with pytest.raises(InputError, match=sentence):
        BY_SCORE[rule](scores, sparsity)


def test_what_the_std_rule_cannot_reach_is_refused():
    with pytest.raises(InputError, match="removes at most 2 of 6 weights"):
        allocation.std({"a": jnp.ones(4), "b": jnp.array([1.0, 2.0])}, 0.5)


def test_an_allocation_inside_jit_is_refused():
    with pytest.raises(InputError, match=r"allocate outside jax.jit"):
        jax.jit(lambda scores: allocation.by_scores(scores, 0.5).sparsity)({"a": jnp.ones(3)})


# ---- OWL ----


def owl_ratios(scores, m):
    """METHODS 15.10: D of block_0, of block_1 and of the tensor outside of any block."""
    named = flat(scores)
    blocks = [["block_0/down", "block_0/up"], ["block_1/up"], ["readout"]]
    every = [np.concatenate([named[name].ravel() for name in names]) for names in blocks]
    return [100 * (a > m * a.mean()).mean() for a in every], [a.size for a in every]


def owl_oracle(outliers, sizes, sparsity, lam):
    """The formula, then one shift of all the blocks to the total, found by stepping down."""
    d = np.array(outliers)
    r = (d - d.min()) / (d.max() - d.min()) * 2 * lam
    wanted = 1 - (r - r.mean() + (1 - sparsity))
    shifts = np.linspace(-1, 1, 2_000_001)
    reached = sum(np.clip(w + shifts, 0, 1) * n for w, n in zip(wanted, sizes, strict=True))
    total = allocation.removed_count(sum(sizes), sparsity)
    return np.clip(wanted + shifts[np.argmin(np.abs(reached - total))], 0, 1)


@pytest.mark.parametrize("m", [1.5, 3.0])
@pytest.mark.parametrize(("sparsity", "lam"), [(0.5, 0.08), (0.7, 0.2), (0.05, 0.15), (0.95, 0.1)])
def test_owl_is_the_formula_shifted_to_the_total(sparsity, lam, m):
    got = allocation.owl(SCORES, sparsity, lam=lam, m=m)
    exact(got, sparsity, SCORE_SIZES)
    expected = owl_oracle(*owl_ratios(SCORES, m), sparsity, lam)
    of = dict(zip(SCORE_SIZES, expected[[0, 0, 1, 2]], strict=True))
    for name, size in SCORE_SIZES.items():
        assert abs(got.removed[name] - of[name] * size) <= 1 + 0.01


def test_owl_of_equal_blocks_is_the_published_formula():
    rng = np.random.default_rng(3)
    scores = {f"layer_{i}": {"w": jnp.asarray(rng.gamma(1 / (i + 1), size=(50, 40)), jnp.float32)}
              for i in range(4)}  # fmt: skip
    d = [100 * (a > 5 * a.mean()).mean() for a in flat(scores).values()]
    got = allocation.owl(scores, 0.7)
    expected = allocation.owl_sparsities(d, 0.7)
    assert np.ptp(expected) == pytest.approx(0.16)
    np.testing.assert_allclose(list(got.sparsities.values()), expected, atol=1 / 2000)


def test_owl_gives_the_check_value():
    got = allocation.owl_sparsities([1, 2, 4], 0.7, 0.08)
    np.testing.assert_allclose(got, [0.771111, 0.717778, 0.611111], atol=5e-7)


def test_owl_without_differences_is_uniform():
    assert allocation.owl_sparsities([3.0, 3.0], 0.6) == [0.6, 0.6]
    scores = {"block_0": jnp.ones((10, 10)), "block_1": jnp.ones((20, 10))}
    assert allocation.owl(scores, 0.6).removed == {"block_0": 60, "block_1": 120}


def test_a_score_at_the_bound_is_no_outlier():
    scores = {"block_0": jnp.ones(100), "block_1": jnp.array([0.0] * 50 + [2.0] * 50)}
    # Of mean 1 each: at m = 1 none of the first and half of the second exceed it.
    got = allocation.owl(scores, 0.5, m=1.0, lam=0.1)
    assert got.removed == {"block_0": 60, "block_1": 40}


def test_owl_groups_are_the_users():
    tensors = allocation.owl(SCORES, 0.6, m=1.5, groups="tensor").sparsities
    blocks = allocation.owl(SCORES, 0.6, m=1.5).sparsities
    assert blocks["block_0/up"] == pytest.approx(blocks["block_0/down"], abs=2 / 800)
    assert abs(tensors["block_0/up"] - tensors["block_0/down"]) > 0.01
    one = allocation.owl(SCORES, 0.6, groups={"all": "."})
    assert list(one.sparsities.values()) == pytest.approx([0.6] * 4, abs=1 / 77)


def test_owl_of_half_precision_counts_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), SCORES)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    assert allocation.owl(half, 0.6, m=2.0) == allocation.owl(full, 0.6, m=2.0)


@given(first=share, second=share, lam=st.floats(0, 0.5))
@settings(max_examples=25, deadline=None)
def test_owl_is_exact_and_monotone(first, second, lam):
    less, more = sorted([first, second])
    low = allocation.owl(SCORES, less, lam=lam, m=2.0)
    high = allocation.owl(SCORES, more, lam=lam, m=2.0)
    exact(low, less, SCORE_SIZES)
    exact(high, more, SCORE_SIZES)
    assert all(low.removed[name] <= high.removed[name] + 1 for name in SCORE_SIZES)


@pytest.mark.parametrize(
    ("scores", "options", "sentence"),
    [
        ({"a": jnp.array([1.0, jnp.nan])}, {}, "'a' have 1 NaN"),
        ({"a": jnp.array([1.0, jnp.inf])}, {}, "group 'a' are infinite"),
        ({"a": jnp.array([1.0, -1.0])}, {}, "group 'a' have negative values"),
        ({"a": None}, {}, "no scores were given"),
        ({"a": jnp.ones(2)}, {"lam": -1}, "lam = -1 is negative"),
        ({"a": jnp.ones(2)}, {"m": math.inf}, "m must be a finite number, got inf"),
        ({"a": jnp.ones(2)}, {"groups": {"x": "b"}}, "'a' is not in a group"),
    ],
)
def test_bad_input_of_owl_is_refused(scores, options, sentence):
    with pytest.raises(InputError, match=sentence):
        allocation.owl(scores, 0.5, **options)


# ---- ECoFLaP ----


def test_water_fill_gives_the_check_value():
    assert allocation.water_fill([1, 1, 8], [1000] * 3, 0.5, 0.6) == [430, 430, 640]
    assert allocation.water_fill([1, 1, 8], [1000] * 3, 0.5) == [430, 430, 640]


def test_a_full_group_leaves_its_share_to_the_others():
    # 100 left of 200: the first takes its room of 60, then 40 are shared as 1 : 3.
    assert allocation.water_fill([100, 1, 3], [100, 200, 200], 0.4, 0.6) == [100, 90, 110]


def test_what_rounding_up_overshoots_comes_back_from_the_fullest():
    # 1 left; rounding up gives one to each of three, and the fullest and the last give theirs back.
    assert allocation.water_fill([1, 1, 1], [2, 3, 3], 0.5, 0.7) == [1, 2, 1]


def test_groups_of_no_importance_share_what_is_left_by_room():
    assert allocation.water_fill([0, 0, 0], [100, 200, 300], 0.5, 0.6) == [50, 100, 150]
    # The first is full after 60 of the 180; the others matter nothing and share 120 by room.
    assert allocation.water_fill([1, 0, 0], [100, 200, 300], 0.3, 0.6) == [100, 128, 192]


@given(
    groups=st.lists(
        st.tuples(st.integers(10, 10**6), st.one_of(st.just(0.0), st.floats(1e-9, 1e9))),
        min_size=1, max_size=8,
    ),
    sparsity=st.floats(0, 0.99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_water_fill_is_exact_within_its_bounds(groups, sparsity):
    sizes, scores = [n for n, _ in groups], [score for _, score in groups]
    most = min(sparsity + 0.2, 1.0)
    keep = allocation.water_fill(scores, sizes, sparsity, most)
    assert sum(sizes) - sum(keep) == allocation.removed_count(sum(sizes), sparsity)
    for kept, size in zip(keep, sizes, strict=True):
        assert size - most * size - 1e-6 <= kept <= size


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (([1, 1], [10, 10], 0.5, 0.4), "max_sparsity = 0.4 is not between"),
        (([1, 1], [3, 3], 0.5, 0.5), "out of reach: groups that may lose 50.00% each"),
        (([1, math.nan], [10, 10], 0.5), "scores must be a sequence of finite numbers"),
        (([1, -1], [10, 10], 0.5), "importance -1 of a group"),
        (([1], [10], 1.0), "sparsity must be a number in"),
    ],
)
def test_what_cannot_be_filled_is_refused(args, sentence):
    with pytest.raises(InputError, match=sentence):
        allocation.water_fill(*args)


PROBED = {
    "block_0": {
        "down": jnp.full((8, 6), 0.5, jnp.float32),
        "up": jnp.full((6, 8), 2.0, jnp.float32),
        "bias": jnp.ones(8, jnp.float32),
    },
    "block_1": {"up": jnp.full((10, 12), -1.0, jnp.float32)},
}
PROBED_SIZES = {"block_0/down": 48, "block_0/up": 48, "block_1/up": 120}


def probe_batches(n=3):
    """Weights of a loss that is linear in the parameters, so that its difference is exact."""
    rng = np.random.default_rng(7)
    return [jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), PROBED)
            for _ in range(n)]  # fmt: skip


def linear_loss(params, batch):
    return sum(jnp.vdot(w, c) for w, c in zip(jax.tree.leaves(params), jax.tree.leaves(batch),
                                              strict=True))  # fmt: skip


def noise(name, number, shape, seed):
    key = jax.random.fold_in(jax.random.key(seed), number)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return np.asarray(jax.random.normal(key, shape), np.float64)


def probe_oracle(measure, seed):
    """METHODS 6.1 in float64: for a linear loss the difference quotient is |Σ c z| whatever ε."""
    sums = dict.fromkeys(PROBED_SIZES, 0.0)
    for number, batch in enumerate(probe_batches()):
        for name, c in flat(batch).items():
            if name in sums:
                g = abs((c * noise(name, number, c.shape, seed)).sum())
                w = flat(PROBED)[name]
                sums[name] += {"gradient": g, "weight_gradient": g * np.abs(w).sum(),
                               "weight_gradient_square": ((w * g) ** 2).sum()}[measure]  # fmt: skip
    return sums


@pytest.mark.parametrize("measure", ["gradient", "weight_gradient", "weight_gradient_square"])
def test_zeroth_order_importance_is_the_difference_quotient(measure):
    # ε of 1, as a linear loss has no curvature to avoid and float32 then loses no digits.
    got = allocation.zeroth_order_importance(
        linear_loss, PROBED, iter(probe_batches()), measure=measure, epsilon=1.0, seed=5
    )
    expected = probe_oracle(measure, 5)
    assert got.keys() == expected.keys(), "the bias is dense"
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def test_only_one_tensor_is_perturbed_and_both_ways():
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda p: seen.append(flat(p)), params, ordered=True)
        return linear_loss(params, batch)

    allocation.zeroth_order_importance(loss, PROBED, probe_batches(1), epsilon=0.25)
    jax.effects_barrier()
    assert len(seen) == 2 * len(PROBED_SIZES)
    for name, plus, minus in zip(PROBED_SIZES, seen[::2], seen[1::2], strict=True):
        for other, weight in flat(PROBED).items():
            step = 0.25 * noise(name, 0, weight.shape, 0) if other == name else 0
            np.testing.assert_allclose(plus[other], weight + step, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(minus[other], weight - step, rtol=1e-5, atol=1e-6)


def test_the_loss_is_compiled_once():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return linear_loss(params, batch)

    allocation.zeroth_order_importance(loss, PROBED, probe_batches(2))
    assert len(traces) == 1


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_ecoflap_fills_blocks_by_their_importance(reduce):
    got = allocation.ecoflap(
        linear_loss, PROBED, probe_batches(), 0.5, epsilon=1.0, seed=5, reduce=reduce
    )
    exact(got, 0.5, PROBED_SIZES)
    of = probe_oracle("gradient", 5)
    scores = [of["block_0/down"] + of["block_0/up"], of["block_1/up"]]
    if reduce == "mean":
        scores = [scores[0] / 96, scores[1] / 120]
    keep = allocation.water_fill(scores, [96, 120], 0.5)
    removed = list(got.removed.values())
    assert [removed[0] + removed[1], removed[2]] == [96 - keep[0], 120 - keep[1]]
    assert abs(removed[0] - removed[1]) <= 1, "tensors of a block lose the same share"
    assert got == allocation.ecoflap(
        linear_loss, PROBED, iter(probe_batches()), 0.5, epsilon=1.0, seed=5, reduce=reduce
    )


def test_another_seed_probes_in_other_directions():
    first, second = (
        allocation.zeroth_order_importance(linear_loss, PROBED, probe_batches(1), seed=seed)
        for seed in (0, 1)
    )
    assert all(first[name] != second[name] for name in PROBED_SIZES)


@pytest.mark.parametrize(
    ("loss", "batches", "options", "sentence"),
    [
        (linear_loss, [], {}, "no batches were given"),
        (lambda p, b: p["block_0"]["bias"], [0], {}, r"a scalar, got shape \(8,\)"),
        (lambda p, b: p["block_0"]["bias"][0] * b, [math.nan], {}, "the loss is nan on batch 0"),
        (linear_loss, [], {"measure": "gradint"}, "did you mean 'gradient'"),
        (linear_loss, [], {"reduce": "max"}, "reduce must be one of sum, mean, got 'max'"),
        (linear_loss, [], {"epsilon": 0.0}, "epsilon = 0.0 is not positive"),
        (linear_loss, [], {"max_sparsity": 0.1}, "max_sparsity = 0.1 is not between"),
        (linear_loss, [], {"prunable": jax.tree.map(lambda _: False, PROBED)}, "is prunable"),
    ],
)
def test_what_cannot_be_probed_is_refused(loss, batches, options, sentence):
    with pytest.raises(InputError, match=sentence):
        allocation.ecoflap(loss, PROBED, batches, 0.5, **options)


# ---- AlphaPruning ----


def random_weights(seed=1):
    rng = np.random.default_rng(seed)

    def heavy(rows, columns, power):
        return rng.normal(size=(rows, columns)) * np.arange(1, columns + 1) ** -power

    params = {
        "block_0": {"up": {"kernel": heavy(40, 24, 0.3), "bias": rng.normal(size=24)},
                    "down": {"kernel": heavy(20, 36, 0.1)}},
        "block_1": {"up": {"kernel": heavy(40, 24, 0.8)},
                    "attention": {"query": {"kernel": rng.normal(size=(18, 2, 9))}}},
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 10))},
    }  # fmt: skip
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


WEIGHTS = random_weights()
# The matrices of inputs by outputs that Flax's kernels are.
MATRICES = {
    "block_0/down/kernel": (20, 36), "block_0/up/kernel": (40, 24),
    "block_1/attention/query/kernel": (18, 18), "block_1/up/kernel": (40, 24),
    "conv/kernel": (36, 10),
}  # fmt: skip
WEIGHT_SIZES = {name: math.prod(shape) for name, shape in MATRICES.items()}


def alpha_oracle(tail=0.5):
    alphas = {}
    for name, shape in MATRICES.items():
        eigenvalues = np.linalg.svd(flat(WEIGHTS)[name].reshape(shape), compute_uv=False) ** 2
        k = math.ceil(tail * len(eigenvalues))
        top = np.sort(eigenvalues)[::-1][:k]
        alphas[name] = 1 + k / sum(math.log(top[i] / top[k - 1]) for i in range(k))
    return alphas


@pytest.mark.parametrize("tail", [0.25, 0.5, 1.0])
def test_tail_exponents_are_hills_of_the_squared_singular_values(tail):
    got, expected = allocation.tail_exponents(WEIGHTS, tail=tail), alpha_oracle(tail)
    assert got.keys() == expected.keys(), "the bias is dense"
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def test_hill_alpha_of_a_power_law_is_its_exponent():
    # Quantiles of a density ∝ λ^−3.5 above 1, in no order.
    quantiles = (1 - (np.arange(100_000) + 0.5) / 100_000) ** (-1 / 2.5)
    shuffled = np.random.default_rng(0).permutation(quantiles)
    assert allocation.hill_alpha(shuffled, 100_000) == pytest.approx(3.5, rel=1e-3)
    assert allocation.hill_alpha(shuffled, 10_000) == pytest.approx(3.5, rel=1e-3)
    scaled = allocation.hill_alpha(shuffled * 7, 500)
    assert scaled == pytest.approx(allocation.hill_alpha(shuffled, 500), rel=1e-12)


@pytest.mark.parametrize("groups", ["block", "tensor"])
@pytest.mark.parametrize(("sparsity", "epsilon"), [(0.5, 0.3), (0.7, 0.1), (0.9, 0.3), (0.6, 0.0)])
def test_alpha_pruning_is_linear_in_alpha_and_scaled_to_the_total(sparsity, epsilon, groups):
    got = allocation.alpha_pruning(WEIGHTS, sparsity, epsilon=epsilon, groups=groups)
    exact(got, sparsity, WEIGHT_SIZES)
    alphas, members = alpha_oracle(), allocation.grouped(WEIGHT_SIZES, groups)
    of = np.array([np.mean([alphas[name] for name in names]) for names in members.values()])
    x = 1 - epsilon + 2 * epsilon * (of - of.min()) / (of.max() - of.min())
    sizes = np.array([sum(WEIGHT_SIZES[name] for name in names) for names in members.values()])
    low, high = 0.0, 100.0
    for _ in range(200):  # η by bisection, where the rule solves for it
        eta = (low + high) / 2
        enough = (np.minimum(1, eta * x) * sizes).sum() >= sparsity * sizes.sum()
        low, high = (low, eta) if enough else (eta, high)
    for share_of, names in zip(np.minimum(1, eta * x), members.values(), strict=True):
        for name in names:
            assert abs(got.removed[name] - share_of * WEIGHT_SIZES[name]) < 1.5


def test_equal_exponents_are_uniform():
    params = {"block_0": {"conv": WEIGHTS["conv"]}, "block_1": {"conv": WEIGHTS["conv"]}}
    got = allocation.alpha_pruning(params, 0.5)
    assert got.removed == {"block_0/conv/kernel": 180, "block_1/conv/kernel": 180}
    assert allocation.alpha_shares([2.0, 2.0]) == [1.0, 1.0]


def test_eigenvalues_that_are_none_are_left_out():
    rng = np.random.default_rng(2)
    low_rank = rng.normal(size=(30, 6)) @ rng.normal(size=(6, 20))
    top = np.sort(np.linalg.svd(low_rank, compute_uv=False) ** 2)[::-1][:3]
    got = allocation.tail_exponents({"kernel": jnp.asarray(low_rank, jnp.float32)})
    assert got["kernel"] == pytest.approx(1 + 3 / np.log(top / top[-1]).sum(), rel=1e-5)


@given(first=share, second=share, epsilon=st.floats(0, 0.9))
@settings(max_examples=15, deadline=None)
def test_alpha_pruning_is_exact_and_monotone(first, second, epsilon):
    less, more = sorted([first, second])
    low = allocation.alpha_pruning(WEIGHTS, less, epsilon=epsilon)
    high = allocation.alpha_pruning(WEIGHTS, more, epsilon=epsilon)
    exact(low, less, WEIGHT_SIZES)
    exact(high, more, WEIGHT_SIZES)
    assert all(low.removed[name] <= high.removed[name] + 1 for name in WEIGHT_SIZES)


@pytest.mark.parametrize(
    ("weight", "options", "sentence"),
    [
        (np.zeros((4, 4)), {}, "'kernel' has no tail exponent: a tail of 0 of 0"),
        (np.ones((4, 4)), {}, "a tail of 1 of 1 eigenvalues"),
        (np.eye(4), {}, "got 1 to 1, which have no exponent"),
        (np.full((4, 4), np.inf), {}, "'kernel' has weights that are not finite"),
        (np.full((4, 4), np.nan), {}, "'kernel' has weights that are not finite"),
        (np.eye(4), {"epsilon": 1.0}, r"epsilon must be in \[0, 1\).* got 1.0"),
        (np.eye(4), {"tail": 0.0}, r"tail must be in \(0, 1\].* got 0.0"),
    ],
)
def test_weights_without_an_exponent_are_refused(weight, options, sentence):
    with pytest.raises(InputError, match=sentence):
        allocation.alpha_pruning({"kernel": jnp.asarray(weight, jnp.float32)}, 0.5, **options)


# ---- the registry ----


def quadratic_loss(params, batch):
    return batch * sum(jnp.vdot(w, w) for w in jax.tree.leaves(params))


GIVEN = {
    "params": WEIGHTS,
    "scores": jax.tree.map(lambda w: jnp.abs(w) if w.ndim > 1 else None, WEIGHTS),
    "curvature": jax.tree.map(lambda w: w**2 if w.ndim > 1 else None, WEIGHTS),
    "loss": quadratic_loss,
    "batches": [jnp.float32(1), jnp.float32(2)],
}
OPTIONS = {"table": {"rules": {"up": 0.7, ".*": 0.5}}, "owl": {"m": 2.0}}


@pytest.mark.parametrize("name", allocation.names())
def test_every_rule_is_exact_and_fits_the_masks(name):
    got = allocation.allocate(name, 0.6, **GIVEN, **OPTIONS.get(name, {}))
    exact(got, 0.6, WEIGHT_SIZES)
    counts = masks.summary(masks.by_sparsity(GIVEN["scores"], got))
    assert counts.sparsity == got.sparsity
    assert f"{got.removed_total:,}" in str(got).splitlines()[-1]


@pytest.mark.parametrize("name", allocation.names())
def test_a_rule_takes_only_what_it_needs_and_says_what_is_missing(name):
    rule = allocation.get(name)
    needs = {need: GIVEN["scores" if need == "shapes" else need] for need in rule.needs}
    options = OPTIONS.get(name, {})
    assert rule.function(**needs, sparsity=0.5, **options).removed_total == (
        allocation.removed_count(sum(WEIGHT_SIZES.values()), 0.5)
    )
    for need in rule.needs:
        given_else = {key: value for key, value in GIVEN.items() if key != need}
        if need == "shapes":
            given_else = {key: GIVEN[key] for key in ("loss", "batches")}
        with pytest.raises(InputError, match=f"allocation '{name}' needs {need}; pass "):
            allocation.allocate(name, 0.5, **given_else, **options)


def test_params_alone_give_the_shapes_of_the_prunable_weights():
    got = allocation.allocate("erk", 0.5, params=WEIGHTS)
    assert got == allocation.allocate("erk", 0.5, scores=GIVEN["scores"])
    rules = tree.prunable(WEIGHTS, include=("conv",))
    assert allocation.allocate("uniform", 0.5, params=WEIGHTS, prunable=rules).sizes == {
        "conv/kernel": 360
    }


def test_rules_of_weights_share_out_the_tensors_that_have_scores():
    scores = {**GIVEN["scores"], "conv": {"kernel": None}}
    got = allocation.allocate("alpha_pruning", 0.5, params=WEIGHTS, scores=scores)
    assert got.sizes == {name: n for name, n in WEIGHT_SIZES.items() if name != "conv/kernel"}


@pytest.mark.parametrize(
    ("name", "sparsity", "options", "sentence"),
    [
        ("unifrom", 0.5, {}, "allocation must be one of .*, got 'unifrom'; did you mean 'uniform'"),
        ("owl", 0.5, {"lamda": 0.1}, "allocation 'owl' has no option 'lamda'; its options: lam, m"),
        ("uniform", 0.5, {"lam": 0.1}, "its options: none"),
        ("table", 0.5, {}, "allocation 'table' needs the option 'rules'"),
        ("uniform", None, {}, "sparsity must be a finite number, got None"),
        ("erk", 1.5, {}, "sparsity must be a number .* got 1.5"),
    ],
)
def test_what_no_rule_can_do_is_refused(name, sparsity, options, sentence):
    with pytest.raises(InputError, match=sentence):
        allocation.allocate(name, sparsity, **GIVEN, **options)


def test_a_table_without_a_total_stands_as_it_is():
    got = allocation.allocate("table", None, scores=GIVEN["scores"], rules={".*": 0.25})
    assert got.removed == {name: n // 4 for name, n in WEIGHT_SIZES.items()}
