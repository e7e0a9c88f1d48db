"""What calibration data says of each weight, streamed: inputs of layers and gradients of a loss.

layer_inputs    norms and Hessians of what comes into the layers of any Linen model
measures        all that a set of criteria wants, in as few passes as it takes
loss_gradients  mean and mean square of the gradients of a loss, example by example
layers          which input each layer multiplies with its kernel
watch           seeing those inputs without touching the model's code
batches         what all of them ask of a batch

All return what `importance.score(measured=)` takes, so they can be merged in one mapping.
"""

from swe_prune.calibration.layer_inputs import inputs
from swe_prune.calibration.loss_gradients import gradients
from swe_prune.calibration.measures import measure

__all__ = ["gradients", "inputs", "measure"]
