"""flatmtl in other frameworks; each module needs its own and is imported by name.

``lightning``: a mixin for ``LightningModule``. ``accelerate``: what takes the place of
``accelerator.backward``. ``tensorboard``: writes the history of steps.
"""
