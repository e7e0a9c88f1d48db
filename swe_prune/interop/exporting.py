"""Export of a model as a folder that transformers loads, with masks and a record of the pruning.

    config.json, generation_config.json, tokenizer files    in the format of transformers
    model.safetensors, or shards with their index            pruned weights are exactly 0
    compressed.safetensors                                   instead, if asked for: without zeros
    masks.safetensors                                        one bit per weight, for `read_masks`
    pruning.json                                             settings and results of the pruning

The folder is written under a temporary name next to its final path, and renamed when complete.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from swe_prune import masks, tree
from swe_prune.arguments import checked
from swe_prune.config import VisionConfig
from swe_prune.errors import InputError, writing
from swe_prune.interop.compressed_file import write_compressed
from swe_prune.interop.families import FAMILIES
from swe_prune.interop.folder_files import COMPRESSED, COPIED, TOKENIZER_FILES
from swe_prune.interop.hf_config import canonical, read_config, write_config
from swe_prune.interop.mask_file import FILE as MASKS
from swe_prune.interop.mask_file import write_masks
from swe_prune.interop.pretrained import Pretrained
from swe_prune.interop.pruning_record import FILE as RECORD
from swe_prune.interop.pruning_record import PruningRecord, record_file
from swe_prune.interop.slices import StoredTensor, bind, param_shapes
from swe_prune.interop.stranger_files import inside, read_json, write_json
from swe_prune.interop.tensor_names import SAFETENSORS
from swe_prune.interop.vision_settings import PREPROCESSOR
from swe_prune.interop.weights_file import pieces_of, write_folder
from swe_prune.masks.fitting import check_mask

CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
"""Settings that name code of the source folder, which is not part of an export."""

SHARD_BYTES = 5 * 10**9

ROOM = "make room or give another output folder, and run the same command again"


@checked
def export(
    folder: str | os.PathLike[str],
    model: Pretrained,
    params: PyTree | None = None,
    *,
    mask: PyTree | None = None,
    record: PruningRecord | None = None,
    also: Callable[[Path], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    compress: bool = False,
) -> Path:
    """Writes a model as a Hugging Face folder and returns its path.

    Each parameter is written in its own dtype. In addition to the parameters, one stored tensor at
    a time is in memory.

    Args:
        folder: Path of the folder, which must not exist yet; its parent must exist.
        model: Model that provides config, tokenizer and tensor names.
        params: Pytree like `model.params`. If None, `model.params`.
        mask: Bool pytree like the parameters, None where dense, which is applied to the parameters
            and written. If None, nothing is masked.
        record: Content of pruning.json, which is required with a mask.
        also: Function that writes additional files into the folder, called with its temporary path.
        shard_bytes: Maximal size in bytes of a weights file; a larger tensor has its own file.
        compress: Whether to leave out the zeros, in one file that only `load` reads; see
            `compressed_file`.

    Raises:
        RunError: If the disk is full, or cannot be written to.
        InputError: If the folder exists or its parent does not, the parameters do not fit the
            config or are not finite, the config cannot be expressed in config.json, or only one of
            mask and record is given.
    """
    folder = Path(folder)
    check_free(folder)
    params = model.params if params is None else params
    if (mask is None) != (record is None):
        raise InputError("a mask and a PruningRecord belong together; give both or neither")
    if mask is not None:
        check_mask(mask, params)
    # Check everything before anything is written.
    leaves = dict(tree.named_leaves(params))
    bound = _bound(model, leaves)
    files = {"config.json": _config(model, leaves)}
    vision = model.config.vision
    if vision is not None and vision.crops != VisionConfig.crops:
        files[PREPROCESSOR] = {"num_crops": vision.crops}
    if record is not None:
        files[RECORD] = record_file(record, mask)
    # Write to a temporary folder, and rename it when it is complete.
    partial = _partial(folder)
    try:
        with writing(f"the model {folder}", ROOM):
            partial.mkdir()
            _copy_or_write_tokenizer(model, partial)
            for name, content in files.items():
                if name == PREPROCESSOR and (partial / name).exists():  # with more than the crops
                    content = read_json(partial / name) | content
                write_json(partial / name, content)
            if compress:
                write_compressed(partial / COMPRESSED, pieces_of(bound, *_contents(leaves, mask)))
            else:
                write_folder(partial, bound, *_contents(leaves, mask), shard_bytes)
            if mask is not None:
                write_masks(partial / MASKS, mask)
            if also is not None:
                also(partial)
            _check_absent(folder)
            os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


@checked
def check_free(folder: str | os.PathLike[str]) -> None:
    """Checks that a model can be written to a folder; call it before long work.

    Raises:
        InputError: It exists, or its parent does not.
        RunError: No folder of that name can be made there.
    """
    folder = Path(folder)
    with writing(f"the model {folder}", ROOM):
        _check_absent(folder)
    if not folder.parent.is_dir():
        raise InputError(
            f"{folder.parent}, the parent of {folder.name}, is not a folder; create it first"
        )
    with writing(f"the model {folder}", ROOM):  # a name may be too long, a folder read-only
        made = _partial(folder)
        made.mkdir()
        made.rmdir()


def _check_absent(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} already exists; remove it, or give another output folder")


def _partial(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"


def _bound(model: Pretrained, leaves: Mapping[str, Any]) -> list[StoredTensor]:
    bound = bind(SAFETENSORS[model.family], model.config, model.vocab_size)
    shapes = param_shapes(model.config, model.vocab_size)
    given = {name: tuple(jnp.shape(leaf)) for name, leaf in leaves.items()}
    for name in [*given, *shapes]:
        if shapes.get(name) != given.get(name):
            raise InputError(
                f"the parameter {name!r} must have shape {shapes.get(name, 'none')} by the model's "
                f"config, got {given.get(name, 'none')}; export with the config of the parameters"
            )
    return bound


def _contents(
    leaves: Mapping[str, Any], mask: PyTree
) -> tuple[Callable[[StoredTensor], np.dtype], Callable[[StoredTensor], np.ndarray]]:
    """Returns functions from a stored tensor to its dtype, and to its masked values."""
    kept = {} if mask is None else dict(tree.named_leaves(mask))

    def dtype(one: StoredTensor) -> np.dtype:
        # Parameters joined in one tensor may differ in dtype; the tensor has the wider one.
        return np.result_type(*(np.dtype(leaves[part.name].dtype) for part in one.parts))

    def values(one: StoredTensor) -> np.ndarray:
        pieces = []
        for part in one.parts:
            leaf, keep = leaves[part.name], kept.get(part.name)
            own = part.of(leaf)
            pieces.append(own if keep is None else masks.apply(own, part.of(keep)))
        joined = one.join(pieces)
        if not np.isfinite(joined).all():
            raise InputError(
                f"{one.name!r} has weights that are NaN or infinite, and no such model is "
                "exported; correct the parameters"
            )
        return joined

    return dtype, values


def _config(model: Pretrained, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the source's config.json, or a new one if the settings have changed."""
    family, config, vocab_size = read_config(model.hf_config, model.config.dtype)
    ours = (model.family, canonical(model.config), model.vocab_size)
    # Reuse the source's config.json unless the settings have changed.
    if (family, config, vocab_size) == ours:
        written = dict(model.hf_config)
    else:
        written = write_config(model.config, model.vocab_size, model.family)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in model.hf_config:
                written[key] = model.hf_config[key]
    written = _without_code(written)
    written["architectures"] = [FAMILIES[model.family].architecture]
    sizes: dict[str, int] = {}
    for leaf in leaves.values():
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
    # Transformers 5 renamed torch_dtype to dtype.
    written["torch_dtype"] = max(sizes, key=lambda name: sizes[name])
    if "dtype" in written:
        written["dtype"] = written["torch_dtype"]
    return written


def _copy_or_write_tokenizer(model: Pretrained, folder: Path) -> None:
    # Copy the files of the source folder, and write what is still missing.
    words = model.tokenizer
    if model.kind == "safetensors" and model.path.is_dir():
        _copy(COPIED, model.path, folder)
        if words is None:
            _copy(TOKENIZER_FILES, model.path, folder)
    if words is None:
        return
    if words.folder is None:
        words.save(folder)
    else:
        _copy(TOKENIZER_FILES, words.folder, folder)
    if not (folder / "generation_config.json").exists():
        eos = words.eos_ids
        said = {
            "bos_token_id": words.bos_id,
            "eos_token_id": list(eos) if len(eos) > 1 else words.eos_id,
        }
        said = {key: value for key, value in said.items() if value is not None}
        write_json(folder / "generation_config.json", said)


def _copy(names: Sequence[str], source: Path, folder: Path) -> None:
    """Copies files; the settings in them that name code are left out."""
    for name in names:
        if not os.path.lexists(source / name):
            continue
        file = inside(source, name)
        if name.endswith("config.json"):
            content = read_json(file)
            clean = _without_code(content)
            if clean != content:
                if "tokenizer_class" in clean and (source / "tokenizer.json").is_file():
                    clean["tokenizer_class"] = "PreTrainedTokenizerFast"  # a class of their code
                write_json(folder / name, clean)
                continue
        shutil.copyfile(file, folder / name)


def _without_code(content: Any) -> Any:
    """Returns settings without those that name code, at any depth."""
    if isinstance(content, Mapping):
        return {k: _without_code(v) for k, v in content.items() if k not in CODE_KEYS}
    return [_without_code(one) for one in content] if isinstance(content, list) else content
