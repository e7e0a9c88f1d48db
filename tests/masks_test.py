import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from swe_prune import allocation, masks, tree
from swe_prune.errors import InputError

RNG = np.random.default_rng(0)


def lowest_removed(score, sparsity):
    """A mask in numpy that removes round(n · sparsity) of the lowest; of ties the last go first."""
    flat = np.asarray(score, np.float64).ravel()
    keep = flat.size - int(flat.size * sparsity + 0.5)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    return mask.reshape(np.shape(score))


def scores():
    return {
        "a/kernel": jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32),
        "b/kernel": jnp.asarray(RNG.normal(size=(4, 6)).round(1), jnp.float32),
        "attention": {"query": {"kernel": jnp.asarray(RNG.random((12, 2, 4)), jnp.float32)}},
        "out": {"kernel": jnp.asarray(RNG.random((2, 4, 12)), jnp.float32)},
        "dense": None,
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.6, 0.99])
def test_tensor_scope_removes_the_lowest_of_every_tensor(sparsity):
    given = scores()
    mask = masks.by_sparsity(given, sparsity)
    for name in ("a/kernel", "b/kernel"):
        np.testing.assert_array_equal(mask[name], lowest_removed(given[name], sparsity))
    assert mask["dense"] is None


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.6, 0.99])
def test_global_scope_removes_the_lowest_of_all_together(sparsity):
    given = scores()
    mask = masks.by_sparsity(given, sparsity, "global")
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(given)])
    got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(mask)])
    np.testing.assert_array_equal(got, lowest_removed(flat, sparsity))


@pytest.mark.quick(2)
@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.6), (0.7, 0.7), (0.6, 1.0), (0.3, 0.9)])
def test_no_tensor_loses_more_than_the_largest_sparsity(sparsity, most):
    given = scores()
    given["a/kernel"] = given["a/kernel"] - 10  # would lose everything first
    given["b/kernel"] = given["b/kernel"].at[0].set(-jnp.inf)  # what was 0 before
    mask = masks.by_sparsity(given, sparsity, "global", max_sparsity=most)
    flat = {name: np.ravel(leaf) for name, leaf in tree.named_leaves(given) if leaf is not None}
    kept = {name: np.ravel(leaf) for name, leaf in tree.named_leaves(mask) if leaf is not None}
    size = sum(leaf.size for leaf in kept.values())
    assert sum(int(leaf.sum()) for leaf in kept.values()) == size - int(size * sparsity + 0.5)
    # The best of every tensor, and the largest of all the others, as many as are missing.
    best = {
        name: np.argsort(-leaf, kind="stable")[: leaf.size - int(np.ceil(leaf.size * most - 1e-9))]
        for name, leaf in flat.items()
    }
    others = sorted(
        (-score, at, index)
        for at, (name, leaf) in enumerate(flat.items())
        for index, score in enumerate(leaf)
        if index not in best[name] and score > -np.inf
    )
    missing = size - int(size * sparsity + 0.5) - sum(map(len, best.values()))
    for at, name in enumerate(flat):
        expected = {*best[name], *(index for _, own, index in others[:missing] if own == at)}
        np.testing.assert_array_equal(np.flatnonzero(kept[name]), sorted(expected))
    allocated = allocation.by_scores(given, sparsity, max_sparsity=most)
    assert allocated.removed == {name: int((~leaf).sum()) for name, leaf in kept.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_row_scope_is_exact_in_every_output(sparsity):
    given = scores()
    mask = masks.by_sparsity(given, sparsity, "row")
    for score, kept, inputs in (
        (given["a/kernel"], mask["a/kernel"], 12),
        (given["attention"]["query"]["kernel"], mask["attention"]["query"]["kernel"], 12),
        (given["out"]["kernel"], mask["out"]["kernel"], 8),
    ):
        columns, of_each = score.reshape(inputs, -1), kept.reshape(inputs, -1)
        for c in range(columns.shape[1]):
            np.testing.assert_array_equal(of_each[:, c], lowest_removed(columns[:, c], sparsity))


def test_row_scope_of_a_vector_is_one_row():
    mask = masks.by_sparsity({"gain": jnp.arange(4.0)}, 0.5, "row")
    assert mask["gain"].tolist() == [False, False, True, True]


def test_row_scope_follows_other_layouts():
    score = jnp.asarray(RNG.random((3, 8)), jnp.float32)  # (out, in), as Equinox and PyTorch
    mask = masks.by_sparsity({"w": score}, 0.5, "row", input_axes=lambda name, shape: (-1,))
    for row, kept in zip(score, mask["w"], strict=True):
        np.testing.assert_array_equal(kept, lowest_removed(row, 0.5))


@pytest.mark.quick(3)
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("3:3", 0.0)])
@pytest.mark.parametrize("ties", [False, True])
def test_pattern_keeps_n_of_every_m_consecutive_inputs(pattern, sparsity, ties):
    n, m = map(int, pattern.split(":"))
    kernels = {"a/kernel": (12, 5), "query/kernel": (12, 2, 3), "out/kernel": (3, 4, 12)}
    given = {k: jnp.asarray(RNG.random(s).round(1 if ties else 9)) for k, s in kernels.items()}
    mask = masks.by_sparsity(given, sparsity, pattern=pattern)
    for name, score in given.items():
        groups = np.asarray(score).reshape(-1, m, {"out/kernel": 12}.get(name, score[0].size))
        kept = np.asarray(mask[name]).reshape(groups.shape)
        rank = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1)
        np.testing.assert_array_equal(kept, rank < n)


def test_pattern_runs_along_the_given_inputs():
    score = RNG.random((3, 8)).astype(np.float32)
    given = {"w": jnp.asarray(score)}
    mask = masks.by_sparsity(given, 0.5, pattern="2:4", input_axes=lambda name, shape: (1,))
    turned = masks.by_sparsity({"kernel": jnp.asarray(score.T)}, 0.5, pattern="2:4")
    np.testing.assert_array_equal(mask["w"], turned["kernel"].T)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.4, np.float32(2.0)])
def test_std_rule_compares_with_numpys_unbiased_deviation(rate):
    given = {k: jnp.abs(v) for k, v in scores().items() if k in ("a/kernel", "b/kernel")}
    mask = masks.by_std(given, rate)
    for name, score in given.items():
        wide = np.asarray(score, np.float64)
        np.testing.assert_array_equal(mask[name], wide > wide.std(ddof=1) * float(rate))


def test_std_rule_in_units_of_the_threshold():
    mask = masks.by_std({"w": jnp.array([0.5, 1.5, jnp.inf])}, 1.0, spread=1.0)
    assert mask["w"].tolist() == [False, True, True]


@pytest.mark.quick(3)
@pytest.mark.parametrize("make", [
    lambda s: masks.by_std(s, 0.5),
    lambda s: masks.by_sparsity(s, 0.4, "tensor"),
    lambda s: masks.by_sparsity(s, 0.4, "global"),
    lambda s: masks.by_sparsity(s, 0.4, "global", max_sparsity=0.45),
    lambda s: masks.by_sparsity(s, 0.4, "row"),
    lambda s: masks.by_sparsity(s, 0.5, pattern="2:4"),
])  # fmt: skip
def test_masks_made_inside_jit_are_those_made_outside(make):
    given = scores()
    inside, outside = jax.jit(make)(given), make(given)
    assert jax.tree.structure(inside) == jax.tree.structure(outside)
    jax.tree.map(np.testing.assert_array_equal, inside, outside)


MATRIX = {"kernel": jnp.arange(16.0).reshape(4, 4)}
NAN = {"kernel": jnp.ones((4, 4)), "b": {"kernel": jnp.ones((4, 4)).at[1, 2].set(jnp.nan)}}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: masks.by_sparsity(NAN, 0.5), "'b/kernel' have 1 NaN"),
        (lambda: masks.by_sparsity(NAN, 0.5, "global"), "'b/kernel' have 1 NaN"),
        (lambda: masks.by_sparsity(NAN, 0.5, "row"), "'b/kernel' have 1 NaN"),
        (lambda: masks.by_sparsity(NAN, 0.5, pattern="2:4"), "'b/kernel' have 1 NaN"),
        (lambda: masks.by_std(NAN, 0.5), "'b/kernel' have 1 NaN"),
        (lambda: masks.by_std({"w": jnp.array([1, jnp.inf])}, 1), "no standard deviation"),
        (lambda: masks.by_std({"w": jnp.array([1e38, 3e38])}, 1), "no standard deviation"),
        (lambda: masks.by_std({"w": jnp.zeros(3)}, 1), "prunes every weight"),
        (lambda: masks.by_std({"w": jnp.ones(3)}, -1), "rate must be a finite number"),
        (
            lambda: masks.by_std({"w": jnp.ones(3)}, np.float32("nan")),
            "rate must be a finite number",
        ),
        (lambda: masks.by_std({"w": jnp.ones(3)}, 1e39), "rate must be a finite number"),
        (lambda: masks.by_std({"w": jnp.ones(3)}, "1.4"), "rate must be a"),
        (lambda: masks.keep({"w": jnp.ones(3, bool)}, optax.sgd(1.0)), "optimizer .* got a dict"),
        (lambda: masks.apply({"w": jnp.ones(3)}, {"w": True}), "'w' is a single True"),
        (lambda: masks.by_std({"w": None}, 1), "no scores were given"),
        (lambda: masks.by_sparsity({"w": None}, 0.5), "no scores were given"),
        (lambda: masks.by_sparsity({"w": jnp.ones(3)}, 1.0), "must be a number in"),
        (lambda: masks.by_sparsity(MATRIX, 0.5, max_sparsity=0.9), "is for scope 'global'"),
        (lambda: masks.by_sparsity(MATRIX, 0.5, "global", max_sparsity=0.4), "asks for 8; raise"),
        (lambda: masks.by_sparsity(MATRIX, 0.5, "global", max_sparsity=1.1), r"in \(0, 1\]"),
        (
            lambda: masks.by_sparsity({"w": jnp.ones(3)}, 0.5, "layer"),
            "must be one of tensor, global",
        ),
        (lambda: masks.by_sparsity({"kernel": jnp.ones((6, 2))}, 0.5, pattern="2:4"), "6 inputs"),
        (lambda: masks.by_sparsity({"w": jnp.ones((8, 2))}, 0.4, pattern="2:4"), "not 0.4"),
        (lambda: masks.by_sparsity({"w": jnp.ones((8, 2))}, 0.5, pattern="2-4"), "must be 'n:m'"),
        (
            lambda: masks.by_sparsity({"w": jnp.ones(3)}, 0.5, "row", input_axes=lambda *_: (1,)),
            "give axes that it has",
        ),
        (lambda: masks.apply({"w": jnp.ones((2, 3))}, {"w": jnp.ones(3, bool)}), "mask of 'w'"),
        (lambda: masks.apply({"w": jnp.ones(3)}, {"v": jnp.ones(3, bool)}), "differ in structure"),
    ],
)
def test_what_has_no_answer_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_apply_leaves_exact_positive_zeros_and_the_dtype(dtype):
    weight = jnp.asarray([-1.0, jnp.inf, -jnp.inf, jnp.nan, -0.0, 2.0, -3.0], dtype)
    mask = jnp.asarray([False] * 5 + [True] * 2)
    got = masks.apply({"w": weight, "d": weight}, {"w": mask, "d": None})
    assert got["w"].dtype == dtype
    np.testing.assert_array_equal(got["w"], np.array([0, 0, 0, 0, 0, 2, -3]))
    assert not np.signbit(np.asarray(got["w"], np.float32)[:5]).any()
    assert got["d"] is weight


def test_apply_is_idempotent_and_takes_any_leaf_that_is_dense():
    params = [{"w": jnp.arange(4.0)}, jnp.tanh, "name", None, (3, 2.5)]
    mask = [{"w": jnp.arange(4) > 1}, None, None, None, (None, None)]
    once = masks.apply(params, mask)
    twice = masks.apply(once, mask)
    assert once[1:] == params[1:]
    np.testing.assert_array_equal(once[0]["w"], [0, 0, 2, 3])
    np.testing.assert_array_equal(twice[0]["w"], once[0]["w"])


def test_summary_counts_in_python_ints():
    mask = {"a": jnp.array([[True, False]]), "b": [jnp.ones(3, bool), None], "e": jnp.ones(0, bool)}
    got = masks.summary(mask)
    assert (got.kept, got.total, got.pruned, got.sparsity) == (4, 5, 1, 0.2)
    assert got.tensors["a"] == masks.Tally(1, 2)
    assert list(got.tensors) == ["a", "b/0", "e"]
    assert type(got.kept) is int
    assert masks.summary({"a": None}).sparsity == 0


def test_of_weights_that_are_all_dense_none_is_counted():
    assert masks.zeros({"w": jnp.zeros(3)}, {"w": None}) == 0
    assert int(masks.revived({"w": jnp.ones(3)}, {"w": None})) == 0


@pytest.mark.quick(3)
@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
@pytest.mark.parametrize("rounding", masks.ROUNDINGS)
def test_the_last_of_ties_are_the_first_of_what_is_reversed(scope, rounding):
    def reverse(tree_of):  # from the other end in every tensor, and of the tensors
        return {
            name: jnp.flip(leaf, 0 if scope == "row" else None)
            for name, leaf in zip(reversed(tree_of), tree_of.values(), strict=True)
        }

    few = {
        "a/kernel": jnp.asarray(RNG.normal(size=(9, 5)).round(), jnp.float32),
        "b/kernel": jnp.asarray(RNG.normal(size=(6, 4)).round(), jnp.float32),
    }
    got = masks.by_sparsity(few, 0.4, scope, rounding=rounding, ties="last")
    first = reverse(masks.by_sparsity(reverse(few), 0.4, scope, rounding=rounding))
    jax.tree.map(np.testing.assert_array_equal, got, first)
    plain = masks.by_sparsity(few, 0.4, scope, rounding=rounding)
    assert masks.summary(got).kept == masks.summary(plain).kept
    inside = jax.jit(lambda s: masks.by_sparsity(s, 0.4, scope, rounding=rounding, ties="last"))
    jax.tree.map(np.testing.assert_array_equal, got, inside(few))


def test_ties_within_a_pattern_are_broken_from_either_end():
    equal = {"kernel": jnp.ones((4, 1))}
    for ties, kept in (("first", [1, 1, 0, 0]), ("last", [0, 0, 1, 1])):
        for pattern in ("2:4", "block:1x1"):
            mask = masks.by_sparsity(equal, 0.5, pattern=pattern, ties=ties)
            assert mask["kernel"][:, 0].tolist() == kept


def test_an_unknown_way_to_break_ties_is_refused():
    with pytest.raises(
        InputError, match="ties must be one of first, last, got 'lats'; did you mean"
    ):
        masks.by_sparsity({"w": jnp.ones(3)}, 0.5, ties="lats")


def first_half(params):
    return jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) % 2 == 0, params)


PARAMS = {
    "up": {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), "bias": jnp.ones(4)},
    "down": [jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)],
}
MASK = {"up": {"kernel": first_half(PARAMS["up"]["kernel"]), "bias": None},
        "down": [first_half(PARAMS["down"][0])]}  # fmt: skip
MATRICES = {"up": {"kernel": True, "bias": False}, "down": [True]}

OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "adamw of bf16 moments": optax.adamw(0.1, mu_dtype=jnp.bfloat16),
    "nadam": optax.nadam(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lion": optax.lion(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
    "adafactor unfactored": optax.adafactor(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9, centered=True),
    "adagrad": optax.adagrad(0.1),
    "lamb": optax.lamb(0.1),
    "noisy sgd": optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "sm3": optax.sm3(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-0.1)),
    "multi_transform": optax.multi_transform(
        {"m": optax.adam(0.1), "o": optax.sgd(0.1, 0.9)},
        jax.tree.map(lambda matrix: "m" if matrix else "o", MATRICES),
    ),
    "masked": optax.masked(optax.adamw(0.1), MATRICES),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 2),
    "lookahead free ema": optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "schedule": optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
    "extra args": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
}


def gradients(t):
    return jax.tree.map(lambda x: jnp.cos(x * 7 + t) + 0.1, PARAMS)


def shaped_like_parameters(state):
    """The leaves of an optimizer state that are as large as a masked tensor, with its mask."""
    by_shape = {(6, 4): MASK["up"]["kernel"], (4, 6): MASK["down"][0]}
    for leaf in jax.tree.leaves(state):
        if jnp.shape(leaf) in by_shape:
            yield leaf, by_shape[jnp.shape(leaf)]


def assert_held(params, state):
    for weight, mask in ((params["up"]["kernel"], MASK["up"]["kernel"]),
                         (params["down"][0], MASK["down"][0])):  # fmt: skip
        assert (np.asarray(weight)[~np.asarray(mask)] == 0).all()
        assert (np.asarray(weight)[np.asarray(mask)] != 0).all()
    for moment, mask in shaped_like_parameters(state):
        assert (np.asarray(moment, np.float32)[~np.asarray(mask)] == 0).all()


def compiled_step(optimizer, **extra):
    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.quick(10)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_moments_are_0_after_every_step(name):
    optimizer = OPTIMIZERS[name]
    kept = masks.keep(optimizer, MASK)
    step = compiled_step(kept, **({"value": 1.0} if name == "extra args" else {}))
    params, state = PARAMS, kept.init(PARAMS)  # nowhere 0
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(PARAMS))
    for t in range(5):
        params, state = step(params, state, gradients(t))
        assert_held(params, state)


def squares(params):
    return sum(jnp.sum((leaf - 2.0) ** 2) for leaf in jax.tree.leaves(params))


SEARCHES = {
    "lbfgs": lambda: optax.lbfgs(memory_size=3),
    "lbfgs of a fixed step": lambda: optax.lbfgs(0.1, memory_size=3, linesearch=None),
    "backtracking": lambda: optax.chain(
        optax.sgd(0.1, momentum=0.9),
        optax.scale_by_backtracking_linesearch(10, store_grad=True),
    ),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", SEARCHES)
def test_line_searches_and_their_memory_are_held_too(name):
    kept = masks.keep(SEARCHES[name](), MASK)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(squares)(params)
        updates, state = kept.update(
            grads, state, params, value=value, grad=grads, value_fn=squares
        )
        return optax.apply_updates(params, updates), state, value

    params, state = masks.apply(PARAMS, MASK), kept.init(PARAMS)
    values = []
    for _ in range(4):
        params, state, value = step(params, state)
        values.append(float(value))
        assert int(masks.revived(params, MASK)) == 0
        for moment, mask in shaped_like_parameters(state):
            assert (np.asarray(moment)[~np.asarray(mask)] == 0).all()
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_moments_belong_to_the_parameter_with_the_longest_path():
    ones, first = jnp.ones(4), jnp.arange(4) < 1
    mask = {"w": first, "a": {"w": ~first}, "dense": {"w": None}}
    moments = jax.tree.map(lambda _: ones, mask, is_leaf=lambda leaf: leaf is None)
    state = (optax.TraceState(moments), {"count": jnp.int32(3), "w": jnp.ones(3)})
    held = masks.hold_moments(state, mask)
    assert held[0].trace["w"].tolist() == [1, 0, 0, 0]
    assert held[0].trace["a"]["w"].tolist() == [0, 1, 1, 1]
    assert held[0].trace["dense"]["w"].tolist() == [1, 1, 1, 1]
    assert held[1]["count"] == 3
    assert held[1]["w"].tolist() == [1, 1, 1]  # a path that ends alike, of another shape


def test_moments_of_a_bare_array_are_held():
    weights, mask = jnp.arange(1.0, 5.0), jnp.array([True, False, True, False])
    kept = masks.keep(optax.adam(0.1), mask)
    updates, state = kept.update(jnp.ones(4), kept.init(weights), weights)
    assert optax.apply_updates(weights, updates)[~mask].tolist() == [0, 0]
    assert state[0].count == 1
    assert (state[0].mu != 0).tolist() == mask.tolist()
    assert (state[0].nu != 0).tolist() == mask.tolist()


def test_moments_in_the_state_of_an_nnx_optimizer_are_held():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    first = jnp.arange(6).reshape(3, 2) < 2
    mask = jax.tree.map(lambda leaf: first if leaf.ndim == 2 else None, nnx.state(model, nnx.Param))
    held = jax.tree.leaves(masks.hold_moments(nnx.state(optimizer), mask))
    matrices = [np.asarray(leaf) != 0 for leaf in held if jnp.ndim(leaf) == 2]
    assert len(matrices) == 2
    for nonzero in matrices:
        np.testing.assert_array_equal(nonzero, first)
    assert all((np.asarray(leaf) != 0).all() for leaf in held if jnp.ndim(leaf) < 2)


def test_random_keys_in_a_state_stay():
    key = jax.random.key(0)
    held = masks.hold_moments({"noise": key, "w": jnp.ones(())}, {"noise": jnp.array(False)})
    assert held["noise"] == key


@pytest.mark.parametrize("name", ["sgd", "adamw", "MultiSteps", "masked", "multi_transform"])
def test_keep_can_be_swapped_in_and_out_in_the_middle_of_a_run(name):
    optimizer = OPTIMIZERS[name]
    plain, kept = compiled_step(optimizer), compiled_step(masks.keep(optimizer, MASK))
    params, state = PARAMS, optimizer.init(PARAMS)
    for t in range(4):
        params, state = plain(params, state, gradients(t))
    assert any((leaf[~mask] != 0).any() for leaf, mask in shaped_like_parameters(state))
    params, state = kept(params, state, gradients(4))
    assert_held(params, state)
    plain(params, state, gradients(5))


def test_parts_of_the_state_that_leave_out_whole_groups_are_held():
    optimizer = optax.masked(optax.adam(0.1), {"up": False, "down": True})  # a prefix of the tree
    step = compiled_step(masks.keep(optimizer, MASK))
    params, state = step(PARAMS, optimizer.init(PARAMS), gradients(0))
    assert_held(params, state)


def test_outside_jit_keep_gives_the_same():
    kept = masks.keep(optax.adamw(0.1), MASK)
    updates, state = kept.update(gradients(0), kept.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    assert_held(params, state)
    inside = compiled_step(kept)(PARAMS, kept.init(PARAMS), gradients(0))
    # rtol: of two compilations of one formula, the last digit may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), inside, (params, state))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_dense_tensors_are_trained_as_without_keep(name):
    optimizer, nothing = OPTIMIZERS[name], jax.tree.map(lambda _: None, PARAMS)

    def one_step(optimizer):
        return compiled_step(optimizer)(PARAMS, optimizer.init(PARAMS), gradients(0))

    plain, kept = one_step(optimizer), one_step(masks.keep(optimizer, nothing))
    jax.tree.map(np.testing.assert_array_equal, plain, kept)
    masked = one_step(masks.keep(optimizer, MASK))
    np.testing.assert_array_equal(masked[0]["up"]["bias"], plain[0]["up"]["bias"])


def test_nan_gradients_of_pruned_weights_reach_nothing():
    kept = masks.keep(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), MASK)
    grads = jax.tree.map(
        lambda g, m: g if m is None else jnp.where(m, g, jnp.nan),
        gradients(0), MASK, is_leaf=lambda x: x is None,
    )  # fmt: skip
    updates, state = kept.update(grads, kept.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("low", [jnp.bfloat16, jnp.float16])
def test_updates_of_fewer_digits_than_the_weights_still_give_exact_zeros(low):
    to_low = optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype(low), u))
    kept = masks.keep(optax.chain(optax.sgd(0.1), to_low), MASK)
    updates, state = kept.update(gradients(0), kept.init(PARAMS), PARAMS)
    assert_held(optax.apply_updates(PARAMS, updates), state)


def test_bfloat16_weights_stay_bfloat16_and_exact():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    kept = masks.keep(optax.adamw(0.1), MASK)
    updates, _ = kept.update(params, kept.init(params), params)
    new = optax.apply_updates(params, updates)
    assert new["down"][0].dtype == jnp.bfloat16
    assert (new["down"][0][~MASK["down"][0]] == 0).all()


def test_keep_without_parameters_holds_what_is_zero_already():
    kept = masks.keep(optax.sgd(0.1, 0.9), MASK)
    params = masks.apply(PARAMS, MASK)
    updates, state = kept.update(gradients(0), kept.init(params))
    assert_held(optax.apply_updates(params, updates), state)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lbfgs(),
        optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
        ),
    ],
    ids=["lbfgs", "backtracking"],
)
def test_line_searches_and_memories_of_several_steps_hold_zeros(optimizer):
    mask = {"layer": {"w": jnp.array([[True, False, True], [False, True, True]])}, "bias": None}
    target = {"layer": {"w": jnp.arange(1.0, 7.0).reshape(2, 3)}, "bias": jnp.array([2.0])}
    params = masks.apply(jax.tree.map(jnp.ones_like, target), mask)
    kept = masks.keep(optimizer, mask)

    def loss(params):
        return sum(
            jnp.sum((a - b) ** 2)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        )

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = kept.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state, before = kept.init(params), float(loss(params))
    for _ in range(3):
        params, state = step(params, state)
    assert int(masks.revived(params, mask)) == 0
    assert float(loss(params)) < before
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if "'w'" in jax.tree_util.keystr(path)
    ]
    assert moments or not any(jnp.ndim(leaf) > 1 for leaf in jax.tree.leaves(state))
    for moment in moments:
        assert not np.asarray(moment)[..., ~np.asarray(mask["layer"]["w"])].any()
