"""SentencePiece vocabularies in GGUF files give the ids of SentencePiece's own rules."""

import itertools
import json
import math

import numpy as np
import pytest
from interop_gguf_writer import finish, write
from interop_tiny import model

from swe_prune import interop
from swe_prune.errors import InputError
from swe_prune.interop import tokenizer_folder
from swe_prune.pretrained.judge import protocol_of
from swe_prune.pretrained.settings import JudgingSettings

tokenizers = pytest.importorskip("tokenizers", reason="makes tokenizers")

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
CORPUS = "the cat sat on the mat, isn't it? the 12345 cats don't care; aaaa"
TEXTS = [
    "the cat's 2024 mats", "", " lead", "trail  ", "a  b   c", "x\n\ty", "naïve 日本 🙂 THE",
    "aaaaaaa", "the<s>cat", "the<user>cat<user> sat", "</s>",
]  # fmt: skip

NAMES = ["</s>", "a<s>b", "<unk>", "the<0x41>cat", "<0xFF><0x00>"]  # as texts they mean nothing


def vocabulary():
    """(token, score, kind) of each id: what a training of SentencePiece leaves."""
    text = SPACE + CORPUS.replace(" ", SPACE)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, show_progress=False)
    made.train_from_iterator([CORPUS] * 3, trainer)
    merged = sorted((number, token) for token, number in made.get_vocab().items() if len(token) > 1)
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    rows += [(token, -float(rank), NORMAL) for rank, (_, token) in enumerate(merged)]
    rows += [(char, -1000.0 - i, NORMAL) for i, char in enumerate(sorted(set(text)))]
    return [*rows, ("<user>", 0.0, USER)]


ROWS = vocabulary()
SIZE = len(ROWS)
IDS = {token: number for number, (token, _, _) in enumerate(ROWS)}
SCORES = {token: score for token, score, kind in ROWS if kind == NORMAL}


def in_gguf(tmp_path, kind="llama", **changes):
    metadata = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [token for token, _, _ in ROWS],
        "tokenizer.ggml.scores": [score for _, score, _ in ROWS],
        "tokenizer.ggml.token_type": [one for _, _, one in ROWS],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    path = tmp_path / f"{kind}.gguf"
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    finish(write(path, model("llama", vocab_size=SIZE), **(metadata | changes)))
    return path


def spans(text, prefix_space):
    """What lies between user-defined tokens, with its spaces as llama.cpp has them.

    It adds a space to each part, SentencePiece itself only to the beginning of a text.
    """
    for number, part in enumerate(text.split("<user>")):
        if number:
            yield None
        if part:
            yield (SPACE if prefix_space else "") + part.replace(" ", SPACE)


def in_bytes(symbol):
    return [IDS[symbol]] if symbol in SCORES else [IDS[f"<0x{b:02X}>"] for b in symbol.encode()]


def merged(text, prefix_space=True):
    """SentencePiece's BPE: the neighbours whose token has the best score merge, leftmost first."""
    ids = []
    for span in spans(text, prefix_space):
        symbols = list(span or "")
        while True:
            joined = [a + b for a, b in itertools.pairwise(symbols)]
            best = max((SCORES.get(one, -math.inf) for one in joined), default=-math.inf)
            if best == -math.inf:
                break
            at = next(i for i, one in enumerate(joined) if SCORES.get(one) == best)
            symbols[at : at + 2] = [joined[at]]
        ids += [IDS["<user>"]] if span is None else [*itertools.chain(*map(in_bytes, symbols))]
    return ids


def best_path(text):
    """SentencePiece's unigram model: the best sum of scores over all ways to cut."""
    ids = []
    for span in spans(text, True):
        if span is None:
            ids.append(IDS["<user>"])
            continue
        best = [(0.0, [])] + [(-math.inf, [])] * len(span)
        for end in range(1, len(span) + 1):
            for start in range(max(0, end - 12), end):
                piece = span[start:end]
                # A character that is not there costs 10 more than the worst token.
                unknown = min(SCORES.values()) - 10 if end - start == 1 else -math.inf
                total = best[start][0] + SCORES.get(piece, unknown)
                if total > best[end][0]:
                    best[end] = (total, [*best[start][1], piece])
        ids += itertools.chain(*map(in_bytes, best[-1][1]))
    return ids


@pytest.mark.parametrize("prefix_space", [True, False])
def test_merges_follow_the_scores(tmp_path, prefix_space):
    path = in_gguf(tmp_path, add_space_prefix=prefix_space)
    found = interop.load(path).tokenizer
    rng = np.random.default_rng(0)
    letters = [*sorted(set(CORPUS)), "é", "日"]
    texts = TEXTS + ["".join(rng.choice(letters, 20)) for _ in range(50)]
    for text in texts:
        ids = found.encode(text).tolist()
        assert ids == merged(text, prefix_space), text
        decoded = found.decode(ids)
        assert decoded.replace(" ", "") == text.replace(" ", "")
        if "<user>" not in text:
            assert decoded == text
    assert (found.bos_id, found.eos_ids, found.vocab_size) == (1, (2,), SIZE)
    assert found.encode("cat", template=True).tolist() == [1, *found.encode("cat")]
    assert found.encode("the<s>cat", special=True).tolist().count(1) == 1


def test_the_unigram_model_takes_the_best_sum(tmp_path):
    # Scores of words far apart, so that no two ways to cut are equally good.
    scores = {token: -10.0 / len(token) - 0.01 * i for i, token in enumerate(SCORES)}
    path = in_gguf(tmp_path, "t5", scores=[scores.get(token, 0.0) for token, _, _ in ROWS])
    found = interop.load(path).tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.SCORES", scores)
        for text in [*TEXTS, *NAMES, "".join(NAMES)]:
            assert found.encode(text).tolist() == best_path(text), text
    assert found.encode("the</s>cat", special=True).tolist().count(2) == 1
    assert found.encode("cat", template=True).tolist() == [*found.encode("cat"), 2]
    single = in_gguf(tmp_path, "t5", remove_extra_whitespaces=True)
    found = interop.load(single).tokenizer
    assert found.encode("  the   cat ").tolist() == found.encode("the cat").tolist()


def test_what_is_put_around_a_text_is_what_the_file_says(tmp_path):
    path = in_gguf(tmp_path, add_bos_token=False, add_eos_token=True)
    found = interop.load(path).tokenizer
    assert found.encode("cat", template=True).tolist() == [*found.encode("cat"), 2]


@pytest.mark.parametrize(("kind", "bos"), [("llama", "text"), ("t5", "none")])
def test_a_text_is_judged_with_the_beginning_that_the_tokenizer_gives_it(tmp_path, kind, bos):
    """A tokenizer of T5's kind ends every text with a token, and begins none with one."""
    own = {} if kind == "llama" else {"bos_token_id": None}
    loaded = interop.load(in_gguf(tmp_path, kind, **own))
    assert protocol_of(loaded, JudgingSettings("nowhere")).bos == bos


def test_it_goes_out_with_the_model(tmp_path):
    loaded = interop.load(in_gguf(tmp_path))
    path = interop.export(tmp_path / "out", loaded)
    again = interop.load(path).tokenizer
    for text in TEXTS:
        assert again.encode(text).tolist() == loaded.tokenizer.encode(text).tolist()
        assert again.decode(again.encode(text)) == loaded.tokenizer.decode(again.encode(text))
    assert (again.bos_id, again.eos_ids) == (1, (2,))


def test_transformers_gives_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with its tokenizers")
    loaded = interop.load(in_gguf(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(interop.export(tmp_path / "out", loaded))
    for text in TEXTS:
        ours = loaded.tokenizer.encode(text, special=True, template=True)
        assert theirs(text)["input_ids"] == ours.tolist(), text


def changed(token):
    """The tokens with another one in place of the last but one."""
    return [*(own for own, _, _ in ROWS[:-2]), token, ROWS[-1][0]]


def test_a_unigram_model_of_long_tokens_is_refused_before_it_is_built(tmp_path):
    # The package frees it by a recursion over the characters, which ends the process.
    pieces = [["<unk>", 0.0], ["a" * 400_000, -1.0]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"unk_id": 0, "vocab": pieces}}))
    with pytest.raises(InputError, match="a token of 400,000 characters, and at most 10,000"):
        tokenizer_folder.from_path(path, {}, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scores": None}, f"has {SIZE} tokens with 0 scores"),
        ({"scores": [0.0] * 5}, f"has {SIZE} tokens with 5 scores and {SIZE} kinds"),
        ({"scores": [math.nan] * SIZE}, "a token whose score is not finite"),
        ({"unknown_token_id": SIZE}, f"{SIZE} as the id of unknown tokens, which must be below"),
        ({"eos_token_id": SIZE}, f"eos_token_id in .* must be an id .*, got {SIZE}"),
        ({"bos_token_id": "<s>"}, "bos_token_id in .* must be an id .*, got '<s>'"),
        ({"tokens": None}, "lacks the tokens of its tokenizer"),
        ({"tokens": changed("</s>")}, f"token '</s>' twice, as ids 2 and {SIZE - 2}; give the"),
        ({"tokens": changed("a" * 20_000)}, "a token of 20,000 characters, and at most 10,000"),
        ({"token_type": [1] * (SIZE - 1) + [7]}, "token_type .* from 1 to 6, got 7"),
        ({"token_type": [-1] * SIZE}, "token_type .* from 1 to 6, got -1"),
        ({"add_space_prefix": "no"}, "add_space_prefix' = 'no', of the wrong type"),
        ({"add_bos_token": 0}, "add_bos_token' = 0, of the wrong type"),
        ({"add_eos_token": "yes"}, "add_eos_token' = 'yes', of the wrong type"),
        ({"add_bos_token": True, "bos_token_id": None}, "begins every text, and has none"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_damaged_vocabulary_is_refused(tmp_path, kind, changes, sentence):
    path = in_gguf(tmp_path, kind, **changes)
    with pytest.raises(InputError, match=sentence) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)
