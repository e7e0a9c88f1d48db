"""What a cut of the demo's model costs, and after how many served tokens it has paid for itself.

Run it with

    python -m swe_prune run --config=configs/ledger_demo.py --workdir=runs/ledger

The demo's dense model is trained and half of the hidden units of its feed-forward layers are cut by
their scores of the trajectory (swe), refitted and trained on for 400 steps. Two shapes with half
and a quarter of these units less are trained from random weights for as many tokens in all. Then
the dense model, the cut one, and the smallest shape of its loss serve in turns, 20 windows of 5
seconds each. The report ends with the ledger, the break-even and its figure. It takes nine minutes
of two CPU cores, five of them in the windows, and longer where others use them. To expect: the cut
model's loss is 0.05 nats per token below the dense one's, 0.02 above that of the dense model after
as many more steps, and 0.03 above that of the shape of its size trained from random weights. It
pays against the dense model, and is "not shown to pay" against that shape.
"""

from ml_collections import ConfigDict

from swe_prune.config import read


def get_config() -> ConfigDict:
    config = read("shakespeare_char.py", __file__)
    config.update(
        {
            "name": "ledger_demo",
            "data": {"eval_batch": 16},  # sixteen batches, over which a loss has its interval
            "finetune": {"steps": 400},
            "study": {
                "std_criteria": (),
                "criteria": ("magnitude",),
                "sparsities": (0.5,),
                "scopes": ("tensor",),
                "seeds": (0,),
            },
            "cuts": ({"criterion": "swe", "sparsity": 0.5, "smaller": (0.5, 0.25)},),
        }
    )
    return config
