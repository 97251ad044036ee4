"""The kinds of steps: each a function that runs its passes and leaves gradients in ``.grad``."""
