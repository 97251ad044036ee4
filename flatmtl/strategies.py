"""Strategies: gradients at other points than the parameters, for other ends than SAM's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from flatmtl.losses import TaskName
from flatmtl.sharpness import check_flag, check_radius, check_whole
from flatmtl.weighting import Mean, Weighting


@dataclass(frozen=True)
class MAML:
    """Every task's gradient behind a step of its own (MAML, Finn et al., arXiv 1703.03400).

    For task i, over the shared parameters and task i's own ones together: theta_i' = theta - lr grad
    L_i(theta), and s_i = grad L_i(theta_i'), of query data if the closure has an argument ``query``: it is
    then called with ``query=True`` for these passes. One without it uses the same batch for both. The
    weighting aggregates the s_i of the shared parameters (``Sum()`` is the paper's); a task's own ones get
    its own s_i. The losses that a step returns are those at theta.

    A step is 1 forward and T backwards, then T forwards and T backwards. The full form has T more forwards
    and 2T more backwards, T of them through the graph of the others.

    Args:
        lr: the inner step size (alpha in the paper), the same for all parameters. 0: s_i is the gradient
            at theta.
        first_order: s_i as it is (the paper's first-order approximation). False: the gradient through the
            inner step, (I - lr H_i) s_i, H_i being the Hessian of L_i at theta over shared and own parameters
            jointly. What the closure runs must have second derivatives. Its forward pass at theta runs
            again: with dropout, give ``replay_rng=True``, or H_i is of other masks than the inner step.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    lr: float
    first_order: bool = True

    def __post_init__(self) -> None:
        check_radius("lr", self.lr)
        check_flag("first_order", self.first_order)


SubModels = Sequence[Iterable[Tensor]] | Mapping[TaskName, Iterable[Tensor]]


@dataclass(frozen=True, eq=False)
class CoopFlat:
    """``coop_flat``: sub-models in turn, each robust to noise on the others. A reconstruction.

    It stands in for Wu et al., "Searching for Flat Minima" (arXiv 2309.12090), of which the abstract alone
    was read: the sub-model of each task is updated alternately, with the learned sub-models of the others,
    and flat minima are sought with regard to features from other tasks. The formula is this project's, not
    the paper's; uniform noise within 0.01, two draws a step, is what a public code for flat minima in another
    field does (F2M).

    Step n is the turn of task i = n // steps mod T. Its sub-model theta_i, and the parameters that are in no
    sub-model, get grad mean_m L_i(theta_i; theta_-i + eps_m), eps_m ~ U(-bound, bound) element by element on
    the other sub-models (of frozen parameters: none). The others' ``.grad`` is None: they stay. In a turn
    whose task is missing from the batch nothing moves.

    A step is 1 forward, for the losses that it returns, then ``samples`` forwards and ``samples`` backwards;
    without noise 1 forward and 1 backward. There is nothing to weight: ``weighting`` must be ``Mean()``.

    Args:
        sub_models: the parameters of each task's sub-model: a sequence in the order of the tasks, or a
            mapping from their names. Parameters of the optimizer in none of them are common.
        bound: of the noise, in the parameters' unit. 0: none.
        samples: draws of the noise a step. 0: none.
        steps: so many steps make a turn.
        seed: of the noise; the global generators are left alone.

    Raises:
        TypeError, ValueError: an argument is out of range, or a parameter is in two sub-models.
    """

    sub_models: SubModels = field(repr=False)
    bound: float = 0.01
    samples: int = 2
    steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sub_models", _read_sub_models(self.sub_models))
        check_radius("bound", self.bound)
        check_whole("samples", self.samples, 0)
        check_whole("steps", self.steps, 1)
        check_whole("seed", self.seed, 0)

    @property
    def draws(self) -> int:
        """How often noise is drawn a step."""
        return self.samples if self.bound else 0

    def turn(self, step: int, tasks: int) -> int:
        """The task whose turn it is."""
        return step // self.steps % tasks

    def owners(self, tasks: Sequence[TaskName]) -> dict[int, int]:
        """id(parameter) -> the number of the task whose sub-model has it.

        Raises:
            ValueError: the sub-models are not those of these tasks.
        """
        models = self.sub_models
        if isinstance(models, Mapping):
            fits, got = set(models) == set(tasks), str(list(models))
            ordered = [models[name] for name in tasks] if fits else []
        else:
            fits, got, ordered = len(models) == len(tasks), str(len(models)), list(models)
        if not fits:
            raise ValueError(f"sub_models must be one for each of tasks {list(tasks)}, got {got}")
        return {id(p): task for task, params in enumerate(ordered) for p in params}

    def check_held(self, params: Iterable[Tensor]) -> None:
        """Raises ValueError if a parameter of a sub-model is not among the optimizer's."""
        known = {id(p) for p in params}
        for name, listed in _named(self.sub_models):
            for k, param in enumerate(listed):
                if id(param) not in known:
                    raise ValueError(
                        f"sub_models[{name!r}] must hold the optimizer's parameters, got another tensor of "
                        f"shape {list(param.shape)} (number {k})"
                    )


Strategy = MAML | CoopFlat


def _named(models: SubModels) -> Iterable[tuple[TaskName, Iterable[Tensor]]]:
    return models.items() if isinstance(models, Mapping) else enumerate(models)


def _read_sub_models(given: object) -> SubModels:
    """Sub-models as tuples of parameters."""
    if not isinstance(given, (Sequence, Mapping)) or isinstance(given, (str, bytes)):
        raise TypeError(
            "sub_models must be a sequence, or a mapping from task names, of lists of parameters, got "
            f"{type(given).__name__}"
        )
    if not given:
        raise ValueError("sub_models must hold at least one sub-model, got none")
    found: dict[TaskName, tuple[Tensor, ...]] = {}
    where: dict[int, TaskName] = {}
    for name, params in _named(given):
        if isinstance(params, Tensor) or not isinstance(params, Iterable):
            raise TypeError(
                f"sub_models[{name!r}] must be an iterable of parameters, got {type(params).__name__}"
            )
        found[name] = tuple(params)
        for param in found[name]:
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"sub_models[{name!r}] must hold parameters, got {type(param).__name__}"
                )
            if id(param) in where:
                raise ValueError(
                    f"sub_models must name every parameter once, got one of shape {list(param.shape)} in "
                    f"sub_models[{where[id(param)]!r}] and sub_models[{name!r}]"
                )
            where[id(param)] = name
        if not found[name]:
            raise ValueError(f"sub_models[{name!r}] must hold at least one parameter, got none")
    return found if isinstance(given, Mapping) else tuple(found.values())


def check_fits(
    strategy: Strategy,
    params: Iterable[Tensor],
    *,
    weighting: Weighting,
    weights_every: int,
    sequential: bool,
    **others: object,
) -> None:
    """Checks a strategy against the other arguments of a ``MultiTaskOptimizer``.

    Args:
        strategy: the strategy.
        params: the optimizer's parameters.
        weighting: as given.
        weights_every: as given.
        sequential: whether ``jacobian`` is.
        others: arguments that ``CoopFlat`` has no use for, as given; None where left out.

    Raises:
        ValueError: they do not go together.
    """
    name = type(strategy).__name__
    if weights_every > 1:
        raise ValueError(f"weights_every must be 1 with {name}, got {weights_every}")
    if isinstance(strategy, MAML):
        return
    strategy.check_held(params)
    if type(weighting) is not Mean:
        raise ValueError(
            f"weighting must be Mean() with {name}, got {type(weighting).__name__}: a step is one "
            "task's, there is nothing to weight"
        )
    if not sequential:
        raise ValueError(f"jacobian must be 'sequential' with {name}: a step is one task's")
    for argument, value in others.items():
        if value is not None:
            raise ValueError(
                f"{argument} must be None with {name}: sub_models tells what is whose, and a step keeps no "
                f"rows of gradients; got {value!r}"
            )
