"""`cut` of a pretrained model, as a user types it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_tiny
import pytest
from interop_tiny import assert_same_params, folder
from pretrained_commands_test import QUICK, finetune, prune

from swe_prune import cli, interop, masks, structured, tree
from swe_prune.models import gpt
from swe_prune.pretrained import cut as cut_lib


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("safetensors")
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


def cut(place, out, *more, model=None):
    return cli.main(
        ["cut", f"--model={model or place.model}", f"--out={out}", *QUICK,
         f"--calibration={place.train}", f"--evaluation={place.held_out}", *more]
    )  # fmt: skip


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("units", "criterion", "more", "wanted"),
    [
        ("neurons", "magnitude", ["--sparsity=0.25"], (2, 48, 4, 2)),
        ("heads", "taylor", ["--sparsity=0.5", "--reduce=mean"], (2, 64, 2, 1)),
        ("layers", "wanda", ["--budget=params=20000", "--reduce=sum"], (1, 64, 4, 2)),
    ],
)
def test_cut_writes_a_smaller_model_and_its_record(
    place, tmp_path, capsys, units, criterion, more, wanted
):
    out = tmp_path / "cut"
    assert cut(place, out, f"--units={units}", f"--criterion={criterion}", *more) == 0
    dense, small = interop.load(place.model), interop.load(out)
    config = small.config
    assert (config.layers, config.hidden_size, config.heads, config.key_heads) == wanted
    record = interop.read_record(out)
    said = record["cut"]
    assert (said["units"], said["criterion"]) == (units, criterion)
    assert said["cost"]["cut"]["parameters"] == tree.size(small.params)
    # The model is the one that the indices cut out of the dense one.
    kept = json.loads((out / "kept_units.json").read_text())["kept"]
    keep = {name: np.array(some) for name, some in kept.items()}
    groups = structured.groups(dense.config, units)
    again = structured.cut(dense.params, groups, keep)
    jax.tree.map(np.testing.assert_array_equal, again, small.params)
    assert record["evaluation"]["cut"]["kl_to_dense"] > 0
    assert (record["calibration"] is None) == (criterion in ("magnitude", "random"))
    printed = capsys.readouterr().out
    assert f"{record['evaluation']['cut']['perplexity']:.2f}" in printed
    assert f"{tree.size(dense.params):,} -> {tree.size(small.params):,} parameters" in printed


@pytest.mark.slow
def test_a_cut_model_is_tuned_pruned_evaluated_and_cut_again(place, tmp_path, capsys):
    one, tuned, pruned, two = (tmp_path / name for name in ("one", "tuned", "pruned", "two"))
    neurons = ["--units=neurons", "--criterion=magnitude", "--sparsity=0.5"]
    assert cut(place, one, *neurons) == 0
    steps = ["--steps=2", "--learning-rate=3e-3", "--warmup=2"]
    about = json.loads((one / interop.RECORD).read_text())
    strange = shutil.copytree(one, tmp_path / "strange")
    (strange / interop.RECORD).write_text(json.dumps(about | {"evaluation": 3}))
    cut_lib.carry_on(strange, tmp_path, {"a": 1})
    assert interop.read_record(tmp_path)["evaluation"] == {"a": 1}
    assert finetune(place, tuned, *steps, f"--teacher={place.model}", model=one) == 0
    dense = ["--window=32", "--eval-windows=8", f"--evaluation={place.held_out}"]
    assert cli.main(["evaluate", f"--model={one}", f"--dense={place.model}", *dense]) == 0
    recorded = interop.read_record(one)["evaluation"]["cut"]
    assert f"{recorded['kl_to_dense']:.4f}" in capsys.readouterr().out
    carried = interop.read_record(tuned)
    assert carried["cut"] == interop.read_record(one)["cut"]
    assert carried["evaluation"]["finetuned"]["perplexity"] > 0
    assert prune(place, pruned, "--criterion=magnitude", "--sparsity=0.5", model=tuned) == 0
    # Masks are cut with the model that has them.
    layers = ["--units=layers", "--criterion=magnitude", "--sparsity=0.5"]
    assert cut(place, two, *layers, model=pruned) == 0
    small, mask = interop.load(two), interop.read_masks(two)
    assert (small.config.layers, small.config.hidden_size) == (1, 32)
    assert masks.zeros(small.params, mask) == masks.summary(mask).pruned > 0
    assert cut(place, tmp_path / "no", *neurons, "--restore", model=pruned) == 2
    record = interop.read_record(two)
    assert record["recipe"]["criterion"] == "magnitude"
    assert record["evaluation"]["how"]["units"] == "layers"
    logits = gpt.build(small.config, small.vocab_size).apply(
        {"params": small.params}, jnp.ones((1, 4), jnp.int32)
    )
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.slow
def test_a_model_without_some_layers_learns_the_outputs_of_its_teachers(place, tmp_path, capsys):
    short, tuned, second = tmp_path / "short", tmp_path / "tuned", tmp_path / "second.txt"
    second.write_text("Numbers: " + " ".join(map(str, range(900))))
    assert cut(place, short, "--units=layers", "--criterion=magnitude", "--sparsity=0.5") == 0
    more = ["--steps=3", "--learning-rate=3e-3", "--warmup=1", "--features=1", "--distillation=0.9",
            "--final-distillation=0.5", f"--second-evaluation={second}"]  # fmt: skip
    for without_teacher in (more, ["--steps=3", "--final-distillation=0"]):
        assert finetune(place, tuned, *without_teacher, model=short) == 2
    assert "give --teacher=PATH with it" in capsys.readouterr().err
    assert finetune(place, tuned, *more, f"--teacher={place.model}", model=short) == 0
    found = interop.read_record(tuned)["evaluation"]["second"]
    printed = " ".join(capsys.readouterr().out.split())
    line = f"perplexity {found['before']:.2f} before, {found['finetuned']:.2f} after"
    assert line in printed
    worse = np.log(found["finetuned"]) > np.log(found["before"]) + 0.005
    assert ("made the model worse on this text" in printed) == worse
    # Without the file of kept layers nobody knows which outputs go together.
    (short / "kept_units.json").unlink()
    assert finetune(place, tmp_path / "no", *more, f"--teacher={place.model}", model=short) == 2
    assert "no kept_units.json says which" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "criterion"),
    [
        ("neurons", "mutual_information"),
        ("heads", "input_norm_product"),
        ("layers", "block_influence"),
    ],
)
def test_criteria_of_units_and_the_refit(place, tmp_path, capsys, units, criterion):
    out, how = tmp_path / "cut", [f"--units={units}", f"--criterion={criterion}", "--sparsity=0.5"]
    more = [] if units == "layers" else ["--restore"]
    assert cut(place, out, *how, *more) == 0
    record = interop.read_record(out)
    assert record["calibration"]["windows"] == 8
    refits = record["cut"]["restored"]
    assert len(refits) == (0 if units == "layers" else 2)
    assert all(one["refitted"] and one["after"] < one["before"] for one in refits)
    assert ("The refit took" in capsys.readouterr().out) == bool(refits)
    kept = json.loads((out / "kept_units.json").read_text())
    if criterion == "mutual_information":  # whatever went has a partner that was there
        for group, gone in kept["removed"].items():
            units_gone = [one["unit"] for one in gone]
            assert sorted([*kept["kept"][group], *units_gone]) == list(range(64))
            for at, one in enumerate(gone):
                assert one["partner"] is None or one["partner"] not in units_gone[:at]


def test_a_gguf_file_is_cut_as_the_folder(place, tmp_path):
    pytest.importorskip("gguf", reason="writes GGUF files")
    from interop_gguf_writer import finish, write

    file = tmp_path / "model.gguf"
    finish(write(file, interop.load(place.model)))
    how = ["--units=heads", "--criterion=magnitude", "--sparsity=0.5"]
    assert cut(place, tmp_path / "one", *how, f"--tokenizer={place.model}", model=file) == 0
    assert cut(place, tmp_path / "two", *how) == 0
    one, two = (interop.load(tmp_path / name).params for name in ("one", "two"))
    assert_same_params(one, two)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--units=neuron", "--criterion=magnitude", "--sparsity=0.5"],
         "--units must be one of neurons, heads, query_heads, layers, got 'neuron'"),
        (["--units=neurons", "--criterion=magnitud", "--sparsity=0.5"], "did you mean 'magnitude'"),
        (["--units=heads", "--criterion=block_influence", "--sparsity=0.5"], "scores layers, not"),
        (["--units=layers", "--criterion=magnitude", "--sparsity=0.5", "--restore"],
         "whole layers have none"),
        (["--units=neurons", "--criterion=activation_norm", "--sparsity=0.5", "--option=a=1"],
         "has no options"),
        (["--units=neurons", "--criterion=activation_norm", "--sparsity=0.5", "--reduce=sum"],
         "leave out reduce"),
        (["--units=neurons", "--criterion=magnitude"], "cut needs --sparsity or --budget"),
        (["--units=neurons", "--criterion=magnitude", "--sparsity=0.5", "--budget=params=9"],
         "both were given"),
        (["--units=neurons", "--criterion=magnitude", "--sparsity=1"], "[0, 1)"),
        (["--units=neurons", "--criterion=magnitude", "--sparsity=0.95"],
         "leaves 3 of the 64 units of group 'block_0/neurons', which multiple = 8 rounds to"),
        (["--units=neurons", "--criterion=magnitude", "--sparsity=0.5", "--multiple=128"],
         "64 units, which multiple = 128 rounds to nothing"),
        (["--units=heads", "--criterion=magnitude", "--sparsity=0.9"], "leaves 0 of the 2 units"),
        (["--units=neurons", "--criterion=magnitude", "--budget=params=100"], "cannot be met"),
        (["--units=neurons", "--criterion=magnitude", "--budget=bytes=100"], "cannot be met"),
        (["--units=neurons", "--criterion=magnitude", "--budget=latency=1e-9"], "cannot be met"),
        (["--units=neurons", "--criterion=magnitude", "--budget=latency=9", "--multiple=128"],
         "64 units, which multiple = 128 rounds to nothing"),
        (["--units=neurons", "--criterion=magnitude", "--budget=parms=100"], "NAME=NUMBER"),
        (["--units=neurons", "--criterion=magnitude", "--budget=params=x"], "above 0, got 'x'"),
        (["--units=neurons", "--criterion=swe", "--sparsity=0.5"], "finetune --track"),
        (["--units=neurons", "--criterion=swe_curvature", "--sparsity=0.5"], "second moment"),
    ],
)  # fmt: skip
def test_bad_settings_get_one_sentence_before_a_weight_is_read(
    place, tmp_path, capsys, monkeypatch, arguments, said
):
    monkeypatch.delattr(interop.PretrainedSource, "read")
    assert cut(place, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_cannot_be_written_is_refused_before_work(place, tmp_path, capsys):
    path, _ = folder(tmp_path / "gpt2", "gpt2")
    heads = ["--units=heads", "--criterion=magnitude", "--sparsity=0.5"]
    assert cut(place, tmp_path / "out", *heads, model=path) == 2
    assert "width / heads, so a model with 2 heads of 4 and width 16" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert cut(place, tmp_path / "out", *heads) == 2
    assert "already exists" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
