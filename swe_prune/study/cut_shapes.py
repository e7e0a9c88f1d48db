"""What a config's cuts make of its model, checked before any training."""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import PyTree

from swe_prune import structured, tree
from swe_prune.config import Config, CutConfig, ModelConfig
from swe_prune.errors import InputError
from swe_prune.evaluation.latency import Workload
from swe_prune.models import phi3v
from swe_prune.runtime import processes
from swe_prune.structured import Group
from swe_prune.study import grid


def check(config: Config) -> None:
    """Checks every cut against the model, before any training.

    Raises:
        InputError: A cut that cannot be made, by its number.
    """
    trained = grid.seeds(config)
    if config.cuts and processes.count() > 1:
        raise InputError(
            "config.cuts are served by one process, whose windows others would wait for, got "
            f"{processes.count()} processes; run them apart, with config.cuts = () here"
        )
    for number, cut in enumerate(config.cuts):
        path = f"config.cuts[{number}]"
        if config.model.pretrained is not None:
            raise InputError(
                f"{path} cuts models that the study trains; cut a pretrained one with the command "
                "'cut --model'"
            )
        wanted = config.study.seeds_of(cut)
        missing = sorted(set(wanted) - set(trained))
        if missing and (cut.seeds is not None or len(missing) == len(set(wanted))):
            raise InputError(
                f"{path}.seeds must be of dense models that the study trains, {trained}, got "
                f"{list(wanted)}; give those, or cells with the others"
            )
        labels = [f"{one:g}" for one in cut.smaller]
        if len(set(labels)) < len(labels):
            raise InputError(f"{path}.smaller must be different shares, got {list(cut.smaller)}")
        try:
            structured.check_cut(cut, config.model, unavailable=grid.UNAVAILABLE)
            for share in (cut.sparsity, *cut.smaller):
                shape(config.model, cut, share)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    if config.cuts:
        workload(config)
    names = [cut.name for cut in config.cuts]
    if len(set(names)) < len(names):
        raise InputError(
            f"two of config.cuts would have one name, of {', '.join(names)}; make them differ"
        )


def shape(config: ModelConfig, cut: CutConfig, share: float) -> ModelConfig:
    """Returns the config of the model with a share of the units gone, whichever they are."""
    groups = structured.groups(config, cut.units)
    nothing = {name: np.zeros(group.shape) for name, group in groups.items()}
    keep = structured.choose(groups, nothing, sparsity=share, multiple=cut.multiple)
    return structured.cut_config(config, keep)


def check_scored(config: Config, params: PyTree, prunable: PyTree) -> None:
    """Checks that criteria of weights have prunable weights to score in all units.

    Args:
        config: Settings.
        params: Parameters, which may be abstract.
        prunable: Bool pytree like the parameters.

    Raises:
        InputError: A cut whose units no prunable weight belongs to, by its number.
    """
    names = [name for name, chosen in tree.named_leaves(prunable) if chosen]
    for number, cut in enumerate(config.cuts):
        if cut.recipe is None:
            continue
        groups = structured.groups(config.model, cut.units)
        for name, group in in_use(config.model, groups, params).items():
            matched = [re.search(rule, one) for rule in group.axes for one in names]
            found = {match.groups() for match in matched if match}
            if len(found) < (group.units if group.numbered else 1):
                raise InputError(
                    f"config.cuts[{number}].criterion = {cut.criterion!r} scores prunable weights, "
                    f"of which {name!r} has none; correct config.prune.include, or give a "
                    f"criterion of activations such as {CutConfig.criterion!r}"
                )


def in_use(model: ModelConfig, groups: Mapping[str, Group], params: PyTree) -> dict[str, Group]:
    """Returns the groups whose units are computed: all but those of a tower's last block.

    Args:
        model: Settings of the model.
        groups: Groups by name.
        params: Parameters, which may be abstract.
    """
    unused = [name for name, _ in tree.named_leaves(params) if phi3v.unused(model, name)]
    return {
        name: group
        for name, group in groups.items()
        if not any(tree.rule_matches(rule, one) for rule in group.axes for one in unused)
    }


def workload(config: Config) -> Workload:
    """Returns what is served in one run, checked against the model's context.

    A model of images and text gets a picture of the most crops that it takes, in one row.

    Raises:
        InputError: If a text exceeds the context, or a prompt has no room for its picture.
    """
    settings, context, vision = config.ledger, config.model.context, config.model.vision
    crops, picture = (0, 0) if vision is None else (vision.crops, vision.tokens(1, vision.crops))
    load = Workload(
        settings.batch,
        settings.prompt or max(context // 2, picture + 1),
        settings.new_tokens or max(1, context // 4),
        crops,
    )
    if load.prompt <= picture:
        raise InputError(
            f"config.ledger.prompt = {load.prompt} has no room for the {picture} tokens of a "
            f"picture of {crops} crops and a word; raise it, or set None"
        )
    if load.prompt + load.new + 1 > context:
        raise InputError(
            f"config.ledger.prompt and .new_tokens ask for texts of {load.prompt + load.new + 1} "
            f"tokens, and the model's context is {context}; lower one of them"
        )
    return load
