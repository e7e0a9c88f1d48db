"""`plan`, `prune`, `finetune` and `evaluate` of a pretrained model."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Console

from swe_prune import interop, masks, recipe, tree
from swe_prune.errors import InputError
from swe_prune.evaluation import gate
from swe_prune.masks.fitting import check_mask
from swe_prune.models import phi3v
from swe_prune.pretrained import bench, choice, cut, dry_run, finetuning, judge, texts, tracked
from swe_prune.pretrained.opening import has_masks, of_same_text, opened, record_of, said
from swe_prune.pretrained.request import check_trajectory, reasons, recipe_of
from swe_prune.pretrained.settings import (
    EvaluateSettings,
    FinetuneSettings,
    PruneSettings,
    check_numbers,
)
from swe_prune.runtime.preemption import PREEMPTION
from swe_prune.training import step
from swe_prune.training.progress import Progress, print_line
from swe_prune.trajectory import BUFFERS

WIDTH = 110
"""Columns of what is printed where there is no terminal to ask."""


def main(command: str, given: Any) -> None:
    """Runs a command.

    Args:
        command: Name of the command, one of `settings.COMMANDS`.
        given: Settings of the command.

    Raises:
        InputError: Errors of each command.
    """
    run = {
        "plan": dry_run.plan,
        "prune": prune,
        "cut": cut.cut,
        "finetune": finetune,
        "evaluate": evaluate,
        "bench": bench.bench,
    }[command]
    check_numbers(given)
    with PREEMPTION.installed():
        run(given, Progress(), Console(width=None if sys.stdout.isatty() else WIDTH))


def prune(given: PruneSettings, progress: Progress, console: Console) -> Path:
    """Prunes a pretrained model, judges it beside the dense one, and writes it; returns its folder.

    Raises:
        InputError: Anything that is wrong with the settings, the model or the texts.
        RunError: A Hessian that no damping helps.
    """
    request = recipe_of(given)
    interop.check_free(given.out)
    for line in reasons(given, request):
        progress.say(line)
    checkpoint = opened(given, progress)
    check_trajectory(request, tracked.there(checkpoint.path), given.model)
    chosen, layout = dry_run.chosen_weights(request, checkpoint, given)
    text = texts.read(given.evaluation, checkpoint)
    judge.check(checkpoint, text, given)
    batches, calibration = [], None
    if request.reads_batches:
        batches, calibration = texts.calibration(given, checkpoint, text, progress)
    else:
        texts.say_unread(given, request.name, progress)
    model = checkpoint.read(dtype=given.dtype)
    module = phi3v.build(model.config, model.vocab_size)
    reads_trajectory = bool(request.needs & set(BUFFERS))
    stats = tracked.read(checkpoint.path, model.params) if reads_trajectory else None
    dense = judge.judge(module, model.params, model, text, given)
    gate(dense.perplexity, uniform=model.vocab_size, at_most=given.at_most)
    begun = time.perf_counter()
    kernels = sum(jax.tree.leaves(chosen))
    if choice.rules(given):
        progress.say(choice.sentence(given, chosen))
    with progress.phase(f"pruning by {request.name}", kernels) as advance:
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
            accepted=True,
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
    folder = interop.export(
        given.out, model, params, mask=mask, record=record, compress=given.compress
    )
    judge.show(console, {"dense": dense, "pruned": found}, given.prompts, text.name)
    print_line(
        console,
        f"Removed {counted.pruned:,} of {counted.total:,} prunable weights "
        f"({counted.sparsity:.2%}; {counted.pruned / tree.size(params):.2%} of all) "
        f"in {seconds:.1f} s. {dry_run.WHAT_A_MASK_GIVES}",
    )
    judge.show_folder(console, folder, given.compress)
    return folder


def finetune(given: FinetuneSettings, progress: Progress, console: Console) -> Path:
    """Fine-tunes a pretrained or a pruned model, judges it, and writes it; returns its folder.

    Raises:
        InputError: Anything that is wrong with the settings, the model or the texts.
        Preempted, RunError: Errors of `training.loop.fit`; the same command resumes.
    """
    finetuning.checked(given)
    interop.check_free(given.out)
    checkpoint = opened(given, progress)
    teacher = None
    if given.teacher is not None:
        teacher = of_same_text(checkpoint, given.teacher, given.teacher_prefix, progress)
    kept = cut.kept_layers(checkpoint.path)
    recorded = has_masks(checkpoint.path) and given.masks != "ignore"
    _check_zeros(given, checkpoint.path, recorded)
    finetuning.check_model(given, checkpoint, teacher, kept)
    text, used = (texts.read(name, checkpoint) for name in (given.evaluation, given.text))
    texts.keep_apart(used, text)
    judge.check(checkpoint, text, given)
    second = None
    if given.second_evaluation is not None:
        second = texts.read(given.second_evaluation, checkpoint)
        texts.keep_apart(used, second)
        judge.check(checkpoint, second, given)
    texts.check_window("--train-window", given.train_window, checkpoint)
    finetuning.check_text(used, given)
    model = checkpoint.read(dtype=given.dtype)
    mask = _masks(model, given) if recorded else _held_zeros(model, given, console)
    module = phi3v.build(model.config, model.vocab_size)
    trained = phi3v.build(dataclasses.replace(model.config, remat=given.remat), model.vocab_size)
    before = judge.judge(module, model.params, model, text, given)
    gate(before.perplexity, uniform=model.vocab_size, at_most=given.at_most)
    seconds = []
    if second is not None:
        seconds.append(judge.perplexity_of(module, model.params, model, second, given))
    start, dtypes = finetuning.as_float32(model.params)
    params, mask, stats = finetuning.tuned(
        trained,
        start,
        mask,
        None if teacher is None else said(progress, teacher.read),
        used,
        given,
        progress,
        kept,
    )
    params = tree.map_named(lambda name, leaf: leaf.astype(dtypes[name]), params)
    after = judge.judge(module, params, model, text, given)
    how = {"text": used.name, **{k: getattr(given, k) for k in ("steps", "batch", "learning_rate")}}
    judged = {"text": text.name, "before": before.as_json(), "finetuned": after.as_json()}
    judged["finetuning"] = how
    if second is not None:
        seconds.append(judge.perplexity_of(module, params, model, second, given))
        judged["second"] = {
            "text": second.name,
            **dict(zip(("before", "finetuned"), (one.perplexity for one in seconds), strict=True)),
        }
    record = None
    if recorded:
        record = interop.PruningRecord(
            **record_of(model.path), commit=interop.commit_of_code(), evaluation=judged
        )

    def also(folder: Path) -> None:
        if record is None:
            cut.carry_on(model.path, folder, judged)
        if stats is not None:
            tracked.write(
                folder, stats, {"every": given.track_every, "rules": choice.rules(given), **how}
            )

    mask = mask if recorded else None  # no record says how others made their zeros
    folder = interop.export(
        given.out, model, params, mask=mask, record=record, also=also, compress=given.compress
    )
    finetuning.forget(given)
    judge.show(console, {"before": before, "fine-tuned": after}, given.prompts, text.name)
    if second is not None:
        judge.show_second(console, second.name, *seconds)
    judge.show_folder(console, folder, given.compress)
    return folder


def evaluate(given: EvaluateSettings, progress: Progress, console: Console) -> dict[str, Any]:
    """Judges a model, beside the dense one where that is named; returns the verdicts by name.

    Raises:
        InputError: Anything that is wrong with the settings, the models or the text.
    """
    checkpoint = opened(given, progress)
    text = texts.read(given.evaluation, checkpoint)
    judge.check(checkpoint, text, given)
    other = None
    if given.dense is not None:
        other = of_same_text(checkpoint, given.dense, given.dense_prefix, progress)
    model = checkpoint.read(dtype=given.dtype)
    module = phi3v.build(model.config, model.vocab_size)
    rows, dense, dense_module = {}, None, None
    if other is not None:
        dense = said(progress, other.read)
        dense_module = phi3v.build(dense.config, dense.vocab_size)
        rows["dense"] = judge.judge(dense_module, dense.params, model, text, given)
        gate(rows["dense"].perplexity, uniform=model.vocab_size, at_most=given.at_most)
    rows["model"] = judge.judge(
        module,
        model.params,
        model,
        text,
        given,
        dense=None if dense is None else dense.params,
        dense_module=dense_module,
    )
    judge.show(console, rows, given.prompts, text.name)
    return rows


def _check_zeros(given: FinetuneSettings, path: Path, recorded: bool) -> None:
    """Raises InputError for an option on zeros or masks that this model leaves without effect."""
    if recorded and given.zeros == "free":
        raise InputError(
            f"--zeros=free is for a model without a mask file, and that of {path} says which "
            "weights stay 0; give --masks=ignore with it to train them all"
        )
    if given.masks == "apply" and not recorded:
        raise InputError(
            f"--masks=apply needs a mask file, and {path} has no {interop.MASKS}; leave it out"
        )


def _held_zeros(
    model: interop.Pretrained, given: FinetuneSettings, console: Console
) -> PyTree | None:
    """Returns masks of the zeros of a model without a mask file; None if it has none."""
    mask = None if given.zeros == "free" else masks.of_zeros(model.params)
    found = None if mask is None else masks.summary(mask)
    if found is None or not found.pruned:
        return None
    print_line(
        console,
        f"{found.pruned:,} of {found.total:,} prunable weights ({100 * found.sparsity:.1f} %) are "
        "0 and stay so; --zeros=free lets them train.",
    )
    return mask


def _masks(model: interop.Pretrained, given: FinetuneSettings) -> PyTree:
    """Returns the masks of a model's file, found to be those of its weights.

    Raises:
        InputError: They do not fit the weights, would zero some that are not 0, or remove none.
    """
    file = model.path / interop.MASKS
    mask = interop.read_masks(model.path)
    try:
        check_mask(mask, model.params)
    except InputError as error:
        raise InputError(f"{file} is not of this model ({error}); give --masks=ignore") from None
    if given.masks == "apply":
        return mask
    ways = "give --masks=ignore to train without it, or --masks=apply to use it as it is"
    count = int(masks.revived(model.params, mask))
    if count:
        raise InputError(f"{file} would zero {count:,} weights that are not 0; {ways}")
    if not masks.summary(mask).pruned:
        raise InputError(f"{file} removes no weight; {ways}")
    return mask
