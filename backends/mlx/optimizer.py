"""The optimizer for MLX: a rule's `update` on stacks of matrices, and `zeta.adamw` for the rest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_map_with_path

from zeta import adamw, family
from zeta.coefficients import Steps, chosen
from zeta.core import COEFFICIENTS, Hyper, Rule
from zeta.routing.by_name import route, warn_of_doubts
from zeta.routing.layout import Route, check_route, is_vector
from zeta.step_report import Report

from . import sharded, step
from .half import Half
from .orthogonalize import newton_schulz, working_dtype
from .ranks import Messages, dispatch, shared, together
from .report import KEY, Batch, of_batch, of_weights, read
from .sharded import is_shard, whole_shape
from .stacks import in_batches
from .state import (
    VERSION,
    State,
    check_known,
    check_names,
    check_rate,
    check_routes,
    check_shapes,
    check_state,
    check_step,
    dtype_of,
    is_floating,
    is_unlike,
    keyed,
    leaf,
    not_taken,
    of_width,
    prepare,
    round_back,
    tree_flatten,
    wide_dtype,
    widen,
)
from .step import Stepped, Turns


class Zeta(Optimizer):
    """Zeta for the matrices and AdamW for the rest, in one object: `Zeta(learning_rate=1e-3).update(model, grads)`.

    An entry of a matrix moves by 0.2 learning_rate (RMS), about as far as under AdamW: the rate of an AdamW recipe is a
    safe start, and the best was 8, 8 and 2 times AdamW's on our three small tasks. It starts from the paper's
    learning_rate=1e-3, betas=(0.95, 0.99), eps=1e-8, weight_decay=0.1; runs of some hundred steps want a smaller b1.
    `adamw` (learning_rate, betas, eps, weight_decay) sets AdamW's half apart; its rate follows the matrices' in
    proportion. Vectors, such as norms and biases, are not decayed without `decay_vectors`.

    `routes=zeta.routes(model)` reads the model; without, paths and shapes decide alone. `learning_rate` may be a
    schedule. Moments are float32; a narrower parameter keeps what rounding took off it, so that no small step is lost.
    `ns_steps="auto"` takes as many Newton-Schulz steps as a matrix's shape needs (`zeta.auto_coefficients`).
    With a `group` of ranks that hold the same parameters, each matrix is orthogonalised by one of them: give all the
    same gradients, `grads = mlx.nn.average_gradients(grads)`. In a `MultiOptimizer`, whose order differs from rank to
    rank (MLX 0.32), let `mx.async_eval(grads)` start them first. Inside `mx.compile` messages keep their order only if
    all gradients are one Zeta's, and no other message is sent.
    Under `mlx.nn.fully_shard` a rank holds some rows of parameters, gradients and state; matrices are still taken
    whole, and each is orthogonalised by one rank. Read the routes before that, and give the same group:
    `routes = zeta.routes(model); model = nn.fully_shard(model, group=group); Zeta(1e-3, routes=routes, group=group)`.
    Raises ValueError for values out of range, and for a state that is not of this optimizer or of these parameters.
    Settings are no part of the state, as in MLX's own optimizers: give them again.
    """

    rule: Rule = family.zeta  # a class with another of your own is another optimizer
    make: ClassVar[Callable[..., Rule] | None] = None  # of a rule that has settings: it takes them by name

    def __init_subclass__(cls, rule: Rule | Callable[..., Rule] | None = None, **options: Any) -> None:
        """`rule`, or what makes one from settings, may be given in the class's first line."""
        super().__init_subclass__(**options)
        family.complete(cls, rule, "learning_rate")

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array] | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        routes: Mapping[str, Route] | None = None,
        decay_vectors: bool = False,
        adamw: Mapping[str, Any] | None = None,
        coefficients: Steps = COEFFICIENTS["jordan"],
        ns_steps: int | Literal["auto"] | None = None,
        ns_dtype: mx.Dtype | None = None,
        group: mx.distributed.Group | None = None,
        **settings: Any,
    ) -> None:
        if self.make:
            self.rule = self.make(**settings)
        elif settings:
            raise TypeError(f"{type(self).__name__} {not_taken(next(iter(settings)))}")
        check_routes(routes)
        d = self.rule.defaults
        learning_rate = d.lr if learning_rate is None else learning_rate
        check_rate(learning_rate, type(self).__name__)
        products = coefficients != COEFFICIENTS["jordan"] or ns_steps is not None or ns_dtype is not None
        if products and not self.rule.orthogonalizes:
            raise TypeError(
                f"{type(self).__name__} runs no Newton-Schulz, which coefficients, ns_steps and ns_dtype are for: "
                "leave them out"
            )
        given: dict[str, Any] = {
            k: v for k, v in dict(betas=betas, eps=eps, weight_decay=weight_decay).items() if v is not None
        }
        hyper = replace(d, lr=0.0 if callable(learning_rate) else learning_rate, **given)  # checks the values
        super().__init__()  # type: ignore[no-untyped-call]
        self._loaded = False  # a state that no step has seen
        self._exact: bool | None = None  # how a step is measured for `report`, if it is
        self._batches: list[Batch] = []
        self.state[self._version] = mx.array(1)
        self._maybe_schedule("learning_rate", learning_rate)
        self.state["learning_rate"] = mx.array(self.learning_rate)  # a schedule may give a Python number
        self.betas, self.eps, self.weight_decay = hyper.betas, hyper.eps, hyper.weight_decay
        self.routes, self.coefficients, self.ns_dtype = routes or {}, chosen(coefficients, ns_steps), dtype_of(ns_dtype)
        self.decay_vectors, self._adamw = decay_vectors, Half(hyper, dict(adamw or {}), learning_rate)
        self.group = group if group is not None and group.size() > 1 else None

    @property
    def _version(self) -> str:
        name = next(c.__name__ for c in type(self).__mro__ if "rule" in vars(c))  # of a subclass, that of its base
        return VERSION if self.rule is family.zeta else f"{VERSION}_{name}"

    @property
    def state(self) -> dict[str, Any]:
        """All that there is to save: `mx.save_safetensors(file, dict(tree_flatten(optimizer.state)))`."""
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if isinstance(state, dict) and KEY in state:
            state = {key: value for key, value in state.items() if key != KEY}
        check_state(state, getattr(self, "_state", {}), self.rule.keeps, self._version)
        self._state, self._loaded = state, True

    def init(self, parameters: Any) -> None:
        """Zeros for whatever these parameters lack; what is there, as after loading a state, stays."""
        if self._loaded:
            check_known(self.state, dict(tree_flatten(parameters)))
        self._fill(parameters)

    def _fill(self, parameters: Any) -> None:
        params = {name: p for name, p in tree_flatten(parameters) if is_floating(p)}
        routes = {name: self._route(name, p) for name, p in params.items()}
        warn_of_doubts(routes, "pass routes=zeta.routes(model)")
        self._state = keyed(self._state, parameters)
        super().init(parameters)
        for name, state in self._states(params).items():
            prepare(state, params[name], routes[name], self.rule.keeps, self.step)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Nothing: `init` knows the path, too."""

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The parameters after one step, as a tree like `gradients`. The state changes only if nothing is raised."""
        grads, params = dict(tree_flatten(gradients)), dict(tree_flatten(parameters))
        check_step(grads, params)
        if self._loaded:
            check_names(self.state, params, grads)
        routes = {name: self._route(name, params[name]) for name in grads}
        states = self._states(grads)
        if any(is_unlike(s, params[n], routes[n], self.rule.keeps) for n, s in states.items()):
            self._fill(tree_map_with_path(lambda name, _: params[name], gradients))
            states = self._states(grads)
        check_shapes(states, params, routes, self.rule.keeps)
        scheduled = {name: mx.array(schedule(self.step)) for name, schedule in self._schedulers.items()}

        rate = mx.array(scheduled.get("learning_rate", self.learning_rate))
        rate = rate.astype(wide_dtype(rate.dtype))  # in half precision, 1 - lr * wd may be 1
        hyper = Hyper(rate, self.betas, self.eps, self.weight_decay)
        turns = Turns(2 if self.group else 1)  # a rank that owns nothing of a batch begins the next
        new, after = dict[str, mx.array](), dict[str, State]()
        for name, (w, kept) in self._step(hyper, routes, together(grads, self.group), states, params, turns):
            new[name], after[name] = round_back(w, params[name], kept)
            turns.end(new[name], *after[name].values())
        for name, state in after.items():
            states[name].pop("remainder", None)  # of a parameter that was narrower when the state was saved
            states[name].update(state)
        self.state.update(scheduled, step=self.step + 1)
        self._loaded = False
        if self.group:
            dispatch([new, self.state])
        return tree_map_with_path(lambda name, _: new[name], gradients)

    def _states(self, names: Iterable[str]) -> dict[str, State]:
        states = {name: leaf(self.state, name) for name in names}
        return {name: {} if state is None else state for name, state in states.items()}

    def _step(
        self, hyper: Hyper, routes: dict[str, Route], grads: Any, states: Any, params: Any, turns: Turns
    ) -> Stepped:
        """(name, (wide param, state)) after the step of each parameter."""
        wide = {name: widen(params[name], state) for name, state in states.items()}
        states = {name: of_width(state, wide[name]) for name, state in states.items()}
        matrices = {name: r for name, r in routes.items() if r.treatment == "zeta"}
        shards = {name: r for name, r in matrices.items() if is_shard(params[name], r)}
        messages = Messages(self.group) if self.group else None
        share = partial(shared, self._orthogonalize, self.coefficients, messages)
        whole = {name: r for name, r in matrices.items() if name not in shards}
        yield from self._zeta(hyper, whole, grads, states, wide, share, turns)
        if messages:
            yield from sharded.update(self.rule, hyper, shards, grads, states, wide, messages, share)
        rest = self._adamw.hyper(hyper, self.step)
        still = rest if self.decay_vectors else replace(rest, weight_decay=0.0)  # what is not decayed
        for name in (name for name, r in routes.items() if r.treatment == "adamw"):
            moments = {key: value for key, value in states[name].items() if key != "remainder"}
            own = still if is_vector(routes[name], wide[name].shape) else rest
            (g,) = turns.begin([grads[name]])
            yield name, adamw.update(g, moments, wide[name], own)

    def _zeta(
        self, hyper: Hyper, routes: dict[str, Route], grads: Any, states: Any, wide: Any, share: Any, turns: Turns
    ) -> Stepped:
        """(name, (param, state)) after the rule's step on stacks of same-shape matrices, measured if asked to."""

        def observe(u: mx.array) -> None:
            if self._exact is not None:
                measured.append(of_batch(u, hyper.lr, self._exact))
                turns.end(measured[-1])

        measured, new = list[mx.array](), dict[str, mx.array]()
        todo = in_batches(routes, {name: wide[name].dtype for name in routes}, self.group.size() if self.group else 1)
        work = list(zip(todo, share(todo), strict=True))
        for name, after in step.update(self.rule, hyper, routes, work, grads, states, wide, turns, observe):
            new[name] = after[0]
            yield name, after
        if measured:
            self._batches = [Batch([(n, v[0]) for (n, _), v in b.items()], next(iter(b.values()))) for b in todo]
            figures = (mx.concatenate([m, of_weights(b, new, routes)]) for b, m in zip(todo, measured, strict=True))
            self.state[KEY] = {str(i): all_four for i, all_four in enumerate(figures)}

    def report(self, exact: bool = False) -> Report:
        """What the last step did to each matrix: its rate, the RMS of update and weight, the update's orthogonality.

        The first call starts the measuring, for all steps from then on; make it before `mx.compile` traces a step.
        Until then there are no rows. `exact` multiplies every update with itself, in place of one random vector.
        What is sharded by `nn.fully_shard` is left out.
        """
        self._exact = exact
        batches, kept = self._batches, dict(self.state.get(KEY, {}))
        return Report(lambda: read(batches if kept else [], kept))

    def _orthogonalize(self, x: mx.array) -> mx.array:
        """Newton-Schulz in the dtype of its products, which loses nothing and is less to send."""
        dtype = self.ns_dtype or working_dtype(x)
        return newton_schulz(x, self.coefficients, dtype).astype(dtype)

    def _route(self, name: str, p: mx.array) -> Route:
        """What `routes` says, which must know every parameter; without them, what name and shape say."""
        inner = ".".join(part for part in name.split(".") if part != "module")  # before `nn.fully_shard`
        if not self.routes:
            if inner != name:
                raise ValueError(
                    f"{name} may be one rank's rows, as nn.fully_shard leaves them: pass routes=zeta.routes(model), "
                    "read before that"
                )
            return route(name, p.shape)
        if name in self.routes:
            return check_route(self.routes[name], p.shape)
        if inner not in self.routes:
            some = ", ".join(sorted(self.routes)[:3])
            raise ValueError(f"routes has no {name}, but {some}, ...: pass zeta.routes of this very model")
        if not self.group:
            raise ValueError(f"{name} is one rank's rows of {inner}: pass group=, the one that nn.fully_shard has")
        return check_route(self.routes[inner], whole_shape(p, self.group.size()))
