"""Fuzzing of files: of any damage of any format, a sentence or what was there before.

A part of `fuzz_test`, with as many examples; a fault is kept by hypothesis and shrunk.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil

import damaged_files_test as damaged
import interop_tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_test import VALUES, flipped, fuzz, sentence
from hostile_files_test import bounded
from hypothesis import given
from hypothesis import strategies as st

from swe_prune import data as data_lib
from swe_prune import interop, ledger, trajectory
from swe_prune.checkpoint import Checkpoints
from swe_prune.config import DataConfig
from swe_prune.data import image_text, images
from swe_prune.data.digit_prices import tags
from swe_prune.pretrained import cut, tracked
from swe_prune.report import read as report_read

pytest.importorskip("safetensors")
SECONDS = 5.0
"""Of the processor, for one damaged file; datasets are read by packages that begin slowly."""


@dataclasses.dataclass(frozen=True)
class Format:
    """Files of one format.

    Attributes:
        folder: Folder with the files.
        read: Function that returns what is in them.
        names: Patterns of the files to damage.
        checked: Whether the format finds every change of its bytes.
    """

    folder: object
    read: object
    names: tuple = ("**/*",)
    checked: bool = False

    @functools.cached_property
    def files(self):
        found = {path for name in self.names for path in self.folder.glob(name)}
        return sorted(path for path in found if path.is_file())

    @functools.cached_property
    def whole(self):
        return self.read()


def model_folder(folder):
    """A folder of shards with its index, tokenizer, masks and record."""
    path = damaged.masked(folder)
    made = interop.load(path, tokenizer=False)
    shutil.rmtree(path)
    interop.export(path, made, shard_bytes=20_000)
    vocab = {"<|end|>": 0, "a": 1, "b": 2}
    tokens = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}
    for name, content in {
        "tokenizer.json": tokens, "tokenizer_config.json": {"eos_token": "<|end|>"},
        "special_tokens_map.json": {"eos_token": {"content": "<|end|>"}},
        "generation_config.json": {"eos_token_id": 0},
    }.items():  # fmt: skip
        (path / name).write_text(json.dumps(content))

    def read():
        found = interop.load(path)
        text = found.tokenizer.encode("ab")
        return damaged.digest(found.params), found.tokenizer.decode(text)

    return Format(path, read)


def pruned_folder(folder):
    path, read, _ = damaged.mask_file(folder)
    both = lambda: (read(), repr(damaged.record_of(path.parent)))  # noqa: E731
    return Format(path.parent, both, ("masks.safetensors", "pruning.json"))


def compressed(folder):
    path, read, _ = damaged.compressed(folder)
    return Format(path.parent, read, ("compressed.safetensors",), checked=True)


def saved(folder):
    path, read, _ = damaged.saved(folder)
    return Format(path.parent, read, checked=True)


def gguf(folder):
    writer = pytest.importorskip("interop_gguf_writer")
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    path = folder / "model.gguf"
    writer.finish(writer.write(path, interop_tiny.model("llama"), **tokens))
    return Format(folder, lambda: damaged.digest(interop.load(path, tokenizer=False).params))


def vision(folder):
    test = pytest.importorskip("phi3v_test")
    path = shutil.copytree(test.FOLDER, folder / "model")
    (path / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4, "other": [1]}))

    def read():
        source = interop.open_pretrained(path, tokenizer=False)
        return source.config, source.vocab_size

    return Format(path, read, ("*.json", "*.safetensors"))


def parquet(folder):
    path, read = damaged.prices(folder, "parquet")
    return Format(path.parent, read, ("*.parquet",))


def arrow(folder):
    path, read = damaged.prices(folder, "arrow")
    return Format(path.parent, read)


def pictures(folder):
    test = pytest.importorskip("image_text_test")
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        (folder / kind.lower()).write_bytes(test.encoded(test.picture(), kind))

    def read():
        found = [images.open_image(path, str(path)) for path in sorted(folder.iterdir())]
        for one in found:
            images.check_size(*one.size, test.VISION, "an image")
        return [(one.size, images.crops_of(one, test.VISION).shape) for one in found]

    return Format(folder, read)


def digits(folder):
    test = pytest.importorskip("image_text_test")
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("sklearn")
    config = DataConfig(dataset="digit_prices", data_dir=str(folder))
    vision = dataclasses.replace(test.VISION, crops=3)
    model = dataclasses.replace(test.MODEL, vision=vision)

    def read():
        with pytest.MonkeyPatch.context() as patch:  # it may be prepared again
            for split, (share, _) in tags.SPLITS.items():
                patch.setitem(tags.SPLITS, split, (share, 4))
            data = image_text.load(config, model)
        splits = (data.train, data.validation)
        batch = data.train.batch([0, 1])["inputs"]["pixels"]
        return [part.tobytes() for split in splits for part in split.tokens], batch.shape

    read()
    return Format(folder, read)


def texts(folder):
    test = pytest.importorskip("data_sources_test")
    pytest.importorskip("tensorflow_datasets")
    made = test.notes_dir.__wrapped__(_Here(folder))
    config = test.config("tiny_notes/plain", data_dir=str(made), text_key="body")
    return Format(folder, lambda: test.texts(data_lib.load(config, test.CONTEXT)))


@dataclasses.dataclass(frozen=True)
class _Here:
    """In place of pytest's factory of folders."""

    folder: object

    def mktemp(self, name):
        (self.folder / name).mkdir()
        return self.folder / name


def checkpoints(folder):
    values = {"w": jnp.arange(6.0), "key": jax.random.key(3), "half": jnp.ones(3, jnp.bfloat16)}
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as store:
        store.save(1, values, {"position": 3})

    def read():
        with contextlib.closing(Checkpoints(folder / "checkpoints", reading=True)) as store:
            found, extra = store.restore(jax.eval_shape(lambda: values))
        key = jax.random.key_data(found.pop("key"))
        return damaged.digest(found), np.asarray(key).tolist(), extra

    return Format(folder, read, checked=True)


def beside(folder):
    """What lies next to a model: the trajectory of its fine-tuning, and its kept units."""
    params = interop_tiny.model("llama").params
    stats = trajectory.update(trajectory.init(params), params)
    tracked.write(folder, stats, {"rules": {}, "every": 5})
    (folder / cut.KEPT).write_text('{"kept": {"layers": [0, 2]}}')

    def read():
        found = tracked.read(folder, params)
        return None if found is None else damaged.digest(found), cut.kept_layers(folder)

    return Format(folder, read)


def workdir(folder):
    work = damaged.report_synthetic.make(
        folder / "work", seeds=(0,), std_seeds=(), criteria=("swe",), std_criteria=()
    )
    with ledger.Ledger(work / "ledger", meters=[]).measure("train", cell="seed_0", tokens=9):
        pass
    for path in work.rglob("*.json"):  # as a run writes them
        if path.parent.name != "ledger":
            content = json.loads(path.read_text())
            report_read.storage.write(path, damaged.sealed(content))
    return Format(work, lambda: repr(report_read.load(work)))


FORMATS = {
    make.__name__: make
    for make in (
        model_folder, pruned_folder, compressed, saved, gguf, vision, parquet, arrow, pictures,
        digits, texts, checkpoints, beside, workdir,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """Function from a name to the format, made once."""

    @functools.cache
    def get(name):
        made = FORMATS[name](tmp_path_factory.mktemp(name))
        assert made.files
        assert made.whole == made.read()
        return made

    return get


PLACES = ("fifo", "folder", "device", "circle", "sparse", "missing", "empty", "link")


def edited(raw, data):
    """JSON with another value, or none, at one place of it."""
    value = json.loads(raw)
    places = list(damaged._places(value)) or [()]
    place = data.draw(st.sampled_from(places))
    if not place:
        return json.dumps(data.draw(VALUES)).encode()
    inner = functools.reduce(lambda one, name: one[name], place[:-1], value)
    if data.draw(st.booleans()):
        inner[place[-1]] = data.draw(VALUES)
    else:
        del inner[place[-1]]
    return json.dumps(value).encode()


def change(path, data):
    """Damages a file; returns the kind of the damage."""
    raw = path.read_bytes()
    kinds = ["flips", "head", "cut", "zeros", "swap", "place"]
    if path.suffix == ".json" or raw[:1] == b"{":
        kinds += ["edit", "edit", "edit"]
    kind = data.draw(st.sampled_from(kinds))
    at = data.draw(st.integers(0, len(raw)))
    size = data.draw(st.integers(1, 64))
    if kind == "place":
        return _place(path, data)
    with contextlib.suppress(ValueError):  # lines of JSON are not JSON
        if kind == "edit":
            path.write_bytes(edited(raw, data))
            return kind
    path.write_bytes({
        "flips": lambda: flipped(raw, data),
        "head": lambda: flipped(raw[:2000], data) + raw[2000:],
        "cut": lambda: raw[:at],
        "zeros": lambda: raw[:at] + bytes(min(size, len(raw) - at)) + raw[at + size :],
        "swap": lambda: raw[at:] + raw[:at],
        "edit": lambda: flipped(raw, data),
    }[kind]())  # fmt: skip
    return kind


def _place(path, data):
    kind = data.draw(st.sampled_from(PLACES))
    places = dict(damaged.damages_of_place(path))
    if kind in places:
        places[kind]()
    else:
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "link":
            path.symlink_to("/etc/hostname")
    return kind


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", FORMATS)
@fuzz
@given(data=st.data())
def test_a_damaged_file(formats, name, data):
    one = formats(name)
    path = data.draw(st.sampled_from(one.files))
    before = {file: os.stat(file).st_mode for file in one.files}
    with damaged.damaged(path, lambda: change(path, data)):
        kind = None
        with bounded(SECONDS), sentence():
            kind = one.read()
        if one.checked and kind is not None:
            assert kind == one.whole
    assert before == {file: os.stat(file).st_mode for file in one.files}
