"""`python -m swe_prune`, and the command `swe-prune`."""

import os
import sys

from swe_prune.early_signals import (
    CODES,
    STOPPED,
    SUPERVISED,
    exit_on_signals,
    interrupt_once,
)


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
    if code in CODES.values() and SUPERVISED not in os.environ:
        # An end in order may crash in threads that compute, or, where Ctrl-C came through an exec()
        # of a text, be by the signal. All is written, and several processes part in order.
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
