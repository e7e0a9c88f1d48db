"""Where a train step of the 10.7 M model goes, part by part, beside eager PyTorch.

    python benchmarks/step_parts.py [--batch=8] [--repetitions=15] [--threads=1 --clock=cpu]

Each part runs by itself on arrays of the step's shapes, ours as one compiled program and PyTorch's
as its operations, in turns. "with backward" gives the value and the gradients of all that the part
reads. A number in
GFLOP/s counts the products; one in GB/s counts each array that the part must read or write once,
so it says how far a part is from the speed of memory, not what is moved. The parts of a block are
to be multiplied by six. Whole steps are compared by `vs_torch.py`.
"""

import dataclasses
import platform
import statistics
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
from rich.console import Console
from rich.table import Table
from vs_torch import B1, B2, CLIP, CONFIG, DECAY, EPS, LEARNING_RATE, VOCABULARY, parse

from swe_prune.models import attention
from swe_prune.models.layers import ACTIVATIONS
from swe_prune.training import losses

D, HEADS, LENGTH = CONFIG.width, CONFIG.heads, CONFIG.context
HIDDEN = CONFIG.hidden_ratio * D
PARAMETERS = 10_745_088


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the step in both libraries.

    Attributes:
        name: What it is.
        ours: Function of jax arrays.
        theirs: The same of torch tensors.
        shapes: Shape of each argument; the last that are integers are drawn from the vocabulary.
        flops: Operations of the products of a forward pass, or 0.
    """

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    flops: float = 0.0


def our_norm(x: Any, scale: Any) -> Any:
    """Returns the layer norm without bias, as flax computes it."""
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean
    return (x - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-5) * scale


def our_attention(q: Any, k: Any, v: Any) -> Any:
    """Returns causal attention over (N, D) activations, in heads."""
    heads = [x.reshape(-1, LENGTH, HEADS, D // HEADS) for x in (q, k, v)]
    return attention.attention(*heads).reshape(q.shape)


def their_attention(q: Any, k: Any, v: Any) -> Any:
    """Returns the same by F.scaled_dot_product_attention."""
    heads = [x.view(-1, LENGTH, HEADS, D // HEADS).transpose(1, 2) for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*heads, is_causal=True)
    return y.transpose(1, 2).reshape(q.shape)


def parts(rows: int) -> list[Part]:
    """Returns the parts of a step on so many tokens."""
    product = 2.0 * rows * D * HIDDEN
    batch = rows // LENGTH
    return [
        Part("product, up", jnp.matmul, torch.matmul, ((rows, D), (D, HIDDEN)), product),
        Part("product, down", jnp.matmul, torch.matmul, ((rows, HIDDEN), (HIDDEN, D)), product),
        Part("attention", our_attention, their_attention, ((rows, D),) * 3,
             4.0 * batch * LENGTH**2 * D),
        Part("layer norm", our_norm, lambda x, scale: F.layer_norm(x, (D,), scale),
             ((rows, D), (D,))),
        Part("GELU", ACTIVATIONS["gelu"], lambda x: F.gelu(x, approximate="tanh"),
             ((rows, HIDDEN),)),
        Part("residual", jnp.add, torch.add, ((rows, D), (rows, D))),
        Part("loss", lambda x: losses.cross_entropy(x, jnp.zeros(x.shape[:-1], int)).mean(),
             lambda x: F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long)),
             ((rows, VOCABULARY),)),
    ]  # fmt: skip


def calls_of(part: Part, backward: bool) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """Returns a call of each library, and the bytes that either must read and write."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in part.shapes]
    ours, tensors = [jnp.asarray(x) for x in arrays], [torch.tensor(x) for x in arrays]
    like = jax.eval_shape(part.ours, *ours)
    slope = rng.normal(size=like.shape).astype(np.float32)
    size = sum(x.nbytes for x in arrays) + slope.nbytes
    if not backward:
        run = jax.jit(part.ours)

        def theirs() -> Any:
            with torch.no_grad():
                return part.theirs(*tensors)

        return lambda: jax.block_until_ready(run(*ours)), theirs, size

    @jax.jit
    def pull(slope: Any, *args: Any) -> Any:
        value, gradients = jax.vjp(part.ours, *args)
        return value, gradients(slope)  # the value too, or the forward product is left out

    our_slope, their_slope = jnp.asarray(slope), torch.tensor(slope)
    leaves = [x.requires_grad_() for x in tensors]

    def both() -> Any:
        return torch.autograd.grad(part.theirs(*leaves), leaves, their_slope)

    return lambda: jax.block_until_ready(pull(our_slope, *ours)), both, 2.0 * size


def optimizers(clip: bool) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """Returns a call of each library's AdamW on as many weights as the model has.

    Args:
        clip: Whether gradients are clipped by their global norm first.
    """
    shapes = [(D, HIDDEN)] * (PARAMETERS // (D * HIDDEN))
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP) if clip else optax.identity(),
        optax.adamw(LEARNING_RATE, B1, B2, EPS, weight_decay=DECAY),
    )

    def update(state: Any, grads: Any) -> Any:
        params, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(update, donate_argnums=0)
    params, grads = (list(map(jnp.asarray, weights)) for _ in range(2))
    state = jax.block_until_ready((params, optimizer.init(params)))

    def ours() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, grads))

    tensors = [torch.tensor(x, requires_grad=True) for x in weights]
    torch_adamw = torch.optim.AdamW(
        tensors, lr=LEARNING_RATE, betas=(B1, B2), eps=EPS, weight_decay=DECAY, fused=True
    )

    def theirs() -> None:
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor) if tensor.grad is None else tensor.grad
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors, CLIP)
        torch_adamw.step()

    return ours, theirs, 7.0 * sum(x.nbytes for x in weights)


def main() -> None:
    """Prints the table."""
    options = parse(__doc__, repetitions=15)
    table = Table(
        title=f"{options.batch} x {LENGTH} tokens; ms, medians; quartiles of the ratio",
        caption=f"jax {jax.__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {options.clock} time",
    )
    for heading in ("part", "ours", "PyTorch", "PyTorch / ours", "ours, GFLOP/s", "ours, GB/s"):
        table.add_column(heading, justify="right" if table.columns else "left")
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    rows: list[tuple[str, Any, float]] = []
    for part in parts(options.batch * LENGTH):
        rows.append((part.name, calls_of(part, False), part.flops))
        rows.append((f"{part.name}, with backward", calls_of(part, True), 3 * part.flops))
    rows.append(("AdamW", optimizers(clip=False), 0.0))
    rows.append(("clipping and AdamW", optimizers(clip=True), 0.0))
    for name, (ours, theirs, size), flops in rows:
        found = timing.compare(
            ours, theirs, repetitions=options.repetitions, calls=5, pause=0.05, quiet=0.1,
            patience=options.repetitions, clock=clock,
        )  # fmt: skip
        mine, other = (statistics.median(x) for x in (found.seconds_a, found.seconds_b))
        low, _, high = statistics.quantiles(found.speedups, n=4, method="inclusive")
        speed = f"{flops / mine / 1e9:.0f}" if flops else ""
        table.add_row(
            name, f"{mine * 1e3:.2f}", f"{other * 1e3:.2f}",
            f"{found.speedup:.2f} ({low:.2f} to {high:.2f})", speed, f"{size / mine / 1e9:.1f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    accounted(main)
