"""`bench --model`, as a user types it."""

import json

import pretrained_tiny
import pytest
from interop_tiny import assert_same_params

from swe_prune import cli, interop, masks, tree

QUICK = ["--batch=1", "--batch=2", "--prompt-tokens=8", "--new-tokens=3", "--runs=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("safetensors")
    return pretrained_tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_two_models_side_by_side_as_a_table_and_as_json(place, capsys):
    command = ["bench", f"--model={place.model}", f"--against={place.model}", *QUICK]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    for part in (
        "ratio (quartiles)",
        "batch 2: decode, p95 ms",
        "1.000",
        "prefill, tokens/s",
        "energy a token",
    ):
        assert part in shown
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = interop.load(place.model)
    assert found["model"]["parameters"] == tree.size(model.params) == found["model"]["nonzero"]
    assert found["model"]["file_bytes"] == (place.model / "model.safetensors").stat().st_size
    for batch in ("1", "2"):
        decode = found["model"]["batches"][batch]["decode"]
        assert len(decode["seconds"]) == 2
        assert decode["median"] <= decode["p95"]
        assert decode["tokens_per_second"] == pytest.approx(3 * int(batch) / decode["median"])
        assert len(decode["ratio"]) == 3
        assert "ratio" not in found["against"]["batches"][batch]["decode"]
        energy = found["model"]["batches"][batch]["energy"]
        each, request = energy["joules_per_token"], energy["joules_per_request"]
        assert each["low"] <= each["value"] <= each["high"]
        assert each["value"] > 0
        assert request["value"] == pytest.approx(11 * each["value"])
        assert [one["tokens"] for one in energy["windows"]] == [11 * int(batch)] * 2
    assert found["energy"]["source"]
    assert found["energy"]["idle_watts"]["value"] > 0


@pytest.mark.slow
def test_a_compressed_model_is_smaller_and_is_read_as_any_other(place, tmp_path, capsys):
    texts = [f"--evaluation={place.held_out}", "--window=32", "--eval-windows=2", "--new-tokens=2"]
    out, tuned = tmp_path / "pruned", tmp_path / "tuned"
    prune = ["prune", f"--model={place.model}", "--criterion=magnitude", "--sparsity=0.5", *texts]
    assert cli.main([*prune, f"--out={out}", "--compress"]) == 0
    shown = capsys.readouterr().out
    assert "transformers cannot read its compressed.safetensors" in shown
    model, mask = interop.load(out), interop.read_masks(out)
    assert_same_params(model.params, masks.apply(interop.load(place.model).params, mask))
    finetune = ["finetune", f"--model={out}", f"--text={place.train}", "--steps=1", *texts]
    sizes = ["--batch=2", "--train-window=16"]
    assert cli.main([*finetune, f"--out={tuned}", *sizes, "--compress"]) == 0
    capsys.readouterr()
    command = ["bench", f"--model={tuned}", f"--against={place.model}", *QUICK, "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    nonzero = tree.size(model.params) - masks.summary(mask).pruned
    assert found["model"]["nonzero"] == nonzero
    assert found["model"]["file_bytes"] < 0.75 * found["against"]["file_bytes"]
    assert "zeros save no time" in " ".join(found["notes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--runs=0"], "--runs must be 1 or more, got 0"),
        (
            ["--energy-windows=-1"],
            "--energy-windows must be an integer of at least 0 and at most 1000000, got -1",
        ),
        (
            ["--energy-seconds=nan"],
            "--energy-seconds must be a finite number of at least 0 and at most 86400, got nan",
        ),
        (["--batch=0"], "--batch must be 1 or more, got 0"),
        (["--prompt-tokens=0"], "--prompt-tokens must be 1 or more, got 0"),
        (["--prompt-tokens=128"], "exceed the model's context of 128"),
        (["--against=nowhere"], "nowhere does not exist"),
        (["--against-prefix=x."], "give --against=PATH"),
        (["--energy-windows=0", "--energy-seconds=1"], "--energy-windows=0 measures none"),
        (["--batch=10000000", "--prompt-tokens=64"], "are free; lower --batch"),
        (["--batch=1000000000000"], "are more than the arrays' 2^31; lower --batch"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(place, capsys, more, part):
    assert cli.main(["bench", f"--model={place.model}", *more]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert "Traceback" not in error


def test_a_model_is_needed(capsys):
    assert cli.main(["bench"]) == 2
    assert "python -m swe_prune bench needs --model" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["runs", "warmup", "energy-windows", "energy-seconds"])
def test_a_measurement_without_an_end_is_refused_at_once(place, capsys, option):
    assert cli.main(["bench", f"--model={place.model}", *QUICK, f"--{option}=1" + "0" * 12]) == 2
    assert f"--{option} must be" in capsys.readouterr().err
