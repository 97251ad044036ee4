"""Which of QM8's 12 tasks should train together? TAG's answer, and what training by it is worth.

    python examples/affinity_qm8.py --data qm8.csv.gz --out qm8-out

The table is data/qm8.csv.gz of the chemprop repository (github.com/chemprop/chemprop, MIT), commit
b83635bcddaddcdb91d453128edec9f2be0d25cf: 21,786 molecules as SMILES text, four excitation energies and
strengths by three methods of quantum chemistry. Inputs are hashed n-grams of the text.

For every seed (which draws split, first weights and batches): one training of all tasks together with a
`flatmtl.AffinityProbe`, groups by its affinity for 1 to 4 networks, and the test error of networks trained
by these groups, all together, alone, by cosine, by results of all pairs (HOA), by kind of quantity and at
random. A second call with the same --out goes on where the first was stopped.
"""

import argparse
import itertools
import json
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import affinity_report as report
import numpy as np
import torch
from many_networks import Networks, Regressor, adam, batches, errors
from molecules import FEATURES, ngram_features, read_table, split, standardise
from progress import progress

import flatmtl
from flatmtl.grouping import hoa_matrix, random_groups

KINDS = "E1", "E2", "f1", "f2"
WORKERS = 2


@dataclass(frozen=True)
class Settings:
    """What a run is; the defaults were chosen on the validation rows of seed 0."""

    train: int = 15_500
    validation: int = 1_500  # the other 4,786 rows are the test set
    epochs: int = 12
    batch: int = 512
    width: int = 256
    lr: float = 3e-3
    every: int = 10  # steps between two that the probe measures
    look_aheads: tuple = (0.03, 0.3)  # rates of two more look-aheads, seed 0 only
    draws: int = 3  # random groupings a seed and number of networks
    most: int = 4  # networks
    at_once: int = 16  # networks side by side


QUICK = Settings(train=300, validation=80, epochs=3, batch=50, width=16, every=2, draws=1, most=3)


class Table:
    """The table as tensors, for one seed's split."""

    def __init__(self, smiles, names, values, features, settings, seed):
        parts = split(smiles, [settings.train, settings.validation], seed)
        self.names = names
        # a rare n-gram stands many deviations out
        inputs = np.clip(standardise(features, parts[0]), -5, 5).astype(np.float32)
        self.x = torch.from_numpy(inputs)
        self.y = torch.from_numpy(standardise(values, parts[0]).astype(np.float32))
        self.train, self.validation, self.test = map(torch.from_numpy, parts)


class Results:
    """The errors of the trained networks, in a file: no group is trained twice for one seed."""

    def __init__(self, path, about):
        self.path, self.about = path, about
        self.kept = {"about": about, "networks": {}, "probes": {}}
        if path.exists():
            self.kept = json.loads(path.read_text())
            if self.kept["about"] != about:
                raise ValueError(
                    f"--out must be a new folder or one of the same run, got results of other "
                    f"settings or data in {path}"
                )

    def save(self):
        """All that there is; the old file stays until the new one is whole."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.kept, indent=1))
        new.replace(self.path)

    def missing(self, seed, groups):
        """Those of the groups that were not trained yet, each once."""
        known = self.kept["networks"].setdefault(str(seed), {})
        return [group for group in dict.fromkeys(groups) if _key(group) not in known]

    def put(self, seed, group, found):
        """The errors of one network: part of the table -> task -> mean squared error."""
        self.kept["networks"][str(seed)][_key(group)] = found

    def error(self, seed, group, task, part="test"):
        """A task's mean squared error (standardised) in the network of a group."""
        return self.kept["networks"][str(seed)][_key(group)][part][task]


def _key(group):
    return "|".join(group)


def measured_run(table, settings, seed, mode="exact", lr=None):
    """One training of all tasks together.

    Args:
        table: the seed's.
        settings: what the run is.
        seed: of first weights and batches.
        mode: of the probe; None: no probe.
        lr: of the look-ahead; None: the optimizer's own.

    Returns:
        The model, the record (None without a probe) and the loop's CPU seconds (on one thread).
    """
    torch.manual_seed(seed)
    model = Regressor(FEATURES, settings.width, table.names)
    steps = settings.epochs * (len(table.train) // settings.batch)
    optimizer, schedule = adam(model, settings.lr, steps)
    probe = None
    if mode is not None:
        probe = flatmtl.AffinityProbe(
            optimizer, mode=mode, every=settings.every, lr=lr, model=model
        )
    start = time.thread_time()
    for epoch in batches(table.train.numpy(), settings.batch, settings.epochs, seed):
        for rows in epoch:
            x, y = table.x[rows], dict(zip(table.names, table.y[rows].T, strict=True))

            def losses(tasks=tuple(table.names), x=x, y=y):
                predicted = model(x, tasks)
                return {t: torch.nn.functional.mse_loss(predicted[t], y[t]) for t in tasks}

            found = losses() if probe is None else probe(losses)
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            schedule.step()
        if probe is not None:
            probe.end_epoch()
    seconds = time.thread_time() - start
    return model, probe.record() if probe else None, seconds


def train_groups(table, settings, seed, groups, results, advance):
    """Trains a network for each group that has none yet: many at once in each of two threads.

    Two threads with one core each stand a busy machine better than torch's own two threads an operation.
    """
    missing = results.missing(seed, groups)
    size = min(settings.at_once, -(-len(missing) // WORKERS))
    parts = [missing[at : at + size] for at in range(0, len(missing), size or 1)]
    stop = threading.Event()
    torch.manual_seed(seed)
    start = Regressor(FEATURES, settings.width, table.names)
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            waiting = [
                pool.submit(_train, table, settings, seed, start, part, stop, advance)
                for part in parts
            ]
            for done in as_completed(waiting):
                for group, found in done.result().items():
                    results.put(seed, group, found)
                results.save()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _train(table, settings, seed, start, groups, stop, advance):
    """The errors of some groups' networks: group -> part of the table -> task -> mean squared error."""
    networks = Networks(start, groups)
    steps = settings.epochs * (len(table.train) // settings.batch)
    optimizer, schedule = adam(networks, settings.lr, steps)
    for epoch in batches(table.train.numpy(), settings.batch, settings.epochs, seed):
        for rows in epoch:
            if stop.is_set():
                return {}
            optimizer.zero_grad()
            networks.loss(table.x[rows], table.y[rows]).backward()
            optimizer.step()
            schedule.step()
        advance(len(groups) / settings.epochs, f"seed {seed}: networks")
    found = {group: {} for group in groups}
    for part, rows in (("validation", table.validation), ("test", table.test)):
        values = errors(networks, table.x, table.y, rows)
        for group, row in zip(groups, values, strict=True):
            found[group][part] = {task: float(row[table.names.index(task)]) for task in group}
    return found


def measure(table, settings, seed, results, folder, advance):
    """The seed's affinity record: read if it is there, else measured."""
    path = folder / f"affinity_seed{seed}.npz"
    if str(seed) in results.kept["probes"] and path.exists():
        return flatmtl.AffinityRecord.load(path)
    advance(0, f"seed {seed}: affinity")
    measured_run(table, settings, seed, mode=None)  # not timed: the first run is slower
    plain, _, plain_seconds = measured_run(table, settings, seed, mode=None)
    probed, record, seconds = measured_run(table, settings, seed)
    _, first, first_seconds = measured_run(table, settings, seed, mode="first_order")
    same = all(map(torch.equal, plain.parameters(), probed.parameters()))
    about = {
        "plain_s": plain_seconds,
        "exact_s": seconds,
        "first_order_s": first_seconds,
        "measured": int(record.steps.sum()),
        "same_weights": same,
        "agreement": [report.agreement(record.matrix("affinity"), record.matrix("first_order"))],
        "modes": report.agreement(record.matrix("first_order"), first.matrix("affinity")),
    }
    for lr in settings.look_aheads if seed == 0 else ():
        _, other, _ = measured_run(table, settings, seed, lr=lr)
        about["agreement"].append(
            {
                "lr": lr,
                **report.agreement(other.matrix("affinity"), other.matrix("first_order")),
                "own_rate": report.agreement(other.matrix("affinity"), record.matrix("affinity")),
            }
        )
    record.save(path)
    results.kept["probes"][str(seed)] = about
    results.save()
    return record


def by_kind(names, count):
    """The groups a chemist would write down: energies and strengths, or E1, E2, f1 and f2."""
    starts = {2: ("E", "f"), 4: KINDS}[count]
    return [tuple(name for name in names if name.startswith(start)) for start in starts]


def groupings(record, results, seed, settings):
    """(method, number of networks allowed) -> list of draws, each task -> the group that serves it."""
    names = list(record.tasks)
    found = {
        ("all together", 1): [dict.fromkeys(names, tuple(names))],
        ("single-task", len(names)): [{name: (name,) for name in names}],
    }
    single = {name: results.error(seed, (name,), name, "validation") for name in names}
    pairs = {
        pair: {name: results.error(seed, pair, name, "validation") for name in pair}
        for pair in itertools.combinations(names, 2)
    }
    hoa, hoa_tasks = hoa_matrix(single, pairs)
    texts = []
    for count in range(1, settings.most + 1):
        chosen = {
            "TAG": flatmtl.select_groups(record, count, near_ties=2),
            "TAG, rows normalised": flatmtl.select_groups(
                record.matrix(normalise=True), count, tasks=names
            ),
            "cosine": flatmtl.select_groups(record.matrix("cosine"), count, tasks=names),
            "HOA": flatmtl.select_groups(
                hoa, count, objective="hoa", minimise=True, tasks=hoa_tasks
            ),
        }
        texts.append(f"seed {seed}, at most {count}: TAG\n{chosen['TAG']}")
        if count == 1:
            continue  # one group is all together
        for method, grouping in chosen.items():
            served = {name: grouping.groups[grouping.served_by[name]] for name in names}
            found[method, count] = [served]
        found["random", count] = [
            _served(
                random_groups(names, count, seed=1000 * seed + 10 * count + draw, partition=True)
            )
            for draw in range(settings.draws)
        ]
        if count in (2, 4):
            found["by kind", count] = [_served(by_kind(names, count))]
    return found, texts


def _served(groups):
    return {name: tuple(group) for group in groups for name in group}


def one_seed(table, settings, seed, results, folder, advance):
    """The seed's record, its groupings and their networks, trained."""
    record = measure(table, settings, seed, results, folder, advance)
    names = table.names
    singles = [(name,) for name in names]
    pairs = list(itertools.combinations(names, 2))
    train_groups(table, settings, seed, [tuple(names), *singles, *pairs], results, advance)
    found, texts = groupings(record, results, seed, settings)
    needed = [group for draws in found.values() for draw in draws for group in draw.values()]
    train_groups(table, settings, seed, needed, results, advance)
    return record, found, texts


def run(data, folder, settings, seeds):
    """The whole experiment; returns its report as Markdown."""
    import matplotlib  # noqa: F401  # missing: said before the work, not after it

    folder.mkdir(parents=True, exist_ok=True)
    about = {"settings": json.loads(json.dumps(asdict(settings)))}
    about["data"] = zlib.crc32(data.read_bytes())
    torch.set_num_threads(1)
    results = Results(folder / "networks.json", about)
    start, busy = time.perf_counter(), time.process_time()
    smiles, names, values = read_table(data)
    features = ngram_features(smiles)
    by_seed, variances = [], []
    with progress(120 * seeds) as advance:  # about so many networks a seed
        for seed in range(seeds):
            table = Table(smiles, names, values, features, settings, seed)
            by_seed.append(one_seed(table, settings, seed, results, folder, advance))
            variances.append(table.y[table.test].var(0, correction=0).numpy())
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    text = report.write(by_seed, variances, results, folder, settings.most)
    text += f"\n{seconds:.0f} s in this call ({busy:.0f} CPU seconds), {WORKERS} threads\n"
    (folder / "affinity_qm8.md").write_text(text)
    return text


def main(arguments=None):
    """Reads the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="qm8.csv.gz (see the docstring)")
    parser.add_argument("--out", type=Path, default=Path("qm8-out"), help="default: qm8-out")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--quick", action="store_true", help="seconds; its numbers mean nothing")
    args = parser.parse_args(arguments)
    try:
        print(run(args.data, args.out, QUICK if args.quick else Settings(), args.seeds))
    except (OSError, ValueError, ImportError) as error:
        print(f"affinity_qm8: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from what is in {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
