"""Inputs, outputs and copies of the weights of many frameworks, and all that follows from them.

Every case is a function with weights, and what is to be found: the axes of each weight and the
rows that it is multiplied with, computed by hand in float64 as (copies…, N, R).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from swe_prune import calibration, importance, masks, tree
from swe_prune.errors import InputError
from swe_prune.layout import Axes, conventional_axes, layout

B, D, H, E, LAYERS = 6, 4, 8, 3, 3
KEY = jax.random.key(0)
CASES: dict[str, Callable[[], "Case"]] = {}


@dataclasses.dataclass
class Case:
    """A function, and the axes and rows of its weights by name."""

    fn: Any
    params: Any
    want: dict[str, tuple[Axes, Any]]
    batch: Any = None
    dense: dict[str, str] = dataclasses.field(default_factory=dict)


def case(make):
    CASES[make.__name__] = functools.cache(make)
    return make


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def f64(x):
    return np.asarray(x, np.float64)


X = drawn(B, D)
IN_OUT, OUT_IN = Axes((0,), (1,)), Axes((1,), (0,))


# ---- Linen ----


@case
def linen_dense():
    return Case(nn.Dense(H), made(nn.Dense(H), X), {"kernel": (IN_OUT, X)}, X)


def made(model, x):
    return jax.jit(model.init)(KEY, x)["params"]


def attention_rows(x, weights):
    """What comes into the out projection, in float64."""
    q, k, v = (np.einsum("bld,dhw->blhw", f64(x), f64(weights[name])) for name in "qkv")
    logits = np.einsum("blhw,bmhw->bhlm", q, k) / math.sqrt(q.shape[-1])
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum("bhlm,bmhw->blhw", shares, v).reshape(-1, q.shape[2] * q.shape[3])


SEQ = drawn(2, 3, D)


@case
def linen_attention():
    model = nn.MultiHeadDotProductAttention(2, qkv_features=H, use_bias=False)
    params = made(model, SEQ)
    rows = attention_rows(SEQ, {n[0]: params[n]["kernel"] for n in ("query", "key", "value")})
    into = (Axes((0,), (1, 2)), SEQ.reshape(-1, D))
    want = {f"{name}/kernel": into for name in ("query", "key", "value")}
    return Case(model, params, {**want, "out/kernel": (Axes((0, 1), (2,)), rows)}, SEQ)


LINE = drawn(2, 6, D)
IMAGE = drawn(2, 4, 5, D)


def patches(x, size, order):
    """Patches by loops, in the order (spatial…, in) or (in, spatial…)."""
    spatial = [range(n - k + 1) for n, k in zip(x.shape[1:-1], size, strict=True)]
    found = []
    for at in np.ndindex(*map(len, spatial)):
        cut = tuple(slice(i, i + k) for i, k in zip(at, size, strict=True))
        part = x[(slice(None), *cut)]
        found.append(
            (np.moveaxis(part, -1, 1) if order == "in first" else part).reshape(len(x), -1)
        )
    return np.concatenate(found)


@case
def linen_conv_1d():
    model = nn.Conv(H, (3,), padding="VALID")
    want = {"kernel": (Axes((0, 1), (2,)), patches(LINE, (3,), "in last"))}
    return Case(model, made(model, LINE), want, LINE)


@case
def linen_conv_2d():
    model = nn.Conv(H, (2, 2), padding="VALID")
    want = {"kernel": (Axes((0, 1, 2), (3,)), patches(IMAGE, (2, 2), "in last"))}
    return Case(model, made(model, IMAGE), want, IMAGE)


def linen_scan(axis, remat):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(D, name="dense", use_bias=False)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.remat(Layer) if remat else Layer
            stack = nn.scan(
                layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=LAYERS
            )
            return stack(name="layers")(x, None)[0]

    params = made(Model(), X)
    w = np.moveaxis(f64(params["layers"]["dense"]["kernel"]), axis, 0)
    axes = Axes((1,), (2,), (0,)) if axis == 0 else Axes((0,), (2,), (1,))
    return Case(Model(), params, {"layers/dense/kernel": (axes, through_layers(X, w))}, X)


def through_layers(x, w_LxDxD, order=None):
    """What comes into each of a stack of tanh layers."""
    rows, h = np.zeros((len(w_LxDxD), *x.shape)), f64(x)
    for i in range(len(w_LxDxD)) if order is None else order:
        rows[i], h = h, np.tanh(h @ w_LxDxD[i])
    return rows


@case
def linen_scan_in_front():
    return linen_scan(0, remat=True)


@case
def linen_scan_at_axis_1():
    return linen_scan(1, remat=True)


@case
def linen_vmap():
    model = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)(
        H, use_bias=False
    )
    x = drawn(E, B, D)
    want = {"kernel": (Axes((1,), (2,), (0,)), x)}
    return Case(
        # The batch runs along the second axis of what each member gets.
        lambda params, x: model.apply({"params": params}, jnp.moveaxis(x, 1, 0)),
        made(model, x),
        want,
        np.moveaxis(x, 0, 1),
    )


def convolved(x, w):
    return lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))


@case
def convolutions_under_vmap():
    w, x = drawn(E, 3, D, H), drawn(2, E, 6, D)  # as many members as places
    rows = np.stack([patches(x[:, e], (3,), "in last") for e in range(E)])
    fn = jax.vmap(lambda w, x: convolved(x, w), in_axes=(0, 1), out_axes=1)
    return Case(lambda p, x: fn(p["w"], x), {"w": w}, {"w": (Axes((1, 2), (3,), (0,)), rows)}, x)


@case
def convolutions_under_vmap_of_one_input():
    w, rows = drawn(D, 3, D, H), patches(LINE, (3,), "in last")
    fn = jax.vmap(convolved, in_axes=(None, 0))
    want = {"w": (Axes((1, 2), (0, 3)), rows)}
    return Case(lambda p, x: jnp.moveaxis(fn(x, p["w"]), 0, 1), {"w": w}, want, LINE)


# ---- NNX ----


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, D, qkv_features=H, use_bias=False, decode=False, rngs=rngs
        )
        self.conv = nnx.Conv(D, H, (3,), padding="VALID", rngs=rngs)

    def __call__(self, x):
        return self.conv(self.attention(jnp.tanh(self.linear(x))))


@case
def nnx_layers():
    model, x = NnxNet(nnx.Rngs(0)), drawn(2, 5, D)
    params = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(params)
    h = np.tanh(f64(x) @ f64(plain["linear"]["kernel"]))
    rows = attention_rows(
        h, {n[0]: plain["attention"][n]["kernel"] for n in ("query", "key", "value")}
    )
    after = rows @ f64(plain["attention"]["out"]["kernel"]).reshape(H, D)
    into = (Axes((0,), (1, 2)), h.reshape(-1, D))
    want = {f"attention/{name}/kernel": into for name in ("query", "key", "value")}
    want |= {
        "linear/kernel": (IN_OUT, x.reshape(-1, D)),
        "attention/out/kernel": (Axes((0, 1), (2,)), rows),
        "conv/kernel": (
            Axes((0, 1), (2,)),
            patches(after.reshape(2, 5, D), (3,), "in last"),
        ),
    }
    return Case(model, params, want, x)


class NnxStack(nnx.Module):
    """Layers made by nnx.vmap, and used by nnx.scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def layers(rngs):
            return nnx.Linear(D, D, use_bias=False, rngs=rngs)

        self.layers = layers(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


@case
def nnx_scan_over_layers_of_vmap():
    model = NnxStack(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    w = f64(nnx.to_pure_dict(params)["layers"]["kernel"])
    want = {"layers/kernel": (Axes((1,), (2,), (0,)), through_layers(X, w))}
    return Case(model, params, want, X)


class NnxMembers(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=E)
        @nnx.vmap
        def members(rngs):
            return nnx.Linear(D, H, rngs=rngs)

        self.members = members(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, 1), out_axes=1)(self.members, x)


@case
def nnx_vmap():
    model, x = NnxMembers(nnx.Rngs(0)), drawn(B, E, D)
    want = {"members/kernel": (Axes((1,), (2,), (0,)), np.moveaxis(x, 1, 0))}
    return Case(model, nnx.state(model, nnx.Param), want, x)


# ---- Equinox: (out, in) ----


@case
def equinox_ensemble_of_shared_inputs():
    def member(key):
        return eqx.nn.MLP(D, 2, H, 1, activation=jnp.tanh, key=key)

    members = eqx.filter_vmap(member)(jax.random.split(KEY, E))
    first = members.layers[0]
    hidden = np.tanh(f64(X) @ f64(first.weight).swapaxes(1, 2) + f64(first.bias)[:, None])
    of_member = Axes((2,), (1,), (0,))
    want = {
        "layers/0/weight": (of_member, np.stack([X] * E)),
        "layers/1/weight": (of_member, hidden),
    }

    def run(members, x):
        return eqx.filter_vmap(lambda member: jax.vmap(member)(x))(members)

    return Case(run, members, want, X)


@case
def equinox_mlp():
    model = eqx.nn.MLP(D, D, H, 1, activation=jnp.tanh, key=KEY)
    first = model.layers[0]
    hidden = np.tanh(f64(X) @ f64(first.weight).T + f64(first.bias))
    want = {"layers/0/weight": (OUT_IN, X), "layers/1/weight": (OUT_IN, hidden)}
    return Case(lambda model, x: jax.vmap(model)(x), model, want, X)


@case
def equinox_conv():
    model = eqx.nn.Conv1d(D, H, 3, key=KEY)
    want = {"weight": (Axes((1, 2), (0,)), patches(LINE, (3,), "in first"))}
    return Case(lambda model, x: jax.vmap(model)(jnp.swapaxes(x, 1, 2)), model, want, LINE)


@case
def equinox_attention():
    model = eqx.nn.MultiheadAttention(2, D, qk_size=4, vo_size=4, key=KEY)
    split = {
        n[0]: f64(getattr(model, f"{n}_proj").weight).reshape(2, 4, D).transpose(2, 0, 1)
        for n in ("query", "key", "value")
    }
    into = (OUT_IN, SEQ.reshape(-1, D))
    want = {f"{name}_proj/weight": into for name in ("query", "key", "value")}
    want["output_proj/weight"] = (OUT_IN, attention_rows(SEQ, split))
    return Case(lambda model, x: jax.vmap(lambda s: model(s, s, s))(x), model, want, SEQ)


@case
def equinox_layers_of_filter_vmap():
    keys = jax.random.split(KEY, LAYERS)
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(D, D, use_bias=False, key=key))(keys)

    def run(stack, x):
        arrays, static = eqx.partition(stack, eqx.is_array)

        def layer(x, own):
            return jnp.tanh(jax.vmap(eqx.combine(own, static))(x)), None

        return lax.scan(layer, x, arrays)[0]

    rows = through_layers(X, np.swapaxes(f64(stack.weight), 1, 2))
    return Case(run, stack, {"weight": (Axes((2,), (1,), (0,)), rows)}, X)


# ---- Plain functions ----


def plain(fn, weight, axes, rows, batch=X):
    return Case(lambda p, x: fn(p["w"], x), {"w": weight}, {"w": (axes, rows)}, batch)


def shaped(name, fn, shape, axes, rows: Any = X, batch=X):
    """Adds a case of one weight."""

    def make():
        return plain(fn, drawn(*shape, seed=1), axes, rows, batch)

    CASES[name] = functools.cache(make)


FIRST_TWO = Axes((0, 1), (2,))
shaped("x_times_w", lambda w, x: x @ w, (D, H), IN_OUT)
shaped("w_times_x", lambda w, x: (w @ x.T).T, (H, D), OUT_IN)
shaped("one_example", lambda w, x: jax.vmap(lambda x: w @ x)(x), (H, D), OUT_IN)
shaped("torch_linear", lambda w, x: jnp.einsum("bi,oi->bo", x, w), (H, D), OUT_IN)
shaped("checkpoint", jax.checkpoint(lambda w, x: jnp.sin(x @ w)), (D, H), IN_OUT)
shaped("jitted_twice", jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w)), (D, H), IN_OUT)
shaped("weight_norm", lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), (D, H), IN_OUT)
shaped("masked", lambda w, x: x @ (w * (jnp.arange(H) % 2)), (D, H), IN_OUT)
shaped("standardized", lambda w, x: x @ ((w - w.mean(0)) / (w.std(0) + 1)), (D, H), IN_OUT)
shaped(
    "cond", lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: 2 * (x @ w)), (D, H), IN_OUT
)
shaped("function_of_itself", lambda w, x: x @ jnp.where(w > 0, w, 2 * w), (D, H), IN_OUT)
shaped("loss", lambda w, x: jnp.mean((x @ w) ** 2), (D, H), IN_OUT)
shaped("batched_rows", lambda w, x: jnp.dot(x.reshape(2, 3, D), w), (D, H), IN_OUT)
shaped(
    "heads_reshaped", lambda w, x: jnp.einsum("bd,dhw->bhw", x, w.reshape(D, 2, 4)), (D, H), IN_OUT
)
shaped("out_of_heads", lambda w, x: jnp.einsum("bij,ijo->bo", x.reshape(B, 2, 2), w), (2, 2, H),
       FIRST_TWO)  # fmt: skip
shaped("reshaped_by_columns", lambda w, x: x @ lax.reshape(w, (D, 2 * D), (1, 0)), (2 * D, D),
       OUT_IN)  # fmt: skip
shaped("stored_flat", lambda w, x: x @ w.reshape(D, H).astype(x.dtype), (D * H,), None, None)


@jax.custom_vjp
def own_matmul(x, w):
    return x @ w


own_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
shaped("custom_vjp", lambda w, x: own_matmul(x, w), (D, H), IN_OUT)


@case
def scales_of_quantized_weights():
    ints = jnp.arange(D * H, dtype=jnp.int8).reshape(D, H)
    params = {"w": drawn(D, H), "q": ints, "scale": drawn(1, H), "gain": drawn(H)}

    def run(p, x):
        return x @ p["w"] + x @ (p["q"].astype(jnp.float32) * p["scale"]) * p["gain"]

    want = {"w": (IN_OUT, X), "scale": (Axes((), (0, 1), kind="vector"), None)}
    return Case(run, params, want, X, {"scale": "in no product"})


@case
def two_uses_add_up():
    w = drawn(D, D, seed=1)
    second = np.tanh(f64(X) @ f64(w))
    return plain(lambda w, x: jnp.tanh(x @ w) @ w, w, IN_OUT, np.concatenate([X, second]))


@case
def fused_qkv():
    w = drawn(D, 3 * D, seed=1)

    def run(w, x):
        q, k, v = jnp.split(x @ w, 3, axis=-1)
        return q * k + v

    return plain(run, w, IN_OUT, X)


@case
def fused_qkv_sliced_before():
    w = drawn(D, 3 * D, seed=1)

    def run(w, x):
        q, k, v = jnp.split(w, 3, axis=-1)
        return (x @ q) * (x @ k) + x @ v

    return plain(run, w, IN_OUT, X)


@case
def fused_qkv_in_heads():
    w = drawn(D, 3 * 2 * D, seed=1)

    def run(w, x):
        q, k, v = (jnp.einsum("bd,dhw->bhw", x, w.reshape(D, 3, 2, D)[:, i]) for i in range(3))
        return q * k + v

    return plain(run, w, IN_OUT, X)


@case
def members_along_axis_1():
    params = {"first": drawn(D, E, H), "second": drawn(H, E, 2)}
    of_member = Axes((0,), (2,), (1,))
    hidden = np.tanh(np.einsum("bd,deh->ebh", f64(X), f64(params["first"])))
    want = {"first": (of_member, np.stack([X] * E)), "second": (of_member, hidden)}

    def run(p, x):
        member = lambda p: jnp.tanh(x @ p["first"]) @ p["second"]  # noqa: E731
        return jax.vmap(member, in_axes=1)(p)

    return Case(run, params, want, X)


@case
def spectral_norm_and_penalty():
    w, u = drawn(D, H, seed=1), drawn(1, H)

    def run(w, x):
        left = u @ w.T
        out = x @ (w / (left @ w @ u.T))
        return jnp.mean(out**2) + jnp.sum((w.T @ w - jnp.eye(H)) ** 2)

    return plain(run, w, IN_OUT, X)


@case
def half_precision():
    w = jnp.asarray(drawn(D, H, seed=1), jnp.bfloat16)
    rows = f64(jnp.asarray(X, jnp.bfloat16).astype(jnp.float32))
    return plain(lambda w, x: x.astype(jnp.bfloat16) @ w, w, IN_OUT, rows)


@case
def mixed_precision():
    w, rows = drawn(D, H, seed=1), f64(jnp.asarray(X, jnp.bfloat16).astype(jnp.float32))
    return plain(lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), w, IN_OUT, rows)


@case
def complex_activations():
    spectrum = np.fft.fft(f64(X))
    rows = np.concatenate([spectrum.real, spectrum.imag])  # Σ |x|² and Re Σ x̄ xᵀ

    def run(w, x):
        return jnp.abs(jnp.fft.fft(x) @ w.astype(jnp.complex64))

    return plain(run, drawn(D, H), IN_OUT, rows)


@case
def real_and_imaginary_parts():
    params = {"real": drawn(D, H), "imag": drawn(D, H, seed=1)}

    def run(p, x):
        w = lax.complex(p["real"], p["imag"])
        return (x.astype(jnp.complex64) @ w).real

    return Case(run, params, {"real": (IN_OUT, X), "imag": (IN_OUT, X)}, X)


@case
def low_rank():
    params = {"w": drawn(D, H), "a": drawn(D, 2), "b": drawn(2, H)}
    rows = f64(X) @ f64(params["a"])
    want = {"w": (IN_OUT, X), "a": (IN_OUT, X), "b": (IN_OUT, rows)}
    return Case(lambda p, x: x @ p["w"] + (x @ p["a"]) @ p["b"], params, want, X)


@case
def low_rank_added_to_the_weight():
    params = {"w": drawn(D, H), "a": drawn(D, 2), "b": drawn(2, H)}
    want = {"w": (IN_OUT, X)}
    return Case(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), params, want, X)


STACK = drawn(LAYERS, D, D, seed=2)
IN_FRONT = Axes((1,), (2,), (0,))


def stacked(name, fn, axis=0, order=None):
    def make():
        axes = {0: IN_FRONT, 1: Axes((0,), (2,), (1,)), 2: Axes((0,), (1,), (2,))}[axis]
        rows = through_layers(X, f64(STACK), order)
        return plain(fn, np.moveaxis(STACK, 0, axis), axes, rows)

    CASES[name] = functools.cache(make)


def layer(x, w):
    return jnp.tanh(x @ w), None


def fori(pick):
    return lambda w, x: lax.fori_loop(0, LAYERS, lambda i, x: jnp.tanh(x @ pick(w, i)), x)


stacked("scan", lambda w, x: lax.scan(layer, x, w)[0])
stacked("scan_reversed", lambda w, x: lax.scan(layer, x, w, reverse=True)[0], order=(2, 1, 0))
stacked("scan_over_axis_1", lambda w, x: lax.scan(layer, x, jnp.moveaxis(w, 1, 0))[0], axis=1)
stacked("scan_over_axis_2", lambda w, x: lax.scan(layer, x, jnp.moveaxis(w, 2, 0))[0], axis=2)
stacked("scan_of_checkpoints", lambda w, x: lax.scan(jax.checkpoint(layer), x, w)[0])
stacked("scan_unrolled", lambda w, x: lax.scan(layer, x, w, unroll=3)[0])
stacked("fori_loop", fori(lambda w, i: lax.dynamic_index_in_dim(w, i, 0, keepdims=False)))
stacked("fori_loop_by_index", fori(lambda w, i: w[i]))
stacked("fori_loop_at_axis_1", fori(lambda w, i: w[:, i]), axis=1)
stacked(
    "layers_one_by_one", lambda w, x: functools.reduce(lambda x, i: jnp.tanh(x @ w[i]), range(3), x)
)
stacked("layers_unpacked", lambda w, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), list(w), x))


@case
def while_loop():
    def run(w, x):
        def body(state):
            return state[0] + 1, jnp.tanh(state[1] @ w[state[0]])

        return lax.while_loop(lambda state: state[0] < LAYERS, body, (0, x))[1]

    return plain(run, STACK, IN_FRONT, through_layers(X, f64(STACK)))


@case
def one_weight_in_every_iteration():
    w, rows, h = drawn(D, D, seed=1), [], f64(X)
    for _ in range(LAYERS):
        rows.append(h)
        h = np.tanh(h @ f64(w))
    run = lambda w, x: lax.scan(lambda x, _: layer(x, w), x, None, length=LAYERS)[0]  # noqa: E731
    return plain(run, w, IN_OUT, np.concatenate(rows))


@case
def vmapped_layers_of_a_scan():
    w, x = drawn(LAYERS, E, D, D, seed=1), drawn(B, E, D)

    def run(w, x):
        each = jax.vmap(lambda w, x: jnp.tanh(x @ w), in_axes=(0, 1), out_axes=1)
        return lax.scan(lambda x, w: (each(w, x), None), x, w)[0]

    rows = np.stack([through_layers(x[:, e], f64(w)[:, e]) for e in range(E)], axis=1)
    return plain(run, w, Axes((2,), (3,), (0, 1)), rows, x)


# ---- Mixtures of experts ----

ROUTER = drawn(D, E, seed=3)
EXPERTS = {"router": ROUTER, "up": drawn(E, D, H, seed=4), "down": drawn(E, H, D, seed=5)}
OF_EXPERT = Axes((1,), (2,), (0,))
ROUTED = {"router": (Axes((0,), (1,), kind="router"), X)}


def sent_to():
    return np.argmax(f64(X) @ f64(ROUTER), axis=1)


def routed_rows(weights=None):
    """What comes into both layers of each expert, zeros in place of the others' tokens."""
    mine = (sent_to() == np.arange(E)[:, None])[:, :, None]
    x = f64(X) * mine
    return {"up": x, "down": np.tanh(np.einsum("ebd,edh->ebh", x, f64(EXPERTS["up"])))}


def experts_case(fn):
    rows = routed_rows()
    want = ROUTED | {name: (OF_EXPERT, rows[name]) for name in ("up", "down")}
    return Case(fn, EXPERTS, want, X, {"router": "router"})


def one_hot_experts(p, x):
    gate, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 1)
    sent = jnp.einsum("bd,bke->ebd", x, jax.nn.one_hot(chosen, E))
    inside = jnp.tanh(jnp.einsum("ebd,edh->ebh", sent, p["up"]))
    return jnp.einsum("ebh,ehd->ebd", inside, p["down"]).sum(0) * gate


@case
def experts_by_one_hot():
    return experts_case(one_hot_experts)


@case
def experts_combined_in_the_last_product():
    def run(p, x):
        _, chosen = lax.top_k(x @ p["router"], 1)
        sent = jnp.einsum("bd,bke->ebd", x, jax.nn.one_hot(chosen, E))
        inside = jnp.tanh(jnp.einsum("ebd,edh->ebh", sent, p["up"]))
        return jnp.einsum("ebh,ehd->bd", inside, p["down"])

    return experts_case(run)


@case
def experts_that_take_what_a_one_hot_weighs():
    def run(p, x):
        mine = jax.nn.one_hot(jnp.argmax(x @ p["router"], axis=1), E)
        inside = jnp.tanh(jnp.einsum("be,bd,edh->bh", mine, x, p["up"]))
        return jnp.einsum("bhe,ehd->bd", inside[:, :, None] * mine[:, None], p["down"])

    return experts_case(run)


@case
def experts_by_ragged_dot():
    def run(p, x):
        chosen = jnp.argmax(x @ p["router"], axis=1)
        order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=E)
        inside = jnp.tanh(lax.ragged_dot(x[order], p["up"], sizes))
        return lax.ragged_dot(inside, p["down"], sizes)[jnp.argsort(order)]

    return experts_case(run)


# ---- What every case keeps to ----


@functools.cache
def traced(name):
    case = CASES[name]()
    return layout(case.fn, case.params, case.batch)


def leaves(of):
    return {name: leaf for name, leaf in tree.named_leaves(of) if leaf is not None}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def bare(axes):
    return axes.inputs, axes.outputs, axes.copies, axes.kind


@pytest.mark.quick(22)
def test_axes_are_those_of_the_computation(name):
    case, found = CASES[name](), leaves(traced(name))
    for leaf, (axes, _) in case.want.items():
        if axes is None:
            assert found[leaf].kind == "unknown"
        else:
            assert bare(found[leaf]) == bare(axes), leaf
            assert not found[leaf].also


@pytest.mark.quick(22)
def test_every_weight_has_the_norms_and_the_hessian_of_what_it_is_multiplied_with(name):
    case = CASES[name]()
    wanted = {leaf: want for leaf, want in case.want.items() if want[1] is not None}
    marks = tree.map_leaves(lambda leaf, _: leaf in wanted, case.params)
    if not wanted:
        return
    measured = calibration.inputs(case.fn, case.params, [case.batch], hessian=True, prunable=marks)
    n = len(jax.tree.leaves(case.batch)[0])
    norms, hessians = (leaves(measured[kind]) for kind in ("input_norm", "hessian"))
    # rtol: bfloat16 activations inside a model are float32 sums of rounded values.
    for leaf, (axes, rows) in wanted.items():
        rows = f64(rows)
        weight = leaves(case.params)[leaf]
        copies, inputs = ([weight.shape[a] for a in some] for some in (axes.copies, axes.inputs))
        rows = rows.reshape(*copies, -1, math.prod(inputs))
        hessian = 2 / n * np.swapaxes(rows, -1, -2) @ rows
        norm = np.sqrt((rows**2).sum(-2) / n).reshape(*copies, *inputs)
        order = np.argsort((*axes.copies, *axes.inputs))
        shape = [1 if axis in axes.outputs else k for axis, k in enumerate(weight.shape)]
        norm = np.transpose(norm, order).reshape(shape)
        np.testing.assert_allclose(norms[leaf], norm, rtol=1e-5, atol=1e-6, err_msg=leaf)
        # atol: an entry of the sum of products may be nearly 0.
        np.testing.assert_allclose(
            hessians[leaf], hessian, rtol=1e-5, atol=1e-5 * hessian.max(), err_msg=leaf
        )


@pytest.mark.quick(22)
def test_defaults_are_the_kernels_of_the_computation(name):
    case = CASES[name]()
    if any(want is None for want, _ in case.want.values()):
        with pytest.raises(InputError, match="no weight is prunable"):
            tree.prunable(case.params, layout=traced(name))
        return
    chosen = tree.prunable(case.params, layout=traced(name))
    axes = leaves(traced(name))
    for leaf in case.want:
        reason = tree.dense_reason(leaf, leaves(case.params)[leaf], axes=axes[leaf])
        assert leaves(chosen)[leaf] == (not reason)
        assert reason == case.dense.get(leaf, ""), leaf


# The rules are compiled once for the weights of all cases.


@functools.cache
def everything():
    """Scores and axes of all the weights, by "case/leaf"."""
    scores, axes = {}, {}
    for name, make in CASES.items():
        case = make()
        found = leaves(traced(name))
        for leaf, (want, _) in case.want.items():
            if want is not None and want.inputs:
                key = f"{name}/{leaf}"
                shape = leaves(case.params)[leaf].shape
                scores[key] = jnp.abs(drawn(*shape, seed=9))
                axes[key] = found[leaf]
    return scores, axes


def by_copy(mask_or_score, axes):
    """Yields each copy as a matrix of inputs by outputs."""
    value = np.asarray(mask_or_score)
    moved = np.transpose(value, (*axes.copies, *axes.inputs, *axes.outputs))
    copies, inputs, outputs = (
        math.prod(value.shape[axis] for axis in some)
        for some in (axes.copies, axes.inputs, axes.outputs)
    )
    yield from moved.reshape(copies, inputs, outputs)


def lowest_removed(values, gone):
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values.ravel(), kind="stable")[: values.size - gone]] = True
    return mask.reshape(values.shape)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["row", "tensor", "2:4", "std", "column"])
def test_every_rule_treats_each_copy_and_output_as_its_own(rule):
    scores, axes = everything()
    if rule == "std":
        mask = masks.by_std(scores, 0.9, layout=axes)
    elif rule in ("row", "tensor"):
        mask = masks.by_sparsity(scores, 0.45, rule, layout=axes)
    else:
        if rule == "2:4":
            scores = {key: score for key, score in scores.items() if fours(score, axes[key])}
        mask = masks.by_sparsity(scores, 0.5, pattern=rule, layout=axes)
    for key, score in scores.items():
        pairs = zip(by_copy(score, axes[key]), by_copy(mask[key], axes[key]), strict=True)
        for of_copy, kept in pairs:
            wanted = BY_NUMPY[rule](f64(of_copy))
            np.testing.assert_array_equal(kept, wanted, err_msg=key)


def fours(score, axes):
    return math.prod(score.shape[axis] for axis in axes.inputs) % 4 == 0


BY_NUMPY = {
    "row": lambda s: np.stack([lowest_removed(c, int(len(c) * 0.45 + 0.5)) for c in s.T], axis=1),
    "tensor": lambda s: lowest_removed(s, int(s.size * 0.45 + 0.5)),
    "2:4": lambda s: np.concatenate(
        [
            np.stack([lowest_removed(c, 2) for c in s[i : i + 4].T], axis=1)
            for i in range(0, len(s), 4)
        ]
    ),
    "std": lambda s: s > s.std(ddof=1) * 0.9,
    "column": lambda s: np.broadcast_to(
        lowest_removed(s.sum(1), int(len(s) * 0.5 + 0.5))[:, None], s.shape
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_criterion_scores_each_copy_by_itself(criterion):
    scores, axes = everything()
    rng = np.random.default_rng(0)
    norms, hessians = {}, {}
    for key, score in scores.items():
        copies, inputs = ([score.shape[a] for a in s] for s in (axes[key].copies, axes[key].inputs))
        count = math.prod(inputs)
        x = rng.normal(size=(*copies, 3 * count, count))
        hessians[key] = jnp.asarray(2 / 3 * np.swapaxes(x, -1, -2) @ x, jnp.float32)
        shape = [1 if a in axes[key].outputs else n for a, n in enumerate(score.shape)]
        norms[key] = jnp.asarray(rng.random(shape), jnp.float32)
    measured = {"input_norm": norms, "hessian": hessians}
    marks = dict.fromkeys(scores, True)
    found = jax.jit(
        lambda: importance.score(criterion, scores, measured=measured, prunable=marks, layout=axes)
    )()
    for key, weight in scores.items():
        if criterion == "wanda":
            wanted = f64(weight) * f64(norms[key])
            np.testing.assert_allclose(found[key], wanted, rtol=1e-6, err_msg=key)
            continue
        inverses = f64(hessians[key]).reshape(-1, *hessians[key].shape[-2:])
        pairs = zip(
            by_copy(weight, axes[key]), by_copy(found[key], axes[key]), inverses, strict=True
        )
        for of_copy, got, hessian in pairs:
            damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
            cost = np.diag(np.linalg.cholesky(np.linalg.inv(damped)).T) ** 2
            wanted = f64(of_copy) ** 2 / cost[:, None]
            np.testing.assert_allclose(got, wanted, rtol=1e-4, err_msg=key)


# ---- What cannot be told is refused, never guessed ----


def carried(fn):
    return lambda w, x: lax.scan(lambda c, _: fn(*c), (w, x), None, length=2)[0][1]


OUTSIDE = jax.ShapeDtypeStruct((B, D), jnp.float32)
UNTOLD = {
    "stored flat": (lambda w, x: x @ w.reshape(D, D), (D * D,)),
    "both orientations": (lambda w, x: (x @ w) @ w.T, (D, D)),
    "its own square": (lambda w, x: x @ (w @ w), (D, D)),
    "its Gram matrix": (lambda w, x: x @ (w.T @ w), (H, D)),
    "a running sum": (lambda w, x: x @ jnp.cumsum(w, 0), (D, D)),
    "its singular vectors": (lambda w, x: x @ jnp.linalg.svd(w)[0], (D, D)),
    "repeated by tile": (lambda w, x: x @ jnp.tile(w, (2, 1)), (D // 2, H)),
    "turned in a loop": (carried(lambda w, x: ((w.T, jnp.tanh(x @ w)), None)), (D, D)),
    "rolled in a loop": (carried(lambda w, x: ((jnp.roll(w, 1, 0), x @ w[0]), None)), (2, D, D)),
    "a callback": (
        lambda w, x: jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), OUTSIDE, w, x),
        (D, D),
    ),
}


@pytest.mark.parametrize("what", UNTOLD)
def test_what_cannot_be_told_is_refused_by_rules_and_by_calibration(what):
    fn, shape = UNTOLD[what]
    params = {"w": jnp.asarray(drawn(*shape))}
    found = layout(lambda p, x: fn(p["w"], x), params, X)
    with pytest.raises(InputError, match=r"'w' is used .* inputs are not known"):
        masks.by_sparsity(params, 0.5, "row", layout=found)
    with pytest.raises(InputError, match=r"'w'.*exclude it with prunable="):
        calibration.inputs(lambda p, x: fn(p["w"], x), params, [X], prunable={"w": True})


PARTLY_TOLD = {
    "reversed": (lambda w, x: x @ w[::-1], (D, H)),
    "padded": (lambda w, x: jnp.pad(x, ((0, 0), (0, 2))) @ jnp.pad(w, ((0, 2), (0, 0))), (D, H)),
    "cut along inputs": (lambda w, x: x[:, :2] @ w[:2] + x[:, 2:] @ w[2:], (D, H)),
    "joined along inputs": (lambda w, x: jnp.tile(x, (1, 2)) @ jnp.concatenate([w, -w]), (D, H)),
    "looked up for each token": (
        lambda w, x: jnp.einsum("bd,bdh->bh", x, w[jnp.argmax(x[:, :E], 1)]), (E, D, H)
    ),
    "picked for each token by a one-hot": (
        lambda w, x: jnp.einsum(
            "bd,bdh->bh",
            x,
            jnp.einsum("be,edh->bdh", jax.nn.one_hot(jnp.argmax(x[:, :E], 1), E), w),
        ),
        (E, D, H),
    ),
    "chosen for each token by a switch": (
        jax.vmap(
            lambda w, x: lax.switch(
                jnp.argmax(x[:E]), [lambda x, e=e: x @ w[e] for e in range(E)], x
            ),
            (None, 0),
        ),
        (E, D, H),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PARTLY_TOLD)
def test_known_axes_with_unknown_places_have_rules_but_no_measurements(what):
    fn, shape = PARTLY_TOLD[what]
    params = {"w": jnp.asarray(drawn(*shape))}
    found = layout(lambda p, x: fn(p["w"], x), params, X)
    assert bare(found["w"]) == bare(IN_OUT if len(shape) == 2 else OF_EXPERT)
    with pytest.raises(InputError, match="its inputs cannot be told apart"):
        calibration.inputs(lambda p, x: fn(p["w"], x), params, [X])


def one_by_one(w, x):
    """Layers that are stored along the outputs, (D, E · D)."""
    for at in range(E):
        x = jnp.tanh(x @ w.reshape(D, E, D)[:, at])
    return x


def keys_of_others(w, x):
    """Queries of x, keys and values of other tokens, by weights of torch's attention (3 D, D)."""
    q, k, v = jnp.split(w, 3, axis=0)
    return (x @ q.T) * (jnp.sin(x) @ k.T) + jnp.sin(x) @ v.T


APART = {
    "layers one by one": (one_by_one, (D, E * D)),
    "layers in a loop": (
        lambda w, x: lax.fori_loop(
            0, E, lambda i, x: jnp.tanh(x @ lax.dynamic_slice_in_dim(w, i * D, D, 1)), x
        ),
        (D, E * D),
    ),
    "layers in a loop by index": (
        lambda w, x: lax.fori_loop(0, E, lambda i, x: jnp.tanh(x @ w.reshape(D, E, D)[:, i]), x),
        (D, E * D),
    ),
    "keys of other tokens": (keys_of_others, (3 * D, D)),
    "a branch of other tokens": (
        lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w[:, :D], lambda: jnp.sin(x) @ w[:, D:]),
        (D, 2 * D),
    ),
}


@pytest.mark.parametrize("what", APART)
def test_outputs_that_get_different_inputs_have_no_one_set_of_norms(what):
    fn, shape = APART[what]
    params = {"w": drawn(*shape)}
    with pytest.raises(InputError, match=r"'w' is cut.*exclude it with prunable="):
        calibration.inputs(lambda p, x: fn(p["w"], x), params, [X])


def twice(w, x):
    """A fused projection that is cut, in a layer that is used twice."""
    for _ in range(2):
        q, k, v = jnp.split(w, 3, axis=1)
        x = jnp.tanh((x @ q) * (x.reshape(2, 3, D) @ k).reshape(B, D) + x[None][0] @ v)
    return x


def test_outputs_that_all_get_the_same_inputs_are_measured_however_they_are_cut():
    w = drawn(D, 3 * D)
    q, k, v = np.split(f64(w), 3, axis=1)
    rows = np.concatenate([X, np.tanh((f64(X) @ q) * (f64(X) @ k) + f64(X) @ v)])
    measured = calibration.inputs(lambda p, x: twice(p["w"], x), {"w": w}, [X])
    norm = np.sqrt((rows**2).sum(0) / B)
    np.testing.assert_allclose(measured["input_norm"]["w"][:, 0], norm, rtol=1e-5)


def test_weights_that_are_joined_along_their_outputs_are_measured():
    params = {"a": drawn(D, 3), "b": drawn(D, 5)}
    fn = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1)  # noqa: E731
    measured = calibration.inputs(fn, params, [X])
    for name in "ab":
        norm = np.sqrt((f64(X) ** 2).sum(0) / B)
        np.testing.assert_allclose(measured["input_norm"][name][:, 0], norm, rtol=1e-5)


def test_running_statistics_are_no_activations():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(nn.Dense(H, use_bias=False))(x, update_stats=False)

    variables = jax.jit(Normed().init)(KEY, X)
    measured = calibration.inputs(Normed(), variables, [X])["input_norm"]
    norm = np.sqrt((f64(X) ** 2).sum(0) / B)
    np.testing.assert_allclose(measured["Dense_0"]["kernel"][:, 0], norm, rtol=1e-5)


def test_weights_that_an_nnx_module_has_not_are_refused():
    with pytest.raises(InputError, match="'a' is none of the Linear's weights, such as 'bias'"):
        layout(nnx.Linear(D, H, rngs=nnx.Rngs(0)), {"a": drawn(D, H)}, X)


def test_a_tied_embedding_and_a_lookup_are_dense_with_the_reason():
    tokens = np.array([[0, 3, 4]])
    params = {"tied": drawn(5, D), "positions": drawn(3, D), "w": drawn(D, D), "gain": drawn(2, D)}

    def run(p, tokens):
        x = (p["tied"][tokens] + p["positions"][jnp.arange(3)]) * p["gain"][0] + p["gain"][1]
        return (x @ p["w"]) @ p["tied"].T

    found = layout(run, params, tokens)
    reasons = {n: tree.dense_reason(n, params[n], axes=found[n]) for n in params}
    assert reasons == {
        "tied": "read by a lookup",
        "positions": "read by a lookup",
        "gain": "in no product",
        "w": "",
    }
    assert found["tied"].last
    assert not found["w"].last


def test_a_table_that_a_one_hot_reads_is_an_embedding():
    tokens = np.array([[0, 3, 4]])
    params = {"table": drawn(5, D), "w": drawn(D, D)}

    def run(p, tokens):
        return jnp.tanh(jax.nn.one_hot(tokens, 5) @ p["table"]) @ p["w"]

    found = layout(run, params, tokens)
    reasons = {n: tree.dense_reason(n, params[n], axes=found[n]) for n in params}
    assert reasons == {"table": "read by a lookup", "w": ""}


def test_learned_tokens_that_are_repeated_for_each_sequence_are_no_kernel():
    params = {"first": drawn(1, 1, D), "more": drawn(2, D), "w": drawn(D, D)}

    def run(p, x):
        tokens = [jnp.tile(p[name], (len(x), 1, 1)) for name in ("first", "more")]
        return jnp.concatenate([*tokens, x], axis=1) @ p["w"]

    found = layout(run, params, drawn(B, 2, D))
    assert [found[name].kind for name in params] == ["vector", "vector", "kernel"]


def test_a_learned_initial_state_is_no_kernel():
    params = {"h": drawn(1, D), "w": drawn(D, D)}

    def run(p, x):
        start = jnp.broadcast_to(p["h"], x.shape)
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"] + x), None), start, None, length=2)[0]

    found = layout(run, params, X)
    assert found["h"].kind == "vector"
    assert bare(found["w"]) == bare(IN_OUT)


# ---- Without a trace: the convention of names ----


@pytest.mark.parametrize(
    ("name", "shape", "inputs"),
    [
        ("mlp/up/kernel", (8, 32), (0,)),
        ("conv/kernel", (3, 3, 8, 16), (0, 1, 2)),
        ("attention/query/kernel", (8, 2, 4), (0,)),
        ("attention/value/kernel", (8, 2, 4), (0,)),
        ("blocks/0/value/kernel", (8, 2, 4), (0,)),
        ("attention/out/kernel", (2, 4, 8), (0, 1)),
        ("blocks/0/out/kernel", (2, 4, 8), (0, 1)),
        ("linear_1/w", (8, 4), (0,)),
        ("gain", (8,), (0,)),
        ("keyed/kernel", (2, 4, 8), None),
        ("layers/query/kernel", (8, 2, 4), None),
        ("attention/query/kernel", (8, 4, 4), None),
        ("attention/value", (8, 2, 4), None),
        ("model.layers.0.up_proj.weight", (8, 8), None),
        ("w", (8, 4), None),
        ("scalar", (), None),
    ],
)
def test_names_tell_what_the_convention_of_flax_tells_and_no_more(name, shape, inputs):
    found = conventional_axes(name, shape)
    if inputs is None:
        assert found is None
    else:
        assert found == Axes(
            inputs, tuple(axis for axis in range(len(shape)) if axis not in inputs)
        )
