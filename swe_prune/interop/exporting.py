"""The one way out: a folder that transformers loads, with what was pruned and how beside it.

    config.json, generation_config.json, tokenizer files    as transformers has them
    model.safetensors, or shards with their index            pruned weights are exactly 0
    masks.safetensors                                        one bit for each weight: `read_masks`
    pruning.json                                             how it was pruned, and what came of it

The folder is written beside its place under another name and renamed when it is whole.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import masks, tree
from swe_prune.errors import InputError
from swe_prune.interop.families import FAMILIES, read_config, write_config
from swe_prune.interop.mask_file import FILE as MASKS
from swe_prune.interop.mask_file import write_masks
from swe_prune.interop.placing import Stored, bind
from swe_prune.interop.pretrained import Pretrained
from swe_prune.interop.safetensors_folder import INDEX, WEIGHTS, read_json
from swe_prune.interop.tensor_names import SAFETENSORS
from swe_prune.interop.weights_file import write_weights
from swe_prune.version import __version__

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)
"""Files of the source folder that are copied where it has them."""

RECORD = "pruning.json"
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class PruningRecord:
    """What pruning.json says beside the counts, which are taken from the mask.

    Attributes:
        criterion: its registered name.
        options: of the criterion, the pattern, the allocation and what else was chosen.
        seed: of the run; None: nothing was random.
        calibration: the text that was used and how; None: none was.
        evaluation: what was measured, by the caller's names.
        commit: of the code; None: not known.
    """

    criterion: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    calibration: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    commit: str | None = None


def export(
    folder: str | Path,
    model: Pretrained,
    params: PyTree | None = None,
    *,
    mask: PyTree | None = None,
    record: PruningRecord | None = None,
    also: Callable[[Path], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the model as a Hugging Face folder and returns its path.

    Each parameter is written in its own dtype. Beside the parameters one stored tensor is held at
    a time.

    Args:
        folder: that does not exist yet; the one it is to be in does.
        model: whose config, tokenizer and names it has.
        params: pytree like `model.params`; None: these.
        mask: bool pytree like the parameters, None where dense. Applied to them, and written.
        record: what pruning.json says, which a mask needs.
        also: writes what else belongs into the folder, which it is given before it has its name.
        shard_bytes: the weights are divided into files of at most this size, or of one tensor.

    Raises:
        InputError: the folder exists or has no place, the parameters do not fit the config, the
            config cannot be said in a config.json, or a mask comes without a record.
    """
    folder = Path(folder)
    check_free(folder)
    params = model.params if params is None else params
    if (mask is None) != (record is None):
        raise InputError("a mask and a PruningRecord belong together; give both of them or neither")
    if mask is not None:
        _same_structure(mask, params, "mask")
    leaves = dict(tree.named_leaves(params))
    bound = _bound(model, leaves)
    files = _text_files(model, leaves, mask, record)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp's is for nobody else
        _copy_or_write_tokenizer(model, partial)
        for name, content in files.items():
            _write_json(partial / name, content)
        _write_all(partial, bound, leaves, mask, shard_bytes)
        if mask is not None:
            write_masks(partial / MASKS, mask)
        if also is not None:
            also(partial)
        check_free(folder)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def read_record(folder: str | Path) -> dict[str, Any]:
    """Returns what pruning.json of an exported folder says.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return read_json(Path(folder) / RECORD)


def check_free(folder: str | Path) -> None:
    """Raises InputError where an export could not be written; call it before long work."""
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already; remove it, or give another output folder")
    if not folder.parent.is_dir():
        raise InputError(f"{folder.parent} is no folder to put {folder.name} in; make it first")


def _bound(model: Pretrained, leaves: Mapping[str, Any]) -> list[Stored]:
    bound = bind(SAFETENSORS[model.family], model.config, model.vocab_size)
    shapes = {part.name: part.shape for one in bound for part in one.parts}
    given = {name: tuple(jnp.shape(leaf)) for name, leaf in leaves.items()}
    for name in shapes.keys() | given.keys():
        if shapes.get(name) != given.get(name):
            raise InputError(
                f"the parameter {name!r} has the shape {given.get(name, 'of nothing')} and the "
                f"model's config asks for {shapes.get(name, 'none')}; export with the config that "
                "the parameters are of"
            )
    return bound


def _text_files(
    model: Pretrained, leaves: Mapping[str, Any], mask: PyTree, record: PruningRecord | None
) -> dict[str, dict[str, Any]]:
    files = {"config.json": _config(model, leaves)}
    if record is not None:
        counted = masks.summary(mask)
        files[RECORD] = {
            **dataclasses.asdict(record),
            "version": __version__,
            "sparsity": counted.sparsity,
            "pruned": counted.pruned,
            "prunable": counted.total,
            "tensors": {
                name: {"sparsity": one.sparsity, "pruned": one.pruned, "of": one.total}
                for name, one in counted.tensors.items()
            },
        }
        try:
            json.dumps(files[RECORD], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the PruningRecord is no JSON: {error}; give plain values") from None
    return files


def _config(model: Pretrained, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the source's config.json, or one made of the settings where these have changed."""
    family, config, vocab_size = read_config(model.hf_config, model.config.dtype)
    if (family, config, vocab_size) == (model.family, model.config, model.vocab_size):
        written = dict(model.hf_config)
    else:
        written = write_config(model.config, model.vocab_size, model.family)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in model.hf_config:
                written[key] = model.hf_config[key]
    written["architectures"] = [FAMILIES[model.family].architecture]
    sizes: dict[str, int] = {}
    for leaf in leaves.values():
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
    # The second is what transformers 5 calls the first.
    written["torch_dtype"] = max(sizes, key=lambda name: sizes[name])
    if "dtype" in written:
        written["dtype"] = written["torch_dtype"]
    return written


def _copy_or_write_tokenizer(model: Pretrained, folder: Path) -> None:
    if model.kind == "safetensors" and model.path.is_dir():
        for name in COPIED:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, folder / name)
    if model.tokenizer is None:
        return
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        model.tokenizer.save(folder)
    if not (folder / "generation_config.json").exists():
        eos = model.tokenizer.eos_ids
        said = {
            "bos_token_id": model.tokenizer.bos_id,
            "eos_token_id": list(eos) if len(eos) > 1 else model.tokenizer.eos_id,
        }
        said = {key: value for key, value in said.items() if value is not None}
        _write_json(folder / "generation_config.json", said)


def _write_all(
    folder: Path,
    bound: Sequence[Stored],
    leaves: Mapping[str, Any],
    mask: PyTree,
    shard_bytes: int,
) -> None:
    kept = {} if mask is None else dict(tree.named_leaves(mask))

    def stored(one: Stored) -> np.ndarray:
        parts = {}
        for part in one.parts:
            leaf = leaves[part.name]
            keep = kept.get(part.name)
            parts[part.name] = leaf if keep is None else masks.apply(leaf, keep)
        return one.write(parts)

    shards = list(_shards(bound, leaves, shard_bytes))
    if len(shards) == 1:
        write_weights(folder / WEIGHTS, _described(shards[0], leaves), stored)
        return
    listed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_weights(folder / name, _described(shard, leaves), stored)
        listed |= {one.name: name for one in shard}
    total = sum(leaf.nbytes for leaf in leaves.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": listed})


def _shards(
    bound: Sequence[Stored], leaves: Mapping[str, Any], shard_bytes: int
) -> Iterator[list[Stored]]:
    shard, size = [], 0
    for one in bound:
        takes = sum(leaves[part.name].nbytes for part in one.parts)
        if shard and size + takes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(one)
        size += takes
    yield shard


def _described(shard: Sequence[Stored], leaves: Mapping[str, Any]) -> list[tuple[Stored, np.dtype]]:
    # Parts of one tensor may differ in dtype; joined, they have the wider one.
    return [
        (one, np.result_type(*(np.dtype(leaves[part.name].dtype) for part in one.parts)))
        for one in shard
    ]


def _same_structure(mask: PyTree, params: PyTree, what: str) -> None:
    def check(name: str, keep: Any, weight: Any) -> None:
        if keep is not None and jnp.shape(keep) != jnp.shape(weight):
            raise InputError(
                f"the {what} of {name!r} has the shape {jnp.shape(keep)} and the weight "
                f"{jnp.shape(weight)}; make the mask from scores of these parameters"
            )

    tree.map_leaves(check, mask, params)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
