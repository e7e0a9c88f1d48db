"""The choice of weights of a pretrained model: rules for their names, and a range of blocks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from swe_prune import interop, tree
from swe_prune.errors import InputError
from swe_prune.models import phi3v
from swe_prune.pretrained.settings import ChoiceSettings

_BLOCK = re.compile(r"(?:^|/)block_(\d+)/")


def prunable(
    params: PyTree,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    blocks: str | None = None,
) -> PyTree:
    """Returns a bool pytree that is True where a weight of a pretrained model may be pruned.

    Embeddings, norms, biases and the output head are dense, as in `tree.prunable`; the rules and
    the blocks choose among the other weights, of a model of images and text by default among those
    of its decoder. The result is the argument `prunable` of
    `swe_prune.prune`, `recipe.prune` and `blockwise.prune_blocks`.

    Args:
        params: Parameters of the decoder, which may be abstract.
        include: Regular expressions (`re.search`) for the names of weights, such as r"/mlp/", each
            of which must match one. None or (): all.
        exclude: Regular expressions for the names of weights that stay dense, each of which must
            match one.
        blocks: Range of blocks as a Python slice, such as "0:15", "-4:" or ":8"; its ends must be
            within the model. None: all.

    Raises:
        InputError: If a rule matches nothing, the range is not one of the model's blocks, or
            nothing is left to prune.

    >>> import jax.numpy as jnp
    >>> kernels = {"mlp": {"up": {"kernel": jnp.ones((2, 3))}}}
    >>> prunable({"block_0": kernels, "block_1": kernels}, blocks="-1:")["block_0"]
    {'mlp': {'up': {'kernel': False}}}
    """
    weights = {name: leaf for name, leaf in tree.named_leaves(params) if tree.is_weight(leaf)}
    names = list(weights)
    if not include and any(name.startswith("vision/") for name in names):
        include = phi3v.PRUNABLE  # the commands calibrate on text, which no tower reads
    for kind, given in (("include", include), ("exclude", exclude)):
        for rule, matched in tree.matched(given or (), names, f"{kind} rule").items():
            dense = [tree.dense_reason(name, weights[name]) for name in matched]
            if kind == "include" and all(dense):
                raise InputError(
                    f"include rule {rule!r} matches only weights that stay dense, such as "
                    f"{matched[0]!r} ({dense[0]}); correct the rule"
                )
    numbers = {name: int(match[1]) for name in names if (match := _BLOCK.search(name))}
    chosen_blocks = _range(blocks, 1 + max(numbers.values(), default=-1))

    def choose(name: str, leaf: Any) -> bool:
        return (
            not tree.dense_reason(name, leaf, include or None)
            and not any(tree.rule_matches(rule, name) for rule in exclude or ())
            and (chosen_blocks is None or numbers.get(name, -1) in chosen_blocks)
        )

    chosen = tree.map_named(choose, params)
    if not any(jax.tree.leaves(chosen)):
        raise InputError(
            f"no weight is prunable under {shown(rules_of(include, exclude, blocks))}; widen the "
            "choice"
        )
    return chosen


def rules_of(
    include: Sequence[str] | None, exclude: Sequence[str] | None, blocks: str | None
) -> dict[str, Any]:
    """Returns the rules that were given, as pruning.json has them.

    >>> rules_of(("up",), (), None)
    {'include': ['up']}
    """
    given = {"include": list(include or ()), "exclude": list(exclude or ()), "blocks": blocks}
    return {name: value for name, value in given.items() if value}


def rules(settings: ChoiceSettings) -> dict[str, Any]:
    """Returns the rules of the settings of a command, as pruning.json has them."""
    return rules_of(settings.include, settings.exclude, settings.blocks)


def of_checkpoint(checkpoint: interop.PretrainedSource, settings: ChoiceSettings) -> PyTree:
    """Returns `prunable` of a model whose weights are not read, by the settings of a command."""
    return prunable(abstract_params(checkpoint), **rules(settings))


def abstract_params(checkpoint: interop.PretrainedSource) -> PyTree:
    """Returns the shapes of a model's parameters, float32."""
    return interop.abstract_params(checkpoint.config, checkpoint.vocab_size)


def sentence(settings: ChoiceSettings, chosen: PyTree) -> str:
    """Returns what was chosen, in words."""
    marks = jax.tree.leaves(chosen)
    return f"Weights chosen by {shown(rules(settings))}: {sum(marks)} of {len(marks)} tensors."


def shown(given: Mapping[str, Any]) -> str:
    """Returns rules in words."""
    values = {k: ", ".join(v) if isinstance(v, list) else v for k, v in given.items()}
    return " and ".join(f"{name} {value}" for name, value in values.items()) or "the defaults"


def _range(blocks: str | None, count: int) -> range | None:
    if blocks is None:
        return None
    match = re.fullmatch(r"(-?[0-9]{1,9})?:(-?[0-9]{1,9})?", blocks.strip())
    if match is None:
        raise InputError(
            f"blocks must be a range START:STOP as a Python slice, such as 0:15, -4: or :8, got "
            f"{blocks!r}"
        )
    ends = [None if end is None else int(end) for end in match.groups()]
    if any(end is not None and not -count <= end <= count for end in ends):
        raise InputError(
            f"blocks {blocks!r} leaves the model's blocks, 0 to {count - 1}; give ends from "
            f"{-count} to {count}"
        )
    chosen = range(count)[slice(*ends)]
    if not chosen:
        raise InputError(
            f"blocks {blocks!r} has none of the model's blocks, 0 to {count - 1}; give a START "
            "before STOP"
        )
    return chosen
