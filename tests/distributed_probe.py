"""What each of several processes runs in tests/distributed_test.py; prints one line of JSON."""

import json
import sys

from swe_prune import parallel
from swe_prune.config import ParallelConfig
from swe_prune.errors import InputError
from swe_prune.runtime import processes


def main(coordinator: str, process: str) -> None:
    processes.start(processes.process_address(coordinator, process), processes.Timeouts())
    mesh = parallel.mesh(ParallelConfig(fsdp=2))

    def refuse():
        raise InputError("no such thing")

    found = {
        "index": processes.index(),
        "told": processes.first(lambda: ["said by", processes.index()]),
        "gathered": processes.gather(10 * processes.index()),
        "rows": parallel.own_rows(8, mesh).tolist(),
    }
    try:
        processes.first(refuse)
    except InputError as error:
        found["error"] = str(error)
    processes.check_same({"a": 1})
    try:
        processes.check_same({"a": 1, "b": processes.index()})
    except InputError as error:
        found["differs"] = str(error)
    print(json.dumps(found), flush=True)
    processes.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
