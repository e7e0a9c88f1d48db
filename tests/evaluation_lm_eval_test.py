"""What lm_eval is told, against probabilities computed one request at a time from the logits."""

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.config import ModelConfig
from swe_prune.errors import InputError
from swe_prune.evaluation import GREEDY, generate
from swe_prune.evaluation import token_losses as losses
from swe_prune.interop import lm_eval as ours
from swe_prune.models import gpt

CONTEXT = 48
PIECES = [*"abcdefghijklmnopqrstuvwxyz .,?\n:", " th", "the", "he", " a", "an", "in", " cat", "at"]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The longest piece each time, so that text is cut otherwise where another text follows."""

    bos_id: int | None = 0
    eos_id: int | None = 1

    def encode(self, text):
        ids = []
        while text:
            piece = max((p for p in PIECES if text.startswith(p)), key=len)
            ids.append(PIECES.index(piece) + 2)
            text = text[len(piece) :]
        return np.array(ids, np.int32)

    def decode(self, ids):
        return "".join("" if i < 2 else PIECES[i - 2] for i in ids)


TOKENIZER = Pieces()


@pytest.fixture(scope="module")
def small():
    config = ModelConfig(
        layers=1, heads=2, width=16, context=CONTEXT, positions="rope", norm="rms", gated=True
    )
    model = gpt.build(config, len(PIECES) + 2)
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda w: 5 * w, params)


@pytest.fixture(scope="module")
def answers(small):
    return ours.Answers(*small, TOKENIZER, batch=3, add_bos=False)


def asked(*args):
    return SimpleNamespace(args=args)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
    return jax.jit(model.apply)({"params": params}, tokens)


def naive(small, tokens, count):
    """The log-probability in float64 of the last `count` tokens, and whether argmax gives them."""
    filled = np.zeros((1, CONTEXT), np.int32)
    filled[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(logits_of(*small, filled), np.float64)[0, : len(tokens) - 1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.asarray(tokens[1:])
    chosen = log_p[np.arange(len(wanted)), wanted][-count:]
    return chosen.sum(), bool((logits.argmax(-1) == wanted)[-count:].all())


def ids(text):
    return TOKENIZER.encode(text).tolist()


PAIRS = [
    ("the cat", " at", ids("the cat at"), 2),
    ("a", "n inn", ids("an inn"), len(ids("an inn")) - 1),  # cut as one: "an", not "a" and "n"
    ("the ", "theme", ids("the theme"), len(ids(" theme"))),  # the blank goes to what follows
    ("", "the cat", [0, *ids("the cat")], 2),
    ("  \n", "cat", [0, *ids("  \ncat")], len(ids("  \ncat"))),
    ("q" * 60, "zz", [*ids("q" * 60), *ids("zz")][-(CONTEXT + 1) :], 2),
    ("b", "c" * CONTEXT, ids("b" + "c" * CONTEXT), CONTEXT),
]


def test_continuations_have_the_probability_of_the_naive_sum(small, answers):
    found = answers.loglikelihood([asked(*pair[:2]) for pair in PAIRS])
    for (context, continuation, tokens, count), (log_p, greedy) in zip(PAIRS, found, strict=True):
        expected, expected_greedy = naive(small, tokens, count)
        np.testing.assert_allclose(log_p, expected, rtol=1e-5, err_msg=context + continuation)
        assert greedy == expected_greedy
    assert not any(greedy for _, greedy in found)


def test_a_greedy_continuation_is_called_so(small, answers):
    prompt = "the cat"
    (tokens,) = generate(*small, [ids(prompt)], 1, sampling=GREEDY, seed=0).tokens
    text = TOKENIZER.decode(tokens)
    others = [c for c in "xyz" if c != text]
    found = answers.loglikelihood([asked(prompt, c) for c in [text, *others]])
    assert [greedy for _, greedy in found] == [True] + [False] * len(others)


def test_a_first_token_is_put_before_contexts_that_want_one(small):
    with_bos = ours.Answers(*small, TOKENIZER, batch=2, add_bos=True)
    found = with_bos.loglikelihood([asked("the cat", " at"), asked("", "at")])
    for (log_p, _), (tokens, count) in zip(
        found, [([0, *ids("the cat at")], 2), ([0, *ids("at")], 1)], strict=True
    ):
        np.testing.assert_allclose(log_p, naive(small, tokens, count)[0], rtol=1e-5)
    no_bos = ours.Answers(*small, Pieces(bos_id=None), batch=2, add_bos=False)
    (log_p, _), *_ = no_bos.loglikelihood([asked("", "at")])
    np.testing.assert_allclose(log_p, naive(small, [1, *ids("at")], 1)[0], rtol=1e-5)


@pytest.mark.parametrize("length", [0, 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 2 * CONTEXT + 17])
def test_a_whole_text_is_scored_once_in_windows(small, answers, length):
    text = ("zebra quit my box, " * 20)[:length]
    tokens, expected = ids(text), 0.0
    for start in range(0, len(tokens), CONTEXT):
        part = tokens[start : start + CONTEXT]
        stop = start + len(part)
        before = [0] if start == 0 else tokens[:start]
        window = [*before, *part][-(CONTEXT + 1) :] if start else [0, *part]
        assert window[-1] == tokens[stop - 1]
        expected += naive(small, window, len(part))[0]
    (found,) = answers.loglikelihood_rolling([asked(text)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_few_programs_serve_requests_of_all_lengths(small, answers):
    losses.token_losses.clear_cache()
    requests = [asked("a" * n, "b") for n in range(1, 60)]
    found = answers.loglikelihood(requests)
    assert losses.token_losses._cache_size() <= 2  # 32 and 48
    for request, (log_p, _) in list(zip(requests, found, strict=True))[::13]:
        tokens = ids("".join(request.args))[-(CONTEXT + 1) :]
        np.testing.assert_allclose(log_p, naive(small, tokens, 1)[0], rtol=1e-5)


def greedy_text(small, prompt, new):
    found = generate(*small, [ids(prompt)] * 3, new, sampling=GREEDY, seed=0, eos_id=1)
    return TOKENIZER.decode(found.tokens[0])


def test_answers_stop_before_a_stop_string(small, answers):
    contexts = ["the", "a cat in", "quiz?", "he", "no"]
    whole = [greedy_text(small, context, 20) for context in contexts]
    free = answers.generate_until([asked(c, {"until": [], "max_gen_toks": 20}) for c in contexts])
    assert free == whole
    stop = whole[0][3:5]
    settings = {"until": [stop, "never"], "max_gen_toks": 20}
    found = answers.generate_until([asked(c, settings) for c in contexts])
    assert found == [text.split(stop)[0] for text in whole]
    assert found[0] == whole[0][: whole[0].index(stop)]
    (found,) = answers.generate_until([asked("the", {"until": stop, "max_new_tokens": 20})])
    assert found == whole[0].split(stop)[0]


def test_requests_of_several_settings_keep_their_places(small, answers):
    mixed = [
        asked("the", {"max_gen_toks": 8}),
        asked("a cat in", {"max_gen_toks": 20}),
        asked("he", {"max_gen_toks": 8}),
    ]
    assert answers.generate_until(mixed) == [
        greedy_text(small, request.args[0], request.args[1]["max_gen_toks"]) for request in mixed
    ]


def test_a_long_context_loses_its_beginning(small, answers):
    (found,) = answers.generate_until([asked("z" * 70 + "the", {"max_gen_toks": 8})])
    kept = ids("z" * 70 + "the")[-(CONTEXT - 8) :]
    (tokens,) = generate(*small, [kept], 8, sampling=GREEDY, seed=0, eos_id=1).tokens
    assert found == TOKENIZER.decode(tokens)


def test_sampling_is_asked_for_and_seeded(small):
    def drawn(seed, **settings):
        lm = ours.Answers(*small, TOKENIZER, batch=3, add_bos=False, seed=seed)
        return lm.generate_until([asked("the", {"max_gen_toks": 20, **settings})] * 3)

    first = drawn(0, do_sample=True, temperature=2.0)
    assert drawn(0, do_sample=True, temperature=2.0) == first
    assert drawn(1, do_sample=True, temperature=2.0) != first
    assert len({*first}) == 3
    assert drawn(0, temperature=2.0) == first
    greedy = [greedy_text(small, "the", 20)] * 3
    assert drawn(0, temperature=2.0, do_sample=False) == greedy
    assert drawn(0, do_sample=True, top_k=1) == greedy
    assert drawn(0, temperature=0.0) == greedy


@pytest.mark.parametrize(
    ("question", "args", "sentence"),
    [
        ("loglikelihood", ("the", ""), "continuation '' has 0 tokens"),
        ("loglikelihood", ("the", "x" * 49), "has 49 tokens .* 1 to 48"),
        ("generate_until", ("the", {"num_beams": 4}), "'num_beams' is not supported"),
        ("generate_until", ("the", {"max_gen_toks": 48}), "48 new tokens leave no room"),
        ("generate_until", ("the", {"do_sample": True, "temperature": 0.0}), "got 0.0"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(answers, question, args, sentence):
    # A default of 256 new tokens is refused as the 48 are, so it is not what the test meets.
    if question == "generate_until" and "max_gen_toks" not in args[1]:
        args = (args[0], {**args[1], "max_gen_toks": 4})
    with pytest.raises(InputError, match=sentence):
        getattr(answers, question)([asked(*args)])


@pytest.mark.parametrize(
    ("tokenizer", "settings", "sentence"),
    [
        (Pieces(None, None), {}, "begins or ends a text"),
        (Pieces(None), {"add_bos": True}, "no token that begins a text"),
        (TOKENIZER, {"batch": 0}, "batch = 0"),
        (TOKENIZER, {"max_length": CONTEXT + 1}, "max_length = 49 .* context of 48"),
        (TOKENIZER, {"max_length": 1}, "max_length = 1 "),
    ],
)
def test_settings_that_cannot_be_are_refused(small, tokenizer, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ours.Answers(*small, tokenizer, **({"batch": 2, "add_bos": False} | settings))


def test_a_missing_lm_eval_is_one_sentence(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'swe-prune\[lm-eval\]'") as error:
        ours.harness(*small, TOKENIZER, batch=2, add_bos=False)
    assert "\n" not in str(error.value)


# What follows needs lm_eval, which is not among the packages of the tests.

CHOICES = [
    {"question": "the cat", "choices": [" at", " in", " the"], "gold": 1},
    {"question": "a", "choices": [" cat", "n inn", " he"], "gold": 0},
    {"question": "he", "choices": ["ad", " the cat", "."], "gold": 2},
]
TEXTS = [{"text": "the cat in the hat, " * 7}, {"text": "a bed"}]
PROMPTS = [{"prompt": "the", "answer": ""}, {"prompt": "a cat in", "answer": ""}]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "prompts": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def evaluated(small, tmp_path, monkeypatch):
    """The results of the three tasks, from files alone."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval to run a task of its harness")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    stop = greedy_text(small, "the", 10)[4:6]
    prompts = [{**p, "answer": greedy_text(small, p["prompt"], 10).split(stop)[0]} for p in PROMPTS]
    for name, rows in (("choices", CHOICES), ("texts", TEXTS), ("prompts", prompts)):
        data = tmp_path / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\nnum_fewshot: 0\n"
            f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
            + TASKS[name].replace("STOP", stop)
        )
    lm = ours.harness(*small, TOKENIZER, batch=3, add_bos=False)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )


@pytest.mark.filterwarnings("default")  # lm_eval's own
def test_lm_eval_runs_tasks_from_local_files(small, evaluated):
    results = evaluated["results"]
    scores = []
    for row in CHOICES:
        before = ids(row["question"])
        whole = [ids(row["question"] + choice) for choice in row["choices"]]
        scores.append([naive(small, tokens, len(tokens) - len(before))[0] for tokens in whole])
    right = [int(np.argmax(s)) == row["gold"] for s, row in zip(scores, CHOICES, strict=True)]
    assert results["choices"]["acc,none"] == pytest.approx(np.mean(right))
    for sample, expected in zip(evaluated["samples"]["choices"], scores, strict=True):
        found = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    nats = 0.0
    for row in TEXTS:
        tokens = ids(row["text"])
        for start in range(0, len(tokens), CONTEXT):
            stop = min(start + CONTEXT, len(tokens))
            window = [0, *tokens[:stop]] if start == 0 else tokens[stop - CONTEXT - 1 : stop]
            nats -= naive(small, window, stop - start)[0]
    size = sum(len(row["text"]) for row in TEXTS)
    np.testing.assert_allclose(
        results["texts"]["bits_per_byte,none"], nats / size / np.log(2), rtol=1e-5
    )
    assert results["prompts"]["exact_match,none"] == 1


@pytest.mark.filterwarnings("default")
def test_the_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils", reason="pip install lm-eval to compare with it")
    for length in range(0, 40):
        tokens = list(range(1, length + 1))
        theirs = [
            (a + b, len(b))
            for a, b in map(
                utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 0, 7, 1)
            )
        ]
        assert list(ours.rolling_windows(tokens, 0, 7)) == theirs
