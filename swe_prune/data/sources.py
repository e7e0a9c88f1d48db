"""Sources of text: a file or a prepared TFDS dataset, read as strings.

TFDS datasets are read with TFDS's reader for array_record files, which does not need TensorFlow.
"""

import contextlib
import difflib
import importlib
from pathlib import Path
from typing import Any

from swe_prune.config import DataConfig
from swe_prune.data.text_files import SEPARATOR, read_text
from swe_prune.errors import (
    NO_QUOTA,
    NO_SPACE,
    InputError,
    RunError,
    first_line,
    reading,
    why_unwritten,
)
from swe_prune.runtime.storage import is_regular

OWN = ("shakespeare_plays", "digit_prices")  # the datasets that this package can prepare
_DATA_DIR = "~/tensorflow_datasets"  # the default of TFDS
_READ_AT_ONCE = 64  # examples


def read(config: DataConfig) -> tuple[str, str]:
    """Returns the training and the validation text, cut to `train_chars` and `validation_chars`.

    Raises:
        InputError: If the dataset, a split, the text key, or a limit cannot be used.
    """
    for key in ("train_chars", "validation_chars"):
        limit = getattr(config, key)
        if limit is not None and limit < 1:
            raise InputError(f"data.{key} must be 1 or more, or None, got {limit}")
    # Anything that does not look like a path is the name of a TFDS dataset.
    path = Path(config.dataset).expanduser()
    if path.exists() or config.dataset.startswith(("/", "~", "./", "../")):
        train, validation = _read_file(path, config.validation_fraction, config.text_key)
    else:
        train, validation = _read_tfds(config)
    return (
        _first(train, config.train_chars, "train_chars", "training"),
        _first(validation, config.validation_chars, "validation_chars", "validation"),
    )


def read_named(name: str) -> str:
    """Returns one text, from a file or from a split of a TFDS dataset.

    Args:
        name: Path of a text file, or NAME:SPLIT such as "shakespeare_plays:validation", where SPLIT
            may be a slice such as "validation[:2]".

    Raises:
        InputError: If the text does not exist or cannot be read.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith(("/", "~", "./", "../")):
        return read_text(path, correct="the path")
    dataset, _, split = name.partition(":")
    if not split:
        raise InputError(
            f"text {name!r} is neither an existing file nor NAME:SPLIT of a dataset; give the path "
            "of a text file, or NAME:SPLIT such as shakespeare_plays:train"
        )
    config = DataConfig(dataset=dataset, train_split=split, validation_split=split)
    builder = open_builder(dataset, config.data_dir)
    with reading_prepared(builder):
        _check(builder, config)
        return _read_split(builder, split, config.text_key, None)


def _first(text: str, limit: int | None, key: str, split: str) -> str:
    if limit is not None and limit > len(text):
        raise InputError(
            f"data.{key} = {limit} is more than the {len(text)} characters of the {split} text; "
            "lower it, or leave it None for all"
        )
    return text[:limit]


def _read_file(path: Path, validation_fraction: float, key: str) -> tuple[str, str]:
    text = read_text(path, key)
    # The validation text is the end of the file.
    cut = len(text) - round(len(text) * validation_fraction)
    return text[:cut], text[cut:]


def _read_tfds(config: DataConfig) -> tuple[str, str]:
    builder = open_builder(config.dataset, config.data_dir)
    with reading_prepared(builder):
        _check(builder, config)  # both splits, before the first is read
        return (
            _read_split(builder, config.train_split, config.text_key, config.train_chars),
            _read_split(builder, config.validation_split, config.text_key, config.validation_chars),
        )


def reading_prepared(builder: Any) -> contextlib.AbstractContextManager[None]:
    """Names the folder of a prepared dataset when what reads it fails, and the way out."""
    build = f"tfds build {builder.name} --file_format=array_record"
    again = _again(builder.name in OWN, build)
    folder = str(builder.data_path)
    return reading(f"the prepared dataset in {folder!r}", f"remove that folder and {again}")


def _again(own: bool, build: str) -> str:
    return "run the same command, which prepares it again" if own else f"run: {build}"


def open_builder(name: str, data_dir: str | None) -> Any:
    """Returns the builder of a dataset in array_record format; prepares our own if necessary.

    Args:
        name: Name of the dataset as TFDS spells it.
        data_dir: Folder of prepared datasets. If None, the default of TFDS.

    Raises:
        InputError: If there is no such dataset, or it is not prepared in this format.
    """
    # Import here: TFDS takes half a second, which text files and tokenizers do not need.
    import tensorflow_datasets as tfds

    plain = name.partition(":")[0]
    own = plain in OWN
    if own:  # importing the builder registers its name with TFDS
        importlib.import_module(f"swe_prune.data.{plain}.{plain}_dataset_builder")
    data_dir = data_dir and str(Path(data_dir).expanduser())
    build = f"tfds build {name} --file_format=array_record" + (
        f" --data_dir={data_dir}" if data_dir else ""
    )
    place = Path(data_dir or _DATA_DIR).expanduser() / name.partition("/")[0].partition(":")[0]
    builder: Any
    try:
        for file in place.rglob("*"):  # a pipe would be waited for, a device read without end
            if not file.is_dir() and not is_regular(file):
                raise OSError(f"{file.name} is not a regular file")
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), *OWN]
        near = difflib.get_close_matches(name.partition("/")[0], known, n=1, cutoff=0.8)
        raise InputError(
            f"dataset {name!r} is neither an existing text file nor a dataset that TFDS knows or "
            f"finds prepared; {f'did you mean {near[0]!r}? Else correct' if near else 'correct'} "
            f"the name, or prepare it: {build}"
        ) from None
    except Exception as error:  # a malformed name, an unknown config or version, a missing package
        if place.is_dir():
            raise InputError(
                f"the prepared dataset in {str(place)!r} cannot be read ({first_line(error)}); "
                f"remove that folder and {_again(own, build)}"
            ) from None
        raise InputError(
            f"dataset {name!r} is not an existing text file, and TFDS cannot open it "
            f"({first_line(error)}); correct data.dataset"
        ) from error
    # Prepare our own dataset on first use; the user must prepare all others.
    if own and not builder.data_path.exists():
        builder = _prepare(tfds, name, data_dir)
    if not builder.data_path.exists():
        where = data_dir or str(builder.data_path)
        raise InputError(f"dataset {name!r} is not prepared in {where!r}; run: {build}")
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record not in builder.info.available_file_formats():
        raise InputError(
            f"dataset {name!r} is prepared as {builder.info.file_format.value} in "
            f"{str(builder.data_path)!r}, which only TensorFlow reads; remove it and "
            f"{_again(own, build)}"
        )
    return builder


def _prepare(tfds: Any, name: str, data_dir: str | None) -> Any:
    """Prepares our own dataset.

    TFDS writes to a temporary folder next to the final one and renames it at the end. A killed run
    therefore leaves nothing that looks prepared, and of several concurrent processes one wins.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()  # six bars for two seconds only fill the log
    try:
        builder.download_and_prepare()
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # those of array_record's writer, too
        # Renaming fails if another process was faster, but its result is the same.
        if not builder.data_path.exists():
            why = why_unwritten(error)
            kind = RunError if why in (NO_SPACE, NO_QUOTA) else InputError
            raise kind(
                f"dataset {name!r} cannot be written to {str(builder.data_path)!r} ({why}); "
                "set data.data_dir to a folder that can be written and has room"
            ) from None
    return tfds.builder(name, data_dir=data_dir)


def _check(builder: Any, config: DataConfig) -> None:
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    keys = [key for key, kind in dict(features or {}).items() if isinstance(kind, kinds.Text)]
    if config.text_key not in keys:
        raise InputError(
            f"dataset {config.dataset!r} has no text under data.text_key = {config.text_key!r}; "
            + (f"its text keys are: {', '.join(keys)}" if keys else "it has no text keys")
        )
    for key in ("train_split", "validation_split"):
        expression = getattr(config, key)
        try:
            examples = builder.info.splits[expression].num_examples
        except Exception:
            examples = 0
        if not examples:
            raise InputError(
                f"dataset {config.dataset!r} has no examples in data.{key} = {expression!r}; its "
                f"splits are: {', '.join(sorted(builder.info.splits))}, or parts such as "
                "'train[90%:]'"
            )


def _read_split(builder: Any, split: str, key: str, limit: int | None) -> str:
    source = builder.as_data_source(split=split)
    texts, length = [], 0
    for start in range(0, len(source), _READ_AT_ONCE):
        indices = range(start, min(start + _READ_AT_ONCE, len(source)))
        for example in source.__getitems__(indices):
            text = example[key]
            try:
                texts.append(text.decode() if isinstance(text, bytes) else str(text))
            except UnicodeDecodeError:
                raise InputError(
                    f"{key!r} of an example in split {split!r} of dataset {builder.name!r} is "
                    "not UTF-8; prepare the dataset with text in UTF-8"
                ) from None
            length += len(texts[-1]) + len(SEPARATOR)
        # Stop early if only the beginning of a large dataset is used.
        if limit is not None and length - len(SEPARATOR) >= limit:
            break
    return SEPARATOR.join(texts)
