import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from swe_prune import allocation, blockwise, importance, masks, tree
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.layout import conventional_axes
from swe_prune.models import gpt

BLOCKS = r"block_[0-9]+"


def tiny_gpt(layers=3, **changes):
    config = ModelConfig(layers=layers, heads=2, width=8, context=6, **changes)
    return gpt.build(config, vocab_size=11)


def tokens(n=6, length=6, seed=0):
    return np.random.default_rng(seed).integers(0, 11, (n, length)).astype(np.int32)


def made(model, *args):
    """Variables with weights that are large enough for every block to change what comes next."""
    variables = jax.jit(model.init)(jax.random.key(0), *args)
    return jax.tree.map(lambda w: w * 12 if w.ndim > 1 else w, variables)


def named(params):
    return {name: leaf for name, leaf in tree.named_leaves(params) if leaf is not None}


def apply(model, variables, batch):
    return model.apply(variables, batch)


def statistics(model, variables, batches, run=apply):
    """Norm and Hessian of every dense layer's inputs, in float64, of the model run eagerly."""
    rows = {}

    def see(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense | nn.DenseGeneral):
            name = "/".join((*context.module.path, "kernel"))
            kernel = (
                context.module.get_variable("params", "kernel") if context.module.path else None
            )
            inputs = conventional_axes(name, kernel.shape).inputs
            width = np.prod([kernel.shape[axis] for axis in inputs])
            rows.setdefault(name, []).append(np.asarray(args[0], np.float64).reshape(-1, width))
        return call(*args, **kwargs)

    for batch in batches:
        with nn.intercept_methods(see):
            run(model, variables, batch)
    n = sum(len(jax.tree.leaves(batch)[0]) for batch in batches)
    whole = {name: np.concatenate(parts) for name, parts in rows.items()}
    return {
        name: (np.sqrt((x**2).sum(0) / n)[:, None], 2 / n * x.T @ x) for name, x in whole.items()
    }


def block_after_block(model, variables, batches, paths, prune, run=apply):
    """The definition with the whole model: measure all, prune one block's kernels, measure again.

    What comes into a block depends on the blocks before it alone, so the whole model gives it.
    """
    params, kept = variables["params"], {}
    for path in paths:
        measured = statistics(model, {"params": params}, batches, run)
        new = {}
        for name, weight in named(params).items():
            if name.startswith(path + "/") and name in measured:
                norm, hessian = measured[name]
                weight_RxC = jnp.reshape(weight, (len(norm), -1))
                done = prune(weight_RxC, jnp.float32(norm), jnp.float32(hessian))
                new[name], kept[name] = (jnp.reshape(each, weight.shape) for each in done)
        params = tree.map_named(lambda name, leaf, new=new: new.get(name, leaf), params)
    return named(params), kept


def by_wanda(weight_RxC, norm_Rx1, hessian_RxR):
    mask_RxC = blockwise.wanda_mask(
        jnp.abs(weight_RxC) * norm_Rx1, 0.5, rounding="down", ties="last"
    )
    return jnp.where(mask_RxC, weight_RxC, 0), mask_RxC


def by_sparsegpt(weight_RxC, norm_Rx1, hessian_RxR):
    return blockwise.sparsegpt(weight_RxC, hessian_RxR, 0.5)[:2]


PRUNE = {"wanda": by_wanda, "sparsegpt": by_sparsegpt}


def assert_same(got, expected, *, rtol=1e-5, atol=1e-5):
    assert set(got) == set(expected)
    for name, leaf in got.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=rtol, atol=atol, err_msg=name)


def test_every_block_is_pruned_on_what_the_pruned_blocks_before_it_give():
    # Of two shapes, which flatten to the same number of tokens in the model.
    model, method, batches = tiny_gpt(3), "sparsegpt", [tokens(4), tokens(6, 4, seed=2)]
    variables = made(model, batches[0])
    params, mask, report = blockwise.prune_blocks(
        model, variables, iter(batches), blocks=BLOCKS, method=method, sparsity=0.5
    )
    paths = ["block_0", "block_1", "block_2"]
    expected, kept = block_after_block(model, variables, batches, paths, PRUNE[method])
    assert_same(named(mask), kept)
    # atol: of weights that are nearly 0 after the updates, beside others of 0.5.
    assert_same(named(params), expected, rtol=1e-4, atol=1e-4)
    assert [one.name for one in report] == list(named(mask))
    assert all(one.removed == one.total // 2 for one in report)
    # It is not the same as pruning all of them on the dense model's inputs.
    dense = statistics(model, variables, batches)
    weights = named(variables["params"])
    at_once = {name: PRUNE[method](weights[name], *dense[name])[1] for name in kept}
    changed = {name for name in kept if (at_once[name] != kept[name]).any()}
    assert changed
    assert not any(name.startswith("block_0/attention/query") for name in changed)


class Plain(nn.Module):
    """Blocks without attention, which compile in a tenth of the time."""

    layers: int = 2
    width: int = 8

    @nn.compact
    def __call__(self, x):
        for layer in range(self.layers):
            x = PlainBlock(name=f"block_{layer}")(x)
        return x


class PlainBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(4 * x.shape[-1], name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(hidden)


def rows(n=6, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 5, width)).astype(np.float32)


class Layer(nn.Module):
    """A block as others write them: by keyword, a mask beside, a tuple back, attention of Flax."""

    heads: int

    @nn.compact
    def __call__(self, hidden=None, *, mask, bias=None):
        x = nn.LayerNorm(name="norm")(hidden)
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        hidden = hidden + attention(x, x, mask=mask)
        hidden = hidden + nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(hidden)))
        return hidden, {"mean": hidden.mean()}


class Foreign(nn.Module):
    remat: bool = False
    between: bool = False

    def setup(self):
        layer = nn.remat(Layer) if self.remat else Layer
        self.stem = nn.Dense(8)
        self.layers = [layer(2) for _ in range(3)]
        self.top = nn.Dense(2)

    def __call__(self, x, mask):
        hidden = self.stem(x)
        for layer in self.layers:
            hidden, _ = layer(hidden=hidden, mask=mask)
            hidden = hidden * 2 if self.between else hidden
        return self.top(hidden)


def foreign(**options):
    model = Foreign(**options)
    rng = np.random.default_rng(0)
    batches = [
        {"x": rng.normal(size=(n, 5, 4)).astype(np.float32), "mask": rng.random((n, 1, 5, 5)) < 0.7}
        for n in (4, 3)
    ]
    return model, made(model, batches[0]["x"], batches[0]["mask"]), batches


def call(model, variables, batch):
    return model.apply(variables, batch["x"], batch["mask"])


@pytest.mark.slow
def test_a_foreign_model_is_pruned_as_the_definition_says():
    model, variables, batches = foreign()
    paths = ["layers_0", "layers_1", "layers_2"]
    params, mask, _ = blockwise.prune_blocks(
        model, variables, batches, blocks=paths[::-1], sparsity=0.5, call=call
    )
    expected, kept = block_after_block(model, variables, batches, paths, by_wanda, call)
    assert_same(named(mask), kept)
    assert_same(named(params), expected)
    assert mask["stem"]["kernel"] is None
    np.testing.assert_array_equal(params["stem"]["kernel"], variables["params"]["stem"]["kernel"])


def test_bfloat16_weights_in_host_memory_stay_there():
    model = Plain()
    variables = made(model, rows())
    host = jax.tree.map(lambda w: np.asarray(w.astype(jnp.bfloat16)), variables)
    params, mask, _ = blockwise.prune_blocks(
        model, host, [rows()], blocks=BLOCKS, method="sparsegpt", sparsity=0.5, offload=True
    )
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == jnp.bfloat16
    for name, keep in named(mask).items():
        assert isinstance(keep, np.ndarray)
        assert (named(params)[name][~keep] == 0).all()
    on_device = blockwise.prune_blocks(
        model, jax.tree.map(jnp.asarray, host), [rows()], blocks=BLOCKS, method="sparsegpt",
        sparsity=0.5,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, mask, on_device[1])


def test_sparsities_may_differ_by_kernel_and_come_from_an_allocation():
    model = Plain(1)
    variables = made(model, rows())
    params = variables["params"]
    chosen = named(importance.score("magnitude", params))
    table = {name: 0.25 if "up" in name else 0.75 for name in chosen}
    given = allocation.table({"up": 0.25, "down": 0.75}, chosen)
    for shares in (table, given):
        _, _, report = blockwise.prune_blocks(
            model, variables, [rows()], blocks=BLOCKS, method="magnitude", sparsity=shares
        )
        wanted = shares.sparsities if isinstance(shares, allocation.Allocation) else shares
        assert [one.name for one in report] == list(chosen)
        for one in report:
            assert abs(one.removed - wanted[one.name] * one.total) <= 1


@pytest.mark.quick(3)
@pytest.mark.parametrize("method", blockwise.METHODS)
def test_n_of_m_holds_along_the_inputs_for_every_method(method):
    model = Plain(1)
    seen = []
    _, mask, report = blockwise.prune_blocks(
        model, made(model, rows()), [rows()], blocks=BLOCKS, method=method, pattern="2:4",
        progress=seen.append,
    )  # fmt: skip
    for keep in named(mask).values():
        assert (np.reshape(keep, (len(keep) // 4, 4, -1)).sum(1) == 2).all()
    assert tuple(seen) == report
    solves = method in ("sparsegpt", "admm")
    assert all((one.solver is not None) == solves for one in report)


def test_magnitude_keeps_the_largest_of_every_kernel():
    model = Plain()
    variables = made(model, rows())
    params, mask, _ = blockwise.prune_blocks(
        model, variables, [rows()], blocks=["block_1"], method="magnitude", sparsity=0.6
    )
    score = importance.score("magnitude", variables["params"])
    expected = named(masks.by_sparsity(score, 0.6, rounding="down"))
    got = named(mask)
    assert set(got) == {name for name in expected if name.startswith("block_1")}
    for name, keep in got.items():
        np.testing.assert_array_equal(keep, expected[name])
        np.testing.assert_array_equal(
            named(params)[name], np.where(keep, named(variables["params"])[name], 0)
        )


def bytes_alive():
    return sum(array.nbytes for array in jax.live_arrays())


def size(arrays):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(arrays))


def most_alive(layers, monkeypatch, **options):
    """The most bytes on the device beyond what was there, seen whenever the Hessians are alive."""
    model = Plain(layers, width=32)
    host = jax.tree.map(np.asarray, made(model, rows(4, 32)))
    batches = [rows(4, 32, seed) for seed in range(6)]
    seen, whole = [], blockwise.kernels.sparsegpt

    def watched(weight, hessian, *rest):
        seen.append(bytes_alive())
        return whole(weight, hessian, *rest)

    monkeypatch.setattr(blockwise.kernels, "sparsegpt", watched)
    before = bytes_alive()
    blockwise.prune_blocks(
        model, host, batches, blocks=BLOCKS, method="sparsegpt", sparsity=0.5, **options
    )
    monkeypatch.setattr(blockwise.kernels, "sparsegpt", whole)
    assert len(seen) == 2 * layers
    block = host["params"]["block_0"]
    hessians = 4 * sum(
        leaf.shape[0] ** 2 for name, leaf in named(block).items() if name.endswith("kernel")
    )
    activations = 4 * 6 * 4 * 5 * 32  # float32, batches, sequences, tokens, width
    return max(seen) - before, size(block), hessians, activations


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_one_block_its_hessians_and_the_activations_are_in_memory_at_a_time(monkeypatch, offload):
    alive, block, hessians, activations = most_alive(2, monkeypatch, offload=offload)
    assert hessians < alive  # so the check sees what it is for
    # A quarter of a block more: norms, and a mask of the kernel before.
    assert alive <= 1.25 * block + hessians + (0 if offload else activations)
    deeper, *_ = most_alive(4, monkeypatch, offload=offload)
    assert deeper <= alive + 0.05 * block


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rule"),
    [(Plain(4), BLOCKS), (Foreign(), r"layers_\d")],
    ids=["plain", "two kinds of batch"],
)
def test_blocks_that_are_alike_are_traced_as_the_first(monkeypatch, model, rule):
    traced, whole = [], blockwise.block_graph.Wire.run

    def counted(self, *args):
        traced.append(self.path)
        return whole(self, *args)

    monkeypatch.setattr(blockwise.block_graph.Wire, "run", counted)
    if isinstance(model, Plain):
        variables, batches, options = made(model, rows()), [rows()] * 2, {}
    else:
        (_, variables, batches), options = foreign(), {"call": call}
    blockwise.prune_blocks(model, variables, batches, blocks=rule, sparsity=0.5, **options)
    assert {path[-1] for path in traced} == {"0"}


@pytest.mark.parametrize("offload", [False, True])
def test_the_blocks_steps_are_compiled_once(caplog, offload):
    """Arrays that came back from the host are the same arguments as those that never left."""
    model = Plain(3)
    variables = made(model, rows())
    with jax.log_compiles(), caplog.at_level("WARNING"):
        blockwise.prune_blocks(
            model, variables, [rows()] * 3, blocks=BLOCKS, sparsity=0.5, offload=offload
        )
    done = [line.split()[4] for line in caplog.messages if line.startswith("Finished XLA comp")]
    for program in ("jit(add)", "jit(run)"):  # calibration's and the forward one
        assert done.count(program) == 1, done


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_kernels_that_are_given_up_are_held_once(method):
    model = Plain(3, width=32)
    host = jax.tree.map(np.asarray, made(model, rows(4, 32)))
    options = {"blocks": BLOCKS, "method": method, "sparsity": 0.5}
    expected, kept, _ = blockwise.prune_blocks(model, host, [rows(4, 32)], **options)
    given = jax.tree.map(jnp.array, host)
    before = bytes_alive()
    params, mask, _ = blockwise.prune_blocks(model, given, [rows(4, 32)], donate=True, **options)
    masks_of = size(mask)
    assert before + masks_of <= bytes_alive() < before + masks_of + 2048
    jax.tree.map(np.testing.assert_array_equal, (params, mask), (expected, kept))
    for name, leaf in named(given["params"]).items():
        assert leaf.is_deleted() == name.endswith("kernel")
    written = jax.tree.map(np.array, host)
    params, _, _ = blockwise.prune_blocks(model, written, [rows(4, 32)], donate=True, **options)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    for (name, new), old in zip(
        named(params).items(), named(written["params"]).values(), strict=True
    ):
        assert new is old, name
    locked = jax.tree.map(np.array, host)
    jax.tree.map(lambda leaf: leaf.setflags(write=False), locked)
    params, _, _ = blockwise.prune_blocks(model, locked, [rows(4, 32)], donate=True, **options)
    jax.tree.map(np.testing.assert_array_equal, (params, locked), (expected, host))


def one_way(**changes):
    model, variables, batches = foreign()
    options = {"blocks": r"layers_\d", "sparsity": 0.5, "call": call, **changes}
    given = {key: options.pop(key) for key in ("model", "variables", "batches") if key in options}
    return blockwise.prune_blocks(
        given.get("model", model),
        given.get("variables", variables),
        given.get("batches", batches),
        **options,
    )


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        return layer(layer(x))


X = np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks": r"block_\d"}, r"names 'block_\\\\d', which holds no weight"),
        ({"blocks": ["layers_0", "layer_1"]}, "'layer_1', which holds no weight; did you mean"),
        ({"blocks": ["layers_0", "layers_0/up"]}, "which share weights"),
        ({"method": "wandb"}, "method must be one of .* got 'wandb'; did you mean 'wanda'"),
        ({"sparsity": None}, "neither a sparsity nor a pattern"),
        ({"sparsity": {"layers_0/up/kernel": 0.5}}, "no sparsity is given for 'layers_0/attention"),
        ({"sparsity": {"layers_0/upp/kernel": 0.5}}, "did you mean 'layers_0/up/kernel'"),
        ({"pattern": "3:5", "sparsity": None}, "not a multiple of m = 5"),
        ({"batches": []}, "calibration set is empty"),
        ({"batches": [{"x": X[:, :3], "mask": X > 0}]}, "batch 0, .* cannot be run"),
        ({"model": Foreign(remat=True)}, "inside a transformation such as nn.remat or nn.scan"),
        ({"model": Foreign(between=True)}, "'layers_1' is called with an array .* neither what"),
        ({"variables": {}}, "holds no 'params'"),
        (
            {
                "model": Twice(), "variables": Twice().init(jax.random.key(0), X), "batches": [X],
                "blocks": ["layer"], "call": None,
            },
            "'layer' is called more than once",
        ),
        (
            {"call": lambda model, variables, batch: jax.jit(call, static_argnums=0)(
                model, variables, batch)},
            "called inside a transformation",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_is_refused_in_a_sentence(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        one_way(**changes)
