"""`prune`, `finetune` and `evaluate` of a pretrained model, as a user types them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_tiny
import pytest

from swe_prune import cli, interop, masks, tree
from swe_prune.cli import parsing
from swe_prune.errors import InputError
from swe_prune.interop import hf_config
from swe_prune.pretrained import tracked
from swe_prune.recipe import checks

QUICK = [
    "--calibration-windows=8", "--calibration-window=32", "--window=32", "--eval-windows=8",
    "--new-tokens=4", "--prompt=You may",
]  # fmt: skip
TUNING = ["--window=32", "--eval-windows=8", "--new-tokens=4", "--train-window=32", "--batch=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("safetensors")
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


def prune(place, out, *more, model=None):
    return cli.main(
        ["prune", f"--model={model or place.model}", f"--out={out}", *QUICK,
         f"--calibration={place.train}", f"--evaluation={place.held_out}", *more]
    )  # fmt: skip


def finetune(place, out, *more, model=None):
    return cli.main(
        ["finetune", f"--model={model or place.model}", f"--out={out}", *TUNING,
         f"--text={place.train}", f"--evaluation={place.held_out}", *more]
    )  # fmt: skip


def zeros(params, mask):
    """How many weights the mask removes, all of them exactly 0."""
    removed = 0
    for (name, leaf), (_, kept) in zip(
        tree.named_leaves(params), tree.named_leaves(mask), strict=True
    ):
        if kept is not None:
            assert not np.any(np.asarray(leaf)[~np.asarray(kept)]), name
            removed += int((~np.asarray(kept)).sum())
    return removed


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("criterion", "more", "share"),
    [
        ("magnitude", ["--sparsity=0.5"], 0.5),
        ("magnitude", ["--pattern=2:4"], 0.5),
        ("random", ["--sparsity=0.25", "--scope=global"], 0.25),
        ("wanda", ["--sparsity=0.5"], 0.5),
        ("wanda", ["--pattern=2:4"], 0.5),
        ("wanda", ["--sparsity=0.5", "--at-once", "--scope=row"], 0.5),
        ("wanda", ["--sparsity=0.5", "--allocation=owl"], 0.5),
        ("sparsegpt", ["--sparsity=0.5", "--offload"], 0.5),
        ("taylor", ["--sparsity=0.5"], 0.5),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else str(value),
)
def test_prune_writes_a_model_with_its_zeros_and_its_record(
    place, tmp_path, capsys, criterion, more, share
):
    out = tmp_path / "pruned"
    assert prune(place, out, f"--criterion={criterion}", *more) == 0
    model, mask = interop.load(out), interop.read_masks(out)
    total = sum(kept.size for kept in jax.tree.leaves(mask))
    rows = sum(kept.shape[1] for kept in jax.tree.leaves(mask))  # Wanda rounds in each output
    assert zeros(model.params, mask) == pytest.approx(share * total, abs=rows)
    record = interop.read_record(out)
    asked = record["recipe"]
    assert criterion in (asked["criterion"], asked["method"])
    dense, pruned = record["evaluation"]["dense"], record["evaluation"]["pruned"]
    assert dense["perplexity"] < pretrained_tiny.VOCAB
    assert pruned["kl_to_dense"] > 0
    assert (record["calibration"] is None) == (criterion in ("magnitude", "random"))
    assert record["commit"] == interop.commit_of_code()
    printed = capsys.readouterr().out
    assert f"{pruned['perplexity']:.2f}" in printed
    assert "After 'You may':" in printed


def test_without_a_criterion_the_best_measured_is_done_and_said(
    place, tmp_path, capsys, monkeypatch
):
    out, checked, check = tmp_path / "pruned", [], checks._check_ranking
    monkeypatch.setattr(checks, "_check_ranking", lambda one: (checked.append(one), check(one)))
    assert prune(place, out, "--sparsity=0.5") == 0
    assert len(checked) == 1
    said = capsys.readouterr()
    lines = [
        line
        for line in (said.out + said.err).splitlines()
        if "criterion " in line or "--cr" in line
    ]
    assert len(lines) == 2
    assert "No criterion was given: weights are ranked by w² E[g²]^0.5 over all tensors" in lines[0]
    assert "--criterion=wanda needs no backward pass" in lines[1]
    asked = interop.read_record(out)["recipe"]
    assert (asked["criterion"], asked["scope"], asked["restore"]) == ("fisher", "global", "admm")
    mask = interop.read_masks(out)
    assert zeros(interop.load(out).params, mask) == masks.summary(mask).pruned
    assert masks.summary(mask).sparsity == pytest.approx(0.5, abs=1e-4)
    assert max(t.sparsity for t in masks.summary(mask).tensors.values()) <= 0.75
    # Groups of n:m, and models too large for a backward pass, go by ADMM alone.
    for more in (["--pattern=2:4"], ["--sparsity=0.5", "--offload"]):
        given = ["plan", f"--model={place.model}", *more]
        assert cli.main(given) == 0
        assert "ADMM chooses the mask" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_swe_needs_the_trajectory_that_a_tracked_finetuning_leaves(place, tmp_path, capsys):
    assert prune(place, tmp_path / "no", "--criterion=swe", "--sparsity=0.5") == 2
    assert "finetune --track" in capsys.readouterr().err
    tuned, out = tmp_path / "tuned", tmp_path / "pruned"
    assert finetune(place, tuned, "--track", "--steps=6", "--track-every=2") == 0
    model = interop.load(tuned)
    stats = tracked.read(tuned, model.params)
    assert stats is not None
    assert int(stats.count) == 3
    assert not (tmp_path / "tuned.work").exists()
    assert prune(place, out, "--criterion=swe", "--sparsity=0.5", model=tuned) == 0
    mask = interop.read_masks(out)
    for name, kept in tree.named_leaves(mask):
        if kept is not None:  # what was removed has the smallest late means
            mean = np.abs(np.asarray(dict(tree.named_leaves(stats.buffers["late_mean"]))[name]))
            assert mean[~np.asarray(kept)].max() <= mean[np.asarray(kept)].min()


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "more", [[], ["--lora-rank=2"], ["--teacher=MODEL", "--temperature=2"], ["--accumulate=2"]]
)
def test_finetuning_a_pruned_model_keeps_its_zeros_and_lowers_its_loss(place, tmp_path, more):
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    assert prune(place, pruned, "--criterion=magnitude", "--sparsity=0.6") == 0
    more = [one.replace("MODEL", str(place.model)) for one in more]
    steps = ["--steps=12", "--learning-rate=3e-3", "--warmup=2"]
    assert finetune(place, tuned, *steps, *more, model=pruned) == 0
    mask = interop.read_masks(tuned)
    assert zeros(interop.load(tuned).params, mask) == zeros(interop.load(pruned).params, mask) > 0
    record = interop.read_record(tuned)
    assert record["recipe"]["criterion"] == "magnitude"
    found = record["evaluation"]
    assert found["finetuned"]["nats_per_token"] < found["before"]["nats_per_token"]


@pytest.mark.slow
def test_a_finetuning_that_was_stopped_goes_on_to_the_same_weights(place, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--steps=8", "--checkpoint-every=2", "--learning-rate=1e-3"]
    assert finetune(place, whole, *more) == 0
    from swe_prune.pretrained import commands

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # as a kill after the last step, before the export
        patched.setattr(commands.interop, "export", stop)
        assert finetune(place, parts, *more) == 130
    assert not parts.exists()
    assert (tmp_path / "parts.work" / "checkpoints" / "8").is_dir()
    assert finetune(place, parts, *more) == 0
    one, two = (interop.load(path).params for path in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_another_finetuning_does_not_go_on_from_a_stopped_one(place, tmp_path, capsys):
    (tmp_path / "out.work").mkdir()
    texts = [f"--text={place.train}", f"--evaluation={place.held_out}"]
    begun = parsing.parse(
        ["finetune", f"--model={place.model}", "--out=x", *TUNING, *texts, "--steps=5"]
    ).settings
    (tmp_path / "out.work" / "settings.json").write_text(json.dumps(dataclasses.asdict(begun)))
    assert finetune(place, tmp_path / "out", "--steps=6") == 2
    assert "steps (5 there, 6 now)" in capsys.readouterr().err


def test_evaluate_compares_with_the_dense_model(place, tmp_path, capsys):
    pruned = tmp_path / "pruned"
    assert prune(place, pruned, "--criterion=magnitude", "--sparsity=0.5") == 0
    recorded = interop.read_record(pruned)["evaluation"]["pruned"]
    capsys.readouterr()
    more = ["--window=32", "--eval-windows=8", f"--evaluation={place.held_out}"]
    assert cli.main(["evaluate", f"--model={pruned}", f"--dense={place.model}", *more]) == 0
    printed = capsys.readouterr().out
    assert f"{recorded['perplexity']:.2f}" in printed
    assert f"{recorded['kl_to_dense']:.4f}" in printed


@pytest.mark.slow
def test_stored_dtypes_are_kept(place, tmp_path):
    half = tmp_path / "half"
    assert prune(place, half, "--criterion=wanda", "--sparsity=0.5", "--dtype=bfloat16") == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(interop.load(half).params)} == {
        np.dtype(jnp.bfloat16)
    }
    tuned = tmp_path / "tuned"
    assert finetune(place, tuned, "--steps=2", model=half) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(interop.load(tuned).params)} == {
        np.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--criterion=wandaa", "--sparsity=0.5"], "did you mean 'wanda'"),
        (["--criterion=wanda"], "got neither sparsity nor rate"),
        (["--criterion=wanda", "--sparsity=1.5"], "sparsity must be a number in [0, 1)"),
        (["--criterion=wanda", "--sparsity=0.6", "--pattern=2:4"], "make the two agree"),
        (["--criterion=wanda", "--pattern=2:4", "--allocation=owl"], "fixes the sparsity"),
        (["--criterion=wanda", "--sparsity=0.5", "--scope=row"], "--at-once"),
        (["--criterion=magnitude", "--sparsity=0.5", "--scope=all"],
         "--scope must be one of tensor, global, row, got 'all'"),
        (["--criterion=magnitude", "--sparsity=0.5", "--allocation=owls"], "did you mean 'owl'"),
        (["--criterion=magnitude", "--sparsity=0.5", "--option=x"], "NAME=VALUE"),
        (["--criterion=magnitude", "--sparsity=0.5", "--option=x=1"], "no option 'x'"),
        (["--criterion=magnitude_curvature", "--sparsity=0.5"], "second moment"),
        (["--criterion=magnitude", "--sparsity=0.5", "--sparsty=1"], "did you mean '--sparsity'"),
        (["--criterion=magnitude", "--sparsity=x"], "--sparsity must be a number, got 'x'"),
        (["--criterion=magnitude", "--sparsity=0.5", "--protocol=wiki"], "wikitext2"),
        (["--criterion=magnitude", "--sparsity=0.5", "--at-most=1.1"], "1.1"),
        (["--criterion=wanda", "--sparsity=0.5", "--calibration=nothing.txt"],
         "text 'nothing.txt' is neither an existing file nor"),
        (["--criterion=wanda", "--sparsity=0.5", "--calibration-windows=1000000"],
         "--calibration-windows = 1000000"),
        (["--criterion=wanda", "--sparsity=0.5", "--calibration-window=129"],
         "--calibration-window=129 does not fit the 128 tokens"),
        (["--criterion=wanda", "--sparsity=0.5", "--calibration-windows=-1"],
         "--calibration-windows must be an integer of at least 1, got -1"),
        (["--criterion=wanda", "--sparsity=0.5", "--calibration-window=0"], "--calibration-window"),
        (["--criterion=wanda", "--sparsity=0.5", "--calibration-batch=0"], "--calibration-batch"),
        (["--criterion=wanda", "--sparsity=0.5", "--eval-batch=0"], "--eval-batch"),
        (["--criterion=wanda", "--sparsity=0.5", "--eval-windows=0"], "--eval-windows"),
        (["--criterion=wanda", "--sparsity=0.5", "--window=0"], "--window"),
        (["--criterion=wanda", "--sparsity=0.5", "--new-tokens=0"], "--new-tokens"),
        (["--criterion=wanda", "--sparsity=0.5", "--at-most=nan"], "--at-most"),
        (["--criterion=wanda", "--sparsity=0.5", "--seed=-1"], "--seed"),
        (["--criterion=wanda", "--sparsity=nan"], "sparsity"),
        (["--criterion=wanda", "--sparsity=0.5", "--prefix=\0"], "NUL"),
        (["--criterion=admm", "--sparsity=0.5", "--at-once"], "--at-once has no effect with"),
        (["--pattern=2:4", "--at-once"], "--at-once has no effect with admm"),
        (["--criterion=magnitude", "--sparsity=0.5", "--offload"], "--offload has no effect with"),
        (["--criterion=wanda", "--sparsity=0.5", "--at-once", "--offload"], "--offload has no"),
    ],
)  # fmt: skip
def test_bad_settings_get_one_sentence_and_leave_nothing(place, tmp_path, capsys, arguments, said):
    assert prune(place, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == error.count("Calibrating") + 1
    assert list(tmp_path.iterdir()) == []


def test_calibration_on_the_evaluation_text_is_refused(place, tmp_path, capsys):
    more = ["--criterion=wanda", "--sparsity=0.5", f"--calibration={place.held_out}"]
    assert prune(place, tmp_path / "out", *more) == 2
    assert "evaluation text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps=0"], "--steps must be an integer of at least 1, got 0"),
        (["--steps=1" + "0" * 12], "--steps must be an integer of at least 1 and at most 2147"),
        (["--learning-rate=nan"], "--learning-rate must be a finite number above 0, got nan"),
        (["--learning-rate=inf"], "--learning-rate"),
        (["--learning-rate=-1"], "--learning-rate"),
        (["--weight-decay=-1"], "--weight-decay"),
        (["--warmup=-1"], "--warmup"),
        (["--checkpoint-every=-1"], "--checkpoint-every"),
        (["--lora-rank=0"], "--lora-rank"),
        (["--distillation=nan"], "--distillation"),
        (["--temperature=0"], "--temperature"),
        (["--batch=4", "--accumulate=3"], "does not divide"),
        (["--track", "--lora-rank=2"], "give one of both"),
        (["--track", "--steps=2", "--track-every=3"], "takes no snapshot"),
        (["--track", "--measure=late_men"], "late_mean"),
        (["--lora-alpha=2"], "give --lora-rank"),
        (["--measure=late_mean"], "--measure has no effect without --track; give --track with"),
        (["--track-every=5"], "--track-every has no effect without --track"),
        (["--masks=apply"], "--masks=apply needs a mask file"),
        (["--teacher=nowhere"], "does not exist"),
        (["--train-window=129"], "--train-window=129 does not fit the 128 tokens"),
    ],
)
def test_bad_finetuning_gets_one_sentence(place, tmp_path, capsys, more, said):
    assert finetune(place, tmp_path / "out", *more) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        (command, more, said)
        for more, said in [
            (["--protocol=wikitext3"], "wikitext2"),
            (["--window=1"], "window"),
            (["--window=129"], "context of 128"),
            (["--new-tokens=128"], "context of 128"),
            (["--prompt="], " is empty; give at least one token"),
            (["--evaluation=SHORT"], "for one window; give more text"),
        ]
        for command in ("prune", "cut", "finetune", "evaluate")
    ]
    + [
        ("finetune", more, said)
        for more, said in [
            (["--batch=2147483647"], "more than the arrays' 2^31"),
            (["--lora-rank=17"], "lower it to 16"),
            (["--lora-rank=1000000000"], "lower it to 16"),
            (["--include=mlp/down", "--lora-rank=33"], "lower it to 32"),
            (["--teacher=OTHER"], "cannot be compared"),
            (["--teacher=DEEPER", "--features=0.5"], "--features compares"),
            (["--teacher-prefix=x."], "give --teacher=PATH"),
            (["--temperature=2"], "give --teacher=PATH"),
            (["--text=SHORT"], "too few for a window with context = 32"),
            (["--second-evaluation=SHORT"], "for one window; give more text"),
            (["--out=BEGUN"], "begun with other settings"),
        ]
    ]
    + [
        ("evaluate", ["--dense=nowhere"], "does not exist"),
        ("evaluate", ["--dense=OTHER"], "cannot be compared"),
        ("evaluate", ["--dense-prefix=x."], "give --dense=PATH"),
        ("prune", ["--calibration=SHORT"], "more than the"),
        ("cut", ["--multiple=0"], "multiple"),
        ("cut", ["--calibration-batch=0"], "--calibration-batch"),
    ],
)
def test_options_are_refused_before_a_weight_is_read(
    place, tmp_path, capsys, monkeypatch, command, more, said
):
    short = tmp_path / "short.txt"
    short.write_text("Once.")
    (tmp_path / "begun.work").mkdir()
    (tmp_path / "begun.work" / "settings.json").write_text('{"steps": 7}')
    paths = {"SHORT": short, "BEGUN": tmp_path / "begun"}
    if {"--teacher=OTHER", "--dense=OTHER", "--teacher=DEEPER"} & set(more):
        changed = {"vocab_size": 330} if "OTHER" in more[0] else {"num_hidden_layers": 3}
        config = pretrained_tiny.CONFIG | changed
        family, config_of, size = hf_config.read_config(config)
        params = interop.abstract_params(config_of, size)
        made = interop.Pretrained(
            config_of, size, jax.tree.map(lambda x: jnp.zeros(x.shape), params), None, family,
            tmp_path, "safetensors", config,
        )  # fmt: skip
        paths["OTHER"] = paths["DEEPER"] = interop.export(tmp_path / "other", made)

    def read(*_, **__):
        raise AssertionError("a weight is read")

    monkeypatch.setattr(interop.PretrainedSource, "read", read)
    for name, path in paths.items():
        more = [one.replace(f"={name}", f"={path}") for one in more]
    out = [] if command == "evaluate" else [f"--out={tmp_path / 'out'}"]
    run = {
        "prune": [*QUICK, "--criterion=wanda", "--sparsity=0.5", f"--calibration={place.train}"],
        "cut": [*QUICK, "--criterion=activation_norm", "--units=neurons", "--sparsity=0.5",
                f"--calibration={place.train}"],
        "finetune": [*TUNING, f"--text={place.train}"],
        "evaluate": ["--window=32", "--new-tokens=4"],
    }  # fmt: skip
    given = [f"--model={place.model}", f"--evaluation={place.held_out}", *out, *run[command]]
    assert cli.main([command, *given, *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.work").exists()


def test_an_output_folder_that_exists_is_refused_before_work(place, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for run in (prune, finetune):
        more = ["--criterion=wanda", "--sparsity=0.5"] if run is prune else []
        assert run(place, out, *more) == 2
        assert "already exists" in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 240, "/proc/x"])
def test_an_output_folder_that_cannot_be_made_is_said_before_work(
    place, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.delattr(interop, "open_pretrained")
    assert prune(place, tmp_path / name, "--criterion=magnitude", "--sparsity=0.5") == 1
    error = capsys.readouterr().err
    assert "cannot be written: " in error
    assert "give another output folder" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_finetuning_that_diverges_in_its_last_steps_exports_nothing(place, tmp_path, capsys):
    more = ["--steps=2", "--learning-rate=3e38", "--weight-decay=1e38", "--warmup=0"]
    assert finetune(place, tmp_path / "out", *more) == 1
    error = capsys.readouterr().err
    assert "training diverged; remove" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    # As it says.
    shutil.rmtree(tmp_path / "out.work")
    assert finetune(place, tmp_path / "out", "--steps=2", "--learning-rate=1e-4") == 0


def test_weights_that_are_not_finite_are_not_exported(place, tmp_path):
    model = interop.load(place.model)
    params = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), model.params)
    with pytest.raises(InputError, match="NaN or infinite"):
        interop.export(tmp_path / "out", model, params)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pruned(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "model"
    assert prune(place, out, "--criterion=magnitude", "--sparsity=0.5") == 0
    return out


@pytest.mark.slow
def test_what_is_said_to_have_no_effect_has_none(place, pruned, tmp_path, capsys):
    assert prune(place, tmp_path / "a", "--criterion=magnitude", "--sparsity=0.5") == 0
    said = "".join(capsys.readouterr()).replace("\n", " ")
    assert "Calibrating on no text, which magnitude does not read: --calibration, " in said
    assert finetune(place, tmp_path / "out", "--zeros=free", model=pruned) == 2
    assert "give --masks=ignore with it" in capsys.readouterr().err
    more = ["--zeros=free", "--masks=ignore", "--steps=1"]
    assert finetune(place, tmp_path / "out", *more, model=pruned) == 0


def with_masks(pruned, folder, mask):
    from swe_prune.interop.mask_file import write_masks

    shutil.copytree(pruned, folder)
    write_masks(folder / interop.MASKS, mask)
    return folder


def test_a_mask_file_has_the_permissions_of_its_neighbours(pruned):
    modes = {path.stat().st_mode for path in pruned.iterdir()}
    assert len(modes) == 1


@pytest.mark.slow
def test_masks_that_would_zero_weights_are_refused_unless_asked_for(
    place, pruned, tmp_path, capsys
):
    mask = jax.tree.map(jnp.logical_not, interop.read_masks(pruned))
    model = with_masks(pruned, tmp_path / "model", mask)
    assert finetune(place, tmp_path / "out", "--steps=1", model=model) == 2
    error = capsys.readouterr().err
    assert "weights that are not 0; give --masks=ignore" in error
    assert not (tmp_path / "out").exists()
    for use in ("ignore", "apply"):  # as it says
        out = tmp_path / use
        assert finetune(place, out, "--steps=1", f"--masks={use}", model=model) == 0
        assert (out / interop.MASKS).exists() == (use == "apply")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda leaf: jnp.ones_like(leaf), "removes no weight"),
        (lambda leaf: leaf[1:], "is not of this model"),
    ],
)
def test_masks_of_nothing_or_of_another_model_are_refused(
    place, pruned, tmp_path, capsys, change, said
):
    mask = jax.tree.map(change, interop.read_masks(pruned))
    model = with_masks(pruned, tmp_path / "model", mask)
    assert finetune(place, tmp_path / "out", "--steps=1", model=model) == 2
    assert said in capsys.readouterr().err
