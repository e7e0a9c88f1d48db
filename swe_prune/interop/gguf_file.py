"""Reading of GGUF files of llama.cpp: settings, and tensors that are dequantized one at a time.

The settings are converted to the config.json of the model's Hugging Face folder, so that all models
are interpreted in one way and can be exported as such a folder.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (the format and its keys), and
llama.cpp's convert_hf_to_gguf.py (what each architecture writes).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from swe_prune.errors import InputError, shown
from swe_prune.interop.gguf_header import MAGIC as MAGIC
from swe_prune.interop.gguf_header import read_header
from swe_prune.interop.load_params import Entry
from swe_prune.interop.optional import require

ARCHITECTURES = ("llama", "phi3", "gpt2")
"""Values of `general.architecture` that are supported."""

_KEPT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # not quantized
_NUMBER = (int, float)
_CHUNK = 1 << 20  # numbers to dequantize at a time


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor as it is stored.

    Attributes:
        kind: Name of its `GGMLQuantizationType`.
        data: Memory-mapped bytes (rows, bytes of a row).
    """

    kind: str
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The tensors and metadata of a GGUF file; a `load_params.Source`.

    Attributes:
        path: Path of the file.
        entries: Shape and dtype of each tensor by name; quantized tensors are read as float32.
        tensors: Stored tensors by name.
        fields: Metadata values by key.
    """

    path: Path
    entries: Mapping[str, Entry]
    tensors: Mapping[str, GgufTensor]
    fields: Mapping[str, Any]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[np.ndarray]:
        """Yields a dequantized tensor."""
        yield _values(self.tensors[name], self.entries[name])

    def get(self, key: str, default: Any = None, kind: type | tuple[type, ...] = object) -> Any:
        """Returns a metadata value, or the default if the file does not have the key.

        Raises:
            InputError: The value is of another kind than it must be.
        """
        value = self.fields.get(key, default)
        if key in self.fields and not isinstance(value, kind):
            raise InputError(
                f"{self.path} has {key!r} = {shown(value)}, of the wrong type; download it again"
            )
        return value

    def values(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        """Returns the members of an array, [] if the file does not have the key.

        Raises:
            InputError: It is not an array, or a member is of another kind.
        """
        found = self.get(key, [], list)
        wrong = next((one for one in found if not isinstance(one, kind)), None)
        if wrong is not None:
            raise InputError(
                f"{self.path} has {shown(wrong)} in {key!r}, of the wrong type; download it again"
            )
        return found


def read_gguf(path: Path) -> GgufFile:
    """Opens a GGUF file; tensors are not read yet.

    Raises:
        InputError: If the file is not GGUF, is truncated or damaged, or has a quantization that the
            `gguf` package cannot dequantize.
    """
    gguf = require("gguf", "reading a GGUF file")
    fields, places = read_header(path)
    size = path.stat().st_size
    kinds = {int(kind): kind for kind in gguf.GGMLQuantizationType}
    entries, tensors = {}, {}
    data = np.memmap(path, np.uint8, "r")
    end, before = 0, ""
    for name, one in sorted(places.items(), key=lambda place: place[1].start):
        kind = kinds.get(one.kind)
        # Reject unsupported quantizations before any tensor is read.
        if kind is None or (kind.name not in _KEPT and not _undone(gguf, kind)):
            known = [one.name for one in gguf.GGMLQuantizationType if _undone(gguf, one)]
            raise InputError(
                f"{path} has {name!r} quantized as {kind.name if kind else one.kind}, which is not "
                f"supported; supported are {', '.join(dict.fromkeys([*_KEPT, *known]))}"
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        last = one.shape[-1] if one.shape else 1
        row = last // block * block_bytes
        rows = math.prod(one.shape[:-1])
        if last % block or one.start + rows * row > size:
            raise InputError(
                f"{path} is truncated or damaged: {name!r} of shape {one.shape} does not fit its "
                f"{size:,} bytes; download it again"
            )
        if rows * row and one.start < end:
            raise InputError(
                f"{path} is truncated or damaged: {name!r} begins within {before!r}; download it "
                "again"
            )
        end, before = max(end, one.start + rows * row), name
        entries[name] = Entry(one.shape, _KEPT.get(kind.name, "float32"))
        raw = data[one.start : one.start + rows * row].reshape(rows, row)
        tensors[name] = GgufTensor(kind.name, raw)
    return GgufFile(path, entries, tensors, fields)


def hf_config(file: GgufFile) -> dict[str, Any]:
    """Returns the config.json of the model's Hugging Face folder.

    Raises:
        InputError: If the architecture is not supported, the model is a mixture of experts, or a
            setting is missing.
    """
    name = file.get("general.architecture", kind=str)
    if name not in ARCHITECTURES:
        raise InputError(
            f"{file.path} has the architecture {name!r}, which is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if file.get(f"{name}.expert_count"):
        raise InputError(
            f"{file.path} is a mixture of experts, which is not supported; supported are dense "
            f"models of the architectures {', '.join(ARCHITECTURES)}"
        )
    config = _gpt2(file) if name == "gpt2" else _llama_like(file, name)
    config |= {
        "model_type": name,
        "vocab_size": _embedding(file).shape[0],
        "tie_word_embeddings": "output.weight" not in file.entries,
    }
    for key in ("bos", "eos"):
        token = file.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{key}_token_id"] = token
    return config


def _gpt2(file: GgufFile) -> dict[str, Any]:
    return {
        "n_embd": _needed(file, "gpt2.embedding_length"),
        "n_inner": file.get("gpt2.feed_forward_length"),
        "n_layer": _needed(file, "gpt2.block_count"),
        "n_head": _needed(file, "gpt2.attention.head_count"),
        "n_positions": _needed(file, "gpt2.context_length"),
        "layer_norm_epsilon": _decimal(_needed(file, "gpt2.attention.layer_norm_epsilon")),
    }


def _llama_like(file: GgufFile, name: str) -> dict[str, Any]:
    heads = _needed(file, f"{name}.attention.head_count", int)
    width = _needed(file, f"{name}.embedding_length", int)
    if heads < 1:
        raise InputError(f"{file.path} has {heads} attention heads; download it again")
    config = {
        "hidden_size": width,
        "intermediate_size": _needed(file, f"{name}.feed_forward_length"),
        "num_hidden_layers": _needed(file, f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{name}.attention.head_count_kv", heads),
        "head_dim": file.get(f"{name}.attention.key_length", width // heads, int),
        "max_position_embeddings": _needed(file, f"{name}.context_length"),
        "rms_norm_eps": _decimal(_needed(file, f"{name}.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
    }
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.entries
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.entries
    else:
        config["sliding_window"] = file.get(f"{name}.attention.sliding_window") or None
    return config | _rope(file, name, config["head_dim"], config["max_position_embeddings"])


def _rope(file: GgufFile, name: str, head_width: int, context: int) -> dict[str, Any]:
    rotated = file.get(f"{name}.rope.dimension_count", head_width, int)
    if head_width < 1:
        raise InputError(f"{file.path} has heads of width {head_width}; download it again")
    written: dict[str, Any] = {
        "rope_theta": _decimal(file.get(f"{name}.rope.freq_base", 10000.0, _NUMBER)),
        "partial_rotary_factor": rotated / head_width,
    }
    original = file.get(f"{name}.rope.scaling.original_context_length") or context
    if name == "phi3":
        written["original_max_position_embeddings"] = original
    # Scalings are stored as tensors of factors, or as a type with a factor.
    group: dict[str, Any] = {}
    kind = file.get(f"{name}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.entries:
        # Llama 3's scaling is stored as the divisor of each frequency, for any length.
        factors = _factors(file, "rope_freqs.weight")
        group = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        group["attention_factor"] = 1.0
    elif "rope_factors_long.weight" in file.entries:
        group = {
            "rope_type": "longrope",
            "short_factor": _factors(file, "rope_factors_short.weight"),
            "long_factor": _factors(file, "rope_factors_long.weight"),
        }
        attention = file.get(f"{name}.rope.scaling.attn_factor", kind=_NUMBER)
        if attention is not None:
            group["attention_factor"] = _decimal(attention)
    elif kind in ("linear", "yarn"):
        group = {"rope_type": kind}
        group["factor"] = _decimal(_needed(file, f"{name}.rope.scaling.factor"))
    elif kind != "none":
        raise InputError(
            f"{file.path} has the rope scaling {kind!r} without its factors; supported are none, "
            "linear, yarn, and longrope with rope_factors_short and rope_factors_long"
        )
    if group and group["rope_type"] != "linear" and name != "phi3":
        group["original_max_position_embeddings"] = original
    return written | ({"rope_scaling": group} if group else {})


def _undone(gguf: Any, kind: Any) -> bool:
    """Returns whether the package can dequantize this kind, tried on one block of zeros."""
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _factors(file: GgufFile, name: str) -> list[float]:
    if name not in file.entries:
        raise InputError(f"{file.path} lacks {name!r} for its rope scaling; download it again")
    values = _values(file.tensors[name], file.entries[name])
    return [_decimal(float(value)) for value in values.reshape(-1)]


def _values(tensor: GgufTensor, entry: Entry) -> np.ndarray:
    if tensor.kind in _KEPT:
        return tensor.data.view(jnp.dtype(_KEPT[tensor.kind])).reshape(entry.shape).copy()
    gguf = require("gguf", "reading a GGUF file")
    kind = gguf.GGMLQuantizationType[tensor.kind]
    width = entry.shape[-1]
    values = np.empty((len(tensor.data), width), np.float32)
    rows = max(1, _CHUNK // max(1, width))
    for start in range(0, len(values), rows):  # dequantizing needs several times the memory
        part = slice(start, start + rows)
        values[part] = gguf.quants.dequantize(tensor.data[part], kind)
    return values.reshape(entry.shape)


def _embedding(file: GgufFile) -> Entry:
    if "token_embd.weight" not in file.entries:
        raise InputError(f"{file.path} lacks 'token_embd.weight', so it is not a complete model")
    return file.entries["token_embd.weight"]


def _needed(file: GgufFile, key: str, kind: type | tuple[type, ...] = _NUMBER) -> Any:
    value = file.get(key, kind=(kind, list) if isinstance(kind, type) else (*kind, list))
    if value is None:
        raise InputError(f"{file.path} lacks the setting {key!r}; download it again")
    if isinstance(value, list):  # one for each layer
        if len(set(value)) != 1 or not isinstance(value[0], kind):
            raise InputError(
                f"{file.path} has layers that differ in {key!r}, which is not supported; "
                "supported is one value for all layers"
            )
        return value[0]
    return value


def _decimal(value: float) -> float:
    """Returns the shortest decimal with this value in float32, the precision of the file.

    >>> _decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value))) if math.isfinite(value) else value
