"""Everything that is built once for an experiment: data, model, steps compiled on first use."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from swe_prune import data as data_lib
from swe_prune import interop, parallel, trajectory, tree
from swe_prune.config import Config, PhaseConfig, to_steps
from swe_prune.errors import InputError
from swe_prune.evaluation import mean_loss
from swe_prune.layout import layout as trace_layout
from swe_prune.models import phi3v
from swe_prune.runtime import storage
from swe_prune.study import (
    cut_shapes,
    feeds,
    freezing,
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
        config: Settings of the experiment.
        workdir: Directory of the results.
        data: Token ids of both splits, or pictures with their texts.
        checkpoint: Pretrained model whose weights the dense phase starts from; None: fresh weights.
        model: Model without its parameters; neither scanned nor rematerialised, since calibration
            and blockwise pruning look into its layers. The compiled steps have it as the config
            says.
        mesh: Mesh of the devices.
        host_statistics: Whether trajectory statistics live in the host's memory.
        undivided: Sentence for each axis of a parameter that the mesh does not divide.
        abstract_params: Shapes, dtypes and shardings of the parameters.
        prunable: Bool pytree like the parameters.
        layout: `layout.Axes` like the parameters.
        measures: Trajectory measures that are tracked.
        cells: Cells of the study that this process runs.
        train_steps: Number of steps of the dense phase.
        tunings: Every recovery of the study, with its compiled step.
        track_every: Number of steps between snapshots.
        validation: Fixed validation batches.
        training: Same number of fixed windows of the training text.
        calibration: Random windows of the training text, in batches; empty when no cell needs them.
        optimizer: Optimizer of the dense phase.
        train_step: Compiled train step of the dense phase.
        eval_step: Compiled evaluation step.
    """

    config: Config
    workdir: workdir.Workdir
    data: feeds.Data
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
            inputs = feeds.example(self.config)
            return around(state_lib.init_params(self.model, seed, inputs), seed)

        if self.checkpoint is None:
            state = jax.jit(born)(seed)
        else:
            params = from_checkpoint.weights(self.checkpoint, self.abstract_params)
            state = jax.jit(around, donate_argnums=0)(params, seed)
        if self.host_statistics and state.stats is not None:
            state = dataclasses.replace(state, stats=parallel.to_host(state.stats))
        return state

    @property
    def seeds(self) -> list[int]:
        """The seeds of this process's cells, each once, sorted."""
        return sorted({cell.seed for cell in self.cells})

    def abstract_prunable(self, dtype: Any) -> PyTree:
        """Returns arrays of a dtype like the prunable weights, abstract; None where dense."""
        return tree.map_prunable(
            lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
            self.abstract_params,
            self.prunable,
        )

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
        size = self.config.data.batch
        rows = parallel.own_rows(size, self.mesh)
        batches = feeds.training(self.config, self.data, seed, rows)
        return parallel.ShardedBatches(batches, self.mesh, size)

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
        config: Settings of the experiment.
        path: Working directory; not created here.
        shard: Shard whose cells this process runs; None: all.

    Raises:
        InputError: Whatever is wrong with the config or the data.
    """
    grid.cells(config)
    cut_shapes.check(config)
    measures = grid.measures(config)
    config, checkpoint = from_checkpoint.opened(config)
    data = feeds.load(config, None if checkpoint is None else checkpoint.tokenizer)
    if checkpoint is not None and isinstance(data, data_lib.TextData):
        from_checkpoint.check_texts(data)
    mesh = parallel.mesh(config.parallel)
    constrain = functools.partial(parallel.constrain_rows, mesh=mesh)
    trained = phi3v.build(config.model, vocab_size(config, data), constrain)
    model = phi3v.build(config.without_switches().model, vocab_size(config, data))
    _check_batches(config, mesh)
    # The shapes of the parameters, and which of them may be pruned.
    inputs = jax.eval_shape(lambda: feeds.example(config))
    params = jax.eval_shape(lambda: state_lib.init_params(model, 0, feeds.example(config)))
    specs, undivided = parallel.partition(params, _rules(config), mesh)
    params = parallel.with_shardings(params, specs, mesh)
    prunable = _prunable(config, params)
    layout = trace_layout(model, params, inputs)
    grid.check(config, params, prunable, layout)
    cut_shapes.check_scored(config, params, prunable)
    # The lengths, the optimizers and the compiled steps of both phases.
    epoch = feeds.steps_per_epoch(config, data)
    train_steps = to_steps(config.train.steps, epoch=epoch)
    track_every = to_steps(config.trajectory.every, total=train_steps)
    _check_lengths(config, train_steps, track_every)
    frozen_in = functools.partial(freezing.frozen, config.model, params)
    frozen = frozen_in(config.train)
    optimizer = optimizer_lib.build(config.train, train_steps, frozen=frozen)
    place = functools.partial(parallel.shard_state, params=params)
    tunings = {
        one: recovery.build(
            config,
            one,
            trained,
            train_steps=train_steps,
            epoch=epoch,
            place=place,
            frozen_in=frozen_in,
        )
        for one in grid.recoveries(config)
    }
    for cell in grid.cells(config):
        if cell.gradual:
            recovery.check_long_enough(cell.schedule, tunings[cell.recovery].steps)
    # What each model is measured on.
    validation, training = feeds.fixed(config, data)
    cells = grid.cells(config)
    if shard is not None:
        cells = shard.part(grid.in_turns(cells))
    return Experiment(
        config=config,
        workdir=workdir.Workdir(storage.parse_path(path)),
        data=data,
        checkpoint=checkpoint,
        model=model,
        mesh=mesh,
        host_statistics=_host_statistics(config, mesh),
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
        calibration=_calibration(config, cells, data, mesh),
        optimizer=optimizer,
        train_step=step_lib.compile_train_step(
            trained,
            optimizer,
            track_every,
            accumulate=config.train.accumulate,
            place=place,
            forward=None if frozen is None else optimizer_lib.stop_frozen(frozen),
        ),
        eval_step=step_lib.compile_eval_step(trained),
    )


def _check_batches(config: Config, mesh: Mesh) -> None:
    parallel.check_batch(config.data.eval_batch, "config.data.eval_batch", mesh)
    for phase in (config.train, config.finetune):
        name = "config.data.batch" + (" / accumulate" if phase.accumulate > 1 else "")
        parallel.check_batch(config.data.batch // phase.accumulate, name, mesh)


def _host_statistics(config: Config, mesh: Mesh) -> bool:
    """Returns whether statistics live in host memory; warns where they should and cannot."""
    if config.parallel.statistics != "host":
        return False
    missing = parallel.host_memory_missing(mesh)
    if missing is not None:
        warnings.warn(missing, stacklevel=3)
    return missing is None


def _calibration(config: Config, cells: list[grid.Cell], data: feeds.Data, mesh: Mesh) -> list[Any]:
    """Returns random examples of the training data in batches, sharded; none is evaluated on.

    Empty where no cell reads them.
    """
    if not config.cuts and not any(cell.recipe.reads_batches for cell in cells):
        return []
    settings = config.calibration
    for size in {settings.batch, settings.windows} - {0}:
        parallel.check_batch(
            min(size, settings.windows), "config.calibration.batch, .windows", mesh
        )
    return [parallel.shard_batch(batch, mesh) for batch in feeds.calibration(config, data)]


def _prunable(config: Config, params: PyTree) -> PyTree:
    """Returns which weights may be pruned: by rules, or of a model of images its decoder's."""
    chosen = tree.prunable(params, *prune_rules(config))
    # What is in no computation would be ranked by its noise.
    return tree.map_named(lambda name, mark: mark and not phi3v.unused(config.model, name), chosen)


def prune_rules(config: Config) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Returns the rules of the weights that may be pruned, and of those that may not."""
    include = config.prune.include
    if include is None and config.model.vision is not None:
        include = phi3v.PRUNABLE
    return include, config.prune.exclude


def _rules(config: Config) -> list[tuple[str, tuple[str | None, ...]]]:
    given = config.parallel.rules
    if given is None:
        return list(phi3v.partition_rules(config.model))
    return [(rule.pattern, rule.axes) for rule in given]


def vocab_size(config: Config, data: feeds.Data) -> int:
    """Returns the model's number of symbols: the config's, or the tokenizer's.

    Raises:
        InputError: The config's is too small for the text.
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
