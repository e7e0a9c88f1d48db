"""Which weights a phase of training does not change."""

from collections.abc import Callable

from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.config import ModelConfig, PhaseConfig
from swe_prune.models import phi3v


def frozen(model: ModelConfig, params: PyTree, phase: PhaseConfig) -> Callable[[str], bool] | None:
    """Returns the function from a weight's name to whether a phase does not change it.

    Weights that are in no computation never change, since weight decay alone would shrink them.

    Args:
        model: Settings of the model.
        params: Parameters, which may be abstract.
        phase: Settings of the phase.

    Returns:
        The function, or None if all weights change.

    Raises:
        InputError: If a rule of `phase.trained` matches no weight.
    """
    names = [leaf for leaf, _ in tree.named_leaves(params)]
    rules = phase.trained
    tree.matched(rules or (), names, "config.train.trained or config.finetune.trained: rule")

    def unchanged(leaf: str) -> bool:
        chosen = rules is None or any(tree.rule_matches(rule, leaf) for rule in rules)
        return not chosen or phi3v.unused(model, leaf)

    return unchanged if any(map(unchanged, names)) else None
