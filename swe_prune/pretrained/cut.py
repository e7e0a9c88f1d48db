"""`cut`: neurons, heads or layers cut out of a pretrained model, which is then really smaller."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree
from rich.console import Console

from swe_prune import importance, interop, structured, tree
from swe_prune.config import literal
from swe_prune.errors import InputError, shown
from swe_prune.evaluation import gate
from swe_prune.evaluation.latency import Workload, decode_seconds
from swe_prune.interop.stranger_files import inside, read_json, write_json
from swe_prune.layout import layout
from swe_prune.models import phi3v
from swe_prune.pretrained import judge, texts, tracked
from swe_prune.pretrained.opening import has_masks, opened, record_of, said
from swe_prune.pretrained.request import NO_OPTIMIZER, check_trajectory, options_of
from swe_prune.pretrained.settings import CutSettings
from swe_prune.recipe import CutRecipe
from swe_prune.structured import Budget, Group
from swe_prune.structured.decoder import LAYERS
from swe_prune.training import step
from swe_prune.training.progress import Progress, print_line
from swe_prune.trajectory import BUFFERS
from swe_prune.version import __version__

KEPT = "kept_units.json"
"""File with the indices of the kept units by group, and with what made others redundant."""


def cut(given: CutSettings, progress: Progress, console: Console) -> Path:
    """Cuts a pretrained model, judges it next to the dense one, and writes it; returns its folder.

    Raises:
        InputError: Anything that is wrong with the settings, the model or the texts.
    """
    _check_amount(given)
    recipe = _recipe(given)
    interop.check_free(given.out)
    checkpoint = opened(given, progress)
    of_weights = recipe.recipe
    if of_weights is not None:
        check_trajectory(of_weights, tracked.there(checkpoint.path), given.model)
    if given.restore and has_masks(checkpoint.path):
        raise InputError(
            f"{checkpoint.path} has masks, and --restore would change the weights that they "
            "remove; cut the dense model with --restore and prune it then"
        )
    groups = structured.groups(checkpoint.config, given.units)
    budget = None if given.budget is None else _budget(given.budget, checkpoint)
    _check_choice(recipe, groups, budget, checkpoint, given.dtype)
    text = texts.read(given.evaluation, checkpoint)
    judge.check(checkpoint, text, given)
    batches, calibration = [], None
    if recipe.reads_batches:
        batches, calibration = texts.calibration(given, checkpoint, text, progress)
    else:
        texts.say_unread(given, given.criterion, progress)
    model, recorded = checkpoint.read(dtype=given.dtype), has_masks(checkpoint.path)
    module = phi3v.build(model.config, model.vocab_size)
    dense = judge.judge(module, model.params, model, text, given)
    gate(dense.perplexity, uniform=model.vocab_size, at_most=given.at_most)
    made = said(progress, lambda: _cut(recipe, model, module, groups, budget, batches))
    keep = made.keep
    small = dataclasses.replace(model, params=made.params, config=made.config)
    found = judge.judge(
        phi3v.build(small.config, small.vocab_size),
        small.params,
        small,
        text,
        given,
        dense=model.params,
        dense_module=module,
    )
    about = {
        "units": given.units,
        "criterion": given.criterion,
        "options": dict(recipe.options),
        "reduce": given.reduce,
        "sparsity": structured.summary(groups, keep).sparsity,
        "requested": {"sparsity": given.sparsity, "budget": given.budget},
        "kept": {name: one.kept for name, one in structured.summary(groups, keep).tensors.items()},
        "of": {name: group.units for name, group in groups.items()},
        "cost": {name: _costs(one) for name, one in (("dense", model), ("cut", small))},
        "restored": [dataclasses.asdict(one) for one in made.refits],
    }
    judged = {"text": text.name, "dense": dense.as_json(), "cut": found.as_json()}
    kept: dict[str, Any] = {"kept": {name: some.tolist() for name, some in keep.items()}}
    if made.redundant:  # partners of the units that went, in their order
        kept["removed"] = {
            name: one.as_json()["removed"][: groups[name].units - len(keep[name])]
            for name, one in made.redundant.items()
        }
    mask = structured.cut(interop.read_masks(model.path), groups, keep) if recorded else None
    folder = _write(given, model, small, mask, kept, about, judged, calibration)
    judge.show(console, {"dense": dense, "cut": found}, given.prompts, text.name)
    for line in _lines(about):
        print_line(console, line)
    judge.show_folder(console, folder, given.compress)
    return folder


def kept_layers(path: Path) -> list[int] | None:
    """Returns the layers that a cut model has of the model it was cut from; None: all of them.

    Raises:
        InputError: Its file of kept units cannot be read.
    """
    file = path / KEPT
    if not (path.is_dir() and os.path.lexists(file)):
        return None
    kept = read_json(file).get("kept")
    layers = kept.get(LAYERS, []) if isinstance(kept, dict) else None
    if not isinstance(layers, list) or not all(type(one) is int and one >= 0 for one in layers):
        raise InputError(
            f"{file} has {shown(layers)} as the kept layers; get it again, or remove it"
        )
    return layers or None


def carry_on(source: Path, folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Writes the record of a cut model into the folder of what was made of it, if it is one.

    Args:
        source: Path of the model that was cut.
        folder: Folder to write to.
        evaluation: Measurements to add to those of the cut.
    """
    if not (source.is_dir() and os.path.lexists(source / KEPT)):
        return
    said = interop.read_record(source)
    before = said.get("evaluation")
    said["evaluation"] = {**(before if isinstance(before, dict) else {}), **evaluation}
    write_json(folder / interop.RECORD, said)
    shutil.copyfile(inside(source, KEPT), folder / KEPT)


def _check_amount(given: CutSettings) -> None:
    if (given.sparsity is None) == (given.budget is None):
        said = "neither was given" if given.sparsity is None else "both were given"
        raise InputError(f"cut needs --sparsity or --budget, {said}; give one of them")
    if given.budget is not None:
        _ = _budget(given.budget).limit  # checks the number


def _budget(text: str, checkpoint: interop.PretrainedSource | None = None) -> Budget:
    """Returns the budget that a text names; one of latency is measured on models like this one."""
    name, equals, value = text.partition("=")
    known = ("params", "flops", "bytes", "latency")
    if not equals or name not in known:
        raise InputError(
            f"--budget={text} must be NAME=NUMBER with a name among {', '.join(known)}; write for "
            "example --budget=params=1e8"
        )
    measure = None
    if name == "latency":
        load, size = Workload(), 1
        if checkpoint is not None:  # whose context may be short
            prompt = max(1, min(load.prompt, checkpoint.config.context - load.new - 1))
            load, size = dataclasses.replace(load, prompt=prompt), checkpoint.vocab_size
        measure = decode_seconds(size, load)
    number: Any = literal(value)
    return Budget(**{name: number}, measure=measure)


def _recipe(given: CutSettings) -> CutRecipe:
    """Returns the request of the settings, checked."""
    recipe = CutRecipe(
        given.units,
        given.sparsity,
        given.criterion,
        given.restore,
        options=options_of(given.options),
        reduce=given.reduce,
        multiple=given.multiple,
        zeros="free",
        seed=given.seed,
    )
    structured.check_cut(recipe, unavailable=NO_OPTIMIZER)
    return recipe


def _cut(
    recipe: CutRecipe,
    model: interop.Pretrained,
    module: nn.Module,
    groups: dict[str, Group],
    budget: Budget | None,
    batches: list[Any],
) -> structured.CutResult:
    """Returns the cut model, scored by its trajectory where the criterion reads one."""
    prunable, stats = None, None
    if recipe.recipe is not None:
        # Only what the units are scored by is measured.
        everything = {n: np.broadcast_to(np.arange(g.units), g.shape) for n, g in groups.items()}
        prunable = tree.map_leaves(
            lambda _, chosen, mask: chosen and mask is not None,
            tree.prunable(model.params),
            structured.unit_mask(model.params, groups, everything),
        )
        if recipe.recipe.needs & set(BUFFERS):
            prunable = tracked.narrowed(model.path, model.params, prunable)
            stats = tracked.read(model.path, model.params)
    return structured.cut_model(
        recipe,
        model.config,
        module,
        model.params,
        batches,
        loss=step.loss_fn(module),
        budget=budget,
        blocks=phi3v.blocks(model.config),
        layout=layout(module, model.params, jax.ShapeDtypeStruct((1, 2), jnp.int32)),
        prunable=prunable,
        stats=stats,
        at_once=1,
    )


def _check_choice(
    recipe: CutRecipe,
    groups: dict[str, Group],
    budget: Budget | None,
    checkpoint: interop.PretrainedSource,
    dtype: str | None,
) -> None:
    """Refuses what the shapes do not admit or no config.json can say, before a weight is read.

    How many units stay does not depend on their scores. A budget of latency times the candidates
    now, and remembers them.
    """
    structured.check_cut(recipe, checkpoint.config)
    keep = structured.choose(
        groups,
        {name: np.zeros(group.shape) for name, group in groups.items()},
        sparsity=recipe.sparsity,
        budget=budget,
        multiple=recipe.multiple,
        params=checkpoint.abstract(dtype=dtype),
        config=checkpoint.config,
    )
    small = structured.cut_config(checkpoint.config, keep)
    interop.write_config(small, checkpoint.vocab_size, checkpoint.family)


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
    mask: PyTree | None,
    kept: Mapping[str, Any],
    about: Mapping[str, Any],
    judged: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
) -> Path:
    """Exports the model, with its masks cut alike if it has some, and the record of the cut."""
    commit = interop.commit_of_code()
    record = None
    if mask is not None:
        record = interop.PruningRecord(
            **record_of(model.path), commit=commit, evaluation={**judged, "how": dict(about)}
        )

    def also(folder: Path) -> None:
        (folder / KEPT).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        if record is None:
            said = {
                "cut": about,
                "calibration": calibration,
                "evaluation": judged,
                "commit": commit,
                "version": __version__,
            }
            write_json(folder / interop.RECORD, said)

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
    of_weights = about["criterion"] in importance.names()
    lines = [
        f"Kept {kept} {name}{each}: sparsity {about['sparsity']:.2%} by {about['criterion']}"
        + (f", {about['reduce']} of a unit's weights." if of_weights else "."),
        f"{costs}.",
    ]
    if about["restored"]:
        before, after = (
            sum(one[key] for one in about["restored"]) / len(about["restored"])
            for key in ("before", "after")
        )
        lines.append(
            f"The refit took the outputs' relative error on the calibration text from {before:.4f} "
            f"to {after:.4f}, mean of {len(about['restored'])} projections."
        )
    return lines
