"""MultiTaskOptimizer: per-task gradients, aggregation and FS-MTL around any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmtl import amp
from flatmtl.columns import Per, check_per, groups_of
from flatmtl.distributed.counts import Samples
from flatmtl.distributed.ranks import ProcessGroup, find_ranks
from flatmtl.engine import Engine, Options
from flatmtl.fits import check_method, check_parts, check_ranks, check_shards
from flatmtl.history import History
from flatmtl.jacobian import Batched, read_jacobian
from flatmtl.losses import Losses
from flatmtl.passes import Closure
from flatmtl.representation import Representation
from flatmtl.roles import named_shared
from flatmtl.sharpness import SAM, SAMO, Sharpness, check_flag, check_whole, default_radii
from flatmtl.solves import Solves
from flatmtl.strategies import MAML, CoopFlat, Strategy, check_fits
from flatmtl.weighting import Weighting

if TYPE_CHECKING:
    from flatmtl.affinity.meter import Meter

# Several graphs, gradients as side effects, flags on the host: traced by torch.compile, a step came
# out wrong. Compiled code around it breaks here; what the closure calls may be compiled. (The public
# torch.compiler.disable is the same, and imports the compiler, a second's work, at once.)
_eager = torch._disable_dynamo  # type: ignore[attr-defined]


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
        sharpness: ``SAM(...)`` or ``SAMO(...)``, or None for the plain method. The radii live in the
            parameter groups as ``"rho"`` and ``"rho_task"`` and can be edited there at any time. Or a
            strategy that takes gradients elsewhere for another end: ``MAML(...)``, ``CoopFlat(...)``; what
            is said of sharpness below holds for them too, unless they say otherwise.
        shared: the shared parameters; by default those that at least two tasks reach (all reached
            ones if there is one task).
        model: the module whose buffers (BatchNorm statistics) the perturbed passes must leave alone,
            and whose parameter names errors should use.
        nonfinite: what a NaN or infinity in a task's gradient does. "raise": FloatingPointError, with
            all parameters as they were. On CUDA, where looking at once would stall the device, the
            task is left out of that step as with "mask" and the error comes from a later call. "mask":
            the task is left out (weight 0, own parameters' gradient 0); ``last_status()`` tells. (Where a
            step is one backward pass for all tasks, it takes the shared parameters' step with it.) "skip":
            the step changes nothing (this reads a flag from the device unless the base optimizer takes
            ``found_inf`` itself, as the fused ones do, and nothing is counted: no interval, warm-up or
            SAMO). Under a GradScaler it is always "skip".
        jacobian: how the tasks' gradients are taken: "sequential", a backward pass each; "batched" or
            ``Batched(chunk)``, several at once by vectorisation; ``Representation(module)``, at the output
            of a module, with one backward pass through what stands before it (not with sharpness).
        row_dtype: of the rows in which task gradients are kept; ``torch.bfloat16`` (or float16) halves
            their memory for float32 parameters, the only ones it is for. Sums and the update stay
            float32. None: the parameters' dtype.
        weights_every: solve for weights at every so many steps; in between, the last ones are used again
            and the step is one backward pass of the weighted loss. With sharpness those steps take one
            perturbation for all tasks (Eq. 9 of the paper); "decomposed" and "direct" only.
        weights_per: what has weights of its own: the "model" (all shared parameters together), every
            parameter "group", "layer" (module that holds parameters; needs ``model``) or "parameter", or
            lists of parameters (the others form one more group). One Gram matrix each, solved in one
            batch; for the weightings that look at nothing else.
        replay_rng: with sharpness, the perturbed passes draw the same random numbers (dropout masks) as
            the clean one. torch's generators only.
        history: keep the diagnostics of the last so many steps, ``history`` (0: none).
        process_group: where several processes train together (torch.distributed), each on its part of a
            batch: the group of them. "model": found from ``model``, a DistributedDataParallel (or one that
            holds some). None: this process trains by itself. Every rank's step is that of one process on
            the whole batch; ``docs/scaling.md`` has what it sends.
        sync_perturbation: with sharpness and several processes: perturb along the gradient of the whole
            batch, as one process would. False: each rank along that of its own part (m-sharpness, as in
            Foret et al., arXiv 2010.01412; not with SAMO).
        shard_rows: each of n processes keeps 1/n of every task's row: 2 + T/n rows in place of T, and
            without sharpness about half of the traffic (``docs/scaling.md``). For weightings that look at
            Gram matrices (or losses); one micro-batch a step; with sharpness "decomposed" and "direct" only,
            at every step.

    Raises:
        TypeError, ValueError: an argument is none of the above.
        NotImplementedError: a way that several processes do not know yet.
    """

    # GradScaler.step hands over its flag and calls step() either way, so that a step always ends.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        weighting: Weighting,
        sharpness: Sharpness | Strategy | None = None,
        shared: Iterable[Tensor] | None = None,
        model: nn.Module | None = None,
        nonfinite: Literal["raise", "mask", "skip"] = "raise",
        jacobian: Literal["sequential", "batched"] | Batched | Representation = "sequential",
        row_dtype: torch.dtype | None = None,
        weights_every: int = 1,
        weights_per: Per = "model",
        replay_rng: bool = False,
        history: int = 0,
        process_group: ProcessGroup | Literal["model"] | None = "model",
        sync_perturbation: bool = True,
        shard_rows: bool = False,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                "base_optimizer must be a torch.optim.Optimizer, got "
                + (
                    base_optimizer if isinstance(base_optimizer, type) else type(base_optimizer)
                ).__name__
            )
        if isinstance(base_optimizer, torch.optim.LBFGS):
            raise TypeError(
                "base_optimizer must step without a closure, got LBFGS: it runs the losses by itself, "
                "several times a step, where nothing can aggregate their gradients"
            )
        if isinstance(base_optimizer, MultiTaskOptimizer):
            raise TypeError("base_optimizer must be the optimizer itself, got a MultiTaskOptimizer")
        if not isinstance(weighting, Weighting):
            raise TypeError(
                "weighting must be a flatmtl Weighting (flatmtl.weighting.by_name makes one from a "
                f"name), got {weighting!r}"
            )
        strategy = sharpness if isinstance(sharpness, (MAML, CoopFlat)) else None
        if not (strategy or sharpness is None or isinstance(sharpness, (SAM, SAMO))):
            raise TypeError(
                "sharpness must be flatmtl.SAM(...), flatmtl.SAMO(...), flatmtl.MAML(...), "
                f"flatmtl.CoopFlat(...) or None, got {sharpness!r}"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if nonfinite not in ("raise", "mask", "skip"):
            raise ValueError(f"nonfinite must be 'raise', 'mask' or 'skip', got {nonfinite!r}")
        if row_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"row_dtype must be torch.bfloat16, torch.float16 or None, got {row_dtype!r}"
            )
        if not isinstance(replay_rng, bool):
            raise TypeError(f"replay_rng must be True or False, got {replay_rng!r}")
        check_flag("sync_perturbation", sync_perturbation)
        check_flag("shard_rows", shard_rows)
        params = [p for group in base_optimizer.param_groups for p in group["params"]]
        ranks = find_ranks(process_group, model, params)
        how = read_jacobian(jacobian)
        if sharpness is not None and isinstance(how, Representation):
            raise ValueError(
                "jacobian must not be Representation with sharpness, which needs every task's gradient "
                "in the trunk itself"
            )
        if shared is not None and isinstance(how, Representation):
            raise ValueError(
                "shared must not be given with Representation: what stands before its module is shared"
            )
        if check_whole("weights_every", weights_every, 1) > 1 and (
            isinstance(sharpness, SAMO)
            or (isinstance(sharpness, SAM) and sharpness.aggregate in ("second", "each"))
        ):
            raise ValueError(
                "weights_every must be 1 with SAMO and with aggregate='second' or 'each', got "
                f"{weights_every}"
            )
        if strategy is not None:
            check_fits(
                strategy,
                [p for group in base_optimizer.param_groups for p in group["params"]],
                weighting=weighting,
                weights_every=weights_every,
                sequential=how == "sequential",
                shared=shared,
                row_dtype=row_dtype,
            )
        if ranks is not None:
            check_ranks(sharpness, how, weighting, sync_perturbation)
            if ranks.copies:
                check_shards(how, weights_every)
        if shard_rows and ranks is not None and ranks.copies:
            raise ValueError("shard_rows must be False where parameters are sharded (FSDP2)")
        if shard_rows or (ranks is not None and ranks.copies):
            what = (
                "shard_rows must be False" if shard_rows else "params must not be sharded (FSDP2)"
            )
            check_parts(what, weighting, sharpness, weights_per, sync_perturbation)
        check_method(weighting, sharpness or strategy, how, weights_every, weights_per)
        # The hooks' registries only: param_groups, state and defaults are the base optimizer's.
        super().__init__([torch.empty(0)], {})
        self.base_optimizer = base_optimizer
        self.weighting = weighting
        # one that is linear with the same weights for both parts does for them together
        apart = isinstance(sharpness, SAM) and not weighting.one_pass
        self.flat_weighting = weighting.twin() if apart else None
        second = isinstance(sharpness, SAM) and sharpness.aggregate == "second"
        self.outer_weighting = (
            self.flat_weighting.twin() if second and self.flat_weighting is not None else None
        )
        self._options = Options(
            sharpness=sharpness if isinstance(sharpness, (SAM, SAMO)) else None,
            model=model,
            nonfinite=nonfinite,
            jacobian=how,
            row_dtype=row_dtype,
            weights_every=weights_every,
            replay_rng=replay_rng,
            history=check_whole("history", history, 0),
            strategy=strategy,
            ranks=ranks,
            sync_perturbation=sync_perturbation,
            shard_rows=shard_rows,
        )
        self._shared = named_shared(shared, self._all_params(), self._label)
        self._per = check_per(weights_per, self._all_params(), model, self._label)
        self._start_anew()
        self._add_learned()  # nothing above has changed the base optimizer, should it have raised
        for group in self.param_groups:
            self._default_radii(group)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._SAVED.values() and "_engine" in self.__dict__:
            raise AttributeError(
                f"{name} must be given to MultiTaskOptimizer(...): it cannot be replaced later"
            )
        super().__setattr__(name, value)

    def _start_anew(self) -> None:
        """What a copy does not inherit: buffers are made again at its first step."""
        named = {name: self.__dict__[attribute] for name, attribute in self._SAVED.items()}
        solves = Solves({name: w for name, w in named.items() if w is not None})
        groups = None if self._per == "model" else self._groups
        self._engine = Engine(
            self._options, solves, self._all_params, self._shared, self._label, groups
        )

    def _groups(self) -> dict[int, int]:
        return groups_of(self._per, self.param_groups, self.model)

    def _weightings(self) -> list[Weighting]:
        found = [self.weighting, self.flat_weighting, self.outer_weighting]
        return [weighting for weighting in found if weighting is not None]

    def _add_learned(self) -> None:
        """Puts what the weightings learn into a parameter group each, where the caller has not."""
        groups = self.base_optimizer.param_groups
        known = {id(p) for group in groups for p in group["params"]}
        for weighting in self._weightings():
            learned = weighting.parameters()
            if not learned or all(id(p) in known for p in learned):
                continue
            for param in learned:
                param.data = param.data.to(self._all_params()[0].device)
            group: dict[str, Any] = {"params": learned}
            lr = getattr(weighting, "lr", None)
            if lr is not None:
                group["lr"] = lr
            if "weight_decay" in self.base_optimizer.defaults:
                group["weight_decay"] = 0.0  # a weight has no reason to tend to 0
            if "maximize" in self.base_optimizer.defaults:
                group["maximize"] = False  # its gradient is that of something to be made small
            self.base_optimizer.add_param_group(group)

    # a weighting's name in an engine -> in a state dict
    _SAVED = MappingProxyType(
        {"loss": "weighting", "flat": "flat_weighting", "outer": "outer_weighting"}
    )

    _KEPT = (
        "base_optimizer",
        "weighting",
        "flat_weighting",
        "outer_weighting",
        "_options",
        "_shared",
        "_per",
    )

    def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
        kept = {name: self.__dict__[name] for name in self._KEPT}
        return {**kept, "engine": self._engine.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__init__(self, [torch.empty(0)], {})
        self.__dict__.update({name: state[name] for name in self._KEPT})
        self._start_anew()
        self._engine.load_state_dict(state["engine"])

    # ------------------------------------------------------------ what it was given

    @property
    def sharpness(self) -> Sharpness | Strategy | None:
        """``SAM(...)``, ``SAMO(...)``, ``MAML(...)``, ``CoopFlat(...)`` or None."""
        return self._options.strategy or self._options.sharpness

    @property
    def model(self) -> nn.Module | None:
        """The module whose buffers are kept."""
        return self._options.model

    @property
    def runs_again(self) -> bool:
        """Whether a step runs its closures more than once: with sharpness or an exact ``AffinityProbe``."""
        meters = self._engine.meters
        return self.sharpness is not None or any(m.options.mode == "exact" for m in meters)

    @property
    def history(self) -> History:
        """The diagnostics of the last steps.

        Raises:
            RuntimeError: none are kept (``history=0``), or there was no step yet.
        """
        if not self._options.history:
            raise RuntimeError("history must be above 0 for diagnostics to be kept, got 0")
        if self._engine.history is None:
            raise RuntimeError("there was no step yet: no history")
        return self._engine.history

    def _attach(self, meter: Meter) -> None:
        """Has an ``AffinityProbe``'s meter measure at the steps from now on."""
        if isinstance(self.sharpness, (SAMO, CoopFlat)) or isinstance(
            self._options.jacobian, Representation
        ):
            raise ValueError(
                "optimizer must take every task's gradient of the shared parameters for an AffinityProbe: "
                "SAMO, CoopFlat and Representation do not"
            )
        if self._options.shard_rows and meter.options.mode == "exact":
            raise ValueError(
                "optimizer must keep whole rows (shard_rows=False) for an AffinityProbe in exact mode"
            )
        ranks = self._options.ranks
        if ranks is not None and ranks.copies:
            raise NotImplementedError("params must not be sharded (FSDP2) with an AffinityProbe")
        if self._options.shard_rows and meter.options.push:
            raise ValueError(
                "optimizer must keep whole rows (shard_rows=False) for an AffinityProbe with momentum=True"
            )
        self._engine.meters.append(meter)
        self._compare_probes()

    def _detach(self, meter: Meter) -> None:
        if meter not in self._engine.meters:
            raise RuntimeError("the probe must be attached to be detached: it is not any more")
        self._engine.meters.remove(meter)
        self._compare_probes()

    def _compare_probes(self) -> None:
        """Has the next step see to it that all processes that train together measure alike."""
        if self._options.ranks is not None:
            self._options.ranks.agreed = False

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
        """Adds a group to the base optimizer; ``"rho"`` and ``"rho_task"`` default to the sharpness's."""
        if "base_optimizer" not in self.__dict__:
            return  # Optimizer.__init__ before the base is known
        self._check_group(param_group)
        self.base_optimizer.add_param_group(param_group)
        self._default_radii(self.param_groups[-1])

    def _check_group(self, group: dict[str, Any]) -> None:
        if self.sharpness is not None and group.get("maximize"):
            raise ValueError("base_optimizer must minimise with sharpness, got maximize=True")

    def _default_radii(self, group: dict[str, Any]) -> None:
        self._check_group(group)
        default_radii(self._options.sharpness, group)

    @property
    def learned(self) -> list[Tensor]:
        """What the weightings learn: parameters of the base optimizer that are none of the model's."""
        return [p for weighting in self._weightings() for p in weighting.parameters()]

    def _all_params(self) -> list[Tensor]:
        learned = set(map(id, self.learned))
        params = [p for group in self.param_groups for p in group["params"]]
        return [p for p in params if id(p) not in learned] if learned else params

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets ``.grad``, and drops what ``backward`` has gathered since the last step.

        Args:
            set_to_none: None in place of zeros.
        """
        self._engine.drop()
        if set_to_none:
            self.base_optimizer.zero_grad(set_to_none=True)
            return
        for param in (p for group in self.param_groups for p in group["params"]):
            if param.grad is not None:
                # a view of the update buffer would stay a view: gradients of other code add to it
                param.grad = torch.zeros_like(param.grad)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with an entry ``"flatmtl"`` for the weightings and the step."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        states = self._engine.solves.state_dict()
        own = {self._SAVED[name]: state for name, state in states.items()}
        own["engine"] = self._engine.state_dict()
        state = {**self.base_optimizer.state_dict(), "flatmtl": own}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state; one of the plain base optimizer is taken too (the rest starts anew).

        Raises:
            ValueError: it does not fit the base optimizer or the weighting.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = state_dict.get("flatmtl", {})
        base = {key: value for key, value in state_dict.items() if key != "flatmtl"}
        for group in base.get("param_groups", ()):
            self._check_group(group)
        solves = self._engine.solves
        saved = solves.state_dict()
        try:
            solves.load_state_dict(
                {name: own[key] for name, key in self._SAVED.items() if key in own}
            )
            self.base_optimizer.load_state_dict(base)
        except BaseException:
            solves.load_state_dict(saved)
            raise
        self._engine.load_state_dict(own.get("engine", {}))
        for group in self.param_groups:
            self._default_radii(group)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # ------------------------------------------------------------ a step

    @_eager
    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Closure] | None = None, *, samples: Samples = None
    ) -> Losses | None:
        """One training step.

        Args:
            closure: computes the task losses: a sequence of scalar tensors, a mapping from task names
                to them (in either, None for a task that is missing from the batch), or a 1-D tensor. It
                runs the forward pass only: no ``backward()``, no ``zero_grad()``. With sharpness it is
                called once plainly and once for every task; if it takes an argument ``tasks``, those
                calls pass ``tasks=[i]`` (the task's number, or its name if it returns a mapping) and
                it may return that task's loss alone. (``MAML`` knows another argument, ``query``; what
                ``CoopFlat`` calls is said there.) A list of closures is one for each micro-batch: losses
                and gradients are added up. It may be left out after ``backward``.
            samples: where several processes train: how many samples this rank's losses are means of, one
                number, or one for each task (a sequence or a mapping). Gradients are weighted by them, so
                that uneven batches and labels give the mean over all samples. None: the mean over the
                ranks that have the task.

        Returns:
            The losses of the clean pass, detached, as the closure returned them; None without one.

        Raises:
            ValueError, TypeError: the losses do not fit. Parameters are as they were.
            FloatingPointError: a gradient is not finite (``nonfinite="raise"``).
            RuntimeError: neither a closure nor a ``backward()`` before.
        """
        found_inf = getattr(self, "found_inf", None)  # from GradScaler.step
        losses = None
        if closure is not None:
            if found_inf is not None:
                raise ValueError(
                    "closure must not come through GradScaler.step, which looks at gradients before it "
                    "runs: call backward(closure, scaler=scaler), then scaler.step(optimizer)"
                )
            self._engine.drop()
            losses = self.backward(closure, samples=samples)
        elif not self._engine.is_open:
            raise RuntimeError("closure must be given, or backward(losses) called before step()")
        elif self._engine.scale is not None and found_inf is None:
            raise RuntimeError(
                "step must come through scaler.step(optimizer) after backward(losses, scaler=scaler): the "
                "gradients are scaled"
            )
        try:
            made = amp.step(self.base_optimizer, self, self._engine.ok, on_host=self._engine.counts)
        except BaseException as failure:
            self._engine.not_stepped(failure)
            raise
        if made:
            self._engine.stepped()
        else:
            self._engine.drop()
        return losses

    @_eager
    def backward(
        self,
        losses: Losses | Closure | Sequence[Closure],
        *,
        scaler: torch.amp.GradScaler | None = None,
        samples: Samples = None,
    ) -> Losses:
        """Writes the aggregated gradients into ``.grad``, so that clipping fits before ``step()``.

        Called again before ``step()`` or ``zero_grad()``, it adds a further micro-batch: gradients are
        those of the added losses (not with sharpness, which takes a list of closures).

        Args:
            losses: as a closure of ``step`` returns them; with sharpness a closure, or one for each
                micro-batch.
            scaler: the ``GradScaler`` of a float16 autocast region. The losses are given as they are;
                ``.grad`` comes scaled, as after ``scaler.scale(loss).backward()``, so that
                ``scaler.unscale_(optimizer)``, ``scaler.step(optimizer)`` and ``scaler.update()`` follow as
                ever. Weights are those of the unscaled gradients. Where any task's gradient is not
                finite, the step is skipped and leaves everything as it was.
            samples: as in ``step``.

        Returns:
            The losses of the clean pass, detached.

        Raises:
            ValueError, TypeError: sharpness needs a closure; or the losses do not fit.
            FloatingPointError: a gradient is not finite (``nonfinite="raise"``, no scaler).
            RuntimeError: a second micro-batch with sharpness.
        """
        scale = amp.scale_of(scaler, self._all_params())
        for group in self.param_groups:
            self._check_group(group)
        passes = self._engine.gradients(losses, self.param_groups, scale, samples)
        assert passes.total is not None
        return passes.total

    def last_status(self) -> dict[str, Any]:
        """What the last step found; reading it waits for the device.

        Returns:
            "finite": whether each task's gradients were, by name; "loss" and, with sharpness, "flat" (and
            "outer" for ``aggregate="second"``): the ``SolveStatus`` of each aggregation that it came to.

        Raises:
            RuntimeError: there was no step yet.
        """
        engine = self._engine
        if engine.finite is None or engine.roles is None:
            raise RuntimeError("there was no step yet: no status")
        finite = dict(zip(engine.roles.tasks, engine.finite.tolist(), strict=True))
        return {"finite": finite, **engine.solves.statuses}
