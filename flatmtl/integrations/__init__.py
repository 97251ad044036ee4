"""flatmtl inside other people's training loops.

``lightning``: a mixin for ``LightningModule``. ``accelerate``: ``accelerator.backward`` for task losses. Neither is
imported by flatmtl itself, and neither package is a requirement of it.
"""
