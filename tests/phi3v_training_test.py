"""Training, evaluation and pruning of a model of images and text through the one train step."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from PIL import Image

from swe_prune import importance, masks, recipe, trajectory, tree
from swe_prune.config import ModelConfig, PhaseConfig, VisionConfig
from swe_prune.data import image_text, images
from swe_prune.data.char_tokenizer import CharTokenizer
from swe_prune.data.price_rows import Row, price_in
from swe_prune.errors import InputError
from swe_prune.evaluation import GREEDY, generate
from swe_prune.evaluation.prices import price_errors
from swe_prune.layout import layout
from swe_prune.models import phi3v
from swe_prune.recipe import Recipe
from swe_prune.study.freezing import frozen
from swe_prune.training import lora, losses
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib

CONFIG = ModelConfig(
    layers=1,
    heads=2,
    width=8,
    hidden=12,
    context=64,
    vision=VisionConfig(layers=3, heads=2, width=8, hidden=12, image=8, patch=2, crops=2),
    **tiny.PHI3V,
)
PHASE = PhaseConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup=0, weight_decay=0.5)


def rows(count):
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (16, 8), (40 * number, 20, 250 - 40 * number)).save(file, "PNG")
        yield Row(
            lambda file=file: file.getvalue(), "<|image_1|>it costs", f" {number + 3}\n", "it"
        )


@pytest.fixture(scope="module")
def split():
    good = [(row, (1, 2)) for row in rows(6)]
    tokenizer = CharTokenizer.from_texts(["it costs 0123456789\n"])
    made = image_text._encoded(good, CONFIG, tokenizer)
    return dataclasses.replace(made, lengths={2: 40}), tokenizer


@pytest.fixture(scope="module")
def model(split):
    return phi3v.build(CONFIG, split[1].vocab_size)


@pytest.fixture(scope="module")
def params(model):
    made = state_lib.init_params(model, 0, phi3v.example(CONFIG, 4))
    return jax.device_get(jax.tree.map(lambda leaf: 4 * leaf, made))


@pytest.fixture(scope="module")
def batch(split):
    return split[0].batch([0, 1, 2, 3])


def named(params):
    return dict(tree.named_leaves(jax.device_get(params)))


def test_the_loss_is_the_mean_over_the_answers(model, params, batch):
    logits = jax.jit(model.apply)({"params": params}, batch["inputs"])
    losses_BxL = np.asarray(losses.cross_entropy(logits, batch["targets"]), np.float64)
    wanted = (losses_BxL * batch["weights"]).sum() / batch["weights"].sum()
    found = step_lib.loss_fn(model)(params, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    summed = step_lib.compile_eval_step(model)(params, batch)
    np.testing.assert_allclose(summed, wanted * batch["weights"].sum(), rtol=1e-5)


@pytest.mark.slow
def test_a_step_in_parts_tracks_and_leaves_the_unused_weights_as_they_are(model, params, batch):
    still = frozen(CONFIG, params, PHASE)
    optimizer = optimizer_lib.build(PHASE, 4, frozen=still)
    chosen = tree.prunable(params, phi3v.PRUNABLE)
    stats = trajectory.init(params, ("late_mean",), chosen)
    results = []
    for parts in (1, 2):
        state = state_lib.create(params, optimizer, 0, stats=stats)
        step = step_lib.compile_train_step(
            model, optimizer, accumulate=parts, forward=optimizer_lib.stop_frozen(still)
        )
        state, metrics = step(jax.tree.map(jnp.array, state), batch)
        results.append((named(state.params), float(metrics["loss"])))
    (whole, loss), (parted, parted_loss) = results
    np.testing.assert_allclose(loss, parted_loss, rtol=1e-5)
    # The mean over parts is the same gradient; Adam's first step may turn its rounding into 1e-2.
    differ = [name for name in whole if not np.allclose(whole[name], parted[name], atol=2.1e-2)]
    assert not differ
    scores = importance.score("swe", state.params, stats=state.stats)
    scored = {name for name, leaf in tree.named_leaves(scores) if leaf is not None}
    assert scored == {name for name in whole if name.startswith("decoder/block_0/")
                      and name.endswith("kernel")}  # fmt: skip
    for name, before in named(params).items():
        if not name.endswith("key/bias"):  # has no gradient but a rounding's
            assert np.any(whole[name] != before) != phi3v.unused(CONFIG, name), name


def test_rules_choose_what_a_phase_trains(model, params, batch):
    phase = dataclasses.replace(PHASE, trained=(r"^decoder/block_", r"^projection/"))
    still = frozen(CONFIG, params, phase)
    optimizer = optimizer_lib.build(phase, 4, frozen=still)
    chosen = tree.prunable(params, phi3v.PRUNABLE)
    mask = masks.by_sparsity(importance.score("magnitude", params, prunable=chosen), 0.5)
    state = state_lib.create(jax.tree.map(jnp.array, params), optimizer, 0, masks=mask)
    step = step_lib.compile_train_step(model, optimizer, forward=optimizer_lib.stop_frozen(still))
    state, metrics = step(state, batch)
    assert int(metrics["revived"]) == 0
    after = named(state.params)
    for name, before in named(params).items():
        trained = name.startswith(("decoder/block_", "projection/"))
        assert np.any(after[name] != before) == trained, name
    scores = importance.score(
        "magnitude_curvature", state.params, opt_state=state.opt_state, prunable=chosen
    )
    assert {name for name, leaf in tree.named_leaves(scores) if leaf is not None} == {
        name for name, mark in tree.named_leaves(chosen) if mark
    }
    moments = {name for name, _ in tree.named_leaves(state.opt_state) if "/mu/" in name}
    assert moments
    assert not any("vision/" in name for name in moments)
    with pytest.raises(InputError, match=r"finetune\.trained: rule 'nowhere' matches no weight"):
        frozen(CONFIG, params, dataclasses.replace(PHASE, trained=("nowhere",)))


@pytest.mark.slow
def test_adapters_of_a_pruned_model_are_tracked_in_the_same_step(model, params, batch):
    chosen = tree.prunable(params, phi3v.PRUNABLE)
    mask = masks.by_sparsity(importance.score("magnitude", params, prunable=chosen), 0.5)
    adapters = lora.init(params, 2, 4.0, jax.random.key(0), targets=phi3v.PRUNABLE)
    optimizer = optax.adamw(1e-2)
    stats = trajectory.init(adapters, ("late_mean",), jax.tree.map(lambda _: True, adapters))
    state = state_lib.create(adapters, optimizer, 0, stats=stats)
    step = step_lib.compile_train_step(model, optimizer)
    base = masks.apply(params, mask)
    state, first = step(state, batch, state_lib.Frozen(base=base, masks=mask))
    for _ in range(3):
        state, last = step(state, batch, state_lib.Frozen(base=base, masks=mask))
    assert float(last["loss"]) < float(first["loss"])
    merged = lora.merge(base, state.params, mask)
    assert int(masks.revived(merged, mask)) == 0
    assert int(state.stats.count) == 4


def test_the_traced_layout_knows_the_kernels_of_both_towers(model, params, batch):
    axes = dict(tree.named_leaves(layout(model, params, batch)))
    for name in ("vision/block_1/mlp/up/kernel", "projection/first/kernel",
                 "decoder/block_0/mlp/up/kernel", "vision/patch_embedding/kernel"):  # fmt: skip
        assert axes[name].inputs == (0,), name
        assert axes[name].outputs == (1,), name
    assert axes["vision/block_2/mlp/up/kernel"] is None or (
        axes["vision/block_2/mlp/up/kernel"].kind == "vector"
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "request_",
    [
        Recipe("wanda", sparsity=0.5, scope="row"),
        Recipe("wanda", sparsity=0.5, scope="row", allocation="ecoflap"),
        Recipe("magnitude", sparsity=0.5, allocation="owl"),
        Recipe(method="wanda", sparsity=0.5),
    ],
    ids=["wanda", "ecoflap", "owl", "blockwise"],
)
def test_criteria_allocations_and_methods_that_need_data(model, params, batch, request_):
    """Over both towers, and block by block in the decoder."""
    rules = (r"^(decoder|vision)/block_[01]/.*kernel$",)
    chosen = tree.prunable(params, rules if request_.method is None else phi3v.PRUNABLE)
    loss = step_lib.loss_fn(model)
    evidence = recipe.measure(
        [request_], model, params, [batch], loss=loss, prunable=chosen, stats=None, opt_state=None
    )
    found, mask = recipe.prune(
        request_,
        params,
        evidence,
        prunable=chosen,
        layout=layout(model, params, batch),
        model=model,
        blocks=phi3v.blocks(CONFIG),
        batches=[batch],
        loss=loss,
    )
    tally = masks.summary(mask)
    assert abs(tally.sparsity - 0.5) < 0.06
    assert int(masks.revived(found, mask)) == 0


@pytest.fixture(scope="module")
def trained(model, params, split):
    """Parameters that know the prices of some of the pictures."""
    optimizer = optax.adam(1e-2)
    state = state_lib.create(jax.tree.map(jnp.array, params), optimizer, 0)
    step = step_lib.compile_train_step(model, optimizer)
    for _ in range(60):
        state, _ = step(state, split[0].batch(range(6)))
    return state.params


@pytest.mark.slow
def test_generation_shows_the_picture_once_and_goes_on_with_words(model, trained, split):
    data, _ = split
    prompts = [data.tokens[n][: data.starts[n]] for n in (0, 4)]
    pictures = data.pictures([0, 4])
    found = generate(model, trained, prompts, 4, sampling=GREEDY, seed=0, images=pictures)
    run = jax.jit(model.apply)
    tokens_BxL = np.zeros((2, 40), np.int32)
    length = len(prompts[0])
    tokens_BxL[:, :length] = np.stack(prompts)
    for at in range(4):
        logits = run({"params": trained}, {"tokens": tokens_BxL, **pictures})
        tokens_BxL[:, length + at] = np.asarray(logits)[:, length + at - 1].argmax(-1)
    np.testing.assert_array_equal(found.tokens, tokens_BxL[:, length : length + 4])


def test_errors_of_prices(model, trained, split):
    data, tokenizer = split
    found = price_errors(model, trained, data, np.arange(6), tokenizer, batch=4)
    answers = [(one["price"], price_in(one["text"])) for one in found.prices]
    assert [price for price, _ in answers] == [3, 4, 5, 6, 7, 8]
    known = [abs(price - read) for price, read in answers if read is not None]
    assert found.generated["own"] == np.mean(known)
    assert found.unparsable["own"] == 6 - len(known)
    # It has learned the pictures by heart, so it can be told that it looks at them.
    assert found.generated["own"] < min(found.generated["blank"], found.generated["shuffled"])
    assert found.teacher_forced < found.teacher_forced_blank


def test_a_picture_is_prepared_once_for_all_errors(model, params, split, monkeypatch):
    data, tokenizer = split
    made, prepare = [], images.crops_of
    monkeypatch.setattr(images, "crops_of", lambda *of: made.append(of) or prepare(*of))
    price_errors(model, params, data, np.arange(6), tokenizer, batch=4)
    assert len(made) == 6


def test_answers_without_a_price_are_counted_apart(model, params, split):
    data, tokenizer = split
    nothing = jax.tree.map(np.zeros_like, params)  # the first symbol, a new line, forever
    found = price_errors(model, nothing, data, np.arange(6), tokenizer, batch=4)
    assert found.generated == {"own": None, "blank": None, "shuffled": None}
    assert found.unparsable == {"own": 6, "blank": 6, "shuffled": 6}
    assert found.teacher_forced == np.mean([3, 4, 5, 6, 7, 8])  # the recipe takes 0 for them
