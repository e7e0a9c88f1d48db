"""Files of a folder that hold the weights: one file, the shards of an index, or shards without one.

What is in the folder but cannot be read is refused with what to do about it.
"""

import os
import re
from pathlib import Path

from swe_prune.errors import InputError, listed, reading
from swe_prune.interop.stranger_files import inside, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPRESSED = "compressed.safetensors"
"""Weights without their zeros, of `compressed_file`: a name that transformers does not read."""
ADAPTER = "adapter_config.json"
"""Settings of an adapter of the package peft."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files of a tokenizer, which an export copies from its folder."""

COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)
"""Other files that an export copies from the model's folder."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_KINDS = (".h5", ".msgpack", ".onnx", ".tflite", ".npz")
"""Ends of the names of weights in formats of other frameworks."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]+)-of-(?P<count>[0-9]+)\.safetensors")
_NO_MODEL = ("masks.safetensors", "optimizer.safetensors")  # safetensors without a model's weights
_STATE = r"optimizer|scheduler|scaler|rng_state|training_args"  # of a training, not of its model


def check_model_folder(path: Path) -> None:
    """Raises InputError for a folder whose config.json is missing because it is of another kind."""
    if (path / "config.json").exists():
        return
    names = _names(path)
    files = [name for name in names if name.endswith(".gguf")]
    if files:
        raise InputError(
            f"{path} has no config.json, but a GGUF file, which is a model by itself; give the "
            f"path {path / files[0]}"
        )
    if ADAPTER in names or any(name.startswith("adapter_model.") for name in names):
        raise InputError(_adapter(path))


def indexed(path: Path) -> dict[str, Path]:
    """Returns the file of each tensor, as the index of a folder lists them.

    Raises:
        InputError: If the index is damaged, or a file that it names is missing or is not in the
            folder.
    """
    listed = read_json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{path / INDEX} has no weight_map of names to files; get it again")
    inside = {name: _inside(path, name) for name in sorted(set(listed.values()))}
    return {tensor: inside[name] for tensor, name in listed.items()}


def shards(path: Path) -> list[Path]:
    """Returns the shards of a folder that has neither one file nor an index.

    Their names, such as model-00001-of-00002.safetensors, say how many there are.

    Raises:
        InputError: If there are no shards, not all of them, or those of several models.
    """
    found: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in stray_shards(path):
        if match := _SHARD.fullmatch(name):
            key = (match["stem"], match["count"], len(match["number"]))
            numbers = found.setdefault(key, {})
            numbers[int(match["number"])] = name
    if not found:
        raise InputError(_no_weights(path))
    if len(found) > 1:
        firsts = " and ".join(repr(min(numbers.values())) for numbers in found.values())
        raise InputError(
            f"{path} has no {INDEX} and the shards of {len(found)} models, such as {firsts}; move "
            "those of all but one to another folder"
        )
    ((stem, count, digits), numbers) = next(iter(found.items()))
    first = 0 if 0 in numbers else 1
    wanted = range(first, first + int(count))
    missing = next((number for number in wanted if number not in numbers), None)
    if missing is not None:
        lacks = f"{stem}-{missing:0{digits}d}-of-{count}.safetensors"
        raise InputError(
            f"{path} has {len(numbers)} of {int(count)} shards and lacks {lacks!r}; get that file"
        )
    if len(numbers) > int(count):
        raise InputError(
            f"{path} has {len(numbers)} shards, of which there are {int(count)} by their names; "
            f"move {numbers[max(numbers)]!r} to another folder"
        )
    return [_inside(path, numbers[number]) for number in sorted(numbers)]


def stray_shards(path: Path) -> list[str]:
    """Returns the names of the shards of a folder, those of adapters apart."""
    names = [name for name in _names(path) if _SHARD.fullmatch(name)]
    return [name for name in names if not name.startswith("adapter_")]


def _inside(path: Path, name: str) -> Path:
    """Returns the path of a file that a folder names, which must lie in the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(
            f"{path / INDEX} names {name!r}, which leaves its folder; do not use this checkpoint"
        )
    if not os.path.lexists(path / name):
        raise InputError(f"{path} lacks {name!r}, which its index names; get that file")
    return inside(path, name, None)


def _names(path: Path) -> list[str]:
    with reading(path, "see to its rights"):
        return sorted(entry.name for entry in path.iterdir())


def _no_weights(path: Path) -> str:
    """Returns the sentence for a folder without weights that can be read, by what it has."""
    names = _names(path)
    pickles = [one for one in names if one.endswith(PICKLES) and not re.match(_STATE, one)]
    others = [one for one in names if one.endswith(".safetensors") and one not in _NO_MODEL]
    adapters = [one for one in names if one.startswith(("adapter_model.", "adapter_model-"))]
    foreign = [one for one in names if one.endswith(OTHER_KINDS)]
    files = [one for one in names if one.endswith(".gguf")]
    if adapters and set(pickles + others) <= set(adapters):
        return _adapter(path)
    if any(one.startswith("consolidated") for one in others):
        return (
            f"{path} has its weights in the format of Mistral, as {others[0]}, with other names "
            f"than config.json's; get the {WEIGHTS} of the same model, or its shards"
        )
    if len(others) == 1:
        return f"{path} has {others[0]} and neither {WEIGHTS} nor {INDEX}; rename it to {WEIGHTS}"
    if others:
        return (
            f"{path} has {listed(others, form=str)} and neither {WEIGHTS} nor {INDEX}; keep the "
            f"file of one model and rename it to {WEIGHTS}, or get the index that lists them"
        )
    if pickles:
        return (
            f"{path} has its weights as {pickles[0]}, a pickle, which can run code when it is "
            "opened; only safetensors are read: get the model's safetensors, or convert it where "
            "you trust it, by AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(OTHER)"
        )
    if files:
        return f"{path} has no safetensors, but a GGUF file; give the path {path / files[0]}"
    if foreign:
        return (
            f"{path} has its weights as {foreign[0]}, a format that is not read; get the model's "
            "safetensors"
        )
    return f"{path} has no weights: neither {WEIGHTS} nor {INDEX}; get them"


def _adapter(path: Path) -> str:
    return (
        f"{path} holds an adapter, which is not a model by itself; merge it into its model by "
        "peft's AutoPeftModelForCausalLM.from_pretrained(PATH).merge_and_unload()"
        ".save_pretrained(OTHER), and give OTHER"
    )
