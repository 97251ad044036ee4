"""The methods of the rows: their formulas over several steps, their state, and what they refuse."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import oracles_rows as oracle
import pytest
import torch
from cases import LAYOUTS, dtypes, layout, numpy64, pairs, rows
from methods import ROWS
from oracles_rows import Given
from test_ops_graddrop import graddrop, uniform

from flatmtl import weighting
from flatmtl.weighting import DBMTL, ExcessMTL, GradDrop, MoCo, TrimmedMean, by_name

AVERAGES = ["moco", "db_mtl", "excess_mtl"]
each = pytest.mark.parametrize("name", ROWS)
each_average = pytest.mark.parametrize("name", AVERAGES)
NAN = float("nan")


def make(name: str, **options):
    if name == "trimmed_mean":
        options.setdefault("trim", 1)
    return by_name(name, **options)


def steps_for(rng, dtype, *, tasks=4, size=129, count=4, scale=1.0, device="cpu", masked=False):
    """Rows, losses and masks of several steps, as torch has them."""
    result = []
    for _ in range(count):
        lengths = scale * 10.0 ** rng.uniform(-1, 1, (tasks, 1))
        jac = rows(rng, (tasks, size), dtype, device, lengths)
        losses = torch.from_numpy(10.0 ** rng.uniform(-1, 1, tasks)).to(device)
        sound = torch.from_numpy(rng.random(tasks) < 0.6).to(device) if masked else None
        if sound is not None:
            jac[~sound], losses[~sound] = NAN, NAN
        result.append((jac, losses, sound))
    return result


def given(steps) -> list[Given]:
    """The same for the oracle, without what does not count."""
    result = []
    for jac, losses, sound in steps:
        on = np.ones(len(jac), bool) if sound is None else sound.cpu().numpy()
        result.append(Given(numpy64(jac), numpy64(losses), on))
    return result


def call(method, step, *, scale=None, beside=None, made=True):
    jac, losses, sound = step
    out = torch.full((jac.shape[1],), NAN, dtype=beside or jac.dtype, device=jac.device)
    weights = method.aggregate(jac, out, losses=losses, sound=sound, scale=scale)
    if made:
        method._made(None)
    return out, weights


def expected(name: str, steps, **options) -> list[np.ndarray]:
    """The updates, by the oracles."""
    truth = given(steps)
    if name == "trimmed_mean":
        return [oracle.trimmed_mean(s.rows, s.sound, options.get("trim", 1)) for s in truth]
    if name == "graddrop":
        none = np.zeros(len(truth[0].rows))
        return [
            graddrop(s.rows[s.sound], none[s.sound], uniform(0, k, s.rows.shape[1]))
            for k, s in enumerate(truth)
        ]
    if name == "excess_mtl":
        return [d for d, _ in oracle.excess_mtl(truth, **options)]
    return getattr(oracle, name)(truth, **options)


def check(name: str, steps, beside=None, state=None, scale=None, **options) -> None:
    """Every step's update, to the rounding of its rows, its state and itself."""
    method = make(name, **options, **({"state_dtype": state} if state else {}))
    jac = steps[0][0]
    kinds = [jac.dtype, beside or jac.dtype, state or jac.dtype, torch.float32]
    unit = max(torch.finfo(k).eps for k in (kinds[:3] if jac.dtype == torch.float64 else kinds))
    factor = 1.0 if scale is None else float(scale)
    refs = expected(name, steps, **options)
    terms = expected(name, [(g.abs(), *rest) for g, *rest in steps], **options)  # none cancel
    for step, ref, term in zip(steps, refs, terms, strict=True):
        step = (step[0] * factor, *step[1:]) if scale is not None else step
        out, _ = call(method, step, scale=scale, beside=beside)
        assert torch.isfinite(out).all()
        mine = numpy64(out) / factor
        wrong = np.abs(mine - ref)
        if name == "graddrop":  # P so close to U that rounding decides
            wrong[np.argsort(wrong)[-2:]] = 0
        size = max(np.linalg.norm(ref), np.linalg.norm(term))
        assert np.linalg.norm(wrong) <= 32 * unit * size, name


@pairs
@each
def test_formula(name, dtype, beside, device, rng):
    check(name, steps_for(rng, dtype, device=device), beside)


@each
@pytest.mark.parametrize("tasks, size", [(1, 33), (2, 1), (3, 0), (9, 4099), (33, 257)])
def test_shapes(name, tasks, size, device, rng):
    options = {"trim": (tasks - 1) // 2} if name == "trimmed_mean" else {}
    for dtype in (torch.float32, torch.float64):
        steps = steps_for(rng, dtype, tasks=tasks, size=size, count=3, device=device)
        check(name, steps, **options)


@each
def test_more_than_a_block_of_columns(name, rng, monkeypatch):
    monkeypatch.setattr(weighting._row_passes, "BLOCK", 1)
    check(name, steps_for(rng, torch.float64, size=4097, count=2))


OPTIONS = [
    ("trimmed_mean", {"trim": 0}),
    ("moco", {"beta": 1.0, "beta_sigma": 0.0}),
    ("moco", {"normalize": False, "gamma": 1e-3, "rho": 0.3}),
    ("moco", {"beta": 0.3, "beta_sigma": 0.2, "gamma": 0.5, "gamma_sigma": 0.0, "rho": 1.0}),
    ("db_mtl", {"beta": 0.0}),
    ("db_mtl", {"beta": 0.7, "beta_sigma": 0.5, "eps": 0.0}),
    ("excess_mtl", {"step": 1.0, "eps": 1e-3}),
]


@pytest.mark.parametrize(
    "name, options", OPTIONS, ids=[f"{n}-{k}" for k, (n, _) in enumerate(OPTIONS)]
)
def test_options(name, options, device, rng):
    check(name, steps_for(rng, torch.float64, device=device, count=5), **options)


@each_average
def test_types_of_the_state(name, device, rng):
    cases = [(torch.float32, torch.float64), (torch.float64, torch.float32)]
    cases += [(torch.bfloat16, torch.float32)]
    if name != "excess_mtl":
        cases += [(torch.float32, torch.bfloat16), (torch.float64, torch.float16)]
    for dtype, state in cases:
        steps = steps_for(rng, dtype, device=device)
        method = make(name, state_dtype=state)
        call(method, steps[0])
        assert method._held.dtype == state
        check(name, steps, state=state)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hard_scales(name, dtype, device, rng):
    for scale in (1e-8, 1e8):
        check(name, steps_for(rng, dtype, scale=scale, device=device))


@each
@dtypes
def test_rows_that_do_not_count(name, dtype, device, rng):
    """NaN in them, and in their losses, reaches neither the update nor the state."""
    steps = steps_for(rng, dtype, tasks=5, count=6, device=device, masked=True)
    check(name, steps)
    method = make(name)
    for step in steps:
        _, weights = call(method, step)
        if weights is not None:
            assert (weights[~step[2]] == 0).all() and torch.isfinite(weights).all()
    for value in method.state_dict().values():
        assert torch.isfinite(value).all()
    jac, losses, _ = steps[0]
    nobody = torch.zeros(5, dtype=torch.bool, device=device)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    out, _ = call(method, (torch.full_like(jac, NAN), losses * NAN, nobody))
    assert (out == 0).all() and method.last_status().no_active_task
    for key, value in method.state_dict().items():
        if key in ("y", "squares", "weights_and_first"):
            assert torch.equal(value, before[key])


@each
def test_status(name, rng):
    method = make(name)
    jac, losses, _ = steps_for(rng, torch.float32)[0]
    call(method, (jac, losses, None))
    assert method.last_status().ok
    call(method, (jac, losses, torch.tensor([True, True, False, True])))
    assert method.last_status().inactive_task and not method.last_status().no_active_task


@each
def test_zero_rows(name, device, rng):
    steps = steps_for(rng, torch.float64, device=device)
    for jac, *_ in steps:
        jac[1] = 0
    check(name, steps)
    for jac, *_ in steps:
        jac.zero_()
    method = make(name)
    for step in steps:
        assert (call(method, step)[0] == 0).all()


@each
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(name, kind, device, rng):
    jac, losses, _ = steps_for(rng, torch.float32, device=device)[0]
    a, _ = call(make(name), (jac, losses, None))
    b, _ = call(make(name), (layout(jac, kind), losses, None))
    assert torch.equal(a, b)


@each
def test_the_rows_are_left_alone(name, rng):
    jac, losses, sound = steps_for(rng, torch.float32, masked=True)[0]
    before = jac.clone(), losses.clone()
    call(make(name), (jac, losses, sound))
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(before, (jac, losses)))


@each
def test_a_grad_scaler_changes_nothing_but_the_updates_scale(name, device, rng):
    for options in [{}, *([{"normalize": False}] if name == "moco" else [])]:
        scale = torch.tensor(65536.0, dtype=torch.float64, device=device)
        steps = steps_for(rng, torch.float64, device=device)
        check(name, steps, scale=scale, **options)
        plain, scaled = make(name, **options), make(name, **options)
        for step in steps:
            call(plain, step)
            call(scaled, (step[0] * 65536, *step[1:]), scale=scale)
        for a, b in zip(plain.state_dict().values(), scaled.state_dict().values(), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-13, atol=0)


# ---- known answers -----------------------------------------------------------------------------


def test_graddrop_of_one_sign_is_the_sum(rng):
    jac = torch.from_numpy(np.abs(rng.standard_normal((3, 65))))
    for sign in (1, -1):
        out, _ = call(GradDrop(), (sign * jac, None, None))
        assert torch.equal(out, sign * (jac[0] + jac[1] + jac[2]))


def test_graddrop_leaks(rng):
    (jac, losses, _) = steps_for(rng, torch.float64)[0]
    leak = rng.random(4)
    out, _ = call(GradDrop(leak=torch.from_numpy(leak), seed=5), (jac, losses, None))
    ref = graddrop(numpy64(jac), leak, uniform(5, 0, jac.shape[1]))
    assert np.allclose(numpy64(out), ref, rtol=1e-12, atol=1e-12)
    half, _ = call(GradDrop(leak=0.5), (jac, losses, None))
    ref = graddrop(numpy64(jac), np.full(4, 0.5), uniform(0, 0, jac.shape[1]))
    assert np.allclose(numpy64(half), ref, rtol=1e-12, atol=1e-12)
    whole, _ = call(GradDrop(leak=1), (jac, losses, None))
    assert torch.allclose(whole, jac.sum(0), rtol=1e-12, atol=1e-12)


def test_graddrop_draws_anew(rng):
    (step,) = steps_for(rng, torch.float32, count=1)
    method = GradDrop(seed=3)
    first, second = call(method, step)[0], call(method, step)[0]
    assert not torch.equal(first, second)
    method.reset()
    assert torch.equal(first, call(method, step)[0])
    twin = method.twin()
    assert not torch.equal(first, call(twin, step)[0])


def test_trimmed_mean_without_trimming_is_the_mean(rng):
    jac = torch.from_numpy(rng.standard_normal((5, 65)))
    assert torch.allclose(call(TrimmedMean(trim=0), (jac, None, None))[0], jac.mean(0))


def test_trimmed_mean_of_three_is_the_median(rng):
    jac = torch.from_numpy(rng.standard_normal((3, 65)))
    assert torch.equal(call(TrimmedMean(trim=1), (jac, None, None))[0], jac.median(0).values)


def test_trimmed_mean_of_few_tasks(rng):
    """Two of five there, two to be trimmed: none is."""
    jac = torch.from_numpy(rng.standard_normal((5, 65)))
    sound = torch.tensor([True, False, False, True, False])
    out, _ = call(TrimmedMean(trim=2), (jac, None, sound))
    assert torch.allclose(out, (jac[0] + jac[3]) / 2)


def test_trimmed_mean_agrees_with_torchjd(rng):
    aggregation = pytest.importorskip("torchjd.aggregation")
    jac = torch.from_numpy(rng.standard_normal((6, 65)))
    out, _ = call(TrimmedMean(trim=2), (jac, None, None))
    assert torch.allclose(out, aggregation.TrimmedMean(2)(jac), rtol=1e-12, atol=1e-12)


def test_moco_begins_with_the_rows(rng):
    """beta = 1: y is the rows; their weights are those of one step from 1 / T."""
    (step,) = steps_for(rng, torch.float64, count=1)
    method = MoCo(beta=1.0, normalize=False, gamma=1e-3)
    out, _ = call(method, step)
    assert torch.equal(method.state_dict()["y"], step[0])
    gram = step[0] @ step[0].T
    weights = (0.25 - 1e-3 * gram.sum(1) / 4).softmax(0)
    assert torch.allclose(out, weights @ step[0], rtol=1e-12)
    assert torch.allclose(method.state_dict()["lambda_and_count"][:-1], weights, rtol=1e-12)


def test_moco_normalizes_to_the_losses(rng):
    (jac, losses, _) = steps_for(rng, torch.float64, count=1)[0]
    method = MoCo(beta=1.0)
    call(method, (jac, losses, None))
    assert torch.allclose(method.state_dict()["y"].norm(dim=1), losses, rtol=1e-12)


def test_db_mtl_balances_the_lengths(rng):
    steps = steps_for(rng, torch.float64)
    method = DBMTL()
    for step in steps:
        out, _ = call(method, step)
    y = method.state_dict()["y"]
    norms = y.norm(dim=1)
    assert torch.allclose(out, (norms.max() / norms) @ y, rtol=1e-12)
    for i in range(4):
        assert torch.isclose((norms.max() / norms[i]) * norms[i], norms.max())


def test_db_mtl_gives_heads_the_gradient_of_the_logarithm(rng):
    (jac, losses, _) = steps_for(rng, torch.float64)[0]
    method = DBMTL(eps=0.0)
    call(method, (jac, losses, None))
    assert torch.allclose(method._own_weights(losses), 1 / losses, rtol=1e-12)
    for name in ("moco", "excess_mtl", "graddrop", "trimmed_mean"):
        assert make(name)._own_weights(losses) is None


def test_excess_mtl_of_equal_tasks(rng):
    method = ExcessMTL(step=1.0)
    for _ in range(5):
        jac = torch.from_numpy(rng.standard_normal((1, 65))).expand(3, 65).contiguous()
        out, weights = call(method, (jac, None, None))
        assert torch.allclose(weights, torch.ones(3, dtype=torch.float64))
        assert torch.allclose(out, 3 * jac[0])


def test_excess_mtl_begins_with_ones_and_keeps_their_sum(rng):
    steps = steps_for(rng, torch.float64)
    method = ExcessMTL(step=1.0)
    for k, step in enumerate(steps):
        out, weights = call(method, step)
        assert torch.isclose(weights.sum(), torch.tensor(4.0, dtype=torch.float64))
        assert torch.allclose(weights, torch.ones_like(weights)) is (k == 0)
        assert torch.allclose(out, weights @ step[0], rtol=1e-12)
        ref = oracle.excess_mtl(given(steps[: k + 1]), step=1.0)[-1][1]
        assert np.allclose(numpy64(weights), ref, rtol=1e-10)


def test_excess_mtl_survives_a_huge_excess(rng):
    method = ExcessMTL(step=1.0)
    jac = torch.from_numpy(rng.standard_normal((3, 65)))
    call(method, (1e-12 * jac, None, None))
    for _ in range(3):
        out, weights = call(method, (1e12 * jac, None, None))
        assert torch.isfinite(out).all() and torch.isclose(weights.sum(), weights.new_tensor(3.0))


# ---- the state ---------------------------------------------------------------------------------


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@each_average
def test_a_step_that_is_not_made_leaves_no_trace(name, rng):
    steps = steps_for(rng, torch.float32)
    method = make(name)
    call(method, steps[0])
    before = method.state_dict()
    first, _ = call(method, steps[1], made=False)
    second, _ = call(method, steps[1], made=False)
    assert torch.equal(first, second) and same(before, method.state_dict())
    method._made(torch.tensor(False))
    assert same(before, method.state_dict())
    third, _ = call(method, steps[1], made=False)
    assert torch.equal(first, third)
    method._made(torch.tensor(True))
    assert not same(before, method.state_dict())
    after = method.state_dict()
    method._made(None)  # nothing is pending
    assert same(after, method.state_dict())


@each
def test_the_tensors_are_the_state(name, rng):
    """What they held is put back: the next call gives what it would have given."""
    steps = steps_for(rng, torch.float32)
    method = make(name)
    call(method, steps[0])
    held = method._tensors(steps[1][0])
    saved = [t.clone() for t in held]
    first, _ = call(method, steps[1], made=False)
    for t, s in zip(held, saved, strict=True):
        t.copy_(s)
    second, _ = call(method, steps[1], made=False)
    assert torch.equal(first, second)


@each_average
def test_carry(name, rng):
    """Parameters a and b change places and c comes: what is kept goes with them."""
    jac, losses, _ = steps_for(rng, torch.float32, size=10, count=1)[0]
    method, moved = make(name), make(name)
    method._carry(((1, 0, 4), (2, 4, 6)), 10)
    call(method, (jac, losses, None))
    old = method.state_dict()[method._entry]
    method._carry(((1, 0, 4), (2, 4, 6)), 10)
    assert torch.equal(method.state_dict()[method._entry], old)
    method._carry(((2, 0, 6), (3, 6, 3), (1, 9, 4)), 13)
    new = method.state_dict()[method._entry]
    assert torch.equal(new, torch.cat([old[:, 4:], torch.zeros(4, 3), old[:, :4]], 1))
    wide = torch.cat([jac[:, 4:], torch.zeros(4, 3), jac[:, :4]], 1)
    moved._carry(((2, 0, 6), (3, 6, 3), (1, 9, 4)), 13)
    call(moved, (wide, losses, None))
    a, _ = call(method, (wide, losses, None))
    b, _ = call(moved, (wide, losses, None))
    assert torch.allclose(a, b, rtol=1e-4)


@each
def test_resumes_bit_for_bit(name, rng):
    steps = steps_for(rng, torch.float32, count=5)
    method = make(name)
    for step in steps[:3]:
        call(method, step)
    copies = [make(name) for _ in range(2)]
    copies[0].load_state_dict(pickle.loads(pickle.dumps(method.state_dict())))
    copies[1].load_state_dict(method.state_dict())
    copies += [copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    for step in steps[3:]:
        out, _ = call(method, step)
        for other in copies:
            assert torch.equal(out, call(other, step)[0])
    fresh = make(name)
    method.reset()
    for step in steps[:2]:
        assert torch.equal(call(method, step)[0], call(fresh, step)[0])


@each
def test_an_unused_state_is_taken_up_again(name, rng):
    (step,) = steps_for(rng, torch.float32, count=1)
    method = make(name)
    method.load_state_dict(make(name).state_dict())
    assert torch.equal(call(method, step)[0], call(make(name), step)[0])


@each_average
def test_wrong_states(name, rng):
    steps = steps_for(rng, torch.float32)
    method = make(name)
    call(method, steps[0])
    good = method.state_dict()
    few, entry = type(method)._few, type(method)._entry
    for bad in (
        {},
        {**good, "more": 1},
        {**good, few: None},
        {**good, few: good[few].float()},
        {**good, few: torch.zeros(7, dtype=torch.float64)},
        {**good, entry: good[entry][0]},
        {**good, entry: good[entry].long()},
    ):
        with pytest.raises(ValueError, match="state"):
            method.load_state_dict(bad)
        assert same(good, method.state_dict())
    with pytest.raises(ValueError, match="reset"):
        call(method, (steps[0][0][:, 1:], steps[0][1], None))
    assert same(good, method.state_dict())


@each
def test_determinism_across_threads(name, rng, threads):
    steps = steps_for(rng, torch.float32, tasks=3, size=200_003, count=2)
    results = []
    for count in (1, 3):
        threads(count)
        method = make(name)
        results.append([call(method, step)[0] for step in steps])
    assert all(map(torch.equal, *results))


# ---- what is refused ---------------------------------------------------------------------------


@each
def test_a_gram_matrix_is_not_enough(name):
    with pytest.raises(TypeError, match="the task gradients themselves"):
        make(name)(torch.eye(3, dtype=torch.float64))


@each
def test_wrong_arguments(name, rng):
    jac, losses, _ = steps_for(rng, torch.float32)[0]
    out = torch.empty(jac.shape[1])
    cases = [
        ((jac[0], out), {}, "jac"),
        ((jac.long(), out), {}, "jac"),
        ((jac, out[1:]), {}, "out"),
        ((jac, out.double()), {}, "out"),
        ((jac, jac[0]), {}, "out"),
        ((jac, out), {"sound": torch.ones(3, dtype=torch.bool)}, "sound"),
        ((jac, out), {"sound": torch.ones(4)}, "sound"),
        ((jac, out), {"scale": torch.ones(2)}, "scale"),
        ((jac, out), {"scale": 2.0}, "scale"),
    ]
    if name in ("moco", "db_mtl"):
        assert make(name).needs == "rows and losses"
        cases += [((jac, out), {"losses": bad}, "losses") for bad in (
            None, losses[1:], losses.long(), -losses, losses * 0, losses * NAN)]  # fmt: skip
    for args, options, word in cases:
        method = make(name)
        with pytest.raises((ValueError, TypeError), match=word):
            method.aggregate(*args, **{"losses": losses, **options})
        call(method, (jac[:3].contiguous(), losses[:3], None))  # nothing was begun for 4 tasks


BAD_OPTIONS = [
    ("graddrop", {"leak": 1.5}), ("graddrop", {"leak": [0.1, 2.0]}), ("graddrop", {"leak": True}),
    ("graddrop", {"leak": -0.1}), ("graddrop", {"leak": "a"}), ("graddrop", {"seed": 0.5}),
    ("trimmed_mean", {"trim": -1}), ("trimmed_mean", {"trim": 0.5}),
    ("moco", {"beta": 0.0}), ("moco", {"beta": 1.1}), ("moco", {"gamma": 0}), ("moco", {"rho": -1}),
    ("moco", {"beta_sigma": -0.1}), ("moco", {"gamma_sigma": "a"}), ("moco", {"normalize": 1}),
    ("db_mtl", {"beta": 1.0}), ("db_mtl", {"eps": -1e-9}), ("db_mtl", {"beta_sigma": NAN}),
    ("excess_mtl", {"step": 0.0}), ("excess_mtl", {"eps": 0.0}),
    *((name, {"state_dtype": kind}) for name in AVERAGES for kind in (torch.int32, "float32")),
    ("excess_mtl", {"state_dtype": torch.bfloat16}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", BAD_OPTIONS)
def test_wrong_options(name, options):
    (option,) = options
    with pytest.raises((ValueError, TypeError), match=option):
        by_name(name, **options)


def test_too_much_trimming(rng):
    jac, losses, _ = steps_for(rng, torch.float32)[0]
    with pytest.raises(ValueError, match="trim must be less than half of the 4 tasks, got 2"):
        call(TrimmedMean(trim=2), (jac, losses, None))
    with pytest.raises(TypeError, match="trim"):
        by_name("trimmed_mean")
    with pytest.raises(ValueError, match="jac must have 3 rows, as leak, got 4"):
        call(GradDrop(leak=[0.1] * 3), (jac, losses, None))


def test_the_catalogue():
    found = {m.name: m for m in weighting.methods()}
    for name in ROWS:
        assert found[name].needs.startswith("rows") and found[name].paper and found[name].year
    assert isinstance(by_name("DB-MTL"), DBMTL) and isinstance(by_name("GradDrop"), GradDrop)


def test_half_rows_have_a_float32_sum_of_squares(rng):
    """In half precision it would stop growing after a few hundred steps."""
    method = ExcessMTL()
    (step,) = steps_for(rng, torch.bfloat16, count=1)
    call(method, step)
    assert method.state_dict()["squares"].dtype == torch.float32
