"""The paper's experiment as phases: train, score, prune, fine-tune, control, report.

workdir     where things lie, whose they are, and that no two runs share them
shard       several processes on one workdir; lease, how a bucket is held
grid        the cells: criterion × rule × level × seed, and what else they may differ in
checks      what cells ask for that cannot be done
setup       everything that is built once: data, model, compiled steps
from_checkpoint  a pretrained model in place of fresh weights
recovery    the training after pruning, of the cells and of their controls
phases      what is done, each phase skipped when its result is there
pruning     the phase that prunes; scoring, what it scores by; calibration_text, its windows
recovering  the phase that fine-tunes; gradual and timing, pruning in the midst of it
fitting     one phase of training; models, what it leaves on disk
samples     what a model writes, and how far it is from the dense one
results     the cells' results as one table
plan        what would be done, and what it would cost; at_scale, on a mesh that is not there
"""

from swe_prune.study.experiment import Experiment, setup
from swe_prune.study.phases import control, evaluate, finetune, prune, run, train
from swe_prune.study.plan import memory_line, plan
from swe_prune.study.shard import Shard, parse
from swe_prune.study.workdir import Workdir, claim

__all__ = [
    "Experiment",
    "Shard",
    "Workdir",
    "claim",
    "control",
    "evaluate",
    "finetune",
    "memory_line",
    "parse",
    "plan",
    "prune",
    "run",
    "setup",
    "train",
]
