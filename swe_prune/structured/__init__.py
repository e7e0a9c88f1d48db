"""Structures that really go: neurons, heads and layers cut out of the arrays.

    groups = structured.groups(config, "neurons")
    units = structured.unit_scores(groups, importance.score("magnitude", params))
    keep = structured.choose(groups, units, sparsity=0.25)
    params = structured.cut(params, groups, keep)
    config = structured.cut_config(config, keep)

A mask makes no model smaller or faster: dense products skip nothing. A cut removes whole units from
all weights that have them, and the model computes what it computes with zeros in their place
(`unit_mask`), up to rounding. `cut` takes the optimizer's state, trajectory statistics and masks
like the parameters.

`activation_scores`, `depth_scores` and `redundant_units` score units by what they compute on
calibration text. `refit.refit` makes up for a cut in the weights that read the units, and
`fold_units` in the partners of redundant ones.

`cut_model` does all of it by one request, a `recipe.CutRecipe`.

For other models than `models.gpt` and `models.phi3v` groups are declared: the number of units, and
their axis by path rule.
"""

from swe_prune.structured.activations import KINDS, activation_scores, readers
from swe_prune.structured.budget import Budget, flops, memory
from swe_prune.structured.choice import Keep, choose, summary
from swe_prune.structured.cut_model import CRITERIA, CutResult, check_cut, cut_model
from swe_prune.structured.cutting import cut, unit_mask
from swe_prune.structured.decoder import UNITS, cut_config, groups
from swe_prune.structured.depth import DEPTH, depth_scores, residual_states
from swe_prune.structured.folding import fold_units
from swe_prune.structured.group import Along, Group
from swe_prune.structured.redundancy import Redundancy, Removal, SaturatedWarning
from swe_prune.structured.redundant_units import redundancy_scores, redundant_units
from swe_prune.structured.reranking import Candidate, Ranked, rerank
from swe_prune.structured.unit_scores import REDUCES, unit_scores

__all__ = [
    "CRITERIA",
    "DEPTH",
    "KINDS",
    "REDUCES",
    "UNITS",
    "Along",
    "Budget",
    "Candidate",
    "CutResult",
    "Group",
    "Keep",
    "Ranked",
    "Redundancy",
    "Removal",
    "SaturatedWarning",
    "activation_scores",
    "check_cut",
    "choose",
    "cut",
    "cut_config",
    "cut_model",
    "depth_scores",
    "flops",
    "fold_units",
    "groups",
    "memory",
    "readers",
    "redundancy_scores",
    "redundant_units",
    "rerank",
    "residual_states",
    "summary",
    "unit_mask",
    "unit_scores",
]
