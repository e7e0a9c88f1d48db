"""Pictures with a prompt and a price, as batches for a model of images and text.

    data = load(config.data, config.model)
    for batch in train_iterator(data.train, batch=64, seed=0): ...

A text is the prompt, with as many image tokens as its picture has in the place of `PLACEHOLDER`,
and the answer, the only part whose loss counts. Pictures with equally many crops are together in a
batch, padded to the length of the longest text with so many. B is the batch size, L that length, N
the crops of a picture with its global view.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from swe_prune.config import DataConfig, ModelConfig, VisionConfig
from swe_prune.config.model import IMAGE_TOKEN
from swe_prune.data import images, price_rows
from swe_prune.data.char_tokenizer import CharTokenizer
from swe_prune.data.dataset import Tokenizer
from swe_prune.data.price_rows import Row
from swe_prune.data.windows import checked_order, evenly_spaced
from swe_prune.errors import InputError

if TYPE_CHECKING:
    import grain

PLACEHOLDER = "<|image_1|>"
_ROUND = 8  # lengths are padded to a multiple of this

Batch = dict[str, Any]
"""{"inputs": {"tokens": int32 (B, L), "pixels": float32 (B, N, side, side, 3), "grid": int32
(B, 2)}, "targets": int32 (B, L), "weights": float32 (B, L), 0 outside of the answer}."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split.

    Attributes:
        rows: Rows with picture, prompt, answer and price.
        tokens: Tokens of each text, int32.
        starts: Number of tokens before each answer.
        grids: Rows and columns of the crops of each picture.
        lengths: Length to pad the texts with so many crops to.
        vision: Sizes of the crops.
    """

    rows: Sequence[Row]
    tokens: list[np.ndarray] = dataclasses.field(repr=False)
    starts: list[int] = dataclasses.field(repr=False)
    grids: Int[np.ndarray, "R 2"] = dataclasses.field(repr=False)
    lengths: Mapping[int, int]
    vision: VisionConfig

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def buckets(self) -> list[np.ndarray]:
        """Numbers of the examples with equally many crops."""
        crops = self.grids.prod(axis=1)
        return [np.flatnonzero(crops == count) for count in np.unique(crops)]

    def pixels(self, number: int) -> Float[np.ndarray, "N Y X 3"]:
        """Returns the crops of an example's picture, the global view first."""
        row = self.rows[number]
        return images.crops_of(images.open_image(row.image(), row.where), self.vision)

    def pictures(self, numbers: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns the crops and grids of examples with equally many crops."""
        pixels = np.stack([self.pixels(number) for number in numbers])
        return {"pixels": pixels, "grid": self.grids[numbers].astype(np.int32)}

    def batch(
        self,
        numbers: Sequence[int] | np.ndarray,
        pictures: Mapping[str, np.ndarray] | None = None,
    ) -> Batch:
        """Returns examples with equally many crops as a batch.

        Args:
            numbers: Numbers of the examples.
            pictures: Crops and grids in place of the examples' own, as `pictures` returns them.
        """
        length = self.lengths[int(self.grids[numbers[0]].prod())]
        tokens_BxL, targets_BxL = np.zeros((2, len(numbers), length), np.int32)
        weights_BxL = np.zeros((len(numbers), length), np.float32)
        for at, number in enumerate(numbers):
            whole, start = self.tokens[number], self.starts[number]
            tokens_BxL[at, : len(whole) - 1] = whole[:-1]
            targets_BxL[at, : len(whole) - 1] = np.maximum(whole[1:], 0)
            weights_BxL[at, start - 1 : len(whole) - 1] = 1
        inputs = {"tokens": tokens_BxL, **(pictures or self.pictures(numbers))}
        return {"inputs": inputs, "targets": targets_BxL, "weights": weights_BxL}


@dataclasses.dataclass(frozen=True)
class ImageTextData:
    """A dataset of pictures and texts.

    Attributes:
        name: Dataset as the config names it.
        tokenizer: Tokenizer of the texts' symbols, or the one that was given.
        train: Examples to train on.
        validation: Examples to evaluate on.
        skipped: Messages of the bad rows that were left out.
    """

    name: str
    tokenizer: Tokenizer
    train: Split
    validation: Split
    skipped: list[str] = dataclasses.field(repr=False)


def load(
    config: DataConfig, model: ModelConfig, tokenizer: Tokenizer | None = None
) -> ImageTextData:
    """Returns the pictures and texts that the config names, every picture checked.

    `config.dataset` is the name of a TFDS dataset with `image`, `prompt` and `answer`, such as
    `digit_prices`, or the path of a parquet file or a folder of Hugging Face's `datasets` with the
    columns of the product-price set; see `price_rows`.

    Args:
        config: Dataset, and whether bad rows are left out.
        model: Settings of the model, with its vision tower.
        tokenizer: Tokenizer of a pretrained model. If None, one of the texts' characters.

    Raises:
        InputError: If the dataset cannot be read, or a row is bad: its picture cannot be decoded,
            its prompt has no placeholder or several, its answer no number, or its text is longer
            than the context.
    """
    assert model.vision is not None
    skipped: list[str] = []
    checked = []
    for rows in price_rows.read(config):
        good = []
        for row in rows:
            try:
                good.append((row, _check(row, model.vision)))
            except InputError as error:
                if not config.skip_bad_rows:
                    raise InputError(
                        f"{error} (data.skip_bad_rows = True leaves such rows out)"
                    ) from None
                skipped.append(str(error))
        checked.append(good)
    if tokenizer is None:
        texts = (part for good in checked for row, _ in good for part in _parts(row))
        tokenizer = CharTokenizer.from_texts(texts)
    splits = [_encoded(good, model, tokenizer) for good in checked]
    # One length for all texts with so many crops, so that few programs are compiled.
    longest: dict[int, int] = {}
    for split in splits:
        for tokens, crops in zip(split.tokens, split.grids.prod(axis=1), strict=True):
            padded = -(-(len(tokens) - 1) // _ROUND) * _ROUND
            longest[int(crops)] = min(max(longest.get(int(crops), 0), padded), model.context)
    train, validation = (dataclasses.replace(split, lengths=longest) for split in splits)
    for name, split in (("training", train), ("validation", validation)):
        if not len(split):
            raise InputError(f"{config.dataset!r} has no good row in its {name} split; add some")
    return ImageTextData(config.dataset, tokenizer, train, validation, skipped)


def _check(row: Row, vision: VisionConfig) -> tuple[int, int]:
    """Checks a row and returns the grid of its picture."""
    count = row.prompt.count(PLACEHOLDER)
    if count != 1:
        raise InputError(
            f"{row.where} has the placeholder {PLACEHOLDER} {count} times in its prompt; write it "
            "once"
        )
    if row.price is None:
        raise InputError(f"{row.where} has no price at the end of its answer, {row.answer!r}")
    image = images.open_image(row.image(), row.where)
    images.check_size(image.width, image.height, vision, row.where)
    return images.grid_of(image.width, image.height, vision)


def _parts(row: Row) -> tuple[str, ...]:
    return (*row.prompt.split(PLACEHOLDER), row.answer)


def _encoded(
    good: Sequence[tuple[Row, tuple[int, int]]], model: ModelConfig, tokenizer: Tokenizer
) -> Split:
    assert model.vision is not None
    texts, starts = [], []
    for row, grid in good:
        before, after, answer = (tokenizer.encode(part) for part in _parts(row))
        image = np.full(model.vision.tokens(*grid), IMAGE_TOKEN)
        whole = np.concatenate([before, image, after, answer]).astype(np.int32)
        if len(whole) - 1 > model.context:
            raise InputError(
                f"{row.where} becomes {len(whole) - 1} tokens, {len(image)} of them of its "
                f"picture, and config.model.context is {model.context}; raise it, or lower "
                "config.model.vision.crops"
            )
        texts.append(whole)
        starts.append(len(whole) - len(answer))
    grids = np.array([grid for _, grid in good], np.int32).reshape(-1, 2)
    return Split([row for row, _ in good], texts, starts, grids, {}, model.vision)


def train_iterator(
    split: Split, *, batch: int, seed: int, rows: Int[np.ndarray, " R"] | None = None
) -> "grain.DatasetIterator[Batch]":
    """Returns an endless iterator over batches of examples with equally many crops.

    An epoch visits every example of a bucket once, except for a rest that does not fill a batch; a
    bucket smaller than a batch repeats its examples. The position is saved and restored as that of
    `data.train_iterator`.

    Args:
        split: Examples.
        batch: Number of examples B of a batch.
        seed: Seed of the order, in [0, 2^32).
        rows: Indices of the rows of each batch to return, if several hosts share it. If None, all.

    Raises:
        InputError: The seed or a row is out of range.
    """
    import grain  # takes a second, which reading rows does not need

    rows = checked_order(seed, rows, batch, "examples")

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        batches = [_cut(rng.permutation(bucket), batch) for bucket in split.buckets]
        return rng.permutation(np.concatenate(batches))

    per_epoch = steps_per_epoch(split, batch)

    def at(number: int) -> Batch:
        numbers = order(number // per_epoch)[number % per_epoch]
        return split.batch(numbers if rows is None else numbers[rows])

    # As in `data.windows`: one thread prepares a few batches while the device computes.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(2**40).map(at).to_iter_dataset(options))


def steps_per_epoch(split: Split, batch: int) -> int:
    """Returns the number of batches of an epoch."""
    return sum(max(1, len(bucket) // batch) for bucket in split.buckets)


def _cut(numbers: np.ndarray, batch: int) -> np.ndarray:
    full = max(1, len(numbers) // batch) * batch
    return np.resize(numbers, full).reshape(-1, batch)


def chosen(split: Split, count: int) -> np.ndarray:
    """Returns the numbers of evenly spaced examples, the same in every call.

    Raises:
        InputError: If there are fewer.
    """
    if not 0 < count <= len(split):
        raise InputError(
            f"data.eval_windows or calibration.windows = {count} must be 1 to the {len(split)} "
            "examples that there are"
        )
    return evenly_spaced(count, len(split) - 1)


def fixed_batches(split: Split, numbers: np.ndarray, batch: int) -> list[Batch]:
    """Returns the given examples in batches of one size, each of equally many crops.

    The last batch of a bucket is filled with an example whose tokens have weight 0.

    Args:
        split: Examples.
        numbers: Numbers of the examples.
        batch: Number of examples B of a batch.
    """
    return [_filled(split, part, batch) for part in by_bucket(split, numbers, batch)]


def by_bucket(split: Split, numbers: np.ndarray, batch: int) -> list[np.ndarray]:
    """Returns the numbers in groups of up to `batch` examples with equally many crops."""
    crops = split.grids[numbers].prod(axis=1)
    groups = [numbers[crops == count] for count in np.unique(crops)]
    return [own[at : at + batch] for own in groups for at in range(0, len(own), batch)]


def filled(numbers: np.ndarray, batch: int) -> np.ndarray:
    """Returns numbers of examples, the first of them repeated until there are `batch`."""
    return np.concatenate([numbers, np.repeat(numbers[:1], batch - len(numbers))])


def _filled(split: Split, numbers: np.ndarray, batch: int) -> Batch:
    found = split.batch(filled(numbers, batch))
    found["weights"][len(numbers) :] = 0
    return found
