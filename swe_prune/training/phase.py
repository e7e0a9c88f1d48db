"""The settings of one phase of training."""

import dataclasses

from etils import epath


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of training and where it keeps what it makes.

    Attributes:
        name: shown to the user.
        folder: holds `metrics.jsonl` and, with samples, `trajectory.jsonl`.
        steps: length.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations; 0: none.
        checkpoint_every: steps between checkpoints; 0: none.
        sample_every: steps between samples of the weights; 0: none.
        keep_latest: how many of the newest checkpoints stay.
        keep_every: steps between checkpoints that stay for good; 0: none.
        stop_after_skipped: so many steps in a row that are not finite end the run.
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
