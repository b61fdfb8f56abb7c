"The affine coupling: against autograd, its own inverse, FrEIA's numbers and FrEIA itself where it is installed."
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import multivariate_normal
from torch import nn

from tocoad.method.pretrain import seeded
from tocoad.systems.coupling import Coupling, Flow, log_density, mixed, soft_clamp

REFERENCE = Path(__file__).parent / "reference" / "coupling.safetensors"
SHAPES = {"maps": (5, 4, 3), "places": (6,)} # of x: an odd number of channels once
CLAMP = {"maps": 2., "places": 1.9}


def dense(i, o): return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))
def conv(i, o): return nn.Sequential(nn.Conv2d(i, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, o, 1))


def shaken(flow, by=.5, s=0):
    "With other weights than fresh ones, in double precision"
    flow, g = flow.double(), torch.Generator().manual_seed(s)
    with torch.no_grad():
        for p in flow.parameters():
            p += by * torch.randn(p.shape, generator=g, dtype=p.dtype)
    for block in flow.modules():
        if isinstance(block, Coupling) and block.mix.ndim == 2:
            block.mix = torch.linalg.qr(block.mix)[0] # a rotation of doubles
    return flow


def jacobian(f, x):
    return torch.autograd.functional.jacobian(f, x).reshape(x.numel(), x.numel())


def points(*shape, s=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(s)).double()


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("condition", [0, 3])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("subnet, shape", [(dense, (2,)), (dense, (5,)), (conv, (3, 2, 3)), (conv, (4, 3, 1))])
def test_the_stretch_is_autograds_and_the_inverse_comes_back(subnet, shape, blocks, condition, rotate):
    flow = shaken(Flow(Coupling(shape[0], subnet, 1.9, condition, rotate) for _ in range(blocks)))
    x, c = points(2, *shape), points(2, condition, *shape[1:], s=1) if condition else None
    z, stretch = flow(x, c)
    torch.testing.assert_close(flow.inverse(z, c), x, rtol=1e-9, atol=1e-9)
    for k in range(2):
        one = None if c is None else c[k:k + 1]
        J = jacobian(lambda v, one=one: flow(v, one)[0], x[k:k + 1])
        torch.testing.assert_close(stretch[k], J.slogdet().logabsdet, rtol=1e-9, atol=1e-9)
    assert stretch[0] != stretch[1] # of a point, not of the flow


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.floats(.1, 3), st.integers(0, 99))
def test_any_shape_comes_back(channels, blocks, condition, rotate, clamp, seed):
    with seeded(seed, "flow"):
        flow = Flow(Coupling(channels, dense, clamp, condition, rotate) for _ in range(blocks))
    x, c = points(3, channels, s=seed), points(3, condition, s=seed + 1) if condition else None
    z, _ = shaken(flow, s=seed)(x, c)
    torch.testing.assert_close(flow.inverse(z, c), x, rtol=1e-6, atol=1e-6)


def test_the_density_is_that_of_a_known_gaussian():
    "A linear flow of normal numbers is a Gaussian whose covariance is known"
    block = shaken(Coupling(3, lambda i, o: nn.Linear(i, o, bias=True), rotate=True))
    nn.init.zeros_(block.subnet.weight) # s and t are constant: the block is linear
    A = jacobian(lambda v: block(v)[0], torch.zeros(1, 3).double())
    mean = -torch.linalg.solve(A, block(torch.zeros(1, 3).double())[0][0]).detach()
    known = multivariate_normal(mean.numpy(), torch.linalg.inv(A.T @ A).numpy())
    x = points(20, 3)
    torch.testing.assert_close(log_density(*block(x)).detach(), torch.from_numpy(known.logpdf(x.numpy())))


def test_a_density_sums_to_one():
    flow = shaken(Flow(Coupling(2, dense) for _ in range(4)))
    side = torch.linspace(-12, 12, 601).double()
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        total = log_density(*flow(grid)).exp().sum() * (side[1] - side[0])**2
    assert total.item() == pytest.approx(1, abs=.01)


def test_the_clamp_bounds_each_scale():
    block = Coupling(4, nn.Linear, clamp=1.5)
    with torch.no_grad():
        block.subnet.weight.fill_(1e6)
    s, _ = block.moves(torch.randn(9, 2), None)
    assert 1.49 < s.abs().max() <= 1.5 and block(torch.randn(9, 4))[1].isfinite().all()
    a = torch.tensor([-.3, .4])
    torch.testing.assert_close(soft_clamp(a, 1.9), torch.tensor([1.9 * math.tanh(v) for v in a]))


def test_a_fresh_block_mixes_and_hardly_more():
    with seeded(0, "block"):
        block = Coupling(8, dense)
    x = torch.randn(50, 8)
    z, stretch = block(x)
    assert (z - mixed(x, block.mix)).abs().max() < .5 and stretch.abs().max() < .5
    assert sorted(block.mix.tolist()) == list(range(8))


def test_the_first_half_and_the_condition_move_the_second():
    block = Coupling(5, dense, condition=2)
    block.mix = torch.arange(5)
    x, c = torch.randn(1, 5), torch.randn(1, 2)
    J = jacobian(lambda v: block(v, c)[0], x)
    assert not J[:3, 3:].any() and J[3:, :3].any() and (J[:3, :3] - torch.eye(3)).abs().max() < 1e-5
    assert (block(x, c)[0] - block(x, c + 1)[0])[0, 3:].abs().min() > 0
    assert torch.equal(block(x, c)[0][0, :3], block(x, c + 1)[0][0, :3])


def test_mixing_is_drawn_by_the_seed():
    def mixes(seed, rotate):
        with seeded(seed, "mix"):
            return [Coupling(6, dense, rotate=rotate).mix for _ in range(2)]
    for rotate in (False, True):
        a, b = mixes(0, rotate)
        assert torch.equal(a, mixes(0, rotate)[0]) and not torch.equal(a, b) and not torch.equal(a, mixes(1, rotate)[0])
    torch.testing.assert_close(mixes(0, True)[0] @ mixes(0, True)[0].T, torch.eye(6), atol=1e-6, rtol=0)


def test_bfloat16_keeps_the_stretch_in_float32():
    block = Coupling(6, dense, rotate=True)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        z, stretch = block(x)
    assert z.dtype == stretch.dtype == torch.float32
    assert 0 < (z - block(x)[0]).abs().max() < .1


def ours(block, stored):
    "A block of ours with FrEIA's weights"
    w = stored["w_perm"].flatten(1)
    state = {k: v for k, v in stored.items() if k.startswith("subnet.")}
    order = w.argmax(1) if (w.max(1).values == 1).all() else w
    state |= dict(g=stored["global_scale"].flatten(), b=stored["global_offset"].flatten(), mix=order)
    block.load_state_dict(state)
    return block


def agree(name, r):
    "Ours on FrEIA's input with FrEIA's weights, against its output"
    subnet, condition = (conv, 0) if name == "maps" else (dense, 3)
    block = Coupling(SHAPES[name][0], subnet, CLAMP[name], condition, rotate=name == "places")
    ours(block, {k.removeprefix(f"{name}.weights."): v for k, v in r.items() if "weights" in k and name in k})
    c = r.get(f"{name}.c")
    with torch.no_grad():
        z, stretch = block(r[f"{name}.x"], c)
        torch.testing.assert_close(z, r[f"{name}.z"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stretch, r[f"{name}.stretch"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block.inverse(z, c), r[f"{name}.x"], rtol=1e-4, atol=1e-4)


def by_freia():
    "FrEIA's block on maps with an order, and on places with a rotation and a condition"
    from FrEIA.modules import AllInOneBlock
    torch.manual_seed(0)
    found = {}
    for name, subnet in (("maps", conv), ("places", dense)):
        shape = SHAPES[name]
        told = dict(dims_c=[(3,)]) if name == "places" else {}
        block = AllInOneBlock([shape], subnet_constructor=subnet, affine_clamping=CLAMP[name],
                              permute_soft=name == "places", global_affine_type="SOFTPLUS", **told)
        with torch.no_grad():
            for p in (*block.subnet.parameters(), block.global_scale, block.global_offset):
                p += torch.randn(p.shape)
            x, c = torch.randn(4, *shape), torch.randn(4, 3)
            (z,), stretch = block([x], [c] if told else [])
        found |= {f"{name}.x": x, f"{name}.z": z, f"{name}.stretch": stretch} | ({f"{name}.c": c} if told else {})
        found |= {f"{name}.weights.{k}": v.clone() for k, v in block.state_dict().items() if k != "w_perm_inv"}
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_the_numbers_are_freias(name):
    agree(name, load_file(REFERENCE))


@pytest.mark.parametrize("name", SHAPES)
def test_freia_itself(name):
    "FrEIA's last release is of 2022: it is no requirement, and comes with anomalib"
    pytest.importorskip("FrEIA")
    agree(name, by_freia())


if __name__ == "__main__":
    from safetensors.torch import save_file
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in by_freia().items()}, REFERENCE)
