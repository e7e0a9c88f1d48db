"""Ids of special tokens in config.json, generation_config.json and GGUF files."""

from collections.abc import Mapping
from typing import Any

from swe_prune.errors import InputError

_LEAST = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": -1}  # old configs pad with -1


def read_ids(
    files: Mapping[str, Mapping[str, Any]], vocab_size: int
) -> tuple[int | None, tuple[int, ...]]:
    """Returns the id that begins a text, or None, and the ids that end one.

    As in transformers, only `eos_token_id` may be a list.

    Args:
        files: Content of each file by its name; a later file takes precedence.
        vocab_size: Size V of the model's vocabulary.

    Raises:
        InputError: If an id is not an integer of the vocabulary.

    >>> read_ids({"config.json": {"eos_token_id": 2}, "generation_config.json":
    ...           {"bos_token_id": 1, "eos_token_id": [2, 7]}}, 8)
    (1, (2, 7))
    """
    found: dict[str, tuple[int, ...]] = dict.fromkeys(_LEAST, ())
    for where, content in files.items():
        for key, least in _LEAST.items():
            if key not in content:
                continue
            value = content[key]
            several = key == "eos_token_id"
            ids = value if several and isinstance(value, list) else [value]
            ids = [] if value is None else ids
            if not all(type(one) is int and least <= one < vocab_size for one in ids):
                raise InputError(
                    f"{key} in {where} must be an id of the vocabulary, {least} to "
                    f"{vocab_size - 1}, {'a list of such ids, ' if several else ''}or null, got "
                    f"{value!r}; correct the file"
                )
            found[key] = tuple(ids)
    return next(iter(found["bos_token_id"]), None), found["eos_token_id"]
