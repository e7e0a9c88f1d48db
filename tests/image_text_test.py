"""Pictures, rows with prices, and batches of them."""

import dataclasses
import importlib.metadata
import io
import itertools
import os
import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from swe_prune.config import DataConfig, ModelConfig, VisionConfig
from swe_prune.data import image_text, images, price_rows
from swe_prune.data.digit_prices import tags
from swe_prune.errors import InputError

VISION = VisionConfig(layers=2, heads=1, width=4, hidden=4, image=8, patch=2, crops=4)
MODEL = ModelConfig(context=256, vision=VISION)
RED = (200, 30, 60)


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def picture(width=16, height=8, color=RED):
    return Image.new("RGB", (width, height), color)


# Images of every kind come out in RGB, upright, on white.


def test_grey_palette_and_cmyk_images():
    grey = images.open_image(encoded(Image.new("L", (3, 2), 77)), "it")
    assert (np.asarray(grey) == 77).all()
    assert grey.mode == "RGB"
    palette = images.open_image(encoded(picture().convert("P", palette=1)), "it")
    np.testing.assert_allclose(np.asarray(palette)[0, 0], RED, atol=30)
    cmyk = images.open_image(encoded(picture().convert("CMYK"), "JPEG", quality=100), "it")
    np.testing.assert_allclose(np.asarray(cmyk)[0, 0], RED, atol=4)
    deep = Image.fromarray(np.full((2, 3), 77 * 257, np.uint16))
    assert (np.asarray(images.open_image(encoded(deep), "it")) == 77).all()
    bits = images.open_image(encoded(Image.new("1", (3, 2), 1)), "it")
    assert (np.asarray(bits) == 255).all()


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    clear.putpixel((0, 0), (*RED, 255))
    for made in (clear, clear.quantize(4)):
        found = np.asarray(images.open_image(encoded(made), "it"))
        np.testing.assert_allclose(found[0, 0], RED, atol=8)
        assert (found[1, 1] == 255).all()
    keyed = encoded(Image.new("P", (2, 2), 0), transparency=0)
    assert (np.asarray(images.open_image(keyed, "it")) == 255).all()


def test_a_rotated_photograph_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right by a camera
    found = images.open_image(encoded(picture(16, 8), "JPEG", exif=exif), "it")
    assert found.size == (8, 16)


def bomb():
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "row 7 cannot be read as an image"),
        (b"no image", "row 7 cannot be read as an image"),
        (encoded(picture(50, 50))[:60], "row 7 cannot be read as an image"),
        (encoded(picture(300, 300), "JPEG")[:300], "row 7 cannot be read as an image"),
        (bomb(), "row 7 has more than the 67,108,864 pixels"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "row 7 has floating-point pixels"),
        ("nowhere.png", "row 7 does not exist"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG", "bomb", "float", "missing"],
)
def test_a_bad_image_is_one_sentence_that_names_it(content, sentence):
    with pytest.raises(InputError, match=sentence):
        images.open_image(content, "row 7")


def test_an_image_too_thin_for_a_row_of_pixels():
    with pytest.raises(InputError, match="row 7 is of 1000 x 1 pixels, too thin"):
        images.check_size(1000, 1, VISION, "row 7")


def test_padding_is_white_above_and_below_or_left_and_right():
    wide = images.tiled(picture(10, 4), VISION)  # 16 x 6 pixels of it
    assert wide.shape == (8, 16, 3)
    assert (wide[[0, -1]] == 255).all()
    assert (wide[1:-1] == RED).all()
    np.testing.assert_array_equal(images.tiled(picture(4, 10), VISION), wide.swapaxes(0, 1))


# Rows of the public set, and bad ones.


def table(path, *, count=6, **changes):
    """A parquet file in the schema of the product-price set."""
    columns = {
        "title": [f"Bag {number}" for number in range(count)],
        "category3_code": ["BAGS"] * count,
        "full_price": [100.0 * number + 90 for number in range(count)],
        "image": [
            {"bytes": encoded(picture(16 if number % 2 else 8, 8)), "path": None}
            for number in range(count)
        ],
    } | changes
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return DataConfig(dataset=str(path), validation_fraction=1 / 3)


def test_rows_of_a_parquet_file(tmp_path):
    data = image_text.load(table(tmp_path / "prices.parquet"), MODEL)
    assert len(data.train) == 4
    assert len(data.validation) == 2
    row = data.validation.rows[0]
    assert row.prompt.endswith("What is shown in this image?<|end|><|assistant|>")
    assert row.answer == "\nProduct: Bag 4, Category: BAGS, Full Price: 490.0<|end|>"
    assert row.price == 490
    assert len(data.train.buckets) == 2  # wide pictures have other crops than square ones


def test_rows_of_a_folder_of_datasets(tmp_path):
    config = table(tmp_path / "prices.parquet")
    read = pyarrow.parquet.read_table(tmp_path / "prices.parquet")
    (tmp_path / "saved").mkdir()
    with pyarrow.ipc.new_stream(tmp_path / "saved" / "data-0.arrow", read.schema) as file:
        file.write_table(read)
    one = image_text.load(config, MODEL)
    two = image_text.load(dataclasses.replace(config, dataset=str(tmp_path / "saved")), MODEL)
    for first, second in zip(one.train.tokens, two.train.tokens, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": [{"bytes": b"x", "path": None}] * 6}, "row 0 of .* cannot be read as an image"),
        ({"image": [{"bytes": None, "path": "/etc/a.png"}] * 6}, "row 0 of .* no encoded image"),
        ({"full_price": [None] * 6}, "row 0 of .* no price at the end"),
        ({"full_price": [float("inf")] * 6}, "row 0 of .* no price at the end"),
        ({"title": ["x" * 400] * 6}, "row 0 of .* tokens, (?s:.*)config.model.context is 256"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        image_text.load(table(tmp_path / "prices.parquet", **changes), MODEL)


def test_bad_rows_are_left_out_and_counted_if_the_config_says_so(tmp_path):
    prices = [90.0, None, 290.0, 390.0, 490.0, None]
    config = table(tmp_path / "prices.parquet", full_price=prices)
    data = image_text.load(dataclasses.replace(config, skip_bad_rows=True), MODEL)
    assert (len(data.train), len(data.validation), len(data.skipped)) == (3, 1, 2)


@pytest.mark.parametrize("where", ["", "0.png", "nowhere"])
def test_images_alone_are_no_dataset_of_prices(tmp_path, where):
    picture().save(tmp_path / "0.png")
    config = DataConfig(dataset=str(tmp_path / where))
    with pytest.raises(InputError, match=r"neither a parquet file .* \(columns title, .* image\)"):
        image_text.load(config, MODEL)


def test_an_image_is_read_from_a_regular_file_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="it is not a regular file; give the path"):
            images.open_image(path, "it")


def test_a_dataset_without_the_columns(tmp_path):
    path = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "text": ["b"]}), path)
    with pytest.raises(InputError, match="lacks the columns category3_code, full_price, image"):
        image_text.load(DataConfig(dataset=str(path)), MODEL)
    path.write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be read"):
        image_text.load(DataConfig(dataset=str(path)), MODEL)


@pytest.mark.parametrize("prompt", ["no picture", "<|image_1|> and <|image_1|>"])
def test_a_prompt_has_one_placeholder(tmp_path, monkeypatch, prompt):
    monkeypatch.setattr(price_rows, "PROMPT", prompt)
    with pytest.raises(InputError, match=r"row 0 of .* has the placeholder"):
        image_text.load(table(tmp_path / "prices.parquet"), MODEL)


# Batches.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_text.load(table(tmp_path_factory.mktemp("rows") / "it.parquet", count=18), MODEL)


def test_the_loss_is_on_the_answer_only(data):
    split = data.train
    batch = split.batch(split.buckets[0][:2])
    tokens_BxL, pixels = batch["inputs"]["tokens"], batch["inputs"]["pixels"]
    grid = batch["inputs"]["grid"][0]
    assert pixels.shape == (2, 1 + grid.prod(), 8, 8, 3)
    assert pixels.dtype == np.float32
    for row, number in enumerate(split.buckets[0][:2]):
        counted = batch["weights"][row] > 0
        answer = data.tokenizer.decode(batch["targets"][row][counted])
        assert answer == split.rows[number].answer
        assert (tokens_BxL[row] == -1).sum() == VISION.tokens(*grid)
        # Targets are the inputs one token later.
        inside = tokens_BxL[row][1:][counted[:-1]]
        np.testing.assert_array_equal(inside[:-1], batch["targets"][row][counted][:-1])
    assert (batch["targets"] >= 0).all()


def test_a_batch_has_pictures_of_one_number_of_crops_and_an_epoch_every_example(data):
    split = data.train
    steps = image_text.steps_per_epoch(split, 2)
    iterator = image_text.train_iterator(split, batch=2, seed=3)
    seen = []
    for batch in itertools.islice(iterator, steps):
        assert len({int(grid.prod()) for grid in batch["inputs"]["grid"]}) == 1
        seen += [
            data.tokenizer.decode(row[weights > 0])
            for row, weights in zip(batch["targets"], batch["weights"], strict=True)
        ]
    assert sorted(seen) == sorted(row.answer for row in split.rows)


def test_a_saved_position_continues_with_the_same_batches(data):
    first = image_text.train_iterator(data.train, batch=2, seed=3)
    for _ in range(7):
        next(first)
    state = first.get_state()
    other = image_text.train_iterator(data.train, batch=2, seed=3)
    other.set_state(state)
    own = image_text.train_iterator(data.train, batch=2, seed=3, rows=np.array([1]))
    for rows in ([2], [-1], [0, 5]):
        with pytest.raises(InputError, match="indices of the 2 examples of a batch, 0 to 1, got"):
            image_text.train_iterator(data.train, batch=2, seed=3, rows=np.array(rows))
    own.set_state(state)
    for _ in range(3):
        one, two, part = next(first), next(other), next(own)
        np.testing.assert_array_equal(one["targets"], two["targets"])
        np.testing.assert_array_equal(one["inputs"]["pixels"], two["inputs"]["pixels"])
        np.testing.assert_array_equal(one["targets"][1:], part["targets"])


def test_fixed_batches_have_every_example_once(data):
    split = data.train
    batches = image_text.fixed_batches(split, image_text.chosen(split, len(split)), 4)
    counted = sum(float(batch["weights"].sum()) for batch in batches)
    answers = sum(len(t) - s for t, s in zip(split.tokens, split.starts, strict=True))
    assert counted == answers
    assert {len(batch["targets"]) for batch in batches} == {4}
    with pytest.raises(InputError, match="1 to the 12"):
        image_text.chosen(split, 13)


# Price tags.

try:
    importlib.metadata.files("scikit-learn")
    HAS_SCANS = True
except importlib.metadata.PackageNotFoundError:
    HAS_SCANS = False
with_scans = pytest.mark.skipif(not HAS_SCANS, reason="scikit-learn's scans are not installed")


@with_scans
def test_no_scan_is_in_two_splits_and_every_split_has_every_digit():
    _, digits = tags.scans()
    parts = tags.split_scans(digits)
    every = np.concatenate(list(parts.values()))
    assert len(every) == len(set(every.tolist())) == tags.SCANS
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1258, "validation": 270, "test": 269
    }  # fmt: skip
    assert all(set(digits[part]) == set(range(10)) for part in parts.values())


@with_scans
def test_tags_are_the_same_in_every_run():
    one, two = (list(itertools.islice(tags.tags("train"), 20)) for _ in range(2))
    for (pixels, goods, price), (again, *_) in zip(one, two, strict=True):
        np.testing.assert_array_equal(pixels, again)
        assert pixels.shape == (tags.HEIGHT, tags.WIDTH)
        assert pixels.dtype == np.uint8
        low, high = tags.GOODS[goods]
        assert low <= price <= high


@with_scans
@pytest.mark.filterwarnings("ignore")  # of TFDS
def test_the_dataset_of_tags(tmp_path, monkeypatch):
    for split in tags.SPLITS:
        monkeypatch.setitem(tags.SPLITS, split, (tags.SPLITS[split][0], 6))
    config = DataConfig(dataset="digit_prices", data_dir=str(tmp_path))
    vision = dataclasses.replace(VISION, crops=3)
    data = image_text.load(config, dataclasses.replace(MODEL, vision=vision))
    assert len(data.train) == 6
    assert len(data.train.buckets) == 1
    assert tuple(data.train.grids[0]) == (1, 3)
    row = data.train.rows[0]
    assert row.answer == f" {row.price:.0f}\n"
    assert data.train.batch([0, 1])["inputs"]["pixels"].shape == (2, 4, 8, 8, 3)
