"""AffinityProbe: which task's steps lower which task's loss, measured in the run of any training loop."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmtl import amp, graph, ops
from flatmtl.affinity.link import Link
from flatmtl.affinity.look_ahead import has_momentum
from flatmtl.affinity.meter import Meter, MeterOptions
from flatmtl.affinity.overlap import sample_overlap
from flatmtl.affinity.record import ORIENTATION, AffinityRecord
from flatmtl.buffers import BufferKeeper
from flatmtl.distributed.counts import Samples
from flatmtl.distributed.ranks import ProcessGroup, Ranks, find_ranks
from flatmtl.jacobian import Capture
from flatmtl.losses import Losses, TaskLosses, TaskName, read_losses
from flatmtl.replay import Generators
from flatmtl.roles import Layout, Roles, named_shared
from flatmtl.sharpness import check_whole
from flatmtl.watch import outside


class AffinityProbe:
    """Measures inter-task affinity while a model trains (TAG: Fifty et al., arXiv 2109.04617).

    Z[j, i] = 1 - L_j(after a step on task i) / L_j(before): row = recipient, column = source. Above zero,
    a step on task i alone lowers task j's loss. The step is one on the shared parameters, on the batch at
    hand, whose losses are then taken again, with the random numbers of the first time; parameters,
    gradients, module buffers, torch's global random numbers and the optimizer are left bit for bit as
    they would be without the probe.

    With a ``MultiTaskOptimizer`` the probe attaches itself and uses the gradients that the step has::

        optimizer = flatmtl.MultiTaskOptimizer(base, weighting=flatmtl.weighting.Mean(), model=model)
        probe = flatmtl.AffinityProbe(optimizer)
        ...                                       # train as ever: optimizer.step(closure)
        record = probe.record()
        print(flatmtl.select_groups(record, max_groups=3))

    With any other optimizer, the forward pass goes through the probe::

        losses = probe(closure)                   # in place of losses = closure()
        sum(losses).backward()
        optimizer.step()

    Args:
        optimizer: a ``MultiTaskOptimizer`` or any other torch optimizer of the model.
        mode: "exact": the steps are taken, one forward pass (without gradients) each. "first_order":
            lr * G_ji / L_j from the Gram matrix G of the task gradients, without any pass; nearly free
            with a MultiTaskOptimizer, which has G.
        every: a step in so many is measured (10 is what TAG's authors use).
        look_ahead: "sgd": a plain step, theta - lr * g. "optimizer": the step that the optimizer would make
            on that task's gradient, with its momentum and weight decay. With momentum the sign of Z
            means little: ``beyond_momentum`` has Z less that of a step on momentum alone. ("exact")
        lr: the step size; None: the learning rate, at that step, of the shared parameters. Tasks' loss
            falls are comparable under a schedule as ``affinity_per_lr``.
        momentum: "first_order" with torch's SGD: the momentum's part of the step is counted in (ETAP,
            arXiv 2602.18591).
        groups: sets of tasks whose joint step (on the sum of their losses) is measured too. ("exact")
        shared: the parameters that steps are taken on; None: those that at least two tasks reach. Not to be
            given with a MultiTaskOptimizer, which knows them.
        model: the module whose buffers (BatchNorm statistics) looks ahead must leave alone. Not to be given
            with a MultiTaskOptimizer, which has it.
        process_group: where several processes train together, each on its part of a batch: the group of
            them. "model": found from ``model``, a DistributedDataParallel (or one that holds some). None:
            this process measures what steps on its own part do. All measure what one process would on
            the whole batch, and have the same record. Not to be given with a MultiTaskOptimizer, which
            has it.

    Raises:
        TypeError, ValueError: an argument is none of the above; or the optimizer is a MultiTaskOptimizer
            without a gradient for each task (``SAMO``, ``CoopFlat``, ``Representation``), or without whole
            rows of them (``shard_rows``) in exact mode.
        NotImplementedError: the parameters are sharded (FSDP2).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        mode: Literal["exact", "first_order"] = "exact",
        every: int = 10,
        look_ahead: Literal["sgd", "optimizer"] = "sgd",
        lr: float | None = None,
        momentum: bool = False,
        groups: Iterable[Sequence[TaskName]] = (),
        shared: Iterable[Tensor] | None = None,
        model: nn.Module | None = None,
        process_group: ProcessGroup | Literal["model"] | None = "model",
    ) -> None:
        from flatmtl.optimizer import MultiTaskOptimizer  # which knows of probes

        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if mode not in ("exact", "first_order"):
            raise ValueError(f"mode must be 'exact' or 'first_order', got {mode!r}")
        if look_ahead not in ("sgd", "optimizer"):
            raise ValueError(f"look_ahead must be 'sgd' or 'optimizer', got {look_ahead!r}")
        sets = _read_groups(groups)
        if mode == "first_order" and (look_ahead != "sgd" or sets):
            raise ValueError(
                "look_ahead and groups must not be given in first_order mode, which takes no step: "
                "momentum=True counts momentum in, and a joint step is the sum of its columns"
            )
        if not isinstance(momentum, bool):
            raise TypeError(f"momentum must be True or False, got {momentum!r}")
        if momentum and mode == "exact":
            raise ValueError(
                "momentum is of first_order mode; look_ahead='optimizer' has it in exact mode"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        multi = optimizer if isinstance(optimizer, MultiTaskOptimizer) else None
        if multi is not None and (shared is not None or model is not None):
            raise ValueError(
                "shared and model must not be given with a MultiTaskOptimizer, which has its own"
            )
        if multi is not None and process_group != "model":
            raise ValueError(
                "process_group must not be given with a MultiTaskOptimizer, which has its own"
            )
        base = optimizer if multi is None else multi.base_optimizer
        if look_ahead == "optimizer" and isinstance(base, torch.optim.LBFGS):
            raise ValueError("look_ahead must be 'sgd' with LBFGS, which steps with a closure only")
        if momentum:
            _check_plain_momentum(base)
        options = MeterOptions(
            mode=mode,
            every=check_whole("every", every, 1),
            look_ahead=look_ahead,
            lr=None if lr is None else _read_lr(lr),
            push=momentum,
            momentum=momentum or (look_ahead == "optimizer" and has_momentum(base)),
            groups=sets,
        )
        self._multi, self._base = multi, base
        self._named = named_shared(shared, self._params(), _label)
        if self._named == []:
            raise ValueError("shared must hold at least one parameter, got none")
        kept = model if multi is None else multi.model
        self._clean = BufferKeeper(kept)  # as the forward pass left them
        self._before = BufferKeeper(kept)  # as they were before it
        self._reach: dict[Tensor, set[TaskName]] = {}  # parameter -> tasks that reach it
        self._roles: Roles | None = None
        self._meter = Meter(options, base, kept)
        self._ranks = (
            None if multi is not None else find_ranks(process_group, model, self._params())
        )
        if self._ranks is not None and self._ranks.copies:
            raise NotImplementedError("params must not be sharded (FSDP2) with an AffinityProbe")
        if multi is not None:
            multi._attach(self._meter)

    @property
    def steps(self) -> int:
        """Steps seen."""
        return self._meter.steps

    @property
    def measured(self) -> int:
        """Steps measured."""
        return self._meter.measured

    # ------------------------------------------------------------ in a loop

    def __call__(
        self,
        closure: Callable[[], Any],
        *,
        scaler: torch.amp.GradScaler | None = None,
        samples: Samples = None,
    ) -> Any:  # noqa: ANN401
        """Runs a forward pass, and measures if it is due.

        Args:
            closure: computes the task losses: a sequence of scalar tensors, a mapping from task names
                to them (in either, None for a task that is missing from the batch), or a 1-D tensor. At a
                measured step of exact mode it is called again, without gradients, for every task.
            scaler: the ``GradScaler`` of a float16 autocast region.
            samples: where several processes train: how many samples this one's losses are means of, as in
                ``MultiTaskOptimizer.step``.

        Returns:
            What the closure returned, its graph unused.

        Raises:
            RankFailedError: another process failed in this step; everything is as before.
            RuntimeError: the optimizer is a MultiTaskOptimizer (its ``step`` measures), or a CUDA graph
                is being captured.
            ValueError, TypeError: the losses do not fit; everything is as before.
        """
        if self._multi is not None:
            raise RuntimeError(
                "closure must go to optimizer.step(closure): the probe is attached to the optimizer"
            )
        if not callable(closure) or isinstance(closure, Tensor):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        if not self._meter.due:
            returned = closure()
            self._meter.made(None)
            return returned
        generators = Generators({p.device for p in self._params()})
        before = generators.state()
        if before is None:
            raise RuntimeError("closure must not be measured while a CUDA graph is captured")
        self._before.save()
        link = None if self._ranks is None else self._link(self._ranks, samples)
        try:
            returned = closure()
            after = generators.state()
            self._clean.save()  # a checkpointed layer updates its statistics in backward passes too
            try:
                self._measure(closure, returned, scaler, lambda: generators.set(before), link)
            finally:
                self._clean.restore(unseen=True)
                generators.set(after)
        except BaseException as failure:
            self._before.restore(unseen=True)
            generators.set(before)
            self._meter.drop()
            if link is not None and isinstance(failure, Exception):
                link.fail(failure)
            raise
        self._meter.made(None)
        return returned

    def _measure(
        self,
        closure: Callable[[], Any],
        returned: Losses,
        scaler: torch.amp.GradScaler | None,
        rewind: Callable[[], None],
        link: Link | None,
    ) -> None:
        partial = link is not None  # others have losses too
        losses = read_losses(returned, partial=partial)
        tasks = self._meter.settle_tasks(losses.names)
        losses = losses.in_order(tasks)
        if link is None or link.asks:
            self._look_at_graph(losses)
        present = {losses.names[task] for task in losses.present}
        if link is not None:
            present = link.agree(tasks, present, self._reach)
        roles = self._known_roles(tasks)
        if link is not None and link.asks:
            link.open(roles)
        if roles is None:
            self._meter.check_all_seen(present)
            return
        scale = amp.scale_of(scaler, roles.params)
        capture = Capture(roles, partial=True) if link is None else link.begin(roles)
        capture.add(losses, None, scale, retain_graph=True)
        found = capture.finish() if link is None else link.rows()

        def again() -> Sequence[Tensor | None]:
            rewind()
            self._before.restore(unseen=True)  # what the forward pass began with
            with nullcontext() if link is None else link.ranks.quiet():
                other = read_losses(closure(), graph=False, partial=partial)
            if set(other.names) != set(tasks):
                raise ValueError(
                    f"closure must return the losses of tasks {tasks} when called again, got {other.names}"
                )
            return other.in_order(tasks).detached

        step = None if link is None else link.step
        self._meter.at_rows(roles, found, losses.detached, scale, again, step)
        if roles.shared is not None:
            gram = ops.gram(roles.shared.jac)
            self._meter.at_gram(gram if scale is None else gram / scale.double().square())

    def _trainable(self) -> list[Tensor]:
        return [p for p in self._named or self._params() if p.requires_grad]

    def _look_at_graph(self, losses: TaskLosses) -> None:
        """Notes which parameters the tasks reach, where the shared ones are not named."""
        if self._named is not None:
            return
        params = self._trainable()
        if losses.together and not any(self._reach.values()):
            warnings.warn(
                "losses are entries of one tensor: every parameter that it depends on counts as shared. "
                "Where tasks have parameters of their own, return a list of losses, or name the "
                "shared parameters with shared=",
                stacklevel=outside(),
            )
        # those that the optimizer has no more are let go
        self._reach = {p: self._reach.get(p, set()) for p in self._params()}
        outputs = [losses.output(task) for task in losses.present]
        graph.check_checkpoints(outputs)
        reached = graph.reached(outputs, params)
        for task, hits in zip(losses.present, reached, strict=True):
            for k in hits:
                self._reach[params[k]].add(losses.names[task])

    def _known_roles(self, tasks: list[TaskName]) -> Roles | None:
        """The shared parameters, with rows for their gradients; None while none is known to be shared."""
        params = self._trainable()
        if self._named is None:
            least = min(2, len(tasks))
            params = [p for p in params if len(self._reach.get(p, ())) >= least]
        if not params:
            return None
        roles = self._roles
        if (
            roles is None
            or roles.tasks != tasks  # another order: a state was loaded
            or list(map(id, roles.params)) != list(map(id, params))
            or any(block.stale() for block in roles.blocks)
        ):
            layout = Layout(joined=self._ranks is not None)
            roles = self._roles = Roles(params, tasks, params, _label, layout)
        return roles

    def _link(self, ranks: Ranks, samples: Samples) -> Link:
        """What goes between the processes at a measured step."""
        tasks, params = self._meter.tasks, self._trainable()
        link = Link(ranks, self._meter, samples, params)
        reach = [self._reach.get(p, set()) for p in params]
        every: set[TaskName] = set().union(*reach)
        # else there is something to learn from further losses
        known = self._named is not None or (all(reach) and every.issuperset(tasks or ()))
        if ranks.agreed and tasks is not None and known:
            link.open(self._known_roles(tasks))
        return link

    def _params(self) -> list[Tensor]:
        return [p for group in self._base.param_groups for p in group["params"]]

    def end_epoch(self) -> None:
        """Ends an epoch: what is measured from now on is kept apart. Reads the device."""
        self._meter.end_epoch()

    def detach(self) -> None:
        """Ends the measuring at a MultiTaskOptimizer's steps.

        Raises:
            RuntimeError: it is not attached to one.
        """
        if self._multi is None:
            raise RuntimeError("the probe must be attached to a MultiTaskOptimizer to be detached")
        self._multi._detach(self._meter)

    # ------------------------------------------------------------ results

    def record(self, labelled: Any = None) -> AffinityRecord:  # noqa: ANN401
        """What was measured so far; reads the device.

        Args:
            labelled: bool [N, T], which samples of the training set have a label for which task: the
                overlap of tasks is then part of the record and of its caveats. None: not known.

        Raises:
            RuntimeError: no step was measured yet.
        """
        from flatmtl import __version__

        options, epochs = self._meter.options, self._meter.epochs()
        if self._meter.tasks is None or not any(steps for steps, _ in epochs):
            raise RuntimeError("there was no measured step yet: no record")
        names, tasks, groups = options.quantities, len(self._meter.tasks), len(options.groups)
        whole = np.zeros((len(epochs), 3, len(names), tasks, tasks))
        joint = np.zeros((len(epochs), 3, tasks, groups))
        for e, (_, parts) in enumerate(epochs):
            for kept, part in zip((whole, joint), parts, strict=False):
                kept[e] = part.numpy()
        count, mean, m2 = whole.swapaxes(0, 1)  # [E, Q, T, T] each
        of_groups, group_mean, group_m2 = joint.swapaxes(0, 1)  # [E, T, K] each
        mean, group_mean = (
            np.where(counts > 0, means, np.nan)
            for counts, means in ((count, mean), (of_groups, group_mean))
        )
        return AffinityRecord(
            tasks=list(self._meter.tasks),
            groups=list(options.groups),
            mean={name: mean[:, q] for q, name in enumerate(names)},
            m2={name: m2[:, q] for q, name in enumerate(names)},
            count={name: count[:, q].astype(np.int64) for q, name in enumerate(names)},
            group_mean=group_mean,
            group_m2=group_m2,
            group_count=of_groups.astype(np.int64),
            steps=np.array([steps for steps, _ in epochs], dtype=np.int64),
            metadata={
                "mode": options.mode,
                "look_ahead": options.look_ahead,
                "optimizer": type(self._base).__name__,
                "momentum": options.momentum,
                "every": options.every,
                "lr": self._meter.rates,
                "version": __version__,
                "orientation": ORIENTATION,
            },
            overlap=None if labelled is None else sample_overlap(labelled),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on measuring: tensors and plain values. Reads the device."""
        reach = [sorted(self._reach.get(p, ()), key=str) for p in self._params()]
        return {**self._meter.state_dict(), "reach": reach}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave, of a probe with the same arguments.

        Raises:
            ValueError: the probe that it is from measured other things.
        """
        params, reach = self._params(), state.get("reach", ())
        if self._multi is None and reach and len(reach) != len(params):
            raise ValueError(
                f"state must be of an optimizer of {len(params)} parameters, got {len(reach)}"
            )
        self._meter.load_state_dict(state)
        if self._multi is not None:
            self._multi._compare_probes()
        else:
            if self._ranks is not None:
                self._ranks.agreed = False
            self._reach = {p: set(tasks) for p, tasks in zip(params, reach, strict=False)}
            self._roles = None


def _read_groups(groups: object) -> list[tuple[TaskName, ...]]:
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be sets of tasks, got {groups!r}")
    found: list[tuple[TaskName, ...]] = []
    for group in groups:
        if isinstance(group, str) or not isinstance(group, Iterable):
            raise TypeError(f"groups must be sets of tasks, got {group!r} among them")
        names = tuple(group)
        for name in names:
            if isinstance(name, bool) or not isinstance(name, (int, str)):
                raise TypeError(f"groups must hold tasks' names or numbers, got {name!r}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"groups must hold one or more different tasks each, got {names}")
        if set(names) in map(set, found):
            raise ValueError(f"groups must be different sets of tasks, got {names} twice")
        found.append(names)
    return found


def _read_lr(lr: object) -> float:
    if isinstance(lr, bool) or not isinstance(lr, numbers.Real):
        raise TypeError(f"lr must be a number or None, got {type(lr).__name__}")
    if not (float(lr) > 0 and math.isfinite(float(lr))):
        raise ValueError(f"lr must be finite and above 0, got {lr}")
    return float(lr)


def _check_plain_momentum(optimizer: Optimizer) -> None:
    groups = optimizer.param_groups
    plain = isinstance(optimizer, torch.optim.SGD) and not any(
        group["nesterov"] or group["dampening"] or group["maximize"] for group in groups
    )
    if not plain:
        raise ValueError(
            "momentum must be that of torch.optim.SGD without nesterov, dampening or maximize, got "
            f"{type(optimizer).__name__}: look_ahead='optimizer' in exact mode takes any optimizer's step"
        )


def _label(param: Tensor) -> str:
    return f"a parameter of shape {list(param.shape)}"
