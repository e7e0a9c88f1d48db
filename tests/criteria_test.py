"""Every criterion against its formula in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swe_prune import importance, masks, trajectory
from swe_prune.errors import InputError
from swe_prune.importance import bezier as bezier_lib

SHAPE = (12, 10)
RNG = np.random.default_rng(3)
THETA = np.cumsum(RNG.normal(size=(9, *SHAPE)) * 0.3, axis=0).astype(np.float32)  # θ(0) … θ(8)
WIDE = THETA.astype(np.float64)
GRAD = RNG.normal(size=SHAPE).astype(np.float32)
SQUARE = (RNG.normal(size=SHAPE) ** 2).astype(np.float32)
LEARNED = RNG.normal(size=SHAPE).astype(np.float32)


def stats():
    tracked = trajectory.init({"kernel": THETA[0]}, tuple(trajectory.BUFFERS))
    for theta in THETA[1:]:
        tracked = trajectory.update(tracked, {"kernel": theta})
    return tracked


def score(name, **options):
    return importance.score(
        name,
        {"kernel": jnp.asarray(THETA[-1])},
        stats=stats(),
        measured={
            "second_moment": {"kernel": SQUARE},
            "gradient": {"kernel": GRAD},
            "gradient_square": {"kernel": SQUARE},
            "learned": {"kernel": LEARNED},
        },
        **options,
    )["kernel"]


W, SEEN, V, G = WIDE[-1], WIDE[1:], SQUARE.astype(np.float64), GRAD.astype(np.float64)
LATE = np.average(SEEN, axis=0, weights=np.sqrt(np.arange(1, 9)))
MEAN, STD = SEEN.mean(0), SEEN.std(0)
PATH = np.abs(np.diff(WIDE, axis=0)).sum(0)
MOVED = WIDE[-1] - WIDE[0]
FORMULAS = {
    "magnitude": (np.abs(W), {}),
    "swe": (np.abs(LATE), {}),
    "mean": (np.abs(MEAN), {}),
    "forecast": (np.abs(W + 0.5 * (W - LATE)), {}),
    "forecast far": (np.abs(W + 2 * (W - LATE)), {"horizon": 2.0}),
    "forecast back": (np.abs(LATE), {"horizon": -1.0}),
    "stability": (np.abs(MEAN) / STD, {}),
    "variance": (STD**2, {}),
    "path_length": (PATH, {}),
    "displacement": (np.abs(MOVED), {}),
    "sign_flips": (1 / (1 + (WIDE[1:] * WIDE[:-1] < 0).sum(0)), {}),
    "last": (np.abs(W), {}),
    "magnitude_curvature": (W**2 * np.sqrt(V), {}),
    "magnitude_curvature of optimal brain damage": (W**2 * V, {"power": 1.0}),
    "swe_curvature": (LATE**2 * np.sqrt(V), {}),
    "swe_curvature flat": (LATE**2, {"power": 0.0}),
    "forecast_curvature": ((W + 0.5 * (W - LATE)) ** 2 * np.sqrt(V), {}),
    "forecast_curvature far": ((2 * W - LATE) ** 2 * V, {"horizon": 1.0, "power": 1.0}),
    "stability_curvature": (W**2 * np.sqrt(V) * np.abs(MEAN) / (np.abs(MEAN) + STD), {}),
    "path_curvature": (PATH**2 * np.sqrt(V), {}),
    "displacement_curvature": (MOVED**2 * np.sqrt(V), {}),
    "snip": (np.abs(W * G), {}),
    "taylor": (np.abs(W * G), {}),
    "taylor signed": (W * G, {"signed": True}),
    "fisher": (W**2 * V, {}),
    "taylor_mix": (np.abs(W * G - 0.5 * W * V * W), {}),
    "swe_fisher": (LATE**2 * np.sqrt(V), {}),
    "movement": (LEARNED.astype(np.float64), {}),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_a_criterion_is_its_formula(case):
    expected, options = FORMULAS[case]
    got = score(case.split()[0], **options)
    # atol: float32 sums of eight snapshots that partly cancel.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def lamp_by_loop(w):
    flat = w.ravel() ** 2
    order = np.argsort(flat, kind="stable")
    out = np.zeros(flat.size)
    for position, index in enumerate(order):
        rest = flat[order[position:]].sum()
        out[index] = flat[index] / rest if flat[index] else 0.0
    return out.reshape(w.shape)


def test_lamp_is_the_square_over_the_squares_that_are_not_smaller():
    np.testing.assert_allclose(score("lamp"), lamp_by_loop(W), rtol=1e-5)
    zeros = importance.score("lamp", {"kernel": jnp.zeros((3, 2))}, zeros="free")
    assert zeros["kernel"].tolist() == [[0, 0]] * 3


def test_lamp_evens_out_the_scales_of_tensors():
    params = {"small": jnp.asarray(W * 1e-6, jnp.float32), "large": jnp.asarray(W, jnp.float32)}
    counts = masks.summary(
        masks.by_sparsity(importance.score("lamp", params), 0.5, "global")
    ).tensors
    assert abs(counts["small"].kept - counts["large"].kept) <= 1
    by_size = masks.by_sparsity(importance.score("magnitude", params), 0.5, "global")
    assert masks.summary(by_size).tensors["small"].kept == 0


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["*", "+"]),
    st.floats(0.125, 1.5, width=16),
    st.booleans(),
)
def test_bezier_removes_its_share_of_every_bin(seed, method, upscale, symmetric):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(50, 3)).astype(np.float32)
    control = (1.0, 0.14, 0.14, 0.1)
    scores = importance.score(
        "bezier", {"kernel": weight}, seed=seed, method=method, symmetric=symmetric
    )["kernel"]
    bins, curve = 8, bezier_by_numpy(control, 8)
    share = np.minimum(curve * upscale if method == "*" else curve + upscale, 1)
    for unit in range(3):
        column = weight[:, unit].astype(np.float64)
        high = np.abs(column).max() if symmetric else column.max()
        low = -high if symmetric else column.min()
        place = np.clip(((column - low) / (high - low) * bins).astype(int), 0, bins - 1)
        kept = np.asarray(scores[:, unit]) > upscale
        for b in range(bins):
            of_bin = place == b
            exact = of_bin.sum() * share[b]
            removed = (of_bin & ~kept).sum()
            # Where n · share is an integer but for rounding, either side of it will do.
            assert removed in {int(exact + 1e-5), int(exact - 1e-5)}, (b, exact)


def bezier_by_numpy(control, bins):
    a, b, c, d = control
    x = np.linspace(0, 1, bins // 2)
    phi = a * (1 - x) ** 3 + 3 * b * x * (1 - x) ** 2 + 3 * c * x**2 * (1 - x) + d * x**3
    curve = np.concatenate([phi[::-1], phi])
    return (curve - curve.min()) / (curve.max() - curve.min())


def test_bezier_peaks_in_the_middle_and_a_flat_curve_removes_nothing():
    np.testing.assert_allclose(
        bezier_lib.profile((1.0, 0.2, 0.1, 0.0), 6), bezier_by_numpy((1.0, 0.2, 0.1, 0.0), 6),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert [bezier_lib.bin_count(n) for n in (4, 9, 15, 16, 100)] == [2, 4, 4, 4, 10]
    flat = importance.score("bezier", {"kernel": THETA[-1]}, control=(0.5, 0.5, 0.5, 0.5))["kernel"]
    assert np.isinf(flat).all()


def test_bezier_swe_bins_the_late_mean():
    late = jnp.asarray(LATE, jnp.float32)
    binned = importance.score(
        "bezier", {"kernel": trajectory.read(stats(), "late_mean")["kernel"]}
    )["kernel"]
    np.testing.assert_array_equal(score("bezier_swe"), binned)
    np.testing.assert_allclose(
        trajectory.read(stats(), "late_mean")["kernel"], late, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("options", [{"method": "-"}, {"control": (1.0, 2.0)},
                                     {"control": (1.0, 0.0, 0.0, float("nan"))}])  # fmt: skip
def test_a_bezier_that_is_none_is_refused(options):
    with pytest.raises(InputError, match=r"of 'bezier' (is|must be)"):
        importance.score("bezier", {"kernel": THETA[-1]}, **options)


PARAMS = {"a": {"kernel": jnp.asarray(THETA[-1])}, "b": {"bias": jnp.ones(4)}}
GRADS = [jax.tree.map(lambda x, t=t: jnp.cos(7 * x + t) * (t + 1), PARAMS) for t in range(3)]


def running_mean(decay):
    v = 0.0
    for grads in GRADS:
        v = decay * v + (1 - decay) * np.asarray(grads["a"]["kernel"], np.float64) ** 2
    return v


def masked_matrices(params):
    return jax.tree.map(lambda x: x.ndim >= 2, params)


CHAINS = {
    "adam": (optax.adam(1e-3, b2=0.9), lambda: running_mean(0.9)),
    "adamw in a chain": (
        optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-3, b2=0.95)),
        lambda: running_mean(0.95),
    ),
    "masked": (optax.masked(optax.adam(1e-3, b2=0.9), masked_matrices), lambda: running_mean(0.9)),
    "multi_transform": (
        optax.multi_transform(
            {"m": optax.adam(1e-3, b2=0.8), "o": optax.sgd(0.1)}, {"a": "m", "b": "o"}
        ),
        lambda: running_mean(0.8),
    ),
    "MultiSteps": (optax.MultiSteps(optax.adam(1e-3, b2=0.9), 1), lambda: running_mean(0.9)),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adamw)(1e-3, b2=0.9),
        lambda: running_mean(0.9),
    ),
    "rmsprop": (optax.rmsprop(1e-3, decay=0.9), lambda: running_mean(0.9)),
    "adagrad": (
        optax.adagrad(1e-3, initial_accumulator_value=0.0),
        lambda: sum(np.asarray(g["a"]["kernel"], np.float64) ** 2 for g in GRADS),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_second_moment_is_found_in_any_chain(name):
    optimizer, expected = CHAINS[name]
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for grads in GRADS:
        _, state = update(grads, state, PARAMS)
    found = importance.second_moment(state, PARAMS)
    np.testing.assert_allclose(found["a"]["kernel"], expected(), rtol=1e-5)
    got = importance.score("magnitude_curvature", PARAMS, opt_state=state, power=1.0)
    np.testing.assert_allclose(
        got["a"]["kernel"], np.asarray(PARAMS["a"]["kernel"]) ** 2 * expected(), rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (3, 12, 10)])
def test_adafactors_vectors_are_multiplied_out(shape):
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)}
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    state = jax.jit(optimizer.init)(params)
    _, state = jax.jit(optimizer.update)(jax.tree.map(jnp.cos, params), state, params)
    v = np.asarray(importance.second_moment(state, params)["kernel"], np.float64)
    square = np.cos(np.asarray(params["kernel"], np.float64)) ** 2
    # A first step's vectors are the means of the squares, times one factor for all.
    rows, columns = square.mean(-1, keepdims=True), square.mean(-2, keepdims=True)
    expected = rows * columns / rows.mean(-2, keepdims=True)
    np.testing.assert_allclose(v / v.mean(), expected / expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.lion(1e-3)])
def test_an_optimizer_without_a_second_moment_is_named_as_such(optimizer):
    with pytest.raises(InputError, match=r"holds no second moment .* use Adam"):
        importance.score("swe_curvature", PARAMS, stats=trajectory.init(PARAMS),
                         opt_state=optimizer.init(PARAMS))  # fmt: skip


def test_a_need_of_another_shape_is_refused_by_its_tensor():
    with pytest.raises(InputError, match="'gradient' of 'kernel' has shape"):
        importance.score("snip", {"kernel": THETA[-1]}, measured={"gradient": {"kernel": GRAD.T}})
    with pytest.raises(InputError, match="'gradient', which was not measured for 'kernel'"):
        importance.score("snip", {"kernel": THETA[-1]}, measured={"gradient": {"kernel": None}})


def test_curvature_costs_no_memory_and_no_pass():
    """The compiled scores of a curvature criterion hold no temporary beside their output."""
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    moments = optax.ScaleByAdamState(jnp.int32(1), params, params)
    compiled = (
        jax.jit(lambda p, s: importance.score("magnitude_curvature", p, opt_state=s))
        .lower(params, moments)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512
