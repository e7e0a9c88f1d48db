"""Tokenizers of the package `tokenizers`, made of a vocabulary.

Sources: https://github.com/huggingface/tokenizers; for what `tokenizer.ggml.pre` means,
https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp; for SentencePiece's merges,
https://github.com/huggingface/transformers, convert_slow_tokenizer.py and integrations/ggml.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from swe_prune.errors import InputError
from swe_prune.interop.optional import require
from swe_prune.interop.stranger_files import reading_in_rust

PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe")
"""Values of `tokenizer.ggml.pre` that are supported."""

LONGEST = 10_000
"""Characters that a token may have: Unigram models are freed by a recursion over them."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Character of SentencePiece for a space."""

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(vocab: Mapping[str, int], merges: Sequence[str], pre: str, where: str) -> Any:
    """Returns a byte-level BPE tokenizer.

    Args:
        vocab: Id of each token.
        merges: Pairs of tokens with a space between them, the first to be merged first.
        pre: Rule by which a text is cut into words, one of `PRE_TOKENIZERS`.
        where: Source of the vocabulary for error messages.

    Raises:
        InputError: If the vocabulary or the merges are damaged.
    """
    tokenizers = require("tokenizers", "a tokenizer of merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise InputError(
            f"the tokenizer of {where} has a merge that is not of two tokens; get it again"
        )
    # Llama 3 takes a word that is a token as it is, though no merges lead to it.
    backend = _bpe(vocab, pairs, where, ignore_merges=pre == "llama-bpe")
    split = tokenizers.pre_tokenizers
    if pre == "llama-bpe":
        words = [
            split.Split(tokenizers.Regex(_LLAMA3_WORDS), behavior="isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        words = [split.ByteLevel(add_prefix_space=False, use_regex=True)]
        if pre == "smollm":
            words.insert(0, split.Digits(individual_digits=True))
    backend.pre_tokenizer = words[0] if len(words) == 1 else split.Sequence(words)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def sentencepiece_bpe(
    vocab: Mapping[str, int],
    scores: Mapping[str, float],
    unknown: str | None,
    prefix_space: bool,
    where: str,
) -> Any:
    """Returns SentencePiece's BPE tokenizer: of two neighbours, those with the best score merge.

    Args:
        vocab: Id of each token.
        scores: Score of each token that merges may lead to.
        unknown: Token of what is not in the vocabulary. None: there is none.
        prefix_space: Whether a text begins with a space that is added.
        where: Source of the vocabulary for error messages.
    """
    pairs = _merges(vocab, scores)
    backend = _bpe(
        vocab, pairs, where, unk_token=unknown, fuse_unk=True, byte_fallback=_has_bytes(vocab)
    )
    normalizers = require("tokenizers", "a SentencePiece vocabulary").normalizers
    backend.normalizer = normalizers.Sequence(_spaces(prefix_space))
    backend.decoder = _decoder(prefix_space)
    return backend


def unigram(
    tokens: Sequence[str],
    scores: Sequence[float],
    unknown_id: int | None,
    prefix_space: bool,
    single_spaces: bool,
    charsmap: bytes,
    named: Sequence[str],
    where: str,
) -> Any:
    """Returns SentencePiece's unigram tokenizer: the tokens of a text with the best sum of scores.

    Args:
        tokens: Token of each id.
        scores: Logarithm of the probability of each token.
        unknown_id: Id of what is not in the vocabulary. None: there is none.
        prefix_space: Whether a text begins with a space that is added.
        single_spaces: Whether spaces around a text, and all but one between words, are removed.
        charsmap: Compiled normalization of characters; b"": none.
        named: Tokens that no text becomes, such as those of bytes and of control.
        where: Source of the vocabulary for error messages.
    """
    tokenizers = require("tokenizers", "a SentencePiece vocabulary")
    with reading_in_rust(f"the tokenizer of {where}"):
        pieces = list(zip(tokens, scores, strict=True))
        model = tokenizers.models.Unigram(pieces, unknown_id, _has_bytes(tokens))
        first = [tokenizers.normalizers.Precompiled(charsmap)] if charsmap else []
    backend = tokenizers.Tokenizer(model)
    if single_spaces:
        first.append(tokenizers.normalizers.Strip())
        first.append(tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    backend.normalizer = tokenizers.normalizers.Sequence([*first, *_spaces(prefix_space)])
    # The model takes every token that it finds, so a text is cut within the names of these.
    rests: dict[str, list[str]] = {}
    for token in named:
        if len(token) > 1:
            rests.setdefault(re.escape(token[0]), []).append(re.escape(token[1:]))
    cuts = "|".join(f"{letter}(?={'|'.join(rest)})" for letter, rest in rests.items())
    if cuts:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(cuts), "isolated")
    backend.decoder = _decoder(prefix_space)
    return backend


def check_lengths(tokens: Iterable[Any], where: str) -> None:
    """Checks that no token is longer than `LONGEST`, before a model is built of them.

    Raises:
        InputError: One is.
    """
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    if longest > LONGEST:
        raise InputError(
            f"the tokenizer of {where} has a token of {longest:,} characters, and at most "
            f"{LONGEST:,} are read; get it again"
        )


def _bpe(
    vocab: Mapping[str, int], pairs: Sequence[tuple[str, ...]], where: str, **settings: Any
) -> Any:
    tokenizers = require("tokenizers", "a tokenizer of merges")
    if not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise InputError(
            f"the tokenizer of {where} has an id that is not an integer of at least 0; get it again"
        )
    with reading_in_rust(f"the tokenizer of {where}"):
        return tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=dict(vocab), merges=list(pairs), **settings)
        )


def _merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that make a token, the best score first.

    >>> _merges({"a": 0, "b": 1, "ab": 2, "abb": 3}, {"ab": -1.0, "abb": 0.0})
    [('ab', 'b'), ('a', 'b')]
    """
    found = []
    for token, score in scores.items():
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(-score, pair) for pair in pairs]
    return [pair for _, pair in sorted(found, key=lambda one: one[0])]


def _spaces(prefix_space: bool) -> list[Any]:
    normalizers = require("tokenizers", "a SentencePiece vocabulary").normalizers
    first = [normalizers.Prepend(SPACE)] if prefix_space else []
    return [*first, normalizers.Replace(" ", SPACE)]


def _decoder(prefix_space: bool) -> Any:
    decoders = require("tokenizers", "a SentencePiece vocabulary").decoders
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)


def _has_bytes(tokens: Any) -> bool:
    return "<0x00>" in tokens
