"""Blocks, rows, columns and neurons; sparsities that are traced; rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import allocation, masks, patterns
from swe_prune.errors import InputError

RNG = np.random.default_rng(1)


def kernel(*shape, ties=False):
    return jnp.asarray(RNG.random(shape).round(1 if ties else 9), jnp.float32)


def lowest_removed(values, gone):
    """Which of a float64 vector stay when `gone` of the lowest go, of ties the last first."""
    mask = np.zeros(len(values), bool)
    mask[np.argsort(-np.asarray(values), kind="stable")[: len(values) - gone]] = True
    return mask


def of_units(score, pattern, sparsity, reduce=np.sum):
    """In numpy, unit by unit: the mask of one (inputs, outputs) kernel."""
    score = np.asarray(score, np.float64)
    inputs, outputs = score.shape
    r, c = {"row": (inputs, 1), "column": (1, outputs)}.get(pattern) or tuple(
        map(int, pattern.removeprefix("block:").split("x"))
    )
    corners = [(i, j) for i in range(0, inputs, r) for j in range(0, outputs, c)]
    values = [reduce(score[i : i + r, j : j + c].ravel()) for i, j in corners]
    kept = lowest_removed(values, int(len(corners) * sparsity + 0.5))
    mask = np.zeros(score.shape, bool)
    for (i, j), keep in zip(corners, kept, strict=True):
        mask[i : i + r, j : j + c] = keep
    return mask


@pytest.mark.quick(6)
@pytest.mark.parametrize("pattern", ["block:2x4", "block:3x1", "block:12x8", "row", "column"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.45])
def test_units_go_whole_and_the_lowest_first(pattern, sparsity):
    score = kernel(12, 8)
    mask = masks.by_sparsity({"kernel": score}, sparsity, pattern=pattern)
    np.testing.assert_array_equal(mask["kernel"], of_units(score, pattern, sparsity))


@pytest.mark.parametrize(
    ("reduce", "by_numpy"),
    [
        ("mean", np.mean),
        ("max", np.max),
        ("l2", lambda x: np.sqrt((x**2).sum())),
        ("abs_sum", lambda x: np.abs(x.sum())),
    ],
)
def test_a_units_score_is_reduced_as_asked(reduce, by_numpy):
    score = kernel(12, 8) - 0.5
    mask = masks.by_sparsity({"kernel": score}, 0.4, pattern="block:4x2", reduce=reduce)
    np.testing.assert_array_equal(mask["kernel"], of_units(score, "block:4x2", 0.4, by_numpy))


def test_a_row_is_the_inputs_of_one_output_and_a_column_the_outputs_of_one_input():
    score = jnp.array([[1.0, 9.0], [9.0, 9.0], [9.0, 9.0]])  # (inputs, outputs) of Flax
    row = masks.by_sparsity({"kernel": score}, 0.5, pattern="row")["kernel"]
    column = masks.by_sparsity({"kernel": score}, 1 / 3, pattern="column")["kernel"]
    assert np.asarray(row).tolist() == [[False, True]] * 3
    assert np.asarray(column).tolist() == [[False, False], [True, True], [True, True]]


def test_blocks_of_an_attention_kernel_run_along_its_own_inputs():
    score = kernel(12, 2, 4)
    mask = masks.by_sparsity({"query/kernel": score}, 0.4, pattern="block:3x4")
    flat = of_units(np.asarray(score).reshape(12, 8), "block:3x4", 0.4)
    np.testing.assert_array_equal(np.asarray(mask["query/kernel"]).reshape(12, 8), flat)


def test_global_scope_ranks_the_units_of_all_tensors():
    a, b = kernel(4, 6), kernel(8, 2) * 0.5
    mask = masks.by_sparsity({"a/kernel": a, "b/kernel": b}, 0.5, "global", pattern="block:2x2")
    corners = [
        (name, i, j)
        for name, x in (("a/kernel", a), ("b/kernel", b))
        for i in range(0, x.shape[0], 2)
        for j in range(0, x.shape[1], 2)
    ]
    wide = {"a/kernel": np.asarray(a, np.float64), "b/kernel": np.asarray(b, np.float64)}
    kept = lowest_removed([wide[n][i : i + 2, j : j + 2].sum() for n, i, j in corners], 5)
    got = [bool(mask[n][i, j]) for n, i, j in corners]
    assert got == kept.tolist()


def feed_forward():
    return {
        "block_0": {"mlp": {"up": {"kernel": kernel(4, 10)}, "gate": {"kernel": kernel(4, 10)},
                            "down": {"kernel": kernel(10, 4)}},
                    "attention": {"query": {"kernel": kernel(4, 2, 2)}}},
        "block_1": {"mlp": {"up": {"kernel": kernel(4, 6)}, "down": {"kernel": kernel(6, 4)}}},
    }  # fmt: skip


@pytest.mark.parametrize("across", ["sum", "mean", "max", "prod", "first"])
def test_neurons_go_in_all_their_coupled_tensors(across):
    scores = feed_forward()
    mask = masks.by_sparsity(scores, 0.5, pattern="neuron", across=across)
    by_numpy = {"sum": np.sum, "mean": np.mean, "max": np.max, "prod": np.prod,
                "first": lambda x, axis: x[0]}[across]  # fmt: skip
    for block, names in (("block_0", ("up", "gate", "down")), ("block_1", ("up", "down"))):
        mlp = {n: np.asarray(scores[block]["mlp"][n]["kernel"], np.float64) for n in names}
        # In the order of the leaves: down, gate, up by name; "first" is that of the couplings.
        order = [n for n in sorted(names) if n != "down"] + ["down"]
        parts = np.stack([mlp[n].sum(int(n == "down")) for n in order])
        kept = lowest_removed(by_numpy(parts, axis=0), parts.shape[1] // 2)
        got = mask[block]["mlp"]
        for name in names:
            whole = np.asarray(got[name]["kernel"])
            expected = kept[:, None] if name == "down" else kept[None, :]
            np.testing.assert_array_equal(whole, np.broadcast_to(expected, whole.shape))
    assert mask["block_0"]["attention"]["query"]["kernel"] is None


def test_neurons_of_a_model_of_ones_own_take_its_couplings():
    scores = {"first/kernel": kernel(3, 5), "second/kernel": kernel(5, 2)}
    mask = masks.by_sparsity(
        scores, 0.4, pattern="neuron", couplings={"^first()/": "out", "^second()/": "in"}
    )
    np.testing.assert_array_equal(mask["first/kernel"][0], mask["second/kernel"][:, 0])
    assert int(mask["first/kernel"][0].sum()) == 3


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 0.984375, width=32), st.sampled_from(masks.ROUNDINGS))
def test_a_traced_sparsity_removes_what_the_same_number_does(sparsity, rounding):
    got = {scope: traced(jnp.float32(sparsity)) for scope, traced in TRACED[rounding].items()}
    for scope, mask in got.items():
        pattern = scope if ":" in scope else None
        expected = masks.by_sparsity(
            SCORES, sparsity, "tensor" if pattern else scope, pattern=pattern, rounding=rounding
        )
        jax.tree.map(np.testing.assert_array_equal, mask, expected)


SCORES = {"a/kernel": kernel(12, 8), "b/kernel": kernel(24, 7, ties=True)}
TRACED = {
    rounding: {
        scope: jax.jit(
            lambda s, scope=scope, rounding=rounding: masks.by_sparsity(
                SCORES, s, scope, rounding=rounding
            )
        )
        for scope in masks.SCOPES
    }
    for rounding in masks.ROUNDINGS
}


def test_a_traced_sparsity_compiles_once():
    scores = {"kernel": kernel(16, 8)}
    prune = jax.jit(lambda scores, s: masks.by_sparsity(scores, s, pattern="block:2x2"))
    for sparsity in (0.0, 0.3, 0.7):
        mask = prune(scores, jnp.float32(sparsity))
        np.testing.assert_array_equal(
            mask["kernel"], of_units(scores["kernel"], "block:2x2", sparsity)
        )
    assert prune._cache_size() == 1


@pytest.mark.parametrize("value", [0.3, np.float32(0.3), np.float64(0.3), jnp.float32(0.3)])
def test_a_sparsity_is_any_number(value):
    assert masks.summary(masks.by_sparsity({"w": kernel(10, 10)}, value)).pruned == 30


def test_rounding_down_is_that_of_wanda():
    score = kernel(7, 3)
    down = masks.by_sparsity({"kernel": score}, 0.4, "row", rounding="down")["kernel"]
    near = masks.by_sparsity({"kernel": score}, 0.4, "row")["kernel"]
    assert np.asarray(~down).sum(0).tolist() == [2, 2, 2]  # ⌊2.8⌋
    assert np.asarray(~near).sum(0).tolist() == [3, 3, 3]


def allocated(a, b):
    return allocation.Allocation({"a/kernel": a, "b/kernel": b}, {"a/kernel": 96, "b/kernel": 168})


def test_an_allocation_is_met_to_the_weight_in_tensors_and_in_rows():
    given = allocated(a=37, b=100)
    by_tensor = masks.by_sparsity(SCORES, given)
    by_row = masks.by_sparsity(SCORES, given, "row")
    for name, gone in given.removed.items():
        np.testing.assert_array_equal(
            np.ravel(by_tensor[name]), lowest_removed(np.ravel(SCORES[name]), gone)
        )
        columns = np.asarray(~by_row[name]).sum(0)
        assert columns.sum() == gone
        assert sorted(columns, reverse=True) == columns.tolist()
        assert columns.max() - columns.min() <= 1
        for c, of_one in enumerate(columns):
            np.testing.assert_array_equal(
                by_row[name][:, c], lowest_removed(SCORES[name][:, c], of_one)
            )


def test_an_allocation_of_blocks_is_met_to_the_nearest_block():
    given = allocation.Allocation({"kernel": 37}, {"kernel": 96})
    mask = masks.by_sparsity({"kernel": SCORES["a/kernel"]}, given, pattern="block:2x2")
    assert masks.summary(mask).pruned == 36  # 9.25 blocks of 4


W = {"kernel": kernel(8, 6)}
FF = {"up": {"kernel": kernel(4, 6)}, "down": {"kernel": kernel(6, 4)}}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: masks.by_sparsity(W, 0.5, pattern="blok:2x2"), "pattern must be"),
        (lambda: masks.by_sparsity(W, 0.5, pattern="rows"), "pattern must be .*'rows'; .*'row'"),
        (lambda: masks.by_sparsity(W, 0.5, pattern="block:0x2"), "R inputs and C outputs of 1"),
        (lambda: masks.by_sparsity(W, 0.5, pattern="block:3x2"), "8 inputs.* not a multiple.* 3"),
        (lambda: masks.by_sparsity(W, 0.5, pattern="block:2x4"), "6 outputs.* not a multiple.* 4"),
        (lambda: masks.by_sparsity(W, 0.5, pattern="row", reduce="l3"), "reduce must be .*'l3'"),
        (lambda: masks.by_sparsity(W, 0.5, pattern="row", across="su"), "across must be .*'su'"),
        (lambda: masks.by_sparsity(W, 0.5, "row", pattern="column"), "scope 'row' ranks"),
        (lambda: masks.by_sparsity(W, 0.5, rounding="up"), "rounding must be one of"),
        (lambda: masks.by_sparsity(W, 0.99, pattern="row"), "6 units of 8 weights, all of which"),
        (lambda: masks.by_sparsity({**W, "b/kernel": kernel(4, 4)}, 0.5, "global", pattern="row"),
         "cannot rank units of different sizes"),
        (lambda: masks.by_sparsity(W, 0.5, pattern="neuron"), "matches no scored tensor"),
        (lambda: masks.by_sparsity({"up": FF["up"], "down": {"kernel": kernel(5, 4)}}, 0.5,
                                   pattern="neuron"), "differ in their number of neurons"),
        (lambda: masks.by_sparsity(FF, 0.5, pattern="neuron", couplings={"(up)": "out"}),
         "coupled on one side only"),
        (lambda: masks.by_sparsity(FF, 0.5, pattern="neuron", couplings={"(": "out"}),
         "not a regular expression"),
        (lambda: masks.by_sparsity(FF, 0.5, pattern="neuron", couplings={"up": "over"}),
         "must be one of in, out, got"),
        (lambda: masks.by_sparsity(SCORES, allocated(a=1, b=2), "global"), "would overrule"),
        (lambda: masks.by_sparsity(W, allocated(a=1, b=2)), "the allocation has None weights"),
        (lambda: masks.by_sparsity(SCORES, allocated(a=1, b=2), pattern="2:4"), "an allocation"),
        (lambda: jax.jit(lambda s: masks.by_sparsity(W, s, pattern="2:4"))(0.5), "a traced share"),
    ],
)  # fmt: skip
def test_what_has_no_answer_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_the_blocks_of_a_pattern_and_couplings_read_as_documented():
    assert patterns.parse_block("block:16x1") == (16, 1)
    assert list(patterns.couple(["x/up/kernel", "x/down/kernel"], patterns.FEED_FORWARD)) == ["x/"]
