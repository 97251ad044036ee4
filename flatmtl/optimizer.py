"""MultiTaskOptimizer: per-task gradients, aggregation and FS-MTL around any torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmtl import ops
from flatmtl.block import Block
from flatmtl.buffers import BufferKeeper, watch_for_running_statistics
from flatmtl.jacobian import Captured, capture, capture_perturbed
from flatmtl.losses import Losses, TaskLosses, read_losses
from flatmtl.nonfinite import NonfiniteWatch
from flatmtl.roles import Roles, named_shared
from flatmtl.sharpness import SAM, check_radius
from flatmtl.weighting import SolveStatus, Weighting

Closure = Callable[..., Losses]


def _restore_all(kept: Sequence[Block | BufferKeeper]) -> None:
    """Restores every one, should one fail; then raises the first failure."""
    failures: list[BaseException] = []
    for one in kept:
        try:
            one.restore()
        except BaseException as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


class MultiTaskOptimizer(Optimizer):
    """Trains several tasks with one shared network, each task's gradient seen on its own.

    Wraps any ``torch.optim.Optimizer`` and shares its ``param_groups`` and ``state``, so that learning
    rate schedulers, checkpoints and step hooks work on either. At a step, the gradients of all task losses
    with respect to the shared parameters are captured, weighted by ``weighting`` (PCGrad, MGDA, ...)
    and combined into ``.grad``; parameters that only one task reaches get that task's own gradient.
    Then the base optimizer steps::

        base = torch.optim.Adam(model.parameters(), lr=1e-3)
        optimizer = flatmtl.MultiTaskOptimizer(base, weighting=flatmtl.weighting.PCGrad(), model=model)
        losses = optimizer.step(lambda: [loss_a(model(x), y), loss_b(model(x), z)])

    With ``sharpness=SAM(...)`` it is FS-MTL (Phan et al., arXiv 2211.13723, Alg. 1): every task's
    gradient is taken again at its own perturbed parameters; the losses' gradients and the flat parts
    (perturbed minus plain gradient) are aggregated separately and added; a task's own parameters get
    their perturbed gradient.

    Args:
        base_optimizer: the optimizer that makes the update.
        weighting: a ``flatmtl.weighting.Weighting``.
        sharpness: ``SAM(...)``, or None for the plain method. The radius lives in the parameter groups
            as ``"rho"`` and can be edited there at any time.
        shared: the shared parameters; by default those that at least two tasks reach (all reached
            ones if there is one task).
        model: the module whose buffers (BatchNorm statistics) the perturbed passes must leave alone,
            and whose parameter names errors should use.
        nonfinite: what a NaN or infinity in a task's gradient does. "raise": FloatingPointError, with
            all parameters as they were. On CUDA, where looking at once would stall the device, the
            task is left out of that step as with "mask" and the error comes from a later call. "mask":
            the task is left out (weight 0, own parameters' gradient 0); ``last_status()`` tells.

    Raises:
        TypeError, ValueError: an argument is none of the above.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        weighting: Weighting,
        sharpness: SAM | None = None,
        shared: Iterable[Tensor] | None = None,
        model: nn.Module | None = None,
        nonfinite: Literal["raise", "mask"] = "raise",
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                "base_optimizer must be a torch.optim.Optimizer, got "
                + (
                    base_optimizer if isinstance(base_optimizer, type) else type(base_optimizer)
                ).__name__
            )
        if isinstance(base_optimizer, torch.optim.LBFGS):
            raise TypeError("base_optimizer must step without a closure, got LBFGS")
        if not isinstance(weighting, Weighting):
            raise TypeError(
                "weighting must be a flatmtl Weighting (flatmtl.weighting.by_name makes one from a "
                f"name), got {weighting!r}"
            )
        if sharpness is not None and not isinstance(sharpness, SAM):
            raise TypeError(f"sharpness must be flatmtl.SAM(...) or None, got {sharpness!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if nonfinite not in ("raise", "mask"):
            raise ValueError(f"nonfinite must be 'raise' or 'mask', got {nonfinite!r}")
        # The hooks' registries only: param_groups, state and defaults are the base optimizer's.
        super().__init__([torch.empty(0)], {})
        self.base_optimizer = base_optimizer
        self.weighting = weighting
        self.flat_weighting = weighting.twin() if sharpness is not None else None
        self.sharpness = sharpness
        self.model = model
        self.nonfinite = nonfinite
        self._shared = named_shared(shared, self._all_params(), self._label)
        self._start_anew()
        for group in self.param_groups:
            self._default_rho(group)

    def _start_anew(self) -> None:
        """What a copy does not inherit: roles and buffers are found again at its first step."""
        self._roles: Roles | None = None
        self._before = BufferKeeper(self.model)  # as they were before the step
        self._clean = BufferKeeper(self.model)  # as the clean pass left them
        self._watch = NonfiniteWatch()
        self._watched = False  # a perturbed pass has been watched for running statistics
        self._pending = False  # backward() has run and step() has not
        self._finite: Tensor | None = None
        self._statuses: dict[str, SolveStatus] = {}  # of the last step's aggregations

    _KEPT = (
        "base_optimizer",
        "weighting",
        "flat_weighting",
        "sharpness",
        "model",
        "nonfinite",
        "_shared",
    )

    def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: self.__dict__[name] for name in self._KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__init__(self, [torch.empty(0)], {})
        self.__dict__.update(state)
        self._start_anew()

    # ------------------------------------------------------------ the base optimizer's own things

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's parameter groups: the same objects."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]  # noqa: ANN401
        """The base optimizer's state: the same object."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:  # noqa: ANN401
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; ``"rho"`` defaults to the sharpness's."""
        if "base_optimizer" not in self.__dict__:
            return  # Optimizer.__init__ before the base is known
        self._check_group(param_group)
        self.base_optimizer.add_param_group(param_group)
        self._default_rho(self.param_groups[-1])
        self._roles = None

    def _check_group(self, group: dict[str, Any]) -> None:
        if self.sharpness is not None and group.get("maximize"):
            raise ValueError("base_optimizer must minimise with sharpness, got maximize=True")

    def _default_rho(self, group: dict[str, Any]) -> None:
        self._check_group(group)
        if self.sharpness is not None:
            group.setdefault("rho", self.sharpness.rho)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _label(self, param: Tensor) -> str:
        if self.model is not None:
            for name, other in self.model.named_parameters():
                if other is param:
                    return f"parameter {name!r}"
        for g, group in enumerate(self.param_groups):
            for k, other in enumerate(group["params"]):
                if other is param:
                    return f"parameter {k} of group {g} (shape {list(param.shape)})"
        return f"parameter of shape {list(param.shape)}"

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with an entry ``"flatmtl"`` for the weightings' state."""
        own: dict[str, Any] = {"weighting": self.weighting.state_dict()}
        if self.flat_weighting is not None:
            own["flat_weighting"] = self.flat_weighting.state_dict()
        return {**self.base_optimizer.state_dict(), "flatmtl": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state; one of the plain base optimizer is taken too (weightings start anew).

        Raises:
            ValueError: it does not fit the base optimizer or the weighting.
        """
        own = state_dict.get("flatmtl", {})
        base = {key: value for key, value in state_dict.items() if key != "flatmtl"}
        for group in base.get("param_groups", ()):
            self._check_group(group)
        weightings = {"weighting": self.weighting, "flat_weighting": self.flat_weighting}
        before = {name: w.state_dict() for name, w in weightings.items() if w is not None}
        try:
            self._load_weightings(own)
            self.base_optimizer.load_state_dict(base)
        except BaseException:
            self._load_weightings(before)
            raise
        for group in self.param_groups:
            self._default_rho(group)

    def _load_weightings(self, states: dict[str, Any]) -> None:
        for name in ("weighting", "flat_weighting"):
            weighting = getattr(self, name)
            if weighting is None:
                continue
            if name in states:
                weighting.load_state_dict(states[name])
            else:
                weighting.reset()

    # ------------------------------------------------------------ a step

    def step(self, closure: Closure | None = None) -> Losses | None:  # type: ignore[override]
        """One training step.

        Args:
            closure: computes the task losses: a sequence of scalar tensors, a mapping from task names
                to them, or a 1-D tensor. It runs the forward pass only: no ``backward()``, no
                ``zero_grad()``. With sharpness it is called once plainly and once for every task; if
                it takes an argument ``tasks``, those calls pass ``tasks=[i]`` (the task's number, or
                its name if it returns a mapping) and it may return that task's loss alone. Without
                sharpness it may be left out after ``backward(losses)``.

        Returns:
            The losses of the clean pass, detached, as the closure returned them; None without one.

        Raises:
            ValueError, TypeError: the losses do not fit. Parameters are as they were.
            FloatingPointError: a gradient is not finite (``nonfinite="raise"``).
            RuntimeError: neither a closure nor a ``backward()`` before.
        """
        self._watch.poll()
        if closure is None:
            if self.sharpness is not None:
                raise ValueError("closure must be given with sharpness: it runs several passes")
            if not self._pending:
                raise RuntimeError(
                    "closure must be given, or backward(losses) called before step()"
                )
            self._pending = False
            self.base_optimizer.step()
            return None
        self._pending = False
        radii = self._radii()
        if not any(radii.values()):
            with torch.enable_grad():
                losses = read_losses(closure())
            self._plain_gradients(losses)
        else:
            self._before.save()
            try:
                with torch.enable_grad():
                    losses = read_losses(closure())
                self._flat_gradients(closure, losses, radii)
            except BaseException:
                self._before.restore()
                raise
        self.base_optimizer.step()
        return losses.values

    def backward(self, losses: Losses) -> None:
        """Writes the aggregated gradients into ``.grad``, so that clipping fits before ``step()``.

        Args:
            losses: as a closure of ``step`` returns them.

        Raises:
            ValueError: sharpness needs ``step(closure)``; or the losses do not fit.
            FloatingPointError: a gradient is not finite (``nonfinite="raise"``).
        """
        if self.sharpness is not None:
            raise ValueError("backward must not be used with sharpness: give step() a closure")
        self._pending = False
        self._watch.poll()
        self._plain_gradients(read_losses(losses))
        self._pending = True

    def last_status(self) -> dict[str, Any]:
        """What the last step found; reading it waits for the device.

        Returns:
            "finite": whether each task's gradients were, by name; "loss" and, with sharpness, "flat":
            the ``SolveStatus`` of each aggregation that it came to.

        Raises:
            RuntimeError: there was no step yet.
        """
        if self._finite is None or self._roles is None:
            raise RuntimeError("there was no step yet: no status")
        finite = dict(zip(self._roles.tasks, self._finite.tolist(), strict=True))
        return {"finite": finite, **self._statuses}

    def _radii(self) -> dict[int, float]:
        """id(parameter) -> rho; empty without sharpness."""
        if self.sharpness is None:
            return {}
        radii: dict[int, float] = {}
        for group in self.param_groups:
            self._default_rho(group)  # a group may have come through the base optimizer
            rho = check_radius("rho", group["rho"])
            radii.update((id(p), rho) for p in group["params"])
        return radii

    def _capture(self, losses: TaskLosses) -> tuple[Roles, Captured]:
        self._statuses = {}
        params = [p for p in self._all_params() if p.requires_grad]
        if not params:
            raise ValueError("params must hold at least one that requires grad, got none")
        roles = self._roles
        if roles is not None and set(losses.names) == set(roles.tasks):
            losses = losses.in_order(roles.tasks)
        if roles is not None and losses.names != roles.tasks:
            raise ValueError(
                f"losses must be of the tasks {roles.tasks}, as before, got {losses.names}"
            )
        if roles is None or list(map(id, params)) != list(map(id, roles.params)):
            roles = Roles(params, losses.names, self._shared, self._label)
        captured = capture(losses, roles, params[0].device)
        self._roles = roles  # only once its roles held
        losses.outputs.clear()  # what is left of the graphs is not needed any more
        return roles, captured

    def _check_finite(self, roles: Roles, finite: Tensor) -> None:
        """Remembers which tasks' gradients are finite ([T] bool), and acts on it as asked."""
        self._finite = finite
        if self.nonfinite == "raise":
            self._watch.post(finite, roles.tasks)

    def _finite_tasks(self, captured: Captured) -> Tensor:
        finite = captured.shared_sq.isfinite()
        for task, sq in captured.own_sq.items():
            finite[task] &= sq.to(finite.device).isfinite()
        return finite

    def _weights(self, weighting: Weighting, gram: Tensor, finite: Tensor) -> Tensor:
        """gram [T, T] -> weights [T]; a task that is not finite anywhere counts as without gradient."""
        both = finite.unsqueeze(1) & finite.unsqueeze(0)
        weights = weighting(torch.where(both, gram, torch.zeros_like(gram)))
        name = "loss" if weighting is self.weighting else "flat"
        self._statuses[name] = weighting.last_status()
        return weights

    def _plain_gradients(self, losses: TaskLosses) -> None:
        roles, captured = self._capture(losses)
        finite = self._finite_tasks(captured)
        self._check_finite(roles, finite)
        if roles.shared is not None:
            weights = self._weights(self.weighting, self._gram(roles, captured), finite)
            ops.combine(roles.shared.jac, weights, roles.shared.update)
        self._write_grads(roles, captured, finite, perturbed=False)

    def _gram(self, roles: Roles, captured: Captured) -> Tensor:
        assert roles.shared is not None
        if self.weighting.diagonal_only:
            return captured.shared_sq.diag()  # the packing has counted the norms already
        return ops.gram(roles.shared.jac)

    def _flat_gradients(
        self, closure: Closure, losses: TaskLosses, radii: dict[int, float]
    ) -> None:
        assert self.flat_weighting is not None
        roles, captured = self._capture(losses)
        finite = self._finite_tasks(captured)
        self._check_finite(roles, finite)
        # Only the plain gradients are known yet, so that a failure up to here has changed nothing.
        by_task = "tasks" in inspect.signature(closure).parameters
        self._clean.save()
        blocks = [b for b in (roles.shared, *roles.own.values()) if b is not None]
        for block in blocks:
            block.save()
        watching = self.model is None and not self._watched
        perturbed_sq: list[list[Tensor]] = []
        try:
            with watch_for_running_statistics(watching):
                for task, name in enumerate(roles.tasks):
                    self._perturb(roles, captured, task, radii)
                    with torch.enable_grad():
                        again = read_losses(closure(tasks=[name]) if by_task else closure())
                    position = self._position(again, roles, task, alone=by_task)
                    perturbed_sq.append(capture_perturbed(again, task, position, roles))
                    del again
                    if task in roles.own:
                        roles.own[task].restore()
        finally:
            _restore_all([*blocks, self._clean])
        self._watched = True
        for task, norms in enumerate(perturbed_sq):
            for sq in norms:
                finite[task] &= sq.to(finite.device).isfinite()
        self._check_finite(roles, finite)
        if roles.shared is not None:
            jac, sam = roles.shared.jac, roles.shared.sam
            loss_weights = self._weights(self.weighting, self._gram(roles, captured), finite)
            flat_gram = ops.gram_difference(sam, jac)
            flat_weights = self._weights(self.flat_weighting, flat_gram, finite)
            ops.combine_flat(jac, loss_weights, sam, flat_weights, roles.shared.update)
        self._write_grads(roles, captured, finite, perturbed=True)

    def _perturb(
        self, roles: Roles, captured: Captured, task: int, radii: dict[int, float]
    ) -> None:
        assert self.sharpness is not None
        pairs = []
        if roles.shared is not None:
            pairs.append((roles.shared, roles.shared.jac[task], captured.shared_sq[task]))
        if task in roles.own:
            pairs.append((roles.own[task], roles.own[task].jac[0], captured.own_sq[task]))
        for block, row, sq_norm in pairs:
            rho = [radii[id(p)] for p in block.params]
            block.perturb(
                row, sq_norm, rho, adaptive=self.sharpness.adaptive, eta=self.sharpness.eta
            )

    @staticmethod
    def _position(again: TaskLosses, roles: Roles, task: int, *, alone: bool) -> int:
        """Where the task's loss stands in a perturbed pass: among all as before, or alone if asked for."""
        if set(again.names) == set(roles.tasks):
            return again.names.index(roles.tasks[task])
        if alone and len(again.names) == 1 and again.names[0] in (0, roles.tasks[task]):
            return 0
        raise ValueError(
            f"closure must return the losses of tasks {roles.tasks} when called again (or, if it takes "
            f"tasks=, that of task {roles.tasks[task]!r} alone), got {again.names}"
        )

    def _write_grads(
        self, roles: Roles, captured: Captured, finite: Tensor, *, perturbed: bool
    ) -> None:
        """.grad of every reached parameter <- a view; of the others <- None."""
        reached = {id(roles.params[k]) for k in captured.reached}
        # Frozen parameters too: a gradient of earlier must not move them.
        for param in self._all_params():
            if id(param) not in reached:
                param.grad = None

        def assign(index: Sequence[int], views: Sequence[Tensor]) -> None:
            for k, view in zip(index, views, strict=True):
                if k in captured.reached:
                    roles.params[k].grad = view

        if roles.shared is not None:
            assign(roles.shared_index, roles.shared.views(roles.shared.update))
        for task, block in roles.own.items():
            # A copy: the next capture overwrites the row, and may fail before it has a gradient.
            block.update.copy_((block.sam if perturbed else block.jac)[0])
            block.update.masked_fill_(~finite[task].to(block.update.device), 0)
            assign(roles.own_index[task], block.views(block.update))
