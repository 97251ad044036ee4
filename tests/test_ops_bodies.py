"""Every op has its three bodies, they agree, and torch can trace all of them."""

from __future__ import annotations

import pytest
import torch
from cases import PAIRS, pair_name
from op_arguments import MIXED, arguments, call_public, copied, tensors

import flatmtl.ops
from flatmtl.ops import _library, reference

OPS = list(arguments())
each_op = pytest.mark.parametrize("name", OPS)
# (name, beside, accumulate): beside the rows their own type, or float32 if wide
VARIANTS = [(name, False, False) for name in OPS]
VARIANTS += [(name, True, False) for name in MIXED]
VARIANTS += [("pack_row_", wide, True) for wide in (False, True)]
each_variant = pytest.mark.parametrize(
    "name, wide, accumulate",
    VARIANTS,
    ids=["-".join([n, *["wide"] * w, *["accumulate"] * a]) for n, w, a in VARIANTS],
)


def made(name: str, dtype: torch.dtype, device: str, wide: bool, accumulate: bool) -> tuple:
    """wide: rows in bfloat16 if dtype is float32, beside float32."""
    if wide:
        dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        return arguments(dtype, device, beside=torch.float32, accumulate=accumulate)[name]
    return arguments(dtype, device, accumulate=accumulate)[name]


def overload(name: str):
    return getattr(torch.ops.flatmtl, name).default


def test_the_list_of_ops_is_complete():
    assert set(OPS) == set(flatmtl.ops.OPERATORS)
    assert set(OPS) <= set(flatmtl.ops.__all__)


@each_op
def test_cpu_body_is_compiled(name):
    """Otherwise the tests of the body called cpu would test the reference twice."""
    assert _library.body(name, "cpu") == "cpu", _library.missing


@pytest.mark.gpu
@each_op
def test_cuda_body_is_compiled(name):
    assert _library.body(name, "cuda") == "cuda", _library.missing


@each_op
def test_documented(name):
    text = getattr(flatmtl.ops, name).__doc__
    assert text and "Args:" in text


AGREE = [
    pytest.param(*v[:1], *pair, v[2], id=f"{v[0]}-{pair_name(pair)}{'-accumulate' * v[2]}")
    for v in VARIANTS
    for pair in PAIRS
    if v[1] == (pair[0] != pair[1])
]


@pytest.mark.parametrize("name, dtype, beside, accumulate", AGREE)
def test_bodies_agree(name, dtype, beside, accumulate):
    args = arguments(dtype, beside=beside, accumulate=accumulate)[name]
    a, b, c = copied(args), copied(args), copied(args)
    results = [overload(name)(*a), getattr(reference, name)(*b), call_public(name, c)]
    loose = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
    tolerance = loose.get(beside, 1e-12)
    for x, y in zip(tensors([results[0], *a]), tensors([results[1], *b]), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    for x, y in zip(tensors(list(a)), tensors(list(c)), strict=True):
        assert torch.equal(x, y)  # the documented function is the op itself
    mine, theirs = tensors([results[0]]), tensors([results[2]])
    if mine:
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_variant
def test_only_the_declared_arguments_are_written(name, dtype, wide, accumulate):
    written = {"combine": [2], "combine_flat": [4], "project": [2], "pack_row_": [0],
               "perturb_": [0], "restore_": [0], "draw_order_": [0], "solve_random_": [1],
               "solve_pcgrad_drawn_": [1], "solve_gradvac_drawn_": [1, 2], "solve_gradvac": [2],
               "solve_nash_": [1], "solve_pcd_": [1], "solve_sdmgrad_": [1],
               "solve_modo_": [1], "graddrop_": [3, 4]}  # fmt: skip
    args = made(name, dtype, "cpu", wide, accumulate)
    after = copied(args)
    overload(name)(*after)
    for k, (x, y) in enumerate(zip(args, after)):
        same = all(torch.equal(s, t) for s, t in zip(tensors([x]), tensors([y])))
        assert same is (k not in written.get(name, [])), f"argument {k}"


@each_variant
def test_opcheck(name, device, wide, accumulate):
    """Schema, fake kernel, dispatch under autograd: torch's own check of a custom op."""
    for dtype in (torch.bfloat16, torch.float16) if wide else (torch.float32, torch.bfloat16):
        torch.library.opcheck(overload(name), made(name, dtype, device, wide, accumulate))


@each_variant
def test_compiles_in_one_graph(name, device, wide, accumulate):
    args = made(name, torch.float32, device, wide, accumulate)
    eager, traced = copied(args), copied(args)

    def run(*given):
        return call_public(name, given)

    expected = run(*eager)
    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*traced)
    for x, y in zip(tensors([expected, *eager]), tensors([got, *traced]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "name", ["row_norms", "gram", "gram_difference", "gram_pair", "combine", "combine_flat"]
)
def test_compiles_for_any_size(name):
    """Dynamic shapes: a second size is no second graph and no error."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(*given):
        return call_public(name, given)

    compiled = torch.compile(run, fullgraph=True, backend=graphs, dynamic=True)
    for size in (37, 50, 129):
        args = [
            torch.randn(*t.shape[:-1], size) if t.shape[-1] == 37 else t for t in arguments()[name]
        ]
        expected, got = run(*copied(tuple(args))), compiled(*copied(tuple(args)))
        assert all(map(torch.equal, tensors([expected]), tensors([got])))
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    jac, w = torch.randn(3, 501), torch.randn(3, dtype=torch.float64)

    def run(j, v):
        g = flatmtl.ops.gram(2 * j)
        return flatmtl.ops.combine(j, v * g.diagonal()).relu()

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(jac, w), run(jac, w))


@pytest.mark.gpu
@each_variant
def test_nothing_waits_for_the_device(name, wide, accumulate):
    """Every op enqueues and returns: torch raises on a synchronisation it knows of."""
    args = made(name, torch.float32, "cuda", wide, accumulate)
    overload(name)(*copied(args))
    given = copied(args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        overload(name)(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
