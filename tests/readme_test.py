"""The README's Python runs as it stands there, one block after the other."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swe_prune
from swe_prune import trajectory
from swe_prune.config import ModelConfig
from swe_prune.models import gpt

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run_and_do_as_they_say(capsys):
    model = gpt.build(ModelConfig(layers=2, heads=2, width=16, context=8), vocab_size=11)
    tokens = np.random.default_rng(0).integers(0, 11, (4, 8)).astype(np.int32)
    variables = model.init(jax.random.key(0), tokens)
    params = variables["params"]
    stats = trajectory.update(trajectory.init(params), params)
    _, opt_state = (adam := optax.adam(1e-3)).update(
        jax.tree.map(jnp.cos, params), adam.init(params), params
    )
    names = {name: getattr(swe_prune, name) for name in swe_prune.__all__}
    space = names | {
        "swe_prune": swe_prune, "optax": optax, "model": model, "variables": variables,
        "params": params, "stats": stats, "opt_state": opt_state,
        "batches": [{"inputs": tokens}],
    }  # fmt: skip
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, str(README), "exec"), space)
    printed = capsys.readouterr().out
    assert "prunable weights (50.0 %) by 'forecast_curvature'" in printed
    assert abs(float(printed.splitlines()[-1]) - 0.6) < 1e-3
    kernel = space["params"]["block_1"]["mlp"]["up"]["kernel"]
    assert 0.4 < float(jnp.mean(kernel == 0)) < 0.6
    assert callable(space["update"])
