"""Train steps of the 10.7 M model, ours against eager PyTorch on the same machine.

    python benchmarks/vs_torch.py [--batch=8] [--repetitions=9] [--threads=2] [--clock=wall]

Both start from the same weights and are given the same tokens, so that first the logits and then
the losses must agree; without that the ratio would compare two models. PyTorch has what a good user
of eager mode has: one product for query, key and value, F.scaled_dot_product_attention, AdamW with
fused=True. Ours is `models/gpt.py` and optax's AdamW, in one compiled step with its state donated.

The ratio is of tokens/s, ours over PyTorch's, from steps taken in turns. On a machine that others
use, wall time is unfair to PyTorch, whose OpenMP threads wait for the slowest of them at the end of
every operation; `--threads=1 --clock=cpu` then compares the work that the two do.
"""

import argparse
import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

# torch is an extra that linting does without
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from accounts import accounted
from torch import nn  # pyright: ignore[reportMissingImports]

from swe_prune.config import ModelConfig
from swe_prune.models import gpt

VOCABULARY = 65  # of Shakespeare, character by character
CONFIG = ModelConfig(layers=6, heads=6, width=384, context=256)
LEARNING_RATE, B1, B2, EPS, DECAY, CLIP = 1e-3, 0.9, 0.99, 1e-8, 0.1, 1.0


class TorchBlock(nn.Module):
    """`gpt.Block` in PyTorch, without biases and dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(D, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp_norm = nn.LayerNorm(D, bias=False)
        self.up = nn.Linear(D, config.hidden_ratio * D, bias=False)
        self.down = nn.Linear(config.hidden_ratio * D, D, bias=False)

    def forward(self, x):  # noqa: D102 (the class's)
        B, L, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(D, dim=2)
        q, k, v = (t.view(B, L, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, L, D))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class TorchGPT(nn.Module):
    """`gpt.GPT` in PyTorch, its head tied."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(TorchBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, bias=False)

    def forward(self, tokens):  # noqa: D102 (the class's)
        x = self.embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.embedding.weight)


def torch_model(params: Any) -> TorchGPT:
    """Returns the same model in PyTorch with copies of the parameters of ours."""
    model = TorchGPT(CONFIG, VOCABULARY)
    state = {
        "embedding.weight": params["embedding"]["embedding"],
        "position_embedding": params["position_embedding"],
        "final_norm.weight": params["final_norm"]["scale"],
    }
    for i in range(CONFIG.layers):
        block = params[f"block_{i}"]
        attention = {name: np.asarray(leaf["kernel"]) for name, leaf in block["attention"].items()}
        qkv = np.concatenate([attention["query"], attention["key"], attention["value"]], axis=1)
        # A Flax kernel is (in, out), a PyTorch weight (out, in).
        state |= {
            f"blocks.{i}.attention_norm.weight": block["attention_norm"]["scale"],
            f"blocks.{i}.qkv.weight": qkv.T,
            f"blocks.{i}.out.weight": attention["out"].T,
            f"blocks.{i}.mlp_norm.weight": block["mlp_norm"]["scale"],
            f"blocks.{i}.up.weight": np.asarray(block["mlp"]["up"]["kernel"]).T,
            f"blocks.{i}.down.weight": np.asarray(block["mlp"]["down"]["kernel"]).T,
        }
    model.load_state_dict({k: torch.tensor(np.array(v, order="C")) for k, v in state.items()})
    return model


def torch_stepper(model: TorchGPT, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a call that takes one train step and returns its loss."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(B1, B2), eps=EPS, fused=True,
    )  # fmt: skip
    inputs, targets = torch.tensor(tokens[:, :-1]), torch.tensor(tokens[:, 1:]).long().reshape(-1)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(inputs).view(-1, VOCABULARY), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def jax_stepper(model: gpt.GPT, params: Any, tokens: np.ndarray) -> Callable[[], float]:
    """Returns a call that takes one train step and returns its loss."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(
            LEARNING_RATE, B1, B2, EPS, weight_decay=DECAY,
            mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
        ),
    )  # fmt: skip

    def loss_of(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: Any, inputs: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_of)(params, inputs, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    state = jax.block_until_ready((params, optimizer.init(params)))

    def step() -> float:
        nonlocal state
        state, loss = train_step(state, inputs, targets)
        return float(jax.block_until_ready((state, loss))[1])

    return step


def parse(doc: str | None, repetitions: int) -> argparse.Namespace:
    """Returns the options of the command line, with no more threads in use than they allow.

    Args:
        doc: Docstring of the script.
        repetitions: Pairs of runs unless given.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens")
    parser.add_argument("--repetitions", type=int, default=repetitions, help="pairs, at least 2")
    parser.add_argument("--threads", type=int, default=0, help="of either; 0: every core (Linux)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.threads:
        # jax sizes its thread pool by the cores it may use, when first asked for a device.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        torch.set_num_threads(options.threads)
    return options


def main() -> None:
    """Checks that the models are one and the same, then prints the ratio."""
    options = parse(__doc__, repetitions=9)
    shape = (options.batch, CONFIG.context + 1)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)
    inputs = tokens[:, :-1]
    ours = gpt.build(CONFIG, VOCABULARY)
    params = jax.jit(ours.init)(jax.random.key(0), inputs[:1])["params"]
    theirs = torch_model(params)
    with torch.no_grad():
        expected = theirs(torch.tensor(inputs)).numpy()
    logits = np.asarray(jax.jit(ours.apply)({"params": params}, inputs))
    apart = float(np.abs(logits - expected).max())
    assert apart < 1e-4, f"logits differ by {apart}: these are two models"

    step, torch_step = jax_stepper(ours, params, tokens), torch_stepper(theirs, tokens)
    print(f"jax {jax.__version__} on {jax.default_backend()}, torch {torch.__version__}, "
          f"{platform.machine()}, {torch.get_num_threads()} threads")  # fmt: skip
    count = sum(p.numel() for p in theirs.parameters())
    print(f"{count:,} parameters, batch {options.batch} x {CONFIG.context}; "
          f"logits from equal weights differ by at most {apart:.1e}")  # fmt: skip
    for number in range(1, 4):
        pair = step(), torch_step()
        print(f"loss of step {number}: {pair[0]:.5f} ours, {pair[1]:.5f} PyTorch's")
        assert abs(pair[0] - pair[1]) < 1e-3, "the losses part: these are two train steps"
    result = timing.compare(
        step, torch_step, repetitions=options.repetitions, pause=0.05, quiet=0.1,
        patience=options.repetitions,
        clock=time.process_time if options.clock == "cpu" else time.perf_counter,
    )  # fmt: skip
    per_step = options.batch * CONFIG.context
    for name, seconds in (("ours", result.seconds_a), ("PyTorch's", result.seconds_b)):
        print(f"{name:10} {per_step / np.median(seconds):8,.0f} tokens/s of {options.clock} time")
    print(f"ratio of tokens/s, ours over PyTorch's: {result}")
    print(f"peak memory of this process, which holds both: {timing.peak_rss_mib():,.0f} MiB")


if __name__ == "__main__":
    accounted(main)
