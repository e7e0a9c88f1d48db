"""A step of a model of images and text on eight devices is the step on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swe_prune import masks, parallel, tree
from swe_prune.config import ModelConfig, ParallelConfig, VisionConfig
from swe_prune.models import phi3v
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib

pytestmark = [
    pytest.mark.multidevice,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices; see eight_devices.py"),
]
CONFIG = ModelConfig(
    layers=2,
    heads=2,
    width=8,
    hidden=16,
    context=64,
    gated=True,
    norm="rms",
    positions="rope",
    activation="silu",
    tied_head=False,
    scan_layers=True,
    remat=True,
    vision=VisionConfig(layers=3, heads=2, width=8, hidden=16, image=8, patch=2, crops=2),
)
VOCAB = 16


def batch():
    rng = np.random.default_rng(0)
    length = CONFIG.vision.tokens(1, 2)
    image = np.full((8, length), phi3v.IMAGE_TOKEN)
    tokens_BxL = np.concatenate([image, rng.integers(0, VOCAB, (8, 8))], 1).astype(np.int32)
    weights_BxL = (tokens_BxL >= 0).astype(np.float32)
    pixels = rng.normal(size=(8, 3, 8, 8, 3)).astype(np.float32)
    inputs = {"tokens": tokens_BxL, "pixels": pixels, "grid": np.tile([[1, 2]], (8, 1))}
    return {"inputs": inputs, "targets": np.maximum(tokens_BxL, 0), "weights": weights_BxL}


def test_a_step_divided_over_data_fsdp_and_tensor():
    single = phi3v.build(CONFIG, VOCAB)
    init = functools.partial(state_lib.init_params, single, 0, phi3v.example(CONFIG, 4))
    params = jax.tree.map(lambda leaf: 4 * leaf, init())
    mask = tree.map_named(
        lambda _, leaf, chosen: jnp.abs(leaf) > jnp.median(jnp.abs(leaf)) if chosen else None,
        params,
        tree.prunable(params, phi3v.PRUNABLE),
    )
    optimizer = optax.sgd(0.1)
    state = state_lib.create(params, optimizer, 0, masks=mask)
    one, wanted = step_lib.compile_train_step(single, optimizer)(
        jax.tree.map(jnp.copy, state), batch()
    )
    mesh = parallel.mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    specs, undivided = parallel.partition(params, phi3v.partition_rules(CONFIG), mesh)
    assert not [line for line in undivided if "position_embedding" not in line]
    like = parallel.with_shardings(jax.eval_shape(lambda: params), specs, mesh)
    constrain = functools.partial(parallel.constrain_rows, mesh=mesh)
    place = functools.partial(parallel.shard_state, params=like)
    step = step_lib.compile_train_step(
        phi3v.build(CONFIG, VOCAB, constrain), optimizer, place=place
    )
    many, found = step(place(state), parallel.shard_batch(batch(), mesh))
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    assert int(masks.revived(many.params, many.masks)) == 0
    for (name, a), (_, b) in zip(
        tree.named_leaves(one.params), tree.named_leaves(many.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)
