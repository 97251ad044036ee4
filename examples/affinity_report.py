"""Tables and pictures of `affinity_qm8.py`: what was measured, said in Markdown."""

import itertools

import numpy as np

import flatmtl


def agreement(a, b):
    """Correlations of the off-diagonal entries of two matrices [T, T]: Pearson's and Spearman's."""
    apart = ~np.eye(len(a), dtype=bool)
    x, y = a[apart], b[apart]
    return {
        "pearson": float(np.corrcoef(x, y)[0, 1]),
        "spearman": flatmtl.measures.spearman(x, y),
    }


def write(by_seed, variances, results, folder, most):
    """Draws the pictures into a folder; returns the text.

    Args:
        by_seed: (record, groupings, texts) of every seed; groupings: (method, networks allowed) ->
            list of draws, each task -> the group that serves it.
        variances: [T] a seed, of the standardised test targets.
        results: errors of the networks.
        folder: where pictures go.
        most: networks.
    """
    names = list(by_seed[0][0].tasks)
    errors = {key: _errors(by_seed, results, names, key) for key in by_seed[0][1]}
    networks = {
        key: np.mean(
            [len(set(served.values())) for _, found, _ in by_seed for served in found[key]]
        )
        for key in errors
    }
    lines = ["# Which of QM8's tasks should train together", ""]
    lines += _probe(results.kept["probes"])
    lines += ["## Groups", ""]
    for _, _, texts in by_seed:
        lines += itertools.chain.from_iterable(("```text", text, "```", "") for text in texts)
    lines += _table(errors, networks)
    lines += _by_task(errors, variances, names, most)
    lines += _gains(by_seed, results, names)
    _pictures(by_seed[0][0], errors, networks, folder, most)
    return "\n".join(lines)


def _errors(by_seed, results, names, key):
    """Test errors of one method: [seeds, draws, T]."""
    return np.array(
        [
            [[results.error(seed, served[name], name) for name in names] for served in found[key]]
            for seed, (_, found, _) in enumerate(by_seed)
        ]
    )


def _probe(probes):
    lines = ["## Exact and first-order affinity", ""]
    lines += [
        "Correlation over the pairs i != j of the run's means; both of the same steps.",
        "",
        "| seed | look-ahead rate | Pearson | Spearman |",
        "|---:|:---|---:|---:|",
    ]
    for seed, about in probes.items():
        for found in about["agreement"]:
            rate = found.get("lr", "the optimizer's")
            lines.append(f"| {seed} | {rate} | {found['pearson']:.6f} | {found['spearman']:.6f} |")
    lines.append("")
    for seed, about in probes.items():
        for found in about["agreement"]:
            if "own_rate" in found:
                lines.append(
                    f"Seed {seed}, exact affinity at rate {found['lr']} against the optimizer's own: "
                    f"Pearson {found['own_rate']['pearson']:.4f}, Spearman "
                    f"{found['own_rate']['spearman']:.4f}."
                )
        lines.append(
            f"Seed {seed}: {about['plain_s']:.2f} CPU seconds without a probe, {about['exact_s']:.2f} "
            f"with the exact one, {about['first_order_s']:.2f} with the first-order one (whose matrix "
            f"against the exact probe's first_order: Pearson {about['modes']['pearson']:.6f}); "
            f"{about['measured']} steps measured; weights with and without the exact probe "
            f"{'the same to the bit' if about['same_weights'] else 'DIFFER'}."
        )
    return [*lines, ""]


def _table(errors, networks):
    """Mean test error by method, and what it is against all together and random, seed by seed."""
    together = errors["all together", 1].mean(1)  # [S, T]
    lines = [
        "## Test error",
        "",
        f"Mean over the tasks of the mean squared error, targets standardised; mean ± deviation over "
        f"{len(together)} seeds. To all together: its change with the same seed, negative is better; by "
        "task: mean over the tasks of the change of each (every task counts the same, as in affinity). "
        "To random: the same two against the mean of the random groupings of as many networks.",
        "",
        "| method | networks allowed | trained | test error | to all together, % | by task, % | "
        "to random, % | by task, % | draws |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (method, count), found in errors.items():
        by_draw = found.mean(2)  # [S, D]
        by_seed = by_draw.mean(1)
        cells = [
            f"{method} | {count} | {networks[method, count]:.1f}",
            _spread(by_seed, 4),
            _spread(100 * (by_seed / together.mean(1) - 1), 2, "+"),
            _spread(100 * (found / together[:, None] - 1).mean((1, 2)), 2, "+"),
            "",
            "",
            "" if by_draw.shape[1] == 1 else f"{by_draw.min():.4f} to {by_draw.max():.4f}",
        ]
        if ("random", count) in errors and method != "random":
            chance = errors["random", count].mean(1)  # [S, T]
            cells[4] = _spread(100 * (by_seed / chance.mean(1) - 1), 2, "+")
            cells[5] = _spread(100 * (found / chance[:, None] - 1).mean((1, 2)), 2, "+")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _spread(values, digits, sign=""):
    deviation = values.std(ddof=1) if len(values) > 1 else np.nan  # one seed: not known
    return f"{values.mean():{sign}.{digits}f} ± {deviation:.{digits}f}"


def _by_task(errors, variances, names, most):
    """R2 of every task, mean over the seeds."""
    shown = [("all together", 1), *(("TAG", k) for k in range(2, most + 1)), ("HOA", most)]
    shown += [("random", most), ("single-task", len(names))]
    lines = [
        "## R² by task",
        "",
        "| task | " + " | ".join(f"{method} ({count})" for method, count in shown) + " |",
        "|:---|" + "---:|" * len(shown),
    ]
    scores = [(1 - errors[key].mean(1) / np.array(variances)).mean(0) for key in shown]  # [T] each
    for at, name in enumerate(names):
        lines.append(f"| {name} | " + " | ".join(f"{score[at]:.3f}" for score in scores) + " |")
    mean = " | ".join(f"{score.mean():.3f}" for score in scores)
    return [*lines, f"| mean | {mean} |", ""]


def pair_gains(results, seed, names, part="test"):
    """Share of a task's error alone that a partner removes: [T, T], row = recipient, 0 on the diagonal."""
    gains = np.zeros((len(names), len(names)))
    for i, j in itertools.permutations(range(len(names)), 2):
        pair = tuple(sorted((names[i], names[j]), key=names.index))
        alone = results.error(seed, (names[i],), names[i], part)
        gains[i, j] = 1 - results.error(seed, pair, names[i], part) / alone
    return gains


def _gains(by_seed, results, names):
    """Whether affinity tells which partner helps."""
    gains = [pair_gains(results, seed, names) for seed in range(len(by_seed))]
    mean_gain = np.mean(gains, 0)
    lines = [
        "## Affinity against the gain from a partner",
        "",
        "Gain: share of a task's single-task test error that training with one partner removes "
        "(12 x 11 pairs, row = recipient). Means over the seeds; by recipient: mean over the rows of the "
        "rank correlation within a row, which is what decides who is grouped with whom.",
        "",
        "| | Pearson | Spearman | by recipient |",
        "|:---|---:|---:|---:|",
    ]
    for quantity in ("affinity", "affinity_per_lr", "first_order", "cosine"):
        mean = np.mean([record.matrix(quantity) for record, _, _ in by_seed], 0)
        lines.append(f"| {quantity} | {_against(mean, mean_gain)} |")
    if len(gains) > 1:
        halves = [
            _against(gains[a], gains[b]) for a, b in itertools.combinations(range(len(gains)), 2)
        ]
        numbers = np.array([[float(cell) for cell in half.split("|")] for half in halves]).mean(0)
        cells = " | ".join(f"{value:.2f}" for value in numbers)
        lines.append(f"| gain of another seed (how far gains repeat at all) | {cells} |")
    rows = ", ".join(
        f"{name} {100 * row.mean():+.1f} ({100 * row.min():+.1f} to {100 * row.max():+.1f})"
        for name, row in zip(
            names, (np.delete(row, at) for at, row in enumerate(mean_gain)), strict=True
        )
    )
    return [*lines, "", f"Gain by recipient, %, mean (worst to best partner): {rows}.", ""]


def _against(predicted, gain):
    found = agreement(predicted, gain)
    within = []
    for at in range(len(gain)):
        row = [np.argsort(np.argsort(np.delete(matrix[at], at))) for matrix in (predicted, gain)]
        within.append(np.corrcoef(*row)[0, 1])
    return f"{found['pearson']:.2f} | {found['spearman']:.2f} | {np.mean(within):.2f}"


def _pictures(record, errors, networks, folder, most):
    from matplotlib.figure import Figure

    import flatmtl.plots

    for quantity in ("affinity", "first_order", "cosine"):
        figure = Figure(figsize=(9, 8), layout="constrained")
        flatmtl.plots.affinity(record, figure.add_subplot(), quantity=quantity)
        figure.savefig(folder / f"{quantity}.png", dpi=110)
    figure = Figure(figsize=(9, 5), layout="constrained")
    flatmtl.plots.affinity_over_time(record, figure.add_subplot())
    figure.savefig(folder / "affinity_over_time.png", dpi=110)
    chosen = [flatmtl.select_groups(record, count) for count in range(1, most + 1)]
    for count, grouping in enumerate(chosen, 1):
        flatmtl.plots.grouping_report(record, grouping, folder / f"groups_{count}.png")

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.add_subplot()
    methods = dict.fromkeys(method for method, _ in errors)
    for method in methods:
        keys = [key for key in errors if key[0] == method]
        values = np.array([errors[key].mean((1, 2)) for key in keys])  # [counts, S]
        ax.errorbar(
            [networks[key] for key in keys],
            values.mean(1),
            values.std(1, ddof=1) if values.shape[1] > 1 else None,
            marker="o",
            capsize=3,
            label=method,
        )
    ax.set(xlabel="networks trained", ylabel="mean test error (standardised)", xscale="log")
    ax.legend(frameon=False)
    figure.savefig(folder / "errors.png", dpi=110)
