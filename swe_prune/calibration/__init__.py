"""Streaming measurements on calibration data: layer inputs and gradients of a loss.

layer_inputs    norms and Hessians of what each weight of any function is multiplied with
measures        everything that a set of criteria needs, in as few passes as possible
samples         a random sample of the inputs of weights, token by token
moments         mean, mean square and Gram matrix of the inputs of weights
loss_gradients  mean and mean square of the per-example gradients of a loss
products        sums over the activations of the products that a traced function has
convolutions    patches, and the groups of grouped convolutions
batching        checks of batches

All functions return what `importance.score(measured=)` takes, so the results can be merged.
"""

from swe_prune.calibration.layer_inputs import inputs
from swe_prune.calibration.loss_gradients import gradients
from swe_prune.calibration.measures import measure
from swe_prune.calibration.moments import Moments, moments
from swe_prune.calibration.samples import samples

__all__ = ["Moments", "gradients", "inputs", "measure", "moments", "samples"]
