"""Which weights of a pretrained model are pruned, tracked or adapted: by rules and blocks."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_tiny
import pytest
from safetensors.numpy import load_file, save_file

from swe_prune import cli, interop, tree
from swe_prune.errors import InputError
from swe_prune.pretrained import choice, tracked

QUICK = ["--window=32", "--eval-windows=4", "--new-tokens=2"]
KERNELS = {
    f"{part}/kernel"
    for part in ("attention/query", "attention/key", "attention/value", "attention/out",
                 "mlp/gate", "mlp/up", "mlp/down")
}  # fmt: skip


def params(layers=4):
    block = {
        "attention": {n: {"kernel": jnp.ones((2, 2))} for n in ("query", "key", "value", "out")},
        "mlp": {n: {"kernel": jnp.ones((2, 2))} for n in ("gate", "up", "down")},
        "mlp_norm": {"scale": jnp.ones(2)},
    }
    ends = {"embedding": {"embedding": jnp.ones((3, 2))}, "head": {"kernel": jnp.ones((2, 3))}}
    return {**{f"block_{i}": block for i in range(layers)}, **ends}


def chosen(*args, layers=4, **rules):
    marks = choice.prunable(params(layers), *args, **rules)
    return {name for name, mark in tree.named_leaves(marks) if mark}


def of_blocks(blocks, kernels=frozenset(KERNELS)):
    return {f"block_{i}/{kernel}" for i in blocks for kernel in kernels}


@pytest.mark.parametrize(
    "text", ["0:2", ":2", "2:", "-1:", ":-1", "-4:4", ":", " 1:3 ", "0:4", "-3:-1", "10:12"]
)
def test_blocks_are_a_python_slice(text):
    ends = [int(end) if end.strip() else None for end in text.split(":")]
    layers = 12 if text == "10:12" else 4
    assert chosen(blocks=text, layers=layers) == of_blocks(range(layers)[slice(*ends)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0:5", r"leaves the model's blocks, 0 to 3; give ends from -4 to 4"),
        ("-5:", r"leaves the model's blocks"),
        ("7:", r"leaves the model's blocks"),
        ("3:1", r"has none of the model's blocks"),
        ("4:", r"has none of the model's blocks"),
        ("2", r"must be a range START:STOP as a Python slice, such as .*, got '2'"),
        ("0:4:2", r"must be a range"),
        ("a:b", r"must be a range"),
        ("", r"must be a range"),
        ("1.0:2", r"must be a range"),
        ("0-15", r"must be a range"),
    ],
)
def test_blocks_that_are_none_of_the_model_are_refused(text, said):
    with pytest.raises(InputError, match=said) as caught:
        chosen(blocks=text)
    assert "\n" not in str(caught.value)


def test_rules_choose_among_the_weights_that_are_prunable_by_default():
    assert chosen() == of_blocks(range(4))
    assert chosen(include=[r"/mlp/"]) == {n for n in of_blocks(range(4)) if "/mlp/" in n}
    # An exclude rule leaves embeddings and the head dense too.
    assert chosen(exclude=["down"]) == {n for n in of_blocks(range(4)) if "down" not in n}
    assert chosen(["up", "down"], ["block_0"], "-3:3") == {
        f"block_{i}/mlp/{name}/kernel" for i in (1, 2) for name in ("up", "down")
    }


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"include": ["up_proj"]}, "include rule 'up_proj' matches no weight; correct the rule"),
        ({"exclude": ["up_proj"]}, "exclude rule 'up_proj' matches no weight; correct the rule"),
        ({"include": ["up", "embed"]}, r"rule 'embed' matches only .*'embedding/embedding' \(emb"),
        ({"include": ["("]}, "is not a regular expression"),
        ({"include": ["up"], "exclude": ["mlp"]}, "no weight is prunable under include up and ex"),
        ({"include": ["block_3"], "blocks": "0:2"}, "under include block_3 and blocks 0:2; widen"),
    ],
)
def test_rules_that_choose_nothing_are_refused(rules, said):
    with pytest.raises(InputError, match=said):
        chosen(**rules)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


def run(place, command, out, *more, model=None):
    texts = [f"--evaluation={place.held_out}"]
    texts += [f"--calibration={place.train}" if command == "prune" else f"--text={place.train}"]
    if command == "prune":
        texts += ["--calibration-windows=4", "--calibration-window=32"]
    else:
        texts += ["--train-window=32", "--batch=2"]
    return cli.main(
        [command, f"--model={model or place.model}", f"--out={out}", *QUICK, *texts, *more]
    )


def pruned(folder):
    """Names of the weights that have a mask."""
    return {
        name for name, leaf in tree.named_leaves(interop.read_masks(folder)) if leaf is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_prune_takes_from_the_chosen_weights_only_and_records_the_rules(
    place, tmp_path, capsys, criterion
):
    out = tmp_path / "out"
    more = ["--blocks=1:", "--include=/mlp/", "--include=/attention/", "--exclude=down"]
    assert run(place, "prune", out, f"--criterion={criterion}", "--sparsity=0.5", *more) == 0
    wanted = of_blocks([1], KERNELS - {"mlp/down/kernel"})
    assert pruned(out) == wanted
    before, after = (dict(tree.named_leaves(interop.load(p).params)) for p in (place.model, out))
    for name, leaf in before.items():
        assert (name in wanted) == (not np.array_equal(leaf, after[name])), name
    record = interop.read_record(out)
    rules = {"include": ["/mlp/", "/attention/"], "exclude": ["down"], "blocks": "1:"}
    assert record["rules"] == rules
    assert record["sparsity"] == pytest.approx(0.5, abs=0.01)
    captured = capsys.readouterr()
    assert "Weights chosen by include /mlp/, /attention/ and exclude down and" in captured.err
    # A fine-tuning of it keeps the record.
    if criterion == "magnitude":
        tuned = tmp_path / "tuned"
        assert run(place, "finetune", tuned, "--steps=1", "--warmup=1", model=out) == 0
        assert interop.read_record(tuned)["rules"] == rules
        assert pruned(tuned) == wanted


def test_plan_shows_the_choice_without_reading_weights_or_texts(place, tmp_path, capsys):
    config = json.loads((place.model / "config.json").read_text())
    more = ["--criterion=wanda", "--sparsity=0.5", "--blocks=0:1", "--exclude=down"]
    assert cli.main(["plan", f"--model={place.model}", *more]) == 0
    printed = capsys.readouterr().out
    assert "Weights chosen by exclude down and blocks 0:1: 6 of" in printed
    rows = {row[0]: row[-1] for line in printed.splitlines() if (row := line.split("│")[1:-1])}
    verdicts = {name.strip(): verdict.strip() for name, verdict in rows.items()}
    assert verdicts["block_0/mlp/up/kernel"] == "prunable"
    assert verdicts["block_0/mlp/down/kernel"] == "dense: not chosen"
    assert verdicts["block_1/mlp/up/kernel"] == "dense: not chosen"
    assert verdicts["embedding/embedding"] == "dense: embedding"
    width, hidden = config["hidden_size"], config["intermediate_size"]
    count = 3 * width * width + 2 * width * hidden  # keys and values have half the heads
    assert f"{count:,} of " in printed
    assert f"about {count // 2:,} would go" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("prune", ["--blocks=0:3"], "blocks '0:3' leaves the model's blocks, 0 to 1"),
        ("prune", ["--include=up_proj"], "include rule 'up_proj' matches no weight"),
        ("plan", ["--exclude=nothing"], "exclude rule 'nothing' matches no weight"),
        ("plan", ["--pattern=3:5"], "not a multiple of m = 5; exclude it or choose another m"),
        ("finetune", ["--blocks=0:1"], "--blocks chooses the weights to track or to adapt; give"),
        ("finetune", ["--track", "--blocks=2:"], "has none of the model's blocks"),
        ("finetune", ["--lora-rank=2", "--exclude=zzz"], "exclude rule 'zzz' matches no weight"),
    ],
)
def test_a_choice_that_is_none_is_refused_before_any_work(
    place, tmp_path, capsys, command, more, said
):
    if command != "finetune":
        more = [*more, "--criterion=magnitude"]
        more += [] if "--pattern=3:5" in more else ["--sparsity=0.5"]
    if command == "plan":
        assert cli.main(["plan", f"--model={place.model}", *more]) == 2
    else:
        assert run(place, command, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_finetuning_tracks_the_chosen_weights_and_prune_takes_those(place, tmp_path, capsys):
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    more = ["--track", "--steps=2", "--track-every=1", "--warmup=1", "--blocks=:1"]
    assert run(place, "finetune", tuned, *more) == 0
    stats = tracked.read(tuned, interop.load(tuned).params)
    assert stats is not None
    assert {n for n, x in tree.named_leaves(stats.buffers["late_mean"]) if x is not None} == (
        of_blocks([0])
    )
    swe = ["--criterion=swe", "--sparsity=0.5"]
    assert run(place, "prune", out, *swe, model=tuned) == 0
    assert pruned(out) == of_blocks([0])
    narrower = ["--include=/mlp/"]
    assert run(place, "prune", tmp_path / "narrow", *swe, *narrower, model=tuned) == 0
    assert pruned(tmp_path / "narrow") == {n for n in of_blocks([0]) if "/mlp/" in n}
    capsys.readouterr()
    assert run(place, "prune", tmp_path / "no", *swe, "--blocks=1:", model=tuned) == 2
    assert "tracks none of the chosen weights, but those of blocks :1;" in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_are_of_the_chosen_weights(place, tmp_path):
    out = tmp_path / "out"
    more = ["--lora-rank=2", "--steps=2", "--warmup=1", "--learning-rate=1e-2", "--blocks=1:"]
    assert run(place, "finetune", out, *more, "--exclude=attention") == 0
    before, after = (dict(tree.named_leaves(interop.load(p).params)) for p in (place.model, out))
    changed = {name for name, leaf in before.items() if not np.array_equal(leaf, after[name])}
    assert changed == {name for name in of_blocks([1]) if "/mlp/" in name}


@pytest.mark.slow
def test_commands_take_a_prefix_and_a_tokenizer_and_say_what_is_not_read(place, tmp_path, capsys):
    path = tmp_path / "compiled"
    shutil.copytree(place.model, path)
    weights = load_file(path / "model.safetensors")
    save_file({f"_orig_mod.{k}": v for k, v in weights.items()}, path / "model.safetensors")
    words = tmp_path / "words"
    words.mkdir()
    (path / "tokenizer.json").rename(words / "tokenizer.json")
    (path / "model.safetensors.index.json").write_text("{}")
    out = tmp_path / "out"
    more = ["--criterion=magnitude", "--sparsity=0.5", f"--tokenizer={words / 'tokenizer.json'}"]
    assert run(place, "prune", out, *more, model=path) == 2
    assert "give --prefix=_orig_mod. " in capsys.readouterr().err
    assert run(place, "prune", out, *more, "--prefix=_orig_mod.", model=path) == 0
    assert f"Note: {path} has both model.safetensors" in capsys.readouterr().err
    assert (out / "tokenizer.json").exists()
    common = [*QUICK, f"--evaluation={place.held_out}", f"--dense={path}"]
    assert cli.main(["evaluate", f"--model={out}", *common]) == 2
    assert cli.main(["evaluate", f"--model={out}", *common, "--dense-prefix=_orig_mod."]) == 0
    teacher = [f"--teacher={path}", "--teacher-prefix=_orig_mod.", "--steps=1", "--warmup=1"]
    assert run(place, "finetune", tmp_path / "tuned", *teacher, model=out) == 0
    assert jax.tree.leaves(interop.load(tmp_path / "tuned").params)
