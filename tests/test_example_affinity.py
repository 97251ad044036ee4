"""The affinity examples: reading, features and splits; networks side by side; both scripts end to end."""

import copy
import csv
import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HEADER = [
    f"{kind}-{method}"
    for method in ("CC2", "PBE0", "PBE0", "CAM")
    for kind in ("E1", "E2", "f1", "f2")
]
ATOMS = np.array(list("CNOF=#()[]H1c"))


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def example(name):
    return importlib.import_module(name)


def molecules_of(rng, n):
    """n distinct texts that look like SMILES."""
    texts = {}
    while len(texts) < n:
        texts["".join(rng.choice(ATOMS, rng.integers(3, 25)))] = None
    return list(texts)


def write(path, header, rows):
    with gzip.open(path, "wt", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def qm8(tmp_path, rng):
    """A table of QM8's form: 16 columns of which 4 repeat, molecules that occur twice."""
    smiles = molecules_of(rng, 600)
    smiles += [smiles[k] for k in rng.permutation(600)[:20]]
    counts = np.array([[text.count(atom) for atom in "CNO="] for text in smiles])
    twelve = np.tile(counts, 3) + 0.3 * rng.normal(size=(len(smiles), 12))
    values = np.concatenate([twelve[:, :8], twelve[:, 4:8], twelve[:, 8:]], 1)
    rows = [[text, *map(repr, map(float, row))] for text, row in zip(smiles, values)]
    return write(tmp_path / "qm8.csv.gz", ["smiles", *HEADER], rows), smiles, twelve


@pytest.fixture
def toxcast(tmp_path, rng):
    """A table of ToxCast's form: 0, 1 or nothing; one task has three labels only."""
    smiles, tasks = molecules_of(rng, 160), 12
    labels = rng.integers(0, 2, (160, tasks))
    known = rng.random((160, tasks)) > 0.6
    known[:, 0] = np.arange(160) < 3
    rows = [
        [text, *(f"{label}.0" if there else "" for label, there in zip(*row))]
        for text, *row in zip(smiles, labels, known)
    ]
    names = [f"{'APR' if t % 2 else 'ATG'}_{t}" for t in range(tasks)]
    return write(tmp_path / "toxcast.csv.gz", ["smiles", *names], rows), labels, known


def test_qm8_has_twelve_tasks(qm8):
    path, smiles, twelve = qm8
    read, names, values = example("molecules").read_table(path)
    assert read == smiles
    assert names == list(dict.fromkeys(HEADER))
    assert len(names) == 12
    np.testing.assert_array_equal(values, twelve)


def test_missing_labels_are_nan(toxcast):
    path, labels, known = toxcast
    _, names, values = example("molecules").read_table(path)
    assert len(names) == 12
    np.testing.assert_array_equal(values, np.where(known, labels, np.nan))


def test_two_columns_of_one_name_must_be_equal(tmp_path):
    path = write(tmp_path / "t.csv.gz", ["smiles", "a", "a"], [["C", 1, 1], ["N", 1, 2]])
    with pytest.raises(ValueError, match="columns of one name must be equal"):
        example("molecules").read_table(path)


def test_smiles_come_first(tmp_path):
    path = write(tmp_path / "t.csv.gz", ["a", "smiles"], [[1, "C"]])
    with pytest.raises(ValueError, match="first column must be 'smiles', got 'a'"):
        example("molecules").read_table(path)


def test_a_molecule_stands_on_one_side(qm8, rng):
    _, smiles, _ = qm8
    seed = int(rng.integers(1 << 30))
    parts = example("molecules").split(smiles, [300, 100], seed)
    assert sorted(np.concatenate(parts)) == list(range(len(smiles)))
    sides = [{smiles[row] for row in part} for part in parts]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert 299 <= len(parts[0]) <= 300
    assert 99 <= len(parts[1]) <= 100
    again = example("molecules").split(smiles, [300, 100], seed)
    assert all(map(np.array_equal, parts, again))
    other = example("molecules").split(smiles, [300, 100], seed + 1)
    assert not np.array_equal(parts[0], other[0])


def test_ngrams_are_counted():
    features = example("molecules").ngram_features(["CCN", "CCN", "O"])
    # C, C, N, CC, CN, CCN: six n-grams, two of them the same
    counts = np.expm1(features)
    np.testing.assert_allclose(counts.sum(1), [6, 6, 1], rtol=1e-6)
    assert features.shape == (3, 1024)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features[0], features[1])


def test_ngrams_are_the_same_in_every_process(rng):
    texts = molecules_of(rng, 5)
    code = (
        "import sys, zlib, molecules; "
        "print(zlib.crc32(molecules.ngram_features(sys.argv[1:]).tobytes()))"
    )
    sums = {
        subprocess.run(
            [sys.executable, "-c", code, *texts],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(EXAMPLES), "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(sums) == 1


def test_standardise(rng):
    values = rng.normal(3, 5, (50, 4))
    values[:, 3] = 7
    training = rng.permutation(50)[:30]
    scaled = example("molecules").standardise(values, training)
    np.testing.assert_allclose(scaled[training].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled[training].std(0), [1, 1, 1, 0], atol=1e-12)


def test_networks_side_by_side_train_as_alone(rng):
    """Each network of a stack against a Regressor with its own AdamW on its own group."""
    module = example("many_networks")
    names, groups = ["a", "b", "c"], [("a",), ("a", "b", "c"), ("b", "c")]
    start = module.Regressor(7, 5, names).double()
    x = torch.from_numpy(rng.normal(size=(40, 7)))
    y = torch.from_numpy(rng.normal(size=(40, 3)))
    steps, seed = 2 * (40 // 8), int(rng.integers(1 << 30))
    networks = module.Networks(start, groups)
    networks.mask = networks.mask.double()
    optimizer, schedule = module.adam(networks, 0.01, steps)
    for epoch in module.batches(np.arange(40), 8, 2, seed):
        for rows in epoch:
            optimizer.zero_grad()
            networks.loss(x[rows], y[rows]).backward()
            optimizer.step()
            schedule.step()
    errors = module.errors(networks, x, y, torch.arange(40), at_once=16)
    for group, row in zip(groups, errors):
        alone = copy.deepcopy(start)
        optimizer, schedule = module.adam(alone, 0.01, steps)
        for epoch in module.batches(np.arange(40), 8, 2, seed):
            for rows in epoch:
                predicted = alone(x[rows], group)
                optimizer.zero_grad()
                sum(
                    (predicted[name] - y[rows, names.index(name)]).square().mean() for name in group
                ).backward()
                optimizer.step()
                schedule.step()
        for at, name in enumerate(names):
            if name in group:
                expected = (alone(x, [name])[name] - y[:, at]).square().mean().item()
                assert row[at] == pytest.approx(expected, rel=1e-9)
            else:
                assert np.isnan(row[at])


def test_agreement(rng):
    stats = pytest.importorskip("scipy.stats")
    a, b = rng.normal(size=(2, 6, 6))
    apart = ~np.eye(6, dtype=bool)
    found = example("affinity_report").agreement(a, b)
    assert found["pearson"] == pytest.approx(stats.pearsonr(a[apart], b[apart])[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(a[apart], b[apart])[0])


def test_qm8_end_to_end(qm8, tmp_path, capsys, monkeypatch):
    """The quick run; a second one reads what the first trained and says the same."""
    pytest.importorskip("matplotlib")
    path, _, _ = qm8
    module, out = example("affinity_qm8"), tmp_path / "out"
    command = ["--data", str(path), "--out", str(out), "--quick", "--seeds", "2"]
    assert module.main(command) == 0
    first = capsys.readouterr().out
    for method in ("all together", "single-task", "TAG", "cosine", "HOA", "random", "by kind"):
        assert f"| {method} | " in first
    assert "the same to the bit" in first
    assert "DIFFER" not in first
    kept = json.loads((out / "networks.json").read_text())
    for seed in ("0", "1"):
        networks = kept["networks"][seed]
        assert {len(group.split("|")) for group in networks} >= {1, 2, 12}
        for group, parts in networks.items():
            assert set(parts) == {"validation", "test"}
            assert set(parts["test"]) == set(group.split("|"))
    for name in (
        "affinity_seed0.npz",
        "affinity_seed1.npz",
        "affinity.png",
        "errors.png",
        "groups_3.png",
    ):
        assert (out / name).stat().st_size > 0

    def trains(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "_train", trains)
    monkeypatch.setattr(module, "measured_run", trains)
    monkeypatch.setattr(module.report, "_pictures", lambda *arguments: None)  # drawn before
    assert module.main(command) == 0
    again = capsys.readouterr().out
    assert (
        again.split(" s in this call")[0].rsplit("\n", 1)[0]
        == first.split(" s in this call")[0].rsplit("\n", 1)[0]
    )
    # results of another run are not mixed in
    (out / "networks.json").write_text(json.dumps({**kept, "about": {}}))
    assert module.main(command) == 2
    assert "--out must be a new folder" in capsys.readouterr().err


def test_toxcast_end_to_end(toxcast, tmp_path, capsys):
    pytest.importorskip("sklearn")
    import flatmtl

    path, labels, known = toxcast
    assert (
        example("affinity_toxcast").main(
            ["--data", str(path), "--out", str(tmp_path / "out"), "--quick"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "160 molecules, 12 tasks" in text
    assert "Peak resident memory" in text
    record = flatmtl.AffinityRecord.load(tmp_path / "out" / "affinity.npz")
    assert record.matrix().shape == (12, 12)
    both = known.T.astype(float) @ known  # [T, T]
    np.testing.assert_allclose(record.overlap, both / known.sum(0)[:, None])
    assert (
        record.counts()[1, 0] < record.counts()[1, 2]
    )  # a task with three labels is often missing


@pytest.mark.parametrize("script", ["affinity_qm8", "affinity_toxcast"])
def test_no_such_file(script, tmp_path, capsys):
    assert example(script).main(["--data", str(tmp_path / "no.csv"), "--out", str(tmp_path)]) == 2
    assert "no.csv" in capsys.readouterr().err
