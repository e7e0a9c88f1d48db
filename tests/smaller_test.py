"""`make smaller` end to end on a tiny model, and the benchmark of what cuts save."""

import importlib
import sys

import pretrained_tiny
import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(pretrained_tiny.ROOT / "benchmarks"))
    yield importlib.import_module
    for name in ("smaller", "shrink"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_tiny_model_is_cut_restored_recovered_and_timed(benchmark, tmp_path, capsys):
    pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    place = pretrained_tiny.make(tmp_path)
    other = pretrained_tiny.ROOT / "README.md"
    rows = benchmark("smaller").main(
        ["--quick", f"--model={place.model}", f"--train={place.train}", f"--other={other}",
         f"--held-out={place.held_out}", f"--workdir={tmp_path / 'out'}"]
    )  # fmt: skip
    of = {(row.name, row.share): row for row in rows}
    assert len(of) == 12
    for share in (0.25, 0.5):
        masked, cut, restored = (of[name, share] for name in ("masked", "cut", "restored"))
        assert masked.perplexity == pytest.approx(cut.perplexity, rel=1e-4)
        assert cut.parameters < masked.parameters == of["dense", 0.0].parameters
        assert restored.parameters == cut.parameters == of["scratch", share].parameters
        assert all(one > 0 for one in cut.decode)
    assert (tmp_path / "out" / "smaller.svg").stat().st_size > 1000
    assert "nats of the cut's" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_a_killed_run_are_not_made_again(benchmark, tmp_path):
    smaller = benchmark("smaller")

    def study(*more):
        options = smaller.parse([f"--workdir={tmp_path}", *more])
        return smaller.Study(None, None, None, {}, options)

    first = study()
    row = smaller.Row("cut", 0.25, 7, {"held out": 3.0, "other": 4.0}, (0.4, 0.5, 0.6))
    first.known["cut", 0.25] = row
    first.keep()
    again = study("--runs=9")
    again.remember()
    assert again.judged("cut", 0.25, None, lambda: pytest.fail("made again")) == row
    with pytest.raises(SystemExit, match="other options"):
        study("--steps=9").remember()
