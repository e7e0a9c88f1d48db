import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from swe_prune import blockwise, calibration, importance, masks, tree
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.layout import layout
from swe_prune.models import gpt

KEY = jax.random.key(0)


class Perceptron(nn.Module):
    """Two layers, of which the second is used twice, in the order up, down, up, down."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        up, down = dense(7, name="up"), dense(5, name="down")
        return down(jnp.tanh(up(down(jnp.tanh(up(x))))))


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float64(x):
    return np.asarray(x, np.float64)


def oracle(inputs_NxR, n):
    """METHODS 15.2 and 15.3 in float64: norms over all tokens, both divided by the sequences."""
    x = float64(inputs_NxR).reshape(-1, np.shape(inputs_NxR)[-1])
    return np.sqrt((x**2).sum(0) / n), 2 / n * x.T @ x


def assert_measured(measured, name, inputs_NxR, n, shape=None):
    norm, hessian = oracle(inputs_NxR, n)
    got_norm, got_hessian = (dict(tree.named_leaves(measured[k]))[name] for k in measured)
    assert got_norm.dtype == got_hessian.dtype == jnp.float32
    np.testing.assert_allclose(got_norm, norm.reshape(shape or (-1, 1)), rtol=1e-5)
    # atol: an entry of the sum of products may be nearly 0.
    np.testing.assert_allclose(got_hessian, hessian, rtol=1e-5, atol=1e-6 * hessian.max())


@pytest.mark.parametrize("remat", [False, True])
def test_statistics_are_those_of_all_tokens_over_the_sequences(remat):
    model = Perceptron(remat)
    x_BxLx5 = drawn(11, 3, 5)
    variables = jax.jit(model.init)(jax.random.key(0), x_BxLx5)
    batches = [x_BxLx5[:4], x_BxLx5[4:8], x_BxLx5[8:]]  # the last one is shorter
    measured = calibration.inputs(model, variables, batches, hessian=True)

    up, down = (jax.tree.map(float64, variables["params"][name]) for name in ("up", "down"))

    def through(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    first = np.tanh(through(up, float64(x_BxLx5)))
    second = through(down, first)
    third = np.tanh(through(up, second))
    assert_measured(measured, "up/kernel", np.concatenate([float64(x_BxLx5), second]), 11)
    assert_measured(measured, "down/kernel", np.concatenate([first, third]), 11)
    assert measured["input_norm"]["up"]["bias"] is None
    assert "hessian" not in calibration.inputs(model, variables, batches)


def test_attention_projections_of_flax_are_measured():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)

    x = drawn(6, 4, 8)
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(1), x)
    measured = calibration.inputs(model, variables, np.split(x, 3), hessian=True)
    for name in ("query", "key", "value"):
        assert_measured(measured, f"attention/{name}/kernel", x, 6, (8, 1, 1))
    into_out = []

    def see(call, args, kwargs, context):
        if context.module.name == "out":
            into_out.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        model.apply(variables, x)
    heads = np.reshape(into_out[0], (6, 4, 8))
    assert_measured(measured, "attention/out/kernel", heads, 6, (2, 4, 1))
    for name in ("wanda", "sparsegpt"):
        score = importance.score(name, variables["params"], measured=measured)
        assert score["attention"]["out"]["kernel"].shape == (2, 4, 8)


def conv_oracle(x_BxHxWxC, size, stride, pad):
    """Patches by plain loops, ordered as the kernel (height, width, in)."""
    x = np.pad(x_BxHxWxC, ((0, 0), *pad, (0, 0)))
    rows = range(0, x.shape[1] - size[0] + 1, stride)
    columns = range(0, x.shape[2] - size[1] + 1, stride)
    patches = [x[:, i : i + size[0], j : j + size[1]] for i in rows for j in columns]
    return np.concatenate(patches).reshape(len(patches) * len(x), -1)


@pytest.mark.parametrize(
    ("padding", "stride", "pad"),
    [("VALID", 1, ((0, 0), (0, 0))), ("SAME", 1, ((1, 1), (0, 1))), (1, 2, ((1, 1), (1, 1)))],
)
def test_a_convolution_is_measured_over_its_patches(padding, stride, pad):
    model = nn.Conv(4, (3, 2), strides=stride, padding=padding)
    x = drawn(3, 6, 7, 2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    measured = calibration.inputs(model, variables, [x[:2], x[2:]], hessian=True)
    assert_measured(measured, "kernel", conv_oracle(x, (3, 2), stride, pad), 3, (3, 2, 2, 1))


LINE = drawn(3, 7, 4)


class Depthwise(nn.Module):
    """Layers of a scan, each a depthwise convolution."""

    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return jnp.tanh(nn.Conv(4, (3,), feature_group_count=4, name="conv")(x)), None

        axes, rngs = {"params": 0}, {"params": True}
        scanned = nn.scan(layer, variable_axes=axes, split_rngs=rngs, length=1)
        return scanned(self, x, None)[0]


def linen(model, x=LINE):
    return model, jax.jit(model.init)(KEY, x)["params"]


def in_nnx():
    model = nnx.Conv(4, 6, (3,), padding="VALID", feature_group_count=2, rngs=nnx.Rngs(0))
    return model, nnx.state(model, nnx.Param)


def in_equinox():
    model = eqx.nn.Conv1d(4, 6, 3, groups=2, key=KEY)
    return lambda model, x: jax.vmap(model)(jnp.swapaxes(x, 1, 2)), model


GROUPED = {  # model and parameters, groups, and the axes (groups, members, in, spatial) of a norm
    "linen": (lambda: linen(nn.Conv(6, (3,), 1, "VALID", feature_group_count=2)), 2, "sig"),
    "depthwise": (lambda: linen(nn.Conv(8, (3,), 1, "VALID", feature_group_count=4)), 4, "sig"),
    "nnx": (in_nnx, 2, "sig"),
    "equinox": (in_equinox, 2, "gis"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", GROUPED)
def test_each_output_of_a_grouped_convolution_has_the_norms_of_its_group(name):
    make, groups, order = GROUPED[name]
    fn, params = make()
    measured = calibration.inputs(fn, params, [LINE])["input_norm"]
    (kernel,), (norm,) = (
        [x for x in jax.tree.leaves(t) if x.ndim == 3] for t in (params, measured)
    )
    assert norm.shape == kernel.shape
    # Sums over all positions of what each place of the kernel meets, by loops.
    want = np.zeros((groups, 4 // groups, 3))
    for g, i, s in np.ndindex(want.shape):
        x = float64(LINE)[:, s : s + 5, g * (4 // groups) + i]
        want[g, i, s] = np.sqrt((x**2).sum() / len(LINE))
    outputs = max(norm.shape)
    want = np.repeat(want, outputs // groups, axis=0)
    want = np.einsum("gis->" + order, want)
    np.testing.assert_allclose(norm, want, rtol=1e-5)
    axes = layout(fn, params, LINE)
    mask = masks.by_sparsity(
        importance.score("wanda", params, measured={"input_norm": measured}, layout=axes),
        0.5,
        "row",
        layout=axes,
    )
    (mask,) = [x for x in jax.tree.leaves(mask) if x.ndim == 3]
    scores = np.abs(float64(kernel)) * want
    moved = [np.moveaxis(np.asarray(x), order.index("g"), -1) for x in (scores, mask)]
    scores_RxC, mask_RxC = (x.reshape(-1, outputs) for x in moved)
    gone = int(len(scores_RxC) * 0.5 + 0.5)
    np.testing.assert_array_equal((~mask_RxC).sum(0), gone)
    for column, kept in zip(scores_RxC.T, mask_RxC.T, strict=True):
        assert column[kept].min() > column[~kept].max()


def test_grouped_convolutions_of_a_scan_and_block_after_block():
    fn, params = linen(Depthwise())
    norm = calibration.inputs(fn, params, [LINE])["input_norm"]["conv"]["kernel"]
    padded = np.pad(float64(LINE), ((0, 0), (1, 1), (0, 0)))
    want = [np.sqrt((padded[:, s : s + 7] ** 2).sum((0, 1)) / len(LINE)) for s in range(3)]
    np.testing.assert_allclose(norm[0, :, 0], want, rtol=1e-5)
    model = nn.Sequential([nn.Conv(8, (3,), 1, "VALID", feature_group_count=4)])
    _, params = linen(model)
    norm = calibration.inputs(model, params, [LINE])["input_norm"]["layers_0"]["kernel"]
    _, mask, _ = blockwise.prune_blocks(
        model, {"params": params}, [LINE], blocks="layers_0", sparsity=0.4, method="wanda"
    )
    kernel = float64(params["layers_0"]["kernel"])
    scores_RxC = (np.abs(kernel) * norm).reshape(3, 8)
    wanted = scores_RxC > scores_RxC.min(0)  # int(3 * 0.4) of each output
    np.testing.assert_array_equal(mask["layers_0"]["kernel"].reshape(3, 8), wanted)


def tiny_gpt(**changes):
    return gpt.build(ModelConfig(layers=1, heads=2, width=8, context=6, **changes), vocab_size=11)


def tokens(n=6, length=6, seed=0):
    return np.random.default_rng(seed).integers(0, 11, (n, length)).astype(np.int32)


@pytest.mark.slow
def test_a_model_that_flattens_its_batch_is_divided_by_its_sequences():
    model = tiny_gpt()
    variables = jax.jit(model.init)(jax.random.key(0), tokens())
    seen = []

    def see(call, args, kwargs, context):
        if "/".join(context.module.path) == "block_0/mlp/down":
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        model.apply(variables, tokens())
    batches = [{"inputs": part, "targets": part} for part in np.split(tokens(), 2)]
    measured = calibration.inputs(model, variables, batches, hessian=True)
    assert_measured(measured, "block_0/mlp/down/kernel", seen[0], 6)
    assert measured["input_norm"]["embedding"]["embedding"] is None


def test_weights_in_bfloat16_are_measured_in_float32():
    model = tiny_gpt(dtype="bfloat16")
    variables = jax.jit(model.init)(jax.random.key(0), tokens())
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), variables)
    measured = calibration.inputs(model, half, [tokens()], hessian=True)
    for leaf in jax.tree.leaves(measured):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    score = importance.score("wanda", half["params"], measured=measured)
    assert score["block_0"]["mlp"]["up"]["kernel"].dtype == jnp.float32


def scanned(axes):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(4, name="dense")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]

    return Model()


@pytest.mark.parametrize("axes", [{"params": 0, "calibration": 0}, {"params": 0}])
def test_a_scan_is_measured_layer_by_layer_whatever_collections_it_lists(axes):
    model, x = scanned(axes), drawn(5, 4)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    measured = calibration.inputs(model, variables, [x[:2], x[2:]], hessian=True)
    layers, h = variables["params"]["layers"]["dense"], float64(x)
    for i in range(3):
        norm, hessian = oracle(h, 5)
        got = (measured[key]["layers"]["dense"]["kernel"][i] for key in ("input_norm", "hessian"))
        np.testing.assert_allclose(next(got)[:, 0], norm, rtol=1e-5)
        np.testing.assert_allclose(next(got), hessian, rtol=1e-5, atol=1e-6)
        h = np.tanh(h @ float64(layers["kernel"][i]) + float64(layers["bias"][i]))


def test_layers_of_ones_own_and_a_call_of_ones_own():
    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], 3))
            return x @ kernel * scale

    x = drawn(4, 5)
    variables = Mine().init(jax.random.key(0), x, 2.0)
    own = {"call": lambda model, variables, batch: model.apply(variables, batch["x"], scale=3.0)}
    batches = [{"x": x[:1]}, {"x": x[1:]}]
    measured = calibration.inputs(Mine(), variables, batches, hessian=True, **own)
    assert_measured(measured, "kernel", x, 4)


def test_a_subclass_that_calls_its_parents_method_is_measured_once():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    x = drawn(4, 5)
    variables = Doubled(3).init(KEY, x)
    assert_measured(calibration.inputs(Doubled(3), variables, [x], hessian=True), "kernel", x, 4)


def test_submodules_made_in_setup_and_state_that_the_model_returns():
    class Model(nn.Module):
        def setup(self):
            self.norm = nn.BatchNorm(use_running_average=False)
            self.up = nn.Dense(3)

        def __call__(self, x):
            return self.up(self.norm(x))

    x, model, returned = drawn(4, 5), Model(), []
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def call(model, variables, batch):
        y, state = model.apply(variables, batch, mutable=["batch_stats"])
        returned.append(set(state))
        return y

    measured = calibration.inputs(model, variables, [x], call=call, hessian=True)
    normed = (float64(x) - float64(x).mean(0)) / np.sqrt(float64(x).var(0) + 1e-5)
    assert_measured(measured, "up/kernel", normed, 4)
    assert all(state == {"batch_stats"} for state in returned)


def two_kernels():
    return {"params": {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((3, 2))}}}


class OnlyA(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name="a")(x)


X = drawn(2, 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: calibration.inputs(OnlyA(), two_kernels(), []), "calibration set is empty"),
        (lambda: calibration.inputs(OnlyA(), two_kernels(), X), r"batches, .* got float32\[2, 3\]"),
        (lambda: calibration.inputs(OnlyA(), two_kernels(), {"x": X}), "batches, .* got a dict"),
        (
            lambda: calibration.inputs(OnlyA(), two_kernels(), None),
            "batches must be a sequence of pytrees, got None",
        ),
        (
            lambda: calibration.inputs(OnlyA(), two_kernels(), [X], prunable=both()),
            "no product used 'b/kernel' on the calibration batches",
        ),
        (
            lambda: calibration.inputs(tiny_gpt(), made(), [tokens(), tokens().astype(float)]),
            r"batch 1, float64\[6, 6\], cannot be run",
        ),
        (lambda: calibration.inputs(nn.Dense(2), dense(), [X[:, :2]]), r"batch 0, float32\[2, 2\]"),
        (
            lambda: calibration.inputs(nn.Dense(2), dense(), [X, X * np.nan, X]),
            "'kernel' has NaN or inf .* batch 1;",
        ),
        (lambda: calibration.inputs(nn.Dense(2), dense(), [X[:0]]), "share a leading axis"),
        (lambda: calibration.inputs(nn.Dense(2), {}, [X]), "batch 0.* cannot be run"),
        (
            lambda: calibration.inputs(nn.Dense(2), dense(), [X], prunable=no_weight()),
            "no weight is prunable",
        ),
        (
            lambda: calibration.inputs(grouped(), grouped().init(KEY, LINE), [LINE], hessian=True),
            "belongs to a grouped convolution, whose outputs get different inputs",
        ),
        (
            lambda: calibration.inputs(lambda p, x: x @ p, jnp.ones((3, 2)), [X], call=compiled),
            "call= runs a Linen module in another way",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_a_kernel_that_no_product_uses_is_not_measured_unless_asked_for():
    measured = calibration.inputs(OnlyA(), two_kernels(), [X])
    assert measured["input_norm"]["b"]["kernel"] is None
    np.testing.assert_allclose(
        measured["input_norm"]["a"]["kernel"][:, 0], oracle(X, 2)[0], rtol=1e-5
    )


@pytest.mark.parametrize("given", ["params alone", "jitted call"])
def test_params_alone_and_a_compiled_call_give_the_same(given):
    variables, call = (dense()["params"], None) if given == "params alone" else (dense(), compiled)
    measured = calibration.inputs(nn.Dense(2), variables, [X], call=call, hessian=True)
    assert_measured(measured, "kernel", X, 2)


def made():
    return tiny_gpt().init(KEY, tokens())


def dense():
    return nn.Dense(2).init(KEY, X)


def both():
    return {"a": {"kernel": True}, "b": {"kernel": True}}


def no_weight():
    return {"kernel": False, "bias": False}


def compiled(model, variables, batch):
    return jax.jit(model.apply)(variables, batch)


def grouped():
    return nn.Conv(4, (3,), feature_group_count=2)


def squared_error(params, batch):
    y = jnp.tanh(batch["x"] @ params["up"]["kernel"]) @ params["down"]["kernel"]
    return jnp.mean((y - batch["y"]) ** 2)


def regression(n=7, dtype=jnp.float32):
    params = {
        "up": {"kernel": jnp.asarray(drawn(4, 3), dtype)},
        "down": {"kernel": jnp.asarray(drawn(3, 2, seed=1), dtype), "bias": jnp.ones(2)},
    }
    return params, {"x": drawn(n, 4, seed=2), "y": drawn(n, 2, seed=3)}


def gradient_oracle(params, data):
    """By hand: the gradients of one example after the other, in float64."""
    up, down = (float64(params[name]["kernel"]) for name in ("up", "down"))
    each = {"up": [], "down": []}
    for x, y in zip(float64(data["x"]), float64(data["y"]), strict=True):
        h = np.tanh(x @ up)
        error = 2 * (h @ down - y) / len(y)
        each["down"].append(np.outer(h, error))
        each["up"].append(np.outer(x, (down @ error) * (1 - h**2)))
    return {name: np.stack(values) for name, values in each.items()}


@pytest.mark.parametrize("at_once", [None, 1, 2, 9])
def test_gradients_are_means_over_examples(at_once):
    params, data = regression()
    batches = [{key: part[a:b] for key, part in data.items()} for a, b in ((0, 3), (3, 6), (6, 7))]
    measured = calibration.gradients(squared_error, params, batches, at_once=at_once)
    for name, each in gradient_oracle(params, data).items():
        mean = measured["gradient"][name]["kernel"]
        np.testing.assert_allclose(mean, each.mean(0), rtol=1e-5, atol=1e-6)
        square = measured["gradient_square"][name]["kernel"]
        np.testing.assert_allclose(square, (each**2).mean(0), rtol=1e-5, atol=1e-6)
    assert measured["gradient"]["down"]["bias"] is None
    score = importance.score("fisher", params, measured=measured)
    assert score["up"]["kernel"].shape == (4, 3)


def test_gradients_of_bfloat16_weights_are_float32_and_only_of_the_prunable():
    params, data = regression(dtype=jnp.bfloat16)
    only = {"up": {"kernel": False}, "down": {"kernel": True, "bias": False}}
    measured = calibration.gradients(squared_error, params, [data], prunable=only)
    assert measured["gradient"]["up"]["kernel"] is None
    got = measured["gradient_square"]["down"]["kernel"]
    assert got.dtype == jnp.float32
    expected = (gradient_oracle(params, data)["down"] ** 2).mean(0)
    np.testing.assert_allclose(got, expected, rtol=2**-5)  # of gradients in bfloat16


def says_nothing():
    raise ValueError


@pytest.mark.parametrize(
    ("batches", "loss", "sentence"),
    [
        ([], squared_error, "calibration set is empty"),
        ({"x": X}, squared_error, "batches, .* got a dict"),
        (3, squared_error, "batches must be a sequence of pytrees, got 3"),
        ([{"x": X}], squared_error, r"batch 0, {'x': 'float32\[2, 3\]'} \(TypeError"),
        ([{"x": X, "y": X[:1]}], squared_error, "share a leading axis"),
        ([regression()[1]], lambda p, b: b["x"] @ p["up"]["kernel"], "return a scalar"),
        ([regression()[1]], lambda p, b: says_nothing(), r"\(ValueError\); it must"),
        ([regression()[1]], lambda p, b: jnp.inf * squared_error(p, b), "has NaN or inf"),
    ],
)
def test_gradients_that_cannot_be_are_refused_in_a_sentence(batches, loss, sentence):
    with pytest.raises(InputError, match=sentence):
        calibration.gradients(loss, regression()[0], batches)
