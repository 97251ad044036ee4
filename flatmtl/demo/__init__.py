"""The demo behind ``python -m flatmtl demo``: sharpness-aware training on paired images."""
