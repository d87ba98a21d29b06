"""The optimizer for torch: `zeta.core.update` on stacks of matrices, in place, and torch's own AdamW for the rest."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zeta import family
from zeta.coefficients import Steps, chosen
from zeta.core import COEFFICIENTS, Rule
from zeta.routing.layout import Route, batches, is_vector
from zeta.step_report import Report
from zeta.storage import wanted

from . import step as torch_step
from .adamw import Part, adamw, own_part
from .groups import (
    ADAMW,
    apart,
    check_capturable,
    check_carried,
    check_gradients,
    check_group,
    check_shapes,
    check_values,
    group_routes,
    near,
    word,
)
from .placement import Place
from .ranks import Ranks
from .report import Measured, of_batch, read
from .state import VERSION, check_state, load_values, plain, prepare

PRODUCTS = {"coefficients": COEFFICIENTS["jordan"], "ns_steps": None, "ns_dtype": None}  # options of Newton-Schulz
ADAMW_HALF = ("lr", "betas", "eps", "weight_decay")  # may be other numbers than those of the matrices
# What saved groups that do not say so were stepped with.
BEFORE = {"decay_vectors": True, "precondition_frequency": 1}


class Zeta(torch.optim.Optimizer):
    """Zeta for the matrices and AdamW for the rest, in one object: `Zeta(param_groups(model), lr=1e-3)`.

    An entry of a matrix moves by 0.2 lr (RMS), about as far as under AdamW: the lr of an AdamW recipe is a safe start,
    and the best was 8, 8 and 2 times AdamW's on our three small tasks. It starts from the paper's lr=1e-3,
    betas=(0.95, 0.99), eps=1e-8, weight_decay=0.1; runs of some hundred steps want a smaller b1. `adamw` (lr, betas,
    eps, weight_decay) sets AdamW's half apart, in groups of its own. Vectors, such as norms and biases, are not decayed
    without `decay_vectors`. AdamW's fused, foreach, differentiable and amsgrad are taken where they change nothing,
    else refused.

    `param_groups` reads the model; with `model.named_parameters()` names and shapes decide alone. A group's `treatment`
    ("zeta" or "adamw") overrules them. A group may have any keys of your own. Moments are
    float32 or better; a narrower parameter keeps what rounding took off it, so that no small step is lost.
    `ns_steps="auto"` takes as many Newton-Schulz steps as a matrix's shape needs (`zeta.auto_coefficients`). Each group
    has its own copy of a tensor `lr` or `weight_decay`: change `group["lr"]`. Raises ValueError for values out of
    range, TypeError for sparse or complex gradients, always before anything is changed.

    On one device a step reads nothing from a GPU, so that a CUDA graph may hold it once some steps are taken: tensors
    for `lr` and `weight_decay` are read at each replay, numbers stay as they were. `capturable=True` puts a group's
    tensors beside its parameters, and refuses ranks and optimizers that decompose matrices.

    Over ranks each matrix is orthogonalised by one of them. DTensors (FSDP2, tensor parallel) say all; DDP needs
    `process_group`, the ranks that hold the same parameters. `shard_state` leaves each rank the state of a part: rank
    0's `state_dict()` is not the whole then, `save_sharded` is. `comm_dtype` rounds what travels. All ranks must have
    gradients of the same parameters (zeros, where an expert saw no token), or the step raises RuntimeError.
    """

    rule: ClassVar[Rule] = family.zeta  # a class with another of your own is another optimizer
    make: ClassVar[Callable[..., Rule] | None] = None  # of a rule that has settings: it takes them by name

    def __init_subclass__(cls, rule: Rule | Callable[..., Rule] | None = None, **options: Any) -> None:
        """`rule`, or what makes one from settings, may be given in the class's first line."""
        super().__init_subclass__(**options)
        family.complete(cls, rule, "lr")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        coefficients: Steps = COEFFICIENTS["jordan"],
        ns_steps: int | Literal["auto"] | None = None,
        ns_dtype: torch.dtype | None = None,
        treatment: str | None = None,
        maximize: bool = False,
        decay_vectors: bool = False,
        adamw: Mapping[str, Any] | None = None,
        process_group: Any = None,
        shard_state: bool = False,
        comm_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        own = self._settings() if self.make else {}
        if settings.keys() - own - ADAMW.keys():
            strange = sorted(settings.keys() - own - ADAMW.keys())[0]
            meant = near(strange, {*signature(Zeta.__init__).parameters, *own, *ADAMW})
            remedy = f"did you mean {meant}?" if meant else "leave it out"
            raise TypeError(f"{type(self).__name__} takes no {strange}: {remedy}")
        self._check_products({"coefficients": coefficients, "ns_steps": ns_steps, "ns_dtype": ns_dtype})
        self._ranks = Ranks(process_group, shard_state, comm_dtype)
        self._coefficients = coefficients  # of which a group's own ns_steps takes the first
        self._shapes: dict[int, torch.Size] = {}  # by id: torch.Tensor's swap, of model.bfloat16(), takes no weak keys
        self._adamw = dict(adamw or {})
        self._exact: bool | None = None  # how a step is measured for `report`, if it is
        self._measured: list[Measured] = []
        if wrong := sorted(self._adamw.keys() - ADAMW_HALF):
            raise TypeError(f"adamw has {wrong[0]!r}, but takes {', '.join(ADAMW_HALF)}: rename it, or leave it out")
        given = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults: dict[str, Any] = {k: getattr(self.rule.defaults, k) if v is None else v for k, v in given.items()}
        defaults |= dict(
            coefficients=chosen(coefficients, ns_steps), ns_dtype=word(ns_dtype), treatment=treatment, maximize=maximize
        )
        defaults["decay_vectors"] = decay_vectors
        defaults |= own | settings | ({} if self.rule is family.zeta else {"rule": self._name()})
        super().__init__(params, defaults | {"version": VERSION})

    @classmethod
    def _settings(cls) -> dict[str, Any]:
        """What the rule's maker takes, with the defaults."""
        assert cls.make
        return {name: parameter.default for name, parameter in signature(cls.make).parameters.items()}

    @classmethod
    def _name(cls) -> str:
        """The class that has the rule, not a user's subclass of it."""
        return next(base.__name__ for base in cls.__mro__ if "rule" in vars(base))

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule with this group's settings. Raises ValueError for settings out of range."""
        return self.make(**{name: group[name] for name in self._settings()}) if self.make else self.rule

    def _check_products(self, options: dict[str, Any]) -> None:
        given = [name for name, default in PRODUCTS.items() if options.get(name, default) != default]
        if given and not self.rule.orthogonalizes:
            raise TypeError(f"{type(self).__name__} runs no Newton-Schulz, which {given[0]} is for: leave it out")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check_products(param_group)
        if "ns_dtype" in param_group:
            param_group = param_group | {"ns_dtype": word(param_group["ns_dtype"])}
        if "ns_steps" in param_group:
            coefficients = param_group.get("coefficients", self._coefficients)
            param_group = param_group | {"coefficients": chosen(coefficients, param_group["ns_steps"])}
            del param_group["ns_steps"]
        check_group(param_group, self.defaults, type(self).__name__)
        before = len(self.param_groups)
        try:
            given = param_group.keys()
            super().add_param_group({**param_group})
            self._complete(self.param_groups[-1])
            if self._adamw:
                self.param_groups[-1:] = apart(self.param_groups[-1], given, self._adamw)
                self._complete(self.param_groups[-1])
        except BaseException:  # a warning that is made an error, too
            del self.param_groups[before:]
            raise

    def _complete(self, group: dict[str, Any]) -> None:
        """Gives a new group what the optimizer needs. Raises ValueError where it cannot take the group."""
        self._check(group)
        for name in ("lr", "weight_decay"):
            if isinstance(group[name], Tensor):  # shared, a scheduler that multiplies in place would do so once a group
                beside = group["params"][0] if group.get("capturable") and group["params"] else group[name]
                group[name] = group[name].clone().to(beside.device)
        guessed = "routes" not in group
        group["routes"] = group_routes(group)
        for p in group["params"]:
            self._shapes[id(p)] = p.shape
            self.place(p)  # refuses what cannot be; and a step that is compiled could not look for it
        self._check(group)  # again, since ranks are known
        names = group.get("param_names") or [""] * len(group["params"])
        # "weight" is what the named_parameters() of a layer alone say
        nameless = [p for name, p in zip(names, group["params"], strict=True) if name in ("", "weight") and p.ndim > 1]
        if guessed and nameless and group["treatment"] is None:
            shapes = sorted({tuple(p.shape) for p in nameless})
            warnings.warn(
                f"parameters of shapes {shapes} have no names that say their layers: embeddings and output heads "
                "cannot be told from other matrices, so all are taken for matrices; pass "
                "zeta.backends.torch.param_groups(model), or named_parameters() of the whole model",
                stacklevel=5,
            )

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for values out of range: of a new group, and of what was written into it since."""
        check_values(group)
        check_carried(group, type(self).__name__)
        check_capturable(group, self.rule_of(group).decomposes, self._ranks.shared, type(self).__name__)

    def __getstate__(self) -> dict[str, Any]:
        if self._ranks.shard and any(self._ranks.parted(p) for group in self.param_groups for p in group["params"]):
            raise TypeError(
                "shard_state=True leaves each rank the state of a part, so that a copy could not step alone: "
                "copy through save_sharded and load_sharded"
            )
        return super().__getstate__() | {"_coefficients": self._coefficients, "_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_ranks"):  # a copy: process groups are not copied, so it steps alone
            self._ranks, self._shapes, self._exact, self._measured = Ranks(), {}, None, []

    def needs(self) -> dict[Tensor, dict[str, tuple[int, ...]]]:
        """The keys of each parameter's state, with their shapes."""
        pairs = ((p, Route(*r)) for g in self.param_groups for p, r in zip(g["params"], g["routes"], strict=True))
        return {p: wanted(self.rule.keeps, r, tuple(p.shape)) for p, r in pairs}

    def place(self, p: Tensor) -> Place | None:
        """Where the ranks keep p and its state; None where this process alone knows of it."""
        return self._ranks.place(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups, type(self).__name__)
        if not torch.compiler.is_compiling():  # which could not trace them
            for group in self.param_groups:
                self._check(group)
            check_shapes(self.param_groups, self._shapes)
            for group in self.param_groups:
                for p in group["params"]:
                    self.place(p)  # of one that was swapped, as accelerate does when it shards a model
        # torch.compile, torch 2.13, takes neither writes to views of DTensors nor asynchronous collectives. A decorator
        # would import the compiler, two seconds, for those who need no optimizer.
        untraced: Callable[..., Any] = torch.compiler.disable
        prepared = untraced(self._prepare_on_ranks)() if self._ranks.shared else self._prepare()
        measured: list[Measured] = []
        exact = None if torch.compiler.is_compiling() else self._exact
        for group, (routes, vectors) in zip(self.param_groups, prepared, strict=True):
            adamw(vectors, group)
            rule = self.rule_of(group)
            for batch in batches({p: (r, (p.dtype, p.device)) for p, r in routes.items()}):
                u = torch_step.step(rule, self.state, group, batch, routes)
                if exact is not None:
                    measured.append(of_batch(batch, u, group["lr"], exact))
                del u  # before the next batch is stacked
        if self._ranks.shared:
            untraced(self._exchange)()
        self._measured = measured
        return loss

    def report(self, exact: bool = False) -> Report:
        """What the last step did to each matrix: its rate, the RMS of update and weight, the update's orthogonality.

        The first call starts the measuring, for all steps from then on but compiled ones; before it there are no rows.
        Weights are read at the call: make it before they change again. `exact` multiplies every update with itself, in
        place of one random vector. Over ranks a matrix that several hold is left out.
        """
        self._exact = exact
        return Report(read(self._measured, self.param_groups))

    def _prepare(self) -> list[tuple[dict[Tensor, Route], list[Part]]]:
        """({matrix that nobody else knows of: route}, what AdamW steps) of each group, of all that have gradients.

        Gives them state where they have none.
        """
        result = []
        for group in self.param_groups:
            alone: dict[Tensor, Route] = {}
            vectors: list[Part] = []
            for p, r in _routes(group).items():
                state, place = self.state[p], self.place(p)
                prepare(state, p, r, self.rule.keeps, place)
                if r.treatment == "adamw":
                    vectors.append(own_part(p, state, place, is_vector(r, tuple(p.shape))))
                elif place is None:
                    alone[p] = r
            result.append((alone, vectors))
        return result

    def _prepare_on_ranks(self) -> list[tuple[dict[Tensor, Route], list[Part]]]:
        """The same, once the ranks agree."""
        self._ranks.agree(self.param_groups)
        return self._prepare()

    def _exchange(self) -> None:
        """Steps the matrices that several ranks hold."""
        for group in self.param_groups:
            routes = _routes(group)
            matrices = {p: r for p, r in routes.items() if r.treatment == "zeta"}
            self._ranks.step(self.rule_of(group), self.state, group, matrices)
            self._ranks.publish(routes)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what `state_dict()` gave: float32 moments stay float32, nothing is shared with the argument.

        Raises ValueError for state of other shapes, of another optimizer or version, and changes nothing then. Hooks
        are called as torch.optim.Optimizer does, whose own form, torch 2.13, rounds moments to the parameter's dtype.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        check_state(self.param_groups, state_dict, self.rule.keeps, self.place)
        state = defaultdict(dict, load_values(self.param_groups, state_dict, self.place))
        groups = []
        for group, saved in zip(self.param_groups, deepcopy(state_dict["param_groups"]), strict=True):
            own = {key: group[key] for key in ("params", "routes")}
            tuples = {key: plain(saved[key]) for key in ("betas", "coefficients")}
            tuples["ns_dtype"] = word(saved["ns_dtype"])  # before words, a torch.dtype was saved
            former: dict[str, Any] = {key: value for key, value in BEFORE.items() if key in group}
            groups.append(group | former | saved | own | tuples)
        self.__setstate__({"state": state, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _routes(group: dict[str, Any]) -> dict[Tensor, Route]:
    """Of the parameters that have gradients."""
    return {p: Route(*r) for p, r in zip(group["params"], group["routes"], strict=True) if p.grad is not None}
