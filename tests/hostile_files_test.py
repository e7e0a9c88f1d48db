"""Files of strangers: each is refused in one sentence, within a second and 300 MB."""

import contextlib
import functools
import gc
import json
import os
import resource
import shutil
import struct
import time

import interop_tiny
import numpy as np
import pretrained_tiny
import pytest

from swe_prune import interop
from swe_prune.errors import InputError

pytest.importorskip("safetensors")
MEMORY, SECONDS = 300 << 20, 1.0
DEEP = '{"a":' * 200_000


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    made = interop_tiny.model("llama")
    words = pretrained_tiny.tokenizer("a few words, a few words more")
    words.backend.enable_truncation(4)
    interop.export(folder, made)
    small = {"<|end|>": 0, "a": 1, "b": 2}
    tokens = {"model": {"type": "BPE", "vocab": small, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    interop.open_pretrained(folder)  # imports what is imported on first use
    return folder


@pytest.fixture
def model(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "model")


@contextlib.contextmanager
def bounded(seconds=SECONDS, memory=MEMORY):
    """Fails what takes too long, and ends in MemoryError what takes too much.

    What earlier tests left behind is not collected meanwhile: that alone can take a second.
    """
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[5]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (mapped + memory, limits[1]))
    gc.disable()
    begun = time.process_time()  # the machine may have other work
    try:
        yield
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert time.process_time() - begun < seconds


def refused(path, *said, **settings):
    with bounded(), pytest.raises(InputError) as caught:
        interop.open_pretrained(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1300, message
    for part in said:
        assert part in message, message
    return message


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


# Links and files that are none


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "special_tokens_map.json",
     "chat_template.jinja", "LICENSE", "NOTICE", "model.safetensors", "tokenizer_config.json"],
)  # fmt: skip
def test_a_link_to_elsewhere_is_refused(model, tmp_path, name):
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("{}")
    (model / name).symlink_to(secret)
    refused(model, repr(name), "link")


@pytest.mark.parametrize("name", ["masks.safetensors", "pruning.json"])
def test_a_link_to_elsewhere_is_refused_where_it_is_read(model, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (model / name).symlink_to(tmp_path / "secret")
    read = interop.read_masks if name == "masks.safetensors" else interop.read_record
    with pytest.raises(InputError, match="link"):
        read(model)


def test_the_links_of_the_hugging_face_cache_are_read(model, tmp_path):
    home = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    home.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, blobs / str(number))
        (home / file.name).symlink_to(f"../../blobs/{number}")
    interop.open_pretrained(home).read()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "added_tokens.json", "LICENSE"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(model, name, kind):
    (model / name).unlink(missing_ok=True)
    (os.mkfifo if kind == "fifo" else os.mkdir)(model / name)
    refused(model, name)


def test_a_fifo_for_a_path_is_refused(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe")
    refused(model, "pipe", tokenizer=tmp_path / "pipe")


# Sizes and ranges


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 1_000_000),
        ("num_hidden_layers", 10**12),
        ("hidden_size", 10**9),
        ("hidden_size", 10**12),
        ("hidden_size", 10**400),
        ("vocab_size", 10**12),
        ("intermediate_size", 10**15),
        ("num_attention_heads", 10**9),
        ("num_key_value_heads", 10**10),
        ("head_dim", 2**40),
        ("max_position_embeddings", 10**18),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", 10**400),
        ("model_type", 10**4000),
        ("pad_token_id", "a" * 100_000),
        ("rope_theta", 0),
        ("rope_theta", -1),
        ("rope_theta", float("nan")),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_scaling", {"type": "linear", "factor": float("inf")}),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 1e300}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                          "high_freq_factor": 1, "original_max_position_embeddings": 8}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                          "high_freq_factor": 1, "original_max_position_embeddings": 8}),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [0, 1],
                          "long_factor": [1, 1]}),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1, 1],
                          "long_factor": [1, -1], "original_max_position_embeddings": 8}),
        ("rope_scaling", {"rope_type": ["yarn"], "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0,
                          "original_max_position_embeddings": True}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("eos_token_id", 10**9),
        ("layer_types", 3),
        ("layer_types", [[]]),
        ("hidden_act", ["silu"]),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named_with_its_value(model, name, value):
    edit(model / "config.json", **{name: value})
    refused(model, "config.json")


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "mixtral", "smollm3", "granite"])
def test_settings_of_other_families_have_ranges_too(tmp_path, family):
    path, _ = interop_tiny.folder(tmp_path / "model", family)
    interop.open_pretrained(path)
    bad = {
        "gemma3_text": {"rope_local_base_freq": 0, "query_pre_attn_scalar": 1e-320,
                        "final_logit_softcapping": float("inf"), "sliding_window": 10**30,
                        "sliding_window_pattern": 0},
        "gpt_neox": {"rotary_pct": -0.5, "rotary_emb_base": 0},
        "mixtral": {"num_local_experts": 10**9, "num_experts_per_tok": 10**9},
        "smollm3": {"no_rope_layers": "ab", "no_rope_layer_interval": 10**30},
        "granite": {"logits_scaling": -1.0, "attention_multiplier": 0.0},
    }[family]  # fmt: skip
    plain = (path / "config.json").read_text()
    for name, value in bad.items():
        if name == "no_rope_layer_interval":
            continue  # any large interval is none
        (path / "config.json").write_text(plain)
        edit(path / "config.json", **{name: value})
        refused(path, "config.json")


# Damaged files


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "generation_config.json",
     "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"],
)  # fmt: skip
@pytest.mark.parametrize(
    "content",
    [DEEP, "[", "null", "[1]", '{"a": NaN}', '{"a": 1e999}', "\ud800", b"\xff\xfe\x00{", b"\x00",
     '{"a": "\\ud800"}', '{"\\ud800": 1}', '{"a": ' + "9" * 5000 + "}"],
    ids=lambda value: str(value)[:12].encode("ascii", "backslashreplace").decode(),
)  # fmt: skip
def test_text_that_is_no_json_is_refused(model, name, content):
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (model / name).write_bytes(raw)
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").unlink()
    refused(model, name)


HEADER_BYTES = 1 << 33


def sparse(path, head, size):
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


@pytest.mark.parametrize("length", [HEADER_BYTES, 1 << 27, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_the_format_allows_is_refused(model, length):
    sparse(model / "model.safetensors", length.to_bytes(8, "little"), HEADER_BYTES + 8)
    refused(model, "model.safetensors")


def with_header(path, header, data=64):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))


def entry(**changes):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize(
    "header",
    [
        DEEP.encode(),
        b'{"a": NaN}',
        b"\xff",
        b"[]",
        {"x": entry(shape=[2**62, 4])},
        {"x": entry(shape=[-4])},
        {"x": entry(shape=[4.0])},
        {"x": entry(shape="abcd")},
        {"x": entry(shape=[10**30])},
        {"x": entry(shape=[True, 4])},
        {"x": entry(data_offsets=[-16, 0])},
        {"x": entry(data_offsets=[16, 0])},
        {"x": entry(data_offsets=[0, 1e9])},
        {"x": entry(data_offsets=[0, 10**30])},
        {"x": entry(dtype=["F32"])},
        {"x": entry(dtype="F33")},
        {"x": 3},
        {"x\x00": entry()},
        {"\x1b[2J": entry(data_offsets=[0, 17])},
        {"__metadata__": {"a": {"b": 1}}, "x": entry()},
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_a_damaged_header_is_refused(model, header):
    with_header(model / "model.safetensors", header)
    refused(model, "model")


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "swe_prune.masks.1", "shapes": DEEP},
        {"format": "swe_prune.masks.1", "shapes": '{"x": [99999999999]}'},
        {"format": "swe_prune.masks.1", "shapes": '{"x": [-1]}'},
        {"format": "swe_prune.masks.1", "shapes": '{"x": "ab"}'},
        {"format": "swe_prune.masks.1", "shapes": '{"x": [3.5]}'},
        {"format": "swe_prune.masks.1", "shapes": '{"a": null, "a/b": null}'},
        {"format": "swe_prune.masks.1", "shapes": "[]"},
    ],
)
def test_a_damaged_mask_file_is_refused(model, metadata):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(4, np.uint8)}, model / "masks.safetensors", metadata)
    with bounded(), pytest.raises(InputError, match=r"masks\.safetensors"):
        interop.read_masks(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10_000}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": "a"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {"model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": [["a", "b"]]}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 9}},
        {"model": {"type": "WordPiece"}},
        {"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [],
                            "special_tokens": 3}},
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_is_refused(model, changes):
    edit(model / "tokenizer.json", **changes)
    refused(model, "token")


# GGUF files


def gguf_head(tensors=0, settings=0, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, settings) + body


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def strings(count):
    return text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, count)


@pytest.mark.parametrize(
    "content",
    [
        gguf_head(tensors=2**62),
        gguf_head(settings=2**40),
        gguf_head(settings=1, body=struct.pack("<Q", 2**63)),
        gguf_head(settings=1, body=strings(2**31)),
        gguf_head(settings=1, body=text("a") + struct.pack("<IIQ", 9, 9, 2**31)),
        gguf_head(settings=1, body=text("a") + struct.pack("<IIQ", 9, 4, 2**40)),
        gguf_head(settings=1, body=text("a") + struct.pack("<I", 99)),
        gguf_head(settings=1, body=text(b"\xff") + struct.pack("<I", 4)),
        gguf_head(settings=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
        gguf_head(settings=1, body=text("general.architecture") + struct.pack("<II", 4, 0)),
        gguf_head(tensors=1, body=text("x") + struct.pack("<I", 2**31)),
        gguf_head(tensors=1, body=text("x") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)),
        gguf_head(tensors=1, body=text("x") + struct.pack("<IQIQ", 1, 8, 77, 0)),
        gguf_head(tensors=1, body=text("x") + struct.pack("<IQIQ", 1, 8, 0, 2**63)),
        gguf_head(version=0x03000000),
        b"GGUF",
        b"GGU",
        b"",
    ],
    ids=range(18),
)
@pytest.mark.parametrize("size", [None, 1 << 33])
def test_a_damaged_gguf_file_is_refused(tmp_path, content, size):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    sparse(path, content, size or len(content))
    interop_gguf_warm_up()
    refused(path, "model.gguf")


@functools.cache
def interop_gguf_warm_up():
    import gguf.quants  # noqa: F401, half a second


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 10**9),
        ("llama.block_count", "two"),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", [4, 2]),
        ("llama.attention.head_count", ["a", "b"]),
        ("llama.attention.key_length", 0),
        ("llama.embedding_length", "x"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", float("inf")),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", "x"),
        ("llama.rope.dimension_count", 0),
        ("llama.context_length", 0),
        ("llama.expert_count", 8),
        ("tokenizer.ggml.model", 3),
        ("general.architecture", 3),
    ],
)
def test_a_hostile_setting_of_a_gguf_file_is_refused(tmp_path, key, value):
    writer = pytest.importorskip("interop_gguf_writer")
    made = interop_tiny.model("llama")
    if key == "general.architecture":
        raw = gguf_head(settings=1, body=text(key) + struct.pack("<II", 4, 3))
        (tmp_path / "model.gguf").write_bytes(raw)
    else:
        writer.finish(writer.write(tmp_path / "model.gguf", made, **{key: value}))
    refused(tmp_path / "model.gguf", "model.gguf")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.tokens": [1, 2]},
        {"tokenizer.ggml.scores": ["a"] * 4},
        {"tokenizer.ggml.scores": 3},
        {"tokenizer.ggml.token_type": [9.5] * 3},
        {"tokenizer.ggml.bos_token_id": "x"},
        {"tokenizer.ggml.unknown_token_id": 4.5},
        {"tokenizer.ggml.add_bos_token": "x", "tokenizer.ggml.bos_token_id": "y"},
        {"tokenizer.ggml.model": "t5", "tokenizer.ggml.precompiled_charsmap": [999, 2]},
        {"tokenizer.ggml.model": "t5", "tokenizer.ggml.precompiled_charsmap": "abc"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
         "tokenizer.ggml.merges": [1, 2]},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": ["gpt-2"]},
        {"tokenizer.chat_template": 5},
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_of_a_gguf_file_is_refused(tmp_path, changes):
    writer = pytest.importorskip("interop_gguf_writer")
    plain = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
    }
    made = interop_tiny.model("llama")
    path = tmp_path / "model.gguf"
    writer.finish(writer.write(path, made, **plain))
    interop.open_pretrained(path)
    writer.finish(writer.write(path, made, **(plain | changes)))
    refused(path, "model.gguf")


# Names that are printed


def test_control_characters_of_names_are_visible_on_the_terminal(model, tmp_path, capsys):
    from swe_prune import cli

    with_header(model / "model.safetensors", {"\x1b[2J\u202e": entry(data_offsets=[0, 10**6])})
    arguments = ["prune", f"--model={model}", f"--out={tmp_path}/\x1b[31m", "--sparsity=0.5"]
    assert cli.main([*arguments, "--criterion=magnitude"]) == 2
    error = capsys.readouterr().err
    assert error.strip().isprintable()


def test_markdown_has_no_html_and_no_control_characters():
    from swe_prune.report import markdown
    from swe_prune.report.tables import Table

    table = Table("<script>", ["a\nb"], [["<b>|\x1b[2J"]], 1)
    text = markdown.document("<img src=x>", "lead", [table])
    assert "<" not in text
    assert "\x1b" not in text
