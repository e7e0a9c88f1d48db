"""`python -m swe_prune`, and the command `swe-prune`."""

import os
import sys

from swe_prune.early_signals import STOPPED, exit_on_signals, interrupt_once


def main() -> int:
    """Runs the command line; Ctrl-C ends it with one line and 130 at any moment."""
    try:
        from swe_prune import cli

        interrupt_once()
        code = cli.main()
        exit_on_signals(code)
    except KeyboardInterrupt:
        exit_on_signals(code := 130)
        print(f"swe_prune: {STOPPED}", file=sys.stderr)
    if code == 130:
        # Where it came through an exec() of a text, Python would end by the signal all the same.
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
