"""Zeta's rules, on NumPy in float64, are those of `transcriptions.py`: the same algorithms, written twice.

Else one wrong text would agree with itself on every library and at every home. The controls break either side: every
sign, beta and axis of the transcriptions, one at a time, and the rules.
"""

import ast
import inspect
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import transcriptions

import zeta
from zeta import adamw, core, family, preconditioned, stages
from zeta.parity.checks import relative_error

RULES = {name: (rule, {}) for name, rule in vars(family).items() if type(rule) is core.Rule} | {
    "shampoo": (preconditioned.shampoo(), {}),
    "soap": (preconditioned.soap(), {}),
    **{f"shampoo {n}": (preconditioned.shampoo(n), {"precondition_frequency": n}) for n in (1, 4)},
    **{f"soap {n}": (preconditioned.soap(n), {"precondition_frequency": n}) for n in (1, 4)},
    "adago": (family.adago(), {}),
    "adago 0.3 0.05": (family.adago(0.3, 0.05), {"gamma": 0.3, "floor": 0.05}),
    "adago 9 0.7": (family.adago(9.0, 0.7), {"gamma": 9.0, "floor": 0.7}),
    "dion2": (family.dion2(), {}),
    "dion2 0.4": (family.dion2(0.4), {"fraction": 0.4}),
    "dion2 1": (family.dion2(1.0), {"fraction": 1.0}),
    **{f"schattor {p}": (preconditioned.schattor(p), {"p": p}) for p in (1, 1.5, 2, 4, inf)},
    **{f"schattor_regularised {p}": (preconditioned.schattor_regularised(p), {"p": p}) for p in (1, 1.5, 2, 4, inf)},
    "adamw": (adamw, {}),
}
SHAPES = {"square": (12, 12), "wide": (8, 20), "tall": (20, 8), "1xn": (1, 9), "nx1": (9, 1)}
SETTING = (0.02, 0.9, 0.97, 1e-3, 0.3)  # lr, b1, b2, an eps that is seen, decay
DEFAULTS = (1e-3, 0.95, 0.99, 1e-8, 0.1)
BOUND = 1e-12  # measured: at most 1e-13
# Of eigenvalues at its floor, a millionth of the largest, rounding leaves 2e-16 / 1e-6, and a fourth root on either
# side a quarter of that each: 1e-10. Measured: 8e-13.
BOUNDS = dict.fromkeys(("shampoo", "shampoo 1", "shampoo 4"), 1e-10)
SEEN = 1e-4  # by which each control must differ at least; measured: 5e-4 (an eps), all but seven by more than 1e-2


def draw(shape, kind, count):
    """(w, gradients): a drift, noise, and scales that differ by row and column, with what `kind` says made zero."""
    rng = np.random.default_rng([2606, *shape])
    rows, cols = np.exp(0.5 * rng.standard_normal((shape[0], 1))), np.exp(0.5 * rng.standard_normal((1, shape[1])))
    drift, noise = rng.standard_normal(shape), rng.standard_normal((count, *shape))
    w, grads = drift / 8, 0.2 * rows * cols * (drift + noise)
    if kind == "zeros between":
        grads[[0, 1, 4, 8]] = 0
    if kind == "dead lines":  # one from the start, one from the fifth step on
        if shape[0] > 1:
            grads[:, 1], grads[5:, 3] = 0, 0
        if shape[1] > 1:
            grads[:, :, 2], grads[5:, :, 4] = 0, 0
    return w, grads


def begin(name, rule, w):
    """(the rule's first state, the transcription's): zeros, and SOAP's factors, whose eigenvectors must be unique.

    Rank one or with a dead line, as a first gradient leaves them, they would not be: they are full, of separate
    eigenvalues, and count as gathered in a step before.
    """
    state = rule.init(w)
    if not name.startswith("soap"):
        return state, {}
    rng = np.random.default_rng(2409)
    factors = {}
    for key, n in zip(("left", "right"), w.shape, strict=True):
        q, _ = np.linalg.qr(rng.standard_normal((n, n)))
        factors[key] = q @ np.diag(np.arange(1.0, n + 1)) @ q.T
    return state | factors | {"steps": state["steps"] + 1}, dict(factors)


def by_zeta(name, rule, w, grads, setting=SETTING):
    """(w, state) after the steps."""
    lr, b1, b2, eps, decay = setting
    state, _ = begin(name, rule, w)
    for g in grads:
        w, state = rule.update(g, state, w, zeta.Hyper(lr, (b1, b2), eps, decay))
    return w, state


def by_paper(name, transcription, w, grads, setting=SETTING):
    rule, options = RULES[name]
    _, state = begin(name, rule, w)
    for g in grads:
        w = transcription(g, state, w, *setting, **options)
    return w, state


def difference(got, want, w):
    """The larger of the relative error of the distance moved and those of the state that both name alike."""
    (a, state), (b, other) = got, want
    errors = [relative_error(np.asarray(state[key]), np.asarray(other[key])) for key in state.keys() & other.keys()]
    return max(relative_error(a, b, origin=w), *errors)


def transcription_of(name):
    return getattr(transcriptions, name.split()[0])


@pytest.mark.parametrize("kind", ["full", "zeros between", "dead lines"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_papers(name, kind):
    for shape in SHAPES.values():
        for count, setting in ((10, DEFAULTS), (30, SETTING)):
            w, grads = draw(shape, kind, count)
            got = by_zeta(name, RULES[name][0], w, grads, setting)
            want = by_paper(name, transcription_of(name), w, grads, setting)
            assert difference(got, want, w) <= BOUNDS.get(name, BOUND)


def test_soap_gathers_from_its_first_gradient_on():
    """From no factors at all, and after two zero gradients: on square matrices of full rank and separate values."""
    rng = np.random.default_rng(2409)
    (a, _), (b, _) = (np.linalg.qr(x) for x in rng.standard_normal((2, 12, 12)))
    grads = a @ np.diag(np.arange(1.0, 13)) @ b + 0.05 * rng.standard_normal((10, 12, 12))
    grads[:2] = 0
    got = want = w = rng.standard_normal((12, 12))
    state, other, (lr, b1, b2, eps, decay) = preconditioned.soap().init(w), {}, SETTING
    for g in grads:
        got, state = preconditioned.soap().update(g, state, got, zeta.Hyper(lr, (b1, b2), eps, decay))
        want = transcriptions.soap(g, other, want, *SETTING)
    assert difference((got, state), (want, other), w) <= BOUND


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_adamw_takes_any_shape(shape):
    rng = np.random.default_rng(1711)
    w, grads = rng.standard_normal(shape), rng.standard_normal((10, *shape))
    got, want = by_zeta("adamw", adamw, w, grads), by_paper("adamw", transcriptions.adamw, w, grads)
    assert difference(got, want, w) <= BOUND


# The controls: each side with one thing wrong. One setting of each rule, in which all of its transcription counts.


@pytest.mark.parametrize("name", [name for name in RULES if " " not in name or name.endswith(" 4")])
def test_every_wrong_sign_beta_or_axis_of_a_transcription_is_seen(name):
    w, grads = draw(SHAPES["square"], "dead lines", 10)
    grads[8] = 0
    got, count = by_zeta(name, RULES[name][0], w, grads), 0
    for what, wrong in with_one_thing_wrong(name.split()[0]):
        with np.errstate(all="ignore"):
            assert difference(by_paper(name, wrong, w, grads), got, w) > SEEN, what
        count += 1
    assert count >= 4


def with_one_thing_wrong(name):
    """(what, function): the transcription with one + for -, one b1 for b2 or one axis for the other, in it or below."""
    tree = ast.parse(inspect.getsource(transcriptions))
    names = reached(name)
    tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef) or node.name in names]
    for node in ast.walk(tree):
        for field, wrong in mistakes(node):
            right = getattr(node, field)
            setattr(node, field, wrong)
            space = {}
            exec(compile(ast.fix_missing_locations(tree), "wrong", "exec"), space)
            yield f"line {node.lineno}: {ast.unparse(node)}", space[name]
            setattr(node, field, right)


def reached(name):
    """The names of this transcription and of the functions below it."""
    below = vars(transcriptions)[name].__code__.co_names
    below = [other for other in below if inspect.isfunction(vars(transcriptions).get(other)) and other != name]
    return {name}.union(*map(reached, below))


def mistakes(node):
    """(field, wrong value) of each mistake at this node. A wrong sign of 1 - b is a scale, to which most are blind."""
    match node:
        case ast.BinOp(left=ast.Constant(value=1)):
            pass
        case ast.BinOp(op=ast.Add()):
            yield "op", ast.Sub()
        case ast.BinOp(op=ast.Sub()):
            yield "op", ast.Add()
        case ast.BinOp(op=ast.Mult() | ast.Pow(), left=ast.Name(id="b1" | "b2" as beta)):
            yield "left", ast.Name("b2" if beta == "b1" else "b1", ast.Load())
        case ast.UnaryOp(op=ast.USub()):
            yield "op", ast.UAdd()
        case ast.keyword(arg="axis", value=ast.Constant(value=axis)):
            yield "value", ast.Constant(1 - axis)


WRONG_STAGES = {
    "ema": lambda old, new, beta: beta * old - (1 - beta) * new,
    "ema_sq": lambda old, new, beta: beta * old + (1 - beta) * abs(new),
    "nesterov": lambda m, g, beta: beta * m - (1 - beta) * g,
    "sign": lambda x: -stages.sign(x),
    "whiten": lambda x, v, eps: stages.whiten(x, v, -eps),
    "equilibrate": lambda x, rows, cols: stages.equilibrate(x.T, cols.T, rows.T).T,  # columns first
    "mean_sq": lambda x, axis: stages.mean_sq(x, -3 - axis).T,  # of rows for columns
    "rank_one": lambda r, c: stages.rank_one(c.T, r.T),
    "to_rms": lambda u, eps=0.0: -stages.to_rms(u, eps),
    "match_rms": lambda u: -stages.match_rms(u),
}


def wrong_rules(rule):
    """(what, rule): this rule with one thing wrong."""

    def use(wrong):
        return rule._replace(
            local=lambda g, state, hyper, _: rule.local(g, state, hyper, wrong),
            whole=lambda x, sums, state, hyper, f, _: rule.whole(x, sums, state, hyper, f, wrong),
        )

    def backwards(*args):
        u, state = rule.whole(*args)
        return -u, state

    def turned(x, sums, *rest):
        rows, cols = rule.sums
        return rule.whole(x, {rows: sums[cols].T, cols: sums[rows].T}, *rest)

    yield "the gradient's sign", rule._replace(local=lambda g, *rest: rule.local(-g, *rest))
    yield "the update's sign", rule._replace(whole=backwards)
    if len(rule.sums) == 2:
        yield "rows for columns", rule._replace(whole=turned)
    for stage in set(rule.local.__code__.co_names + rule.whole.__code__.co_names) & WRONG_STAGES.keys():
        yield stage, use(SimpleNamespace(**vars(stages) | {stage: WRONG_STAGES[stage]}))


@pytest.mark.parametrize("name", [name for name in RULES if name != "adamw"])
def test_a_rule_with_one_thing_wrong_is_seen(name):
    rule, _ = RULES[name]
    w, grads = draw(SHAPES["square"], "dead lines", 10)
    want = by_paper(name, transcription_of(name), w, grads)
    for what, wrong in wrong_rules(rule):
        with np.errstate(all="ignore"):
            assert difference(by_zeta(name, wrong, w, grads), want, w) > SEEN, what
    lr, b1, b2, eps, decay = SETTING
    assert difference(by_zeta(name, rule, w, grads, (lr, b2, b1, eps, decay)), want, w) > SEEN


def test_every_rule_is_compared():
    rules = [rule for module in (family, preconditioned) for rule in vars(module).values() if type(rule) is core.Rule]
    assert {id(rule) for rule in rules} <= {id(rule) for rule, _ in RULES.values()}
