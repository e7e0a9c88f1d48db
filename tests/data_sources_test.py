"""Texts from a file and from TFDS datasets that were prepared in array_record."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from swe_prune import data
from swe_prune.config import DataConfig
from swe_prune.errors import InputError

CONTEXT = 8
NOTES = {
    "train": [f"Note {i}: naïve {'x' * i}" for i in range(20)],
    "validation": ["A held-out note of 30 letters.", "Ω"],
    "latin": [*["A note in UTF-8."] * 130, "A note in Latin-1: caf\xe9".encode("latin-1")],
}


def config(dataset, **settings):
    settings = {"eval_windows": 4, "eval_batch": 4} | settings
    return DataConfig(dataset=str(dataset), **settings)


def texts(loaded):
    return (
        loaded.tokenizer.decode(loaded.train),
        loaded.tokenizer.decode(loaded.validation),
    )


@pytest.fixture(scope="module")
def notes_dir(tmp_path_factory):
    """A folder with the TFDS dataset `tiny_notes/plain`, known to TFDS by its files alone."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class TinyNotes(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.2.3")
            RELEASE_NOTES = {"1.2.3": "."}  # noqa: RUF012 (the name is TFDS's)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain", description=".")]  # noqa: RUF012

            def _info(self):
                body, label = tfds.features.Text(), tfds.features.Scalar(dtype=np.int32)
                features = tfds.features.FeaturesDict({"body": body, "label": label})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in NOTES}

            def _generate_examples(self, split):
                for i, body in enumerate(NOTES[split]):
                    yield i, {"body": body, "label": i}

    folder = tmp_path_factory.mktemp("tfds")
    TinyNotes(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def notes(notes_dir):
    def settings(**changes):
        changes = {"data_dir": str(notes_dir), "text_key": "body"} | changes
        return config("tiny_notes/plain", **changes)

    return settings


@pytest.mark.parametrize("version", ["", ":1.2.3"])
def test_a_prepared_dataset_is_read_by_its_name(notes_dir, version):
    named = config(f"tiny_notes/plain{version}", data_dir=str(notes_dir), text_key="body")
    train, validation = texts(data.load(named, CONTEXT))
    assert train == "\n\n".join(NOTES["train"])
    assert validation == "\n\n".join(NOTES["validation"])
    assert "tensorflow" not in sys.modules


def test_a_symbol_that_only_validation_has_is_in_the_vocabulary(notes):
    loaded = data.load(notes(), CONTEXT)
    train, _ = texts(loaded)
    assert "Ω" not in train
    assert "Ω" in loaded.tokenizer.symbols


def test_split_expressions_cut_examples(notes):
    settings = notes(train_split="train[:75%]", validation_split="train[75%:]")
    train, validation = texts(data.load(settings, CONTEXT))
    assert [len(text.split("\n\n")) for text in (train, validation)] == [15, 5]
    assert not {*train.split("\n\n")} & {*validation.split("\n\n")}


@pytest.mark.parametrize("limit", [20, 21, 100])
def test_limits_keep_the_first_characters(notes, limit):
    train, validation = texts(data.load(notes(), CONTEXT))
    limited = texts(data.load(notes(train_chars=limit, validation_chars=15), CONTEXT))
    assert limited == (train[:limit], validation[:15])


def test_limits_may_be_all_there_is_and_no_more(notes):
    full = texts(data.load(notes(), CONTEXT))
    exact = {"train_chars": len(full[0]), "validation_chars": len(full[1])}
    assert texts(data.load(notes(**exact), CONTEXT)) == full
    for key in exact:
        with pytest.raises(InputError, match=f"data.{key} = .* more than .* lower it"):
            data.load(notes(**exact | {key: exact[key] + 1}), CONTEXT)
        with pytest.raises(InputError, match=f"data.{key} must be 1 or more, .*got 0"):
            data.load(notes(**{key: 0}), CONTEXT)


@pytest.mark.parametrize("limit", [50, 1200])  # within the first 64 examples, and beyond
def test_reading_stops_where_the_limit_is_reached_and_not_before(notes, limit):
    settings = notes(train_split="latin", train_chars=limit)
    expected = "\n\n".join(NOTES["latin"][:128])[:limit]
    assert texts(data.load(settings, CONTEXT))[0] == expected
    with pytest.raises(InputError, match=r"'body' of an example in split 'latin' .* is not UTF-8"):
        data.load(notes(train_split="latin"), CONTEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_key": "text"},
            r"no text under data.text_key = 'text'; its text keys are: body$",
        ),
        ({"text_key": "label"}, r"no text under data.text_key = 'label'"),
        ({"train_split": "trian"}, r"data.train_split = 'trian'; its splits are: latin, train, v"),
        ({"validation_split": "test"}, r"no examples in data.validation_split = 'test'"),
        ({"validation_split": "train["}, r"no examples in data.validation_split = 'train\['"),
        (
            {"validation_split": "train[:0]"},
            r"no examples in data.validation_split = 'train\[:0\]'",
        ),
        ({"eval_windows": 400}, r"data.eval_windows = 400 is more than the \d+ windows"),
    ],
)
def test_settings_that_do_not_fit_a_dataset_are_refused(notes, changes, message):
    with pytest.raises(InputError, match=message):
        data.load(notes(**changes), CONTEXT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_notez/plain", "neither an existing text file nor a dataset that TFDS knows"),
        ("tiny_shakespear", "did you mean 'tiny_shakespeare'"),
        ("tiny_shakespeare", "not prepared in .*; run: tfds build tiny_shakespeare --file_format="),
        ("wiki40b/en", "prepare it: tfds build wiki40b/en --file_format=array_record --data_dir="),
        (
            "missing.txt",
            "not an existing text file, and TFDS cannot .*; correct data.dataset",
        ),
        ("two words", "not an existing text file, and TFDS cannot open it"),
        ("shakespeare_plays:9.9.9", "TFDS cannot open it .*; correct data.dataset"),
        ("shakespeare_play", "did you mean 'shakespeare_plays'"),
    ],
)
def test_unknown_and_unprepared_datasets_are_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message) as caught:
        data.load(config(name, data_dir=str(tmp_path)), CONTEXT)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_dataset_in_another_format_is_refused(notes_dir, tmp_path):
    shutil.copytree(notes_dir / "tiny_notes", tmp_path / "tiny_notes")
    path = tmp_path / "tiny_notes/plain/1.2.3/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        InputError, match=r"prepared as tfrecord .* run: tfds build tiny_notes/plain"
    ):
        data.load(config("tiny_notes/plain", data_dir=str(tmp_path), text_key="body"), CONTEXT)


def test_the_end_of_a_text_file_is_for_validation(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(1000)) + "é\n"
    path = tmp_path / "some.text"
    path.write_text(text, encoding="utf-8")
    train, validation = texts(data.load(config(path, validation_fraction=0.2), CONTEXT))
    assert train + validation == text
    assert len(validation) == 200
    limited = config(path, validation_fraction=0.2, train_chars=50, validation_chars=20)
    assert texts(data.load(limited, CONTEXT)) == (train[:50], validation[:20])


def test_a_relative_path_is_a_file_and_marks_of_other_systems_go(tmp_path, monkeypatch):
    (tmp_path / "notes").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\r" * 20)
    monkeypatch.chdir(tmp_path)
    for name in ("notes", "./notes"):
        assert "".join(texts(data.load(config(name, validation_fraction=0.3), CONTEXT))) == (
            "one\ntwo\n" * 20
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\); correct data.dataset"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"text\0text" * 100, "is binary .*NUL at character 4"),
        (b"caf\xe9 " * 100, r"is not UTF-8 \(byte 3\)"),
        (b"123456789", "training text of .* has 8 characters and a window of model.context = 8"),
        (b"1234567890" * 8, "validation text of .* has 8 characters .* needs 9; lower it"),
        (b"1234567890" * 10, "data.eval_windows = 4 is more than the 2 windows of 8 characters"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        data.load(config(path), CONTEXT)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read .*directory.*; correct data.dataset"):
        data.load(config(tmp_path), CONTEXT)
    with pytest.raises(InputError, match=r"; correct the path of a text file"):
        data.read_named(str(tmp_path))  # of an option, not of a config


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("dataset_info.json", lambda raw: raw[: len(raw) // 2]),
        ("dataset_info.json", lambda raw: b"\xff" * len(raw)),
        ("dataset_info.json", lambda raw: b"[]"),
        ("dataset_info.json", None),
        ("dataset_info.json", os.mkfifo),
        ("shakespeare_plays-train.array_record-00000-of-00001", None),
        ("shakespeare_plays-train.array_record-00000-of-00001", lambda raw: raw[: len(raw) // 2]),
        ("shakespeare_plays-train.array_record-00000-of-00001",
         lambda raw: raw[:200_000] + bytes([raw[200_000] ^ 1]) + raw[200_001:]),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_damaged_prepared_dataset_names_its_folder_and_the_way_out(
    plays_dir, tmp_path, name, damage
):
    folder = shutil.copytree(plays_dir, tmp_path / "tfds") / "shakespeare_plays/1.0.0"
    raw = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage is os.mkfifo:
        os.mkfifo(folder / name)
    elif damage is not None:
        (folder / name).write_bytes(damage(raw))
    config = DataConfig(data_dir=str(tmp_path / "tfds"))
    with pytest.raises(InputError, match="run the same command, which prepares it again") as caught:
        data.load(config, 8)
    assert str(tmp_path / "tfds/shakespeare_plays") in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)  # as it says
    data.load(config, 8)
