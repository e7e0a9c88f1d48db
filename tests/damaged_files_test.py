"""Damaged files of our own formats and of datasets: refused in one sentence that names the file.

A damage that changes nothing, or that the format repairs, gives the right result.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import warnings

import interop_tiny
import jax.numpy as jnp
import numpy as np
import pytest
import report_synthetic
from etils import epath
from hostile_files_test import DEEP, bounded

import swe_prune
from swe_prune import importance, interop, ledger, masks, recipe, trajectory, tree
from swe_prune.data import image_text
from swe_prune.errors import InputError
from swe_prune.pretrained import cut, tracked
from swe_prune.pretrained.opening import record_of
from swe_prune.report import read as report_read
from swe_prune.training.metrics import JsonLines, MetricsLogger, read_lines
from swe_prune.training.phase import Phase

HEADS = (b"", b"hello\n", b"<!doctype html>", b"\0" * 40, b"\xff\xfe{", b"null", b"[]", b"3", b"{}")
WRONG = (None, True, -1, 0.5, 10**400, "x", "", "\ud800", [], {}, [None], math.nan, math.inf)


def digest(values):
    """What tells two pytrees of arrays apart."""
    return [
        (name, None if leaf is None else (str(leaf.dtype), np.asarray(leaf).tobytes()))
        for name, leaf in tree.named_leaves(values)
    ]


def damages_of_bytes(raw, rng):
    """(name, content) of a file that was cut, zeroed, flipped, swapped or grown."""
    for head in HEADS:
        yield f"{head!r}", head
    for part in (0.02, 0.5, 0.98):
        yield f"cut at {part}", raw[: int(len(raw) * part)]
    yield "zeros", bytes(len(raw))
    for at in range(0, len(raw), max(1, len(raw) // 6)):
        yield f"zeros at {at}", raw[:at] + bytes(min(16, len(raw) - at)) + raw[at + 16 :]
        changed = bytearray(raw)
        changed[at] ^= 1 << rng.randrange(8)
        if b"checksum" not in raw[max(0, at - 12) : at + 12]:  # whose own name has none
            yield f"flip at {at}", bytes(changed)
    yield "behind", raw + b"\xff" * 32


def damages_of_place(path):
    """(name, function) of what may be in the place of a file."""

    def instead(make):
        path.unlink()
        make()

    def grow():
        with open(path, "r+b") as file:
            file.truncate(1 << 33)

    yield "fifo", lambda: instead(lambda: os.mkfifo(path))
    yield "folder", lambda: instead(path.mkdir)
    yield "device", lambda: instead(lambda: path.symlink_to("/dev/zero"))
    yield "circle", lambda: instead(lambda: path.symlink_to(path.name))
    yield "sparse", grow


def damages_of_json(raw, rng, most):
    """(name, content) of JSON with values of other types, keys that are there twice, and depth."""
    value = json.loads(raw)
    yield "deep", DEEP.encode()
    key = next(iter(value))
    yield "twice", b"{" + json.dumps(key).encode() + b": 7, " + raw.strip()[1:]
    places = list(_places(value))
    for place in rng.sample(places, min(len(places), most)):
        wrong = rng.choice(WRONG)
        changed = json.loads(raw)
        inner = functools.reduce(lambda one, name: one[name], place[:-1], changed)
        inner[place[-1]] = wrong
        yield f"{place} = {str(wrong)[:9]}", json.dumps(changed).encode()


def _places(value, path=()):
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from _places(inner, (*path, key))


@contextlib.contextmanager
def damaged(path, change):
    """Changes a file, and puts it back."""
    raw = path.read_bytes()
    change()
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(raw)


def outcomes(path, read, *, folder=None, most=12, json_too=False):
    """Counts of sentences, right results, and names of the damages that were taken silently."""
    rng, raw, whole = random.Random(0), path.read_bytes(), read()
    contents = list(damages_of_bytes(raw, rng))
    contents += damages_of_json(raw, rng, most) if json_too else ()
    cases = [
        (name, lambda content=content: path.write_bytes(content)) for name, content in contents
    ]
    silent, said, right = [], 0, 0
    for name, change in [*cases, *damages_of_place(path)]:
        with damaged(path, change), bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = read()
            except InputError as error:
                said += 1
                text = str(error)
                assert "\n" not in text, name
                assert len(text) < 1000, name
                assert str(folder or path) in text, (name, text)
            else:
                right += found == whole
                silent += [] if found == whole else [name]
    assert said > len(cases) // 2
    return silent


def compressed(folder):
    made = interop_tiny.model("llama")
    params = tree.map_named(
        lambda _, leaf: jnp.where(jnp.arange(leaf.size).reshape(leaf.shape) % 2, leaf, 0),
        made.params,
    )
    path = interop.export(folder / "model", made, params, compress=True)
    return path / "compressed.safetensors", lambda: digest(interop.load(path).params), path


def masked(folder):
    made = interop_tiny.model("llama")
    mask = masks.by_sparsity(importance.score("magnitude", made.params), 0.5)
    record = interop.PruningRecord(recipe.Recipe(criterion="magnitude", sparsity=0.5))
    return interop.export(folder / "model", made, mask=mask, record=record)


def mask_file(folder):
    path = masked(folder)
    return path / "masks.safetensors", lambda: digest(interop.read_masks(path)), path


def saved(folder):
    params = {"up": {"kernel": jnp.arange(48.0).reshape(8, 6), "bias": jnp.ones(6)}}
    mask = masks.by_sparsity(importance.score("magnitude", params), 0.5)
    stats = trajectory.update(trajectory.init(params, ("late_mean", "variance")), params)
    path = folder / "state.safetensors"
    swe_prune.save(path, masks=mask, stats=stats)

    def read():
        found = swe_prune.load(path)
        return digest(found.masks), digest(found.stats), found.stats.measures

    return path, read, path


@pytest.mark.parametrize("to", [0, 3], ids=["of another tensor", "not aligned"])
def test_tensors_of_a_gguf_file_that_share_bytes_are_refused(tmp_path, to):
    writer = pytest.importorskip("interop_gguf_writer")
    path = tmp_path / "model.gguf"
    writer.finish(writer.write(path, interop_tiny.model("llama")))
    raw = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"  # then number of axes, two of them, kind, and offset
    at = raw.index(name) + len(name) + 4 + 2 * 8 + 4
    before = int.from_bytes(raw[at : at + 8], "little")
    raw[at : at + 8] = (before + to if to else 0).to_bytes(8, "little")
    interop.load(path, tokenizer=False)
    path.write_bytes(raw)
    with bounded(), pytest.raises(InputError, match="truncated or damaged"):
        interop.load(path, tokenizer=False)


@pytest.mark.quick(1)
@pytest.mark.parametrize("make", [compressed, mask_file, saved], ids=lambda make: make.__name__)
def test_no_damage_of_our_own_formats_is_taken_silently(tmp_path, make):
    path, read, folder = make(tmp_path)
    silent = outcomes(path, read, folder=folder)
    # A file of masks that is empty removes nothing, which `finetune` refuses.
    assert not silent


def test_a_record_of_other_values_is_refused(tmp_path):
    path = masked(tmp_path) / "pruning.json"
    silent = outcomes(
        path, lambda: record_of(path.parent), json_too=True, most=30, folder=path.parent
    )
    assert not [name for name in silent if "flip" not in name and "seed" not in name]


# Datasets of pictures


def prices(folder, kind):
    test = pytest.importorskip("image_text_test")
    pyarrow = pytest.importorskip("pyarrow")
    config = test.table(folder / "prices.parquet")
    path = folder / "prices.parquet"
    if kind == "arrow":
        table = pyarrow.parquet.read_table(path)
        (folder / "saved").mkdir()
        path = folder / "saved" / "data-00000-of-00002.arrow"
        for other in (path, path.with_name("data-00001-of-00002.arrow")):
            with pyarrow.ipc.new_stream(other, table.schema) as file:
                file.write_table(table)
        config = dataclasses.replace(config, dataset=str(folder / "saved"))

    def read():
        data = image_text.load(config, test.MODEL)
        splits = (data.train, data.validation)
        return [part.tobytes() for split in splits for part in split.tokens]

    return path, read


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_rows_of_prices(tmp_path, kind):
    path, read = prices(tmp_path, kind)
    folder = path if kind == "parquet" else path.parent
    silent = outcomes(path, read, folder=folder)
    assert {name.split()[0] for name in silent} <= {"flip", "zeros"}  # they have no checksums
    if kind == "arrow":
        path.unlink()
        with pytest.raises(InputError, match="1 of the 2 files of 'data'; get the others"):
            read()


# Vision towers


@pytest.fixture
def vision(tmp_path):
    test = pytest.importorskip("phi3v_test")
    path = shutil.copytree(test.FOLDER, tmp_path / "model")
    (path / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4, "other": [1]}))
    return path


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_damaged_settings_of_a_vision_model(vision, name):
    def read():
        source = interop.open_pretrained(vision, tokenizer=False)
        return source.config, source.vocab_size

    outcomes(vision / name, read, folder=vision, json_too=True, most=20)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("vision_config", "num_hidden_layers", 10**30),
        ("vision_config", "num_hidden_layers", 1000),
        ("vision_config", "hidden_size", 10**400),
        ("vision_config", "hidden_size", 8000),
        ("vision_config", "image_size", 2**30),
        ("vision_config", "image_size", 9),
        ("vision_config", "patch_size", 0),
        ("vision_config", "num_attention_heads", 3),
        ("vision_config", "hidden_act", []),
        ("vision_config", "hidden_act", None),
        ("vision_config", "layer_norm_eps", 0),
        ("vision_config", "layer_norm_eps", "x"),
        ("vision_config", None, [1]),
        ("img_processor", "name", {}),
        ("img_processor", None, False),
        ("embd_layer", None, "x"),
    ],
)
def test_a_tower_of_other_sizes_is_refused_by_name(vision, group, key, value):
    path = vision / "config.json"
    config = json.loads(path.read_text())
    config[group] = value if key is None else config[group] | {key: value}
    path.write_text(json.dumps(config))
    with bounded(), pytest.raises(InputError, match=str(vision)) as caught:
        interop.open_pretrained(vision, tokenizer=False)
    assert "config.model" not in str(caught.value)
    if group == "vision_config" and key is not None:  # of a tower that stands alone
        path.write_text(json.dumps({"model_type": "clip_vision_model", **config[group]}))
        with bounded(), pytest.raises(InputError, match=str(vision)):
            interop.load_vision_tower(vision)


# Files of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    work = report_synthetic.make(
        tmp_path_factory.mktemp("run") / "work", seeds=(0,), std_seeds=(), criteria=("swe",),
        std_criteria=(),
    )  # fmt: skip
    book = ledger.Ledger(work / "ledger", meters=[])
    with book.measure("train", cell="seed_0", tokens=9):
        pass
    for path in work.rglob("*.json"):  # as a run writes them
        if path.parent.name != "ledger":
            report_read.storage.write(path, sealed(json.loads(path.read_text())))
    return work


def sealed(value):
    return json.dumps(report_read.storage.sealed(value))


FILES = (
    "results.csv", "config.json", "seed_0/dense/result.json", "seed_0/cells/*/result.json",
    "seed_0/dense/metrics.jsonl", "seed_0/dense/trajectory.jsonl", "ledger/*.json",
)  # fmt: skip


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_run(finished, name):
    path = sorted(finished.glob(name))[0]
    silent = outcomes(path, lambda: repr(report_read.load(finished)), folder=path.name)
    if not name.endswith(".jsonl"):  # lines of a curve have no checksums
        assert not [one for one in silent if one != "folder"]


@pytest.mark.parametrize(
    ("name", "key"),
    [("seed_0/dense/result.json", "dense_loss"), ("seed_0/dense/result.json", "params"),
     ("seed_0/cells/*/result.json", "sparsity"), ("seed_0/cells/*/result.json", "pruned_loss"),
     ("ledger/*.json", "began"), ("seed_0/dense/metrics.jsonl", "step"),
     ("seed_0/dense/metrics.jsonl", "loss"), ("seed_0/dense/trajectory.jsonl", "values")],
)  # fmt: skip
def test_values_of_other_types_are_refused_without_a_checksum(finished, name, key):
    path = sorted(finished.glob(name))[0]
    first, *lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    for value in ("x", True, [], {}, 10**400, math.nan, math.inf, [None]):
        changed = {k: v for k, v in json.loads(first).items() if k != "checksum"} | {key: value}
        text = "\n".join([json.dumps(changed), *lines])
        with damaged(path, lambda text=text: path.write_text(text)), bounded():
            if (key, value) == ("values", {}):
                continue  # a snapshot of no weights
            if key == "pruned_loss" and isinstance(value, float):
                continue  # a loss may be NaN
            with pytest.raises(InputError, match=path.name):
                report_read.load(finished)


def test_numbers_of_the_table_are_those_of_the_cells_own_files(finished):
    path = finished / "results.csv"
    head, row, *rest = path.read_text().split("\n")
    values = row.split(",")
    values[head.split(",").index("pruned_loss")] = "1.0"
    whole = report_read.load(finished).rows
    with damaged(path, lambda: path.write_text("\n".join([head, ",".join(values), *rest]))):
        assert report_read.load(finished).rows == whole
    values[head.split(",").index("criterion")] = "other"
    other = "\n".join([head, ",".join(values), *rest])
    refused = pytest.raises(InputError, match=r"no result\.json; run the experiment's command")
    with damaged(path, lambda: path.write_text(other)), refused:
        report_read.load(finished)


# What lies beside a model


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "text", "number", "deep"])
def test_kept_units_and_trajectories_are_read_from_the_folder_alone(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_text('{"kept": {"layers": [0]}}')
    model = tmp_path / "model"
    make = {
        "link": lambda path: path.symlink_to(secret),
        "fifo": os.mkfifo,
        "folder": os.mkdir,
        "text": lambda path: path.write_text('{"kept": {"layers": "x"}, "measures": 3}'),
        "number": lambda path: path.write_text('{"kept": {"layers": [1.5]}, "measures": [1]}'),
        "deep": lambda path: path.write_text(DEEP),
    }[kind]
    for path, read in (
        (model / cut.KEPT, cut.kept_layers),
        (model / "trajectory" / "about.json", lambda folder: tracked.read(folder, {})),
    ):
        path.parent.mkdir(parents=True)
        assert read(model) is None
        make(path)
        with bounded(), pytest.raises(InputError, match=path.name):
            read(model)
        shutil.rmtree(model)


def test_a_log_may_grow_beyond_other_files_but_not_by_holes(tmp_path, monkeypatch):
    storage = report_read.storage
    monkeypatch.setattr(storage, "LARGEST", 10_000)
    path = tmp_path / "trajectory.jsonl"
    path.write_text('{"step": 1}\n' * 2000)
    assert len(read_lines(path)) == 2000
    with pytest.raises(ValueError, match="24,000 bytes"):
        storage.read_json(path)
    with open(path, "r+b") as file:
        file.truncate(1 << 24)
    with pytest.raises(InputError, match="more than a file of its kind has"):
        read_lines(path)


def test_a_validation_loss_that_is_not_finite_leaves_a_log_that_can_be_read(tmp_path):
    phase = Phase("dense", epath.Path(tmp_path), steps=8, log_every=4)
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    logger = MetricsLogger(phase, 0, log, lambda step, shown: None)
    logger.evaluated(4, float("inf"))
    logger.evaluated(8, 2.5)
    assert report_read._read_metrics(epath.Path(tmp_path / "metrics.jsonl")) == [
        {"step": 4},
        {"step": 8, "validation_loss": 2.5},
    ]
