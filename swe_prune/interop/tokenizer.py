"""Text to token ids and back, by the tokenizer that a pretrained model comes with.

Three places have one: a tokenizer.json; vocab.json with merges.txt, which is GPT-2's; and the
vocabulary inside a GGUF file. All become a tokenizer of the `tokenizers` package, so that they cut
text as transformers does.

Sources: https://github.com/huggingface/tokenizers; for what `tokenizer.ggml.pre` means,
https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from swe_prune.errors import InputError
from swe_prune.interop.gguf_file import GgufFile
from swe_prune.interop.optional import require
from swe_prune.interop.safetensors_folder import read_json

PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe")
"""Values of `tokenizer.ggml.pre` that are supported."""

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """The tokenizer of a pretrained model.

    Attributes:
        backend: a `tokenizers.Tokenizer`.
        bos_id: of the token that begins a text; None: the model has none.
        eos_ids: of the tokens that end one; there may be several, or none.
        chat_template: as Jinja text, for `save` to write; None: none.
    """

    backend: Any
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model may have more, which no text becomes."""
        return self._ids

    @functools.cached_property
    def _ids(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_id(self) -> int | None:
        """The first of the tokens that end a text."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def dtype(self) -> np.dtype:
        """Of the ids."""
        return np.dtype(np.int32)

    def encode(
        self, text: str, *, special: bool = False, template: bool = False
    ) -> Int32[np.ndarray, " N"]:
        """Returns the ids of a text.

        Args:
            text: any.
            special: read `<|endoftext|>` and the like in it as the tokens they name. False: as the
                characters they are, as text from elsewhere should be.
            template: add what the tokenizer puts around every text, such as a first token.
        """
        self.backend.encode_special_tokens = not special
        ids = self.backend.encode(text, add_special_tokens=template).ids
        return np.asarray(ids, self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = True) -> str:
        """Returns the text of token ids, given as a sequence or an integer array (N,).

        Args:
            ids: of tokens.
            special: write special tokens by their names; False: leave them out.

        Raises:
            InputError: an id outside [0, vocab_size).
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()} do not fit the tokenizer's "
                f"{self.vocab_size}; decode with the tokenizer of the model they are from"
            )
        return self.backend.decode(ids.tolist(), skip_special_tokens=not special)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers loads."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for key, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token is not None:
                config[key] = self.backend.id_to_token(token)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def from_folder(
    path: Path, hf_config: Mapping[str, Any], vocab_size: int
) -> PretrainedTokenizer | None:
    """Returns the tokenizer of a Hugging Face folder; None where it has no file of one.

    Args:
        path: of the folder.
        hf_config: its config.json, for the ids of first and last tokens.
        vocab_size: of the model.

    Raises:
        InputError: a tokenizer that does not fit the vocabulary, that is damaged, or that is there
            as SentencePiece alone.
    """
    tokenizers = None
    if (path / "tokenizer.json").exists():
        tokenizers = require("tokenizers", "reading tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the package raises no narrower class
            raise InputError(f"{path / 'tokenizer.json'} cannot be read: {error}") from None
    elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
        vocab = read_json(path / "vocab.json")
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        backend = _byte_level(vocab, merges, "gpt-2")
        ends = [token for token in ("<|endoftext|>",) if token in vocab]
        backend.add_special_tokens(ends)
    elif (path / "tokenizer.model").exists():
        raise InputError(
            f"{path} has its tokenizer as SentencePiece, tokenizer.model, which is not supported; "
            "save it once as tokenizer.json: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    else:
        return None
    backend.no_truncation()
    backend.no_padding()
    said = dict(hf_config)
    if (path / "generation_config.json").exists():
        said |= read_json(path / "generation_config.json")
    eos = said.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    bos_id = said.get("bos_token_id")
    return _checked(PretrainedTokenizer(backend, bos_id, eos_ids), vocab_size, str(path))


def from_gguf(file: GgufFile, vocab_size: int) -> PretrainedTokenizer | None:
    """Returns the tokenizer that is inside a GGUF file; None where there is none.

    Raises:
        InputError: a kind of tokenizer that is not supported, or that does not fit the vocabulary.
    """
    model = file.get("tokenizer.ggml.model")
    if model is None:
        return None
    pre = file.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{file.path} has a tokenizer of the kind {model!r} with {pre!r}, which is not "
            f"supported; supported is 'gpt2' with {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = file.get("tokenizer.ggml.tokens", [])
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _byte_level(vocab, file.get("tokenizer.ggml.merges", []), pre)
    kinds = file.get("tokenizer.ggml.token_type", [])
    tokenizers = require("tokenizers", "the tokenizer of a GGUF file")
    added = [
        tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    bos, eos = (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", False):
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    eos_ids = () if eos is None else (eos,)
    template = file.get("tokenizer.chat_template")
    made = PretrainedTokenizer(backend, bos, eos_ids, template)
    return _checked(made, vocab_size, str(file.path))


def _byte_level(vocab: Mapping[str, int], merges: Sequence[str], pre: str) -> Any:
    """Returns a byte-level BPE tokenizer, which cuts text into words as `pre` says."""
    tokenizers = require("tokenizers", "a tokenizer of merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise InputError("the tokenizer has a merge that is not of two tokens; get it again")
    # Llama 3 takes a word that is a token as it is, though no merges lead to it.
    whole = pre == "llama-bpe"
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=whole)
    )
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


def _checked(made: PretrainedTokenizer, vocab_size: int, where: str) -> PretrainedTokenizer:
    largest = max(made.vocab_size - 1, made.bos_id or 0, *made.eos_ids, 0)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer of {where} has ids up to {largest} and the model a vocabulary of "
            f"{vocab_size}; get the tokenizer that belongs to the model"
        )
    return made
