"""A cut model computes what the masked one computes, in every family, and goes on as it would."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interop_tiny import CONFIGS, assert_same_params, logits, model

from swe_prune import importance, interop, masks, structured, trajectory, tree
from swe_prune.errors import InputError
from swe_prune.models import gpt

TOKENS = np.random.default_rng(0).integers(0, 24, (2, 20)).astype(np.int32)
FAMILIES = [
    "gpt2", "llama biases", "llama tied", "mistral", "phi3", "phi3 longrope", "qwen2 window",
    "qwen3 biases", "granite", "stablelm", "stablelm parallel", "smollm3 window", "olmo2 biases",
    "gpt_neox", "opt", "gemma2", "gemma3_text", "mixtral window",
]  # fmt: skip


def has_head_width(made):
    """Whether the config.json of a model can say the width of its heads."""
    longrope = made.family == "phi3" and made.config.rope.scaling == "longrope"
    return not longrope and made.family not in ("gpt2", "stablelm", "gpt_neox", "opt")


def all_groups(config, attention="heads"):
    names = ("neurons", attention, "layers")
    return {k: v for units in names for k, v in structured.groups(config, units).items()}


def attention_units(config):
    return "query_heads" if config.key_heads == 1 else "heads"


def chosen(groups, params, multiple=1):
    """A random half of every group."""
    units = structured.unit_scores(groups, importance.score("random", params, zeros="free"), "sum")
    return structured.choose(groups, units, sparsity=0.5, multiple=multiple)


def cut_model(made, groups, keep):
    return dataclasses.replace(
        made,
        params=structured.cut(made.params, groups, keep),
        config=structured.cut_config(made.config, keep),
    )


def masked(made, groups, keep):
    mask = structured.unit_mask(made.params, groups, keep)
    return dataclasses.replace(made, params=masks.apply(made.params, mask))


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_cut_logits_are_masked_logits(name):
    made = model(name)
    groups = all_groups(made.config, attention_units(made.config))
    keep = chosen(groups, made.params)
    keep["layers"] = np.arange(1, made.config.layers)  # the first goes, the others move up
    small = cut_model(made, groups, keep)
    wanted, found = logits(masked(made, groups, keep), TOKENS), logits(small, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6 * np.abs(wanted).max())
    shapes = interop.abstract_params(small.config, small.vocab_size)
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, shapes)
    # What the layers are follows those that stay.
    for field in ("sliding", "rotary"):
        assert getattr(small.config, field) == getattr(made.config, field)[1:]


def test_every_family_is_cut():
    # That with a vision tower is in vision_cut_test.py.
    assert {model(name).family for name in FAMILIES} == set(interop.FAMILIES) - {"phi3_v"}


@pytest.mark.parametrize("units", ["neurons", "heads", "query_heads"])
def test_each_kind_of_units_alone_and_it_is_not_the_dense_model(units):
    made = model("llama")
    groups = structured.groups(made.config, units)
    keep = chosen(groups, made.params)
    wanted = logits(masked(made, groups, keep), TOKENS)
    found = logits(cut_model(made, groups, keep), TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6 * np.abs(wanted).max())
    assert np.abs(wanted - logits(made, TOKENS)).max() > 0.1


def test_layers_of_their_own_widths_are_computed_and_not_exported(tmp_path):
    made = model("llama")
    groups = all_groups(made.config)
    keep = {
        "block_0/neurons": [1, 3, 4], "block_1/neurons": [0], "block_1/heads": [1],
    }  # fmt: skip
    small = cut_model(made, groups, keep)
    assert small.config.layer_hidden == (3, 1)
    assert small.config.layer_kv_heads == (2, 1)
    wanted = logits(masked(made, groups, keep), TOKENS)
    found = logits(small, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6 * np.abs(wanted).max())
    with pytest.raises(InputError, match=r"layers differ in their widths.*uniform=True"):
        interop.export(tmp_path / "out", small)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_export_and_import_again_is_bit_identical_or_refused(tmp_path, name):
    made = model(name)
    for units in ("neurons", attention_units(made.config), "layers"):
        groups = structured.groups(made.config, units)
        small = cut_model(made, groups, chosen(groups, made.params))
        if units.endswith("heads") and not has_head_width(made):
            with pytest.raises(InputError, match=r"width / heads, so .* cannot be written"):
                interop.export(tmp_path / "no", small)
            continue
        back = interop.load(interop.export(tmp_path / units, small))
        assert_same_params(back.params, small.params)
        assert back.config == interop.read_config(back.hf_config)[1]
        assert (back.config.layers, back.config.hidden_size, back.config.heads) == (
            small.config.layers, small.config.hidden_size, small.config.heads,
        )  # fmt: skip


def trained(made, optimizer, params, state, steps=3):
    decoder = gpt.build(made.config, made.vocab_size)

    def loss(params):
        scores: Any = decoder.apply({"params": params}, TOKENS)
        scores = scores[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(scores, TOKENS[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.slow
def test_training_goes_on_from_the_cut_state_as_from_the_masked_one():
    made = model("llama")
    groups = all_groups(made.config)
    keep = chosen(groups, made.params)
    optimizer = optax.chain(optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation())
    params, state = trained(made, optimizer, made.params, optimizer.init(made.params))
    mask = structured.unit_mask(params, groups, keep)
    zeroed, held = masks.apply(params, mask), masks.hold_moments(state, mask)
    wanted, _ = trained(made, masks.keep(optimizer, mask), zeroed, held)
    small = cut_model(dataclasses.replace(made, params=params), groups, keep)
    small_state = structured.cut(state, groups, keep)
    assert jax.tree.structure(small_state) == jax.tree.structure(optimizer.init(small.params))
    found, _ = trained(small, optimizer, small.params, small_state)
    for (name, one), (_, two) in zip(
        tree.named_leaves(structured.cut(wanted, groups, keep)), tree.named_leaves(found),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_statistics_masks_and_the_state_of_a_held_optimizer_are_cut_alike():
    made = model("llama")
    groups = all_groups(made.config)
    keep = chosen(groups, made.params)
    small = structured.cut(made.params, groups, keep)

    stats = trajectory.init(made.params, measures=("late_mean", "votes"), compensated=True)
    stats = trajectory.update(stats, made.params)
    cut_stats = structured.cut(stats, groups, keep)
    clone = trajectory.read(cut_stats, "late_mean")
    chosen_weights = tree.prunable(small)
    wanted = tree.map_named(lambda _, w, c: w if c else None, small, chosen_weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clone, wanted)

    half = masks.by_sparsity(importance.score("magnitude", made.params), 0.5)
    jax.tree.map(
        np.testing.assert_array_equal,
        masks.apply(small, structured.cut(half, groups, keep)),
        structured.cut(masks.apply(made.params, half), groups, keep),
    )
    held = masks.keep(optax.adamw(1e-3), half).init(made.params)
    again = masks.keep(optax.adamw(1e-3), structured.cut(half, groups, keep)).init(small)
    assert jax.tree.map(jnp.shape, structured.cut(held, groups, keep)) == jax.tree.map(
        jnp.shape, again
    )
    assert structured.cut(optax.sgd(0.1).init(made.params), groups, keep) == optax.sgd(0.1).init({})


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_cut_model(tmp_path, name):
    torch = pytest.importorskip("torch", reason="transformers needs it to load a model")
    transformers = pytest.importorskip("transformers", reason="loads the folder")
    made = model(name)
    for units in ("neurons", attention_units(made.config), "layers"):
        groups = structured.groups(made.config, units)
        # Torch's experts need hidden widths that are multiples of 16 bytes.
        keep = chosen(groups, made.params, multiple=4 if units == "neurons" else 1)
        small = cut_model(made, groups, keep)
        try:
            path = interop.export(tmp_path / units, small)
        except InputError:
            assert units.endswith("heads")
            assert not has_head_width(made)
            continue
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.no_grad():
            wanted = loaded.eval()(torch.tensor(TOKENS.astype("int64"))).logits.numpy()
        found = logits(small, TOKENS)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
