"""Fuzzing: whatever comes in, a sentence or a right result, in bounded time.

Some seconds of it run with all tests; `make fuzz` runs it for an hour.
"""

import contextlib
import dataclasses
import json
import os
import warnings

import interop_tiny
import jax
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swe_prune import cli, interop, masks, recipe, trajectory, tree
from swe_prune.cli import parsing
from swe_prune.config import Config, flat, from_dict, to_steps, validate
from swe_prune.errors import InputError, visible
from swe_prune.interop.gguf_header import read_header as read_gguf_header
from swe_prune.interop.hf_config import read_config
from swe_prune.interop.safetensors_header import read_header
from swe_prune.interop.stranger_files import parse_json
from swe_prune.pretrained import settings as pretrained

EXAMPLES = int(os.environ.get("SWE_PRUNE_FUZZ", "60"))
"""Examples of each property; `make fuzz` asks for many."""

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=10_000,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES == 60,
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 10**9, 10**12, 2**31, 2**63, 0.0, -0.0, 1e-320, 1e308]),
    st.integers(),
    st.floats(),
)
TEXTS = st.one_of(st.sampled_from(["", "\0", "\x1b[2J", "../x", "\ud800", "1e9", "nan"]), st.text())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=4,
)


@contextlib.contextmanager
def sentence():
    """Lets a sentence pass; any other error fails the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except InputError as error:
        text = visible(str(error))
        assert "\n" not in text
        assert len(text) < 2000


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """Relative paths are none of the project's."""
    with contextlib.chdir(tmp_path_factory.mktemp("here")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("safetensors")
    folder, _ = interop_tiny.folder(tmp_path_factory.mktemp("fuzz") / "model", "llama")
    return folder


# Files


@fuzz
@given(raw=st.one_of(st.binary(max_size=300), VALUES.map(repr), TEXTS))
def test_json(raw):
    with sentence():
        parse_json(raw, "a file")


@fuzz
@given(
    family=st.sampled_from(sorted(interop_tiny.CONFIGS)),
    data=st.data(),
)
def test_settings_of_a_config_json(family, data):
    hf = dict(interop_tiny.CONFIGS[family])
    name = data.draw(st.sampled_from([*sorted(hf), "rope_scaling", "rope_parameters", "head_dim"]))
    inside = hf.get(name)
    if isinstance(inside, dict) and data.draw(st.booleans()):
        hf[name] = inside | {data.draw(st.sampled_from(sorted(inside))): data.draw(VALUES)}
    else:
        hf[name] = data.draw(VALUES)
    with sentence():
        _, config, _ = read_config(hf)
        assert all(np.isfinite(x) for x in flat(config).values() if isinstance(x, float))


def flipped(raw, data):
    """Bytes with some of them changed, left out or repeated."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        change = data.draw(st.sampled_from(["flip", "cut", "insert", "big"]))
        if change == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "cut":
            del raw[at : at + data.draw(st.integers(1, 9))]
        else:
            raw[at:at] = b"\xff" * 8 if change == "big" else data.draw(st.binary(max_size=9))
    return bytes(raw)


@fuzz
@given(data=st.data())
def test_bytes_of_a_safetensors_file(model, tmp_path_factory, data):
    raw = (model / "model.safetensors").read_bytes()
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(flipped(raw[:2000], data) + raw[2000:])
    with sentence():
        read_header(path)


@fuzz
@given(data=st.data())
def test_bytes_of_a_gguf_file(tmp_path_factory, data):
    writer = pytest.importorskip("interop_gguf_writer")
    path = tmp_path_factory.getbasetemp() / "whole.gguf"
    if not path.exists():
        tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
        writer.finish(writer.write(path, interop_tiny.model("llama"), **tokens))
    raw = path.read_bytes()
    damaged = path.with_name("fuzz.gguf")
    damaged.write_bytes(flipped(raw[:1500], data) + raw[1500:])
    with sentence():
        read_gguf_header(damaged)
    with sentence():
        interop.open_pretrained(damaged)


@fuzz
@given(data=st.data())
def test_bytes_of_any_file_of_a_folder(model, data):
    path = model / data.draw(st.sampled_from(["config.json", "generation_config.json"]))
    raw = path.read_bytes() if path.exists() else b"{}"
    try:
        path.write_bytes(flipped(raw, data))
        with sentence():
            interop.open_pretrained(model)
    finally:
        path.write_bytes(raw)


@fuzz
@given(name=st.sampled_from(["normalizer", "model", "decoder", "pre_tokenizer", "added_tokens"]),
       value=VALUES)  # fmt: skip
def test_fields_of_a_tokenizer(model, name, value):
    plain = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
    path = model / "tokenizer.json"
    path.write_text(json.dumps(plain | {name: value}))
    try:
        with sentence():
            interop.open_pretrained(model)
    finally:
        path.unlink()


# Configs and command lines

SETTINGS = sorted(flat(Config()))


@fuzz
@given(name=st.sampled_from(SETTINGS), value=VALUES)
def test_values_of_a_config(name, value):
    values = dataclasses.asdict(tiny.config())
    *groups, last = name.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[last] = value
    with sentence():
        validate(from_dict(values))


@fuzz
@given(duration=VALUES)
def test_durations(duration):
    with sentence():
        assert to_steps(duration, total=100, epoch=10) >= 0


OPTIONS = sorted({
    (command, "--" + field.metadata.get("name", field.name).replace("_", "-"))
    for command, cls in pretrained.COMMANDS.items() for field in dataclasses.fields(cls)
})  # fmt: skip


@fuzz
@given(option=st.sampled_from(OPTIONS), value=st.one_of(TEXTS, NUMBERS.map(repr)), more=TEXTS)
def test_command_lines(option, value, more, tmp_path_factory):
    command, name = option
    nowhere = tmp_path_factory.getbasetemp() / "nowhere"
    arguments = [command, f"--model={nowhere}", f"--out={nowhere}-out", f"{name}={value}"]
    arguments += ["--criterion=magnitude", "--sparsity=0.5"] * (command in ("plan", "prune"))
    arguments = arguments if command in ("prune", "finetune") else [
        one for one in arguments if not one.startswith("--out")
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert cli.main([*arguments, *([more] if more.startswith("-") else [])]) in (1, 2)


OF_EXPERIMENTS = sorted({
    (command, parsing.flag(field))
    for command, about in parsing.COMMANDS.items() if about.settings is not None
    for field in dataclasses.fields(about.settings)
})  # fmt: skip


@fuzz
@given(
    option=st.sampled_from(OF_EXPERIMENTS), value=st.one_of(TEXTS, NUMBERS.map(repr)), more=TEXTS
)
def test_command_lines_of_an_experiment(option, value, more, tmp_path_factory):
    command, name = option
    nowhere = tmp_path_factory.getbasetemp() / "nowhere"
    arguments = [command, f"--config={nowhere}.py", f"--workdir={nowhere}", f"{name}={value}"]
    assert cli.main([*arguments, f"--config.{more}"]) in (1, 2)
    assert not nowhere.exists()


# Library calls

LEAVES = st.one_of(
    VALUES, st.lists(st.floats(width=32), min_size=1, max_size=6).map(np.float32),
    st.lists(st.booleans(), min_size=1, max_size=6).map(np.array),
)  # fmt: skip
TREES = st.recursive(
    LEAVES, lambda inner: st.dictionaries(st.sampled_from("ab/"), inner, max_size=3), max_leaves=4
)


@fuzz
@given(one=TREES, two=TREES, number=VALUES)
def test_trees_given_to_the_library(one, two, number):
    for call in (
        lambda: masks.apply(one, two),
        lambda: masks.by_std(one, number),
        lambda: masks.by_sparsity(one, number),
        lambda: masks.summary(one),
        lambda: tree.prunable(one, number, two),
        lambda: trajectory.init(one, prunable=two, power=number),
        lambda: recipe.check(recipe.Recipe(criterion="magnitude", sparsity=number)),
    ):
        with sentence():
            jax.block_until_ready(call())
