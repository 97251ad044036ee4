"""A random stream of an optimizer's own, which a step that is not made takes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Stream:
    """A ``torch.Generator`` on the parameters' device, made at the first draw.

    Args:
        seed: of the stream; the global generators are left alone.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._loaded: Tensor | None = None  # a state that waits for its device
        self._before: Tensor | None = None

    def on(self, device: torch.device) -> torch.Generator:
        """The generator, for draws on ``device``; on another than before it starts anew."""
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self._seed)
            if self._loaded is not None:
                self._generator.set_state(self._loaded)
                self._loaded = None
        return self._generator

    def begin(self) -> None:
        """Remembers the stream's position, for ``rewind``."""
        self._before = self.state_dict()["generator"]

    def rewind(self) -> None:
        """Back to ``begin``: the step is not made."""
        if self._generator is not None:
            if self._before is None:
                self._generator.manual_seed(self._seed)
            else:
                self._generator.set_state(self._before)

    def state_dict(self) -> dict[str, Any]:
        """The stream's position."""
        state = self._loaded if self._generator is None else self._generator.get_state()
        return {"generator": None if state is None else state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved position."""
        self._generator, self._loaded = None, state["generator"]
