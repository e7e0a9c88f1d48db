"""What every criterion, rule and kind of pytree keeps to; a new registered name joins by itself."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from swe_prune import allocation, importance, masks, trajectory, tree
from swe_prune.errors import InputError
from swe_prune.layout import Axes, axes_of, layout, split

MEASURES = tuple(trajectory.BUFFERS)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(5, 8, name="embed")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(5, name="head")(nn.Dense(8, name="up")(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        return self.up(self.attention(self.embed(tokens)))


class Pair(NamedTuple):
    left: Any
    right: Any


class Module(eqx.Module):
    """Weights as (out, in), a function among the leaves and one that is not a leaf."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    activation: Any
    name: str = eqx.field(static=True)


def equinox_module():
    keys = jax.random.split(jax.random.key(0))
    return Module(eqx.nn.Linear(8, 12, key=keys[0]), eqx.nn.Linear(12, 8, key=keys[1]), jnp.tanh,
                  "module")  # fmt: skip


def matrix(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(8, 12)), jnp.float32)


def scanned():
    """Three layers stacked in front, or at axis 1, with a gain that is 1-D in each of them."""
    rng = np.random.default_rng(2)
    shapes = {"up": (3, 8, 12), "down": (12, 3, 8), "gain": (3, 8)}
    return {"layers": {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}}


def run_scanned(params, x):
    def layer(x, own):
        up, down, gain = own
        return x * gain + jnp.tanh(x @ up) @ down, None

    own = params["layers"]
    rows = (own["up"], jnp.moveaxis(own["down"], 1, 0), own["gain"])
    return jax.lax.scan(layer, x.astype(own["up"].dtype), rows)[0]


def experts():
    """Three experts with a gated unit, stored as PyTorch would store the last, and their router."""
    rng = np.random.default_rng(3)
    shapes = {"router": (8, 3), "in": (3, 8, 12), "out": (3, 8, 12)}
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def run_experts(params, x):
    gate, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 1)
    sent = jnp.einsum("bd,bke->ebd", x, jax.nn.one_hot(chosen, 3))
    inside = jnp.tanh(jnp.einsum("ebd,edh->ebh", sent, params["in"]))
    return jnp.einsum("ebh,eoh->ebo", inside, params["out"]).sum(0) * gate


def run_two(first, second, x):
    return jnp.tanh(x @ first) @ second.T


TREES = {
    "linen": lambda: jax.jit(Linen().init)(jax.random.key(0), jnp.zeros((1, 3), int)),
    "nnx": jax.jit(lambda: nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)),
    "lists": lambda: [{"w": matrix(0)}, [matrix(1), jnp.ones(3)], None],
    "tuples": lambda: (Pair(matrix(0), (matrix(1), jnp.ones(3))), jnp.arange(4)),
    "equinox": lambda: eqx.filter(equinox_module(), eqx.is_inexact_array),
    "scanned": scanned,
    "experts": experts,
}
ROWS = np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)
TOKENS = np.array([[0, 3, 4]])
RUN = {
    "linen": lambda: (Linen(), TOKENS),
    "nnx": lambda: (Nnx(nnx.Rngs(0)), TOKENS),
    "lists": lambda: (lambda p, x: run_two(p[0]["w"], p[1][0], x), ROWS),
    "tuples": lambda: (lambda p, x: run_two(p[0].left, p[0].right[0], x), ROWS),
    "equinox": lambda: (lambda p, x: jax.vmap(lambda x: p.down(p.up(x)))(x), ROWS),
    "scanned": lambda: (run_scanned, ROWS),
    "experts": lambda: (run_experts, ROWS),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# The other kinds of trees, and these in the other precision, are slow.
QUICK = [("linen", "float32"), ("nnx", "float32"), ("equinox", "float32"), ("scanned", "bfloat16")]
KINDS = [
    pytest.param(both, marks=[] if both in QUICK else pytest.mark.slow)
    for both in itertools.product(TREES, DTYPES)
]
RULES = {
    "tensor": lambda s, axes: masks.by_sparsity(s, 0.37, "tensor", layout=axes),
    "global": lambda s, axes: masks.by_sparsity(s, 0.37, "global", layout=axes),
    "row": lambda s, axes: masks.by_sparsity(s, 0.37, "row", layout=axes),
    "2:4": lambda s, axes: masks.by_sparsity(s, 0.5, pattern="2:4", layout=axes),
}


def made(kind, dtype):
    return jax.tree.map(
        lambda x: x.astype(DTYPES[dtype]) if tree.is_weight(x) else x, TREES[kind]()
    )


@functools.cache
def traced(kind):
    """The layout of a kind of tree, traced from the function that uses it."""
    fn, batch = RUN[kind]()
    return layout(fn, TREES[kind](), batch)


@functools.partial(jax.jit, static_argnums=1)
def tracked(params, prunable):
    """Returns what three snapshots leave: parameters, statistics and the state of Adam."""

    def snapshot(t, carry):
        params, stats = carry
        params = jax.tree.map(
            lambda x: x + (jnp.sin(x * 9 + t) * 0.3).astype(x.dtype) if tree.is_weight(x) else x,
            params,
        )
        return params, trajectory.update(stats, params)

    marks = jax.tree.unflatten(*prunable)
    stats = trajectory.init(params, MEASURES, prunable=marks)
    params, stats = jax.lax.fori_loop(0, 3, snapshot, (params, stats))
    floats = jax.tree.map(lambda x: x if tree.is_weight(x) else None, params)
    grads, adam = jax.tree.map(lambda x: jnp.cos(9 * x), floats), optax.adam(1e-3)
    _, opt_state = adam.update(grads, adam.init(floats), floats)
    return params, stats, opt_state


def measured(params, prunable, axes):
    """What calibration gives, in its shapes; the Hessian has an inverse."""

    def like(seed, sign=1):
        def leaf(name, weight, chosen):
            if not chosen:
                return None
            rng = np.random.default_rng([seed, *name.encode()])
            drawn = rng.normal(size=weight.shape)
            return jnp.asarray(np.abs(drawn) if sign else drawn, jnp.float32)

        return tree.map_named(leaf, params, prunable)

    of = axes_of(axes)

    def inputs(name, weight, chosen, hessian):
        if not chosen:
            return None
        own = of(name, weight.shape)
        copies, inputs = ([weight.shape[a] for a in some] for some in (own.copies, own.inputs))
        count = int(np.prod(inputs))
        x = np.random.default_rng(list(name.encode())).normal(size=(*copies, 3 * count, count))
        if hessian:
            return jnp.asarray(2 / 3 * np.swapaxes(x, -1, -2) @ x, jnp.float32)
        norm = np.linalg.norm(x, axis=-2).reshape(*copies, *inputs)
        order = np.argsort((*own.copies, *own.inputs))
        shape = [1 if axis in own.outputs else n for axis, n in enumerate(weight.shape)]
        return jnp.asarray(np.transpose(norm, order).reshape(shape), jnp.float32)

    return {
        "gradient": like(1, sign=0),
        "gradient_square": like(2),
        "learned": like(3, sign=0),
        "input_norm": tree.map_named(lambda *a: inputs(*a, hessian=False), params, prunable),
        "hessian": tree.map_named(lambda *a: inputs(*a, hessian=True), params, prunable),
    }


@dataclasses.dataclass
class Trained:
    """Parameters, and all that a criterion may need beside them."""

    params: Any
    stats: Any
    opt_state: Any
    measured: Any
    prunable: Any
    layout: Any
    kind: str = ""

    def score(self, name, params=None, stats=None, opt_state=None):
        return importance.score(
            name,
            self.params if params is None else params,
            stats=self.stats if stats is None else stats,
            opt_state=self.opt_state if opt_state is None else opt_state,
            measured=self.measured,
            prunable=self.prunable,
            layout=self.layout,
        )


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def trained(request):
    kind, axes = request.param[0], traced(request.param[0])
    params = made(*request.param)
    prunable = tree.prunable(params, layout=axes)
    marks, structure = jax.tree.flatten(prunable)
    params, stats, opt_state = tracked(params, (structure, tuple(marks)))
    given = measured(params, prunable, axes)
    return Trained(params, stats, opt_state, given, prunable, axes, kind)


def leaves(of):
    """Leaves by name, of which nnx drops those that are None."""
    return {name: leaf for name, leaf in tree.named_leaves(of) if leaf is not None}


def chosen(prunable):
    return {name for name, leaf in leaves(prunable).items() if leaf}


def assert_on_prunable_alone(of, params, prunable, dtype):
    assert set(leaves(of)) == chosen(prunable)
    for name, leaf in leaves(of).items():
        assert leaf.dtype == dtype, name
        assert leaf.shape == leaves(params)[name].shape, name


def test_statistics_are_float32_and_none_where_dense(trained):
    assert chosen(trained.prunable)
    for measure in MEASURES:
        read = trajectory.read(trained.stats, measure)
        assert_on_prunable_alone(read, trained.params, trained.prunable, jnp.float32)


SIGNED = {"movement"}  # learned scores, of which the largest stay, whatever their sign
INFINITE = {"bezier", "bezier_swe"}  # +inf: what no control value would ever remove


@pytest.fixture(scope="module")
def scored(trained):
    return {name: trained.score(name) for name in importance.names()}


@pytest.fixture(scope="module")
def scored_in_jit(trained):
    """The same from one program, which compiles faster than one for each criterion."""

    @jax.jit
    def score(*given):
        return {name: trained.score(name, *given) for name in importance.names()}

    return score(trained.params, trained.stats, trained.opt_state)


@pytest.mark.parametrize("name", importance.names())
def test_scores_are_float32_none_where_dense_and_the_same_in_jit(
    trained, scored, scored_in_jit, name
):
    scores, inside = scored[name], scored_in_jit[name]
    assert_on_prunable_alone(scores, trained.params, trained.prunable, jnp.float32)
    for path, leaf in leaves(scores).items():
        gone = np.asarray(leaves(trained.params)[path] == 0)  # by chance, in bfloat16
        np.testing.assert_array_equal(np.isneginf(leaf), gone)
        there = np.asarray(leaf)[~gone]
        assert np.isfinite(there).all() or (name in INFINITE and not np.isnan(there).any())
        assert (there >= 0).all() or name in SIGNED
    assert set(leaves(inside)) == set(leaves(scores))
    for path, leaf in leaves(inside).items():
        # rtol: fused or not, the same formula may differ in its last digit; atol: or, where two
        # terms cancel, in the last digit of the terms.
        np.testing.assert_allclose(leaf, leaves(scores)[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", [n for n in importance.names() if importance.get(n).needs])
def test_a_need_that_is_not_given_is_named_with_the_way_to_get_it(name):
    needs = [n for n in importance.get(name).needs if n not in ("weight", "key", "inputs")]
    if not needs:
        importance.score(name, {"kernel": matrix(0)})
        return
    with pytest.raises(InputError, match=needs[0]) as error:
        importance.score(name, {"kernel": matrix(0)})
    assert "pass" in str(error.value) or "track" in str(error.value)


@functools.cache
def compiled(kind, rule):
    """One program for all the criteria, whose scores are of one structure."""
    return jax.jit(lambda scores: RULES[rule](scores, traced(kind)))


@pytest.mark.parametrize("rule", RULES)
def test_masks_keep_the_requested_count_in_and_outside_jit(trained, scored, rule):
    params, prunable = trained.params, trained.prunable
    for scores in scored.values():
        outside = RULES[rule](scores, trained.layout)
        inside = compiled(trained.kind, rule)(scores)
        assert_on_prunable_alone(outside, params, prunable, bool)
        counts = masks.summary(outside)
        assert counts.kept == expected_kept(leaves(scores), rule, trained.layout)
        for path, leaf in leaves(inside).items():
            np.testing.assert_array_equal(leaf, leaves(outside)[path], err_msg=path)


def expected_kept(scores, rule, axes):
    """In numpy: n of m of every group; else what is left when the nearest share is removed."""
    if rule == "2:4":
        return sum(leaf.size for leaf in scores.values()) // 2
    if rule == "global":
        sizes = [(sum(leaf.size for leaf in scores.values()), 1)]
    elif rule == "tensor":
        sizes = [(leaf.size, 1) for leaf in split(scores, axes).values()]
    else:
        inputs = [
            int(np.prod([leaf.shape[axis] for axis in axes_of(axes)(name, leaf.shape).inputs]))
            for name, leaf in scores.items()
        ]
        sizes = [(n, leaf.size // n) for n, leaf in zip(inputs, scores.values(), strict=True)]
    return sum(times * (n - int(n * 0.37 + 0.5)) for n, times in sizes)


@pytest.mark.parametrize("name", [n for n in allocation.names() if n != "table"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_every_allocation_meets_the_total_to_the_weight(trained, scored, name, scope):
    def loss(params, batch):
        weights = [leaf for leaf in jax.tree.leaves(params) if tree.is_weight(leaf)]
        return sum(jnp.mean(jnp.sin(batch * w.astype(jnp.float32))) for w in weights)

    scores = scored["magnitude"]
    shared = allocation.allocate(
        name,
        0.37,
        scores=scores,
        curvature=scores,
        params=trained.params,
        loss=loss,
        batches=[jnp.float32(3.0)],
        layout=trained.layout,
    )
    sizes = {path: leaf.size for path, leaf in split(leaves(scores), trained.layout).items()}
    assert shared.sizes == sizes
    assert sum(shared.removed.values()) == int(sum(sizes.values()) * 0.37 + 0.5)
    mask = masks.by_sparsity(scores, shared, scope, layout=trained.layout)
    pruned = {
        path: int((~leaf).sum()) for path, leaf in split(leaves(mask), trained.layout).items()
    }
    assert pruned == shared.removed


def test_std_rule_gives_masks_for_every_criterion(trained, scored):
    for name, scores in scored.items():
        mask = masks.by_std(scores, 0.7, spread=importance.get(name).spread, layout=trained.layout)
        assert_on_prunable_alone(mask, trained.params, trained.prunable, bool)
        assert masks.summary(mask).kept > 0


def test_applied_masks_keep_structure_and_dtypes(trained, scored):
    params = trained.params
    mask = masks.by_sparsity(scored["magnitude"], 0.5)
    applied = masks.apply(params, mask)
    assert jax.tree.structure(applied) == jax.tree.structure(params)
    for name, leaf in leaves(applied).items():
        before = leaves(params)[name]
        assert leaf.dtype == before.dtype
        kept = leaves(mask).get(name, True)
        np.testing.assert_array_equal(leaf, jnp.where(kept, before, 0))


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, momentum=0.9),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "masked": lambda: optax.masked(
        optax.adam(1e-2), lambda p: jax.tree.map(lambda x: x.ndim >= 2, p)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_with_keep_trains_every_tree_in_a_step_of_ones_own(trained, name):
    floats = jax.tree.map(lambda x: x if tree.is_weight(x) else None, trained.params)
    mask = masks.by_sparsity(importance.score("magnitude", floats), 0.5)
    optimizer = OPTIMIZERS[name]()

    @jax.jit
    def step(params, state, mask):
        grads = jax.tree.map(lambda x: jnp.cos(9 * x) + 0.5, params)
        updates, state = masks.keep(optimizer, mask).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, masks.revived(params, mask)

    params, state = masks.apply(floats, mask), optimizer.init(floats)
    for _ in range(3):
        params, state, revived = step(params, state, mask)
        assert int(revived) == 0
    trained_leaves, start = leaves(params), leaves(floats)
    for path, kept in leaves(mask).items():
        assert (np.asarray(trained_leaves[path])[~np.asarray(kept)] == 0).all()
        assert trained_leaves[path].dtype == start[path].dtype
    moved = [(trained_leaves[n] != start[n]).any() for n in leaves(mask)]
    assert all(moved)


def test_without_keep_momentum_revives_what_was_pruned():
    params = {"w": matrix(0)}
    mask = masks.by_sparsity(importance.score("magnitude", params), 0.5)
    params, optimizer = masks.apply(params, mask), optax.adam(1e-2)
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)({"w": matrix(1)}, state, params)
    assert int(masks.revived(optax.apply_updates(params, updates), mask)) == 48


def test_leaves_that_are_no_arrays_are_dense_everywhere():
    params = {"w": matrix(0), "f": jnp.tanh, "name": "linear", "n": 3, "none": None, "rate": 0.1}
    stats = trajectory.update(trajectory.init(params, MEASURES), params)
    prunable = tree.prunable(params)
    moments = {"w": optax.ScaleByAdamState(jnp.int32(1), {"w": matrix(1)}, {"w": matrix(2) ** 2})}
    axes = {**dict.fromkeys(params), "w": Axes((0,), (1,))}
    given = Trained(params, stats, moments, measured(params, prunable, axes), prunable, axes)
    for name in importance.names():
        mask = masks.by_sparsity(given.score(name), 0.5)
        applied = masks.apply(params, mask)
        assert {key: applied[key] for key in params if key != "w"} == {
            key: params[key] for key in params if key != "w"
        }
        assert masks.summary(mask).tensors == {"w": masks.Tally(48, 96)}


@pytest.mark.parametrize("given", ["layout", "input_axes"])
def test_an_equinox_module_is_pruned_whole_with_its_own_layout(given):
    module = equinox_module()
    scores = importance.score("magnitude", module)
    way: dict[str, Any] = {"input_axes": lambda name, shape: (1,)}
    if given == "layout":
        way = {"layout": layout(lambda m, x: jax.vmap(m.up)(x) @ m.down.weight.T, module, ROWS)}
    mask = masks.by_sparsity(scores, 0.5, pattern="2:4", **way)
    pruned = masks.apply(module, mask)
    assert pruned.name == "module"
    assert pruned.activation is jnp.tanh
    rows = np.asarray(pruned.up.weight).reshape(12, 2, 4)  # (out, in) in groups of 4 inputs
    assert ((rows != 0).sum(-1) == 2).all()
    assert jnp.isfinite(pruned.down(pruned.up(jnp.ones(8)))).all()
