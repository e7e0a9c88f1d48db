"""What families have beyond GPT-2 and Llama: layers that differ, experts, norms; and their pruning.

The logits are held to those of transformers in interop_golden_test.py and interop_logits_test.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_tiny import CONFIGS, VOCAB, left_padded, logits, model

from swe_prune import blockwise, importance, masks, parallel, tree
from swe_prune.config import ModelConfig, ParallelConfig
from swe_prune.errors import InputError
from swe_prune.evaluation.generation import generate
from swe_prune.evaluation.sampling import GREEDY
from swe_prune.layout import layout
from swe_prune.models import gpt

NEW = ("qwen2 window", "qwen3", "granite", "stablelm parallel", "smollm3", "olmo2", "gpt_neox",
       "opt", "gemma2", "gemma3_text", "mixtral")  # fmt: skip
TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)


@pytest.fixture(scope="module")
def models():
    return {name: model(name) for name in NEW}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "smollm3", "opt", "mixtral"])
def test_greedy_generation_is_that_of_the_whole_text(models, name):
    made, prompts = models[name], [[3, 1, 4, 1, 5, 9, 2], [2, 6, 5]]
    decoder = gpt.build(made.config, VOCAB)
    found = generate(decoder, made.params, prompts, 9, sampling=GREEDY, seed=0)
    for prompt, new in zip(prompts, found.tokens, strict=True):
        text = np.array([[*prompt, *new]], np.int32)
        likeliest = logits(made, text)[0].argmax(-1)
        np.testing.assert_array_equal(likeliest[len(prompt) - 1 : -1], new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "mixtral"])
def test_remat_changes_no_loss_and_no_gradient(models, name):
    made, (tokens_BxL, _) = models[name], left_padded([9, 9], 9)

    def loss_and_gradients(config):
        decoder = gpt.build(config, VOCAB)

        def loss(params):
            logits_BxLxV = decoder.apply({"params": params}, tokens_BxL)
            return -jax.nn.log_softmax(logits_BxLxV)[:, :-1].mean()

        return jax.jit(jax.value_and_grad(loss))(made.params)

    plain = loss_and_gradients(made.config)
    again = loss_and_gradients(dataclasses.replace(made.config, remat=True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, plain, again)


def test_one_expert_is_the_plain_mlp():
    made = model("mixtral", num_local_experts=1, num_experts_per_tok=1)
    plain = dataclasses.replace(made.config, experts=None)
    params = jax.tree.map(lambda leaf: leaf, made.params)
    for block in ("block_0", "block_1"):
        kernels = params[block]["mlp"]
        params[block]["mlp"] = {
            name: {"kernel": kernels[name]["kernel"][0]} for name in ("gate", "up", "down")
        }
    tokens_BxL, _ = left_padded([9], 9)
    wanted = logits(dataclasses.replace(made, config=plain, params=params), tokens_BxL)
    np.testing.assert_allclose(logits(made, tokens_BxL), wanted, rtol=1e-5, atol=1e-5)


def test_an_expert_learns_from_its_own_tokens_only(models):
    made = model("mixtral", num_experts_per_tok=1, num_hidden_layers=1)
    decoder = gpt.build(made.config, VOCAB)
    one_token = jnp.array([[7]], jnp.int32)

    def loss(params):
        return decoder.apply({"params": params}, one_token).std()

    slopes = jax.jit(jax.grad(loss))(made.params)["block_0"]["mlp"]
    for name in ("gate", "up", "down"):
        used = np.abs(np.asarray(slopes[name]["kernel"])).max((1, 2)) > 0
        assert used.sum() == 1


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", NEW)
def test_magnitude_prunes_each_kernel_and_each_expert_by_itself(models, name):
    made = models[name]
    traced = layout(gpt.build(made.config, VOCAB), made.params, TOKENS)
    prunable = tree.prunable(made.params, layout=traced)
    scores = importance.score("magnitude", made.params, prunable=prunable, layout=traced)
    mask = masks.by_sparsity(scores, 0.5, layout=traced)
    for leaf_name, keep in tree.named_leaves(mask):
        kernel = leaf_name.endswith("kernel") and "router" not in leaf_name
        assert (keep is not None) == (kernel and not leaf_name.startswith("head")), leaf_name
        if keep is not None:
            copies = np.asarray(keep).reshape(len(keep) if keep.ndim == 3 else 1, -1)
            assert (copies.sum(1) == copies.shape[1] // 2).all()


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neox", "mixtral"])
def test_wanda_goes_block_by_block(models, name):
    made = models[name]
    batches = [left_padded([20, 20], 20, seed)[0] for seed in range(2)]
    decoder = gpt.build(made.config, VOCAB)
    params, mask, reports = blockwise.prune_blocks(
        decoder, {"params": made.params}, batches, blocks=gpt.BLOCKS, sparsity=0.5
    )
    kernels = 6 if name == "gpt_neox" else 7
    assert len(reports) == kernels * made.config.layers
    assert all(abs(report.sparsity - 0.5) < 0.05 for report in reports)
    removed = dict(tree.named_leaves(params))
    for leaf_name, keep in tree.named_leaves(mask):
        if keep is not None:
            assert not np.asarray(removed[leaf_name])[~np.asarray(keep)].any()


@pytest.mark.parametrize("name", ["mixtral", "stablelm parallel", "opt"])
def test_every_parameter_has_a_partition_rule(models, name):
    made = models[name]
    mesh = parallel.mesh(ParallelConfig())
    specs, _ = parallel.partition(made.params, gpt.partition_rules(made.config), mesh)
    assert jax.tree.structure(specs) == jax.tree.structure(made.params)


ROPE = ModelConfig(layers=2, heads=2, width=8, positions="rope", gated=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sliding": (True,), "window": 3}, "sliding must have one entry for each of the 2 layers"),
        ({"rotary": (True,) * 3}, "rotary must have one entry"),
        ({"sliding": (True, False)}, "sliding needs a window"),
        ({"sliding_theta": 5.0, "window": 3}, "sliding_theta needs config.model.sliding"),
        ({"rotary": (True, False), "scan_layers": True}, "layers that differ"),
        ({"attention_cap": 0.0}, "attention_cap must be a finite number above 0, got 0.0"),
        ({"logit_divisor": -1.0}, "logit_divisor must be a finite number above 0"),
        ({"position_offset": -1}, "position_offset must be an integer of at least 0"),
        ({"norm_plus_one": True}, "norm_plus_one needs norm 'rms'"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token must be 1 to experts = 2"),
        ({"experts": 2, "gated": False}, "experts needs a gated MLP without biases"),
        ({"experts": 2, "use_bias": True}, "experts needs a gated MLP without biases"),
        ({"norms": "after"}, "model.norms must be one of pre, post, sandwich"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        gpt.build(dataclasses.replace(ROPE, **changes), 9)


def test_all_families_are_tried():
    assert {CONFIGS[name]["model_type"] for name in (*NEW, "gpt2", "llama", "mistral", "phi3")} == {
        config["model_type"] for config in CONFIGS.values()
    }
