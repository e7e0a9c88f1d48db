"""Block-by-block pruning of NNX modules with a list of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swe_prune import blockwise, calibration, importance, layout, masks, tree
from swe_prune.errors import InputError

BLOCKS = r"layers/\d+"


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.dropout(self.down(nnx.gelu(self.up(x))), deterministic=True)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 11, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


MODEL = Model(nnx.Rngs(0))
BATCHES = list(np.random.default_rng(0).integers(0, 11, (3, 4, 6)))


def by_name(found):
    return {name.removesuffix("/value"): leaf for name, leaf in tree.named_leaves(found)}


def test_the_first_block_is_pruned_as_at_once_and_the_next_on_what_the_pruned_one_gives():
    params = nnx.state(MODEL, nnx.Param)
    pruned, mask, reports = blockwise.prune_blocks(
        MODEL, params, BATCHES, blocks=BLOCKS, sparsity=0.5, method="wanda"
    )
    assert len(reports) == 12
    assert type(pruned) is type(params)
    found = by_name(mask)
    assert found["head/kernel"] is None

    def at_once(params):
        measured = calibration.inputs(MODEL, params, BATCHES)
        scores = importance.score("wanda", params, measured=measured)
        return by_name(
            masks.by_sparsity(
                scores,
                0.5,
                "row",
                rounding="down",
                ties="last",
                layout=layout(MODEL, params, BATCHES[0]),
            )
        )

    # Of the second block on the inputs that the model with the first one pruned gives.
    first = tree.map_leaves(
        lambda name, old, new: new if name.startswith("layers/0") else old, params, pruned
    )
    for start, wanted in (("layers/0", at_once(params)), ("layers/1", at_once(first))):
        for name, kept in found.items():
            if kept is not None and name.startswith(start):
                np.testing.assert_array_equal(kept, wanted[name], err_msg=name)


@pytest.mark.parametrize("given", ["module", "dict"])
def test_a_module_and_a_pure_dict_give_what_its_state_gives(given):
    params = MODEL if given == "module" else nnx.to_pure_dict(nnx.state(MODEL, nnx.Param))
    arguments = {"blocks": BLOCKS, "sparsity": 0.5, "method": "sparsegpt"}
    before = jax.tree.map(jnp.copy, nnx.state(MODEL, nnx.Param))
    pruned, mask, _ = blockwise.prune_blocks(MODEL, params, BATCHES, **arguments)
    wanted, _, _ = blockwise.prune_blocks(MODEL, nnx.state(MODEL, nnx.Param), BATCHES, **arguments)
    got = by_name(pruned)
    for name, leaf in by_name(wanted).items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    assert masks.summary(mask).sparsity == 0.5
    assert type(pruned) is type(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.state(MODEL, nnx.Param)))


def test_what_is_no_module_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"must be a Linen or an NNX module .* got function"):
        blockwise.prune_blocks(lambda p, x: x, {}, BATCHES, blocks=BLOCKS, sparsity=0.5)
    with pytest.raises(InputError, match="layer/0"):
        blockwise.prune_blocks(
            MODEL, nnx.state(MODEL, nnx.Param), BATCHES, blocks=["layer/0"], sparsity=0.5
        )
