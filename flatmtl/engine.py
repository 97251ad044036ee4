"""The gradients of one step: which passes it takes, and what becomes of what they find."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatmtl import graph
from flatmtl.buffers import BufferKeeper, watch_for_running_statistics
from flatmtl.families import Families, Found
from flatmtl.history import History
from flatmtl.jacobian import Batched, Capture, Captured, Jacobian, capture_perturbed
from flatmtl.losses import TaskLosses
from flatmtl.passes import Passes
from flatmtl.replay import Generators, Replay
from flatmtl.representation import Features, Representation
from flatmtl.roles import Layout, Roles
from flatmtl.sharpness import SAM, SAMO, Radii, Sharpness, exempt_from_scaling
from flatmtl.solves import Solves
from flatmtl.spsa import Directions
from flatmtl.watch import Watch, raise_nonfinite
from flatmtl.weighted import WeightedBackward

EXPLODES = 10.0  # times the clean loss, or the first one


@dataclass(frozen=True)
class Options:
    """What an engine is to do; the arguments of ``MultiTaskOptimizer``, checked."""

    sharpness: Sharpness | None
    model: nn.Module | None
    nonfinite: Literal["raise", "mask", "skip"]
    jacobian: Jacobian
    row_dtype: torch.dtype | None
    weights_every: int
    replay_rng: bool
    history: int


class Engine:
    """Computes the gradients of steps into ``.grad``.

    Attributes:
        steps: how many steps were made.
        solves: the weightings.
        finite: bool [T], whether each task's gradients of the last step were finite; None before.
        ok: bool 0-dim, whether all were, where the step is to be skipped otherwise; else None.
        history: diagnostics of the last steps; None if none are kept, or before the first.
    """

    def __init__(
        self,
        options: Options,
        solves: Solves,
        params: Callable[[], list[Tensor]],
        named: Sequence[Tensor] | None,
        label: Callable[[Tensor], str],
    ) -> None:
        self.options = options
        self.solves = solves
        self.steps = 0
        self.finite: Tensor | None = None
        self.ok: Tensor | None = None
        self.history: History | None = None
        self.roles: Roles | None = None
        self._params, self._named, self._label = params, named, label
        self._layout = Layout(
            row_dtype=options.row_dtype,
            exempt=frozenset(exempt_from_scaling(options.sharpness, options.model)),
            adjacent=isinstance(options.sharpness, SAM)
            and options.sharpness.aggregate in ("second", "each"),
        )
        self._directions = (
            Directions(options.sharpness, options.model)
            if isinstance(options.sharpness, SAMO)
            else None
        )
        self._before = BufferKeeper(options.model)  # as they were before the step
        self._clean = BufferKeeper(options.model)  # as the clean passes left them
        self._watch = Watch()
        self._watched = False  # a perturbed pass has been watched for running statistics
        self._warned: set[str] = set()
        self._capture: Capture | WeightedBackward | None = None  # of a step that is still open
        self._open = False  # backward() has run and step() has not
        self._written: list[tuple[Tensor, Tensor]] = []  # parameters and the .grad they were given
        self._weights: dict[str, Tensor] = {}  # of the last solve, for the steps until the next
        self._first_losses: Tensor | None = None
        self._losses: list[Tensor | None] = []  # the clean ones of this step
        self._loaded: dict[str, Any] | None = None  # a state that waits for the parameters' roles

    # ------------------------------------------------------------ the life of a step

    @property
    def is_open(self) -> bool:
        """Whether gradients wait for a step."""
        return self._open

    def drop(self) -> None:
        """Forgets the gradients of a step that is not made."""
        self._open = False
        self._capture = None
        self.ok = None

    def stepped(self) -> None:
        """The step was made."""
        self.drop()
        self.steps += 1

    def poll(self) -> None:
        """Looks at flags of earlier steps that have arrived from the device."""
        self._watch.poll()

    def _continues(self) -> bool:
        """Whether backward() adds to that before: no step since, and nobody has reset the gradients."""
        return (
            self._open
            and self._capture is not None
            and all(param.grad is grad for param, grad in self._written)
        )

    def gradients(
        self, given: object, groups: Iterable[dict[str, Any]], scale: Tensor | None
    ) -> Passes:
        """Runs the passes of a step, or of a further micro-batch of it, and writes ``.grad``.

        Args:
            given: losses, a closure or closures.
            groups: the parameter groups, for the radii.
            scale: loss scale, 0-dim; None: 1.

        Returns:
            The passes, with the clean losses.
        """
        sharpness = self.options.sharpness
        more = self._continues()
        radii = None if sharpness is None else Radii(sharpness, groups, self.steps)
        replay = Replay(self._generators()) if self.options.replay_rng and radii else None
        passes = Passes(given, replay)
        if sharpness is not None and not passes.repeatable:
            raise ValueError(
                "losses must be a closure (or a list of them) with sharpness: it runs several passes"
            )
        if radii and more:
            raise RuntimeError(
                "backward must be given all micro-batches of a step at once with sharpness, as a list "
                "of closures; call step() or zero_grad() first"
            )
        if more:
            self.solves.again()
        else:
            self.drop()
            self.solves.begin()
        undoing = scale is not None or self.options.nonfinite == "skip"
        guarded = bool(radii) or (undoing and passes.repeatable)
        random = self._generators().state() if guarded else None
        if guarded:
            self._before.save()
        self.ok = None
        try:
            self._passes(passes, radii, scale)
        except BaseException:
            self.drop()
            if guarded:
                self._before.restore()
                self._generators().set(random)
            raise
        if self.ok is not None:
            self.solves.undo_unless(self.ok)
            if guarded:
                self._before.undo_unless(self.ok)
        self._open = True
        return passes

    def _generators(self) -> Generators:
        return Generators({p.device for p in self._params()})

    def _passes(self, passes: Passes, radii: Radii | None, scale: Tensor | None) -> None:
        sharpness = self.options.sharpness
        if self._loaded is not None:
            self._take_loaded()
        reuse = (
            self.options.weights_every > 1
            and self.steps % self.options.weights_every != 0
            and bool(self._weights)
            and self.roles is not None
        )
        if not radii:
            if reuse:
                self._weighted(passes, scale)
            else:
                self._plain(passes, scale)
        elif isinstance(sharpness, SAMO):
            self._samo(passes, radii, scale)
        elif isinstance(sharpness, SAM):
            due = self.steps % sharpness.every == 0 or not self._has_flat()
            if not due:
                (self._weighted if reuse else self._plain)(passes, scale)
            elif reuse:
                self._weighted_sharp(passes, radii, scale)
            else:
                self._sharp(passes, radii, scale)

    # ------------------------------------------------------------ roles and clean passes

    def _has_flat(self) -> bool:
        shared = None if self.roles is None else self.roles.shared
        return shared is None or shared.has_flat

    def _trainable(self) -> list[Tensor]:
        params = [p for p in self._params() if p.requires_grad]
        if not params:
            raise ValueError("params must hold at least one that requires grad, got none")
        return params

    def _roles_for(self, losses: TaskLosses) -> tuple[Roles, TaskLosses]:
        """The roles, and the losses in their order of tasks."""
        params = self._trainable()
        roles = self.roles
        if roles is not None and set(losses.names) == set(roles.tasks):
            losses = losses.in_order(roles.tasks)
        if roles is not None and losses.names != roles.tasks:
            raise ValueError(
                f"losses must be of the tasks {roles.tasks}, as before (None for one that is missing "
                f"from the batch), got {losses.names}"
            )
        if roles is None or list(map(id, params)) != list(map(id, roles.params)):
            roles = Roles(params, losses.names, self._named, self._label, self._layout)
        return roles, losses

    def _clean_passes(self, passes: Passes) -> Iterable[tuple[Roles, TaskLosses]]:
        """Every micro-batch's roles and losses; notes the losses."""
        if self._capture is None:
            self._losses = []
        for losses in passes.clean():
            roles, losses = self._roles_for(losses)
            if self._losses:
                self._losses = [
                    b if a is None else a if b is None else a + b
                    for a, b in zip(self._losses, losses.detached, strict=True)
                ]
            else:
                self._losses = list(losses.detached)
            yield roles, losses
            losses.outputs.clear()  # what is left of the graphs is not needed any more

    def _captured(self, passes: Passes, scale: Tensor | None) -> tuple[Roles, Captured]:
        """T backward passes a micro-batch, into the blocks' rows."""
        batched = self.options.jacobian if isinstance(self.options.jacobian, Batched) else None
        for roles, losses in self._clean_passes(passes):
            if not isinstance(self._capture, Capture) or self._capture.roles is not roles:
                self._capture = Capture(roles, roles.params[0].device)
            self._capture.add(losses, batched, scale)
            self.roles = roles  # only once its roles held
        assert isinstance(self._capture, Capture)
        return self._capture.roles, self._capture.finish()

    # ------------------------------------------------------------ finite or not

    def _finite_tasks(self, roles: Roles, shared_sq: Tensor, own_sq: dict[int, Tensor]) -> Tensor:
        """bool [T], from the squared norms of shared rows [T] or 0-dim, and of own ones."""
        finite = shared_sq.isfinite().expand(len(roles.tasks)).clone()
        for task, sq in own_sq.items():
            finite[task] &= sq.to(finite.device).isfinite()
        return finite

    def _check_finite(self, roles: Roles, finite: Tensor, scale: Tensor | None) -> None:
        """Remembers which tasks' gradients are finite ([T] bool), and acts on it as asked."""
        self.finite = finite
        if scale is not None or self.options.nonfinite == "skip":
            self.ok = finite.all()
        elif self.options.nonfinite == "raise":
            self._watch.post(finite, raise_nonfinite(roles.tasks))

    # ------------------------------------------------------------ kinds of steps

    def _families(self, scale: Tensor | None) -> Families:
        inverse = None if scale is None else scale.double().square().reciprocal()
        return Families(self.solves, inverse, full=self.options.history > 0)

    def _plain(self, passes: Passes, scale: Tensor | None) -> None:
        if isinstance(self.options.jacobian, Representation):
            self._represented(passes, self.options.jacobian, scale)
            return
        roles, captured = self._captured(passes, scale)
        finite = self._finite_tasks(roles, captured.shared_sq, captured.own_sq)
        self._check_finite(roles, finite, scale)
        found = None
        if roles.shared is not None:
            found = self._families(scale).plain(roles.shared, captured.shared_sq, finite)
            self._keep_weights(found)
            self._add_flat(roles.shared)
        own = {t: roles.own[t].jac[0] for t in captured.own_sq}
        for task, row in own.items():
            roles.own[task].update.copy_(row)
            self._add_flat(roles.own[task])
        self._write_grads(roles, captured.reached, set(own), finite)
        self._record(roles, found, captured.shared_sq, scale)

    def _sharp(self, passes: Passes, radii: Radii, scale: Tensor | None) -> None:
        sharpness = self.options.sharpness
        assert isinstance(sharpness, SAM)
        roles, captured = self._captured(passes, scale)
        finite = self._finite_tasks(roles, captured.shared_sq, captured.own_sq)
        self._check_finite(roles, finite, scale)

        def perturb(task: int) -> None:
            own = (task, captured.own_sq[task]) if task in captured.own_sq else None
            shared = None if roles.shared is None else roles.shared.jac[task]
            self._perturb(roles, shared, captured.shared_sq[task], [own] if own else [], radii)

        after, norms = self._perturbed_passes(passes, roles, captured.present, perturb, scale)
        finite = self._with_perturbed(finite, norms)
        self._check_finite(roles, finite, scale)
        found = None
        if roles.shared is not None:
            families, block = self._families(scale), roles.shared
            if sharpness.aggregate == "decomposed":
                keep = sharpness.every > 1
                found = families.decomposed(block, captured.shared_sq, finite, keep=keep)
            elif sharpness.aggregate == "direct":
                found = families.direct(block, finite)
            elif sharpness.aggregate == "second":
                found = families.second(block, finite)
            else:
                found = families.each(block, finite)
            self._keep_weights(found)
        for task in captured.own_sq:
            block = roles.own[task]
            block.update.copy_(block.sam[0])
            if sharpness.every > 1:
                torch.sub(block.sam[0], block.jac[0], out=block.kept)
                block.has_flat = True
        self._write_grads(roles, captured.reached, set(captured.own_sq), finite)
        self._record(roles, found, captured.shared_sq, scale, after)

    def _samo(self, passes: Passes, radii: Radii, scale: Tensor | None) -> None:
        assert self._directions is not None
        directions = self._directions
        for roles, losses in self._clean_passes(passes):
            outputs = [losses.output(task) for task in losses.present]
            fresh = False
            for task, hits in zip(
                losses.present, graph.reached(outputs, roles.params), strict=True
            ):
                for k in sorted(hits):
                    fresh = roles.note_reach(task, k) or fresh
            roles.end_pass(losses.present, keep=True)
            if not isinstance(self._capture, WeightedBackward):
                device = roles.params[0].device
                ones = torch.ones(len(roles.tasks), dtype=torch.float64, device=device)
                self._capture = WeightedBackward(roles, ones, scale)
            if fresh or not roles.settled:
                earlier = self._capture.unpack(_mean(roles))
                roles.settle()
                self._capture.repack(earlier, _mean(roles))
            self._capture.add(losses, _mean(roles), perturbed=False, retain_graph=False, own=True)
            self.roles = roles
        mean = self._capture
        assert isinstance(mean, WeightedBackward) and self.roles is not None
        roles = self.roles
        finite = self._finite_tasks(roles, mean.shared_norm(), mean.own_sq)
        self._check_finite(roles, finite, scale)

        def perturb(task: int) -> None:
            row, sq = None, mean.shared_norm()
            if roles.shared is not None:
                row = roles.shared.sam[task]
                sq = directions.bend(roles.shared, task, passes, roles.tasks)
            own = [(task, mean.own_sq[task])] if task in mean.own_sq else []
            self._perturb(roles, row, sq, own, radii)

        after, norms = self._perturbed_passes(passes, roles, mean.present, perturb, scale)
        finite = self._with_perturbed(finite, norms)
        self._check_finite(roles, finite, scale)
        found = None
        if roles.shared is not None:
            found = self._families(scale).direct(roles.shared, finite)
        for task in mean.own_sq:
            roles.own[task].update.copy_(roles.own[task].sam[0])
        self._write_grads(roles, mean.reached, set(mean.own_sq), finite)
        self._record(roles, found, self._row_squares(roles, norms), scale, after)

    def _row_squares(self, roles: Roles, norms: dict[int, list[Tensor]]) -> Tensor:
        """float64 [T], squared norms of the perturbed shared rows."""
        zero = torch.zeros((), dtype=torch.float64, device=roles.params[0].device)
        return torch.stack([norms[t][0] if t in norms else zero for t in range(len(roles.tasks))])

    def _weighted(self, passes: Passes, scale: Tensor | None) -> None:
        """One backward pass with the last weights."""
        if isinstance(self.options.jacobian, Representation):
            self.options.jacobian.forget()
        for roles, losses in self._clean_passes(passes):
            if not isinstance(self._capture, WeightedBackward):
                self._capture = WeightedBackward(roles, self._weights["loss"], scale)
            row = None if roles.shared is None else roles.shared.update
            self._capture.add(losses, row, perturbed=False, retain_graph=False, own=True)
        backward, roles = self._capture, self.roles
        assert isinstance(backward, WeightedBackward) and roles is not None
        finite = self._finite_tasks(roles, backward.shared_norm(), backward.own_sq)
        self._check_finite(roles, finite, scale)
        if roles.shared is not None:
            self._mask_shared(roles, finite)
            self._add_flat(roles.shared)
        for task in backward.own_sq:
            block = roles.own[task]
            backward.own_gradient(task, block.jac[0], block.update)
            self._add_flat(block)
        self._write_grads(roles, backward.reached, set(backward.own_sq), finite)
        found = Found(self._weights["loss"], self._weights.get("flat"))
        self._record(roles, found, None, scale)

    def _weighted_sharp(self, passes: Passes, radii: Radii, scale: Tensor | None) -> None:
        """Between two solves: one perturbation for all tasks (the paper's Eq. 9), the last weights."""
        sharpness, roles = self.options.sharpness, self.roles
        assert isinstance(sharpness, SAM) and roles is not None
        decomposed = sharpness.aggregate == "decomposed"
        a = self._weights["loss"]
        b = self._weights["flat"] if decomposed else a
        first, minus = WeightedBackward(roles, a, scale), WeightedBackward(roles, b, scale)
        shared = roles.shared
        for _, losses in self._clean_passes(passes):
            row = None if shared is None else shared.jac[0]
            first.add(losses, row, perturbed=False, retain_graph=decomposed, own=True)
            if decomposed and shared is not None:
                minus.add(losses, shared.update, perturbed=False, retain_graph=False, own=False)
        self._capture = first
        finite = self._finite_tasks(roles, first.shared_norm(), first.own_sq)
        self._check_finite(roles, finite, scale)
        own = [
            (t, first.own_gradient(t, roles.own[t].jac[0], roles.own[t].jac[0]))
            for t in first.own_sq
        ]
        last = WeightedBackward(roles, b, scale)
        after: list[Tensor | None] = []

        def perturbed() -> None:
            nonlocal after
            row = None if shared is None else shared.jac[0]
            self._perturb(roles, row, first.shared_norm(), own, radii)
            for losses, _ in passes.again(roles.tasks, None):
                target = None if shared is None else shared.sam[0]
                last.add(losses, target, perturbed=True, retain_graph=False, own=True)
                after = _added(after, losses.detached)
                losses.outputs.clear()

        self._away(passes, roles, perturbed)
        finite = finite & self._finite_tasks(roles, last.shared_norm(), last.own_sq)
        self._check_finite(roles, finite, scale)
        if shared is not None:
            if decomposed:  # (a - b) g + b s
                torch.sub(shared.sam[0], shared.update, out=shared.update).add_(shared.jac[0])
            else:
                shared.update.copy_(shared.sam[0])
            self._mask_shared(roles, finite)
        for task in last.own_sq:
            block = roles.own[task]
            last.own_gradient(task, block.sam[0], block.update)
        self._write_grads(roles, first.reached, set(last.own_sq), finite)
        self._record(roles, Found(a, b if decomposed else None), None, scale, after)

    def _represented(self, passes: Passes, jacobian: Representation, scale: Tensor | None) -> None:
        """Task gradients at the features, then one backward pass of the trunk."""
        if len(passes) > 1 or self._capture is not None:
            raise ValueError(
                "jacobian must not be Representation with several micro-batches a step: its weights "
                "belong to one batch's features"
            )
        for roles, losses in self._clean_passes(passes):
            tensors = jacobian.take()
            present = losses.present
            outputs = [losses.output(task) for task in present]
            stop = [t.grad_fn for t in tensors if t.grad_fn is not None]
            heads = graph.reached(outputs, roles.params, stop)
            trunk = set().union(*graph.reached(tensors, roles.params))
            fresh = False
            for task, hits in zip(present, heads, strict=True):
                for k in sorted(hits | trunk):
                    if k in hits and (k in trunk or any(k in h for h in heads if h is not hits)):
                        raise ValueError(
                            f"{self._label(roles.params[k])} must lie before jacobian's module, or belong "
                            "to one task behind it; it is reached on another way too"
                        )
                    fresh = roles.note_reach(task, k) or fresh
            roles.end_pass(present, keep=True)
            if fresh or not roles.settled:
                roles.settle()
            features = Features(tensors, len(roles.tasks))
            self._at_features(roles, losses, features, scale)
            self.roles = roles

    def _at_features(
        self, roles: Roles, losses: TaskLosses, features: Features, scale: Tensor | None
    ) -> None:
        at, present = features.block, losses.present
        zero = torch.zeros((), dtype=torch.float64, device=at.device)
        squares, own_sq = [zero] * len(roles.tasks), {}
        reached = set(roles.shared_index)
        for task in range(len(roles.tasks)):
            if task not in present:
                at.jac[task].zero_()
                continue
            index = roles.own_index.get(task, [])
            grads = torch.autograd.grad(
                losses.output(task),
                [*features.tensors, *(roles.params[k] for k in index)],
                grad_outputs=losses.seed(task, scale),
                retain_graph=task != present[-1],
                allow_unused=True,
            )
            count = len(features.tensors)
            squares[task] = at.pack(at.jac[task], grads[:count])
            if index:
                own_sq[task] = roles.own[task].pack(roles.own[task].jac[0], grads[count:])
                reached.update(index)
        shared_sq = torch.stack(squares)
        finite = self._finite_tasks(roles, shared_sq, own_sq)
        self._check_finite(roles, finite, scale)
        found = self._families(scale).plain(at, shared_sq, finite)
        self._keep_weights(found)
        if roles.shared is not None:
            grads = features.backward(at.update, [roles.params[k] for k in roles.shared_index])
            sq = roles.shared.pack(roles.shared.update, grads)
            # one that shows only now, in the trunk, is nobody's alone
            finite = finite & sq.isfinite().to(finite.device)
            self._check_finite(roles, finite, scale)
            self._mask_shared(roles, finite)
        for task in own_sq:
            roles.own[task].update.copy_(roles.own[task].jac[0])
        self._write_grads(roles, reached, set(own_sq), finite)
        self._record(roles, found, shared_sq, scale)

    # ------------------------------------------------------------ perturbed passes

    def _perturb(
        self,
        roles: Roles,
        shared: Tensor | None,
        shared_sq: Tensor,
        own: Sequence[tuple[int, Tensor]],
        radii: Radii,
    ) -> None:
        """Moves the shared parameters along a row [P], and own ones along their gradients.

        Args:
            roles: the roles.
            shared: the row; None if nothing is shared.
            shared_sq: its squared norm.
            own: tasks, and the squared norms of their own gradients.
            radii: the radii.
        """
        sharpness = self.options.sharpness
        assert sharpness is not None
        eta = sharpness.eta if isinstance(sharpness, SAM) else 0.0
        moved = []
        if roles.shared is not None and shared is not None:
            rho = [radii.shared[id(p)] for p in roles.shared.params]
            moved.append((roles.shared, shared, shared_sq, rho))
        for task, sq in own:
            block = roles.own[task]
            moved.append((block, block.jac[0], sq, [radii.own[id(p)] for p in block.params]))
        if sharpness.adaptive:
            moved = [(b, row, b.adaptive_sq_norm(row, eta), rho) for b, row, _, rho in moved]
        if isinstance(sharpness, SAM) and sharpness.joint_norm:
            first = moved[0][0].device
            total = torch.stack([sq.to(first) for _, _, sq, _ in moved]).sum()
            moved = [(b, row, total.to(b.device), rho) for b, row, _, rho in moved]
        for block, row, sq, rho in moved:
            block.perturb(row, sq, rho, adaptive=sharpness.adaptive, eta=eta)

    def _away(self, passes: Passes, roles: Roles, run: Callable[[], None]) -> None:
        """Runs what moves the parameters; they, buffers and generators are put back, should it fail."""
        # Only the plain gradients are known yet, so that a failure up to here has changed nothing.
        self._clean.save()
        for block in roles.blocks:
            block.save()
        watching = self.options.model is None and not self._watched
        try:
            with watch_for_running_statistics(watching):
                run()
        finally:
            _all(*(block.restore for block in roles.blocks), self._clean.restore, passes.end)
        self._watched = True

    def _perturbed_passes(
        self,
        passes: Passes,
        roles: Roles,
        present: set[int],
        perturb: Callable[[int], None],
        scale: Tensor | None,
    ) -> tuple[list[Tensor | None], dict[int, list[Tensor]]]:
        """Task by task: perturbed, forward, backward into the ``sam`` rows.

        Returns:
            The losses there, and the squared norms of the rows of each task.
        """
        after: list[Tensor | None] = [None] * len(roles.tasks)
        norms: dict[int, list[Tensor]] = {}

        def run() -> None:
            for task in range(len(roles.tasks)):
                if task not in present:
                    if roles.shared is not None:
                        roles.shared.sam[task].zero_()
                    continue
                perturb(task)
                for losses, position in passes.again(roles.tasks, task):
                    norms[task] = capture_perturbed(
                        losses, task, position, roles, scale, accumulate=task in norms
                    )
                    one, before = losses.detached[position], after[task]
                    after[task] = one if before is None or one is None else before + one
                    losses.outputs.clear()
                if task in roles.own:
                    roles.own[task].restore()

        self._away(passes, roles, run)
        return after, norms

    @staticmethod
    def _with_perturbed(finite: Tensor, norms: dict[int, list[Tensor]]) -> Tensor:
        finite = finite.clone()
        for task, squares in norms.items():
            for sq in squares:
                finite[task] &= sq.to(finite.device).isfinite()
        return finite

    # ------------------------------------------------------------ what becomes of it

    def _keep_weights(self, found: Found) -> None:
        """For the steps until the next solve; a step that is going to be skipped leaves the old ones."""
        if self.options.weights_every == 1:
            return
        new = {"loss": found.weights} if found.flat is None else {
            "loss": found.weights, "flat": found.flat,
        }  # fmt: skip
        for name, weights in new.items():
            old = self._weights.get(name)
            if self.ok is not None and old is not None:
                weights = torch.where(self.ok, weights, old)
            # in place where possible: a captured CUDA graph goes on writing to it
            if old is None:
                self._weights[name] = weights.clone()
            else:
                old.copy_(weights)

    def _add_flat(self, block: Any) -> None:  # noqa: ANN401
        sharpness = self.options.sharpness
        if isinstance(sharpness, SAM) and sharpness.every > 1 and block.has_flat:
            block.update.add_(block.kept)

    def _mask_shared(self, roles: Roles, finite: Tensor) -> None:
        """Without a gradient of each task's own, one that is not finite takes the whole row with it."""
        assert roles.shared is not None
        if self.ok is None:
            roles.shared.update.masked_fill_(~finite.all().to(roles.shared.device), 0)

    def _write_grads(self, roles: Roles, reached: set[int], own: set[int], finite: Tensor) -> None:
        """.grad of every reached parameter <- a view of its block's update; of the others <- None.

        Where the step is to be skipped, the gradients become infinite, as GradScaler expects.
        """
        ids = {id(roles.params[k]) for k in reached}
        # Frozen parameters too: a gradient of earlier must not move them.
        for param in self._params():
            if id(param) not in ids:
                param.grad = None
        self._written = []
        blocks = [] if roles.shared is None else [(roles.shared, roles.shared_index, None)]
        blocks += [(roles.own[t], roles.own_index[t], t) for t in roles.own]
        for block, index, task in blocks:
            if task is not None and task not in own:
                for k in index:
                    roles.params[k].grad = None
                continue
            if self.ok is not None:
                block.update.masked_fill_(~self.ok.to(block.device), torch.inf)
            elif task is not None:
                block.update.masked_fill_(~finite[task].to(block.device), 0)
            for k, view in zip(index, block.views(block.update), strict=True):
                if k in reached:
                    roles.params[k].grad = view
                    self._written.append((roles.params[k], view))

    def _record(
        self,
        roles: Roles,
        found: Found | None,
        squares: Tensor | None,
        scale: Tensor | None,
        after: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Diagnostics: the history, and warnings of a radius that is too large."""
        watching = after is not None and len(self._warned) < 2
        if not self.options.history and not watching:
            return
        device = roles.params[0].device
        clean = _vector(self._losses, device)
        rise = None if after is None else _vector(after, device) - clean
        if watching and rise is not None:
            self._watch_radius(clean, rise, squares)
        if not self.options.history:
            return
        if self.history is None:
            self.history = History(self.options.history, roles.tasks, device)
        norms = None if squares is None else squares.sqrt()
        if norms is not None and scale is not None:
            norms = norms / scale.to(norms.device)
        fresh = squares is not None
        status = self.solves.statuses.get("loss") if fresh else None
        flat_status = self.solves.statuses.get("flat") if fresh else None
        self.history.record(
            losses=clean,
            weights=None if found is None else found.weights,
            flat_weights=None if found is None else found.flat,
            norms=norms,
            gram=None if found is None else found.gram,
            sharpness=rise,
            status=None if status is None else status.bits,
            flat_status=None if flat_status is None else flat_status.bits,
            residual=None if status is None else status.residual,
        )

    def _watch_radius(self, clean: Tensor, rise: Tensor, squares: Tensor | None) -> None:
        """Posts a warning if the perturbed losses explode or no task has a gradient any more."""
        if self._first_losses is None or self._first_losses.shape != clean.shape:
            self._first_losses = clean.clone()
        usual = torch.maximum(clean.abs(), self._first_losses.abs())
        exploded = clean.isfinite() & ~(rise <= EXPLODES * usual)
        gone = torch.zeros_like(exploded[0])
        if squares is not None:
            gone = (squares == 0).all().to(gone.device)
        self._watch.post(torch.stack([exploded.any(), gone]), self._warn_of_radius)

    def _warn_of_radius(self, flags: list[bool]) -> None:
        texts = {
            "exploded": "the losses at the perturbed parameters are more than "
            f"{EXPLODES:g} times the clean ones: rho is too large here (try a half, or SAM(warmup=...))",
            "gone": "every task's gradient in the shared parameters is zero: the network may have "
            "collapsed, which a too large rho does (try a half, or SAM(warmup=...))",
        }
        for (name, text), flag in zip(texts.items(), flags, strict=True):
            if flag and name not in self._warned:
                self._warned.add(name)
                warnings.warn(text, stacklevel=2)

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit, beside the weightings' states."""
        if self._loaded is not None:
            return self._loaded
        state: dict[str, Any] = {"steps": self.steps}
        roles = self.roles
        if roles is not None:
            position = {id(p): k for k, p in enumerate(self._params())}
            state["tasks"] = list(roles.tasks)
            state["reach"] = {
                position[id(p)]: tasks
                for p, tasks in zip(roles.params, roles.reach(), strict=True)
                if id(p) in position
            }
            flats: dict[int, Tensor] = {}
            for block in roles.blocks:
                if block.has_flat:
                    for param, view in zip(block.params, block.views(block.kept), strict=True):
                        flats[position[id(param)]] = view.clone()
            state["flat"] = flats
        state["weights"] = {name: w.clone() for name, w in self._weights.items()}
        if self._directions is not None:
            state["directions"] = self._directions.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state at the next step; {} starts anew."""
        self.drop()
        self.roles = None
        self.steps = int(state.get("steps", 0))
        self._weights = {}
        self._loaded = state if "tasks" in state else None
        if self._directions is not None and "directions" in state:
            self._directions.load_state_dict(state["directions"])

    def _take_loaded(self) -> None:
        state, self._loaded = self._loaded, None
        assert state is not None
        params = self._params()
        trainable = self._trainable()
        position = {id(p): k for k, p in enumerate(params)}
        roles = Roles(trainable, state["tasks"], self._named, self._label, self._layout)
        roles.take_reach([state["reach"].get(position[id(p)], []) for p in trainable])
        device = trainable[0].device
        self._weights = {name: w.to(device).clone() for name, w in state["weights"].items()}
        flats = state["flat"]
        for block in roles.blocks:
            kept = [flats.get(position[id(p)]) for p in block.params]
            if all(one is not None for one in kept):
                block.pack(block.kept, [f.to(p) for f, p in zip(kept, block.params, strict=True)])
                block.has_flat = True
        self.roles = roles


def _mean(roles: Roles) -> Tensor | None:
    """[P], where the mean gradient of the shared parameters goes."""
    return None if roles.shared is None else roles.shared.mean


def _added(total: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Task by task; None where neither has a value."""
    if not total:
        return list(more)
    return [b if a is None else a if b is None else a + b for a, b in zip(total, more, strict=True)]


def _vector(losses: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """float64 [T] from 0-dim tensors; NaN where a task is missing."""
    missing = torch.full((), torch.nan, dtype=torch.float64, device=device)
    return torch.stack(
        [missing if one is None else one.detach().to(device).double() for one in losses]
    )


def _all(*restore: Callable[[], None]) -> None:
    """Calls every one, should one fail; then raises the first failure."""
    failures: list[BaseException] = []
    for one in restore:
        try:
            one()
        except BaseException as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
