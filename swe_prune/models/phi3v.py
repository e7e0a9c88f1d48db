"""Phi-3-vision: a decoder that reads images through CLIP's vision tower.

An image comes as crops of one size, the first of which is a global view of the whole image and the
others a grid that covers it. Of every crop the tower makes features, of which 2 x 2 become one. A
learned separator stands behind every row of features, and another one between the grid and the
global view. All of them are projected to the width of the decoder and take the places of the
tokens below 0 in the text:

    rows of the grid (each with a separator), the other separator, rows of the global view

Source: https://huggingface.co/microsoft/Phi-3-vision-128k-instruct (image_embedding_phi3_v.py,
where the separators are called sub_GN and glb_GN); Abdin et al., 2404.14219.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from swe_prune.config import ModelConfig
from swe_prune.config.model import IMAGE_TOKEN as IMAGE_TOKEN
from swe_prune.models import gpt
from swe_prune.models.checks import check
from swe_prune.models.kv_cache import Cache
from swe_prune.models.layers import dense
from swe_prune.models.vision import VisionTower, encoder
from swe_prune.models.vision import check as check_vision

Inputs = Array | Mapping[str, Array]
"""Tokens alone, int32 B x L, or {"tokens": int32 B x L, "pixels": B x N x Y x X x 3, "grid": int32
B x 2}: N crops, the global view first, of which a grid of rows x columns is the image's."""

PARTITION_RULES: tuple[gpt.Rule, ...] = (
    (r"patch_embedding/kernel$", (None, "fsdp")),
    (r"projection/first/kernel$", ("fsdp", "tensor")),
    (r"projection/second/kernel$", ("tensor", "fsdp")),
    gpt.POSITION_RULE,
)
"""Partition of the parameters that the decoder does not have; its rules cover both's blocks."""

PRUNABLE = (r"^decoder/block_[0-9]+/(attention|mlp)/\w+/kernel$",)
"""Rules of the weights that are pruned by default: the decoder's attention and MLP."""


class Phi3V(nn.Module):
    """Phi-3-vision: logits for the next token of a text with an image.

    Parameters are under `vision` (the tower), `projection`, and `decoder`, which is a `gpt.GPT`.

    Attributes:
        config: Sizes and choices of the decoder, and of the tower in `config.vision`.
        vocab_size: Size V of the vocabulary.
        constrain: Function applied to the activations between blocks; see `gpt.GPT`.
    """

    config: ModelConfig
    vocab_size: int
    constrain: Callable[[Array], Array] = gpt.identity

    def setup(self) -> None:
        """Makes the parts."""
        vision = self.config.vision
        assert vision is not None
        blocks = encoder(vision, self.config)
        self.vision = VisionTower(vision, blocks, self.constrain)
        self.projection = Projection(self.config)
        text = dataclasses.replace(self.config, vision=None)
        self.decoder = gpt.GPT(text, self.vocab_size, self.constrain)

    def __call__(
        self,
        inputs: Inputs,
        *,
        train: bool = False,
        valid_BxL: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Returns logits_BxLxV, float32.

        Args:
            inputs: Tokens, and of a text with an image also its crops; see `Inputs`. A row has as
                many `IMAGE_TOKEN`s as `VisionConfig.tokens` of its grid.
            train: Whether to apply dropout, which needs the rng "dropout".
            valid_BxL: False for padding, as in `gpt.GPT`.

        Raises:
            InputError: If L exceeds config.context (at trace time).
        """
        tokens_BxL, images_BxTxD = self._read(inputs)
        return self.decoder(tokens_BxL, train=train, valid_BxL=valid_BxL, images_BxTxD=images_BxTxD)

    def decode(
        self,
        inputs: Inputs,
        cache: Cache,
        valid_BxL: Bool[Array, "B L"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B L V"], Cache]:
        """Returns the logits of tokens that follow those in a KV cache; see `gpt.GPT.decode`."""
        tokens_BxL, images_BxTxD = self._read(inputs)
        return self.decoder.decode(tokens_BxL, cache, valid_BxL, images_BxTxD, last_only)

    def _read(self, inputs: Inputs) -> tuple[Array, Array | None]:
        if not isinstance(inputs, Mapping):
            if self.is_initializing():
                raise ValueError("initialize the model with an image; see `example`")
            return inputs, None
        return inputs["tokens"], self.embed(inputs["pixels"], inputs["grid"])

    def embed(
        self, pixels_BxNxYxXx3: Float[Array, "B N Y X 3"], grid_Bx2: Int[Array, "B 2"]
    ) -> Float[Array, "B T D"]:
        """Returns the embeddings of images, of which the first `VisionConfig.tokens` count.

        Args:
            pixels_BxNxYxXx3: Normalized crops, the global view first.
            grid_Bx2: Int32 rows and columns of the grid of the others.
        """
        vision = self.config.vision
        assert vision is not None
        batch, crops = pixels_BxNxYxXx3.shape[:2]
        features = self.vision(pixels_BxNxYxXx3.reshape(-1, *pixels_BxNxYxXx3.shape[2:]))
        # 2 x 2 features become one.
        cells = vision.cells
        x = features.reshape(-1, cells, 2, cells, 2, vision.width).transpose(0, 1, 3, 2, 4, 5)
        x_BxMxF = x.reshape(batch, crops * cells**2, 4 * vision.width)
        order_BxT = order(grid_Bx2, cells, crops)
        return self.projection(x_BxMxF, order_BxT)


class Projection(nn.Module):
    """Separators between features, and an MLP from features to the width of the decoder."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxMxF: Array, order_BxT: Array) -> Array:  # noqa: D102 (the class's)
        cfg = self.config
        init = nn.initializers.normal(cfg.init_stddev)
        names = ("row_separator", "global_separator")
        ends = [self.param(name, init, x_BxMxF.shape[-1:]) for name in names]
        ends_Bx2xF = jnp.broadcast_to(jnp.stack(ends), (len(x_BxMxF), 2, x_BxMxF.shape[-1]))
        x_BxMxF = jnp.concatenate([x_BxMxF, ends_Bx2xF.astype(x_BxMxF.dtype)], axis=1)
        x_BxTxF = jnp.take_along_axis(x_BxMxF, order_BxT[..., None], axis=1)
        h_BxTxD = dense(cfg, cfg.width, "first", True)(x_BxTxF)
        h_BxTxD = jax.nn.gelu(h_BxTxD, approximate=False)
        return dense(cfg, cfg.width, "second", True)(h_BxTxD)


def order(grid_Bx2: Int[Array, "B 2"], cells: int, crops: int) -> Int[Array, "B T"]:
    """Returns which feature is at each of the T image tokens of a batch of images.

    The features of N crops of C x C are numbered crop by crop and row by row; the two behind them
    are the separators of rows and of the global view. T is enough for every grid of N - 1 crops;
    behind the tokens of a smaller one the numbers mean nothing.

    Args:
        grid_Bx2: Int32 rows and columns of each grid.
        cells: C, features along the side of a crop.
        crops: N, crops with the global view.

    >>> order(jnp.array([[1, 1]]), 2, 2).tolist()  # 8 and 9 are the separators
    [[4, 5, 8, 6, 7, 8, 9, 0, 1, 8, 2, 3, 8]]
    """
    row_end = crops * cells**2
    number_T = jnp.arange(row_end + 1 + crops * cells, dtype=jnp.int32)

    def one(grid_2: Array) -> Array:
        rows, columns = grid_2[0], grid_2[1]

        def laid(number: Array, columns: Array | int, first: int) -> Array:
            row, column = jnp.divmod(number, columns * cells + 1)
            crop = first + row // cells * columns + column // cells
            feature = (crop * cells + row % cells) * cells + column % cells
            return jnp.where(column == columns * cells, row_end, feature)

        length = rows * cells * (columns * cells + 1)
        own_T, whole_T = laid(number_T, columns, 1), laid(number_T - length - 1, 1, 0)
        found = jnp.where(number_T < length, own_T, whole_T)
        found = jnp.where(number_T == length, row_end + 1, found)
        return jnp.clip(found, 0, row_end + 1)

    return jax.vmap(one)(grid_Bx2)


def build(
    config: ModelConfig, vocab_size: int, constrain: Callable[[Array], Array] = gpt.identity
) -> "gpt.GPT | Phi3V":
    """Builds the model of a config: of text alone, or with a vision tower if it has one.

    Args:
        config: Sizes and choices of the model.
        vocab_size: Size V of the vocabulary.
        constrain: Function applied to the activations between blocks; see `gpt.GPT`.

    Raises:
        InputError: If a setting is unknown, or settings do not fit together.
    """
    if config.vision is None:
        return gpt.build(config, vocab_size, constrain)
    check(config)
    check_vision(config.vision)
    return Phi3V(config, vocab_size, constrain)


def blocks(config: ModelConfig) -> str:
    """Returns the regular expression for the paths of the decoder's blocks, for `blockwise`."""
    return gpt.BLOCKS if config.vision is None else f"decoder/{gpt.BLOCKS}"


def unused(config: ModelConfig, name: str) -> bool:
    """Returns whether a parameter is in the checkpoint and in no computation, so has no gradient.

    Args:
        config: Sizes and choices of the model.
        name: Name of the parameter.

    >>> from swe_prune.config import VisionConfig
    >>> unused(ModelConfig(vision=VisionConfig(layers=4)), "vision/block_3/mlp/up/kernel")
    True
    """
    if config.vision is None:
        return False
    last = f"vision/block_{config.vision.layers - 1}/"
    return name.startswith((last, "vision/post_norm/"))


def partition_rules(config: ModelConfig) -> tuple[gpt.Rule, ...]:
    """Returns the partition rules of the model's parameters, for `parallel.partition`."""
    rules = gpt.partition_rules(config)
    return rules if config.vision is None else (*PARTITION_RULES, *rules)


def example(config: ModelConfig, length: int, batch: int = 1, crops: int = 1) -> Any:
    """Returns zeros as inputs of the model, for initialization and traces.

    Args:
        config: Sizes and choices of the model.
        length: Number of tokens L.
        batch: Number of rows B.
        crops: Number of crops of an image, next to its global view.
    """
    tokens_BxL = jnp.zeros((batch, length), jnp.int32)
    if config.vision is None:
        return tokens_BxL
    side = config.vision.image
    return {
        "tokens": tokens_BxL,
        "pixels": jnp.zeros((batch, crops + 1, side, side, 3), jnp.float32),
        "grid": jnp.tile(jnp.array([[1, crops]], jnp.int32), (batch, 1)),
    }
