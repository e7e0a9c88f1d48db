"""Handling of SIGTERM, with which schedulers announce that a machine will be taken away.

A closed terminal, SIGHUP, is the same, unless `nohup` has it ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from swe_prune import early_signals
from swe_prune.early_signals import HUNG_UP, again_if_lost, ignored, leave_terminal
from swe_prune.early_signals import PREEMPTED as MESSAGE
from swe_prune.errors import Preempted
from swe_prune.runtime import processes


class PreemptionHandler:
    """Records SIGTERM and decides when the process stops.

    Inside `defer` the signal is only recorded; the training loop polls `given`, saves and stops.
    Elsewhere it stops the process immediately, which every phase survives as it survives a kill.
    With several processes, all stop after the same step, on which JAX's runtime makes them agree,
    and nowhere else.

    Attributes:
        why: Sentence on the signal that has come.
    """

    def __init__(self) -> None:
        """Creates a handler that has seen no signal."""
        self._given = self._raised = False
        self.why = MESSAGE
        self._deferred = 0
        self._asked = 0

    def given(self) -> bool:
        """Returns whether to stop now; all processes must call this after the same steps."""
        if processes.count() == 1:
            return self._given
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    @contextlib.contextmanager
    def defer(self) -> Iterator["PreemptionHandler"]:
        """Records the signal without stopping while the context is open.

        Raises:
            Preempted: At the end, if the signal came and nothing has stopped for it yet.
        """
        self._deferred += 1
        try:
            yield self
        except Preempted:
            self._raised = True
            raise
        finally:
            self._deferred -= 1
        if self._given and not self._deferred:
            self._stop()

    def _stop(self) -> None:
        if not self._raised:  # a second signal, while the first one ends the process, is nothing
            self._raised = True
            raise Preempted(self.why)

    def _raise_again(self) -> None:
        self._raised = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Installs the signal handler while the context is open; does so only in the main thread.

        Raises:
            Preempted: At the point where the signal arrives, unless it is deferred there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if number == signal.SIGHUP:
                leave_terminal()
            if processes.count() > 1:  # JAX's runtime handles SIGTERM
                signal.raise_signal(signal.SIGTERM)
                return
            if not self._given:
                self.why = HUNG_UP if number == signal.SIGHUP else MESSAGE
            self._given = True
            if not self._deferred:
                self._stop()

        self._given = self._raised = False
        numbers = [signal.SIGHUP] if not ignored(signal.SIGHUP) else []
        numbers += [signal.SIGTERM] if processes.count() == 1 else []
        before = {number: signal.signal(number, note) for number in numbers}
        if early_signals.PROGRAM:
            again_if_lost(Preempted, signal.SIGTERM, self._raise_again)
        try:
            yield
        finally:
            # Once it has come, the program ends with 75, whatever comes until then.
            if not (self._given and early_signals.PROGRAM):
                for number, handler in before.items():
                    signal.signal(number, handler)


PREEMPTION = PreemptionHandler()
"""The handler of this process; a process has one handler per signal."""
