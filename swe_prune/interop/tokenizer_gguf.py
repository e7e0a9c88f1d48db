"""The tokenizer inside a GGUF file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (the keys), and
https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp (what is meant where a key is missing).
"""

from typing import Any

import numpy as np

from swe_prune.errors import InputError, reading, shown
from swe_prune.interop.gguf_file import GgufFile
from swe_prune.interop.optional import require
from swe_prune.interop.stranger_files import reading_in_rust
from swe_prune.interop.token_ids import read_ids
from swe_prune.interop.tokenizer import PretrainedTokenizer, check_growth, checked
from swe_prune.interop.tokenizer_models import (
    PRE_TOKENIZERS,
    byte_level,
    check_lengths,
    sentencepiece_bpe,
    unigram,
)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`."""


def from_gguf(file: GgufFile, vocab_size: int) -> PretrainedTokenizer | None:
    """Returns the tokenizer that is inside a GGUF file; None where there is none.

    Raises:
        InputError: If this kind of tokenizer is not supported, or it is damaged or does not fit the
            vocabulary.
    """
    model = file.get("tokenizer.ggml.model", kind=str)
    if model is None:
        return None
    tokens = file.values("tokenizer.ggml.tokens", str)
    if not tokens:
        raise InputError(f"{file.path} lacks the tokens of its tokenizer; download it again")
    ids = {key: _id(file, key) for key in ("bos", "eos")}
    bos, eos_ids = read_ids(
        {f"{file.path}'s metadata": {f"{key}_token_id": one for key, one in ids.items()}},
        min(vocab_size, len(tokens)),
    )
    backend = _backend(file, model, tokens)
    check_growth(backend, str(file.path))
    tokenizers = require("tokenizers", "the tokenizer of a GGUF file")
    kinds = _kinds(file)
    added = [
        tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    with reading_in_rust(file.path, "download it again"):
        backend.add_tokens(added)
    # SentencePiece begins every text with a token unless told otherwise.
    ends = {"bos": [] if bos is None else [bos], "eos": [*eos_ids]}
    asked = {"bos": model == "llama", "eos": model == "t5"}
    for name, ids in ends.items():
        key = f"tokenizer.ggml.add_{name}_token"
        if file.get(key, False, bool) and not ids:
            how = "begins" if name == "bos" else "ends"
            raise InputError(
                f"{file.path} has {key!r}, so that a token {how} every text, and has none; "
                "download it again"
            )
        ends[name] = ids if file.get(key, asked[name], bool) else []
    surround(backend, ends["bos"], ends["eos"])
    template = file.get("tokenizer.chat_template", kind=str)
    return checked(PretrainedTokenizer(backend, bos, eos_ids, template), vocab_size, str(file.path))


def surround(backend: Any, first: list[int], last: list[int]) -> None:
    """Makes a tokenizer put tokens before and after every text, where it is asked to."""
    if not first and not last:
        return
    # A template cannot have tokens with a colon, so they are named by their ids.
    before, after = ([f"token{one}:0" for one in some] for some in (first, last))
    tokenizers = require("tokenizers", "a tokenizer")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *before, "$B:0", *after],
        special_tokens=[
            {"id": f"token{one}", "ids": [one], "tokens": [backend.id_to_token(one)]}
            for one in {*first, *last}
        ],
    )


def _backend(file: GgufFile, model: str, tokens: list[str]) -> Any:
    where = str(file.path)
    pre = file.get("tokenizer.ggml.pre", kind=str)
    vocab = {token: number for number, token in enumerate(tokens)}
    for number, token in enumerate(tokens) if len(vocab) < len(tokens) else ():
        if vocab[token] != number:
            raise InputError(
                f"{file.path} has the token {shown(token)} twice, as ids {number} and "
                f"{vocab[token]}; give the model's tokenizer.json with --tokenizer=PATH "
                "(tokenizer= in Python)"
            )
    check_lengths(tokens, where)
    if model == "gpt2" and pre in PRE_TOKENIZERS:
        return byte_level(vocab, file.values("tokenizer.ggml.merges", str), pre, where)
    if model not in ("llama", "t5"):
        kinds = f"{model!r} with {pre!r}" if model == "gpt2" else f"{model!r}"
        raise InputError(
            f"{file.path} has a tokenizer of the kind {kinds}, which is not supported; supported "
            f"are 'gpt2' with {', '.join(PRE_TOKENIZERS)}, and SentencePiece, 'llama' and 't5'; "
            "give the model's tokenizer.json with --tokenizer=PATH (tokenizer= in Python)"
        )
    scores = file.values("tokenizer.ggml.scores", (int, float))
    kinds = _kinds(file) or [_NORMAL] * len(tokens)
    if not len(tokens) == len(scores) == len(kinds):
        raise InputError(
            f"{file.path} has {len(tokens)} tokens with {len(scores)} scores and {len(kinds)} "
            "kinds, which must be as many; download it again"
        )
    if not np.isfinite(scores).all():
        raise InputError(f"{file.path} has a token whose score is not finite; download it again")
    unknown = _id(file, "unknown")
    if unknown is None and _UNKNOWN in kinds:
        unknown = kinds.index(_UNKNOWN)
    if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(tokens)):
        raise InputError(
            f"{file.path} has {unknown!r} as the id of unknown tokens, which must be below "
            f"{len(tokens)}; download it again"
        )
    prefix_space = file.get("tokenizer.ggml.add_space_prefix", True, bool)
    if model == "t5":
        with reading(where, "download it again"):
            charsmap = bytes(file.values("tokenizer.ggml.precompiled_charsmap", int))
        single = file.get("tokenizer.ggml.remove_extra_whitespaces", False, bool)
        named = [
            token
            for token, kind in zip(tokens, kinds, strict=True)
            if kind not in (_NORMAL, _USER_DEFINED)
        ]
        return unigram(tokens, scores, unknown, prefix_space, single, charsmap, named, where)
    # Control tokens and bytes never come from merges.
    normal = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == _NORMAL
    }
    name = None if unknown is None else tokens[unknown]
    return sentencepiece_bpe(vocab, normal, name, prefix_space, where)


def _kinds(file: GgufFile) -> list[int]:
    key = "tokenizer.ggml.token_type"
    kinds = file.values(key, int)
    wrong = next((kind for kind in kinds if not _NORMAL <= kind <= _BYTE), None)
    if wrong is not None:
        raise InputError(
            f"{key} in {file.path} must hold kinds from {_NORMAL} to {_BYTE}, got {wrong}; "
            "download it again"
        )
    return kinds


def _id(file: GgufFile, name: str) -> Any:
    return file.get(f"tokenizer.ggml.{name}_token_id")
