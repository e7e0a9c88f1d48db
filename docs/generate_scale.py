"""Writes the table of docs/scale.md: what a GPT of 1, 4.2 or 8 B parameters takes on many devices.

    python docs/generate_scale.py            compiles everything (some minutes) and writes the table
    python docs/generate_scale.py --check    fails if a few of its lines come out otherwise

Each line is one `python -m swe_prune plan --devices=N --json` of configs/gpt_4b.py.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from swe_prune.version import __version__

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("scale.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
SIZES: dict[str, dict[str, int]] = {
    "1.0 B": {"layers": 24, "heads": 14, "width": 1792},
    "4.2 B": {"layers": 31, "heads": 26, "width": 3328},
    "8.0 B": {"layers": 31, "heads": 36, "width": 4608},
}
DEVICES = (8, 64, 256)
BATCH = 256
MEMORIES = {"TPU v5e": 16, "A100": 40, "H100, A100 80GB": 80, "TPU v5p": 95, "H200": 141}
"""GB of one accelerator's memory, by their makers."""
GB = 1e9
CHECKED = (("1.0 B", 8), ("8.0 B", 8))


def plan(size: str, devices: int) -> dict[str, Any]:
    """Returns what `plan --json` says of one line of the table."""
    settings = {f"model.{key}": value for key, value in SIZES[size].items()}
    settings |= {"parallel.fsdp": devices, "train.accumulate": BATCH // devices}
    command = [sys.executable, "-m", "swe_prune", "plan", "--config=configs/gpt_4b.py"]
    command += [f"--devices={devices}", "--json"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    command += [f"--config.finetune.accumulate={BATCH // devices}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row(size: str, devices: int) -> str:
    """Returns one line of the table."""
    found = plan(size, devices)
    held = [found[part] for part in ("parameters", "optimizer", "masks", "temporary", "device")]
    fits = [name for name, memory in MEMORIES.items() if found["device"] < memory * GB]
    # Of what device memory holds, tracking there would add this share.
    added = found["statistics"] / found["device"]
    received = sum(found["received"].values())
    cells = [size, str(devices), *(f"{part / GB:.2f}" for part in held)]
    cells += [f"{found['statistics'] / GB:.2f} ({added:.0%})", f"{received / GB:.1f}"]
    cells += [f"{fits[0]} and larger" if fits else "none of these"]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """Returns the whole table."""
    heads = (
        "model", "devices", "parameters", "optimizer", "masks", "temporary", "device in all",
        "statistics on the host", "received in a step", "fits",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 2) + "|---|"]
    for size in SIZES:
        for devices in DEVICES:
            lines.append(row(size, devices))
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Writes the table into the page, or checks it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text()
    if parser.parse_args().check:
        for size, devices in CHECKED:
            line = row(size, devices)
            if line not in text:
                sys.exit(f"{PAGE.name} does not have the line {line!r}; run {Path(__file__).name}")
        return
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    made = f"swe_prune {__version__}"
    PAGE.write_text(f"{before}{BEGIN}\nMade by {made}.\n\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
