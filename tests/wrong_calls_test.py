"""Every public library call with one wrong argument: a sentence, or a right result."""

import inspect
import pathlib
import tempfile
from collections.abc import Iterator

import interop_tiny
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from swe_prune import (
    allocation,
    blockwise,
    calibration,
    config,
    data,
    evaluation,
    importance,
    interop,
    ledger,
    masks,
    patterns,
    recipe,
    report,
    schedules,
    select,
    sparse_training,
    structured,
    sweep,
    trajectory,
    tree,
)
from swe_prune.errors import InputError
from swe_prune.evaluation import latency, protocols
from swe_prune.layout import Axes, axes_of, conventional_axes, copies_of, copy_labels, layout, split
from swe_prune.ledger.meters import ProcessorMeter
from swe_prune.related import (
    dsmoe,
    ecomls,
    ling,
    reasoning,
    retrikt,
    spikes,
    ssprop,
    trawl,
)
from swe_prune.structured import Group, refit, unit_clusters
from swe_prune.training import lora

NOWHERE = pathlib.Path(tempfile.mkdtemp())
RNG = np.random.default_rng(0)
UP, DOWN = jnp.ones((4, 6)), jnp.arange(24.0).reshape(6, 4) - 7
PARAMS = {"up": {"kernel": UP, "bias": jnp.ones(6)}, "down": {"kernel": DOWN}}
SCORES = {"up": {"kernel": UP, "bias": None}, "down": {"kernel": jnp.abs(DOWN)}}
MASK = masks.by_sparsity({"down": SCORES["down"]}, 0.5)["down"]["kernel"]
MASKS = {"up": {"kernel": None, "bias": None}, "down": {"kernel": MASK}}
ROWS = RNG.normal(size=(2, 4)).astype(np.float32)
MODEL = interop_tiny.model("llama")
METERS = [ProcessorMeter(1)]
WINDOW = ledger.Window(ledger.interval(1.0), 1.0, 2)
STATS = trajectory.update(trajectory.init(PARAMS), PARAMS)


def forward(params, x):
    return jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


def loss(params, x):
    return (forward(params, x) ** 2).mean()


GROUPS = {"mlp": Group(6, {r"up/(kernel|bias)$": -1, r"down/kernel$": -2})}
UNITS = {"mlp": np.arange(6, dtype=np.float32)}
KEEP = {"mlp": np.array([0, 2, 3])}
MOMENTS = calibration.moments(forward, PARAMS, [ROWS], leaves="down/kernel", gram=True)
SAMPLES = calibration.samples(forward, PARAMS, [ROWS], leaves="down/kernel")
REDUNDANT = structured.redundant_units(
    GROUPS, PARAMS, {"down/kernel": RNG.normal(size=(16, 6))}, "correlation"
)
GRAM = jnp.eye(4) * 2
MODEL_CONFIG = config.ModelConfig(layers=1, heads=2, width=8, context=8)
TOKENS = np.arange(40) % 11
FACTORS = ledger.of_country()
ENTRY = ledger.Entry("train", seconds=1.0, joules=ledger.interval(3.0), source="modelled")
PROFILES = {"a": ecomls.Profile(3.0, 5.0, 0.8), "b": ecomls.Profile(1.0, 3.0, 0.75)}
TRACES = {name: ecomls.Trace([2.0] * 9, [0.8] * 9, [0.9] * 9) for name in PROFILES}
PROTOCOL = evaluation.Protocol("overlapping", 8, 3, partial=True)
KEY = jax.random.key(0)
STACK = ("up/kernel", "gate/kernel")
ENTRIES = retrikt.store(ROWS, [0, 1], symbols=3)
PROMPTS = np.array([[1, 2, 10], [3, 4, 10]])
GATES = np.full((2, 3), 0.7, np.float32)
RECIPE = recipe.Recipe("magnitude", sparsity=0.5)


class Blocks(nn.Module):
    """Two layers that may be pruned one after the other."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="block_1")(nn.relu(nn.Dense(4, name="block_0")(x)))


BLOCKS = Blocks()
VARIABLES = BLOCKS.init(jax.random.key(0), ROWS)
AXES = layout(forward, PARAMS, ROWS)

RIGHT = [
    (layout, {"fn": forward, "params": PARAMS, "batch": ROWS}),
    (Axes, {"inputs": (0,), "outputs": (1,), "copies": ()}),
    (axes_of, {"layout": AXES}),
    (copies_of, {"layout": AXES}),
    (conventional_axes, {"name": "up/kernel", "shape": (4, 6)}),
    (copy_labels, {"name": "up/kernel", "shape": (3, 4, 6), "copies": (0,)}),
    (split, {"named": {"up/kernel": UP}, "layout": None}),
    (calibration.inputs, {"fn": forward, "params": PARAMS, "batches": [ROWS], "hessian": True,
                          "call": None, "prunable": None}),
    (calibration.gradients, {"loss": loss, "params": PARAMS, "batches": [ROWS], "prunable": None,
                             "at_once": None}),
    (calibration.measure, {"needs": ("input_norm",), "fn": forward, "params": PARAMS,
                           "batches": [ROWS], "loss": loss, "prunable": None, "at_once": None}),
    (calibration.moments, {"fn": forward, "params": PARAMS, "batches": [ROWS],
                           "leaves": "down/kernel", "gram": False, "call": None}),
    (calibration.samples, {"fn": forward, "params": PARAMS, "batches": [ROWS],
                           "leaves": "down/kernel", "tokens": 2, "seed": 0, "call": None}),
    (blockwise.admm, {"weight_RxC": UP, "hessian_RxR": GRAM, "sparsity": 0.5, "pattern": None,
                      "mask": None, "iterations": 2, "damping": 0.1, "zeros": "keep",
                      "cross_RxR": None}),
    (blockwise.sparsegpt, {"weight_RxC": UP, "hessian_RxR": GRAM, "sparsity": 0.5,
                           "pattern": None, "block": 4, "damping": 0.01, "zeros": "keep"}),
    (blockwise.wanda_mask, {"score_RxC": UP, "sparsity": 0.5, "rounding": "nearest",
                            "ties": "first"}),
    (blockwise.wanda_variant_mask, {"score_RxC": UP, "sparsity": 0.5}),
    (blockwise.prune_blocks, {"model": BLOCKS, "variables": VARIABLES, "batches": [ROWS],
                              "blocks": r"block_[0-9]+", "sparsity": 0.5, "method": "magnitude",
                              "pattern": None, "mask": None, "restore": None, "holdout": (),
                              "target": "pruned_inputs", "prunable": None, "call": None,
                              "block": 2, "damping": None, "offload": False, "donate": False,
                              "zeros": "keep", "progress": None}),
    (recipe.measure, {"recipes": [recipe.Recipe("wanda", sparsity=0.5)], "model": forward,
                      "params": PARAMS, "batches": [ROWS], "loss": loss, "prunable": None,
                      "stats": None, "opt_state": None, "at_once": None}),
    (recipe.prune, {"recipe": RECIPE, "params": PARAMS, "evidence": None, "values": None,
                    "prunable": None, "layout": None, "model": None, "blocks": None,
                    "batches": [], "loss": None, "offload": False, "progress": None}),
    (recipe.check, {"recipe": RECIPE, "params": PARAMS, "prunable": None, "layout": None,
                    "unavailable": None}),
    (recipe.measures, {"recipes": [RECIPE]}),
    (recipe.allocate, {"recipe": recipe.Recipe("magnitude", sparsity=0.5, allocation="owl"),
                       "scores": SCORES, "params": PARAMS, "curvature": None, "loss": None,
                       "batches": [], "prunable": None, "layout": None}),
    (recipe.select, {"recipe": RECIPE, "scores": SCORES, "amount": 0.5, "layout": None}),
    (masks.keep, {"optimizer": optax.sgd(0.1), "mask": MASKS}),
    (masks.hold_moments, {"opt_state": optax.adam(0.1).init(PARAMS), "mask": MASKS}),
    (masks.zeros, {"params": PARAMS, "mask": MASKS}),
    (masks.revived, {"params": PARAMS, "mask": MASKS}),
    (masks.save, {"path": str(NOWHERE / "masks"), "masks": MASKS, "stats": None}),
    (masks.load, {"path": str(NOWHERE / "none")}),
    (masks.by_sparsity, {"scores": SCORES, "sparsity": 0.5, "scope": "tensor", "rounding":
                         "nearest", "ties": "first", "reduce": "sum", "across": "sum",
                         "couplings": None, "max_sparsity": None, "layout": None,
                         "input_axes": None}),
    (masks.by_std, {"scores": SCORES, "rate": 0.1, "spread": None, "layout": None}),
    (patterns.parse_n_of_m, {"pattern": "2:4"}),
    (patterns.parse_block, {"pattern": "block:2x2"}),
    (patterns.n_of_m_mask, {"score_RxC": UP, "n": 2, "m": 4, "name": "scores"}),
    (patterns.couple, {"names": ["up/kernel", "down/kernel"], "rules": {"up": "in"}}),
    (structured.groups, {"config": MODEL_CONFIG, "units": "neurons"}),
    (structured.unit_scores, {"groups": GROUPS, "scores": SCORES, "reduce": "l2"}),
    (structured.choose, {"groups": GROUPS, "units": UNITS, "sparsity": 0.5, "budget": None,
                         "uniform": True, "multiple": None, "params": None, "config": None}),
    (structured.summary, {"groups": GROUPS, "keep": KEEP}),
    (structured.cut, {"values": PARAMS, "groups": GROUPS, "keep": KEEP}),
    (structured.unit_mask, {"params": PARAMS, "groups": GROUPS, "keep": KEEP}),
    (structured.cut_config, {"config": MODEL_CONFIG,
                             "keep": {"block_0/neurons": np.arange(8)}}),
    (structured.memory, {"params": PARAMS}),
    (structured.flops, {"config": MODEL_CONFIG, "params": {"block_0": {"mlp": PARAMS}},
                        "context": 8}),
    (structured.Budget, {"params": 0.5}),
    (structured.Along, {"axis": 0, "width": 1, "copies": None, "power": 0.0}),
    (structured.readers, {"groups": GROUPS, "params": PARAMS, "layout": None}),
    (structured.activation_scores, {"groups": GROUPS, "params": PARAMS, "kind":
                                    "activation_norm", "moments": MOMENTS, "layout": None,
                                    "seed": 0}),
    (structured.redundant_units, {"groups": GROUPS, "params": PARAMS,
                                  "samples": {"down/kernel": RNG.normal(size=(16, 6))},
                                  "kind": "correlation", "method": "greedy", "clusters": None,
                                  "threshold": None, "patience": 2, "seeds": (0,),
                                  "distance": None, "layout": None, "progress": None}),
    (structured.redundancy_scores, {"groups": GROUPS, "found": REDUNDANT}),
    (structured.fold_units, {"params": PARAMS, "groups": GROUPS, "keep": KEEP,
                             "found": REDUNDANT, "samples": {"down/kernel": jnp.ones((16, 6))},
                             "layout": None}),
    (structured.residual_states, {"model": None, "blocks": r"block_[0-9]+"}),
    (structured.depth_scores, {"states": lambda params, batch: [batch, batch * 2],
                               "params": PARAMS, "batches": [ROWS[:, None]],
                               "kind": "block_influence"}),
    (refit.refit, {"params": PARAMS, "groups": GROUPS, "keep": KEEP, "measured": MOMENTS,
                   "holdout": None, "layout": None, "damping": 0.3}),
    (unit_clusters.clusters_of, {"samples_NxF": ROWS, "number": 2, "seed": 0, "iterations": 2}),
    (allocation.allocate, {"name": "uniform", "sparsity": 0.5, "scores": SCORES}),
    (allocation.alpha_pruning, {"params": PARAMS, "sparsity": 0.5, "epsilon": 0.3, "tail": 0.5,
                                "groups": "block", "prunable": None, "input_axes": None}),
    (allocation.alpha_shares, {"alphas": [1.0, 2.0], "epsilon": 0.3}),
    (allocation.hill_alpha, {"eigenvalues": np.arange(1.0, 9), "k": 3}),
    (allocation.tail_exponents, {"params": PARAMS, "tail": 0.5, "prunable": None,
                                 "input_axes": None}),
    (allocation.by_scores, {"scores": SCORES, "sparsity": 0.5, "max_sparsity": None}),
    (allocation.by_curvature, {"curvature": SCORES, "sparsity": 0.5, "max_sparsity": None}),
    (allocation.uniform, {"shapes": SCORES, "sparsity": 0.5}),
    (allocation.erk, {"shapes": SCORES, "sparsity": 0.5, "power": 1.0, "kernel": True}),
    (allocation.erk_densities, {"shapes": SCORES, "sparsity": 0.5, "power": 1.0, "kernel": True}),
    (allocation.progression, {"shapes": SCORES, "sparsity": 0.5, "spread": 0.2,
                              "groups": "block"}),
    (allocation.table, {"rules": {"up": 0.5, "down": 0.2}, "shapes": SCORES, "sparsity": None}),
    (allocation.ecoflap, {"loss": lambda p, x: 1.0, "params": PARAMS, "batches": [ROWS],
                          "sparsity": 0.5, "max_sparsity": None, "groups": "block",
                          "reduce": "sum", "measure": "gradient", "epsilon": 1e-3, "seed": 0,
                          "prunable": None}),
    (allocation.water_fill, {"scores": [1.0, 2.0], "sizes": [4, 4], "sparsity": 0.5,
                             "max_sparsity": None}),
    (allocation.grouped, {"names": ["a/b", "a/c"], "groups": "block"}),
    (allocation.owl, {"scores": SCORES, "sparsity": 0.5, "lam": 0.08, "m": 5.0,
                      "groups": "block"}),
    (allocation.owl_sparsities, {"outliers": [0.1, 0.2], "sparsity": 0.5, "lam": 0.08}),
    (allocation.get, {"name": "uniform"}),
    (allocation.check_sparsity, {"sparsity": 0.5}),
    (allocation.removed_count, {"size": 4, "sparsity": 0.5}),
    (allocation.least_kept, {"size": 4, "max_sparsity": 0.5}),
    (allocation.apportion, {"targets": [1.5, 2.5], "sizes": [4, 4], "total": 4}),
    (allocation.gaussian_sparsity, {"rate": 1.0}),
    (allocation.gaussian_rate, {"sparsity": 0.5}),
    (allocation.rate_for_sparsity, {"scores": SCORES, "sparsity": 0.5, "spread": None}),
    (allocation.std, {"scores": SCORES, "sparsity": 0.5, "spread": None}),
    (importance.get, {"name": "magnitude"}),
    (importance.register, {"name": "magnitude", "spread": None, "sorts": False}),
    (importance.score, {"name": "magnitude", "params": PARAMS, "stats": None, "opt_state": None,
                        "measured": None, "seed": 0, "zeros": "keep", "layout": None,
                        "input_axes": None}),
    (importance.has_second_moment, {"opt_state": optax.adam(0.1).init(PARAMS), "params": PARAMS}),
    (trajectory.memory, {"params": PARAMS, "measures": ("late_mean",), "prunable": None,
                         "compensated": False}),
    (trajectory.mode_vote, {"snapshots": [PARAMS, PARAMS], "final": PARAMS, "rate": 1.0,
                            "leave_out": 0, "prunable": None}),
    (trajectory.restored, {"stats": STATS}),
    (trajectory.update, {"stats": STATS, "params": PARAMS, "when": True, "layout": None}),
    (trajectory.init, {"params": PARAMS, "index": "window", "start": 0, "compensated": False}),
    (schedules.get, {"name": "cubic"}),
    (schedules.OneShot, {"final": 0.5, "at": 3}),
    (schedules.Cubic, {"final": 0.5, "begin": 0, "end": 9, "every": 1, "initial": 0.0}),
    (schedules.Iterative, {"final": 0.5, "rounds": 2, "every": 3, "begin": 0}),
    (schedules.Constant, {"final": 0.5, "every": 1, "begin": 0, "end": None}),
    (schedules.MovementSchedule, {"final": 0.5, "steps": 9, "warmup": 1, "initial": 0.0}),
    (schedules.cosine_drop_fraction, {"step": 1, "alpha": 0.3, "end": 9}),
    (sparse_training.all_kept, {"params": PARAMS, "prunable": None}),
    (sparse_training.straight_through, {"params": PARAMS, "mask": MASKS}),
    (sparse_training.ste_magnitude, {"params": PARAMS, "prunable": None, "sparsity": 0.5,
                                     "scope": "tensor", "layout": None}),
    (sparse_training.rewind, {"params": PARAMS, "early_params": PARAMS, "mask": MASKS}),
    (sparse_training.rewound_schedule, {"schedule": lambda t: t, "to": 1, "at": 0}),
    (sparse_training.set_update, {"params": masks.apply(PARAMS, MASKS), "mask": MASKS,
                                  "opt_state": (), "fraction": 0.1, "key": KEY,
                                  "regrown": "keep", "layout": None}),
    (sparse_training.prune_on_schedule, {"schedule": schedules.OneShot(0.5, 3),
                                         "score": "magnitude", "scope": "tensor",
                                         "regrow": False, "allocate": None}),
    (sparse_training.movement.init, {"params": PARAMS, "prunable": None, "value": 0.0}),
    (sparse_training.movement.hard_masks, {"scores": SCORES, "sparsity": 0.5, "scope": "tensor",
                                           "layout": None}),
    (sparse_training.movement.soft_masks, {"scores": SCORES, "threshold": 0.5}),
    (sparse_training.movement.l0_gates, {"scores": SCORES, "key": None}),
    (sparse_training.movement.penalty, {"scores": SCORES, "kind": "l1"}),
    (select.top_k_mask, {"x": UP, "k": 2, "axes": None, "ties": "first"}),
    (select.top_k_masks, {"xs": [UP], "k": 2, "ties": "first"}),
    (sweep.zipped, {"choices": {"a": [1, 2]}}),
    (tree.size, {"values": PARAMS}),
    (tree.nested, {"named": {"a/b": 1}}),
    (tree.described, {"values": PARAMS}),
    (ledger.interval, {"value": 1.0}),
    (ledger.of_samples, {"samples": [1.0, 2.0], "confidence": 0.9, "resamples": 20, "seed": 0}),
    (ledger.text, {"number": 1.0, "unit": "J"}),
    (ledger.Interval, {"low": 1.0, "value": 2.0, "high": 3.0}),
    (ledger.of_country, {"country": "DEU", "pue": None}),
    (ledger.Factors, {"grid": ledger.interval(3.0), "pue": ledger.interval(1.0),
                      "embodied": {}, "lifetime": ledger.interval(9.0), "sources": {}}),
    (ledger.footprint, {"entry": ENTRY, "factors": FACTORS}),
    (ledger.pictured, {"kwh": ledger.interval(1.0)}),
    (ledger.break_even, {"spent": 1.0, "dense": [2.0, 2.0], "pruned": [1.0, 1.0],
                         "confidence": 0.9, "seed": 0}),
    (ledger.total, {"entries": [ENTRY], "phase": "in all"}),
    (ledger.lines, {"entries": [ENTRY], "factors": FACTORS}),
    (ledger.summary, {"entries": [ENTRY], "factors": FACTORS}),
    (ledger.sources, {"entries": [ENTRY]}),
    (ledger.read, {"folder": str(NOWHERE / "none")}),
    (ledger.Ledger, {"folder": None, "meters": [], "process": 0, "every": 10.0}),
    (ledger.opened, {"book": ledger.Ledger(meters=[])}),
    (ledger.measure, {"phase": "train", "cell": "", "tokens": 0}),
    (ledger.windows, {"works": {"a": lambda: 3}, "meters": METERS, "count": 2, "seconds": 0.0}),
    (ledger.per_token, {"found": [WINDOW, WINDOW]}),
    (ledger.idle_watts, {"meters": METERS, "seconds": 0.001}),
    (ledger.Window, {"joules": ledger.interval(1.0), "seconds": 1.0, "tokens": 2}),
    (ledger.write, {"path": str(NOWHERE / "ledger.csv"), "entries": [ENTRY], "factors": FACTORS}),
    (data.CharTokenizer.from_texts, {"texts": ["abc"]}),
    (data.CharTokenizer("abc").encode, {"text": "ab"}),
    (data.CharTokenizer("abc").decode, {"ids": [0, 1]}),
    (data.eval_batches, {"tokens": TOKENS, "context": 4, "windows": 2, "batch": 2}),
    (data.random_batches, {"tokens": TOKENS, "context": 4, "windows": 2, "batch": 2, "seed": 0}),
    (data.train_iterator, {"tokens": TOKENS, "context": 4, "batch": 2, "seed": 0, "rows": None}),
    (data.check_disjoint, {"calibration": "a text", "evaluation": "other", "n": None}),
    (data.load, {"config": None, "context": 8, "tokenizer": None}),
    (evaluation.gate, {"dense": None, "uniform": 3, "at_most": None}),
    (evaluation.mean_loss, {"eval_step": lambda params, batch: jnp.array(1.0),
                            "params": PARAMS, "batches": [{"inputs": ROWS, "targets": ROWS}]}),
    (evaluation.repetition, {"tokens": [1, 2, 1, 2], "longest": 2}),
    (evaluation.Protocol, {"name": "overlapping", "window": 8, "stride": 3, "partial": True}),
    (protocols.get, {"name": "overlapping", "window": None, "stride": None, "bos": None}),
    (evaluation.Sampling, {"greedy": False, "temperature": 1.0, "top_k": None, "top_p": None}),
    (evaluation.perplexity, {"model": None, "params": PARAMS, "tokens": TOKENS,
                             "protocol": PROTOCOL, "batch": 2, "bos_id": None}),
    (evaluation.kl_to_dense, {"model": None, "dense_params": PARAMS, "pruned_params": PARAMS,
                              "tokens": TOKENS, "protocol": PROTOCOL, "batch": 2}),
    (evaluation.generate, {"model": None, "params": PARAMS, "prompts": [[1]], "max_new_tokens": 2,
                           "sampling": evaluation.GREEDY, "seed": 0}),
    (latency.Workload, {"batch": 1, "prompt": 4, "new": 2}),
    (ecomls.Profile, {"low": 1.0, "high": 2.0, "confidence": 0.5}),
    (ecomls.Trace, {"joules": [1.0], "confidence": [0.5], "quality": [0.5]}),
    (ecomls.Switcher, {"profiles": PROFILES, "epsilon": 0.1, "window": 3, "seed": 0}),
    (ecomls.Switcher(PROFILES).observe, {"joules": 1.0, "confidence": 0.5}),
    (ecomls.serve, {"traces": TRACES, "choose": lambda joules, sure: "a", "first": "a"}),
    (ecomls.compare, {"traces": TRACES, "profiles": PROFILES, "epsilons": (0.2,), "window": 3,
                      "seeds": (0,)}),
    (ssprop.dense, {"x": ROWS, "kernel": UP, "bias": None, "keep": 0.5, "key": None,
                    "only_weights": False}),
    (ssprop.conv, {"x": jnp.ones((1, 4, 4, 2)), "kernel": jnp.ones((2, 2, 2, 4)), "bias": None,
                   "keep": 0.5, "strides": (1, 1), "padding": "SAME", "key": None}),
    (ssprop.channels, {"keep": 0.5, "count": 4}),
    (ssprop.interceptor, {"keep": 0.5, "skip": ("head",)}),
    (ssprop.Schedule, {"keep": 0.5, "last": None, "length": 9}),
    (trawl.cp, {"tensor": RNG.normal(size=(2, 3, 4)), "rank": 2, "steps": 2, "tolerance": 1e-6,
                "seed": 0}),
    (trawl.tucker, {"tensor": RNG.normal(size=(2, 3, 4)), "ranks": (1, 2, 2), "steps": 2}),
    (trawl.laser, {"matrix": RNG.normal(size=(3, 4)), "rank": 2}),
    (trawl.stacked, {"params": {"up": {"kernel": UP}, "gate": {"kernel": UP}},
                     "stack": dict.fromkeys(STACK, False)}),
    (dsmoe.thresholded, {"q": GATES, "tau": 0.5}),
    (dsmoe.factors, {"q": GATES, "tau": 0.5, "scaled": True, "straight": True}),
    (dsmoe.computed, {"x": ROWS, "weights": PARAMS, "factor": GATES, "activation": "gelu"}),
    (dsmoe.partitioned, {"weights": PARAMS, "blocks": 3}),
    (dsmoe.skipped, {"x": ROWS, "blocks": dsmoe.partitioned(PARAMS, 3), "q": GATES, "tau": 0.5,
                     "scaled": True, "activation": "gelu", "rungs": 2}),
    (dsmoe.with_routers, {"params": PARAMS, "blocks": 3, "seed": 0}),
    (retrikt.store, {"keys": ROWS, "values": [0, 1], "symbols": 3}),
    (retrikt.retrieved, {"entries": ENTRIES, "queries": ROWS, "k": 1, "temperature": 1.0}),
    (retrikt.interpolated, {"logits": ROWS, "found": np.abs(ROWS), "share": 0.5}),
    (reasoning.rewards, {"lengths": [[1, 2]], "right": [[True, False]], "alpha": 0.2}),
    (reasoning.advantages, {"found": [[1.0, 0.5]]}),
    (reasoning.sums, {"count": 2, "terms": 3, "work": "sums", "seed": 0}),
    (reasoning.judged, {"prompts": PROMPTS, "answers": [[3], [7]], "ended": [True, True]}),
    (reasoning.joined, {"prompts": PROMPTS, "answers": [[3], [7]], "ended": [True, True],
                        "length": 8}),
    (ling.routed, {"scores": ROWS, "per_token": 2}),
    (ling.z_loss, {"scores": ROWS}),
    (ling.balance_loss, {"scores": ROWS, "per_token": 2}),
    (ling.warmed, {"scores": ROWS, "share": 0.5, "key": KEY}),
    (ling.normed, {"kernel": UP}),
    (spikes.spiked, {"watch": spikes.Watch.start(), "loss": jnp.float32(2), "deviations": 5.0,
                     "decay": 0.9, "warmup": 2, "patience": 2, "backoff": 0.5}),
    (spikes.Again, {"batches": iter(range(9)), "chance": 0.5, "seed": 0}),
    (interop.load, {"path": str(NOWHERE / "none"), "dtype": None, "compute_dtype": "float32",
                    "shardings": None, "tokenizer": True, "prefix": None}),
    (interop.open_pretrained, {"path": str(NOWHERE / "none"), "tokenizer": True, "prefix": None}),
    (interop.export, {"folder": str(NOWHERE / "none" / "x"), "model": MODEL, "params": None,
                      "mask": None, "record": None, "also": None, "shard_bytes": 9,
                      "compress": False}),
    (interop.check_free, {"folder": str(NOWHERE / "none")}),
    (interop.read_masks, {"path": str(NOWHERE / "none")}),
    (interop.read_record, {"folder": str(NOWHERE / "none")}),
    (interop.load_vision_tower, {"path": str(NOWHERE / "none"), "dtype": None, "shardings": None}),
    (interop.read_config, {"hf": interop_tiny.CONFIGS["llama"]}),
    (interop.write_config, {"config": MODEL.config, "vocab_size": 24, "family": None}),
    (interop.abstract_params, {"config": MODEL.config, "vocab_size": 24}),
    (report.build, {"workdir": str(NOWHERE / "none")}),
    (config.from_dict, {"values": {"name": "x"}}),
    (lora.init, {"params": PARAMS, "rank": 2, "alpha": 1.0, "key": KEY, "targets": None}),
]  # fmt: skip
"""Arguments with which each call works, or is refused for another reason than the one below."""

WRONG = {
    "None": None, "NaN": float("nan"), "inf": float("inf"), "-1": -1, "0": 0, "huge": 10**40,
    "large": 10**12, "0.5": 0.5, "True": True, "1j": 1j, "text": "x", "empty": "", "NUL": "a\0b",
    "surrogate": "\ud800", "bytes": b"", "[]": [], "{}": {}, "()": (), "[None]": [None],
    "texts": ["x", 3], "object": object(), "strings": np.array("x"), "lambda": lambda: None,
    "class": type("Thing", (), {}), "complex": np.ones((2, 2), complex),
    "bools": np.ones((2, 2), bool), "integers": np.ones((2, 2), int),
    "cube": np.ones((2, 2, 2), "f4"), "NaNs": np.full((2, 2), np.nan),
    "nested": {"a": {"b": "c"}}, "numbers": {1: 2}, "params": PARAMS,
    "module": np, "no order": {1: UP, "a": UP}, "other": {"a": jnp.ones(2)},
    "jax scalar": jnp.array(7.0), "abstract": jax.ShapeDtypeStruct((2, 2), "f4"),
    "abstract scalar": jax.ShapeDtypeStruct((), "i4"),
    "abstract row": jax.ShapeDtypeStruct((4,), "f4"),
}  # fmt: skip


SLOW = {
    "inputs", "gradients", "measure", "moments", "samples", "admm", "sparsegpt", "wanda_mask",
    "wanda_variant_mask", "by_sparsity", "by_std", "unit_scores", "depth_scores", "refit",
    "clusters_of", "by_scores", "by_curvature", "ecoflap", "owl", "rate_for_sparsity", "std",
    "prune_blocks", "prune", "allocate", "select",
    "score", "mode_vote", "set_update", "kl_to_dense", "perplexity", "generate",
}  # fmt: skip
"""Calls that compile for some of the values."""

UNTRIED = {
    ("samples", "tokens"),
    ("ecoflap", "batches"),
    ("init", "key"),
    ("warmed", "key"),
    ("store", "symbols"),
    ("windows", "seconds"),
    ("idle_watts", "seconds"),
}
"""As much memory or time as a user asks for, a user's own loss, arrays that are not keys of JAX."""


def name_of(case):
    return getattr(case[0], "__qualname__", repr(case[0]))


def abstract(values):
    """Shapes in place of arrays, which JAX's own functions give out."""

    def shape_of(leaf):
        number = isinstance(leaf, np.ndarray) or (
            isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if number else leaf

    return jax.tree.map(shape_of, values)


def faults_of(call, right):
    """(argument, kind of value, error) where the error is not a sentence."""
    found = []
    for name in right:
        for kind, value in (WRONG | {"its shapes": abstract(right[name])}).items():
            if (name_of((call,)), name) in UNTRIED:
                continue
            try:
                result = call(**(right | {name: value}))
                jax.block_until_ready(jax.tree.leaves(result))
            except InputError as error:
                if "\n" in str(error) or len(str(error)) > 1500:
                    found.append((name, kind, error))
            except Exception as error:
                found.append((name, kind, error))
            else:
                found += [(name, kind, error) for error in late_faults(result)]
    return found


def late_faults(result):
    """Errors of what a call returned, which it should have refused: of iterators the first."""
    if not isinstance(result, Iterator):
        return []
    try:
        next(result, None)
    except Exception as error:
        return [error]
    return []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (name_of(c) in SLOW)) for c in RIGHT],
    ids=name_of,
)
def test_a_wrong_argument_is_a_sentence(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text is a path to some
    call, right = case
    assert not set(right) - set(inspect.signature(call).parameters)
    faults = faults_of(call, right)
    assert not [f"{name}={kind}: {error!r}"[:200] for name, kind, error in faults]
