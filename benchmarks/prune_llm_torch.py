"""The PyTorch side of `prune_llm.py`: import, Wanda and SparseGPT as one writes them plainly.

A Llama decoder of torch's Linear layers, read from a GGUF file, and both methods after their
papers: block after block, on what hooks see of each layer's inputs, weights updated in place.
"""

import json
import sys
import time
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
import timing

# torch is an extra that linting does without
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

KERNELS = {
    "attention/query": "attn_q", "attention/key": "attn_k", "attention/value": "attn_v",
    "attention/out": "attn_output", "mlp/gate": "ffn_gate", "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}  # fmt: skip
COLUMNS = 128  # inputs at a time, of SparseGPT
DAMPING = 0.01


class Block(nn.Module):
    """One decoder block: grouped-query attention with rotary positions, and a gated MLP."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        D, hidden = settings["width"], settings["hidden"]
        self.heads, self.groups, self.eps = (settings[k] for k in ("heads", "groups", "eps"))
        self.size = D // self.heads
        self.attention_norm = nn.Parameter(torch.empty(D))
        self.mlp_norm = nn.Parameter(torch.empty(D))
        sizes = {"query": D, "key": self.groups * self.size, "value": self.groups * self.size}
        layers = {f"attention/{name}": nn.Linear(D, out, bias=False) for name, out in sizes.items()}
        layers["attention/out"] = nn.Linear(D, D, bias=False)
        layers |= {f"mlp/{name}": nn.Linear(D, hidden, bias=False) for name in ("gate", "up")}
        layers["mlp/down"] = nn.Linear(hidden, D, bias=False)
        self.layers = nn.ModuleDict(layers)

    def forward(self, x, turn):  # noqa: D102 (the class's)
        B, L, D = x.shape
        y = F.rms_norm(x, (D,), self.attention_norm, self.eps)

        def heads(name: str, count: int):
            return self.layers[f"attention/{name}"](y).view(B, L, count, -1).transpose(1, 2)

        q, k = rotated(heads("query", self.heads), turn), rotated(heads("key", self.groups), turn)
        y = F.scaled_dot_product_attention(
            q, k, heads("value", self.groups), is_causal=True, enable_gqa=True
        )
        x = x + self.layers["attention/out"](y.transpose(1, 2).reshape(B, L, -1))
        y = F.rms_norm(x, (D,), self.mlp_norm, self.eps)
        return x + self.layers["mlp/down"](
            F.silu(self.layers["mlp/gate"](y)) * self.layers["mlp/up"](y)
        )


def rotated(x, turn):
    """Returns queries or keys turned by their positions, halves of a head against each other."""
    left, right = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-right, left], dim=-1) * turn[1]


class Llama(nn.Module):
    """Embedding, blocks, norm; the head is the embedding's and no pruning asks for it."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings["vocabulary"], settings["width"])
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings["layers"]))
        self.norm = nn.Parameter(torch.empty(settings["width"]))

    def turn(self, length: int):
        """Returns the cosines and sines of all positions."""
        size = self.settings["width"] // self.settings["heads"]
        rates = self.settings["theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(length), rates).repeat(1, 2)
        return angles.cos(), angles.sin()


@torch.no_grad()
def imported(path: str) -> Llama:
    """Returns the model of a GGUF file in float32, filled tensor by tensor."""
    reader = gguf.GGUFReader(path)

    def setting(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    settings = {
        "width": setting("embedding_length"), "hidden": setting("feed_forward_length"),
        "layers": setting("block_count"), "heads": setting("attention.head_count"),
        "groups": setting("attention.head_count_kv"), "theta": setting("rope.freq_base"),
        "eps": setting("attention.layer_norm_rms_epsilon"),
    }  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    settings["vocabulary"] = int(tensors["token_embd.weight"].shape[1])
    with torch.device("meta"):
        model = Llama(settings)
    model.to_empty(device="cpu")

    def fill(parameter, name: str, heads: int = 0) -> None:
        value = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        if heads:  # the file has the two halves of each head interleaved
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2)
        parameter.copy_(torch.tensor(value).reshape(parameter.shape))

    fill(model.embedding.weight, "token_embd.weight")
    fill(model.norm, "output_norm.weight")
    interleaved = {"attn_q": settings["heads"], "attn_k": settings["groups"]}
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        fill(block.attention_norm, f"blk.{i}.attn_norm.weight")
        fill(block.mlp_norm, f"blk.{i}.ffn_norm.weight")
        for name, stored in KERNELS.items():
            fill(block.layers[name].weight, f"blk.{i}.{stored}.weight", interleaved.get(stored, 0))
    return model


@torch.no_grad()
def prune(model: Llama, tokens: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """Prunes the model's first blocks in place and returns the first one's masks, (in, out)."""
    hessian = options["method"] == "sparsegpt"
    split = torch.from_numpy(tokens).long().split(options["batch"])
    states = [model.embedding(batch) for batch in split]
    turn = model.turn(tokens.shape[1])
    first: dict[str, Any] = {}
    blocks: Any = list(model.blocks)[: options["layers"]]
    for number, block in enumerate(blocks):
        sums: dict[str, Any] = {}
        hooks = [
            layer.register_forward_pre_hook(watching(sums, name, hessian))
            for name, layer in block.layers.items()
        ]
        for state in states:
            block(state, turn)
        for hook in hooks:
            hook.remove()
        for name, layer in block.layers.items():
            if hessian:
                sparsegpt(layer.weight, sums.pop(name) * (2 / len(tokens)), options["sparsity"])
            else:
                wanda(layer.weight, (sums.pop(name) / len(tokens)).sqrt(), options["sparsity"])
            if number == 0:
                first[name] = (layer.weight != 0).T.numpy()
        for at, state in enumerate(states):
            states[at] = block(state, turn)
    return first


def watching(sums: dict[str, Any], name: str, hessian: bool):
    """Returns a hook that adds up the squares of a layer's inputs, or their outer products."""

    def hook(_, given) -> None:
        x = given[0].reshape(-1, given[0].shape[-1])
        new = x.T @ x if hessian else x.square().sum(0)
        sums[name] = sums[name].add_(new) if name in sums else new

    return hook


def wanda(weight, norm, sparsity: float) -> None:
    """Sets to 0 the lowest |w| ‖x‖ of every output."""
    scores = weight.abs() * norm
    order = scores.sort(dim=1, stable=True).indices
    weight.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], 0)


def sparsegpt(weight, hessian, sparsity: float) -> None:
    """Sets to 0 what costs least by the inverse Hessian, and updates the other weights."""
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        part, of_part = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        missing = torch.zeros_like(part)
        cost = part.square() / of_part.diagonal().square()
        lowest = cost.flatten().kthvalue(max(1, int(cost.numel() * sparsity))).values
        gone = cost <= lowest
        for j in range(stop - start):
            kept = part[:, j].masked_fill(gone[:, j], 0)
            missing[:, j] = (part[:, j] - kept) / of_part[j, j]
            part[:, j:] -= torch.outer(missing[:, j], of_part[j, j:])
            part[:, j] = kept
        weight[:, start:stop] = part
        weight[:, stop:] -= missing @ factor[start:stop, stop:]


def main() -> None:
    """Does the work that the arguments ask for, and prints what it took as JSON."""
    options = json.loads(sys.argv[1])
    torch.zeros(8, 8).matmul(torch.zeros(8, 8))  # the runtime's own memory, before counting
    before, _ = timing.memory_mib()
    start = time.perf_counter()
    model = imported(options["model"])
    found = {"import_s": time.perf_counter() - start}
    found["import_mib"] = timing.memory_mib()[1] - before
    tokens = np.load(options["tokens"])
    timing.restart_peak()
    start = time.perf_counter()
    masks: dict[str, Any] = prune(model, tokens, options)
    found |= {"prune_s": time.perf_counter() - start, "compile_s": 0.0}
    found["prune_mib"] = timing.memory_mib()[1] - before
    np.savez(options["out"], **masks)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
