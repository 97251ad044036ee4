"""The gradients of one step: which passes it takes, and what becomes of what they find."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from flatmtl import cuda_graphs
from flatmtl.block import Block
from flatmtl.buffers import BufferKeeper, watch_for_running_statistics
from flatmtl.columns import Columns, columns_of
from flatmtl.distributed.counts import Samples, counts_of
from flatmtl.distributed.losses import average
from flatmtl.distributed.one_row import OneRowStep
from flatmtl.distributed.ranks import RankFailedError, Ranks, raise_failed
from flatmtl.distributed.row_step import RowStep
from flatmtl.distributed.samo_step import SamoStep
from flatmtl.distributed.turn_step import TurnStep
from flatmtl.families import Families, Found
from flatmtl.graph import check_checkpoints
from flatmtl.history import History
from flatmtl.jacobian import Batched, Capture, Captured, Jacobian
from flatmtl.links import agree_before_step, link_of, warn_of_unseen
from flatmtl.losses import TaskLosses, added_entries, loss_vector
from flatmtl.ops._status import INVALID_LOSS
from flatmtl.passes import Passes, closures_in
from flatmtl.radius import RadiusWatch
from flatmtl.replay import Generators, Replay
from flatmtl.representation import Representation
from flatmtl.resume import load_roles, save_roles
from flatmtl.roles import Layout, Roles
from flatmtl.shards import as_grad, local_of
from flatmtl.sharpness import SAM, SAMO, Radii, Sharpness, exempt_from_scaling
from flatmtl.solves import Observed, Solves
from flatmtl.spsa import Directions
from flatmtl.steps.between import weighted, weighted_sharp
from flatmtl.steps.coop import coop
from flatmtl.steps.maml import maml
from flatmtl.steps.one_pass import one_pass
from flatmtl.steps.plain import plain
from flatmtl.steps.represented import represented
from flatmtl.steps.samo import samo
from flatmtl.steps.sharp import sharp
from flatmtl.strategies import MAML, CoopFlat, Strategy
from flatmtl.stream import Stream
from flatmtl.watch import Watch, outside, raise_invalid_loss, raise_nonfinite
from flatmtl.weighted import WeightedBackward
from flatmtl.weighting._rows import RowMethod

if TYPE_CHECKING:
    from flatmtl.affinity.meter import Meter


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
    strategy: Strategy | None = None
    ranks: Ranks | None = None
    sync_perturbation: bool = True
    shard_rows: bool = False


class Engine:
    """Computes the gradients of steps into ``.grad``.

    Attributes:
        steps: how many steps were made.
        solves: the weightings.
        finite: bool [T], whether each task's gradients of the last step were finite; None before.
        ok: bool 0-dim, whether all were, where the step is to be skipped otherwise; else None.
        history: diagnostics of the last steps; None if none are kept, or before the first.
        roles: of the parameters; None before the first step.
        capture: the gradients gathered for a step that is still open.
        weights: "loss" and "flat" weights of the last solve, for the steps until the next.
        clean_buffers: the model's buffers as the clean passes left them.
        directions: SAMO's random stream, or CoopFlat's; None without.
        label: names a parameter in errors.
        scale: the loss scale of a step that is still open; None: 1.
        running: whether passes are being run.
        watched: a perturbed pass has been watched for layers that update running statistics.
        meters: measure affinities at the steps that have task gradients.
        row_step: what goes between several processes at a step with a row a task, while it is made.
        one_row_step: the same for a step with one row.
        samo_step: the same for one with SAMO.
        turn_step: the same for one with CoopFlat.
        losses: this process's clean losses of the step, None for a task that is missing.
        named: the shared parameters that the caller named.
        groups: gives id(parameter) -> its group, where groups have weights of their own; else None.
        params: gives all parameters of the optimizer.
        lost: tasks of this step whose loss was not finite, left out of the one backward pass.
    """

    def __init__(
        self,
        options: Options,
        solves: Solves,
        params: Callable[[], list[Tensor]],
        named: Sequence[Tensor] | None,
        label: Callable[[Tensor], str],
        groups: Callable[[], dict[int, int]] | None = None,
    ) -> None:
        self.options = options
        self.solves = solves
        self.steps = 0
        self.finite: Tensor | None = None
        self.ok: Tensor | None = None
        self.history: History | None = None
        self.roles: Roles | None = None
        self.capture: Capture | WeightedBackward | None = None
        self.weights: dict[str, Tensor] = {}
        self.clean_buffers = BufferKeeper(options.model)
        self.directions: Stream | None = None
        if isinstance(options.sharpness, SAMO):
            self.directions = Directions(options.sharpness, options.model)
        elif isinstance(options.strategy, CoopFlat):
            self.directions = Stream(options.strategy.seed)
        self.label = label
        self.watched = False
        self.meters: list[Meter] = []
        self.params, self.named = params, named
        self._exempt = frozenset(exempt_from_scaling(options.sharpness, options.model))
        self._before = BufferKeeper(options.model)  # as they were before the step
        self._watch = Watch(together=options.ranks is not None)
        self._radius = RadiusWatch(self._watch)
        self.scale: Tensor | None = None
        self.running = False
        self._open = False  # backward() has run and step() has not
        self._begun = False  # a step's first backward() has begun
        self._guarded = False  # the buffers before the step are kept
        self.row_step: RowStep | None = None
        self.one_row_step: OneRowStep | None = None
        self.samo_step: SamoStep | None = None
        self.turn_step: TurnStep | None = None
        self._record_args: dict[str, Any] | None = None  # for the history, once stepped
        # parameters, the .grad they were given, and its version
        self._written: list[tuple[Tensor, Tensor, int]] = []
        self.losses: list[Tensor | None] = []  # the clean ones of this step
        self.lost: set[int] = set()
        self._counted: list[float] = []  # what this one's count for
        self.groups = groups  # id(parameter) -> its group, where groups have weights of their own
        self._columns: tuple[Block, Columns] | None = None
        self._to_look_back: Passes | None = None  # whose losses after the step are wanted
        self._loaded: dict[str, Any] | None = None  # a state that waits for the parameters' roles

    # ------------------------------------------------------------ the life of a step

    @property
    def is_open(self) -> bool:
        """Whether gradients wait for a step."""
        return self._open

    def not_stepped(self, failure: BaseException) -> None:
        """The base optimizer failed: other processes know nothing of it, and hear of it at the next step."""
        if self.options.ranks is not None:
            self.options.ranks.note_unmade(failure, told=False)
        self.drop()

    def drop(self) -> None:
        """The step is not made: its gradients are forgotten, states are as before it."""
        if self.running:
            return  # zero_grad() inside a closure: there is nothing to reset yet
        self.solves.undo()
        if self.directions is not None and self._begun:
            self.directions.rewind()
        for meter in self.meters:
            meter.drop()
        self._close()

    def stepped(self) -> None:
        """The step was made."""
        if self._record_args is not None and self.roles is not None:
            if self.history is None:
                device = self.roles.params[0].device
                self.history = History(self.options.history, self.roles.tasks, device)
            self.history.record(**self._record_args)
        for meter in self.meters:
            meter.made(self.ok)
        self.solves.made(self.ok)
        behind = self._to_look_back
        self._close()
        self.steps += 1
        if behind is not None:
            self._look_back(behind)

    def _look_back(self, passes: Passes) -> None:
        """Hands the last micro-batch's losses after the step to the weighting, which saw them before it."""
        assert self.roles is not None
        ranks, device = self.options.ranks, self.roles.params[0].device
        try:
            after = self._losses_after(passes, self.roles)
        except Exception as failure:
            if ranks is not None:
                ranks.tell(failure)
                none: list[Tensor | None] = [None] * len(self._counted)
                average(ranks, none, self._counted, device, failed=True)
            raise
        if ranks is not None:
            after = average(ranks, after, self._counted, device, made=True).entries()
        seen = self.observed(after, self.roles)
        self.solves.weightings["loss"]._after_step(seen.losses, seen.there)

    def _losses_after(self, passes: Passes, roles: Roles) -> list[Tensor | None]:
        after: list[Tensor | None] = []
        self.clean_buffers.save()
        watching = self.options.model is None and not self.watched
        try:
            again = passes.again(roles.tasks, None, graph=False, replay=True, last=True)
            with watch_for_running_statistics(watching, "looking-back"):
                for losses, _ in again:
                    after = losses.detached
        finally:
            self.clean_buffers.restore()
            passes.end()
        self.watched = True
        return after

    def _close(self) -> None:
        self._open = self._begun = self._guarded = False
        self.capture = self.ok = self.scale = self._record_args = None
        self.lost = set()
        self._to_look_back = None

    @property
    def counts(self) -> bool:
        """Whether a skipped step must be known on the host: something is counted or drawn there."""
        sharpness, options = self.options.sharpness, self.options
        return (
            options.weights_every > 1
            or self._looks_back
            or isinstance(sharpness, SAMO)
            or isinstance(options.strategy, CoopFlat)
            or (isinstance(sharpness, SAM) and (sharpness.every > 1 or sharpness.warmup > 0))
        )

    def _continues(self) -> bool:
        """Whether backward() adds to that before: no step since, and nobody has reset the gradients."""
        return (
            self._open
            and (self.capture is not None or self.options.strategy is not None)
            and all(param.grad is grad for param, grad, _ in self._written)
        )

    def gradients(
        self,
        given: object,
        groups: Sequence[dict[str, Any]],
        scale: Tensor | None,
        samples: Samples = None,
    ) -> Passes:
        """Runs the passes of a step, or of a further micro-batch of it, and writes ``.grad``.

        Args:
            given: losses, a closure or closures.
            groups: the parameter groups, for the radii.
            scale: loss scale, 0-dim; None: 1.
            samples: what the losses are means of, where several processes train.

        Returns:
            The passes, with the clean losses.
        """
        self._check_capture(scale)
        ranks = self.options.ranks
        if ranks is None:
            self._watch.poll()
            found = self._gradients(given, groups, scale)
            if samples is not None and self.roles is not None:
                try:  # what several processes refuse is refused here too
                    counts_of(samples, self.roles.tasks)
                except BaseException:
                    self.drop()
                    raise
            return found
        if self._continues():
            raise RuntimeError(
                "backward must be given all micro-batches of a step at once where several processes "
                "train, as a list of closures; call step() or zero_grad() first"
            )
        ranks.forget_gathered()  # by an evaluation, say: names would be those of other parameters
        self._refresh_roles()
        agree_before_step(self, ranks, groups, samples)
        narrow = self.options.row_dtype or self.params()[0].dtype
        if samples is not None and narrow == torch.float16:
            raise ValueError(
                "samples must be None where rows are float16, in which sums over samples overflow"
            )
        closures = closures_in(given)
        if closures:  # else the passes are over, and their graph may hold the buffers
            ranks.send_buffers()
        link = link_of(self, ranks, groups, samples, max(1, len(closures)))
        if isinstance(link, RowStep):
            self.row_step = link
        elif isinstance(link, SamoStep):
            self.samo_step, self.one_row_step = link, link.clean
        elif isinstance(link, TurnStep):
            self.turn_step = link
        else:
            self.one_row_step = link
        try:
            ranks.check_made()
            self._watch.poll()
            warn_of_unseen(self, ranks)
            made = self._gradients(given, groups, scale)
        except RankFailedError:
            raise
        except Exception as failure:
            # a collective that failed may do so because another rank has left it
            why = ranks.why() if ranks.lost(failure) else None
            if why is not None:
                raise why from failure
            ranks.note_unmade(failure, told=not link.over)
            link.fail(failure)
            raise
        else:
            if link.failed is not None and link.failed.is_cuda:
                self._watch.post((link.failed == 0).reshape(1), raise_failed(ranks))
            return made
        finally:
            if isinstance(link, RowStep) and link.capture is not None:
                self._counted = link.capture.all_counts()
            self.row_step = self.one_row_step = self.samo_step = self.turn_step = None

    def _check_capture(self, scale: Tensor | None) -> None:
        """Refuses what a CUDA graph that is being captured could not hold."""
        if not cuda_graphs.capturing():
            return
        options = self.options
        if options.ranks is not None:
            cuda_graphs.refuse(
                "process_group must be None (several processes speak to their hosts)"
            )
        if isinstance(options.sharpness, SAMO) or isinstance(options.strategy, CoopFlat):
            cuda_graphs.refuse(
                "sharpness must not be SAMO or CoopFlat, which draw by generators of their own,"
            )
        roles = self.roles
        if roles is None or self.steps == 0:
            cuda_graphs.refuse(
                "a step must have been made before: buffers and states begin with it, and must not"
            )
        elif self._loaded is not None or self._changed(roles):
            cuda_graphs.refuse(
                "params must be those of the step before: what belongs to them must not begin"
            )
        self._check_capture_of_counted()
        if options.nonfinite == "raise" and scale is None:
            warnings.warn(
                "a task whose gradient is not finite is left out of a captured step, as with "
                "nonfinite='mask': an exception cannot leave a CUDA graph",
                stacklevel=outside(),
            )

    def _check_capture_of_counted(self) -> None:
        """Steps are counted on the host: what differs from step to step would be of one kind for ever."""
        sharpness = self.options.sharpness
        if self.options.weights_every > 1:
            cuda_graphs.refuse(f"weights_every must be 1, not {self.options.weights_every},")
        if isinstance(sharpness, SAM):
            if sharpness.every > 1:
                cuda_graphs.refuse(f"SAM's every must be 1, not {sharpness.every},")
            if self.steps < sharpness.warmup:
                cuda_graphs.refuse(
                    f"SAM's warmup of {sharpness.warmup} steps must be over (this is step {self.steps})"
                )

    def radii(self, groups: Iterable[dict[str, Any]]) -> Radii | None:
        """The radii of the next step; None without sharpness."""
        sharpness = self.options.sharpness
        return None if sharpness is None else Radii(sharpness, groups, self.steps)

    def _gradients(
        self, given: object, groups: Sequence[dict[str, Any]], scale: Tensor | None
    ) -> Passes:
        sharpness, strategy = self.options.sharpness, self.options.strategy
        more = self._continues()
        if more and any(grad._version != version for _, grad, version in self._written):
            raise RuntimeError(
                "backward must find the gradients as it left them when it adds a micro-batch: they were "
                "changed in place (zero_grad of another object, clipping); optimizer.zero_grad() starts anew"
            )
        radii = self.radii(groups)
        exact = any(meter.options.mode == "exact" for meter in self.due())
        away = bool(radii) or strategy is not None  # passes away from the parameters
        replaying = self.options.replay_rng and away
        looking = self._looks_back
        replay = Replay(self._generators()) if replaying or exact or looking else None
        ranks = self.options.ranks
        passes = Passes(
            given,
            replay,
            replaying,
            partial=ranks is not None,
            inside=nullcontext if ranks is None else ranks.quiet,
        )
        if looking and not passes.repeatable:
            raise ValueError(
                "losses must be a closure (or a list of them) with a weighting that wants the losses "
                "after the step too: it runs them again"
            )
        if (sharpness is not None or strategy is not None) and not passes.repeatable:
            raise ValueError(
                "losses must be a closure (or a list of them) with sharpness: it runs several passes"
            )
        if exact and (more or not passes.repeatable):
            raise ValueError(
                "losses must be a closure, or a list of them for all micro-batches of a step, where an "
                "AffinityProbe in exact mode measures: it runs them again"
            )
        if away and more:
            raise RuntimeError(
                "backward must be given all micro-batches of a step at once with sharpness, as a list "
                "of closures; call step() or zero_grad() first"
            )
        if more and (scale is None) != (self.scale is None):
            raise RuntimeError(
                "backward must be given the scaler for every micro-batch of a step, or none"
            )
        if more and not self.solves.weightings["loss"].one_pass:
            self.solves.undo()
        elif not more:
            self.drop()
            self.solves.begin()
            if self.directions is not None:
                self.directions.begin()
        self._begun, self.scale = True, scale
        undoing = scale is not None or self.options.nonfinite == "skip"
        guarded = away or exact or ((undoing or ranks is not None) and passes.repeatable)
        random = self._generators().state() if guarded else None
        if guarded and not self._guarded:
            self._before.save()
            self._guarded = True
        self.ok = None
        self.running = True
        try:
            self._passes(passes, radii, scale)
        except BaseException:
            self.running = False
            self.drop()
            if guarded:
                self._before.restore()
                self._generators().set(random)
            raise
        self.running = False
        if self.ok is not None:
            self.solves.undo_unless(self.ok)
            if guarded:
                self._before.undo_unless(self.ok)
        if looking:
            self._to_look_back = passes
        self._open = True
        return passes

    @property
    def _looks_back(self) -> bool:
        return self.solves.weightings["loss"].looks_back

    def _generators(self) -> Generators:
        return Generators({p.device for p in self.params()})

    def _refresh_roles(self) -> None:
        """The roles of a loaded state, or of parameters that have changed."""
        # before the forward pass, in which a model whose parameters are sharded has others
        self._exempt = frozenset(exempt_from_scaling(self.options.sharpness, self.options.model))
        if self._loaded is not None:
            self._take_loaded()
        if self.roles is not None and self._changed(self.roles):
            self._carry_over(self.roles)

    def kind(self, radii: Radii | None) -> tuple[bool, bool]:
        """Whether the next step has no perturbed pass, and whether it uses the last weights again."""
        sharpness = self.options.sharpness
        apart = not radii
        if isinstance(sharpness, SAM) and self.steps % sharpness.every and self._has_flat():
            apart = True
        needed = {"loss"} if apart or _aggregates(sharpness, "direct") else {"loss", "flat"}
        due = self.steps % self.options.weights_every == 0
        reuse = not due and self.roles is not None and needed <= self.weights.keys()
        if self.capture is not None:  # a step stays of the kind that it began as
            reuse = isinstance(self.capture, WeightedBackward)
        return apart, reuse

    def _passes(self, passes: Passes, radii: Radii | None, scale: Tensor | None) -> None:
        sharpness, strategy = self.options.sharpness, self.options.strategy
        self._refresh_roles()
        if not radii and self.roles is not None:
            for block in self.roles.blocks:
                block.has_flat = False  # without a radius there is no flat part
        apart, reuse = self.kind(radii)
        if isinstance(strategy, MAML):
            maml(self, strategy, passes, scale)
        elif isinstance(strategy, CoopFlat):
            coop(self, strategy, passes, scale)
        elif apart and self.solves.weightings["loss"].one_pass and self.row_step is None:
            one_pass(self, passes, scale)
        elif apart and reuse:
            weighted(self, passes, scale)
        elif apart and isinstance(self.options.jacobian, Representation):
            represented(self, passes, self.options.jacobian, scale)
        elif apart:
            plain(self, passes, scale)
        elif isinstance(sharpness, SAMO):
            assert radii is not None
            samo(self, passes, radii, scale)
        else:
            assert radii is not None
            (weighted_sharp if reuse else sharp)(self, passes, radii, scale)

    # ------------------------------------------------------------ roles and clean passes

    def _has_flat(self) -> bool:
        return self.roles is not None and any(block.has_flat for block in self.roles.blocks)

    def _trainable(self) -> list[Tensor]:
        params = [p for p in self.params() if p.requires_grad]
        if not params:
            raise ValueError("params must hold at least one that requires grad, got none")
        return params

    def _roles_for(self, losses: TaskLosses) -> tuple[Roles, TaskLosses]:
        """The roles, and the losses in their order of tasks."""
        roles = self.roles
        if roles is not None and set(losses.names) == set(roles.tasks):
            losses = losses.in_order(roles.tasks)
        if roles is not None and losses.names != roles.tasks:
            raise ValueError(
                f"losses must be of the tasks {roles.tasks}, as before (None for one that is missing "
                f"from the batch), got {losses.names}"
            )
        told = self.named is not None or isinstance(self.options.strategy, CoopFlat)
        if roles is None and losses.together and not told:
            warnings.warn(
                "losses are entries of one tensor: every parameter that it depends on counts as shared. "
                "Where tasks have parameters of their own, return a list of losses (or torch.stack of "
                "them, nothing after it), or name the shared parameters with shared=",
                stacklevel=outside(),
            )
        if roles is None:
            check_checkpoints([losses.output(task) for task in losses.present])
            roles = self._make_roles(self._trainable(), losses.names)
        elif self._changed(roles):
            raise RuntimeError(
                "params must stay as they are between the micro-batches of a step, got other ones"
            )
        return roles, losses

    def _changed(self, roles: Roles) -> bool:
        """Whether other parameters are trained than ``roles`` knows, or they lie otherwise."""
        params = self._trainable()
        return list(map(id, params)) != list(map(id, roles.params)) or any(
            block.stale() for block in roles.blocks
        )

    def _carry_over(self, roles: Roles) -> None:
        """New roles for the parameters as they are now, with what is known of them."""
        if self.capture is not None:
            raise RuntimeError(
                "params must stay as they are between the micro-batches of a step, got other ones"
            )
        params = self.params()
        self.roles = load_roles(save_roles(roles, params), params, self._make_roles)

    def _make_roles(self, params: Sequence[Tensor], tasks: list[Any]) -> Roles:
        options, ranks = self.options, self.options.ranks
        part = None if ranks is None or not options.shard_rows else (ranks.size, ranks.rank)
        layout = Layout(
            row_dtype=options.row_dtype,
            exempt=self._exempt,
            both=_aggregates(options.sharpness, "each"),
            ends=_aggregates(options.sharpness, "second"),
            joined=ranks is not None and not ranks.copies,
            part=part,
            local=local_of if ranks is not None and ranks.copies else None,
            moved=ranks.forget_gathered if ranks is not None and ranks.copies else None,
        )
        return Roles(params, tasks, self.named, self.label, layout)

    def clean_passes(self, passes: Passes) -> Iterator[tuple[Roles, TaskLosses]]:
        """Every micro-batch's roles and losses; notes the losses."""
        if self.capture is None:
            self.losses = []
        for losses in passes.clean():
            roles, losses = self._roles_for(losses)
            self.losses = added_entries(self.losses, losses.detached)
            yield roles, losses
            losses.outputs.clear()  # what is left of the graphs is not needed any more

    def captured(self, passes: Passes, scale: Tensor | None) -> tuple[Roles, Captured]:
        """T backward passes a micro-batch, into the blocks' rows; with several processes, their means."""
        batched = self.options.jacobian if isinstance(self.options.jacobian, Batched) else None
        link = self.row_step
        try:
            for roles, losses in self.clean_passes(passes):
                if not isinstance(self.capture, Capture) or self.capture.roles is not roles:
                    self.capture = (
                        Capture(roles) if link is None else link.begin(roles, len(passes))
                    )
                self.capture.add(losses, batched, scale)
                self.roles = roles  # only once its roles held
            assert isinstance(self.capture, Capture)
            roles = self.capture.roles
            found = self.capture.finish() if link is None else link.rows()
        except BaseException:
            if self.roles is not None and not self.roles.settled:
                self.roles = None
            raise
        if link is None or not link.local:  # those would be this process's own rows
            self.measure(passes, roles, found, scale)
        return roles, found

    def measure(self, passes: Passes, roles: Roles, found: Captured, scale: Tensor | None) -> None:
        """Hands the task gradients to the meters that measure at this step."""
        link = self.row_step if self.one_row_step is None else self.one_row_step.measuring
        for meter in self.due():
            try:
                again = functools.partial(self._ahead, passes)
                meter.at_rows(roles, found, self.losses, scale, again, link)
            finally:
                passes.end()

    @property
    def measures(self) -> bool:
        """Whether some meter measures at this step."""
        return bool(self.due())

    def due(self) -> list[Meter]:
        """The meters that measure at this step, if it has task gradients."""
        return [meter for meter in self.meters if meter.due]

    def _ahead(self, passes: Passes) -> list[Tensor | None]:
        """The losses of the step's micro-batches, added up, at the parameters as they are now."""
        assert self.roles is not None
        self._before.restore(unseen=True)  # what the clean passes began with
        total: list[Tensor | None] = []
        for losses, _ in passes.again(self.roles.tasks, None, graph=False, replay=True):
            total = added_entries(total, losses.detached)
        return total

    # ------------------------------------------------------------ finite or not

    def finite_tasks(self, roles: Roles, shared_sq: Tensor, own_sq: dict[int, Tensor]) -> Tensor:
        """bool [T], from the squared norms of shared rows [T] or 0-dim, and of own ones."""
        # a sum of squares is finite where all of them are: one look in place of one for each
        own = roles.per_task(own_sq)
        return (shared_sq.to(own.device) + own).isfinite()

    def check_finite(self, roles: Roles, finite: Tensor, scale: Tensor | None) -> None:
        """Remembers which tasks' gradients are finite ([T] bool), and acts on it as asked."""
        self.finite = finite
        if scale is not None or self.options.nonfinite == "skip":
            self.ok = finite.all()
        elif self.options.nonfinite == "raise":
            self._watch.post(finite, raise_nonfinite(roles.tasks))

    def families(self, scale: Tensor | None) -> Families:
        """What aggregates rows of gradients that are ``scale`` times too large."""
        full = self.options.history > 0 or self.measures
        seen = columns = None
        assert self.roles is not None
        if self.looks_at_losses:
            seen = self.observed(self._all_losses(), self.roles)
        if self.groups is not None and self.roles.shared is not None:
            columns = self._columns_of(self.roles.shared)
        step = self.row_step
        known = None if step is None else step.grams
        return Families(self.solves, scale, full=full, seen=seen, columns=columns, known=known)

    def _all_losses(self) -> list[Tensor | None]:
        """The step's losses, over all processes."""
        if self.row_step is not None and self.row_step.averaged:
            return self.row_step.averaged
        if self.one_row_step is not None:
            return self.one_row_step.averaged
        return self.losses

    @property
    def looks_at_losses(self) -> bool:
        """Whether a weighting looks at the losses."""
        return any(
            "losses" in w.needs or w.one_pass or isinstance(w, RowMethod)
            for w in self.solves.weightings.values()
        )

    def seen_by_all(self, losses: TaskLosses, roles: Roles, backward: WeightedBackward) -> Observed:
        """A micro-batch's losses as a weighting sees them: with several processes, those of all."""
        link = self.one_row_step
        if link is None:
            return self.observed(losses.detached, roles)
        found = link.average(roles, losses)
        backward.shares = found.shares
        self._counted = link.counts
        return self.observed(found.entries(), roles)

    def _columns_of(self, block: Block) -> Columns:
        if self._columns is None or self._columns[0] is not block:
            assert self.groups is not None
            self._columns = (block, columns_of(block, self.groups()))
        return self._columns[1]

    def observed(self, losses: Sequence[Tensor | None], roles: Roles) -> Observed:
        """The losses as a weighting sees them."""
        device = roles.params[0].device
        values = loss_vector(losses, device)
        if device.type != "cpu":
            return Observed(values, values.isfinite())
        known = values.tolist()
        if all(map(math.isfinite, known)):
            return Observed(values, None)
        lost = frozenset(
            task
            for task, value in enumerate(known)
            if losses[task] is not None and not math.isfinite(value)
        )
        return Observed(values, values.isfinite(), lost)

    def learn_from_all(self, roles: Roles) -> None:
        """What the weighting learns, from the step's added losses where it has several micro-batches."""
        if self.solves.weightings["loss"].parameters():
            seen = self.observed(self._all_losses(), roles)
            self.solves.relearn("loss", seen)

    def watch_losses(self) -> None:
        """Has a loss on CUDA that the weighting cannot take raise from a later call."""
        weighting, status = self.solves.weightings["loss"], self.solves.statuses.get("loss")
        if "losses" in weighting.needs and status is not None and status.bits.is_cuda:
            name = type(weighting).__name__
            sound = (status.bits & INVALID_LOSS) == 0
            self._watch.post(sound.reshape(1), raise_invalid_loss(name))

    # ------------------------------------------------------------ what becomes of it

    def keep_weights(self, found: Found) -> None:
        """For the steps until the next solve; a step that is going to be skipped leaves the old ones."""
        if self.options.weights_every == 1:
            return
        own = self.own_weights(found)
        for name, weights in (("loss", found.weights), ("flat", found.flat), ("own", own)):
            if weights is None:
                continue
            old = self.weights.get(name)
            if self.ok is not None and old is not None:
                weights = torch.where(self.ok, weights, old)
            # in place where possible: a captured CUDA graph goes on writing to it
            if old is None:
                self.weights[name] = weights.clone()
            else:
                old.copy_(weights)

    def own_weights(self, found: Found) -> Tensor | None:
        """float64 [T], what the gradients of the tasks' own parameters are multiplied by; None: by 1."""
        return self.solves.weightings["loss"]._own_weights(found.weights)

    def own_update(
        self, task: int, row: Tensor, weights: Tensor | None, *, part: bool = False
    ) -> None:
        """The update of a task's own parameters <- ``row`` [P], times the task's entry of ``weights`` [T].

        ``part``: the row is that which is kept here, where each process keeps a part.
        """
        assert self.roles is not None
        update = (self.roles.own_rows(task) if part else self.roles.own[task]).update
        update.copy_(row)
        if weights is not None:
            update.mul_(weights[task].to(update))

    def add_flat(self, block: Block, scale: Tensor | None) -> None:
        """Adds the flat part of the last sharp step, where steps in between reuse it."""
        sharpness = self.options.sharpness
        if not isinstance(sharpness, SAM) or sharpness.every == 1 or not block.has_flat:
            return
        if scale is None:
            block.update.add_(block.kept)
        else:
            block.update.addcmul_(block.kept, scale.to(block.update))

    def mask_shared(self, roles: Roles, finite: Tensor) -> None:
        """Without a gradient of each task's own, one that is not finite takes the whole row with it."""
        assert roles.shared is not None
        if self.ok is None:
            roles.shared.update.masked_fill_(~finite.all().to(roles.shared.device), 0)

    def write_grads(self, roles: Roles, reached: set[int], own: set[int], finite: Tensor) -> None:
        """.grad of every reached parameter <- a view of its block's update; of the others <- None.

        Where the step is to be skipped, the gradients become infinite, as GradScaler expects.
        """
        ids = {id(roles.params[k]) for k in reached}
        # Frozen parameters too: a gradient of earlier must not move them.
        for param in self.params():
            if id(param) not in ids:
                param.grad = None
        self._written = []
        sharded = self.options.ranks is not None and self.options.ranks.copies > 0
        blocks: list[tuple[Block, list[int], int | None]] = []
        if roles.shared is not None:
            blocks.append((roles.shared, roles.shared_index, None))
        blocks += [(roles.own[t], roles.own_index[t], t) for t in roles.own]
        for block, index, task in blocks:
            if task is not None and task not in own:
                continue
            if self.ok is not None:
                block.update.masked_fill_(~self.ok.to(block.device), torch.inf)
            elif task is not None:
                block.update.masked_fill_(~finite[task].to(block.device), 0)
            for k, view in zip(index, block.views(block.update), strict=True):
                if k in reached:
                    # A tensor of its own: p.grad.data = ... (as Module.to does) leaves the view alone.
                    view = view.detach()
                    if sharded:
                        view = as_grad(view, roles.params[k])
                    roles.params[k].grad = view
                    self._written.append((roles.params[k], view, view._version))
        self._write_learned()

    def _write_learned(self) -> None:
        """.grad of what the weightings learn: of a loss as many times too large as the others."""
        for name, weighting in self.solves.weightings.items():
            learned = weighting.parameters()
            for param in learned:
                param.grad = None
            for param, found in zip(learned, self.solves.learned.get(name, ()), strict=False):
                grad = found.clone() if self.scale is None else found * self.scale.to(found)
                if self.ok is not None:
                    grad.masked_fill_(~self.ok.to(grad.device), torch.inf)
                param.grad = grad

    def record(
        self,
        roles: Roles,
        found: Found | None,
        squares: Tensor | None,
        scale: Tensor | None,
        after: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Diagnostics: the history, and warnings of a radius that is too large.

        Args:
            roles: the roles.
            found: the aggregation; None if nothing is shared.
            squares: float64 [T], squared norms of the shared rows; None if there are none for each task.
            scale: of the gradients.
            after: the losses at the perturbed parameters.
        """
        if roles.shared is None:
            squares = None
        self._measure_gram(roles, found, scale)
        if not self.solves.weightings["loss"].one_pass:
            self.watch_losses()
        watching = after is not None and self.options.strategy is None and self._radius.watching
        if not self.options.history and not watching:
            return
        device = roles.params[0].device
        clean = loss_vector(self.losses, device)
        rise = None if after is None else loss_vector(after, device) - clean
        if watching and rise is not None:
            self._radius.look(clean, rise, squares)
        if not self.options.history:
            return
        norms = None if squares is None else squares.sqrt()
        if norms is not None and scale is not None:
            norms = norms / scale.to(norms.device)
        fresh = squares is not None
        status = self.solves.statuses.get("loss") if fresh else None
        flat_status = self.solves.statuses.get("flat") if fresh else None
        residual = None if status is None else status.residual
        known = loss_vector(self._all_losses(), device)  # of all processes, where the step has them
        missing = self._missing(known)

        def shown(values: Tensor | None) -> Tensor | None:
            # a task that is missing has no weight of 0 and no gradient of length 0: it has none
            return None if values is None else torch.where(missing, torch.nan, values.to(device))

        self._record_args = dict(
            losses=known,
            weights=None if found is None else shown(found.weights),  # None: no weighted sum
            flat_weights=None if found is None else shown(found.flat),
            norms=shown(norms),
            gram=None if found is None else found.gram,
            sharpness=rise,
            status=None if status is None else _all_bits(status.bits),
            flat_status=None if flat_status is None else _all_bits(flat_status.bits),
            residual=None if residual is None else residual.max(),
        )

    def _missing(self, losses: Tensor) -> Tensor:
        """bool [T], the tasks that have no loss in this step, on any process."""
        if self.row_step is not None and self.row_step.there is not None:
            return ~self.row_step.there.to(losses.device)
        return losses.isnan()

    def _measure_gram(self, roles: Roles, found: Found | None, scale: Tensor | None) -> None:
        """Hands the Gram matrix of the task gradients, where the step has them, to the meters."""
        meters = self.due()
        if not meters or roles.shared is None or found is None or found.gram is None:
            return
        gram = found.gram
        if not found.clean:
            assert roles.rows is not None
            gram = self.families(scale).gram(roles.rows.jac, "jac")
        for meter in meters:
            meter.at_gram(gram)

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit, beside the weightings' states."""
        if self._loaded is not None:
            return self._loaded
        state: dict[str, Any] = {"steps": self.steps}
        if self.roles is not None:
            state.update(save_roles(self.roles, self.params()))
            state["weights"] = {name: w.clone() for name, w in self.weights.items()}
        if self.directions is not None:
            state["directions"] = self.directions.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state, the roles at the next step; {} starts anew."""
        self.drop()
        self.roles = None
        self.steps = int(state.get("steps", 0))
        self.weights = {}
        if self.options.ranks is not None:
            self.options.ranks.agreed = False
        self._loaded = state if "tasks" in state else None
        if self.directions is not None:
            self.directions.load_state_dict(state.get("directions", {"generator": None}))

    def _take_loaded(self) -> None:
        state, self._loaded = self._loaded, None
        assert state is not None
        device = self._trainable()[0].device
        self.roles = load_roles(state, self.params(), self._make_roles)
        self.weights = {name: w.to(device).clone() for name, w in state["weights"].items()}


def _aggregates(sharpness: Sharpness | None, how: str) -> bool:
    return isinstance(sharpness, SAM) and sharpness.aggregate == how


def _all_bits(bits: Tensor) -> Tensor:
    """The status bits of every problem of a batch together, 0-dim."""
    return functools.reduce(torch.bitwise_or, bits.reshape(-1).unbind())
