"""`plan`, `prune`, `finetune` and `evaluate` of a pretrained model."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Console
from rich.markup import escape

from swe_prune import data as data_lib
from swe_prune import interop, masks, recipe, tree
from swe_prune.errors import InputError
from swe_prune.evaluation import gate
from swe_prune.models import phi3v
from swe_prune.pretrained import choice, dry_run, finetuning, judge, texts, tracked
from swe_prune.pretrained.opening import opened, weights_like
from swe_prune.pretrained.request import check_trajectory, recipe_of
from swe_prune.pretrained.settings import (
    EvaluateSettings,
    FinetuneSettings,
    PruneSettings,
)
from swe_prune.recipe import Recipe
from swe_prune.runtime.preemption import PREEMPTION
from swe_prune.training import step
from swe_prune.training.progress import Progress
from swe_prune.trajectory import BUFFERS

WIDTH = 110
"""Columns of what is printed where there is no terminal to ask."""


def main(command: str, given: Any) -> None:
    """Runs a command.

    Args:
        command: Name of the command, one of `settings.COMMANDS`.
        given: Settings of the command.

    Raises:
        InputError: As each command.
    """
    run = {"plan": dry_run.plan, "prune": prune, "finetune": finetune, "evaluate": evaluate}[
        command
    ]
    with PREEMPTION.installed():
        run(given, Progress(), Console(width=None if sys.stdout.isatty() else WIDTH))


def prune(given: PruneSettings, progress: Progress, console: Console) -> Path:
    """Prunes a pretrained model, judges it beside the dense one, and writes it; returns its folder.

    Raises:
        InputError: anything that is wrong with the settings, the model or the texts.
        RunError: a Hessian that no damping helps.
    """
    request = recipe_of(given)
    interop.check_free(given.out)
    checkpoint = opened(given, progress)
    check_trajectory(request, tracked.there(checkpoint.path), given.model)
    chosen, layout = dry_run.chosen_weights(request, checkpoint, given)
    text = texts.read(given.evaluation, checkpoint)
    batches, calibration = [], None
    if request.reads_batches:
        used = texts.read(given.calibration, checkpoint)
        texts.keep_apart(used, text)
        window = given.calibration_window or min(2048, checkpoint.config.context)
        _check_window("--calibration-window", window, checkpoint)
        batches = data_lib.random_batches(
            used.tokens,
            context=window,
            windows=given.calibration_windows,
            batch=given.calibration_batch,
            seed=given.seed,
            setting="--calibration-windows",
        )
        calibration = {"text": used.name, "windows": given.calibration_windows, "window": window,
                       "seed": given.seed}  # fmt: skip
        progress.say(
            f"Calibrating on {given.calibration_windows} windows of {window} tokens of {used.name}."
        )
    model = checkpoint.read(dtype=given.dtype)
    module = phi3v.build(model.config, model.vocab_size)
    reads_trajectory = bool(request.needs & set(BUFFERS))
    stats = tracked.read(checkpoint.path, model.params) if reads_trajectory else None
    dense = judge.judge(module, model.params, model, text, given)
    gate(dense.perplexity, uniform=model.vocab_size, at_most=given.at_most)
    begun = time.perf_counter()
    kernels = sum(jax.tree.leaves(chosen))
    if choice.rules(given):
        progress.say(escape(choice.sentence(given, chosen)))
    with progress.phase(f"pruning by {given.criterion}", kernels) as advance:
        done = iter(range(1, kernels + 1))
        loss = step.loss_fn(module)
        evidence = recipe.measure(
            [request],
            module,
            model.params,
            batches,
            loss=loss,
            prunable=chosen,
            stats=stats,
            at_once=1,
        )
        params, mask = recipe.prune(
            request,
            model.params,
            evidence,
            prunable=chosen,
            layout=layout,
            model=module,
            blocks=phi3v.blocks(model.config),
            batches=batches,
            loss=loss,
            offload=given.offload,
            progress=lambda report: advance(next(done), {}),
        )
        jax.block_until_ready(params)
    seconds = time.perf_counter() - begun
    found = judge.judge(module, params, model, text, given, dense=model.params)
    counted = masks.summary(mask)
    record = interop.PruningRecord(
        request,
        calibration=calibration,
        evaluation={"text": text.name, "dense": dense.as_json(), "pruned": found.as_json()},
        rules=choice.rules(given) or None,
        commit=interop.commit_of_code(),
    )
    folder = interop.export(given.out, model, params, mask=mask, record=record)
    _show(console, {"dense": dense, "pruned": found}, given.prompts, text.name)
    console.print(
        f"Removed {counted.pruned:,} of {counted.total:,} prunable weights "
        f"({counted.sparsity:.2%}; {counted.pruned / tree.size(params):.2%} of all) "
        f"in {seconds:.1f} s. {dry_run.WHAT_A_MASK_GIVES}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(str(folder), highlight=False, soft_wrap=True)
    return folder


def finetune(given: FinetuneSettings, progress: Progress, console: Console) -> Path:
    """Fine-tunes a pretrained or a pruned model, judges it, and writes it; returns its folder.

    Raises:
        InputError: anything that is wrong with the settings, the model or the texts.
        Preempted, RunError: as `training.loop.fit`; the same command goes on.
    """
    finetuning.checked(given)
    interop.check_free(given.out)
    checkpoint = opened(given, progress)
    choice.of_checkpoint(checkpoint, given)
    text, used = (texts.read(name, checkpoint) for name in (given.evaluation, given.text))
    texts.keep_apart(used, text)
    _check_window("--train-window", given.train_window, checkpoint)
    model = checkpoint.read(dtype=given.dtype)
    recorded = _has_masks(model.path)
    mask = interop.read_masks(model.path) if recorded else _held_zeros(model, given, console)
    module = phi3v.build(model.config, model.vocab_size)
    trained = phi3v.build(dataclasses.replace(model.config, remat=given.remat), model.vocab_size)
    before = judge.judge(module, model.params, model, text, given)
    gate(before.perplexity, uniform=model.vocab_size, at_most=given.at_most)
    teacher = None
    if given.teacher is not None:
        teacher = weights_like(model, given.teacher, given.teacher_prefix, progress)
    start, dtypes = finetuning.as_float32(model.params)
    params, mask, stats = finetuning.tuned(trained, start, mask, teacher, used, given, progress)
    params = tree.map_named(lambda name, leaf: leaf.astype(dtypes[name]), params)
    after = judge.judge(module, params, model, text, given)
    how = {"text": used.name, **{k: getattr(given, k) for k in ("steps", "batch", "learning_rate")}}
    record = None
    if recorded:
        record = interop.PruningRecord(
            **_record_of(model.path),
            commit=interop.commit_of_code(),
            evaluation={"text": text.name, "before": before.as_json(), "finetuned": after.as_json(),
                        "finetuning": how},
        )  # fmt: skip

    def also(folder: Path) -> None:
        if stats is not None:
            tracked.write(
                folder, stats, {"every": given.track_every, "rules": choice.rules(given), **how}
            )

    mask = mask if recorded else None  # no record says how others made their zeros
    folder = interop.export(given.out, model, params, mask=mask, record=record, also=also)
    finetuning.forget(given)
    _show(console, {"before": before, "fine-tuned": after}, given.prompts, text.name)
    console.print(str(folder), highlight=False, soft_wrap=True)
    return folder


def evaluate(given: EvaluateSettings, progress: Progress, console: Console) -> dict[str, Any]:
    """Judges a model, beside the dense one where that is named; returns the verdicts by name.

    Raises:
        InputError: anything that is wrong with the settings, the models or the text.
    """
    model = opened(given, progress).read(dtype=given.dtype)
    text = texts.read(given.evaluation, model)
    module = phi3v.build(model.config, model.vocab_size)
    rows, dense = {}, None
    if given.dense is not None:
        dense = weights_like(model, given.dense, given.dense_prefix, progress)
        rows["dense"] = judge.judge(module, dense, model, text, given)
        gate(rows["dense"].perplexity, uniform=model.vocab_size, at_most=given.at_most)
    rows["model"] = judge.judge(module, model.params, model, text, given, dense=dense)
    _show(console, rows, given.prompts, text.name)
    return rows


def _check_window(name: str, window: int, checkpoint: interop.PretrainedSource) -> None:
    context = checkpoint.config.context
    if not 1 <= window <= context:
        raise InputError(
            f"{name}={window} does not fit the {context} tokens of {checkpoint.path}; give 1 to "
            f"{context}"
        )


def _show(
    console: Console, rows: dict[str, judge.Verdict], prompts: tuple[str, ...], text: str
) -> None:
    for line in judge.table(rows, prompts, text):
        console.print(line, highlight=False, soft_wrap=isinstance(line, str), markup=False)


def _held_zeros(
    model: interop.Pretrained, given: FinetuneSettings, console: Console
) -> PyTree | None:
    """Returns masks of the zeros of a model without a mask file; None if it has none."""
    mask = None if given.zeros == "free" else masks.of_zeros(model.params)
    found = None if mask is None else masks.summary(mask)
    if found is None or not found.pruned:
        return None
    console.print(
        f"{found.pruned:,} of {found.total:,} prunable weights ({100 * found.sparsity:.1f} %) are "
        "0 and stay so; --zeros=free lets them train.",
        highlight=False,
        soft_wrap=True,
    )
    return mask


def _has_masks(path: Path) -> bool:
    return path.is_dir() and (path / interop.MASKS).exists()


def _record_of(path: Path) -> dict[str, Any]:
    before = interop.read_record(path)
    try:
        request = Recipe(**before["recipe"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path / 'pruning.json'} does not say how the model was pruned ({error}); prune it "
            "again with this version"
        ) from None
    return {
        "recipe": request,
        "calibration": before.get("calibration"),
        "rules": before.get("rules"),
    }
