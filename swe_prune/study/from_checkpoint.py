"""Experiments on a pretrained model: its sizes, its tokenizer, and its weights to start from."""

import dataclasses

from jaxtyping import PyTree

from swe_prune import data as data_lib
from swe_prune import interop, tree
from swe_prune.config import Config, ModelConfig
from swe_prune.errors import InputError

OURS = ("pretrained", "prefix", "tokenizer", "dropout", "dtype", "remat", "scan_layers")
"""Settings of `ModelConfig` that the checkpoint leaves to the config."""


def opened(config: Config) -> tuple[Config, interop.PretrainedSource | None]:
    """Returns the config with the checkpoint's sizes in it, and the checkpoint, its weights unread.

    Raises:
        InputError: It cannot be read or brings no tokenizer, the config names a size of its own
            beside it, or windows longer than the model's context.
    """
    path = config.model.pretrained
    if path is None:
        for name in ("prefix", "tokenizer"):
            if getattr(config.model, name) is not None:
                raise InputError(
                    f"config.model.{name} is of a pretrained model, and config.model.pretrained is "
                    "None; give that too, or leave it out"
                )
        return config, None
    for field in dataclasses.fields(ModelConfig):
        given = getattr(config.model, field.name)
        if field.name not in OURS and given != field.default:
            raise InputError(
                f"config.model.{field.name} = {given!r} was given beside config.model.pretrained = "
                f"{path!r}, which decides it; leave it out"
            )
    checkpoint = interop.open_pretrained(
        path,
        compute_dtype=config.model.dtype,
        tokenizer=config.model.tokenizer or True,
        prefix=config.model.prefix,
    )
    if checkpoint.tokenizer is None:
        raise InputError(
            f"config.model.pretrained = {path!r} has no tokenizer, without which no text can be "
            "read; give the folder its tokenizer.json, or another as config.model.tokenizer"
        )
    ours = {name: getattr(config.model, name) for name in OURS}
    model = dataclasses.replace(checkpoint.config, vocab_size=checkpoint.vocab_size, **ours)
    if config.data.window is not None and config.data.window > model.context:
        raise InputError(
            f"config.data.window = {config.data.window} exceeds the {model.context} tokens of "
            f"{path!r}; lower it"
        )
    return dataclasses.replace(config, model=model), checkpoint


def check_texts(data: data_lib.TextData) -> None:
    """Refuses training and validation texts of a pretrained model's study that overlap.

    Calibration is of the training text, so this guards it too.

    Raises:
        InputError: They share a passage.
    """
    data_lib.check_disjoint(*data.texts)


def weights(checkpoint: interop.PretrainedSource, abstract_params: PyTree) -> PyTree:
    """Returns the checkpoint's weights as float32, each born on its devices.

    Args:
        checkpoint: Opened pretrained model.
        abstract_params: Abstract parameters, with their shardings.
    """
    shardings = {name: leaf.sharding for name, leaf in tree.named_leaves(abstract_params)}
    read = checkpoint.read(dtype="float32", shardings=lambda name, shape: shardings[name])
    return read.params
