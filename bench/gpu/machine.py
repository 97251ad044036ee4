"""What the numbers were measured on: versions, device, clocks; and whether there is what they need.

python -m bench.gpu.machine     says what there is; fails where a CUDA operator could not run
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

import flatmtl
from bench import peers
from flatmtl.ops import OPERATORS, _library

ROOT = Path(__file__).resolve().parents[2]
FIELDS = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,clocks_event_reasons.active"
)


def refusal(device: str) -> str:
    """Why nothing said of flatmtl on this device would be said of its kernels; "" if it would."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "--device cuda needs a CUDA device and a torch built for CUDA"
    without = [name for name in OPERATORS if _library.body(name, "cuda") != "cuda"]
    if without:
        why = _library.missing.get("cuda", "built from other sources")
        return f"--device cuda needs flatmtl's CUDA library, got none for {without[0]}: {why}"
    return ""


def commit() -> str:
    """The commit that was measured, "+" for a checkout with changes; "" outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def describe(device: str) -> dict[str, Any]:
    """Versions and device."""
    info: dict[str, Any] = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatmtl": flatmtl.__version__,
        "commit": commit(),
        "torchjd": peers.torchjd is not None,
        "body": _library.body("gram", device),
    }
    if device == "cpu":
        return {**info, "device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        **info,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def clocks(device: str) -> dict[str, str]:
    """What nvidia-smi says of the driver, the clocks, the power and the heat now; {} on the CPU."""
    if device == "cpu":
        return {}
    own = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # torch's first may be another's third
    command = ["nvidia-smi", f"--id={own}", f"--query-gpu={FIELDS}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return {"error": str(error)}
    return dict(zip(FIELDS.split(","), (part.strip() for part in text.split(",")), strict=True))


def short_name(info: dict[str, Any]) -> str:
    """The device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")


if __name__ == "__main__":
    if why := refusal("cuda"):
        sys.exit(why)
    found = describe("cuda")
    print(", ".join(f"{key} {found[key]}" for key in ("device", "capability", "torch", "commit")))
