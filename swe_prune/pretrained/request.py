"""From the settings of `prune --model` to the recipe that they ask for."""

from collections.abc import Iterable, Mapping
from typing import Any

from swe_prune import importance
from swe_prune.blockwise import METHODS
from swe_prune.choices import Method
from swe_prune.config import literal
from swe_prune.errors import InputError
from swe_prune.pretrained.settings import RequestSettings
from swe_prune.recipe import Recipe, check
from swe_prune.recipe.checks import check_available
from swe_prune.recipe.defaults import complete
from swe_prune.trajectory import BUFFERS

BLOCK_BY_BLOCK: tuple[Method, ...] = tuple(method for method in METHODS if method != "magnitude")
"""Names that prune block by block, as their references do, unless `--at-once` is given."""

ASKED = ("allocation", "sparsity", "scope", "pattern", "max_sparsity", "seed", "zeros")
"""Settings that are fields of a recipe, by the same name."""

NO_OPTIMIZER = {
    "second_moment": "the optimizer's second moment, which a pretrained model does not come with; "
    "use a criterion that is measured, such as wanda or sparsegpt",
    "learned": "scores that movement pruning learns; use another criterion",
}


def recipe_of(settings: RequestSettings) -> Recipe:
    """Returns the recipe of the settings, checked in all that needs no model.

    Raises:
        InputError: A name, a number or a combination that cannot work.
    """
    name, restore = settings.criterion, settings.restore
    at_once = settings.at_once and name in importance.names()
    by_block = name in BLOCK_BY_BLOCK and not at_once
    asked = {
        "criterion": None if by_block else name,
        "method": name if by_block else None,
        "options": options_of(settings.options),
        **{field: getattr(settings, field) for field in ASKED},
    }
    if restore is not None:
        asked["restore"] = None if restore == "none" else restore
    # A gradient of the loss holds the whole model, which --offload has no room for.
    measurable = () if settings.offload else ("gradient_square",)
    request = complete(asked, measurable=measurable, restorable=True, methods=True).recipe
    method = request.method
    try:
        check(request, unavailable=NO_OPTIMIZER)
    except InputError as error:
        row_or_global = settings.scope not in (None, "tensor")
        if method is not None and row_or_global and method in importance.names():
            raise InputError(f"{error}, or give --at-once to rank the dense model") from None
        raise
    if method is not None and settings.at_once:
        raise InputError(
            f"--at-once has no effect with {method}, which goes block by block; leave it out, or "
            "give a criterion that scores weights, such as --criterion=wanda"
        )
    if settings.offload and method is None and request.restore is None:
        raise InputError(
            f"--offload has no effect with {name}, which scores the whole model at once; leave it "
            "out, or give a criterion that goes block by block, such as --criterion=sparsegpt"
        )
    return request


def reasons(settings: RequestSettings, request: Recipe) -> list[str]:
    """Returns what a request without a criterion does and why, and what others are for."""
    if settings.criterion is not None:
        return []
    if request.method == "admm":
        does = "ADMM chooses the mask of each kernel and updates the weights that stay; it needs "
        does += "no backward pass, for which --offload leaves no room"
        if not settings.offload:
            does = f"ADMM chooses the mask of each group of pattern {request.pattern} and updates "
            does += "the weights that stay, which belong together in so small a group"
    else:
        does = f"weights are ranked by w² E[g²]^{request.options['power']:g}"
        if request.scope == "global":
            most = request.max_sparsity or 1.0
            does += f" over all tensors together, of which none loses more than {most:.0%}"
        if request.restore is not None:
            does += f", and those that stay make up for the others ({request.restore})"
        does += "; it lost least of all that was measured at equal tokens (docs/results.md)"
    return [
        f"No criterion was given: {does}.",
        "--criterion=wanda needs no backward pass and changes no weight that stays; "
        "--criterion=sparsegpt is the reference that others compare with.",
    ]


def options_of(texts: Iterable[str]) -> dict[str, Any]:
    """Returns options from texts such as "horizon=1".

    Raises:
        InputError: A text has no value.
    """
    options = {}
    for one in texts:
        name, equals, value = one.partition("=")
        if not equals:
            raise InputError(f"--option={one} has no value; write --option=NAME=VALUE")
        options[name] = literal(value)
    return options


def check_trajectory(request: Recipe, tracked: bool, model: str) -> None:
    """Raises InputError for a criterion of the trajectory where the model comes without one."""
    advice = (
        f"a trajectory, and {model} comes without one; make one with 'python -m swe_prune "
        "finetune --track --model=… --out=DIR' and give --model=DIR"
    )
    missing: Mapping[str, str] = {} if tracked else dict.fromkeys(BUFFERS, advice)
    check_available(request, missing)
