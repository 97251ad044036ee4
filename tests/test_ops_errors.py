"""Wrong arguments: ValueError or TypeError that names the argument, and nothing is written."""

from __future__ import annotations

import re

import pytest
import torch
from op_arguments import SIZE, TASKS, arguments, call_public, copied, tensors

from flatmtl import MultiTaskOptimizer, aggregate, ops, weighting

FLOAT, DOUBLE = torch.float32, torch.float64
JAC = torch.randn(TASKS, SIZE)
W = torch.ones(TASKS, dtype=DOUBLE)
OUT = torch.full((SIZE,), 7.0)
WIDE = torch.randn(TASKS, 2 * SIZE)
META = torch.empty(TASKS, SIZE, device="meta")
GRAM = torch.eye(TASKS, dtype=DOUBLE)
ORDER = torch.arange(TASKS).expand(TASKS, TASKS).contiguous()
ONE = torch.ones((), dtype=DOUBLE)
PARAMS = [torch.zeros(4, 3), torch.zeros(20)]
ROW = torch.randn(SIZE)
RNG = torch.tensor([1, 2])
BF, HALF = torch.bfloat16, torch.float16
BF_JAC, BF_ROW, HALF_ROW = JAC.to(BF), ROW.to(BF), ROW.to(HALF)

# Of the rows' dtype, or float32 beside bfloat16 and float16 rows: everything else is an error. The
# compiled bodies check it themselves: pack_row_ and perturb_ are called directly too.
DTYPE_CASES = {
    "combine out 64 of bf16": (ops.combine, (BF_JAC, W, OUT.double()), "out"),
    "combine out 16 of bf16": (ops.combine, (BF_JAC, W, OUT.half()), "out"),
    "combine out bf16 of 32": (ops.combine, (JAC, W, OUT.to(BF)), "out"),
    "combine out 32 of 64": (ops.combine, (JAC.double(), W, OUT), "out"),
    "flat out 64 of bf16": (ops.combine_flat, (BF_JAC, W, BF_JAC, W, OUT.double()), "out"),
    "flat out 16 of 32": (ops.combine_flat, (JAC, W, JAC, W, OUT.half()), "out"),
    "flat sam 32 of bf16": (ops.combine_flat, (BF_JAC, W, JAC, W, OUT), "sam"),
    "pack 64 into bf16": (ops.pack_row_, (BF_ROW, [PARAMS[0].double()], [0]), "grads"),
    "pack 64 into 32": (ops.pack_row_, (ROW, [PARAMS[0].double()], [0]), "grads"),
    "pack 32 into 64": (ops.pack_row_, (ROW.double(), [PARAMS[0]], [0]), "grads"),
    "pack 16 into bf16": (ops.pack_row_, (BF_ROW, [PARAMS[0].half()], [0]), "grads"),
    "pack bf16 into 32": (ops.pack_row_, (ROW, [PARAMS[0].to(BF)], [0]), "grads"),
    "pack two dtypes": (ops.pack_row_, (BF_ROW, [PARAMS[0], PARAMS[1].to(BF)], [0, 12]), "grads"),
    "pack two dtypes back": (
        ops.pack_row_, (BF_ROW, [PARAMS[0].to(BF), PARAMS[1]], [0, 12]), "grads"),
    "pack two dtypes, one empty": (
        ops.pack_row_, (BF_ROW, [PARAMS[0][:0].to(BF), PARAMS[1]], [0, 12]), "grads"),
    "adaptive 64 by bf16": (ops.adaptive_sq_norm, (ROW.double(), BF_ROW, 0.0), "saved"),
    "adaptive 16 by bf16": (ops.adaptive_sq_norm, (HALF_ROW, BF_ROW, 0.0), "saved"),
    "adaptive bf16 by 32": (ops.adaptive_sq_norm, (BF_ROW, ROW, 0.0), "saved"),
    "perturb saved 64 by 16": (
        ops.perturb_, ([OUT.double()], ROW.double(), HALF_ROW, ONE, [0], [1.0]), "saved"),
    "perturb saved bf16 by 32": (
        ops.perturb_, ([OUT.to(BF)], BF_ROW, ROW, ONE, [0], [1.0]), "saved"),
    "perturb saved 64 by 32": (
        ops.perturb_, ([OUT.double()], ROW.double(), ROW, ONE, [0], [1.0]), "saved"),
    "perturb params bf16, saved 32": (
        ops.perturb_, ([OUT.to(BF)], ROW, BF_ROW, ONE, [0], [1.0]), "params"),
    "perturb params 32, saved bf16": (ops.perturb_, ([OUT], BF_ROW, BF_ROW, ONE, [0], [1.0]), "params"),
    "restore params 32, saved bf16": (ops.restore_, ([OUT], BF_ROW, [0]), "params"),
}  # fmt: skip

CASES = {
    **DTYPE_CASES,
    # what is not a matrix of rows
    "gram list": (ops.gram, ([[1.0]],), "jac"),
    "gram 1-D": (ops.gram, (ROW,), "jac"),
    "gram 3-D": (ops.gram, (JAC[None],), "jac"),
    "gram integers": (ops.gram, (torch.ones(2, 3, dtype=torch.int64),), "jac"),
    "gram complex": (ops.gram, (torch.ones(2, 3, dtype=torch.complex64),), "jac"),
    "gram bool": (ops.gram, (torch.ones(2, 3, dtype=torch.bool),), "jac"),
    "gram strided": (ops.gram, (WIDE[:, ::2],), "jac"),
    "gram transposed": (ops.gram, (JAC.T,), "jac"),
    "gram no rows": (ops.gram, (JAC[:0],), "jac"),
    "gram expanded": (ops.gram, (ROW.expand(TASKS, SIZE),), "jac"),
    "row_norms 1-D": (ops.row_norms, (ROW,), "jac"),
    "row_norms strided": (ops.row_norms, (WIDE[:, ::2],), "jac"),
    # pairs
    "difference shape": (ops.gram_difference, (JAC[:, 1:], JAC), "sam"),
    "difference rows": (ops.gram_difference, (JAC[1:], JAC), "sam"),
    "difference dtype": (ops.gram_difference, (JAC.double(), JAC), "sam"),
    "difference device": (ops.gram_difference, (META, JAC), "sam"),
    "difference strided": (ops.gram_difference, (WIDE[:, ::2], JAC), "sam"),
    "difference jac strided": (ops.gram_difference, (JAC, WIDE[:, ::2]), "jac"),
    "pair shape": (ops.gram_pair, (JAC[:, 1:], JAC), "sam"),
    "pair rows": (ops.gram_pair, (JAC[1:], JAC), "sam"),
    "pair dtype": (ops.gram_pair, (JAC.double(), JAC), "sam"),
    "pair device": (ops.gram_pair, (META, JAC), "sam"),
    "pair strided": (ops.gram_pair, (WIDE[:, ::2], JAC), "sam"),
    "pair jac strided": (ops.gram_pair, (JAC, WIDE[:, ::2]), "jac"),
    # combine
    "combine weights length": (ops.combine, (JAC, W[1:], OUT), "weights"),
    "combine weights 2-D": (ops.combine, (JAC, W[None], OUT), "weights"),
    "combine weights integers": (ops.combine, (JAC, W.long(), OUT), "weights"),
    "combine weights list": (ops.combine, (JAC, [1.0] * TASKS, OUT), "weights"),
    "combine weights device": (ops.combine, (JAC, W.to("meta"), OUT), "weights"),
    "combine out length": (ops.combine, (JAC, W, OUT[1:]), "out"),
    "combine out 2-D": (ops.combine, (JAC, W, OUT[None]), "out"),
    "combine out dtype": (ops.combine, (JAC, W, OUT.double()), "out"),
    "combine out strided": (ops.combine, (JAC, W, torch.zeros(2 * SIZE)[::2]), "out"),
    "combine out device": (ops.combine, (JAC, W, META[0]), "out"),
    "combine jac strided": (ops.combine, (WIDE[:, ::2], W, OUT), "jac"),
    # combine_flat
    "flat a": (ops.combine_flat, (JAC, W[1:], JAC, W, OUT), "a"),
    "flat b": (ops.combine_flat, (JAC, W, JAC, W[1:], OUT), "b"),
    "flat sam shape": (ops.combine_flat, (JAC, W, JAC[1:], W, OUT), "sam"),
    "flat sam dtype": (ops.combine_flat, (JAC, W, JAC.half(), W, OUT), "sam"),
    "flat out": (ops.combine_flat, (JAC, W, JAC, W, OUT[1:]), "out"),
    # project
    "project shape": (ops.project, (JAC, torch.ones(2, TASKS + 1, dtype=DOUBLE)), "coefficients"),
    "project 1-D": (ops.project, (JAC, W), "coefficients"),
    "project integers": (ops.project, (JAC, torch.ones(2, TASKS).long()), "coefficients"),
    "project out rows": (ops.project, (JAC, GRAM, torch.zeros(2, SIZE)), "out"),
    "project out dtype": (ops.project, (JAC, GRAM, torch.zeros(TASKS, SIZE).double()), "out"),
    "project out strided": (ops.project, (JAC, GRAM, torch.zeros(SIZE, TASKS).T), "out"),
    # affinity
    "affinity square": (ops.affinity, (GRAM[1:], W, 0.1), "gram"),
    "affinity batch": (ops.affinity, (GRAM[None], W, 0.1), "gram"),
    "affinity losses": (ops.affinity, (GRAM, W[1:], 0.1), "losses"),
    "affinity integers": (ops.affinity, (GRAM.long(), W, 0.1), "gram"),
    # pack
    "pack count": (ops.pack_row_, (ROW, PARAMS, [0]), "offsets"),
    "pack overlap": (ops.pack_row_, (ROW, PARAMS, [0, 11]), "offsets"),
    "pack descending": (ops.pack_row_, (ROW, PARAMS, [24, 0]), "offsets"),
    "pack negative": (ops.pack_row_, (ROW, PARAMS, [-1, 15]), "offsets"),
    "pack beyond": (ops.pack_row_, (ROW, PARAMS, [0, 18]), "grads"),
    "pack dtype": (ops.pack_row_, (ROW, [PARAMS[0].double()], [0]), "grads"),
    "pack device": (ops.pack_row_, (ROW, [META[0]], [0]), "grads"),
    "pack not a tensor": (ops.pack_row_, (ROW, [None], [0]), "grads"),
    "pack row 2-D": (ops.pack_row_, (JAC, PARAMS, [0, 12]), "row"),
    "pack row strided": (ops.pack_row_, (WIDE[0, ::2], PARAMS, [0, 12]), "row"),
    "pack row integers": (ops.pack_row_, (ROW.long(), [], []), "row"),
    # ASAM's norm
    "adaptive length": (ops.adaptive_sq_norm, (ROW[1:], ROW, 0.0), "saved"),
    "adaptive dtype": (ops.adaptive_sq_norm, (ROW.double(), ROW, 0.0), "saved"),
    "adaptive row": (ops.adaptive_sq_norm, (ROW, JAC, 0.0), "row"),
    # perturb, restore
    "perturb saved": (ops.perturb_, (PARAMS, ROW[1:], ROW, ONE, [0, 12], [1.0, 1.0]), "saved"),
    "perturb dtype": (ops.perturb_, (PARAMS, ROW.double(), ROW, ONE, [0, 12], [1.0, 1.0]), "saved"),
    "perturb rho": (ops.perturb_, (PARAMS, ROW, ROW, ONE, [0, 12], [1.0]), "rho"),
    "perturb norm float": (ops.perturb_, (PARAMS, ROW, ROW, 1.0, [0, 12], [1.0, 1.0]), "sq_norm"),
    "perturb norm 32": (
        ops.perturb_, (PARAMS, ROW, ROW, ONE.float(), [0, 12], [1.0, 1.0]), "sq_norm"),
    "perturb norm 1-D": (
        ops.perturb_, (PARAMS, ROW, ROW, ONE[None], [0, 12], [1.0, 1.0]), "sq_norm"),
    "perturb offsets": (ops.perturb_, (PARAMS, ROW, ROW, ONE, [0, 3], [1.0, 1.0]), "offsets"),
    "perturb beyond": (ops.perturb_, (PARAMS, ROW, ROW, ONE, [0, 30], [1.0, 1.0]), "params"),
    "perturb params dtype": (ops.perturb_, ([OUT.double()], ROW, ROW, ONE, [0], [1.0]), "params"),
    "perturb params strided": (ops.perturb_, ([JAC[:, :2].T], ROW, ROW, ONE, [0], [1.0]), "params"),
    "restore count": (ops.restore_, (PARAMS, ROW, [0]), "offsets"),
    "restore beyond": (ops.restore_, (PARAMS, ROW, [0, 30]), "params"),
    "restore strided": (ops.restore_, ([JAC[:, :2].T], ROW, [0]), "params"),
    "restore saved 2-D": (ops.restore_, (PARAMS, JAC, [0, 12]), "saved"),
    # solvers
    "order rng dtype": (ops.draw_order_, (RNG.int(), 3, 1), "rng"),
    "order rng length": (ops.draw_order_, (RNG[:1], 3, 1), "rng"),
    "order tasks": (ops.draw_order_, (RNG, 0, 1), "tasks"),
    "order batch": (ops.draw_order_, (RNG, 3, -1), "batch"),
    "pcgrad square": (ops.solve_pcgrad, (GRAM[1:], ORDER[1:]), "gram"),
    "pcgrad 4-D": (ops.solve_pcgrad, (GRAM[None, None], ORDER[None, None]), "gram"),
    "pcgrad order shape": (ops.solve_pcgrad, (GRAM, ORDER[:, 1:]), "order"),
    "pcgrad order dtype": (ops.solve_pcgrad, (GRAM, ORDER.double()), "order"),
    "pcgrad order int32": (ops.solve_pcgrad, (GRAM, ORDER.int()), "order"),
    "pcgrad order device": (ops.solve_pcgrad, (GRAM, ORDER.to("meta")), "order"),
    "pcgrad half": (ops.solve_pcgrad, (GRAM.half(), ORDER), "gram"),
    "mgda square": (ops.solve_mgda, (GRAM[:, 1:], 0.0), "gram"),
    "mgda integers": (ops.solve_mgda, (GRAM.long(), 0.0), "gram"),
    "mgda ridge": (ops.solve_mgda, (GRAM, -1e-3), "ridge"),
    "mgda ridge nan": (ops.solve_mgda, (GRAM, float("nan")), "ridge"),
    "random rng dtype": (ops.solve_random_, (GRAM, RNG.int()), "rng"),
    "random square": (ops.solve_random_, (GRAM[1:], RNG), "gram"),
    "pcgrad drawn rng": (ops.solve_pcgrad_drawn_, (GRAM, RNG[:1]), "rng"),
    "pcgrad drawn square": (ops.solve_pcgrad_drawn_, (GRAM[1:], RNG), "gram"),
    "gradvac drawn rng": (ops.solve_gradvac_drawn_, (GRAM, RNG.int(), GRAM), "rng"),
    "gradvac drawn target": (ops.solve_gradvac_drawn_, (GRAM, RNG, GRAM[1:]), "target"),
    "gradvac drawn beta": (ops.solve_gradvac_drawn_, (GRAM, RNG, GRAM, -0.1), "beta"),
    "constant length": (ops.solve_constant, (GRAM, W[1:]), "preference"),
    "constant integers": (ops.solve_constant, (GRAM, W.long()), "preference"),
    "scale weights": (ops.scale_weights, (GRAM, W[1:], 0, 0.0), "weights"),
    "scale gram": (ops.scale_weights, (GRAM[1:], W, 0, 0.0), "gram"),
    "scale scaling": (ops.scale_weights, (GRAM, W, 3, 0.0), "scaling"),
    "scale max_norm": (ops.scale_weights, (GRAM, W, 0, -1.0), "max_norm"),
    "gradvac square": (ops.solve_gradvac, (GRAM[1:], ORDER, GRAM), "gram"),
    "gradvac order": (ops.solve_gradvac, (GRAM, ORDER[1:], GRAM), "order"),
    "gradvac target shape": (ops.solve_gradvac, (GRAM, ORDER, GRAM[1:]), "target"),
    "gradvac target dtype": (ops.solve_gradvac, (GRAM, ORDER, GRAM.float()), "target"),
    "gradvac target strided": (
        ops.solve_gradvac, (GRAM, ORDER, torch.zeros(3, 6, dtype=DOUBLE)[:, ::2]), "target"),
    "gradvac beta": (ops.solve_gradvac, (GRAM, ORDER, GRAM, 1.5), "beta"),
    "gradvac eps": (ops.solve_gradvac, (GRAM, ORDER, GRAM, 0.5, -1.0), "eps"),
    "cone square": (ops.solve_dual_cone, (GRAM[1:],), "gram"),
    "cone preference": (ops.solve_dual_cone, (GRAM, W[1:]), "preference"),
    "cone preference 2-D": (ops.solve_dual_cone, (GRAM, GRAM), "preference"),
    "cone ridge": (ops.solve_dual_cone, (GRAM, W, True, -1.0), "ridge"),
    "cagrad square": (ops.solve_cagrad, (GRAM[1:], 0.4), "gram"),
    "cagrad c": (ops.solve_cagrad, (GRAM, -0.4), "c"),
    "cagrad c nan": (ops.solve_cagrad, (GRAM, float("nan")), "c"),
    "cagrad rescale": (ops.solve_cagrad, (GRAM, 0.4, 3), "rescale"),
    "fair square": (ops.solve_alpha_fair, (GRAM[1:], 2.0), "gram"),
    "fair alpha": (ops.solve_alpha_fair, (GRAM, 0.0), "alpha"),
    "fair alpha 6": (ops.solve_alpha_fair, (GRAM, 6.0), "alpha"),
    "fair preference": (ops.solve_alpha_fair, (GRAM, 2.0, W[1:]), "preference"),
    "nash last shape": (ops.solve_nash_, (GRAM, W), "last"),
    "nash last dtype": (ops.solve_nash_, (GRAM, torch.zeros(TASKS + 1)), "last"),
    "nash every": (ops.solve_nash_, (GRAM, torch.zeros(TASKS + 1, dtype=DOUBLE), 0), "every"),
    "imtl square": (ops.solve_imtl_g, (GRAM[1:],), "gram"),
    "config preference": (ops.solve_config, (GRAM, W[1:]), "preference"),
    "aligned preference": (ops.solve_aligned, (GRAM, W[1:]), "preference"),
    "aligned mode": (ops.solve_aligned, (GRAM, None, 3), "scale_mode"),
    "aligned tolerance": (ops.solve_aligned, (GRAM, None, 0, -1.0), "rank_tolerance"),
    "pcd state": (ops.solve_pcd_, (GRAM, W), "state"),
    "pcd tau": (ops.solve_pcd_, (GRAM, torch.zeros(TASKS + 1, dtype=DOUBLE), 2.0), "tau"),
    "pcd beta": (ops.solve_pcd_, (GRAM, torch.zeros(TASKS + 1, dtype=DOUBLE), 0.1, 1.0), "beta"),
    "krum byzantine": (ops.solve_krum, (GRAM, -1), "byzantine"),
    "krum too many": (ops.solve_krum, (GRAM, 1), "byzantine"),
    "krum selected": (ops.solve_krum, (GRAM, 0, 0), "selected"),
    "krum selected 4": (ops.solve_krum, (GRAM, 0, 4), "selected"),
    "sdmgrad square": (ops.solve_sdmgrad_, (GRAM[1:], W), "cross"),
    "sdmgrad state": (ops.solve_sdmgrad_, (GRAM, W[1:]), "state"),
    "sdmgrad lr": (ops.solve_sdmgrad_, (GRAM, W, None, 0.0), "lr"),
    "modo square": (ops.solve_modo_, (GRAM[1:], W), "cross"),
    "modo state": (ops.solve_modo_, (GRAM, W.float()), "state"),
    "modo gamma": (ops.solve_modo_, (GRAM, W, 0.0), "gamma"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_argument(case):
    function, args, name = CASES[case]
    before = [t.clone() for t in tensors(list(args))]
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*args)
    message = str(caught.value)
    assert name in message.replace("[", " ").replace(".", " ").split(), message
    assert "got" in message or "share" in message, message
    for x, y in zip(before, tensors(list(args))):
        assert x.is_meta or torch.equal(x, y), "something was written"


@pytest.mark.parametrize("case", DTYPE_CASES)
def test_wrong_dtype_for_the_op_itself(case):
    """As the optimizer calls it, past the wrappers: RuntimeError that says the same."""
    function, args, name = DTYPE_CASES[case]
    full = (*args, False, 0.0) if function is ops.perturb_ else args
    before = [t.clone() for t in tensors(list(args))]
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.flatmtl, function.__name__).default(*full)
    message = str(caught.value)
    assert name in message.replace("[", " ").split() and "got" in message, message
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(list(args)), strict=True))


def test_accumulate_is_a_keyword():
    with pytest.raises(TypeError, match="positional"):
        ops.pack_row_(ROW, PARAMS, [0, 12], True)
    row = ROW.clone()
    with pytest.raises(ValueError, match=r"grads must end within the row \(37 elements\), got"):
        ops.pack_row_(row, PARAMS, [0, 18], accumulate=True)
    assert torch.equal(row, ROW)


OVERLAPS = {
    "project into itself": lambda b: (ops.project, (b[:3], GRAM, b[:3])),
    "project shifted": lambda b: (ops.project, (b[:3], GRAM, b[2:5])),
    "combine into a row": lambda b: (ops.combine, (b[:3], W, b[1])),
    "flat into a row": lambda b: (ops.combine_flat, (b[:3], W, b[3:6], W, b[0])),
    "flat into the other": lambda b: (ops.combine_flat, (b[:3], W, b[3:6], W, b[4])),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_output(case):
    buffer = torch.randn(6, SIZE)
    before = buffer.clone()
    function, args = OVERLAPS[case](buffer)
    with pytest.raises(ValueError, match="out"):
        function(*args)
    assert torch.equal(buffer, before)


def test_output_beside_the_input_is_no_overlap():
    buffer = torch.randn(4, SIZE)
    ops.combine(buffer[:3], W, buffer[3])
    ops.project(buffer[1:], torch.ones(1, 3, dtype=DOUBLE), buffer[:1])


# Every operand of every operator that has another beside it: (operator, argument, entry of a list).
OPERANDS = [
    (name, k, entry)
    for name, args in arguments().items()
    if len(tensors(list(args))) > 1
    for k, value in enumerate(args)
    for entry in (range(len(value)) if isinstance(value, list) else [None])
    if tensors(value if entry is None else value[entry])
]
each_operand = pytest.mark.parametrize("name, k, entry", OPERANDS)


def elsewhere(name: str, k: int, entry: int | None, device: str, other: str) -> tuple:
    """The operator's arguments on ``device``, one of them on ``other``."""
    args = list(copied(arguments(device=device)[name]))
    if entry is None:
        args[k] = args[k].to(other)
    else:
        args[k][entry] = args[k][entry].to(other)
    return tuple(args)


def argument_names(name: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.flatmtl, name).default._schema.arguments]


def check_both_sides(message: str, names: list[str], devices: set[str]) -> None:
    """The message names two of the operator's arguments, and the device of each."""
    found = re.search(
        r"([\w\[\]]+) must be on the device of ([\w\[\]]+) \((.+?)\), got (.+)", message
    )
    assert found is not None, message
    first, second, *got = found.groups()
    assert first != second
    assert {first.split("[")[0], second.split("[")[0]} <= set(names), message
    assert {place.strip() for place in got} == devices, message


@each_operand
def test_an_operand_on_another_device(name, k, entry):
    with pytest.raises(ValueError) as caught:
        call_public(name, elsewhere(name, k, entry, "cpu", "meta"))
    check_both_sides(str(caught.value), argument_names(name), {"cpu", "meta"})


@each_operand
def test_an_operand_on_another_device_for_the_op_itself(name, k, entry):
    """As the optimizer calls it, past the wrappers. (The CPU's body: torch would take meta's.)"""
    body = getattr(torch.ops.flatmtl, name).default
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError) as caught:
        body.redispatch(key, *elsewhere(name, k, entry, "cpu", "meta"))
    check_both_sides(str(caught.value).splitlines()[0], argument_names(name), {"cpu", "meta"})


@pytest.mark.gpu
@each_operand
def test_an_operand_on_the_cpu_beside_cuda(name, k, entry):
    args = elsewhere(name, k, entry, "cuda:0", "cpu")
    with pytest.raises(ValueError) as caught:
        call_public(name, args)
    check_both_sides(str(caught.value), argument_names(name), {"cpu", "cuda:0"})
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.flatmtl, name).default(*args)
    check_both_sides(str(caught.value).splitlines()[0], argument_names(name), {"cpu", "cuda:0"})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@each_operand
def test_an_operand_on_another_cuda_device(name, k, entry):
    args = elsewhere(name, k, entry, "cuda:0", "cuda:1")
    with pytest.raises(ValueError) as caught:
        call_public(name, args)
    check_both_sides(str(caught.value), argument_names(name), {"cuda:0", "cuda:1"})
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.flatmtl, name).default(*args)
    check_both_sides(str(caught.value).splitlines()[0], argument_names(name), {"cuda:0", "cuda:1"})


LOSSES = torch.ones(TASKS)
ELSEWHERE = {
    "losses of a loss method": (
        lambda: aggregate(JAC, weighting.DWA(), losses=LOSSES.to("meta")), "losses", "jac"),
    "losses beside a Gram matrix": (
        lambda: aggregate(JAC, weighting.IMTL(tasks=TASKS), losses=LOSSES.to("meta")), "losses", "jac"),
    "losses beside rows": (
        lambda: aggregate(JAC, weighting.DBMTL(), losses=LOSSES.to("meta")), "losses", "jac"),
    "out": (lambda: aggregate(JAC, weighting.Mean(), META[0]), "out", "jac"),
    "losses of a call": (
        lambda: weighting.IMTL(tasks=TASKS)(GRAM, LOSSES.to("meta")), "losses", "gram"),
    "there": (
        lambda: weighting.DWA()(LOSSES, torch.ones(TASKS, dtype=torch.bool, device="meta")),
        "there", "losses"),
}  # fmt: skip


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_weighting_given_two_devices(case):
    call, first, second = ELSEWHERE[case]
    with pytest.raises(
        ValueError, match=rf"^{first} must be on the device of {second} \(cpu\), got meta"
    ):
        call()


def test_parameters_on_two_devices():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(params, lr=0.1), weighting=weighting.Mean())
    with pytest.raises(ValueError, match=r"on cpu, .* on meta"):
        optimizer.step(lambda: [p.sum() for p in params for _ in range(2)])
