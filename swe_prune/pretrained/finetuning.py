"""Fine-tuning a pretrained model: tracked, with masks held, by adapters, or under a teacher.

A run keeps checkpoints in OUT.work beside the folder that it will write, and goes on from the last
when the same command is given again.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from jaxtyping import PyTree

from swe_prune import data as data_lib
from swe_prune import interop, parallel, resumable, trajectory, tree
from swe_prune.config import ParallelConfig, PhaseConfig
from swe_prune.errors import InputError, RunError, differences, reading
from swe_prune.models import phi3v
from swe_prune.pretrained import choice
from swe_prune.pretrained.settings import FinetuneSettings
from swe_prune.pretrained.texts import Text
from swe_prune.runtime import storage
from swe_prune.training import lora
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.distillation import Distillation, depth_map
from swe_prune.training.metrics import write_json
from swe_prune.training.phase import Phase
from swe_prune.training.progress import Progress
from swe_prune.trajectory import TrajectoryStats

BEGUN = "settings.json"
HOW_ONLY = ("remat", "accumulate", "checkpoint_every", "out", "compress")
"""Settings that a run may resume with other values of."""


def checked(settings: FinetuneSettings) -> None:
    """Refuses what cannot be done, before anything is read.

    Raises:
        InputError: A number out of range, or settings that exclude each other.
    """
    if settings.batch % settings.accumulate:
        raise InputError(
            f"--accumulate={settings.accumulate} does not divide --batch={settings.batch}; "
            "give a divisor of it"
        )
    tokens = settings.batch * settings.train_window
    if tokens >= 2**31:
        raise InputError(
            f"{tokens:,} tokens in a step are more than the arrays' 2^31; lower --batch"
        )
    if settings.track and settings.lora_rank is not None:
        raise InputError(
            "--track follows the weights, which stay as they are with --lora-rank; give one of both"
        )
    if settings.track and settings.steps < settings.track_every:
        raise InputError(
            f"--track-every={settings.track_every} takes no snapshot in --steps={settings.steps}; "
            "lower it"
        )
    if choice.rules(settings) and not settings.track and settings.lora_rank is None:
        raise InputError(
            f"--{next(iter(choice.rules(settings)))} chooses the weights to track or to adapt; "
            "give --track or --lora-rank with it"
        )
    if settings.track:
        trajectory.check_measures(settings.measures)
    _check_begun(settings)


def check_model(
    settings: FinetuneSettings,
    model: interop.PretrainedSource,
    teacher: interop.PretrainedSource | None,
    kept_layers: list[int] | None,
) -> None:
    """Refuses what cannot be done with a model and its teacher, before a weight is read.

    Raises:
        InputError: Rules that choose nothing, a rank of adapters that is too large, or blocks that
            are not those of the teacher.
    """
    params = choice.abstract_params(model)
    chosen = choice.prunable(params, **choice.rules(settings))
    if settings.lora_rank is not None:
        jax.eval_shape(lambda: _adapters(params, chosen, settings))
    if teacher is not None:
        _distillation(settings, kept_layers, model.config.layers, teacher)


def check_text(text: Text, settings: FinetuneSettings) -> None:
    """Refuses a text that is too short to train on, or batches that the devices cannot share."""
    _windows(text, settings)
    parallel.check_batch(settings.batch, "--batch", parallel.mesh(ParallelConfig()))


def _adapters(params: PyTree, chosen: PyTree, settings: FinetuneSettings) -> lora.Adapters:
    assert settings.lora_rank is not None
    targets = [f"^{re.escape(name)}$" for name, mark in tree.named_leaves(chosen) if mark]
    alpha = settings.lora_alpha or 2.0 * settings.lora_rank
    return lora.init(params, settings.lora_rank, alpha, jax.random.key(settings.seed), targets)


def _windows(text: Text, settings: FinetuneSettings) -> Any:
    return data_lib.train_iterator(
        text.tokens, context=settings.train_window, batch=settings.batch, seed=settings.seed
    )


def tuned(
    module: nn.Module,
    params: PyTree,
    masks: PyTree | None,
    teacher: interop.Pretrained | None,
    text: Text,
    settings: FinetuneSettings,
    progress: Progress,
    kept_layers: list[int] | None = None,
) -> tuple[PyTree, PyTree | None, TrajectoryStats | None]:
    """Returns the parameters after fine-tuning, the masks, and the trajectory if it was tracked.

    Args:
        module: Linen module of the model.
        params: Float32 weights; given up.
        masks: Bool pytree, None where dense; held, and given up. None: nothing is pruned.
        teacher: Dense model with the same vocabulary, or None.
        text: Text to train on.
        settings: Settings, already checked.
        progress: Progress that is told of every step.
        kept_layers: Layers of the teacher that the model has; None: all, or it is not known.

    Raises:
        InputError: The text is too short, or OUT.work is of other settings.
        Preempted, RunError: Errors of `training.loop.fit`.
    """
    work = _settle(settings)
    phase = PhaseConfig(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        final_learning_rate=0.0,
        warmup=min(settings.warmup, settings.steps),
        weight_decay=settings.weight_decay,
        b2=0.95,
    )
    optimizer = optimizer_lib.build(phase, settings.steps)
    fixed = state_lib.Frozen(teacher=None if teacher is None else teacher.params)
    chosen = choice.prunable(params, **choice.rules(settings))
    stats = trajectory.init(params, settings.measures, chosen) if settings.track else None
    if settings.lora_rank is not None:
        adapters = _adapters(params, chosen, settings)
        fixed = dataclasses.replace(fixed, base=params, masks=masks)
        state = state_lib.create(adapters, optimizer, settings.seed)
    else:
        state = state_lib.create(params, optimizer, settings.seed, masks=masks, stats=stats)
    distillation = teacher_model = None
    if teacher is not None:
        teacher_model = phi3v.build(teacher.config, teacher.vocab_size)
        distillation = _distillation(settings, kept_layers, module.config.layers, teacher)
    step = step_lib.compile_train_step(
        module,
        optimizer,
        settings.track_every,
        accumulate=settings.accumulate,
        distillation=distillation,
        teacher_model=teacher_model,
    )
    state = _fit(
        work, state, lambda state, batch: step(state, batch, fixed), text, settings, progress
    )
    if settings.lora_rank is not None:
        tuned = lora.merge(params, state.params, masks), masks, None
    else:
        tuned = state.params, state.masks, state.stats
    # A step that diverges leaves finite losses before it, and the last has none after it.
    for name, leaf in tree.named_leaves(tuned[0]):
        if not bool(jnp.isfinite(leaf).all()):
            raise RunError(
                f"{name!r} has weights that are NaN or infinite after {settings.steps} steps: "
                f"training diverged; remove {work}, which has the checkpoints of this run, and "
                "give a lower --learning-rate"
            )
    return tuned


def _distillation(
    settings: FinetuneSettings,
    kept: list[int] | None,
    layers: int,
    teacher: interop.Pretrained | interop.PretrainedSource,
) -> Distillation:
    of_teacher = teacher.config.layers
    compared = None
    if settings.features and layers != of_teacher:
        # The file of kept layers counts in the model that was cut, which may not be the teacher.
        if kept is None or len(kept) != layers or max(kept) >= of_teacher:
            raise InputError(
                f"--features compares the outputs of blocks, and the model has {layers} blocks, "
                f"its teacher {of_teacher}, and no kept_units.json says which of them; give the "
                "model that it was cut from as --teacher, or leave --features out"
            )
        compared = depth_map(kept, of_teacher)
    final = settings.final_distillation
    return Distillation(
        settings.distillation,
        settings.temperature,
        final_weight=final,
        steps=None if final is None else settings.steps,
        features=settings.features,
        layers=compared,
    )


def _fit(
    work: epath.Path,
    state: state_lib.TrainState,
    step: Callable[..., Any],
    text: Text,
    settings: FinetuneSettings,
    progress: Progress,
) -> state_lib.TrainState:
    mesh = parallel.mesh(ParallelConfig())
    batches = parallel.ShardedBatches(_windows(text, settings), mesh, settings.batch)
    run = Phase(
        name="fine-tuning",
        folder=work,
        steps=settings.steps,
        log_every=max(1, settings.steps // 20),
        checkpoint_every=settings.checkpoint_every,
        keep_latest=1,
    )
    with storage.held(work):
        return resumable.fit(run, state, step, batches, progress)[0]


def _asked(settings: FinetuneSettings) -> dict[str, Any]:
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if k not in HOW_ONLY}
    return json.loads(json.dumps(asked))


def _work(settings: FinetuneSettings) -> epath.Path:
    return storage.parse_path(f"{settings.out}.work")


def _check_begun(settings: FinetuneSettings) -> None:
    """Raises InputError if the folder of a run's checkpoints is of a run with other settings."""
    work = _work(settings)
    if not os.path.lexists(work / BEGUN):
        return
    with reading(work / BEGUN, f"remove {work} to start again"):
        before = storage.read_json(work / BEGUN)
    asked = _asked(settings)
    if differing := differences({key: before.get(key) for key in asked}, asked):
        raise InputError(
            f"{work} was begun with other settings: {differing}; go back to those, or remove it"
        )


def _settle(settings: FinetuneSettings) -> epath.Path:
    """Returns the folder of a run's checkpoints, made or found to be this run's."""
    work = _work(settings)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{str(work)!r} cannot be written ({error.strerror}); choose another --out"
        ) from error
    _check_begun(settings)
    if not os.path.lexists(work / BEGUN):
        write_json(work / BEGUN, _asked(settings))
    return work


def forget(settings: FinetuneSettings) -> None:
    """Removes the checkpoints, once the model is written."""
    shutil.rmtree(f"{settings.out}.work")


def as_float32(params: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Returns the weights to train, float32, and the dtype of each by its name."""
    dtypes = {name: leaf.dtype for name, leaf in tree.named_leaves(params)}
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), dtypes
