"""The one way in: a checkpoint's path to a model that runs, prunes and goes out again."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.interop import tokenizer as tokenizers
from swe_prune.interop.gguf_file import MAGIC, hf_config, read_gguf
from swe_prune.interop.hf_config import read_config
from swe_prune.interop.placing import bind
from swe_prune.interop.reading import Shardings, Source, match, read_params
from swe_prune.interop.safetensors_folder import read_folder, read_json
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


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    compute_dtype: str = "float32",
    shardings: Shardings = None,
    tokenizer: bool = True,
) -> Pretrained:
    """Returns the model in a Hugging Face folder of safetensors, or in a GGUF file.

    All that can be seen from config and headers is checked before a tensor is read. Then they are
    read one at a time, so that memory holds the parameters and one tensor beside them.

    Args:
        path: of the folder or of the file.
        dtype: of the parameters: "float32", "bfloat16", "float16", or None for what is stored,
            which is float32 where it is quantized.
        compute_dtype: of the computation, "float32" or "bfloat16".
        shardings: where the parameters go: a function of a parameter's name and shape, a pytree
            like them, or None for the default device. Of a parameter that is divided over devices
            and not quantized, each device's slice alone is read.
        tokenizer: read it too; False is for one that is not supported.

    Raises:
        InputError: no model at this path, one that is not supported, incomplete or damaged, or
            settings that do not fit each other.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, dtype, compute_dtype, shardings, tokenizer)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a model's folder or a GGUF file")
    with open(path, "rb") as file:
        begins = file.read(len(MAGIC))
    if begins != MAGIC and path.suffix != ".gguf":
        raise InputError(
            f"{path} is neither a folder nor a GGUF file; give the folder that has its config.json "
            "and safetensors"
        )
    return _from_gguf(path, dtype, compute_dtype, shardings, tokenizer)


def _from_folder(
    path: Path, dtype: str | None, compute_dtype: str, shardings: Shardings, with_tokenizer: bool
) -> Pretrained:
    hf = read_json(path / "config.json")
    family, config, vocab_size = read_config(hf, compute_dtype)
    folder = read_folder(path)
    tokenizer = tokenizers.from_folder(path, hf, vocab_size) if with_tokenizer else None
    params = _params(folder, SAFETENSORS[family], config, vocab_size, dtype, shardings, path)
    return Pretrained(config, vocab_size, params, tokenizer, family, path, "safetensors", hf)


def _from_gguf(
    path: Path, dtype: str | None, compute_dtype: str, shardings: Shardings, with_tokenizer: bool
) -> Pretrained:
    file = read_gguf(path)
    hf = hf_config(file)
    family, config, vocab_size = read_config(hf, compute_dtype)
    tokenizer = tokenizers.from_gguf(file, vocab_size) if with_tokenizer else None
    file = dataclasses.replace(file, fields={})  # half a million small arrays, which it has read
    params = _params(file, GGUF[family], config, vocab_size, dtype, shardings, path)
    return Pretrained(config, vocab_size, params, tokenizer, family, path, "gguf", hf)


def _params(
    source: Source,
    table: Table,
    config: ModelConfig,
    vocab_size: int,
    dtype: str | None,
    shardings: Shardings,
    path: Path,
) -> Any:
    bound = bind(table, config, vocab_size)
    of = {part.name: one.name for one in bound for part in one.parts}
    duplicates = {}
    if config.tied_head:  # files of some have the head a second time
        head = next(row.stored for row in table.rows if row.params == ("head/kernel",))
        duplicates = {head: of["embedding/embedding"]}
    names = match(source, bound, table, duplicates, str(path))
    return read_params(source, bound, names, dtype, shardings)
