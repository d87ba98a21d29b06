"""A step for a CUDA graph: nothing is read from the GPU, shown on tensors without values, where reading raises."""

from math import inf

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from zeta.backends import torch as backend  # noqa: E402
from zeta.backends.torch import orthogonalize  # noqa: E402
from zeta.backends.torch.groups import check_capturable  # noqa: E402

DECOMPOSE = ["SOAP", "Schattor", "Shampoo"]
GRAPHS = [n for n, kind in vars(backend).items() if isinstance(kind, type) and n not in DECOMPOSE]
SHAPES = {
    "embed.weight": (100, 64),
    "attn.qkv.weight": (192, 64),
    "mlp.up.weight": (96, 64),
    "mlp.down.weight": (64, 96),
    "experts.up.weight": (3, 32, 16),
    "norm.weight": (64,),
}


def index(x, where):
    """x[where] for integers, slices and an ellipsis, which torch 2.13 without CUDA does not take of its tensors."""
    where = list(where) if isinstance(where, tuple) else [where]
    if ... in where:
        i = where.index(...)
        where[i : i + 1] = [slice(None)] * (x.ndim - len(where) + 1)
    for axis, own in reversed([*enumerate(where)]):
        if isinstance(own, int):
            x = x.select(axis, own)
        else:
            start, stop, _ = own.indices(x.shape[axis])
            x = x.narrow(axis, start, max(stop - start, 0))
    return x


class Stay(TorchDispatchMode):
    """Nothing leaves the GPU: what is read without values, as `item` does, raises by itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda and not y.is_cuda:
            raise DataDependentOutputException(func)
        return y


@pytest.fixture
def no_values(monkeypatch):
    """Tensors on a CUDA device that is not there. torch 2.13 has AdamW's kernel with a tensor lr in no such form."""
    monkeypatch.setattr(torch.Tensor, "__getitem__", index)
    monkeypatch.setattr(orthogonalize, "kernel_rows", lambda _: inf)  # asks the device
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, *rest: torch.ops.aten.copy_(x, *rest))
    with torch.library._scoped_library("aten", "IMPL") as aten:
        aten.impl("_fused_adamw_.tensor_lr", lambda *_, **__: None, "Meta")
        with FakeTensorMode(), Stay():
            yield


def steps(make, dtype=torch.float32, **options):
    params = {n: torch.nn.Parameter(torch.empty(s, dtype=dtype, device="cuda")) for n, s in SHAPES.items()}
    for p in params.values():
        p.grad = torch.empty_like(p)
    optimizer = make(params.items(), **options)
    for _ in range(2):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_step_reads_nothing(no_values, name, tensors, dtype):
    given = dict(lr=torch.empty(()), weight_decay=torch.empty(1)) if tensors else {}
    optimizer = steps(getattr(backend, name), dtype, capturable=True, **given)
    if tensors:
        assert {group[key].device.type for group in optimizer.param_groups for key in given} == {"cuda"}


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.cpu()], ids=[*"abc"])
def test_reading_would_be_seen(no_values, monkeypatch, read):
    step = backend.optimizer.torch_step.step
    monkeypatch.setattr(backend.optimizer.torch_step, "step", lambda *rest: (read(rest[2]["lr"]), step(*rest))[1])
    with pytest.raises(DataDependentOutputException):
        steps(backend.Zeta, lr=torch.empty((), device="cuda"))  # a value known here is read from no GPU


@pytest.mark.parametrize("name", DECOMPOSE)
def test_what_decomposes_is_refused(name):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=f"capturable is True, but {name} waits for the GPU .*: leave it out"):
        getattr(backend, name)([("up.weight", weight)], capturable=True)


def test_ranks_are_refused():
    with pytest.raises(ValueError, match=r"Zeta waits for other ranks, .* leave it out"):
        check_capturable({"capturable": True}, decomposes=False, shared=True, owner="Zeta")


def test_tensors_do_what_numbers_do():
    def stepped(lr, decay, **options):
        torch.manual_seed(0)
        params = {n: torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for n, s in SHAPES.items()}
        optimizer = backend.Zeta(params.items(), lr=lr, weight_decay=decay, decay_vectors=True, **options)
        for _ in range(2):
            for p in params.values():
                p.grad = torch.randn_like(p)
            optimizer.step()
            for group in optimizer.param_groups:  # as a scheduler between replays
                group["lr"] = group["lr"].mul_(0.5) if isinstance(lr, torch.Tensor) else group["lr"] * 0.5
        return list(params.values())

    wide = dict(dtype=torch.float64)
    numbers = stepped(0.01, 0.3)
    for lr, decay in [(torch.tensor(0.01, **wide), torch.tensor([0.3], **wide)), (0.01, torch.tensor(0.3, **wide))]:
        for got, expected in zip(stepped(lr, decay, capturable=True), numbers, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch cuda: none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_replayed_step_is_the_eager_one_bit_for_bit(name, dtype):
    def stepped(captured):
        generator = torch.Generator("cuda").manual_seed(0)
        draw = {n: torch.randn(s, device="cuda", generator=generator).to(dtype) for n, s in SHAPES.items()}
        params = {n: torch.nn.Parameter(x) for n, x in draw.items()}
        for p in params.values():
            p.grad = torch.empty_like(p)
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = getattr(backend, name)(params.items(), lr=lr, weight_decay=0.1, capturable=True)
        graph = torch.cuda.CUDAGraph()
        for k in range(7):
            for p in params.values():
                p.grad.copy_(torch.randn(p.shape, device="cuda", generator=generator))
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-2 / (k + 1))
            if not captured or k < 3:
                optimizer.step()
                continue
            if k == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
            graph.replay()
        return [*params.values(), *(x for p in params.values() for x in optimizer.state[p].values())]

    for got, expected in zip(stepped(True), stepped(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
