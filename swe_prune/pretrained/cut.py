"""`cut`: neurons, heads or layers cut out of a pretrained model, which is then really smaller."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from swe_prune import interop, recipe, structured, tree
from swe_prune.config import literal
from swe_prune.errors import InputError
from swe_prune.evaluation import gate
from swe_prune.evaluation.latency import decode_seconds
from swe_prune.layout import layout as trace_layout
from swe_prune.models import gpt
from swe_prune.pretrained import choice, judge, texts, tracked
from swe_prune.pretrained.opening import has_masks, opened, record_of
from swe_prune.pretrained.request import NO_OPTIMIZER, check_trajectory, options_of
from swe_prune.pretrained.settings import CutSettings
from swe_prune.recipe import Recipe
from swe_prune.structured import Budget, Group
from swe_prune.training import step
from swe_prune.training.progress import Progress
from swe_prune.trajectory import BUFFERS
from swe_prune.version import __version__

KEPT = "kept_units.json"
"""File with the indices of the kept units by group, in the model that was cut."""


def cut(given: CutSettings, progress: Progress, console: Console) -> Path:
    """Cuts a pretrained model, judges it next to the dense one, and writes it; returns its folder.

    Raises:
        InputError: Anything that is wrong with the settings, the model or the texts.
    """
    request = _recipe_of(given)
    interop.check_free(given.out)
    checkpoint = opened(given, progress)
    check_trajectory(request, tracked.there(checkpoint.path), given.model)
    groups = structured.groups(checkpoint.config, given.units)
    _check_choice(given, groups, checkpoint)
    text = texts.read(given.evaluation, checkpoint)
    batches, calibration = [], None
    if request.reads_batches:
        batches, calibration = texts.calibration(given, checkpoint, text, progress)
    model = checkpoint.read(dtype=given.dtype)
    module = gpt.build(model.config, model.vocab_size)
    dense = judge.judge(module, model.params, model, text, given)
    gate(dense.perplexity, uniform=model.vocab_size, at_most=given.at_most)
    # Score, choose and cut; nothing of the model is changed before.
    units = _unit_scores(given, request, model, groups, batches)
    keep = _chosen(given, groups, units, model.params, model.config, model.vocab_size)
    small = dataclasses.replace(
        model,
        params=structured.cut(model.params, groups, keep),
        config=structured.cut_config(model.config, keep),
    )
    found = judge.judge(
        gpt.build(small.config, small.vocab_size),
        small.params,
        small,
        text,
        given,
        dense=model.params,
        dense_module=module,
    )
    about = {
        "units": given.units,
        "criterion": request.criterion,
        "options": dict(request.options),
        "reduce": given.reduce,
        "sparsity": structured.summary(groups, keep).sparsity,
        "requested": {"sparsity": given.sparsity, "budget": given.budget},
        "kept": {name: one.kept for name, one in structured.summary(groups, keep).tensors.items()},
        "of": {name: group.units for name, group in groups.items()},
        "cost": {name: _costs(one) for name, one in (("dense", model), ("cut", small))},
    }
    judged = {"text": text.name, "dense": dense.as_json(), "cut": found.as_json()}
    folder = _write(given, model, small, groups, keep, about, judged, calibration)
    judge.show(console, {"dense": dense, "cut": found}, given.prompts, text.name)
    for line in _lines(about):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    judge.show_folder(console, folder, given.compress)
    return folder


def _recipe_of(given: CutSettings) -> Recipe:
    """Returns the recipe of the scores, checked in all that needs no model."""
    if (given.sparsity is None) == (given.budget is None):
        said = "neither was given" if given.sparsity is None else "both were given"
        raise InputError(f"cut needs --sparsity or --budget, {said}; give one of them")
    request = Recipe(
        criterion=given.criterion,
        options=options_of(given.options),
        sparsity=0.0 if given.sparsity is None else given.sparsity,
        seed=given.seed,
        zeros="free",
    )
    recipe.check(request, unavailable=NO_OPTIMIZER)
    if given.budget is not None:
        _budget(given.budget, 1).limit  # noqa: B018 (checks the number)
    return request


def _budget(text: str, vocab_size: int) -> Budget:
    name, equals, value = text.partition("=")
    known = ("params", "flops", "bytes", "latency")
    if not equals or name not in known:
        raise InputError(
            f"--budget={text} must be NAME=NUMBER with a name among {', '.join(known)}; write for "
            "example --budget=params=1e8"
        )
    measure = decode_seconds(vocab_size) if name == "latency" else None
    number: Any = literal(value)
    return Budget(**{name: number}, measure=measure)


def _chosen(
    given: CutSettings,
    groups: dict[str, Group],
    units: Mapping[str, Any],
    params: PyTree,
    config: Any,
    vocab_size: int,
) -> structured.Keep:
    return structured.choose(
        groups,
        units,
        sparsity=given.sparsity,
        budget=None if given.budget is None else _budget(given.budget, vocab_size),
        multiple=given.multiple,
        params=params,
        config=config,
    )


def _check_choice(
    given: CutSettings, groups: dict[str, Group], checkpoint: interop.PretrainedSource
) -> None:
    """Refuses what the shapes do not admit or no config.json can say, before a weight is read."""
    if given.budget is not None and given.budget.startswith(("latency", "bytes")):
        return  # times and dtypes are not known yet
    nothing = {name: np.zeros(group.shape) for name, group in groups.items()}
    config, vocab_size = checkpoint.config, checkpoint.vocab_size
    keep = _chosen(given, groups, nothing, choice.abstract_params(checkpoint), config, vocab_size)
    interop.write_config(structured.cut_config(config, keep), vocab_size, checkpoint.family)


def _unit_scores(
    given: CutSettings,
    request: Recipe,
    model: interop.Pretrained,
    groups: dict[str, Group],
    batches: list[Any],
) -> dict[str, Any]:
    """Returns the scores of the units, from scores of their prunable weights."""
    module = gpt.build(model.config, model.vocab_size)
    everything = {name: np.broadcast_to(np.arange(g.units), g.shape) for name, g in groups.items()}
    inside = structured.unit_mask(model.params, groups, everything)
    prunable = tree.map_leaves(
        lambda _, chosen, mask: chosen and mask is not None, tree.prunable(model.params), inside
    )
    stats = None
    if request.needs & set(BUFFERS):
        prunable = tracked.narrowed(model.path, model.params, prunable)
        stats = tracked.read(model.path, model.params)
    evidence = recipe.measure(
        [request],
        module,
        model.params,
        batches,
        loss=step.loss_fn(module),
        prunable=prunable,
        stats=stats,
        at_once=1,
    )
    layout = trace_layout(module, model.params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    scores = recipe.score(request, model.params, evidence, prunable, layout)
    return structured.unit_scores(groups, scores, given.reduce)


def _costs(model: interop.Pretrained) -> dict[str, float]:
    return {
        "parameters": tree.size(model.params),
        "bytes": structured.memory(model.params),
        "flops": structured.flops(model.config, model.params),
    }


def _write(
    given: CutSettings,
    model: interop.Pretrained,
    small: interop.Pretrained,
    groups: dict[str, Group],
    keep: structured.Keep,
    about: Mapping[str, Any],
    judged: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> Path:
    """Exports the model, with its masks cut alike if it has some, and the record of the cut."""
    commit = interop.commit_of_code()
    mask = record = None
    if has_masks(model.path):
        mask = structured.cut(interop.read_masks(model.path), groups, keep)
        record = interop.PruningRecord(
            **record_of(model.path), commit=commit, evaluation={**judged, "how": dict(about)}
        )

    def also(folder: Path) -> None:
        kept = {name: indices.tolist() for name, indices in keep.items()}
        (folder / KEPT).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        if record is None:
            said = {
                "cut": about,
                "calibration": calibration,
                "evaluation": judged,
                "commit": commit,
                "version": __version__,
            }
            text = json.dumps(said, indent=2, ensure_ascii=False)
            (folder / interop.RECORD).write_text(text + "\n", encoding="utf-8")

    return interop.export(
        given.out, small, mask=mask, record=record, also=also, compress=given.compress
    )


def _lines(about: Mapping[str, Any]) -> list[str]:
    """Returns what was kept and what the model costs, in words."""
    name = about["units"].replace("_", " ")
    counts = {*zip(about["kept"].values(), about["of"].values(), strict=True)}
    each = "" if name == "layers" else f" in each of {len(about['kept'])} layers"
    kept = " or ".join(f"{one:,} of {of:,}" for one, of in sorted(counts))
    dense, small = about["cost"]["dense"], about["cost"]["cut"]
    costs = ", ".join(
        f"{dense[key]:,.0f} -> {small[key]:,.0f} {what} ({small[key] / dense[key]:.1%})"
        for key, what in (
            ("parameters", "parameters"),
            ("bytes", "bytes of weights"),
            ("flops", "operations a token"),
        )
    )
    return [
        f"Kept {kept} {name}{each}: sparsity {about['sparsity']:.2%} by {about['criterion']}, "
        f"{about['reduce']} of a unit's weights.",
        f"{costs}.",
    ]
