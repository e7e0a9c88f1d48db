"""`python -m swe_prune`."""

import sys

from swe_prune.cli import main

sys.exit(main())
