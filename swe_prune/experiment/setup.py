"""Everything that is built once for an experiment: data, model, steps compiled on first use."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import PyTree

from swe_prune import data as data_lib
from swe_prune import trajectory, tree
from swe_prune.config import Config, PhaseConfig, to_steps
from swe_prune.errors import InputError
from swe_prune.evaluation import mean_loss
from swe_prune.experiment import checks, grid, workdir
from swe_prune.models import gpt
from swe_prune.training import optimizer as optimizer_lib
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib
from swe_prune.training.phase import Phase


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the phases share.

    Attributes:
        config: settings.
        workdir: where results go.
        data: token ids of both splits.
        model: untied from any parameters.
        abstract_params: the parameters' shapes and dtypes.
        prunable: bool pytree like the parameters.
        measures: what is tracked.
        train_steps: of the dense phase.
        finetune_steps: of fine-tuning and of the control.
        track_every: steps between snapshots.
        validation: the fixed validation batches.
        train_step: compiled, for the dense phase.
        finetune_step: compiled, for fine-tuning and the control.
        eval_step: compiled.
    """

    config: Config
    workdir: workdir.Workdir
    data: data_lib.TextData
    model: nn.Module
    abstract_params: PyTree
    prunable: PyTree
    measures: tuple[str, ...]
    train_steps: int
    finetune_steps: int
    track_every: int
    validation: list[Any]
    train_step: Callable[..., Any]
    finetune_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    def fresh_state(self, seed: int) -> state_lib.TrainState:
        """Returns the dense phase's state at step 0, statistics included."""
        params = jax.jit(state_lib.init_params, static_argnums=(0, 2))(
            self.model, seed, self.config.model.context
        )
        return self.dense_state(params, seed)

    def dense_state(self, params: PyTree, seed: int) -> state_lib.TrainState:
        """Returns the dense phase's state around some parameters, which may be abstract."""
        settings = self.config.trajectory
        stats = trajectory.init(
            params,
            self.measures,
            self.prunable,
            power=settings.power,
            window_start=settings.window_start,
            vote_rate=settings.vote_rate,
        )
        optimizer = optimizer_lib.build(self.config.train, self.train_steps)
        return state_lib.create(params, optimizer, seed, stats=stats)

    def prunable_weights(self) -> int:
        """Returns how many weights may be pruned."""
        sizes = jax.tree.map(
            lambda leaf, chosen: tree.size(leaf) if chosen else 0,
            self.abstract_params,
            self.prunable,
        )
        return sum(jax.tree.leaves(sizes))

    def finetune_state(
        self, params: PyTree, seed: int, masks: PyTree | None
    ) -> state_lib.TrainState:
        """Returns the state that fine-tuning (masks) or the control (None) starts from."""
        optimizer = optimizer_lib.build(self.config.finetune, self.finetune_steps)
        # A copy, since the step takes over its state and other cells start from these weights too.
        params = jax.tree.map(lambda weight: weight.copy(), params)
        return state_lib.create(params, optimizer, seed, masks=masks)

    def batches(self, seed: int) -> Any:
        """Returns the training iterator for one seed of the data order."""
        settings = self.config
        return data_lib.train_iterator(
            self.data.train,
            context=settings.model.context,
            batch=settings.data.batch,
            seed=seed,
        )

    def validation_loss(self, params: PyTree) -> float:
        """Returns nats per token on the fixed windows."""
        return mean_loss(self.eval_step, params, self.validation)

    def phase(self, name: str, folder: Path, settings: PhaseConfig, steps: int) -> Phase:
        """Returns the loop's settings for one phase."""
        return Phase(
            name=name,
            folder=folder,
            steps=steps,
            log_every=self.config.log_every,
            eval_every=to_steps(settings.eval_every, total=steps),
            checkpoint_every=to_steps(settings.checkpoint_every, total=steps),
            sample_every=self.track_every,
        )


def setup(config: Config, path: Path) -> Experiment:
    """Returns the experiment, with everything checked that can be before any training.

    Args:
        config: settings.
        path: the working directory, of which nothing is made yet; see `workdir.claim`.

    Raises:
        InputError: whatever is wrong with the config or the data.
    """
    grid.cells(config)
    measures = grid.measures(config)
    data = data_lib.load(config.data, config.model.context)
    model = gpt.build(config.model, vocab_size(config, data))
    params = jax.eval_shape(lambda: state_lib.init_params(model, 0, config.model.context))
    prunable = tree.prunable(params, config.prune.include, config.prune.exclude)
    checks.check(grid.cells(config), params, prunable)
    epoch = max(1, len(data.train) // (config.data.batch * config.model.context))
    train_steps = to_steps(config.train.steps, epoch=epoch)
    finetune_steps = to_steps(config.finetune.steps, epoch=epoch)
    track_every = to_steps(config.trajectory.every, total=train_steps)
    _check_lengths(config, train_steps, finetune_steps, track_every)
    windows = data_lib.eval_batches(
        data.validation,
        context=config.model.context,
        windows=config.data.eval_windows,
        batch=config.data.eval_batch,
    )
    return Experiment(
        config=config,
        workdir=workdir.Workdir(path),
        data=data,
        model=model,
        abstract_params=params,
        prunable=prunable,
        measures=measures,
        train_steps=train_steps,
        finetune_steps=finetune_steps,
        track_every=track_every,
        validation=[dict(batch) for batch in windows],
        train_step=step_lib.compile_train_step(
            model, optimizer_lib.build(config.train, train_steps), track_every
        ),
        finetune_step=step_lib.compile_train_step(
            model, optimizer_lib.build(config.finetune, finetune_steps)
        ),
        eval_step=step_lib.compile_eval_step(model),
    )


def vocab_size(config: Config, data: data_lib.TextData) -> int:
    """Returns the model's number of symbols: the config's, or the tokenizer's.

    Raises:
        InputError: the config's is too small for the text.
    """
    found = data.tokenizer.vocab_size
    wanted = config.model.vocab_size
    if wanted is not None and wanted < found:
        raise InputError(
            f"config.model.vocab_size = {wanted} is too small for {data.name!r}, which has {found} "
            "symbols; raise it, or set None"
        )
    return wanted or found


def _check_lengths(config: Config, train: int, finetune: int, track_every: int) -> None:
    for name, steps in (("train", train), ("finetune", finetune)):
        if steps < 1:
            raise InputError(f"config.{name}.steps is {steps}; give at least one step")
    snapshots = train // track_every if track_every else 0
    if snapshots < config.trajectory.window_start:
        raise InputError(
            f"{train} training steps with a snapshot every {track_every} give {snapshots} "
            f"snapshots, and the window starts at {config.trajectory.window_start}; lower "
            "config.trajectory.every or window_start"
        )
