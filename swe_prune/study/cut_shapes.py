"""What a config's cuts make of its model, checked before any training."""

import numpy as np

from swe_prune import importance, structured
from swe_prune.config import Config, CutConfig, ModelConfig
from swe_prune.errors import InputError, check_choice
from swe_prune.evaluation.latency import Workload
from swe_prune.runtime import processes
from swe_prune.study import grid

OF_UNITS = tuple(kind for kind in structured.KINDS if kind != "random")


def check(config: Config) -> None:
    """Checks every cut against the model, before any training.

    Raises:
        InputError: A cut that cannot be made, by its number.
    """
    if config.cuts and processes.count() > 1:
        raise InputError(
            "config.cuts are served by one process, whose windows others would wait for, got "
            f"{processes.count()} processes; run them apart, with config.cuts = () here"
        )
    for number, cut in enumerate(config.cuts):
        path = f"config.cuts[{number}]"
        check_choice(cut.criterion, (*importance.names(), *OF_UNITS), f"{path}.criterion")
        if config.model.pretrained is not None:
            raise InputError(
                f"{path} cuts models that the study trains; cut a pretrained one with the command "
                "'cut --model'"
            )
        if cut.recipe is None and cut.units == "layers":
            raise InputError(
                f"{path}.criterion = {cut.criterion!r} scores units within a layer; give a "
                "criterion of weights for units = 'layers'"
            )
        if cut.recipe is not None and cut.recipe.needs & {"learned"}:
            raise InputError(f"{path}.criterion = {cut.criterion!r}: {grid.UNAVAILABLE['learned']}")
        try:
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
    return structured.cut_config(config, structured.choose(groups, nothing, sparsity=share))


def workload(config: Config) -> Workload:
    """Returns what is served in one run, checked against the model's context.

    Raises:
        InputError: If a text exceeds the context.
    """
    settings, context = config.ledger, config.model.context
    load = Workload(
        settings.batch,
        settings.prompt or max(1, context // 2),
        settings.new_tokens or max(1, context // 4),
    )
    if load.prompt + load.new + 1 > context:
        raise InputError(
            f"config.ledger.prompt and .new_tokens ask for texts of {load.prompt + load.new + 1} "
            f"tokens, and the model's context is {context}; lower one of them"
        )
    return load
