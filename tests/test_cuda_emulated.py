"""Every CUDA kernel, compiled by g++ and run on the CPU by tests/cuda_emulation, against numpy.

No GPU is needed: what is checked is the kernels' own text (indices, guards, barriers, sums), in the
shapes that a GPU would see. What is not: the real memory model, speed, nvcc's code.

Bounds. A result is compared as ||out - ref|| / ||ref|| with a reference of higher precision on the same
rounded inputs, and may be at most twice as wrong as plain numpy in the kernel's arithmetic type, plus
a few of its roundings (4 eps; numpy may be exact by luck on small inputs; where terms cancel, one
rounding of the sum of their magnitudes), plus one rounding of the row type where the output is a row.

Reads out of bounds: buffers lie between guards of NaN, which would poison a result. Every such read is
found by AddressSanitizer, with the guards poisoned:
    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        python -m pytest tests/test_cuda_emulated.py
"""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from solver_cases import CASES, NAMES, Run

ROOT = Path(__file__).resolve().parent
CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
DTYPES = list(CODES)
# The type of rows, and of what lies beside them: gradients, parameters, a sum.
PAIRS = [(d, d) for d in DTYPES] + [("float16", "float32"), ("bfloat16", "float32")]
pairs = pytest.mark.parametrize(
    "dtype, beside", PAIRS, ids=[a if a == b else f"{a}+{b}" for a, b in PAIRS]
)
TASKS = [1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 40, 49, 64, 65, 130]
ROW_EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
ASAN = getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)
GUARD = 512  # bytes on both sides of a buffer, all ones: NaN in every type

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The emulation as a ctypes library."""
    out = tmp_path_factory.mktemp("cuda_emulation") / "emulated.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-class-memaccess",
    ]
    flags += ["-fsanitize=address"] if ASAN else []
    sources = [ROOT / "cuda_emulation" / name for name in ("emulator.cpp", "library.cpp")]
    command = [
        "g++",
        *flags,
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        f"-I{ROOT}/cuda_emulation",
        f"-I{ROOT.parent}/csrc/solvers",
    ]
    done = subprocess.run([*command, *sources, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(out))
    library.emulated_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=[0, 1, 2], ids=["forward", "backward", "shuffled"])
def emu(built, request):
    """The library, its threads run in one of three orders; no kernel may have gone wrong."""
    built.emulated_order(request.param, 7)
    built.emulated_error()
    yield built
    assert built.emulated_error() == b""


def acc_type(dtype):
    return np.float64 if dtype == "float64" else np.float32


def to_row(x, dtype):
    """x in storage of the row type; bfloat16 as its bits."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_row(x, dtype):
    if dtype != "bfloat16":
        return x.astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@dataclass
class Buffer:
    """A matrix [rows, columns] in guarded memory, with any shift and row stride (in elements)."""

    memory: np.ndarray
    start: int
    view: np.ndarray
    stride: int

    @property
    def address(self):
        return ctypes.c_void_p(self.memory.ctypes.data + self.start)

    def check(self):
        assert (self.memory[: self.start] == 0xFF).all(), "written before the buffer"
        last = self.start + self.bytes
        assert (self.memory[last:] == 0xFF).all(), "written after the buffer"

    def poison(self):
        """Under AddressSanitizer a kernel's access to the guards, reads too, ends the run."""
        if ASAN is None:
            return
        first, last = self.memory.ctypes.data, self.memory.ctypes.data + self.memory.nbytes
        used = first + self.start, first + self.start + self.bytes
        ASAN(ctypes.c_void_p(first), ctypes.c_size_t(used[0] - first))
        ASAN(ctypes.c_void_p(used[1]), ctypes.c_size_t(last - used[1]))

    @property
    def bytes(self):
        rows, columns = self.view.shape
        return ((rows - 1) * self.stride + columns) * self.view.itemsize if columns else 0


def buffer(values, shift=0, pad=0):
    values = np.atleast_2d(values)
    rows, columns = values.shape
    size, stride = values.itemsize, columns + pad
    memory = np.full(2 * GUARD + (rows * stride + shift) * size + 64, 0xFF, np.uint8)
    start = GUARD + (-(memory.ctypes.data + GUARD)) % 16 + shift * size
    flat = memory[start : start + rows * stride * size].view(values.dtype)
    view = np.lib.stride_tricks.as_strided(flat, (rows, columns), (stride * size, size))
    view[...] = values
    held = Buffer(memory, start, view, stride)
    held.poison()
    return held


def doubles(x):
    return buffer(np.asarray(x, np.float64))


def run(code):
    assert code in (0, 719), f"launcher returned {code}"


def relative(out, ref):
    out, ref = np.asarray(out, np.longdouble), np.asarray(ref, np.longdouble)
    assert np.isfinite(ref).all() and np.isfinite(out).all()
    norm = np.linalg.norm(ref.ravel().astype(np.float64))
    return (
        float(np.linalg.norm((out - ref).ravel().astype(np.float64)) / norm)
        if norm
        else float(np.abs(out).max(initial=0))
    )


def assert_close(out, ref, plain, dtype, row=False, cancels=0.0):
    """cancels: the rounding of the sum, in ulp of ||ref||, as weighted() estimates it."""
    limit = 2 * relative(plain, ref) + max(4.0, cancels) * float(np.finfo(acc_type(dtype)).eps)
    assert relative(out, ref) <= limit + (ROW_EPS[dtype] if row else 0)


LAYOUTS = {"aligned": (0, 0), "shifted": (1, 0), "odd stride": (0, 3), "both": (3, 5)}


def matrix(rng, tasks, columns, dtype, layout="aligned"):
    """Random rows of mixed scale: the buffer, and its values."""
    scale = 10.0 ** rng.uniform(-1, 1, (tasks, 1))
    held = buffer(
        to_row(rng.standard_normal((tasks, columns)) * scale, dtype),
        *pad_of(layout, columns, dtype),
    )
    return held, from_row(held.view, dtype)


def pad_of(layout, columns, dtype):
    shift, odd = LAYOUTS[layout]
    per_pack = 8 if dtype in ("float16", "bfloat16") else 2 if dtype == "float64" else 4
    return (shift, odd) if odd else (shift, -columns % per_pack)


def higher(x):
    return x.astype(np.longdouble)


# ---- the stand-ins -----------------------------------------------------------------------------


def test_half_conversions_are_numpys(built, rng):
    every = np.arange(65536, dtype=np.uint16)
    back = np.empty(65536, np.float32)
    built.emulated_float(
        every.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(65536),
        back.ctypes.data_as(ctypes.c_void_p),
    )
    assert np.array_equal(back, every.view(np.float16).astype(np.float32), equal_nan=True)
    x = (rng.standard_normal(100000) * 10.0 ** rng.uniform(-9, 6, 100000)).astype(np.float32)
    bits = np.empty(x.size, np.uint16)
    built.emulated_half(
        x.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(x.size),
        bits.ctypes.data_as(ctypes.c_void_p),
    )
    with np.errstate(over="ignore"):
        assert np.array_equal(bits, x.astype(np.float16).view(np.uint16))


# ---- gram --------------------------------------------------------------------------------------


def gram(emu, dtype, jac, tasks, columns, sam=None):
    out = doubles(np.full((tasks, tasks), np.nan))
    s, s_stride = (sam.address, sam.stride) if sam else (None, 0)
    run(
        emu.emulated_gram(
            CODES[dtype],
            jac.address,
            ctypes.c_int64(jac.stride),
            s,
            ctypes.c_int64(s_stride),
            tasks,
            ctypes.c_int64(columns),
            out.address,
        )
    )
    out.check()
    return out.view


def check_gram(emu, rng, dtype, tasks, columns, layout, difference):
    jac, j = matrix(rng, tasks, columns, dtype, layout)
    sam, s = matrix(rng, tasks, columns, dtype, layout) if difference else (None, None)
    a = acc_type(dtype)
    rows = s.astype(a) - j.astype(a) if difference else j.astype(a)
    ref = higher(rows) @ higher(rows).T
    got = gram(emu, dtype, jac, tasks, columns, sam)
    assert np.array_equal(got, got.T)
    assert_close(got, ref, rows @ rows.T, dtype)


@pytest.mark.parametrize("difference", [False, True], ids=["gram", "difference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_gram(built, rng, tasks, dtype, difference):
    for n, columns in enumerate((1023, 1031)):
        built.emulated_order(n + 1, tasks)
        check_gram(built, rng, dtype, tasks, columns, list(LAYOUTS)[(n + tasks) % 4], difference)
    assert built.emulated_error() == b""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 9, 17, 32])
def test_gram_pair_gives_the_bits_of_the_two(emu, rng, tasks, dtype):
    if dtype in ("float64", "float32") and tasks > 4:
        pytest.skip("no kernel of its own: the binding runs the two")
    for columns, layout in [(0, "aligned"), (1, "both"), (1031, "odd stride"), (16411, "aligned")]:
        jac, _ = matrix(rng, tasks, columns, dtype, layout)
        sam, _ = matrix(rng, tasks, columns, dtype, list(LAYOUTS)[tasks % 4])
        out, difference = (doubles(np.full((tasks, tasks), np.nan)) for _ in range(2))
        run(
            emu.emulated_gram_pair(
                CODES[dtype],
                jac.address,
                ctypes.c_int64(jac.stride),
                sam.address,
                ctypes.c_int64(sam.stride),
                tasks,
                ctypes.c_int64(columns),
                out.address,
                difference.address,
            )
        )
        out.check()
        difference.check()
        assert np.array_equal(out.view, gram(emu, dtype, jac, tasks, columns))
        assert np.array_equal(difference.view, gram(emu, dtype, jac, tasks, columns, sam))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 1, 7, 4099, 16411])
def test_gram_columns(emu, rng, dtype, columns):
    for tasks, layout in (
        (2, "aligned"),
        (7, "both"),
        (8, "aligned"),
        (12, "odd stride"),
        (20, "aligned"),
    ):
        check_gram(emu, rng, dtype, tasks, columns, layout, False)


def test_gram_layouts_give_the_same_bits(emu, rng):
    for tasks in (4, 20, 40):
        jac, j = matrix(rng, tasks, 2053, "float32")
        expected = gram(emu, "float32", jac, tasks, 2053)
        for shift, pad in LAYOUTS.values():
            moved = buffer(jac.view.copy(), shift, pad)
            assert np.array_equal(gram(emu, "float32", moved, tasks, 2053), expected)


def spiky(rng, tasks, columns):
    """Rows whose length lies in one column of 16: what a tensor core cuts off shows most there."""
    return rng.standard_normal((tasks, columns)) * np.where(np.arange(columns) % 16 == 0, 1, 3e-4)


def entry_error(out, exact):
    """The largest error of an entry, in units of the product of its rows' norms."""
    norms = np.sqrt(np.diag(exact))
    return float(np.abs((out - exact) / np.outer(norms, norms)).max())


# In units of 2^-24. To 32 rows float32 is summed in float32; beyond, tensor cores cut sums off (here
# they have no spare bit): the last place of the largest product for each of 16 columns, at most.
@pytest.mark.parametrize("rows", ["normal", "heavy tails", "spiky"])
@pytest.mark.parametrize("tasks, bound", [(3, 8), (8, 8), (16, 8), (32, 8), (40, 32), (64, 32)])
def test_float32_gram_is_exact_entry_by_entry(built, rng, tasks, bound, rows):
    draw = {"normal": rng.standard_normal, "heavy tails": lambda size: rng.standard_t(2, size)}
    values = spiky(rng, tasks, 2053) if rows == "spiky" else draw[rows]((tasks, 2053))
    jac = buffer((values * 10.0 ** rng.uniform(-8, 8, (tasks, 1))).astype(np.float32))
    exact = higher(jac.view) @ higher(jac.view).T
    error = entry_error(gram(built, "float32", jac, tasks, 2053), exact.astype(np.float64))
    assert error <= bound * 2.0**-24
    if rows == "normal":
        assert error <= 3 * 2.0**-24


@pytest.mark.parametrize("tasks", [5, 20, 40])
def test_gram_beyond_the_range_is_not_finite(built, rng, tasks):
    for value in (np.inf, -np.inf, 3e38, 1e30):
        jac, _ = matrix(rng, tasks, 1031, "float32")
        clean = gram(built, "float32", jac, tasks, 1031)
        jac.view[3, 700] = value
        others = [i for i in range(tasks) if i != 3]
        got = gram(built, "float32", jac, tasks, 1031)
        assert not np.isfinite(got[3, 3])
        assert np.array_equal(got[np.ix_(others, others)], clean[np.ix_(others, others)])


@pytest.mark.parametrize("tasks", [5, 20, 40])
def test_gram_of_tiny_rows(built, rng, tasks):
    """Norms of 1e-8 over a billion columns: entries of 3e-13; and far below that."""
    for scale in (3e-13, 1e-18):
        jac = buffer((rng.standard_normal((tasks, 1031)) * scale).astype(np.float32))
        exact = (higher(jac.view) @ higher(jac.view).T).astype(np.float64)
        assert entry_error(gram(built, "float32", jac, tasks, 1031), exact) <= 4 * 2.0**-24


def test_gram_of_equal_rows_on_tensor_cores(built, rng):
    jac, _ = matrix(rng, 40, 1031, "float32")
    jac.view[21] = jac.view[2]
    g = gram(built, "float32", jac, 40, 1031)
    assert g[2, 2] == g[21, 21] == g[2, 21]


def test_gram_keeps_a_nan_in_its_row_and_column(emu, rng):
    for tasks in (4, 20):
        jac, _ = matrix(rng, tasks, 1100, "float32")
        jac.view[2, 1001] = np.nan
        bad = np.isnan(gram(emu, "float32", jac, tasks, 1100))
        assert bad[2].all() and bad[:, 2].all() and bad.sum() == 2 * tasks - 1


@pytest.mark.parametrize("of", [0, 1, 2], ids=["rows", "difference", "both"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tasks", [12, 24, 40, 56])
def test_tensor_core_spans(built, rng, tasks, dtype, of):
    """Several steps a span and spans a chunk, which the shapes ask for from millions of columns on."""
    if of == 2 and tasks > 32:
        pytest.skip("two sweeps")
    built.emulated_order(2, tasks)
    columns, chunks, steps = 2500, 2, 8  # float32: 512 columns a span, bfloat16: 1024
    held = [buffer(to_row(rng.standard_normal((tasks, columns)), dtype)) for _ in range(2)]
    j, s = (from_row(h.view, dtype) for h in held)
    entries = tasks * (tasks + 1) // 2
    matrices = [[j], [s - j], [j, s - j]][of]
    out = doubles(np.full((len(matrices) * entries, chunks), np.nan))
    run(
        built.emulated_mma_spans(
            CODES[dtype], of, held[0].address, held[1].address, tasks,
            ctypes.c_int64(columns), ctypes.c_int64(chunks), steps, out.address,
        )
    )  # fmt: skip
    out.check()
    assert built.emulated_error() == b""
    for n, m in enumerate(matrices):
        full = m @ m.T
        upper = out.view[n * entries : (n + 1) * entries].sum(1)
        assert relative(upper, full[np.triu_indices(tasks)]) < 1e-6


def test_row_squares_of_many_spans(emu, rng):
    x = rng.standard_normal((2, 40009)).astype(np.float32)
    out = doubles(np.full((2, 2), np.nan))
    run(
        emu.emulated_square_spans(
            buffer(x).address, ctypes.c_int64(40009), ctypes.c_int64(2), 8, out.address
        )
    )
    out.check()
    assert relative(out.view.sum(1), (higher(x) ** 2).sum(1)) < 1e-6


def test_gram_of_many_spans(emu, rng):
    x = rng.standard_normal((3, 40009)).astype(np.float32)
    held = buffer(x)
    out = doubles(np.full((6, 2), np.nan))
    run(
        emu.emulated_gram_spans(
            held.address, ctypes.c_int64(40009), ctypes.c_int64(2), 4, out.address
        )
    )
    out.check()
    full = higher(x) @ higher(x).T
    assert relative(out.view.sum(1), full[np.triu_indices(3)]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 1, 7, 1023, 8209])
def test_row_norms(emu, rng, dtype, columns):
    for tasks, layout in ((1, "aligned"), (3, "both"), (9, "odd stride")):
        jac, j = matrix(rng, tasks, columns, dtype, layout)
        out = doubles(np.full(tasks, np.nan))
        run(
            emu.emulated_row_norms(
                CODES[dtype],
                jac.address,
                ctypes.c_int64(jac.stride),
                tasks,
                ctypes.c_int64(columns),
                out.address,
            )
        )
        out.check()
        ref = np.sqrt((higher(j) ** 2).sum(1))
        plain = np.sqrt((j.astype(acc_type(dtype)) ** 2).sum(1))
        assert_close(out.view[0], ref, plain, dtype)


# ---- weighted sums -----------------------------------------------------------------------------


def weighted(a, rows, dtype):
    """(reference, plain numpy in the arithmetic type and rounded to dtype, the sum's, cancellation)

    A sum of n terms rounds n times: a random walk of sqrt(n) steps, none above an ulp of the sum
    of magnitudes.
    """
    acc = acc_type(dtype)
    plain = from_row(to_row(a.astype(acc) @ rows.astype(acc), dtype), dtype)
    ref = higher(a.astype(acc)) @ higher(rows)
    size = np.linalg.norm(ref.astype(np.float64))
    walk = np.sqrt(a.shape[-1]) * np.linalg.norm(np.abs(a) @ np.abs(rows))
    return ref, plain, walk / size if size else 0.0


@pairs
@pytest.mark.parametrize("tasks", [1, 2, 5, 8, 9, 33, 65, 600])
def test_combine(built, rng, dtype, beside, tasks):
    for n, columns in enumerate((0, 1, 7, 1023) if tasks > 100 else (0, 7, 1023, 8209)):
        built.emulated_order(n % 3, n)
        layout = list(LAYOUTS)[(n + tasks) % 4]
        jac, j = matrix(rng, tasks, columns, dtype, layout)
        a = rng.standard_normal(tasks)
        if tasks > 2:  # a row that must not be read
            a[1] = 0
            jac.view[1] = to_row(np.full(columns, np.nan), dtype)
        out = buffer(to_row(np.full(columns, np.nan), beside), shift=n % 2)
        w = doubles(a)
        run(
            built.emulated_combine(
                CODES[dtype],
                CODES[beside],
                jac.address,
                ctypes.c_int64(jac.stride),
                w.address,
                None,
                ctypes.c_int64(0),
                None,
                tasks,
                ctypes.c_int64(columns),
                out.address,
            )
        )
        out.check()
        used = a != 0
        ref, plain, cancels = weighted(a[used], j[used], beside)
        assert_close(from_row(out.view[0], beside), ref, plain, beside, row=True, cancels=cancels)
    assert built.emulated_error() == b""


@pairs
@pytest.mark.parametrize("columns", [0, 1, 7, 1023, 4099])
def test_combine_flat(emu, rng, dtype, beside, columns):
    for tasks, layout in ((1, "aligned"), (5, "both"), (8, "aligned"), (17, "odd stride")):
        jac, j = matrix(rng, tasks, columns, dtype, layout)
        sam, s = matrix(rng, tasks, columns, dtype, "aligned")
        a, b = rng.standard_normal(tasks), rng.standard_normal(tasks)
        if tasks > 4:
            a[1] = b[1] = b[3] = a[4] = 0
            jac.view[1] = sam.view[1] = sam.view[3] = to_row(np.full(columns, np.nan), dtype)
            b[2], jac.view[2] = a[2], to_row(np.full(columns, np.nan), dtype)  # a_2 s_2
            j[2] = s[2]
        out = buffer(to_row(np.full(columns, np.nan), beside))
        wa, wb = doubles(a), doubles(b)
        run(
            emu.emulated_combine(
                CODES[dtype],
                CODES[beside],
                jac.address,
                ctypes.c_int64(jac.stride),
                wa.address,
                sam.address,
                ctypes.c_int64(sam.stride),
                wb.address,
                tasks,
                ctypes.c_int64(columns),
                out.address,
            )
        )
        out.check()
        acc = acc_type(dtype)
        difference = (s.astype(acc) - j.astype(acc)).astype(np.float64)
        used, flat = a != 0, b != 0
        ref, plain, cancels = weighted(
            np.r_[a[used], b[flat]], np.r_[j[used], difference[flat]], beside
        )
        assert_close(from_row(out.view[0], beside), ref, plain, beside, row=True, cancels=cancels)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_combine_is_not_rounded_to_the_rows_type(emu, rng, dtype):
    jac, j = matrix(rng, 2, 2077, dtype)
    one, out = doubles([1.0, 1.0]), buffer(np.full(2077, np.nan, np.float32))
    where = (jac.address, ctypes.c_int64(jac.stride))
    rest = (one.address, None, ctypes.c_int64(0), None, 2, ctypes.c_int64(2077), out.address)
    run(emu.emulated_combine(CODES[dtype], CODES["float32"], *where, *rest))
    out.check()
    exact = j[0].astype(np.float32) + j[1].astype(np.float32)
    assert np.array_equal(out.view[0], exact)


def test_combine_into_a_row_of_j(emu, rng):
    jac, j = matrix(rng, 4, 5003, "float32")
    a = rng.standard_normal(4)
    w = doubles(a)
    target = ctypes.c_void_p(jac.address.value + 2 * jac.stride * 4)
    before = j.copy()
    run(
        emu.emulated_combine(
            0,
            0,
            jac.address,
            ctypes.c_int64(jac.stride),
            w.address,
            None,
            ctypes.c_int64(0),
            None,
            4,
            ctypes.c_int64(5003),
            target,
        )
    )
    jac.check()
    ref, plain, cancels = weighted(a, before, "float32")
    assert_close(jac.view[2], ref, plain, "float32", row=True, cancels=cancels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks, outputs", [(1, 1), (3, 3), (8, 8), (9, 2), (17, 17), (140, 11)])
def test_project(built, rng, dtype, tasks, outputs):
    for n, columns in enumerate((0, 1, 1023, 2053)):
        built.emulated_order(n % 3, n)
        layout = list(LAYOUTS)[(n + tasks) % 4]
        jac, j = matrix(rng, tasks, columns, dtype, layout)
        c = rng.standard_normal((outputs, tasks)) * (rng.random((outputs, tasks)) < 0.7)
        out = buffer(
            to_row(np.full((outputs, columns), np.nan), dtype), *pad_of(layout, columns, dtype)
        )
        held = doubles(c)
        run(
            built.emulated_project(
                CODES[dtype],
                jac.address,
                ctypes.c_int64(jac.stride),
                held.address,
                tasks,
                outputs,
                ctypes.c_int64(columns),
                out.address,
                ctypes.c_int64(out.stride),
            )
        )
        out.check()
        ref, plain, cancels = weighted(c, j, dtype)
        assert_close(from_row(out.view, dtype), ref, plain, dtype, row=True, cancels=cancels)
    assert built.emulated_error() == b""


def test_project_skips_zero_coefficients(emu, rng):
    jac, j = matrix(rng, 3, 100, "float32")
    jac.view[1] = np.nan
    c = doubles([[1.0, 0.0, 2.0]])
    out = buffer(np.zeros((1, 100), np.float32))
    run(
        emu.emulated_project(
            0,
            jac.address,
            ctypes.c_int64(jac.stride),
            c.address,
            3,
            1,
            ctypes.c_int64(100),
            out.address,
            ctypes.c_int64(100),
        )
    )
    assert relative(out.view[0], j[0] + 2 * j[2]) < 1e-6


@pairs
@pytest.mark.parametrize("tasks", [1, 2, 5, 17, 600])
def test_graddrop(built, rng, dtype, beside, tasks):
    """The bits of the reference body, whatever the layout; the step is counted once."""
    for n, columns in enumerate((0, 1, 7, 1023) if tasks > 100 else (0, 7, 1023, 8209)):
        built.emulated_order(n % 3, n)
        layout = list(LAYOUTS)[(n + tasks) % 4]
        jac, _ = matrix(rng, tasks, columns, dtype, layout)
        leak = doubles(rng.random(tasks)) if n % 2 else None
        there = np.ones(tasks, bool)
        if tasks > 2:  # a row that must not be read
            there[1] = False
            jac.view[1] = to_row(np.full(columns, np.nan), dtype)
        state = np.array([rng.integers(1 << 62), 2**32 + n], np.int64)
        expected = drop_reference(jac, dtype, beside, leak, there, state)
        out = buffer(to_row(np.full(columns, np.nan), beside), shift=n % 2)
        run(
            built.emulated_graddrop(
                CODES[dtype],
                CODES[beside],
                jac.address,
                ctypes.c_int64(jac.stride),
                leak and leak.address,
                there.ctypes.data_as(ctypes.c_void_p) if tasks > 2 else None,
                state.ctypes.data_as(ctypes.c_void_p),
                tasks,
                ctypes.c_int64(columns),
                out.address,
            )
        )
        out.check()
        assert state[1] == 2**32 + n + 1
        assert np.array_equal(from_row(out.view[0], beside), expected)
    assert built.emulated_error() == b""


def drop_reference(jac, dtype, beside, leak, there, state):
    """The reference body's result, as float64."""
    import torch

    from flatmtl.ops import reference

    rows = torch.from_numpy(from_row(jac.view, dtype)).to(getattr(torch, dtype))
    out = torch.empty(rows.shape[1], dtype=getattr(torch, beside))
    held = None if leak is None else torch.from_numpy(leak.view[0].copy())
    reference.graddrop_(rows, held, torch.from_numpy(there), torch.from_numpy(state.copy()), out)
    return out.double().numpy()


def test_affinity(emu, rng):
    for tasks in (1, 3, 40):
        g = rng.standard_normal((tasks, tasks))
        g = g + g.T
        losses = rng.random(tasks) + 0.1
        losses[: tasks // 4] = np.array([0, -1, np.nan, np.inf] * 10)[: tasks // 4]
        held, loss, out = doubles(g), doubles(losses), doubles(np.zeros((tasks, tasks)))
        run(
            emu.emulated_affinity(
                held.address, loss.address, ctypes.c_int64(tasks), ctypes.c_double(0.1), out.address
            )
        )
        out.check()
        ref = 0.1 * g / np.where((losses > 0) & np.isfinite(losses), losses, np.nan)[:, None]
        assert np.allclose(out.view, ref, rtol=1e-15, equal_nan=True)


# ---- segments ----------------------------------------------------------------------------------


def segments(rng, sizes, dtype, shift=0, gap=0):
    """Tensors of the given sizes, their offsets with gaps between them, and the row's length."""
    tensors = [buffer(to_row(rng.standard_normal(n), dtype), shift) for n in sizes]
    offsets, at = [], 5 if gap else 0
    for n in sizes:
        offsets.append(at)
        at += n + (int(rng.integers(0, gap)) if gap else 0)
    return tensors, offsets, at + gap


def table(tensors, offsets):
    kept = [k for k, t in enumerate(tensors) if t.view.size]
    count = len(kept)
    pointers = (ctypes.c_void_p * max(count, 1))(*[tensors[k].address.value for k in kept])
    starts = (ctypes.c_int64 * max(count, 1))(*[offsets[k] for k in kept])
    numels = (ctypes.c_int64 * max(count, 1))(*[tensors[k].view.size for k in kept])
    return kept, pointers, starts, numels, ctypes.c_int64(count)


SIZES = {
    "none": [],
    "empty": [0, 0],
    "mixed": [1, 0, 7, 1023, 16384, 3, 16411, 0],
    "one": [40009],
    "many": [k % 13 for k in range(250)],  # three tables
}


def pack(library, dtype, beside, grads, offsets, row, accumulate=False):
    """The squared norm."""
    out = doubles([np.nan])
    _, pointers, starts, numels, count = table(grads, offsets)
    where = (row.address, ctypes.c_int64(row.view.size), out.address)
    codes = (CODES[dtype], CODES[beside])
    run(library.emulated_pack_row(*codes, pointers, starts, numels, count, int(accumulate), *where))
    row.check()
    return out.view[0]


def check_norm(square, row, dtype):
    values = from_row(row.view[0], dtype)
    plain = (values.astype(acc_type(dtype)) ** 2).sum()
    assert_close(square, [(higher(values) ** 2).sum()], [plain], dtype)


@pairs
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shift, gap", [(0, 0), (0, 40), (1, 9)])
def test_pack_row(built, rng, dtype, beside, sizes, shift, gap):
    built.emulated_order(2, 3)
    grads, offsets, columns = segments(rng, SIZES[sizes], beside, shift, gap)
    row = buffer(to_row(np.full(columns, np.nan), dtype), shift)
    square = pack(built, dtype, beside, grads, offsets, row)
    expected = to_row(np.zeros(columns), dtype)
    for grad, at in zip(grads, offsets, strict=True):
        values = grad.view[0] if dtype == beside else to_row(grad.view[0], dtype)
        expected[at : at + grad.view.size] = values
    assert np.array_equal(row.view[0], expected)
    check_norm(square, row, dtype)
    assert built.emulated_error() == b""


@pairs
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shift, gap", [(0, 0), (0, 40), (1, 9)])
def test_pack_row_accumulates(built, rng, dtype, beside, sizes, shift, gap):
    """Twice, onto a row with -0 where no gradient comes: there every bit stays."""
    built.emulated_order(2, 3)
    acc = acc_type(dtype)
    _, offsets, columns = segments(rng, SIZES[sizes], beside, shift, gap)
    row = buffer(to_row(rng.standard_normal(columns), dtype), shift)
    row.view[0, ::3] = to_row(np.float32(-0.0), dtype)
    expected = row.view[0].copy()
    for scale in (1.0, 1e-2):
        grads = [
            buffer(to_row(scale * rng.standard_normal(n), beside), shift) for n in SIZES[sizes]
        ]
        square = pack(built, dtype, beside, grads, offsets, row, True)
        for grad, at in zip(grads, offsets, strict=True):
            part = slice(at, at + grad.view.size)
            before = from_row(expected[part], dtype).astype(acc)
            expected[part] = to_row(before + from_row(grad.view[0], beside).astype(acc), dtype)
        assert row.view[0].tobytes() == expected.tobytes()
        check_norm(square, row, dtype)
    assert built.emulated_error() == b""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pack_row_rounds_to_nearest_even(emu, rng, dtype):
    """The middle between two neighbours of the row's type, and the float32 on either side."""
    top = 0x7C00 if dtype == "float16" else 0x7F80
    low = rng.integers(0, top - 1, 5003).astype(np.uint16)
    kind = np.float16 if dtype == "float16" else np.uint16
    low, high = (from_row(x.view(kind), dtype) for x in (low, low + np.uint16(1)))
    middle = ((low + high) / 2).astype(np.float32)
    up, down = (np.nextafter(middle, np.float32(s * np.inf)) for s in (1, -1))
    special = np.array([0.0, np.inf, 65519.99, 65520.0, 1e30, 2.0**-25, 2.0**-133], np.float32)
    every = np.concatenate([middle, up, down, special])
    grad = buffer(np.concatenate([every, -every]))
    row = buffer(to_row(np.full(grad.view.size, np.nan), dtype))
    for accumulate in (False, True):
        if accumulate:
            row.view[...] = to_row(np.float32(-0.0), dtype)
        pack(emu, dtype, "float32", [grad], [0], row, accumulate)
        assert np.array_equal(row.view[0], to_row(grad.view[0], dtype))


@pairs
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize(
    "sizes, shift, gap", [("mixed", 0, 0), ("mixed", 1, 9), ("many", 0, 3), ("none", 0, 0)]
)
def test_perturb_and_restore(built, rng, dtype, beside, adaptive, sizes, shift, gap):
    built.emulated_order(2, 5)
    params, offsets, columns = segments(rng, SIZES[sizes], beside, shift, gap)
    acc = acc_type(dtype)
    saved = buffer(to_row(rng.standard_normal(columns), beside))
    saved.view[0, ::7] = to_row(np.float32(-0.0), beside)
    row = buffer(to_row(rng.standard_normal(columns), dtype), shift)
    rho = rng.uniform(0.01, 0.5, len(params))
    kept, pointers, starts, numels, count = table(params, offsets)
    rhos = (ctypes.c_double * max(len(kept), 1))(*[rho[k] for k in kept])
    eta = 0.01

    def perturb(row_, square):
        norm = doubles([square])
        run(
            built.emulated_perturb(
                CODES[dtype],
                CODES[beside],
                pointers,
                starts,
                numels,
                rhos,
                count,
                saved.address,
                row_,
                norm.address,
                ctypes.c_int64(columns),
                int(adaptive),
                ctypes.c_double(eta),
            )
        )
        for p in params:
            p.check()

    def unchanged():
        for k in kept:
            segment = saved.view[0, offsets[k] : offsets[k] + params[k].view.size]
            assert params[k].view[0].tobytes() == segment.tobytes()

    square = 123.4
    perturb(row.address, square)
    for k in kept:
        part = slice(offsets[k], offsets[k] + params[k].view.size)
        theta, g = from_row(saved.view[0, part], beside), from_row(row.view[0, part], dtype)
        scale = acc(rho[k] / np.sqrt(square))
        factor = (np.abs(theta) + eta) ** 2 if adaptive else 1.0
        ref = higher(theta) + np.longdouble(scale) * factor * higher(g)
        moved = theta.astype(acc) + scale * np.asarray(factor, acc) * g.astype(acc)
        assert_close(
            from_row(params[k].view[0], beside),
            ref,
            from_row(to_row(moved, beside), beside),
            beside,
            row=True,
        )

    row.view[...] = to_row(np.full(columns, np.nan), dtype)
    for square in (0.0, np.nan, np.inf):
        for k in kept:
            params[k].view[...] = 1
        perturb(row.address, square)
        unchanged()
    for k in kept:
        params[k].view[...] = 1
    perturb(None, 0.0)  # restore
    unchanged()
    assert built.emulated_error() == b""


@pairs
@pytest.mark.parametrize("columns", [0, 1, 7, 1023, 16411])
def test_adaptive_sq_norm(emu, rng, dtype, beside, columns):
    for shift, row_shift in ((0, 0), (1, 0), (4, 2), (0, 4)):
        saved = buffer(to_row(rng.standard_normal(columns), beside), shift)
        row = buffer(to_row(rng.standard_normal(columns), dtype), row_shift)
        out, eta = doubles([np.nan]), 0.01
        run(
            emu.emulated_adaptive_sq_norm(
                CODES[dtype],
                CODES[beside],
                saved.address,
                row.address,
                ctypes.c_int64(columns),
                ctypes.c_double(eta),
                out.address,
            )
        )
        acc = acc_type(dtype)
        theta, g = from_row(saved.view[0], beside), from_row(row.view[0], dtype)
        ref = ((np.abs(higher(theta)) + eta) * higher(g)) ** 2
        plain = ((np.abs(theta.astype(acc)) + acc(eta)) * g.astype(acc)) ** 2
        assert_close(out.view[0], [ref.sum()], [plain.sum()], dtype)


# ---- solvers -----------------------------------------------------------------------------------


def grams(rng, batch, tasks):
    """Gram matrices with conflicts, mixed scales, and in every other one a dead and a NaN task."""
    out = np.empty((batch, tasks, tasks))
    for b in range(batch):
        j = rng.standard_normal((tasks, tasks + 3)) * 10.0 ** rng.uniform(-3, 3, (tasks, 1))
        if b % 2 and tasks > 2:
            j[1] = 0
            j[2] = np.nan
        out[b] = j @ j.T
    return out


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9, 17, 40, 64, 80])
def test_draws_equal_the_serial_team(emu, rng, tasks):
    batch, size = 3, ctypes.c_int64(tasks)
    state = np.array([rng.integers(1 << 62), 5], np.int64)
    order = buffer(np.full((1, batch * tasks * tasks), -1, np.int64))
    normal = doubles(np.full(batch * tasks, np.nan))
    for draw, out in ((emu.emulated_draw_orders, order), (emu.emulated_draw_normals, normal)):
        drawn = state.copy()
        to = drawn.ctypes.data_as(ctypes.c_void_p)
        run(draw(to, ctypes.c_int64(batch), size, out.address))
        out.check()
        assert drawn[1] == 6 and drawn[0] == state[0]
    orders = order.view.reshape(batch, tasks, tasks)
    assert (np.sort(orders, -1) == np.arange(tasks)).all()
    for b in range(batch):
        expected, numbers = buffer(np.zeros((1, tasks * tasks), np.int64)), doubles(np.zeros(tasks))
        where = (ctypes.c_uint64(int(state[0])), ctypes.c_uint64(5), ctypes.c_int64(b), size)
        emu.serial_draw_order(*where, expected.address)
        emu.serial_draw_normal(*where, numbers.address)
        assert np.array_equal(expected.view.ravel(), orders[b].ravel())
        assert np.array_equal(numbers.view[0], normal.view.reshape(batch, tasks)[b])


def against_one_thread(library, case, tasks, batch, rng):
    """A block and one thread: the same, but for the order of the sums over the team."""
    g = grams(rng, batch, tasks)
    order = np.stack(
        [[rng.permutation(tasks) for _ in range(tasks)] for _ in range(batch)]
    )  # [B, T, T]
    block, serial = Run(case, g, order, seed=3), Run(case, g, order, seed=3)
    for calls in range(2 if case.state else 1):  # the second begins with the state of the first
        run(library.emulated_solve(*block.arguments()))
        library.serial_solve(*serial.arguments())
        assert np.array_equal(block.status, serial.status)
        for name in ("weights", "state"):
            a, b = block.results()[name], serial.results()[name]
            if case.sums:
                size = np.abs(b).max(axis=-1, keepdims=True) if b.size else 1.0
                assert (np.abs(a - b) <= 1e-8 * size).all(), (name, calls)
            else:
                assert np.array_equal(a, b), (name, calls)
        assert (np.abs(block.residual - serial.residual) <= 1e-9).all()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17])
def test_solvers_equal_the_serial_team(emu, case, tasks, rng):
    against_one_thread(emu, case, tasks, 2, rng)


LARGE = [case for case in CASES if not case.name.startswith("upgrad")]  # those are slow
UPGRAD = [case for case in CASES if case.name.startswith("upgrad")]


@pytest.mark.parametrize("case", UPGRAD, ids=[case.name for case in UPGRAD])
def test_upgrad_in_parts_of_two_warps(built, case, rng):
    built.emulated_order(2, 7)
    against_one_thread(built, case, 40, 1, rng)
    assert built.emulated_error() == b""


@pytest.mark.parametrize("case", LARGE, ids=[case.name for case in LARGE])
@pytest.mark.parametrize("tasks", [64, 80])  # the most in shared memory; scratch in global memory
def test_large_solvers_equal_the_serial_team(built, case, tasks, rng):
    built.emulated_order(2, 7)
    against_one_thread(built, case, tasks, 1, rng)
    assert built.emulated_error() == b""
