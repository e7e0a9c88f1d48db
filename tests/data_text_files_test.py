"""Files of text: JSON and gzip are read for the text in them, archives and the like refused."""

import gzip
import io
import json
import os
import tarfile
import zipfile

import pytest

from swe_prune import data
from swe_prune.config import DataConfig
from swe_prune.data import text_files
from swe_prune.errors import InputError

TEXTS = ["First: naïve 日本.\nA second line.", 'Second {with} "braces".', "Third\ttab"]
JOINED = "\n\n".join(TEXTS)
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n"


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.read_named(str(path))


def refused(path, content, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        read(path, content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.replace("\n", "\r\n\n")),
        ("a.json", LINES),
        ("A.JSON", json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps(TEXTS)),
        ("a.jsonl", "\n".join(map(json.dumps, TEXTS))),
        # By what is in them, whatever the name.
        ("a.txt", LINES),
        ("a", "\n  " + json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("a.txt", json.dumps(TEXTS)),
        ("a.txt", "\ufeff" + LINES),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_texts_of_json_are_read_without_their_braces(tmp_path, name, content, packed):
    raw = content.encode()
    path = tmp_path / (name + ".gz" if packed else name)
    assert read(path, gzip.compress(raw) if packed else raw) == JOINED


def test_one_object_is_one_text(tmp_path):
    assert read(tmp_path / "a.json", json.dumps(ROWS[0], indent=1)) == TEXTS[0]
    assert read(tmp_path / "a.txt", json.dumps(ROWS[0])) == TEXTS[0]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.gz", "a.txt"])
def test_gzip_is_expanded_whatever_its_name(tmp_path, name):
    assert read(tmp_path / name, gzip.compress(JOINED.encode())) == JOINED
    members = gzip.compress(JOINED[:7].encode()) + gzip.compress(JOINED[7:].encode())
    assert read(tmp_path / name, members) == JOINED
    assert read(tmp_path / "plain.gz", JOINED) == JOINED


@pytest.mark.parametrize(
    "text",
    [
        "[Enter two Gentlemen]\nFIRST. You do not meet a man but frowns.",
        "{Aside} I like it not.\n{Exit}",
        "[1]\nA footnote.",
        "{}\nfunction f() {}",
        '"Quoted," she said.',
        "12\n13",
        "GGUF is a file format, PAR1 a name, ORC a being, BZh a sound.",
        "PK is a key.",
    ],
)
def test_plain_texts_that_begin_like_something_else_stay_as_they_are(tmp_path, text):
    assert read(tmp_path / "a.txt", text) == text


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"content": "x"}\n', "entry 1, must be a string or .* fields 'content'; wr"),
        ("a.jsonl", LINES + '{"messages": []}', "line 4, must be .*got fields 'messages'"),
        ("a.jsonl", '{"text": ["x"]}', "whose 'text' is one, got fields 'text'"),
        ("a.jsonl", LINES + "{'text': 1}", "JSON lines, of which line 4 is none"),
        ("a.txt", LINES + "plain", "JSON lines, of which line 4 is none"),
        ("a.jsonl", "plain text", "is not JSON, although its name says so"),
        ("a.json", '{"data": [', "is not JSON, although its name says so"),
        ("a.json", "[[1, 2]]", "entry 1, must be a string .*, got list"),
        ("a.json", "7", "got int"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "[]", "has no text in its 'text'"),
        ("a.jsonl", '{"text": ""}', "has no text in its 'text'"),
        ("a.jsonl", r'{"text": "\ud800"}', "half of a character"),
        ("a.jsonl", r'{"text": "a\u0000"}', "is binary"),
        ("a.json", json.dumps([{"instruction": "a", "output": "b"}]), "'instruction', 'output'"),
    ],
)
def test_json_without_texts_is_refused(tmp_path, name, content, sentence):
    refused(tmp_path / name, content, sentence)


def archive(kind):
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.txt", JOINED)
    else:
        with tarfile.open(fileobj=out, mode=kind) as file:
            info = tarfile.TarInfo("a.txt")
            info.size = len(JOINED.encode())
            file.addfile(info, io.BytesIO(JOINED.encode()))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (lambda: archive("zip"), "zip archive"),
        (lambda: archive("w"), "tar archive"),
        (lambda: archive("w:gz"), "tar archive"),
        (lambda: archive("w:bz2"), "bzip2 archive"),
        (lambda: archive("w:xz"), "xz archive"),
        (lambda: b"\x28\xb5\x2f\xfd" + bytes(9), "zstandard archive"),
        (lambda: b"PAR1\x15\x04" + bytes(9) + b"PAR1", "parquet file"),
        (lambda: b"%PDF-1.7\n1 0 obj\n<<>>", "PDF"),
        (lambda: b"GGUF\x03\x00\x00\x00" + bytes(9), "GGUF model"),
        (lambda: gzip.compress(gzip.compress(b"text")), "gzip file within another"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.gz"])
def test_files_of_other_kinds_are_refused_by_their_first_bytes(tmp_path, name, content, kind):
    refused(tmp_path / name, content(), f"is a {kind}, not text; extract its text to a plain file")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path, kind):
    path = tmp_path / "text"
    {
        "fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero"),
    }[kind](path)  # fmt: skip
    with pytest.raises(InputError, match="is a directory, a pipe or a device"):
        text_files.read_text(path)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(InputError, match="nearly all holes"):
        text_files.read_text(tmp_path / "sparse")


def test_a_damaged_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(JOINED.encode())
    refused(tmp_path / "a.gz", whole[:-9], "a gzip file that is damaged")
    refused(tmp_path / "a.gz", whole[:-6] + bytes(2) + whole[-4:], "a gzip file that is damaged")
    refused(tmp_path / "a.gz", whole[:12] + b"\xff\xff" + whole[14:], "damaged")
    refused(tmp_path / "a.gz", gzip.compress(b"\n "), "is empty")


def test_a_gzip_file_that_expands_to_too_much_is_refused_early(tmp_path, monkeypatch):
    bomb = gzip.compress(bytes(1 << 25))
    refused(tmp_path / "a.gz", bomb, r"has [\d,]+ bytes and expands to more than [\d,]+")
    text = gzip.compress(JOINED.encode() * 100)
    monkeypatch.setattr(text_files, "LARGEST", 1000)
    refused(tmp_path / "a.gz", text, "expands to more than 1,000")


def test_the_field_of_an_experiment_is_its_text_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES.replace('"text"', '"body"'))
    settings = DataConfig(
        dataset=str(path), text_key="body", validation_fraction=0.5, eval_windows=1, eval_batch=1
    )
    loaded = data.load(settings, 4)
    found = [loaded.tokenizer.decode(tokens) for tokens in (loaded.train, loaded.validation)]
    assert "".join(found) == JOINED
