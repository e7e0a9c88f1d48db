"""`plan` of a pretrained model: what `prune` would remove, printed without reading a weight."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from rich.console import Console

from swe_prune import interop, recipe, tree
from swe_prune.layout import layout as trace_layout
from swe_prune.models import phi3v
from swe_prune.pretrained import choice, tracked
from swe_prune.pretrained.opening import opened
from swe_prune.pretrained.request import check_trajectory, reasons, recipe_of
from swe_prune.pretrained.settings import RequestSettings
from swe_prune.recipe.checks import check_shapes
from swe_prune.training.progress import Progress, print_line, tensor_table
from swe_prune.trajectory import BUFFERS

WHAT_A_MASK_GIVES = (
    "Zeros make this model no faster: dense matrix products skip nothing. They make its file "
    "smaller with --compress alone. The command cut removes whole neurons, heads or layers."
)


def chosen_weights(
    request: recipe.Recipe, checkpoint: interop.PretrainedSource, given: RequestSettings
) -> tuple[PyTree, PyTree]:
    """Returns which weights to prune, and the layout of all, checked against the request.

    Args:
        request: Request to check.
        checkpoint: Model, of which no weight is read.
        given: Settings with the rules that choose weights.

    Returns:
        Bool pytree, which a criterion of a trajectory narrows to what is tracked; pytree of
        `layout.Axes`.

    Raises:
        InputError: Rules or blocks that choose nothing, or a request that the shapes do not admit.
    """
    chosen = choice.of_checkpoint(checkpoint, given)
    params = choice.abstract_params(checkpoint)
    if request.needs & set(BUFFERS):
        chosen = tracked.narrowed(checkpoint.path, params, chosen)
    module = phi3v.build(checkpoint.config, checkpoint.vocab_size)
    layout = trace_layout(module, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    check_shapes(request, params, chosen, layout)
    return chosen, layout


def plan(given: RequestSettings, progress: Progress, console: Console) -> None:
    """Prints what `prune` would remove and from where, without reading a weight or a text.

    Raises:
        InputError: Anything that is wrong with the settings or the model.
    """
    request = recipe_of(given)
    checkpoint = opened(given, progress)
    check_trajectory(request, tracked.there(checkpoint.path), given.model)
    chosen, _ = chosen_weights(request, checkpoint, given)
    params = choice.abstract_params(checkpoint)
    marks = dict(tree.named_leaves(chosen))
    tensors = [
        (name, leaf, "" if marks[name] else tree.dense_reason(name, leaf) or "not chosen")
        for name, leaf in tree.named_leaves(params)
    ]
    console.print(tensor_table(str(checkpoint.path), tensors))
    total = tree.size(params)
    count = sum(tree.size(leaf) for name, leaf in tree.named_leaves(params) if marks[name])
    amount = round(count * (request.target or 0.0))
    for line in (
        *reasons(given, request),
        choice.sentence(given, chosen),
        f"{count:,} of {total:,} weights are prunable ({count / total:.1%}); by {request.name!r} "
        f"at sparsity {request.target:g} about {amount:,} would go ({amount / total:.1%} of all).",
        WHAT_A_MASK_GIVES,
    ):
        print_line(console, line)
