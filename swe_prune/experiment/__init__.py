"""The paper's experiment as phases: train, score, prune, fine-tune, control, report.

workdir   where things lie, whose they are, and that no two runs share them
grid      the cells: criterion × rule × level × seed
setup     everything that is built once: data, model, compiled steps
phases    what is done, each phase skipped when its result is there
results   the cells' results as one table
plan      what would be done, and what it would cost
"""

from swe_prune.experiment.phases import control, evaluate, finetune, prune, run, train
from swe_prune.experiment.plan import memory_line, plan
from swe_prune.experiment.setup import Experiment, setup
from swe_prune.experiment.workdir import Workdir, claim

__all__ = [
    "Experiment",
    "Workdir",
    "claim",
    "control",
    "evaluate",
    "finetune",
    "memory_line",
    "plan",
    "prune",
    "run",
    "setup",
    "train",
]
