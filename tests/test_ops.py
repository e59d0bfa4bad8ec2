"""`select` and `switch`: semantics, derivatives, batching, and one node through every compiler."""

import pytest
import torch

import dyncompile as dc
from dyncompile.errors import ArgumentError
from dyncompile.ops import SELECT, SWITCH


def _arms(device, *shape, count=2, dtype=torch.float32):
    return [torch.randn(*shape, device=device, dtype=dtype) for _ in range(count)]


def test_boolean_decisions_choose_per_sample(device):
    a, b = _arms(device, 3, 4)
    d = torch.tensor([True, False, True], device=device)
    assert torch.equal(dc.select(d, a, b), torch.stack([a[0], b[1], a[2]]))


def test_floating_decisions_mix(device):
    a, b = _arms(device, 3, 4)
    d = torch.tensor([0.0, 0.25, 1.0], device=device)
    out = dc.select(d, a, b)
    assert torch.equal(out[0], b[0])
    assert torch.equal(out[2], a[2])
    torch.testing.assert_close(out[1], 0.25 * a[1] + 0.75 * b[1], rtol=0, atol=0)


def test_token_decisions_cover_the_leading_dims(device):
    a, b = _arms(device, 2, 3, 4)
    d = torch.rand(2, 3, device=device) > 0.5
    assert torch.equal(dc.select(d, a, b), torch.where(d[..., None], a, b))


def test_a_sample_may_own_several_entries(device):
    a, b = _arms(device, 6, 4)
    d = torch.tensor([True, False], device=device)
    out = dc.select(d, a, b)
    assert torch.equal(out, torch.cat([a[:3], b[3:]]))


def test_arms_may_hold_the_samples_in_another_dim(device):
    a, b = _arms(device, 5, 3, 4)
    d = torch.tensor([True, False, True], device=device)
    out = dc.select(d, a, b, dim=1)
    assert torch.equal(out[:, 1], b[:, 1])
    assert torch.equal(out[:, [0, 2]], a[:, [0, 2]])


def test_arms_may_be_pytrees(device):
    a, b = _arms(device, 3, 4)
    d = torch.tensor([True, False, True], device=device)
    out = dc.select(d, (a, {"h": a + 1}), (b, {"h": b + 1}))
    assert torch.equal(out[1]["h"], out[0] + 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_untaken_arm_leaks_neither_value_nor_gradient(device, bad):
    a = torch.full((2, 3), bad, device=device, requires_grad=True)
    b = torch.randn(2, 3, device=device, requires_grad=True)
    out = dc.select(torch.zeros(2, dtype=torch.bool, device=device), a, b)
    assert torch.equal(out, b)
    out.backward(torch.full_like(out, float("inf")))
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_an_empty_batch(device):
    a, b = _arms(device, 0, 4)
    assert dc.select(torch.zeros(0, dtype=torch.bool, device=device), a, b).shape == (0, 4)


def test_switch_takes_the_arm_of_the_route(device):
    arms = _arms(device, 4, 2, count=3)
    route = torch.tensor([2, 0, 1, 2], device=device)
    out = dc.switch(route, *arms)
    assert torch.equal(out, torch.stack([arms[k][i] for i, k in enumerate(route.tolist())]))


def test_switch_mixes_by_weights(device):
    arms = _arms(device, 4, 2, count=3)
    weights = torch.rand(4, 3, device=device).softmax(-1)
    expected = torch.einsum("nk,knd->nd", weights, torch.stack(arms))
    torch.testing.assert_close(dc.switch(weights, *arms), expected, rtol=1e-6, atol=1e-6)


def test_switch_keeps_a_nan_in_its_arm(device):
    arms = [torch.full((2, 3), float("nan"), device=device), *_arms(device, 2, 3)]
    out = dc.switch(torch.tensor([1, 2], device=device), *arms)
    assert torch.equal(out, torch.stack([arms[1][0], arms[2][1]]))


@pytest.mark.parametrize(
    ("shape", "decisions", "dim"),
    [((3, 2), (3,), 0), ((6, 2), (3,), 0), ((2, 3, 2), (3,), 1), ((2, 3, 2), (2, 3), 0)],
)
def test_select_gradients(device, shape, decisions, dim):
    a, b = (x.requires_grad_() for x in _arms(device, *shape, dtype=torch.float64))
    d = torch.rand(decisions, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: dc.select(*x, dim=dim), (d, a, b))
    assert torch.autograd.gradcheck(lambda *x: dc.select(d.detach() > 0.5, *x, dim=dim), (a, b))


def test_switch_gradients(device):
    arms = [x.requires_grad_() for x in _arms(device, 6, 2, count=3, dtype=torch.float64)]
    w = torch.rand(3, 3, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dc.switch, (w, *arms))
    assert torch.autograd.gradcheck(lambda *x: dc.switch(torch.tensor([2, 0, 1], device=device), *x), arms)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_equals_a_loop(device, soft, dim):
    shape = (4, 6, 2) if dim == 0 else (4, 2, 6)
    a, b = _arms(device, *shape)
    d = torch.rand(4, 3, device=device)
    d = d if soft else d > 0.5
    expected = torch.stack([dc.select(*x, dim=dim) for x in zip(d, a, b, strict=True)])
    assert torch.equal(torch.vmap(lambda *x: dc.select(*x, dim=dim))(d, a, b), expected)
    shared = torch.vmap(lambda x: dc.select(x, a[0], b[0], dim=dim))(d)
    assert torch.equal(shared[1], dc.select(d[1], a[0], b[0], dim=dim))
    inner = torch.vmap(lambda x: dc.select(d[0], x, b[0], dim=dim), in_dims=1)(a.movedim(0, 1))
    assert torch.equal(inner[2], dc.select(d[0], a[2], b[0], dim=dim))


@pytest.mark.parametrize("soft", [False, True])
def test_switch_vmap_equals_a_loop(device, soft):
    arms = _arms(device, 4, 6, 2, count=3)
    r = torch.rand(4, 3, 3, device=device) if soft else torch.randint(0, 3, (4, 3), device=device)
    expected = torch.stack([dc.switch(r[i], *(arm[i] for arm in arms)) for i in range(4)])
    assert torch.equal(torch.vmap(dc.switch)(r, *arms), expected)


class _Gated(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.op = op

    def forward(self, x):
        decision = (x[:, 0] > 0) if self.op is dc.select else (x[:, 0] > 0).long()
        return self.op(decision, self.a(x), self.b(x))


_OPS = pytest.mark.parametrize(("op", "target"), [(dc.select, SELECT), (dc.switch, SWITCH)])


@_OPS
def test_one_node_through_export(device, op, target):
    model = _Gated(op).to(device)
    x = torch.randn(5, 4, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    functional = program.run_decompositions()
    for graph in (program.graph, functional.graph):
        assert [n.target for n in graph.nodes].count(target) == 1
    y = torch.randn(9, 4, device=device)
    torch.testing.assert_close(functional.module()(y), model(y), rtol=1e-6, atol=1e-6)


@_OPS
def test_one_node_through_dynamo_and_aot_autograd(device, op, target):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def look(module, inputs):
        seen.append([n.target for n in module.graph.nodes])
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    model = _Gated(op).to(device)
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    x = torch.randn(5, 4, device=device)
    out = compiled(x)
    assert seen[0].count(target) == 1
    torch.testing.assert_close(out, model(x), rtol=1e-6, atol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("soft", [False, True])
def test_the_operators_are_well_formed(device, soft):
    a, b, c = (x.requires_grad_() for x in _arms(device, 6, 2, count=3))
    d = torch.rand(3, device=device)
    torch.library.opcheck(SELECT, (d.requires_grad_() if soft else d > 0.5, a, b, 0))
    route = torch.rand(3, 3, device=device, requires_grad=True)
    torch.library.opcheck(SWITCH, (route if soft else route.argmax(1), [a, b, c], 0))


def test_channels_last_arms_stay_channels_last(device):
    a, b = (x.to(memory_format=torch.channels_last) for x in _arms(device, 2, 3, 4, 4))
    for d in (torch.rand(2, device=device), torch.rand(2, device=device) > 0.5):
        assert dc.select(d, a, b).is_contiguous(memory_format=torch.channels_last)
        route = torch.stack([d, 1 - d], -1) if d.is_floating_point() else d.long()
        assert dc.switch(route, a, b).is_contiguous(memory_format=torch.channels_last)


def test_misuse_is_refused(device):
    a, b = _arms(device, 4, 2)
    d = torch.ones(4, dtype=torch.bool, device=device)
    for args, message in (
        (
            (d, a, b[:2]),
            r"`otherwise`: found \[2, 2\] torch.float32; expected that of the first arm",
        ),
        ((d, a, b.double()), r"found \[4, 2\] torch.float64"),
        ((d, (a,), b), r"`otherwise`: found structure"),
        (
            (d[:3], a, b),
            r"`decision`: found shape \[3\] at dim 0; expected the leading dims of \[4, 2\]",
        ),
        ((d.new_ones(4, 3), a, b), r"`decision`: found shape \[4, 3\]"),
        ((d.new_ones(()), a, b), r"`decision`: found shape \[\]"),
    ):
        with pytest.raises(ArgumentError, match=message):
            dc.select(*args)
    with pytest.raises(ArgumentError, match="`arms`: found 1; expected at least two"):
        dc.switch(d.long(), a)
    with pytest.raises(ArgumentError, match="`arms`: found different structures"):
        dc.switch(d.long(), a, (b,))
