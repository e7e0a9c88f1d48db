"""Tables, figures and one self-contained HTML page from the working directory of an experiment.

`build(workdir)` is the one call. It reads files only and touches no device, so a report can be
built on any machine the working directory was copied to. The path of a number through the modules:

    read (records) ─▶ stats ─┬▶ comparison ─▶ tables ─┬▶ sections ─▶ page
                             └▶ curves, weights ──────┘   markdown ──┘
"""

from swe_prune.report.page import build, need_extra

__all__ = ["build", "need_extra"]
