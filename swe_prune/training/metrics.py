"""Metrics as JSON lines, fetched one step late, and truncated to the step a run resumes from."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from swe_prune.errors import InputError, RunError, first_line, why_unwritten
from swe_prune.runtime import processes, storage
from swe_prune.training.phase import Phase

BUCKET_SECONDS = 30.0


class JsonLines:
    """A file of JSON objects, one per line, each with its `step`.

    Opening the file drops the lines that a killed run wrote after the step that the new run resumes
    from, and an incomplete last line, so an interrupted run leaves the same file as an
    uninterrupted one. With several processes only process 0 writes.

    Files in a bucket cannot be appended to, so their text is buffered in memory and written as a
    whole, at most every `BUCKET_SECONDS` and on `flush`. A run that dies loses only lines of steps
    after its last checkpoint, which the next run repeats.
    """

    def __init__(self, path: epath.Path, resume_from: int):
        """Opens the file for appending, retaining the lines up to a step.

        Args:
            path: Path of the file, which is created if it does not exist.
            resume_from: Last step whose lines are retained.
        """
        self._path = path
        self._in_bucket = storage.in_bucket(path)
        if processes.index() > 0:
            return
        kept = [line for line in read_lines(path) if resume_from and line["step"] <= resume_from]
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        self._write()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line; arrays become lists."""
        if processes.index() > 0:
            return
        line = json.dumps({"step": step, **values}, default=_plain) + "\n"
        if not self._in_bucket:
            storage.check_held()
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise RunError(
                    f"step {step} cannot be logged in {self._path}: {why_unwritten(error)}; make "
                    "room or choose another workdir, and run the same command again; finished "
                    "work is kept"
                ) from None
            return
        self._text += line
        self._unwritten = True
        if time.monotonic() - self._written > BUCKET_SECONDS:
            self._write()

    def flush(self) -> None:
        """Writes all buffered lines."""
        if processes.index() == 0 and self._unwritten:
            self._write()

    def _write(self) -> None:
        storage.write(self._path, self._text)
        self._written, self._unwritten = time.monotonic(), False
        if not self._in_bucket:
            self._text = ""


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSON-lines file, without an incomplete last line.

    Raises:
        InputError: The file was damaged since.
    """
    if not path.exists():
        return []
    try:
        return list(storage.read_log(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({first_line(error)}); remove it and run the same command again, "
            "which goes on without the lines of earlier steps"
        ) from None


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
    """Writes a JSON object atomically, with a checksum that `storage.read_json` looks at."""
    plain = json.loads(json.dumps(value, default=_plain))
    storage.write(path, json.dumps(storage.sealed(plain), indent=1))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


class MetricsLogger:
    """Logs each step's metrics while the next step computes; stops after too many bad steps.

    Attributes:
        last_step_skipped: Whether the last logged step was skipped as non-finite, in which case the
            state should not be saved.
    """

    def __init__(
        self,
        phase: Phase,
        first: int,
        log: JsonLines,
        progress: Callable[[int, dict[str, float]], None],
    ):
        """Starts the clock for tokens per second.

        Args:
            phase: Settings of the phase.
            first: Step that the phase resumes from.
            log: File that the lines are written to.
            progress: Callback that receives every step and its values.
        """
        self._phase, self._log, self._progress = phase, log, progress
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._shown: dict[str, float] = {}
        self._clock, self._tokens = time.perf_counter(), 0
        self._first = first
        self.last_step_skipped = False

    def enqueue(self, step: int, metrics: dict[str, Any], tokens: int) -> None:
        """Stores the metrics of a dispatched step, and logs the previous step.

        Args:
            step: Number of the step.
            metrics: Metrics of the step, still on the device.
            tokens: Number of tokens of its batch.
        """
        self.flush()
        self._pending = (step, metrics)
        self._tokens += tokens

    def flush(self) -> None:
        """Logs the pending step, waiting for the device.

        Raises:
            RunError: If too many consecutive steps were not finite, or pruned weights are not 0.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = int(values.pop("skipped"))
        in_row = int(values.pop("skipped_in_row"))
        self.last_step_skipped = in_row > 0
        # Too many consecutive bad steps mean that training has diverged.
        if in_row >= self._phase.stop_after_skipped:
            name = next(name for name, value in values.items() if not math.isfinite(value))
            self._log.flush()
            raise RunError(
                f"{name} is {values[name]} at step {step} of phase {self._phase.name!r}, the "
                f"{in_row}. in a row that was skipped as non-finite, from batch {step - in_row} "
                "of the data order on: training diverged; lower the learning rate or the clip "
                f"norm; earlier checkpoints are kept in {self._phase.folder}"
            )
        # JSON has no NaN, and a curve cannot show one.
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if skipped:
            values["skipped"] = skipped
        if values.pop("revived", 0):
            raise RunError(
                f"pruned weights of phase {self._phase.name!r} are not 0 after step {step}; wrap "
                "the optimizer in masks.keep, outermost"
            )
        if step == self._first + 1:  # exclude the compilation from the speed
            self._clock, self._tokens = time.perf_counter(), 0
        elif (seconds := time.perf_counter() - self._clock) > 0:
            self._shown["tokens/s"] = self._tokens / seconds
        self._shown |= values
        self._progress(step, self._shown)
        processes.progress()
        if step % self._phase.log_every == 0 or step == self._phase.steps:
            self._log.write(step, values | {"tokens_per_second": self._shown.get("tokens/s")})

    def evaluated(self, step: int, loss: float) -> None:
        """Logs a validation loss in nats per token."""
        self._shown["validation"] = loss
        self._log.write(step, {"validation_loss": loss if math.isfinite(loss) else None})
        self._progress(step, self._shown)
