"""SIGTERM, by which schedulers say that a machine is about to be taken away."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from swe_prune.errors import Preempted
from swe_prune.runtime import processes

MESSAGE = "preempted (SIGTERM); run the same command again to go on, what was done is saved"


class PreemptionHandler:
    """Whether SIGTERM has come, and what it does meanwhile.

    Within `deferred` the signal is only noted, and whoever asks `given` saves and stops; elsewhere
    it stops at once, which every phase survives as it survives a kill. Several processes stop after
    one and the same step, on which JAX's runtime makes them agree; they stop nowhere else.
    """

    def __init__(self) -> None:
        """Starts with no notice given."""
        self._given = False
        self._deferred = 0
        self._asked = 0

    def given(self) -> bool:
        """Returns whether to stop now; all processes must ask after the same steps."""
        if processes.count() == 1:
            return self._given
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    @contextlib.contextmanager
    def defer(self) -> Iterator["PreemptionHandler"]:
        """Notes the signal without stopping."""
        self._deferred += 1
        try:
            yield self
        finally:
            self._deferred -= 1

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Takes the signal over for a while; only the main thread of a process can.

        Raises:
            Preempted: from wherever the signal comes, unless it is deferred there.
        """
        elsewhere = threading.current_thread() is not threading.main_thread()
        if elsewhere or processes.count() > 1:  # of several, JAX's runtime takes the signal
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._given = True
            if not self._deferred:
                raise Preempted(MESSAGE)

        self._given = False
        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


PREEMPTION = PreemptionHandler()
"""Of this process, as a process has one handler of a signal."""
