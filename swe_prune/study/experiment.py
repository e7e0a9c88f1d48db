"""Everything that is built once for an experiment: data, model, steps compiled on first use."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Integer, PyTree

from swe_prune import data as data_lib
from swe_prune import interop, parallel, trajectory, tree
from swe_prune.config import CalibrationConfig, Config, PhaseConfig, to_steps
from swe_prune.errors import InputError
from swe_prune.evaluation import mean_loss
from swe_prune.layout import layout as trace_layout
from swe_prune.models import gpt
from swe_prune.runtime import storage
from swe_prune.study import (
    from_checkpoint,
    grid,
    recovery,
    workdir,
)
from swe_prune.study.shard import Shard
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
        checkpoint: whose weights the dense phase starts from; None: fresh ones.
        model: untied from any parameters; neither scanned nor rematerialised, since calibration and
            blockwise pruning look into its layers. The compiled steps have it as the config says.
        mesh: the devices.
        host_statistics: whether trajectory statistics live in the host's memory.
        undivided: a sentence for each axis of a parameter that the mesh does not divide.
        abstract_params: the parameters' shapes, dtypes and shardings.
        prunable: bool pytree like the parameters.
        layout: `layout.Axes` like the parameters.
        measures: what is tracked.
        cells: this process's share of the study.
        train_steps: of the dense phase.
        tunings: every recovery of the study, with its compiled step.
        track_every: steps between snapshots.
        validation: the fixed validation batches.
        training: as many fixed windows of the training text.
        calibration: random ones of it, in batches; empty when no cell needs them.
        optimizer: of the dense phase.
        train_step: compiled, for the dense phase.
        eval_step: compiled.
    """

    config: Config
    workdir: workdir.Workdir
    data: data_lib.TextData
    checkpoint: interop.PretrainedSource | None
    model: nn.Module
    mesh: Mesh
    host_statistics: bool
    undivided: list[str]
    abstract_params: PyTree
    prunable: PyTree
    layout: PyTree
    measures: tuple[str, ...]
    cells: list[grid.Cell]
    train_steps: int
    tunings: Mapping[grid.Recovery, recovery.Tuning]
    track_every: int
    validation: list[Any]
    training: list[Any]
    calibration: list[Any]
    optimizer: optax.GradientTransformation
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    def fresh_state(self, seed: int) -> state_lib.TrainState:
        """Returns the dense phase's state at step 0, statistics included, born on its devices."""

        def around(params: PyTree, seed: Any) -> state_lib.TrainState:
            return self.place(self.dense_state(params, seed))

        def born(seed: Any) -> state_lib.TrainState:
            return around(state_lib.init_params(self.model, seed, self.config.window), seed)

        if self.checkpoint is None:
            state = jax.jit(born)(seed)
        else:
            params = from_checkpoint.weights(self.checkpoint, self.abstract_params)
            state = jax.jit(around, donate_argnums=0)(params, seed)
        if self.host_statistics and state.stats is not None:
            state = dataclasses.replace(state, stats=parallel.to_host(state.stats))
        return state

    @functools.cached_property
    def loss(self) -> Callable[[PyTree, Any], Any]:
        """The function of (params, batch) to nats per token, which calibration reads."""
        return step_lib.loss_fn(self.model)

    @functools.cached_property
    def loss_gradient(self) -> Callable[[PyTree, Any], PyTree]:
        """The compiled gradient of `loss` with respect to all weights, masked ones too."""
        return jax.jit(jax.grad(self.loss))

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of arrays that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def dense_step(self) -> Callable[..., Any]:
        """Returns the train step of one dense phase, which counts its own snapshots."""
        if self.host_statistics:
            return parallel.tracking_on_host(self.train_step, self.track_every)
        return self.train_step

    def place(self, state: state_lib.TrainState) -> state_lib.TrainState:
        """Returns a state laid out over the devices; see `parallel.shard_state`."""
        return parallel.shard_state(state, self.abstract_params)

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
            index=settings.index,
        )
        return state_lib.create(params, self.optimizer, seed, stats=stats)

    def prunable_weights(self) -> int:
        """Returns how many weights may be pruned."""
        sizes = jax.tree.map(
            lambda leaf, chosen: tree.size(leaf) if chosen else 0,
            self.abstract_params,
            self.prunable,
        )
        return sum(jax.tree.leaves(sizes))

    def tuning_state(
        self, tuning: recovery.Tuning, params: PyTree, seed: int, masks: PyTree | None
    ) -> state_lib.TrainState:
        """Returns the state that a recovery (masks) or its control (None) starts from."""

        def start(params: PyTree, masks: PyTree | None) -> state_lib.TrainState:
            # A copy, since the step takes over its state and other cells start from these too.
            params = jax.tree.map(jnp.copy, params)
            state = state_lib.create(params, tuning.optimizer, seed, masks=masks)
            return self.place(state)

        return jax.jit(start)(params, masks)

    def tuning_steps(self, cell: grid.Cell) -> int:
        """Returns how long a cell trains after pruning begins."""
        return self.tunings[cell.recovery].steps if cell.recovery in self.tunings else 0

    def tokens(self, steps: int) -> int:
        """Returns the number of tokens that so many steps train on."""
        return steps * self.config.data.batch * self.config.window

    def batches(self, seed: int) -> Any:
        """Returns the training iterator for one seed of the data order."""
        settings = self.config
        windows = data_lib.train_iterator(
            self.data.train,
            context=settings.window,
            batch=settings.data.batch,
            seed=seed,
            rows=parallel.own_rows(settings.data.batch, self.mesh),
        )
        return parallel.ShardedBatches(windows, self.mesh, settings.data.batch)

    def validation_loss(self, params: PyTree) -> float:
        """Returns nats per token on the fixed validation windows."""
        return mean_loss(self.eval_step, params, self.validation)

    def training_loss(self, params: PyTree) -> float:
        """Returns nats per token on as many fixed windows of the training text."""
        return mean_loss(self.eval_step, params, self.training)

    def phase(self, name: str, folder: epath.Path, settings: PhaseConfig, steps: int) -> Phase:
        """Returns the loop's settings for one phase."""
        return Phase(
            name=name,
            folder=folder,
            steps=steps,
            log_every=self.config.log_every,
            eval_every=to_steps(settings.eval_every, total=steps),
            checkpoint_every=to_steps(settings.checkpoint_every, total=steps),
            sample_every=self.track_every,
            keep_latest=settings.keep_latest,
            keep_every=to_steps(settings.keep_every, total=steps),
            stop_after_skipped=settings.stop_after_skipped,
        )


def setup(config: Config, path: epath.PathLike, shard: Shard | None = None) -> Experiment:
    """Returns the experiment, with everything checked that can be before any training.

    Args:
        config: settings.
        path: the working directory, of which nothing is made yet; see `workdir.claim`.
        shard: which cells this process takes; None: all.

    Raises:
        InputError: whatever is wrong with the config or the data.
    """
    grid.cells(config)
    measures = grid.measures(config)
    config, checkpoint = from_checkpoint.opened(config)
    if checkpoint is None:
        data = data_lib.load(config.data, config.window)
    else:
        data = data_lib.load(config.data, config.window, checkpoint.tokenizer)
        from_checkpoint.check_texts(data)
    mesh = parallel.mesh(config.parallel)
    constrain = functools.partial(parallel.constrain_rows, mesh=mesh)
    trained = gpt.build(config.model, vocab_size(config, data), constrain)
    model = gpt.build(config.without_switches().model, vocab_size(config, data))
    parallel.check_batch(config.data.eval_batch, "config.data.eval_batch", mesh)
    for phase in (config.train, config.finetune):
        name = "config.data.batch" + (" / accumulate" if phase.accumulate > 1 else "")
        parallel.check_batch(config.data.batch // phase.accumulate, name, mesh)
    params = jax.eval_shape(lambda: state_lib.init_params(model, 0, config.window))
    specs, undivided = parallel.partition(params, _rules(config), mesh)
    params = parallel.with_shardings(params, specs, mesh)
    missing = None
    if config.parallel.statistics == "host":
        missing = parallel.host_memory_missing(mesh)
        if missing is not None:
            warnings.warn(missing, stacklevel=2)
    prunable = tree.prunable(params, config.prune.include, config.prune.exclude)
    one = jax.ShapeDtypeStruct((1, config.window), jnp.int32)
    layout = trace_layout(model, params, one)
    grid.check(config, params, prunable, layout)
    epoch = max(1, len(data.train) // (config.data.batch * config.window))
    train_steps = to_steps(config.train.steps, epoch=epoch)
    track_every = to_steps(config.trajectory.every, total=train_steps)
    _check_lengths(config, train_steps, track_every)
    optimizer = optimizer_lib.build(config.train, train_steps)
    place = functools.partial(parallel.shard_state, params=params)
    tunings = {
        one: recovery.build(config, one, trained, train_steps=train_steps, epoch=epoch, place=place)
        for one in grid.recoveries(config)
    }
    for cell in grid.cells(config):
        if cell.gradual:
            recovery.check_long_enough(cell.schedule, tunings[cell.recovery].steps)
    validation, training = (
        data_lib.eval_batches(
            tokens,
            context=config.window,
            windows=config.data.eval_windows,
            batch=config.data.eval_batch,
        )
        for tokens in (data.validation, data.train)
    )
    cells = (shard or Shard()).part(grid.cells(config))
    calibration = []
    if any(cell.recipe.reads_batches for cell in cells):
        calibration = _calibration(config, data, mesh)
    return Experiment(
        config=config,
        workdir=workdir.Workdir(storage.parse_path(path)),
        data=data,
        checkpoint=checkpoint,
        model=model,
        mesh=mesh,
        host_statistics=missing is None and config.parallel.statistics == "host",
        undivided=undivided,
        abstract_params=params,
        prunable=prunable,
        layout=layout,
        measures=measures,
        cells=cells,
        train_steps=train_steps,
        tunings=tunings,
        track_every=track_every,
        validation=[parallel.shard_batch(batch, mesh) for batch in validation],
        training=[parallel.shard_batch(batch, mesh) for batch in training],
        calibration=calibration,
        optimizer=optimizer,
        train_step=step_lib.compile_train_step(
            trained,
            optimizer,
            track_every,
            accumulate=config.train.accumulate,
            place=place,
        ),
        eval_step=step_lib.compile_eval_step(trained),
    )


def _calibration(config: Config, data: data_lib.TextData, mesh: Mesh) -> list[Any]:
    """Returns random windows of the training text in batches, sharded; none is evaluated on."""
    settings = config.calibration
    for size in {settings.batch, settings.windows} - {0}:
        parallel.check_batch(
            min(size, settings.windows), "config.calibration.batch, .windows", mesh
        )
    windows = calibration_windows(data.train, config.window, settings)
    return [parallel.shard_batch(batch, mesh) for batch in windows]


def calibration_windows(
    tokens: Integer[np.ndarray, " N"], context: int, settings: CalibrationConfig
) -> list[dict[str, Any]]:
    """Returns random windows of a text in batches, the same for the same seed.

    Args:
        tokens: Tokens of the training text.
        context: L, the tokens of a window.
        settings: Number of windows, batch size and seed.

    Returns:
        {"inputs": int32 (B, L), "targets": int32 (B, L)} each; the last batch may be smaller.

    Raises:
        InputError: The text has fewer windows.
    """
    found = data_lib.random_batches(
        tokens,
        context=context,
        windows=settings.windows,
        batch=settings.batch,
        seed=settings.seed,
        setting="config.calibration.windows",
    )
    return [dict(batch) for batch in found]


def _rules(config: Config) -> list[tuple[str, tuple[str | None, ...]]]:
    given = config.parallel.rules
    if given is None:
        return list(gpt.partition_rules(config.model))
    return [(rule.pattern, rule.axes) for rule in given]


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


def _check_lengths(config: Config, train: int, track_every: int) -> None:
    if train < 1:
        raise InputError(f"config.train.steps is {train}; give at least one step")
    snapshots = train // track_every if track_every else 0
    if snapshots < config.trajectory.window_start:
        raise InputError(
            f"{train} training steps with a snapshot every {track_every} give {snapshots} "
            f"snapshots, and the window starts at {config.trajectory.window_start}; lower "
            "config.trajectory.every or window_start"
        )
