"""Rows with a picture, a prompt and a price: from TFDS, a parquet file, or a folder of `datasets`.

The product-price set is read as the public recipe reads it: columns `title`, `category3_code`,
`full_price` and `image`, one prompt, and the price as the last word of the answer.

Source: https://github.com/microsoft/Phi-3CookBook, Phi-3-vision-Trainingscript.py in the folder
code/04.Finetuning (the prompt and the parsing); DBQ/Burberry.Product.prices.United.States (the
columns).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swe_prune.config import DataConfig
from swe_prune.data.sources import open_builder, reading_prepared
from swe_prune.errors import InputError, first_line, reading
from swe_prune.runtime.packages import require

END = "<|end|>"
PROMPT = f"<|user|>\n<|image_1|>What is shown in this image?{END}<|assistant|>"
COLUMNS = ("title", "category3_code", "full_price", "image")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.(arrow|parquet)")


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture with its text.

    Attributes:
        image: Function that returns the encoded picture, or its path.
        prompt: Text before the answer, with a placeholder for the picture.
        answer: Text to learn, which ends with the price.
        where: Description of the row for messages.
    """

    image: Callable[[], bytes | str]
    prompt: str
    answer: str
    where: str

    @property
    def price(self) -> float | None:
        """The price in the answer, or None if there is none."""
        return price_in(self.answer)


def price_in(text: str) -> float | None:
    """Returns the price that a text ends with, or None if it ends with no finite number.

    As in the recipe: the last word, without commas.

    >>> price_in(" Full Price: 1,290.0<|end|>"), price_in("cheap"), price_in("")
    (1290.0, None, None)
    """
    words = text.split("<|")[0].split()  # what a text of characters writes of END may be cut
    try:
        price = float(words[-1].replace(",", ""))
    except (IndexError, ValueError):
        return None
    return price if math.isfinite(price) else None


def read(config: DataConfig) -> tuple[Sequence[Row], Sequence[Row]]:
    """Returns the rows of the training and the validation split.

    Raises:
        InputError: If the dataset cannot be read, or lacks a column.
    """
    path = Path(config.dataset).expanduser()
    if path.exists() or config.dataset.startswith(("/", "~", "./", "../")):
        rows = _table_rows(path)
        cut = len(rows) - round(len(rows) * config.validation_fraction)
        return rows[:cut], rows[cut:]
    builder = open_builder(config.dataset, config.data_dir)
    with reading_prepared(builder):
        splits = config.train_split, config.validation_split
        return _tfds_rows(builder, splits[0]), _tfds_rows(builder, splits[1])


def _tfds_rows(builder: Any, split: str) -> list[Row]:
    import tensorflow_datasets as tfds

    features = dict(builder.info.features or {})
    if missing := {"image", "prompt", "answer"} - features.keys():
        raise InputError(
            f"dataset {builder.name!r} lacks {', '.join(sorted(missing))}, which a model of images "
            f"and text needs; it has {', '.join(features)}"
        )
    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        raise InputError(
            f"dataset {builder.name!r} has no split {split!r} ({first_line(error)}); it has "
            f"{', '.join(sorted(builder.info.splits))}"
        ) from None
    rows = []
    for number, one in enumerate(source.__getitems__(range(len(source)))):
        where = f"example {number} in split {split!r} of dataset {builder.name!r}"
        prompt, answer = (one[key].decode() for key in ("prompt", "answer"))
        rows.append(Row(lambda one=one: one["image"], prompt, answer, where))
    return rows


def _table_rows(path: Path) -> list[Row]:
    """Returns the rows of a parquet file, or of a folder that `datasets` saved."""
    table = _table(path)
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise InputError(
            f"{path} lacks the columns {', '.join(missing)} of the product-price set; it has "
            f"{', '.join(table.column_names)}"
        )
    with reading(path):
        texts = zip(*(table.column(name).to_pylist() for name in COLUMNS[:3]), strict=True)
        pictures = table.column("image")
    rows = []
    for number, (title, category, price) in enumerate(texts):
        where = f"row {number} of {path}"

        def image(number: int = number, where: str = where) -> bytes | str:
            return _picture(pictures[number].as_py(), path, where)

        answer = f"\nProduct: {title}, Category: {category}, Full Price: {price}{END}"
        rows.append(Row(image, PROMPT, answer, where))
    return rows


def _picture(value: Any, path: Path, where: str) -> bytes | str:
    """Returns what `datasets` stores of an image: its bytes, or else its path."""
    if isinstance(value, bytes):
        return value
    inside = value.get("bytes") if isinstance(value, dict) else None
    if isinstance(inside, bytes):
        return inside
    raise InputError(
        f"{where} has no encoded image in its column 'image'; store the bytes of the file there"
    )


def _table(path: Path) -> Any:
    require("pyarrow.parquet", "reading a parquet file", "images")
    import pyarrow.parquet

    if path.is_dir():
        files = sorted(path.rglob("*.arrow")) or sorted(path.rglob("*.parquet"))
    else:
        files = [path]
    if not files or not (path.is_dir() or _begins_as_parquet(path)):
        raise InputError(
            f"{path} is neither a parquet file nor a folder with .arrow or .parquet files of "
            f"pictures and their texts (columns {', '.join(COLUMNS)}); correct data.dataset"
        )
    _check_complete(path, files)
    tables: list[Any] = []
    for file in files:
        with reading(file):
            if not file.is_file():  # a pipe would never end
                raise ValueError("it is not a regular file")
            if file.suffix == ".arrow":
                with pyarrow.memory_map(str(file)) as mapped:
                    tables.append(pyarrow.ipc.open_stream(mapped).read_all())
            else:
                tables.append(
                    pyarrow.parquet.read_table(
                        file, memory_map=True, page_checksum_verification=True
                    )
                )
            tables[-1].validate(full=True)  # texts that are not UTF-8, places outside of the file
            if tables[-1].schema != tables[0].schema:
                raise ValueError(f"its columns are not those of {files[0].name}")
    return pyarrow.concat_tables(tables)


def _begins_as_parquet(path: Path) -> bool:
    """Returns whether a file is meant as parquet, however damaged: by its name or its first bytes.

    Raises:
        InputError: It cannot be read.
    """
    if not path.is_file():
        return False
    with reading(path), open(path, "rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"


def _check_complete(path: Path, files: Sequence[Path]) -> None:
    """Checks that no file of several is missing, whose names say how many there are.

    Raises:
        InputError: One is missing; names it.
    """
    groups: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if match := _PART.fullmatch(file.name):
            groups.setdefault((match["stem"], match["count"]), set()).add(int(match["number"]))
    for (stem, count), numbers in groups.items():
        if len(numbers) < int(count) and path.is_dir():
            raise InputError(
                f"{path} has {len(numbers)} of the {int(count)} files of {stem!r}; get the others"
            )
