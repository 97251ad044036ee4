"""The loss-space methods from their formulas, in plain numpy float64: task by task, call by call."""

from __future__ import annotations

import itertools

import numpy as np

Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


class Slaw:
    """Means of L and L^2: arithmetic for 1 / (1 - beta) calls, then exponential, from all that was seen."""

    def __init__(self, tasks: int, beta: float = 0.99, eps: float = 1e-5) -> None:
        self.seen: list[list[float]] = [[] for _ in range(tasks)]
        self.beta, self.eps = beta, eps

    def deviation(self, values: list[float]) -> float:
        many = round(1 / (1 - self.beta))
        first = np.array(values[:many])
        mean = float(first.mean())
        variance = float(((first - mean) ** 2).mean())
        for value in values[many:]:
            new = self.beta * mean + (1 - self.beta) * value
            # E[L^2] about the new mean, so that nothing cancels
            variance = (
                self.beta * (variance + (mean - new) ** 2) + (1 - self.beta) * (value - new) ** 2
            )
            mean = new
        return max(np.sqrt(variance), self.eps)

    def __call__(self, losses: Array, there: Array) -> Array:
        for task in np.flatnonzero(there):
            self.seen[task].append(float(losses[task]))
        w = np.zeros(len(losses))
        known = [t for t in np.flatnonzero(there) if len(self.seen[t]) > 1]
        w[there] = 1.0
        inverse = np.array([1 / self.deviation(self.seen[t]) for t in known])
        if known:
            w[known] = len(known) * inverse / inverse.sum()
        return w


class Famo:
    def __init__(self, tasks: int, lr=0.025, decay=1e-3, low=0.0, eps=1e-8) -> None:
        self.xi, self.m, self.v, self.n = (np.zeros(tasks) for _ in range(4))
        self.lr, self.decay, self.low, self.eps = lr, decay, low, eps

    def distance(self, losses: Array) -> Array:
        return np.maximum(losses - self.low, 0) + self.eps

    def __call__(self, losses: Array, there: Array) -> Array:
        self.before, self.there = self.distance(losses), there
        w = np.zeros(len(losses))
        z = softmax(self.xi[there])
        w[there] = z / self.before[there] / (z / self.before[there]).sum()
        return w

    def update(self, losses: Array, there: Array) -> None:
        on = np.flatnonzero(there & self.there)
        if len(on) == 0:
            return
        delta = np.log(self.before[on]) - np.log(self.distance(losses)[on])
        z = softmax(self.xi[on])
        jacobian = np.diag(z) - np.outer(z, z)
        g = jacobian @ delta + self.decay * self.xi[on]
        self.n[on] += 1
        self.m[on] = 0.9 * self.m[on] + 0.1 * g
        self.v[on] = 0.999 * self.v[on] + 0.001 * g * g
        m, v = self.m[on] / (1 - 0.9 ** self.n[on]), self.v[on] / (1 - 0.999 ** self.n[on])
        self.xi[on] -= self.lr * m / (np.sqrt(v) + 1e-8)


class Dwa:
    def __init__(self, tasks: int, temperature=2.0, steps=1) -> None:
        self.seen: list[list[float]] = [[] for _ in range(tasks)]
        self.temperature, self.steps = temperature, steps

    def __call__(self, losses: Array, there: Array) -> Array:
        rates = []
        on = np.flatnonzero(there)
        for task in on:
            seen, k = self.seen[task], self.steps
            periods = [np.mean(seen[i : i + k]) for i in range(0, len(seen) - k + 1, k)]
            rates.append(periods[-1] / periods[-2] if len(periods) > 1 else 1.0)
            seen.append(float(losses[task]))
        w = np.zeros(len(losses))
        w[on] = len(on) * softmax(np.array(rates) / self.temperature)
        return w


class StchWarm:
    def __init__(self, tasks: int, mu: float, warmup: int, average: int) -> None:
        self.seen: list[list[float]] = [[] for _ in range(tasks)]
        self.mu, self.warmup, self.average = mu, warmup, average

    def __call__(self, losses: Array, there: Array) -> Array:
        w = np.zeros(len(losses))
        ready = [t for t in np.flatnonzero(there) if len(self.seen[t]) >= self.warmup]
        w[there] = 1 / losses[there]
        if ready:
            m = [np.mean(self.seen[t][self.warmup - self.average : self.warmup]) for t in ready]
            w[ready] *= len(ready) * softmax(np.log(losses[ready] / m) / self.mu)
        for task in np.flatnonzero(there):
            self.seen[task].append(float(losses[task]))
        return w


class Go4Align:
    def __init__(self, tasks: int, groups: int, beta: float = 1e-4) -> None:
        self.q, self.groups, self.beta = np.full(tasks, 1 / tasks), groups, beta

    def __call__(self, losses: Array, there: Array) -> Array:
        part = self.q[there].sum()
        q = self.q[there] * np.exp(-self.beta * losses[there])
        self.q[there] = part * q / q.sum()
        gamma = losses[there].mean() / losses[there] * self.q[there]
        w = np.zeros(len(losses))
        w[there] = k_means(gamma, min(self.groups, len(gamma)))
        return w


def k_means(values: Array, groups: int) -> Array:
    """Each value's centre, by trying all ways to cut the sorted values."""
    order = np.argsort(values)
    x = values[order]
    best, found = np.inf, x
    for cuts in itertools.combinations(range(1, len(x)), groups - 1):
        parts = np.split(x, cuts)
        cost = sum(((p - p.mean()) ** 2).sum() for p in parts)
        if cost < best:
            best, found = cost, np.concatenate([np.full(len(p), p.mean()) for p in parts])
    result = np.empty_like(x)
    result[order] = found
    return result


# ---- functions of the losses alone ------------------------------------------------------------


def uw(losses: Array, s: Array) -> tuple[Array, Array]:
    return 0.5 * np.exp(-s), 0.5 - 0.5 * np.exp(-s) * losses


def imtl_l(losses: Array, s: Array) -> tuple[Array, Array]:
    return np.exp(s), np.exp(s) * losses - 1


def gls(losses: Array) -> Array:
    return np.exp(np.log(losses).mean()) / (len(losses) * losses)


def bmtl(losses: Array, temperature: float, bounded: bool) -> Array:
    if bounded:
        return len(losses) * softmax(losses / temperature)
    return np.exp(losses / temperature) / temperature


def stch(losses: Array, mu: float, preference: Array, reference: Array) -> Array:
    return preference * softmax(preference * (losses - reference) / mu)
