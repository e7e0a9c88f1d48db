"""Settings of one phase of training."""

import dataclasses

from etils import epath


@dataclasses.dataclass(frozen=True)
class Phase:
    """Settings of one phase of training.

    Attributes:
        name: Name shown to the user.
        folder: Folder for `metrics.jsonl` and, with samples, `trajectory.jsonl`.
        steps: Number of steps.
        log_every: Number of steps between lines of metrics.
        eval_every: Number of steps between evaluations; 0 for none.
        checkpoint_every: Number of steps between checkpoints; 0 for none.
        sample_every: Number of steps between samples of the weights; 0 for none.
        keep_latest: Number of newest checkpoints to retain.
        keep_every: Number of steps between checkpoints that are retained permanently; 0 for none.
        stop_after_skipped: Number of consecutive non-finite steps after which the run ends.
    """

    name: str
    folder: epath.Path
    steps: int
    log_every: int
    eval_every: int = 0
    checkpoint_every: int = 0
    sample_every: int = 0
    keep_latest: int = 2
    keep_every: int = 0
    stop_after_skipped: int = 5
