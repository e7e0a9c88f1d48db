"""Metrics as JSON lines, fetched one step late, and cut back to the step a run resumes from."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from swe_prune.errors import RunError
from swe_prune.runtime import processes, storage
from swe_prune.training.phase import Phase

BUCKET_SECONDS = 30.0


class JsonLines:
    """A file of JSON objects, one a line, each with its `step`.

    Opening cuts off what a killed run wrote after the step that the new one resumes from, and a
    last line that was cut short, so an interrupted run leaves the same file as an uninterrupted.
    Of several processes the first one writes.

    In a bucket nothing can be appended to, so the file is kept here and written anew: at most every
    `BUCKET_SECONDS`, and when `flush` is called. A run that dies loses lines of steps after its
    last checkpoint, which the next run does again.
    """

    def __init__(self, path: epath.Path, resume_from: int):
        """Opens the file for appending, keeping the lines up to a step.

        Args:
            path: made when there is none.
            resume_from: the last step whose lines stay.
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
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
            return
        self._text += line
        self._unwritten = True
        if time.monotonic() - self._written > BUCKET_SECONDS:
            self._write()

    def flush(self) -> None:
        """Has every line written."""
        if processes.index() == 0 and self._unwritten:
            self._write()

    def _write(self) -> None:
        storage.write(self._path, self._text)
        self._written, self._unwritten = time.monotonic(), False
        if not self._in_bucket:
            self._text = ""


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a JSON-lines file; a last line cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all, whenever the process dies."""
    storage.write(path, json.dumps(value, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


class MetricsLogger:
    """Takes each step's metrics while the next one computes; stops when too many are not finite.

    Attributes:
        last_step_skipped: the last step that was handled was skipped, so no checkpoint is worth it.
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
            phase: for its name and cadence.
            first: the step that the phase resumes from.
            log: where lines go.
            progress: told of every step.
        """
        self._phase, self._log, self._progress = phase, log, progress
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._shown: dict[str, float] = {}
        self._clock, self._tokens = time.perf_counter(), 0
        self._first = first
        self.last_step_skipped = False

    def enqueue(self, step: int, metrics: dict[str, Any], tokens: int) -> None:
        """Takes a step that was dispatched, and handles the one before it."""
        self.flush()
        self._pending = (step, metrics)
        self._tokens += tokens

    def flush(self) -> None:
        """Handles the step that is still pending, waiting for the device.

        Raises:
            RunError: it is the last of too many in a row that were not finite, or pruned weights
                came back.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = int(values.pop("skipped"))
        in_row = int(values.pop("skipped_in_row"))
        self.last_step_skipped = in_row > 0
        if in_row >= self._phase.stop_after_skipped:
            name = next(name for name, value in values.items() if not math.isfinite(value))
            self._log.flush()
            raise RunError(
                f"{name} is {values[name]} at step {step} of phase {self._phase.name!r}, the "
                f"{in_row}. in a row that was skipped for not being finite, from batch "
                f"{step - in_row} of its order of the text on: training diverged; lower the "
                "learning rate or the clip norm; earlier checkpoints are kept in "
                f"{self._phase.folder}"
            )
        # JSON has no NaN, and a curve no place for one.
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if skipped:
            values["skipped"] = skipped
        if values.pop("revived", 0):
            raise RunError(
                f"pruned weights of phase {self._phase.name!r} are not 0 after step {step}; wrap "
                "the optimizer in masks.keep, outermost"
            )
        if step == self._first + 1:  # its time was spent compiling
            self._clock, self._tokens = time.perf_counter(), 0
        elif (seconds := time.perf_counter() - self._clock) > 0:
            self._shown["tokens/s"] = self._tokens / seconds
        self._shown |= values
        self._progress(step, self._shown)
        processes.progress()
        if step % self._phase.log_every == 0 or step == self._phase.steps:
            self._log.write(step, values | {"tokens_per_second": self._shown.get("tokens/s")})

    def evaluated(self, step: int, loss: float) -> None:
        """Takes a validation loss in nats per token."""
        self._shown["validation"] = loss
        self._log.write(step, {"validation_loss": loss})
        self._progress(step, self._shown)
