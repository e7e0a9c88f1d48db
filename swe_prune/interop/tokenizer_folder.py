"""The tokenizer of a Hugging Face folder, or one that is given by its path."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swe_prune.errors import InputError, reading
from swe_prune.interop.folder_files import TOKENIZER_FILES
from swe_prune.interop.gguf_file import MAGIC, read_gguf
from swe_prune.interop.optional import require
from swe_prune.interop.stranger_files import (
    check_file,
    check_inside,
    inside,
    read_json,
    reading_in_rust,
)
from swe_prune.interop.token_ids import read_ids
from swe_prune.interop.tokenizer import PretrainedTokenizer, check_growth, checked
from swe_prune.interop.tokenizer_gguf import from_gguf, surround
from swe_prune.interop.tokenizer_models import byte_level, check_lengths

_OPTION = "--tokenizer=PATH (tokenizer= in Python)"
_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes in tokenizer_config.json that cut a text into words as GPT-2's tokenizer does."""


def from_path(path: Path, hf_config: Mapping[str, Any], vocab_size: int) -> PretrainedTokenizer:
    """Returns the tokenizer at a path: a tokenizer.json, a folder that has one, or a GGUF file.

    Args:
        path: Path of the file or folder.
        hf_config: Content of the model's config.json, for the ids of first and last tokens where
            the folder has none.
        vocab_size: Size V of the model's vocabulary.

    Raises:
        InputError: If there is no tokenizer, it is damaged, or it does not fit the vocabulary.
    """
    if path.is_dir():
        own = read_json(path / "config.json") if (path / "config.json").exists() else {}
        found = from_folder(path, {**hf_config, **own}, vocab_size)
        if found is None:
            raise InputError(f"{path} has no tokenizer; give the path of a tokenizer.json")
        return found
    if not path.exists():
        raise InputError(f"tokenizer {path} does not exist; give the path of a tokenizer.json")
    check_file(path, None)
    with reading(path, "see to its rights"), open(path, "rb") as file:
        begins = file.read(len(MAGIC))
    if begins == MAGIC:
        found = from_gguf(read_gguf(path), vocab_size)
        if found is None:
            raise InputError(f"{path} has no tokenizer; give the path of a tokenizer.json")
        return found
    bos, eos_ids = read_ids({"config.json": hf_config}, vocab_size)
    return checked(PretrainedTokenizer(_read(path), bos, eos_ids), vocab_size, str(path))


def from_folder(
    path: Path, hf_config: Mapping[str, Any], vocab_size: int
) -> PretrainedTokenizer | None:
    """Returns the tokenizer of a Hugging Face folder; None where it has no file of one.

    Args:
        path: Path of the folder.
        hf_config: Content of config.json, for the ids of first and last tokens.
        vocab_size: Size V of the model's vocabulary.

    Raises:
        InputError: If the tokenizer does not fit the vocabulary, is damaged, or is there as
            SentencePiece alone; or if an id in the configs is not one of the vocabulary.
    """
    check_inside(path, (*TOKENIZER_FILES, "generation_config.json"))
    said = {f"{path / 'config.json'}": hf_config} | _content(path, "generation_config.json")
    bos, eos_ids = read_ids(said, vocab_size)
    if (path / "tokenizer.json").exists():
        backend = _read(path / "tokenizer.json")
    elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
        backend = _gpt2(path, bos)
    elif (path / "tokenizer.model").exists():
        raise InputError(
            f"{path} has its tokenizer as SentencePiece, tokenizer.model, which is not supported; "
            "save it once as tokenizer.json, AutoTokenizer.from_pretrained(…).save_pretrained(…), "
            f"or give one with {_OPTION}"
        )
    else:
        return None
    _add_tokens(backend, path)
    backend.no_truncation()
    backend.no_padding()
    return checked(PretrainedTokenizer(backend, bos, eos_ids, None, path), vocab_size, str(path))


def _read(path: Path) -> Any:
    tokenizers = require("tokenizers", "reading tokenizer.json")
    advice = "get the tokenizer.json again"
    with reading(path, advice):
        content = json.loads(path.read_bytes())
    model = content.get("model") if isinstance(content, dict) else None
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, list):  # of a Unigram model, as pairs of token and score
        check_lengths((one[0] for one in pieces if isinstance(one, list) and one), str(path))
    with reading_in_rust(path, advice):
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
    check_growth(backend, str(path))
    return backend


def _gpt2(path: Path, bos: int | None) -> Any:
    config = _content(path, "tokenizer_config.json").get(str(path / "tokenizer_config.json"), {})
    made_by = config.get("tokenizer_class")
    if made_by is not None and made_by not in _GPT2:
        raise InputError(
            f"{path} has vocab.json and merges.txt of a {made_by}, and those of GPT-2 alone are "
            "supported; save it once as tokenizer.json, "
            f"AutoTokenizer.from_pretrained(…).save_pretrained(…), or give one with {_OPTION}"
        )
    vocab = read_json(path / "vocab.json")
    with reading(path / "merges.txt"):
        lines = inside(path, "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    backend = byte_level(vocab, merges, "gpt-2", str(path))
    special = {"<|endoftext|>", *_special(path)}
    backend.add_special_tokens(sorted(special & vocab.keys(), key=lambda token: vocab[token]))
    if config.get("add_bos_token") and bos is not None:
        surround(backend, [bos], [])
    return backend


def _add_tokens(backend: Any, path: Path) -> None:
    """Adds the tokens that other files of the folder add to the vocabulary, with their ids."""
    tokenizers = require("tokenizers", "reading a tokenizer")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    special = _special(path)
    wanted = sorted(_added(path), key=lambda one: (one[0], one[1]))
    for number, token, settings in wanted:
        if token in known:
            continue
        how = {"special": token in special, "normalized": token not in special} | settings
        with reading_in_rust(f"the added token {token!r} of {path}"):
            backend.add_tokens([tokenizers.AddedToken(token, **how)])
        if (got := backend.token_to_id(token)) != number:
            raise InputError(
                f"{path} adds the token {token!r} as {number}, and its vocabulary makes it {got}; "
                f"get the files of one tokenizer, or give one with {_OPTION}"
            )


def _added(path: Path) -> list[tuple[int, str, dict[str, bool]]]:
    """Returns id, text and settings of added tokens, of the same file as transformers."""
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    for where, content in _content(path, "tokenizer_config.json").items():
        decoder = content.get("added_tokens_decoder")
        if not decoder:
            continue
        try:
            return [
                (int(number), str(one["content"]), {f: bool(one[f]) for f in flags if f in one})
                for number, one in decoder.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"added_tokens_decoder in {where} must be an object of ids and tokens; get it again"
            ) from None
    for where, content in _content(path, "added_tokens.json").items():
        for token, number in content.items():
            if type(number) is not int or number < 0:
                raise InputError(
                    f"{where} must give each token an integer of at least 0, got {number!r} for "
                    f"{token!r}; get it again"
                )
        return [(number, token, {}) for token, number in content.items()]
    return []


def _special(path: Path) -> set[str]:
    """Returns the tokens that a folder names as special."""
    found: set[str] = set()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for content in _content(path, name).values():
            for key, value in content.items():
                if not key.endswith(("_token", "_special_tokens")):
                    continue
                for one in value if isinstance(value, list) else [value]:
                    text = one.get("content") if isinstance(one, dict) else one
                    found |= {text} if isinstance(text, str) else set()
    return found


def _content(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """Returns the content of a JSON file by its path, or nothing if there is no such file."""
    there = os.path.lexists(path / name)
    return {str(path / name): read_json(path / name)} if there else {}
