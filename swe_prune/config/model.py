"""The settings of a model."""

import dataclasses
from typing import Any, Literal

from swe_prune.bounds import COUNT, FRACTION, INDEX, NOT_NEGATIVE, POSITIVE, SHARE, Bound
from swe_prune.errors import InputError

Activation = Literal["gelu", "gelu_exact", "quick_gelu", "relu", "silu", "tanh"]
Norm = Literal["layer", "rms"]
Norms = Literal["pre", "post", "sandwich"]
HeadNorm = Literal["none", "head", "each_head", "projection"]
Residual = Literal["sequential", "parallel", "parallel_one_norm"]
Positions = Literal["learned", "rope", "none"]
RopeScaling = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]
ComputeDtype = Literal["float32", "bfloat16"]
"""Choices of the settings below; `convert` and `check_choices` refuse every other value."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and their scaling to longer texts; see `models/rope.py`."""

    theta: float = 10000.0  # base of the rotation frequencies
    share: float = 1.0  # fraction of a head's width that is rotated
    scaling: RopeScaling = "none"  # method that extends the positions to a longer context
    factor: float | None = None  # scaling factor; None: context / original_context
    original_context: int | None = None  # context before scaling; None: context
    low_frequency: float = 1.0  # low-frequency factor of "llama3"
    high_frequency: float = 4.0  # high-frequency factor of "llama3"
    beta_fast: float = 32.0  # rotations above which "yarn" leaves a frequency unchanged
    beta_slow: float = 1.0  # rotations below which "yarn" interpolates a frequency fully
    truncate: bool = True  # whether "yarn" rounds the bounds of its ramp to whole frequencies
    mscale: float | None = None  # numerator of the attention scale of "yarn"; needs mscale_all
    mscale_all: float | None = None  # denominator of the attention scale of "yarn"; needs mscale
    attention_factor: float | None = None  # attention scale of "yarn" and "longrope"; None: derived
    short_factors: tuple[float, ...] = ()  # one divisor per frequency of "longrope", short texts
    long_factors: tuple[float, ...] = ()  # one divisor per frequency of "longrope", long texts


PER_LAYER = ("sliding", "rotary", "layer_hidden", "layer_heads", "layer_kv_heads")
"""Fields of `ModelConfig` with an entry for each layer, or none."""


IMAGE_TOKEN = -1
"""Token in whose place an embedding of an image is put."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower of a model of images and text; see `models/vision.py`.

    The sizes are those of CLIP ViT-L/14-336, the tower of Phi-3-vision.
    """

    layers: int = 24  # number of Transformer blocks; the last one feeds no decoder
    heads: int = 16  # number of heads per layer
    width: int = 1024  # width of the residual stream
    hidden: int = 4096  # width of the MLP
    image: int = 336  # side of a crop in pixels, a multiple of 2 * patch
    patch: int = 14  # side of a patch in pixels
    crops: int = 16  # largest number of crops of an image, next to its global view
    activation: Activation = "quick_gelu"  # nonlinearity of the MLP
    norm_epsilon: float = 1e-5  # constant added to the variance in a norm
    init_stddev: float = 0.02  # standard deviation of the kernels' initial values

    @property
    def side(self) -> int:
        """Patches along one side of a crop."""
        return self.image // self.patch

    @property
    def cells(self) -> int:
        """Image tokens along one side of a crop, each of 2 x 2 patches."""
        return self.side // 2

    def tokens(self, rows: int, columns: int) -> int:
        """Returns the number of tokens of an image with a grid of crops.

        >>> VisionConfig().tokens(4, 4), VisionConfig().tokens(1, 3)
        (2509, 601)
        """
        own = (rows * columns + 1) * self.cells**2
        return own + 1 + (rows + 1) * self.cells  # and a separator after each row


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer of one of many families, from GPT-2 on; see `models/gpt.py`."""

    layers: int = 6  # number of Transformer blocks
    heads: int = 6  # number of query heads per layer
    width: int = 384  # width of the residual stream
    context: int = 256  # largest number of tokens the model attends to
    vocab_size: int | None = None  # number of token ids; None: the size of the tokenizer
    hidden_ratio: int = 4  # width of the MLP as a multiple of width, where hidden is None
    activation: Activation = "gelu"  # nonlinearity of the MLP; "gelu": its tanh form, as in GPT-2
    use_bias: bool = False  # whether dense layers and layer norms have a bias
    qkv_bias: bool | None = None  # bias of queries, keys and values; None: use_bias
    out_bias: bool | None = None  # bias of the attention output; None: use_bias
    mlp_bias: bool | None = None  # bias of the MLP; None: use_bias
    head_bias: bool | None = None  # bias of an untied output head; None: use_bias
    tied_head: bool = True  # whether the output head is the transposed embedding
    init_stddev: float = 0.02  # standard deviation of the initial embeddings and kernels; those
    # that add to the residual stream start smaller by 1 / sqrt(2 * layers)
    dropout: float = 0.0  # dropout rate of training, in [0, 1)
    dtype: ComputeDtype = "float32"  # dtype of the computation; parameters are float32
    remat: bool = False  # rematerialization of each block in the backward pass: less memory
    scan_layers: bool = False  # a scan over one compiled block: deep models compile sooner
    hidden: int | None = None  # width of the MLP; None: hidden_ratio * width
    kv_heads: int | None = None  # number of key-value heads, shared by query groups; None: heads
    head_width: int | None = None  # width of one head; None: width / heads
    gated: bool = False  # gated MLP: down(activation(gate(x)) * up(x))
    norm: Norm = "layer"  # normalization: LayerNorm or RMSNorm
    norm_epsilon: float = 1e-5  # constant added to the variance in a norm
    norm_plus_one: bool = False  # whether RMSNorm multiplies by 1 + scale, as in Gemma
    norms: Norms = "pre"  # norms on the inputs of attention and MLP, on their outputs, or on both
    head_norm: HeadNorm = "none"  # norm of queries and keys: within each head, with one scale for
    # all heads ("head") or one for each ("each_head"), or over all heads together ("projection")
    residual: Residual = "sequential"  # whether the MLP reads what attention added, or both read
    # the input of the block ("parallel"), or both read it through the same norm
    embedding_scale: float = 1.0  # factor of the token embeddings
    residual_scale: float = 1.0  # factor of what attention and MLP add to the residual stream
    attention_scale: float | None = None  # factor of the attention scores; None: 1 / sqrt(width of
    # one head)
    attention_cap: float | None = None  # cap of the attention scores: cap * tanh(score / cap)
    logit_divisor: float = 1.0  # number that the logits are divided by
    logit_cap: float | None = None  # cap of the logits: cap * tanh(logit / cap)
    positions: Positions = "learned"  # position encoding: learned embeddings, rotary, or none
    position_offset: int = 0  # rows of the learned embeddings before that of position 0
    rope: RopeConfig = RopeConfig()  # settings of rotary positions
    rotary: tuple[bool, ...] = ()  # which layers have rotary positions; empty: all
    window: int | None = None  # length of the attention window, the token included; None: all
    sliding: tuple[bool, ...] = ()  # which layers have the window; empty: all
    sliding_theta: float | None = None  # theta of the layers with the window, without scaling;
    # None: as the other layers
    layer_hidden: tuple[int, ...] = ()  # hidden of each layer, after a cut; empty: all alike
    layer_heads: tuple[int, ...] = ()  # heads of each layer, after a cut; empty: all alike
    layer_kv_heads: tuple[int, ...] = ()  # kv_heads of each layer, given with layer_heads
    experts: int | None = None  # number of experts in each MLP; None: one MLP for all tokens
    experts_per_token: int = 2  # number of experts that each token is routed to
    causal: bool = True  # whether a token attends to earlier tokens only
    vision: VisionConfig | None = None  # vision tower of Phi-3-vision; None: text only
    pretrained: str | None = None  # pretrained model whose sizes replace the ones above: a
    # Hugging Face folder, a GGUF file, or "package:NAME" for the GGUF file in an installed package;
    # None: random initialization
    prefix: str | None = None  # prefix of the names of the pretrained model's tensors, such as
    # "_orig_mod.", which is removed
    tokenizer: str | None = None  # tokenizer.json, folder or GGUF file of another tokenizer; None:
    # the pretrained model's own

    @property
    def head_size(self) -> int:
        """K, the width of one head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def key_heads(self) -> int:
        """G, how many heads keys and values have."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_size(self) -> int:
        """F, the hidden width of the MLP."""
        return self.hidden_ratio * self.width if self.hidden is None else self.hidden

    def of_layer(self, layer: int) -> "ModelConfig":
        """Returns the config of one layer, with a window and rotary positions only if it has them.

        Layers that are alike have equal configs. `sliding_theta` is None where it does not apply.
        """
        changes: dict[str, Any] = dict.fromkeys(PER_LAYER, ())
        if self.layer_hidden:
            changes["hidden"] = self.layer_hidden[layer]
        if self.layer_heads:
            changes |= {
                "heads": self.layer_heads[layer],
                "kv_heads": self.layer_kv_heads[layer],
                "head_width": self.head_size,
            }
        if self.sliding and not self.sliding[layer]:
            changes |= {"window": None, "sliding_theta": None}
        if self.rotary and not self.rotary[layer]:
            changes["positions"] = "none"
        return dataclasses.replace(self, **changes)


RANGES: dict[str, Bound] = {
    "layers": COUNT._replace(most=10_000),
    **dict.fromkeys(
        ("heads", "width", "context", "vocab_size", "hidden_ratio", "hidden", "kv_heads",
         "head_width", "window", "experts", "experts_per_token", "rope.original_context"), COUNT
    ),
    "position_offset": INDEX,
    "dropout": SHARE,
    **dict.fromkeys(
        ("init_stddev", "norm_epsilon", "embedding_scale", "residual_scale", "attention_scale",
         "attention_cap", "logit_divisor", "logit_cap", "sliding_theta", "rope.theta",
         "rope.factor", "rope.low_frequency", "rope.high_frequency", "rope.beta_fast",
         "rope.beta_slow", "rope.attention_factor", "rope.short_factors",
         "rope.long_factors"), POSITIVE
    ),
    "rope.share": FRACTION,
    "rope.mscale": NOT_NEGATIVE,
    "rope.mscale_all": NOT_NEGATIVE,
}  # fmt: skip
"""Range of each number in a `ModelConfig`."""


def check_width(config: ModelConfig) -> None:
    """Checks that the heads divide the width, unless theirs is given.

    Raises:
        InputError: They do not.
    """
    if config.head_width is None and config.width % config.heads:
        raise InputError(
            f"config.model.width must be a multiple of model.heads = {config.heads}, "
            f"got {config.width}"
        )
