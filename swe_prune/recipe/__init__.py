"""How something is pruned: one request, one validation, one way from scores to masks.

    request    `Recipe`: a criterion or a method, how much, where, in which shape
    checks     `check`: refuses what cannot work before any work is done
    evidence   `Evidence`, what the criterion may read besides the weights, and `measure`, which
               makes it of calibration data, once for any number of recipes
    defaults   `complete`: what a request leaves out, decided by what is available
    scores     `score`: the scores of the criterion, compiled once
    selection  `allocate` and `select`: scores to masks
    pruning    `prune`: scores -> allocation -> masks, or one block of the model after the other
    cut_request  `CutRecipe`: what units go and by which criterion, for `structured.cut_model`

`swe_prune.prune`, `prune --model` and every cell of a study hold a `Recipe` and call `prune`. The
model, the parameters, the batches and the loss are arguments.
"""

from swe_prune.recipe.checks import check
from swe_prune.recipe.cut_request import CutRecipe, Reduce, Units
from swe_prune.recipe.defaults import default_max_sparsity
from swe_prune.recipe.evidence import Evidence, measure, measures
from swe_prune.recipe.pruning import prune
from swe_prune.recipe.request import Recipe
from swe_prune.recipe.scores import score
from swe_prune.recipe.selection import allocate, select

__all__ = [
    "CutRecipe",
    "Evidence",
    "Recipe",
    "Reduce",
    "Units",
    "allocate",
    "check",
    "default_max_sparsity",
    "measure",
    "measures",
    "prune",
    "score",
    "select",
]
