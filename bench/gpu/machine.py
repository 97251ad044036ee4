"""What the numbers were measured on: versions, device, clocks."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import date
from typing import Any

import torch

import flatmtl
from bench import peers
from flatmtl.ops import _library

FIELDS = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,clocks_event_reasons.active"
)


def describe(device: str) -> dict[str, Any]:
    """Versions and device."""
    info: dict[str, Any] = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatmtl": flatmtl.__version__,
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
    command = ["nvidia-smi", "--id=0", f"--query-gpu={FIELDS}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return {"error": str(error)}
    return dict(zip(FIELDS.split(","), (part.strip() for part in text.split(",")), strict=True))


def short_name(info: dict[str, Any]) -> str:
    """The device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
