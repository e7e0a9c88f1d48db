"""The phase that cuts: smaller arrays, recovered, next to smaller shapes from random weights.

    seed_S/cuts/NAME/result.json     losses and sizes of all models, texts or errors of prices
                     recovered/      parameters of the cut model after its training
                     SHAPE/          checkpoints and metrics of a shape from random weights
                     serving.json    joules per token, window by window; see `study.payback`

A result that is there is not made again. Each training resumes from its own checkpoints.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from swe_prune import ledger, parallel, resumable, structured, tree
from swe_prune.config import (
    CellConfig,
    CutConfig,
    PruneConfig,
    StudyConfig,
    to_steps,
)
from swe_prune.evaluation import mean_loss
from swe_prune.models import phi3v
from swe_prune.runtime.locks import lock_for_run
from swe_prune.structured import Group
from swe_prune.study import feeds, finetune_phase, grid, samples, serving
from swe_prune.study.cut_shapes import in_use, shape
from swe_prune.study.experiment import Experiment, setup
from swe_prune.study.mend import mend_cut
from swe_prune.study.saved import finite, load_dense, restored, save, starting_values
from swe_prune.study.workdir import exists, remove, result_of, write_result
from swe_prune.training.progress import Progress


def folder_of(experiment: Experiment, seed: int, cut: CutConfig) -> epath.Path:
    """Returns the folder of a cut."""
    return experiment.workdir.path / f"seed_{seed}" / "cuts" / cut.name


def cuts(experiment: Experiment, progress: Progress) -> None:
    """Makes and judges every cut of this process's seeds, and measures what serving them takes."""
    for cut in experiment.config.cuts:
        wanted = experiment.config.study.seeds_of(cut)
        for seed in wanted:
            if seed not in experiment.seeds:
                continue
            folder = folder_of(experiment, seed, cut)
            with lock_for_run(folder, f"cut {cut.name} of seed {seed}", progress.say):
                made = functools.cache(lambda share, cut=cut: _smaller(experiment, cut, share))
                mend_cut(folder, cut.name, progress)
                if not exists(folder / "result.json"):
                    _make(experiment, seed, cut, folder, made, progress)
                if seed == wanted[0] and not exists(folder / "serving.json"):
                    with ledger.measure("serve", cell=f"seed_{seed}/{cut.name}"):
                        _serve(experiment, seed, cut, folder, made, progress)


def _smaller(experiment: Experiment, cut: CutConfig, share: float) -> Experiment:
    """Returns the experiment of a smaller shape, which trains for as many tokens in all."""
    config = experiment.config
    more = to_steps(config.finetune.steps, epoch=feeds.steps_per_epoch(config, experiment.data))
    train = dataclasses.replace(config.train, steps=experiment.train_steps + more)
    cells = (CellConfig(criterion="magnitude", sparsity=0.5),)
    small = dataclasses.replace(
        config,
        model=shape(config.model, cut, share),
        train=train,
        # The rules and cells of the study may name what is no longer there.
        prune=PruneConfig(),
        study=StudyConfig(std_criteria=(), criteria=(), seeds=(0,), cells=cells),
        cuts=(),
    )
    return setup(small, experiment.workdir.path)


def _make(
    experiment: Experiment,
    seed: int,
    cut: CutConfig,
    folder: epath.Path,
    made: Any,
    progress: Progress,
) -> None:
    """Cuts, recovers, trains the smaller shapes, and writes the result."""
    cell = f"seed_{seed}/{cut.name}"
    small = made(cut.sparsity)
    tuning = small.tunings[grid.Recovery()]
    with ledger.measure("cut", cell=cell):
        dense = load_dense(experiment, seed)
        made_small = _cut(experiment, seed, cut, dense)
        params = parallel.shard_like(made_small.params, small.abstract_params)
    used = _used_groups(experiment, cut)
    counts = structured.summary(used, {name: made_small.keep[name] for name in used})
    losses = {"dense": _losses(experiment, dense.params), "cut": _losses(small, params)}
    written = samples.sampled(small, "cut", params)
    with ledger.measure("recover", cell=cell) as entry:
        name = f"recovery of {cut.name}, seed {seed}"
        state = small.tuning_state(tuning, params, seed, None)
        state, _ = finetune_phase.recover(
            small, progress, tuning, name, folder / "recovery", state, seed
        )
        save(folder / "recovered", state.params, cut)
        entry.tokens = small.tokens(tuning.steps)
    losses["recovered"] = _losses(small, state.params)
    written |= samples.sampled(small, "recovered", state.params)
    sizes = {"dense": tree.size(dense.params), "cut": tree.size(params)}
    for share in shares(cut):
        with ledger.measure("smaller", cell=cell) as entry:
            other = made(share)
            found = _from_scratch(other, seed, folder / label(share), progress)
            entry.tokens = other.tokens(other.train_steps)
        losses[label(share)], sizes[label(share)] = _losses(other, found), tree.size(found)
        written |= samples.sampled(other, label(share), found)
    for one, values in losses.items():
        finite(float(np.mean(values)), f"{cut.name}, {one}")
    result = {
        "seed": seed,
        **cut.as_json(),
        "kept": counts.kept,
        "of": counts.total,
        "parameters": sizes,
        "losses": losses,
        **written,
    }
    write_result(folder / "result.json", result)
    remove(folder / "recovery" / "checkpoints")
    shown = ", ".join(f"{one} {np.mean(values):.4f}" for one, values in losses.items())
    progress.say(f"cut {cut.name}, seed {seed}: validation loss {shown}")


def shares(cut: CutConfig) -> tuple[float, ...]:
    """Returns the shares of the units that the shapes from random weights lack."""
    return cut.smaller or (cut.sparsity,)


def label(share: float) -> str:
    """Returns the name of a shape from random weights."""
    return f"smaller_{share:g}"


def _cut(experiment: Experiment, seed: int, cut: CutConfig, dense: Any) -> structured.CutResult:
    """Returns the cut model, refitted if asked for, and the kept units."""
    config = experiment.config.model
    return structured.cut_model(
        dataclasses.replace(cut, seed=seed),
        config,
        experiment.model,
        starting_values(experiment, dense),
        experiment.calibration,
        loss=experiment.loss,
        used=_used_groups(experiment, cut),
        blocks=phi3v.blocks(config),
        layout=experiment.layout,
        prunable=experiment.prunable,
        scored=dense.params,
        stats=dense.stats,
        opt_state=dense.opt_state,
    )


def _used_groups(experiment: Experiment, cut: CutConfig) -> dict[str, Group]:
    model = experiment.config.model
    return in_use(model, structured.groups(model, cut.units), experiment.abstract_params)


def _losses(experiment: Experiment, params: PyTree) -> list[float]:
    """Returns nats per token of each batch of the validation windows."""
    step = experiment.eval_step
    return [mean_loss(step, params, [batch]) for batch in experiment.validation]


def _from_scratch(
    experiment: Experiment, seed: int, folder: epath.Path, progress: Progress
) -> PyTree:
    """Returns the parameters of a smaller shape, trained from random weights without tracking."""
    state = dataclasses.replace(experiment.fresh_state(seed), stats=None)
    steps = experiment.train_steps
    phase = experiment.phase(f"{folder.name}, seed {seed}", folder, experiment.config.train, steps)
    state, _ = resumable.fit(
        phase,
        state,
        experiment.train_step,
        experiment.batches(seed),
        progress,
        evaluate=experiment.validation_loss,
    )
    return state.params


def _serve(
    experiment: Experiment,
    seed: int,
    cut: CutConfig,
    folder: epath.Path,
    made: Any,
    progress: Progress,
) -> None:
    """Measures the dense, the cut and the chosen smaller model in turns, and the tracking."""
    losses, margin = result_of(folder / "result.json")["losses"], experiment.config.ledger.margin
    small, dense = made(cut.sparsity), load_dense(experiment, seed)
    recovered = restored(folder / "recovered", small.abstract_params)
    models = {"dense": (experiment.model, dense.params), "cut": (small.model, recovered)}
    share = serving.rival(losses, {label(one): one for one in shares(cut)}, margin)
    if share is not None:
        other = made(share)
        # The energy depends on the shape alone, so fresh weights serve as well as trained ones.
        models["smaller"] = (other.model, jax.jit(lambda: other.fresh_state(seed).params)())
    progress.say(f"cut {cut.name}, seed {seed}: measuring the energy of serving")
    found = serving.measure(experiment, models, progress)
    found["smaller"] = None if share is None else label(share)
    if experiment.measures:
        found["tracking"] = serving.tracking(experiment, seed)
    write_result(folder / "serving.json", found)
