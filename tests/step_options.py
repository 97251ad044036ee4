"""Forms of a step that the tests of captured steps and of steps on a device have in common."""

import torch

from flatmtl import SAM

KINDS = {
    "plain": {},
    "sam": {"sharpness": SAM(0.05)},
}
SHARP = {
    "asam": {"sharpness": SAM(0.5, adaptive=True, eta=0.01, exempt_bias=True)},
    "joint": {"sharpness": SAM(0.05, joint_norm=True)},
    "direct": {"sharpness": SAM(0.05, aggregate="direct")},
    "second": {"sharpness": SAM(0.05, aggregate="second")},
    "each": {"sharpness": SAM(0.05, aggregate="each")},
    "history": {"sharpness": SAM(0.05), "history": 8},
    "bf16 rows": {"sharpness": SAM(0.05), "row_dtype": torch.bfloat16},
}
