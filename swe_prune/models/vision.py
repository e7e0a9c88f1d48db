"""CLIP's vision tower, whose features Phi-3-vision reads.

A crop is cut into patches, each of which becomes a token; a class token stands before them. The
blocks are those of the decoder, without a causal mask. Phi-3-vision reads the hidden state before
the last block and drops the class token, so the last block and the norm behind it get no gradient:
they are parameters of the checkpoint that the model does not use.

Sources: Radford et al., "Learning transferable visual models from natural language supervision",
2021; https://github.com/huggingface/transformers, models/clip/modeling_clip.py.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from swe_prune.bounds import POSITIVE
from swe_prune.config import ModelConfig, VisionConfig
from swe_prune.errors import InputError
from swe_prune.models.block import Block, scanned
from swe_prune.models.kv_cache import PLAIN
from swe_prune.models.layers import norm


def check(config: VisionConfig) -> None:
    """Raises InputError if a setting is out of range, or the sizes do not fit together."""
    POSITIVE.check(config.init_stddev, "config.model.vision.init_stddev")
    if config.image < 1 or config.patch < 1 or config.image % (2 * config.patch):
        raise InputError(
            f"config.model.vision.image must be a multiple of 2 * patch = {2 * config.patch}, "
            f"since 2 x 2 patches become one token, got {config.image}"
        )
    if config.heads < 1 or config.width % config.heads:
        raise InputError(
            f"config.model.vision.width must be a multiple of heads = {config.heads}, got "
            f"{config.width}"
        )
    for name, least in (("layers", 2), ("crops", 1)):
        if getattr(config, name) < least:
            raise InputError(
                f"config.model.vision.{name} must be at least {least}, got {getattr(config, name)}"
            )


def encoder(config: VisionConfig, of: ModelConfig) -> ModelConfig:
    """Returns the settings of the tower's blocks, computed as the decoder's are.

    Args:
        config: Sizes of the tower.
        of: Settings of the decoder, whose dtype and switches the tower has too.
    """
    return ModelConfig(
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        hidden=config.hidden,
        context=config.side**2 + 1,
        activation=config.activation,
        norm_epsilon=config.norm_epsilon,
        use_bias=True,
        positions="none",
        init_stddev=config.init_stddev,
        causal=False,
        dtype=of.dtype,
        remat=of.remat,
        scan_layers=of.scan_layers,
    )


class VisionTower(nn.Module):
    """Vision tower: pixels of crops to features of their patches.

    Attributes:
        config: Sizes of the tower.
        blocks: Settings of its blocks, from `encoder`.
        constrain: Function applied to the activations between blocks; see `gpt.GPT`.
    """

    config: VisionConfig
    blocks: ModelConfig
    constrain: Callable[[Array], Array] = lambda x_NxD: x_NxD

    def __call__(self, pixels_BxYxXx3: Float[Array, "B Y X 3"]) -> Float[Array, "B P D"]:
        """Returns the features of the patches, row by row, from before the last block.

        Args:
            pixels_BxYxXx3: Normalized crops, `config.image` pixels a side.
        """
        every = self.config.layers
        # The last block has no use but in the checkpoint, so it is only initialized.
        states, _ = self._run(pixels_BxYxXx3, every if self.is_initializing() else every - 1)
        return states[-2 if self.is_initializing() else -1][:, 1:]

    def encode(
        self, pixels_BxYxXx3: Float[Array, "B Y X 3"]
    ) -> tuple[list[Float[Array, "B P D"]], Float[Array, "B D"]]:
        """Returns the hidden states before each block and behind the last, and the pooled output.

        Args:
            pixels_BxYxXx3: Normalized crops, `config.image` pixels a side.
        """
        return self._run(pixels_BxYxXx3, self.config.layers)

    @nn.compact
    def _run(self, pixels_BxYxXx3: Array, layers: int) -> tuple[list[Array], Array]:
        # 1. A token for each patch, and the class token before them, with learned positions.
        vision, cfg = self.config, self.blocks
        batch, side, patch = len(pixels_BxYxXx3), vision.side, vision.patch
        x = pixels_BxYxXx3.reshape(batch, side, patch, side, patch, 3)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, side * side, -1)  # as torch lays out a
        init = nn.initializers.normal(vision.init_stddev)  # patch: color, row, column
        embed = nn.Dense(vision.width, False, cfg.dtype, kernel_init=init, name="patch_embedding")
        # Wider than CLIP's, so that a narrow tower sees where a patch is from the first step.
        wide = nn.initializers.normal(vision.width**-0.5)
        first_D = self.param("class_embedding", wide, (vision.width,)).astype(cfg.dtype)
        at_PxD = self.param("position_embedding", wide, (side**2 + 1, vision.width))
        x_BxPxD = jnp.concatenate(
            [jnp.broadcast_to(first_D, (batch, 1, vision.width)), embed(x)], axis=1
        )
        x_BxPxD = norm(cfg, "pre_norm")(x_BxPxD + at_PxD.astype(cfg.dtype))
        # 2. The blocks.
        states, x_NxD = [x_BxPxD], self.constrain(x_BxPxD.reshape(-1, vision.width))
        if cfg.scan_layers and not self.is_initializing() and layers < vision.layers:
            used = dataclasses.replace(cfg, layers=layers)
            params = self.variables["params"]
            x_NxD = scanned(used, params, x_NxD, batch, False, PLAIN, None, self.constrain)
            return [x_NxD.reshape(x_BxPxD.shape)], x_NxD
        block = nn.remat(Block, static_argnums=(2, 3)) if cfg.remat else Block
        for layer in range(layers):
            x_NxD = self.constrain(block(cfg, name=f"block_{layer}")(x_NxD, batch, False))
            states.append(x_NxD.reshape(x_BxPxD.shape))
        if layers < vision.layers:
            return states, x_NxD
        return states, norm(cfg, "post_norm")(states[-1][:, 0])
