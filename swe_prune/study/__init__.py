"""The paper's experiment as phases: train, score, prune, fine-tune, control, report.

grid             the cells: a recipe, a schedule, a recovery and a seed each
shard            which cells one of several processes takes
workdir          where things lie, whose they are, and that no two runs share them
feeds            batches of a text, or of pictures with their texts
freezing         which weights a phase does not change
experiment       everything that is built once: data, model, compiled steps
from_checkpoint  a pretrained model in place of fresh weights
recovery         the training after pruning, of the cells and of their controls
phases           what is done; each phase is skipped when its result is there
prune_phase      the phase that prunes
finetune_phase   the phase that recovers; gradual, pruning during it
cuts             the phase that cuts and serves; cut_shapes, its checks; serving, its windows;
                 payback, when a cut has paid for itself
mend             repairs of finished phases that were damaged later
saved            the models on disk
samples          what a model writes, and how far it is from the dense one
histograms       what the report draws of the weights
results          the columns of results.csv, and the table
plan             what would be done, and what it would cost; plan_at_scale, on an absent mesh
"""

from swe_prune.study.experiment import Experiment, setup
from swe_prune.study.phases import control, evaluate, finetune, mend, prune, run, train
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
    "mend",
    "parse",
    "plan",
    "prune",
    "run",
    "setup",
    "train",
]
