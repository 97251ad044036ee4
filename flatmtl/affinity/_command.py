"""How a command that reads a file ends: its exit status, and one line on stderr where it failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

_INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
_CUT_SHORT = 141  # and for one whose output is not read to the end


def guarded(name: str, run: Callable[[], int]) -> int:
    """Runs a command; returns its exit status, or that of what it raised."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does the exit complain
        return _CUT_SHORT
    except OSError as error:
        about = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(name, about)
    except (ValueError, ImportError, MemoryError) as error:
        return _fail(name, str(error) or type(error).__name__)


def _fail(name: str, message: str) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2
