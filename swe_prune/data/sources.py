"""Where the text comes from: a file, or a prepared TFDS dataset; either way two strings.

A TFDS dataset is read with TFDS's own reader of array_record files, which needs no TensorFlow.
"""

import difflib
from pathlib import Path
from typing import Any

from swe_prune.config import DataConfig
from swe_prune.errors import InputError, first_line

SEPARATOR = "\n\n"
"""Stands between the examples of a TFDS split: a blank line, as between speeches or paragraphs."""

_OWN = "shakespeare_plays"  # the dataset that this package can prepare by itself
_READ_AT_ONCE = 64  # examples


def read(config: DataConfig) -> tuple[str, str]:
    """Returns the training and the validation text, cut to `train_chars` and `validation_chars`.

    Raises:
        InputError: the dataset, a split, the key, or a limit cannot be used, with the mend.
    """
    for key in ("train_chars", "validation_chars"):
        limit = getattr(config, key)
        if limit is not None and limit < 1:
            raise InputError(f"data.{key} = {limit} leaves no text; give at least 1, or None")
    path = Path(config.dataset).expanduser()
    if path.exists() or config.dataset.startswith(("/", "~", "./", "../")):
        train, validation = _read_file(path, config.validation_fraction)
    else:
        train, validation = _read_tfds(config)
    return (
        _first(train, config.train_chars, "train_chars", "training"),
        _first(validation, config.validation_chars, "validation_chars", "validation"),
    )


def read_named(name: str) -> str:
    """Returns one text: a file's, or a split of a TFDS dataset, "shakespeare_plays:validation".

    Args:
        name: a path, or NAME:SPLIT, where a SPLIT may be a part such as "validation[:2]".

    Raises:
        InputError: there is no such text, or it cannot be read, with the mend.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith(("/", "~", "./", "../")):
        return _read_file(path, 0.0)[0]
    dataset, _, split = name.partition(":")
    if not split:
        raise InputError(
            f"text {name!r} is no file that exists and names no split of a dataset; give the path "
            "of a text file, or NAME:SPLIT such as shakespeare_plays:train"
        )
    config = DataConfig(dataset=dataset, train_split=split, validation_split=split)
    builder = _builder(dataset, config.data_dir)
    _check(builder, config)
    return _read_split(builder, split, config.text_key, None)


def _first(text: str, limit: int | None, key: str, split: str) -> str:
    if limit is not None and limit > len(text):
        raise InputError(
            f"data.{key} = {limit} is more than the {len(text)} characters of the {split} text; "
            "lower it, or leave it None for all"
        )
    return text[:limit]


def _read_file(path: Path, validation_fraction: float) -> tuple[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"text file {str(path)!r} cannot be read ({error.strerror}); "
            "correct data.dataset to the path of a text file"
        ) from None
    if not content.strip():
        raise InputError(f"text file {str(path)!r} is empty; give one with text in it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {str(path)!r} is not UTF-8 (byte {error.start}); convert it to UTF-8 first"
        ) from None
    if "\0" in text:
        raise InputError(
            f"text file {str(path)!r} is binary (a NUL at character {text.index(chr(0))}); "
            "give a plain text file"
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    cut = len(text) - round(len(text) * validation_fraction)
    return text[:cut], text[cut:]


def _read_tfds(config: DataConfig) -> tuple[str, str]:
    builder = _builder(config.dataset, config.data_dir)
    _check(builder, config)  # both splits, before the first is read
    return (
        _read_split(builder, config.train_split, config.text_key, config.train_chars),
        _read_split(builder, config.validation_split, config.text_key, config.validation_chars),
    )


def _builder(name: str, data_dir: str | None) -> Any:
    """Returns the builder of a dataset that is prepared in array_record, our own preparing it."""
    # TFDS takes half a second to import, which a text file or a tokenizer need not wait for.
    import tensorflow_datasets as tfds

    own = name.partition(":")[0] == _OWN
    if own:  # importing the builder makes its name known to TFDS
        import swe_prune.data.shakespeare_plays.shakespeare_plays_dataset_builder  # noqa: F401
    data_dir = data_dir and str(Path(data_dir).expanduser())
    mend = f"tfds build {name} --file_format=array_record" + (
        f" --data_dir={data_dir}" if data_dir else ""
    )
    builder: Any
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), _OWN]
        near = difflib.get_close_matches(name.partition("/")[0], known, n=1, cutoff=0.8)
        raise InputError(
            f"dataset {name!r} is neither a text file here nor a dataset that TFDS knows or finds "
            f"prepared; {f'did you mean {near[0]!r}? Else correct' if near else 'correct'} the "
            f"name, or prepare it: {mend}"
        ) from None
    except Exception as error:  # a malformed name, an unknown config or version, a missing package
        raise InputError(
            f"dataset {name!r} is no text file here, and TFDS cannot open it "
            f"({first_line(error)}); correct data.dataset"
        ) from error
    if own and not builder.data_path.exists():
        builder = _prepare(tfds, name, data_dir)
    if not builder.data_path.exists():
        where = data_dir or str(builder.data_path)
        raise InputError(f"dataset {name!r} is not prepared in {where!r}; run: {mend}")
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record not in builder.info.available_file_formats():
        raise InputError(
            f"dataset {name!r} is prepared as {builder.info.file_format.value} in "
            f"{str(builder.data_path)!r}, which only TensorFlow reads; remove it and run: {mend}"
        )
    return builder


def _prepare(tfds: Any, name: str, data_dir: str | None) -> Any:
    """Prepares our own dataset.

    TFDS writes to a folder of its own beside the final one and renames it at the end. So a killed
    run leaves nothing that looks prepared, and of several processes at once one wins.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()  # six bars for two seconds would only fill the log
    try:
        builder.download_and_prepare()
    except OSError as error:
        # Renaming fails where another process was faster; its result is the same.
        if not builder.data_path.exists():
            raise InputError(
                f"dataset {name!r} cannot be written to {str(builder.data_path)!r} "
                f"({first_line(error)}); set data.data_dir to a folder that can be written"
            ) from error
    return tfds.builder(name, data_dir=data_dir)


def _check(builder: Any, config: DataConfig) -> None:
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    keys = [key for key, kind in dict(features or {}).items() if isinstance(kind, kinds.Text)]
    if config.text_key not in keys:
        raise InputError(
            f"dataset {config.dataset!r} has no text under data.text_key = {config.text_key!r}; "
            + (f"its keys of text are: {', '.join(keys)}" if keys else "it has no text at all")
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
        # The rest of a large dataset is not worth its time where only its beginning is wanted.
        if limit is not None and length - len(SEPARATOR) >= limit:
            break
    return SEPARATOR.join(texts)
