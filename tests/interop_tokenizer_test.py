"""Tokenizers of folders and of GGUF files: the ids are those that the model was trained on."""

import json
import re

import numpy as np
import pytest
from interop_gguf_writer import finish, write
from interop_tiny import folder, model

from swe_prune import interop
from swe_prune.errors import InputError

tokenizers = pytest.importorskip("tokenizers", reason="makes tokenizers")

CORPUS = ["the cat sat on the mat, isn't it?  the 12345 cats don't care\n\nnaïve 日本 " * 3]
TEXT = "the cat's 2024 mats\n\n  don't\tcare: naïve 日本 🙂 THE<|endoftext|>"
SPECIAL = "<|endoftext|>"
SIZE = 280


def trained(pre_tokenizer):
    """A byte-level BPE tokenizer of SIZE tokens, the special one first."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[SPECIAL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_level(**settings):
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, **settings)


def smollm():
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    return tokenizers.pre_tokenizers.Sequence([digits, byte_level()])


def parts(made):
    """Vocabulary and merges, as vocab.json and merges.txt have them."""
    said = json.loads(made.to_str())["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in said["merges"]]
    return said["vocab"], merges


@pytest.fixture
def path(tmp_path):
    """A folder of a model of SIZE tokens, without tokenizer."""
    return interop.export(tmp_path / "model", model("gpt2", vocab_size=SIZE))


def refused(path, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_json_is_read(path):
    made = trained(smollm())
    made.save(str(path / "tokenizer.json"))
    found = interop.load(path).tokenizer
    ids = found.encode(TEXT)
    assert ids.dtype == np.int32
    assert found.decode(ids) == TEXT
    made.encode_special_tokens = True
    assert ids.tolist() == made.encode(TEXT).ids
    assert (found.vocab_size, found.bos_id, found.eos_ids, found.eos_id) == (SIZE, 1, (2,), 2)


def test_special_tokens_in_a_text_are_text_unless_asked_for(path):
    trained(byte_level()).save(str(path / "tokenizer.json"))
    found = interop.load(path).tokenizer
    assert 0 not in found.encode(f"a{SPECIAL}b")
    as_token = found.encode(f"a{SPECIAL}b", special=True)
    assert as_token.tolist().count(0) == 1
    assert found.decode(as_token) == f"a{SPECIAL}b"
    assert found.decode(as_token, special=False) == "ab"
    assert 0 not in found.encode(f"a{SPECIAL}b")  # asking once changes nothing


def test_truncation_and_padding_of_the_file_are_left_out(path):
    made = trained(byte_level())
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(path / "tokenizer.json"))
    assert interop.load(path).tokenizer.decode(interop.load(path).tokenizer.encode(TEXT)) == TEXT


def test_what_a_tokenizer_puts_around_a_text_is_added_where_asked(path):
    made = trained(byte_level())
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SPECIAL} $A", pair=f"{SPECIAL} $A $B", special_tokens=[(SPECIAL, 0)]
    )
    made.save(str(path / "tokenizer.json"))
    found = interop.load(path).tokenizer
    assert found.encode("cat", template=True).tolist() == [0, *found.encode("cat")]


def test_gpt2s_vocabulary_and_merges_are_read(path):
    made = trained(byte_level())
    vocab, merges = parts(made)
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    found = interop.load(path).tokenizer
    made.encode_special_tokens = True
    assert found.encode(TEXT).tolist() == made.encode(TEXT).ids
    assert 0 in found.encode(TEXT, special=True)


def test_ends_of_text_are_those_of_the_generation_config(path):
    trained(byte_level()).save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [0, 5]}')
    found = interop.load(path).tokenizer
    assert (found.bos_id, found.eos_ids) == (0, (0, 5))


def test_a_folder_without_tokenizer_has_none(path):
    assert interop.load(path).tokenizer is None


def test_sentencepiece_alone_is_refused_and_may_be_left_out(path):
    (path / "tokenizer.model").write_bytes(b"\n")
    refused(path, "SentencePiece, tokenizer.model, which is not supported")
    assert interop.load(path, tokenizer=False).tokenizer is None


def test_a_damaged_tokenizer_is_refused(path):
    (path / "tokenizer.json").write_text("{}")
    refused(path, "tokenizer.json cannot be read")
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text('{"a": 0}')
    (path / "merges.txt").write_text("a b c\n")
    refused(path, "a merge that is not of two tokens")
    (path / "merges.txt").write_text("a b\n")
    refused(path, "cannot be read")
    (path / "merges.txt").write_bytes(b"\xff\xff")
    refused(path, "merges.txt cannot be read")
    (path / "merges.txt").write_text("")
    (path / "vocab.json").write_text('{"a": "0"}')
    refused(path, "an id that is not an integer")


def gpt2_files(path, **more):
    """Writes vocab.json and merges.txt into a folder, and other JSON files by name."""
    vocab, merges = parts(trained(byte_level()))
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    for name, content in more.items():
        (path / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def larger(tmp_path):
    """A folder of a model with room for three tokens more, without tokenizer."""
    return interop.export(tmp_path / "larger", model("gpt2", vocab_size=SIZE + 3))


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("where", ["added_tokens", "tokenizer_config"])
def test_added_tokens_of_their_own_file_are_read_with_their_ids(larger, kind, where):
    added = {"<|user|>": SIZE + 1, "<|pad|>": SIZE}
    specials = {"pad_token": "<|pad|>", "additional_special_tokens": [{"content": "<|x|>"}]}
    content = {"added_tokens": added, "special_tokens_map": specials}
    if where == "tokenizer_config":
        decoder = {
            str(i): {"content": token, "special": "pad" in token} for token, i in added.items()
        }
        content = {"tokenizer_config": {"added_tokens_decoder": decoder}}
    gpt2_files(larger, **content)
    if kind == "tokenizer.json":
        trained(byte_level()).save(str(larger / kind))
    found = interop.load(larger).tokenizer
    assert found.vocab_size == SIZE + 2
    assert SIZE + 1 in found.encode("cat<|user|>cat")  # not special: of the text itself
    assert SIZE not in found.encode("cat<|pad|>")
    assert SIZE in found.encode("cat<|pad|>", special=True)
    assert found.decode([SIZE, SIZE + 1], special=False) == "<|user|>"


def test_added_tokens_that_do_not_fit_are_refused(larger):
    gpt2_files(larger, added_tokens={"<x>": SIZE + 2})
    refused(larger, f"adds the token '<x>' as {SIZE + 2}, and its vocabulary makes it {SIZE}")
    gpt2_files(larger, added_tokens={"cat": 3})
    refused(larger, "adds the token 'cat' as 3")
    gpt2_files(larger, added_tokens={"<x>": "280"})
    refused(larger, "added_tokens.json must give each token an integer of at least 0, got '280'")
    gpt2_files(larger, added_tokens={f"<{i}>": SIZE + i for i in range(4)})
    refused(larger, f"ids up to {SIZE + 3} and the model a vocabulary of {SIZE + 3}, without '<3>'")
    gpt2_files(larger, tokenizer_config={"added_tokens_decoder": {"x": 1}}, added_tokens={})
    refused(larger, "added_tokens_decoder in .* must be an object of ids and tokens")


def test_the_vocabulary_of_another_class_is_not_cut_as_gpt2s(path):
    gpt2_files(path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    refused(path, "of a Qwen2Tokenizer, and those of GPT-2 alone are supported; save it once as")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "2"),
        ("eos_token_id", [2, "3"]),
        ("eos_token_id", [2, None]),
        ("eos_token_id", SIZE),
        ("eos_token_id", [0, SIZE]),
        ("eos_token_id", -1),
        ("eos_token_id", 2.0),
        ("eos_token_id", True),
        ("eos_token_id", {"a": 1}),
        ("bos_token_id", [1]),
        ("bos_token_id", SIZE),
        ("pad_token_id", SIZE),
        ("pad_token_id", "<pad>"),
    ],
)
def test_ids_that_are_not_of_the_vocabulary_are_a_sentence(path, name, key, value):
    trained(byte_level()).save(str(path / "tokenizer.json"))
    content = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps(content | {key: value}))
    shown = re.escape(repr(value))
    refused(path, f"{key} in .*{name} must be an id of the vocabulary, .*got {shown}; correct")


def test_lists_of_ends_and_old_padding_are_accepted_as_by_transformers(path):
    trained(byte_level()).save(str(path / "tokenizer.json"))
    said = json.loads((path / "config.json").read_text())
    for ends, found in (([2, 5], (2, 5)), ([], ()), (None, ()), (7, (7,))):
        (path / "config.json").write_text(
            json.dumps(said | {"eos_token_id": ends, "pad_token_id": -1, "bos_token_id": None})
        )
        words = interop.load(path).tokenizer
        assert (words.bos_id, words.eos_ids) == (None, found)


def test_the_tokenizer_may_be_given_by_its_path(tmp_path, path):
    gpt2_files(path)  # the folder's own, which is not used
    other = tmp_path / "other"
    other.mkdir()
    made = trained(smollm())
    made.save(str(other / "tokenizer.json"))
    (other / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (other / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    made.encode_special_tokens = True
    for given in (other, other / "tokenizer.json", in_gguf(tmp_path, made, "smollm")):
        loaded = interop.load(path, tokenizer=str(given))
        assert loaded.tokenizer.encode(TEXT).tolist() == made.encode(TEXT).ids, given
        out = interop.export(tmp_path / f"out of {given.name}", loaded)
        assert interop.load(out).tokenizer.encode(TEXT).tolist() == made.encode(TEXT).ids
        assert not (out / "merges.txt").exists()
    assert interop.load(path, tokenizer=other).tokenizer.eos_ids == (3, 4)
    template = json.loads((tmp_path / "out of other" / "tokenizer_config.json").read_text())
    assert template == {"chat_template": "x"}


def test_a_tokenizer_path_without_tokenizer_is_refused(tmp_path, path):
    refused_with = [
        (tmp_path / "none", "does not exist; give the path of a tokenizer.json"),
        (tmp_path, "has no tokenizer; give the path of a tokenizer.json"),
        (path / "config.json", "get the tokenizer.json again"),
        (path / "model.safetensors", "get the tokenizer.json again"),
    ]
    for given, sentence in refused_with:
        with pytest.raises(InputError, match=sentence) as caught:
            interop.load(path, tokenizer=given)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(tmp_path):
    path, made = folder(tmp_path / "model", "gpt2")
    trained(byte_level()).save(str(path / "tokenizer.json"))
    refused(path, f"ids up to {SIZE - 1} and the model a vocabulary of {made.vocab_size}")


def test_ids_that_are_none_are_refused(path):
    trained(byte_level()).save(str(path / "tokenizer.json"))
    found = interop.load(path).tokenizer
    with pytest.raises(InputError, match=f"from -1 to {SIZE} do not fit"):
        found.decode([-1, SIZE])


LLAMA3_WORDS = [
    ("I'M HE'LL", ["I", "'M", " HE", "'LL"]),  # endings of any case
    ("12345", ["123", "45"]),
    ("a\n\n b", ["a", "\n\n", " b"]),
    ("(cat) sat?!\n", ["(cat", ")", " sat", "?!\n"]),
    ("x   y", ["x", "  ", " y"]),
]


def in_gguf(tmp_path, made, pre, **changes):
    vocab, merges = parts(made)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    small = model("llama", vocab_size=SIZE)
    finish(write(tmp_path / "model.gguf", small, **(metadata | changes)))
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(("pre", "words"), [("gpt-2", byte_level), ("smollm", smollm)])
def test_the_vocabulary_of_a_gguf_file_gives_the_same_ids(tmp_path, pre, words):
    made = trained(words())
    found = interop.load(in_gguf(tmp_path, made, pre)).tokenizer
    ids = found.encode(TEXT)
    assert found.decode(ids) == TEXT
    assert 0 in found.encode(TEXT, special=True)
    made.encode_special_tokens = True
    assert ids.tolist() == made.encode(TEXT).ids
    assert (found.bos_id, found.eos_ids, found.vocab_size) == (0, (0,), SIZE)


@pytest.mark.parametrize(("text", "words"), LLAMA3_WORDS)
def test_llama_3_cuts_text_into_its_words(tmp_path, text, words):
    found = interop.load(in_gguf(tmp_path, trained(byte_level()), "llama-bpe")).tokenizer
    cut = found.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in cut] == words


def test_a_gguf_file_that_begins_texts_does_so_where_asked(tmp_path):
    path = in_gguf(
        tmp_path, trained(byte_level()), "gpt-2", **{"tokenizer.ggml.add_bos_token": True}
    )
    found = interop.load(path).tokenizer
    assert found.encode("cat", template=True).tolist() == [0, *found.encode("cat")]


@pytest.mark.parametrize(("model_", "kind"), [("bert", "'bert'"), ("gpt2", "'gpt2' with 'tekken'")])
def test_another_kind_of_tokenizer_is_refused_and_may_be_replaced(tmp_path, model_, kind):
    made = trained(byte_level())
    path = in_gguf(tmp_path, made, "tekken", **{"tokenizer.ggml.model": model_})
    refused(path, f"{kind}, which is not supported; supported are 'gpt2' with gpt-2.*--tokenizer")
    assert interop.load(path, tokenizer=False).tokenizer is None
    made.save(str(tmp_path / "tokenizer.json"))  # the advice, followed
    found = interop.load(path, tokenizer=tmp_path / "tokenizer.json").tokenizer
    assert found.decode(found.encode(TEXT)) == TEXT
    assert (found.bos_id, found.eos_ids) == (0, (0,))


def test_the_tokenizer_of_a_gguf_file_goes_out_with_the_model(tmp_path):
    loaded = interop.load(in_gguf(tmp_path, trained(smollm()), "smollm"))
    path = interop.export(tmp_path / "out", loaded)
    again = interop.load(path).tokenizer
    assert again.encode(TEXT).tolist() == loaded.tokenizer.encode(TEXT).tolist()
    assert (again.bos_id, again.eos_ids) == (0, (0,))
    said = json.loads((path / "tokenizer_config.json").read_text())
    assert said["chat_template"] == "{{ messages }}"
    assert said["eos_token"] == SPECIAL


def test_transformers_gives_the_same_ids(tmp_path, path):
    transformers = pytest.importorskip("transformers", reason="compares with its tokenizers")
    loaded = interop.load(in_gguf(tmp_path, trained(smollm()), "smollm"))
    out = interop.export(tmp_path / "out", loaded)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs(TEXT)["input_ids"] == loaded.tokenizer.encode(TEXT, special=True).tolist()
    assert theirs.eos_token_id == 0

    vocab, merges = parts(trained(byte_level()))
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    theirs = transformers.GPT2TokenizerFast.from_pretrained(path)
    ours = interop.load(path).tokenizer
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT, special=True).tolist()


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_transformers_gives_the_same_ids_to_added_tokens(larger, kind):
    transformers = pytest.importorskip("transformers", reason="compares with its tokenizers")
    specials = {"special_tokens_map": {"pad_token": "<|pad|>"}}
    gpt2_files(larger, added_tokens={"<|user|>": SIZE + 1, "<|pad|>": SIZE}, **specials)
    if kind == "tokenizer.json":
        trained(byte_level()).save(str(larger / kind))
    theirs = transformers.AutoTokenizer.from_pretrained(larger)
    ours = interop.load(larger).tokenizer
    text = f"cat<|user|>cat <|pad|> x{SPECIAL}"
    assert theirs(text)["input_ids"] == ours.encode(text, special=True).tolist()
