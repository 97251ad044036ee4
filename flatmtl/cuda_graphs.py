"""Whether a CUDA graph is being captured, and what cannot be in one."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse(what: str) -> None:
    """To be called by what only the host can do.

    Args:
        what: what must be for a step to be captured, as a sentence's beginning.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if capturing():
        raise RuntimeError(f"{what} while a CUDA graph is captured")
