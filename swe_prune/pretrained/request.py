"""From the settings of `prune --model` to the recipe that they ask for."""

from collections.abc import Iterable, Mapping
from typing import Any

from swe_prune import importance
from swe_prune.blockwise import METHODS
from swe_prune.config import literal
from swe_prune.errors import InputError
from swe_prune.pretrained.settings import RequestSettings
from swe_prune.recipe import Recipe, check
from swe_prune.trajectory import BUFFERS

BLOCK_BY_BLOCK = tuple(method for method in METHODS if method != "magnitude")
"""Names that prune block by block, as their references do, unless `--at-once` is given."""

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
    options = options_of(settings.options)
    name: str | None = settings.criterion
    at_once = settings.at_once and name in importance.names()
    method = name if name in BLOCK_BY_BLOCK and not at_once else None
    request = Recipe(
        criterion=name if method is None else None,
        options=options,
        allocation=settings.allocation,
        sparsity=settings.sparsity,
        scope=settings.scope,
        pattern=settings.pattern,
        restore=settings.restore,
        method=method,
        seed=settings.seed,
        zeros=settings.zeros,
    )
    try:
        check(request, unavailable=NO_OPTIMIZER)
    except InputError as error:
        if method is not None and settings.scope != "tensor" and method in importance.names():
            raise InputError(f"{error}, or give --at-once to rank the dense model") from None
        raise
    return request


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
    check(request, unavailable=missing)
