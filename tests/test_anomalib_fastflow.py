"""FastFlow beside anomalib's `Fastflow`: equal weights, equal numbers.

`python tests/test_anomalib_fastflow.py` writes the reference tensors anew, which tests/test_fastflow.py compares with.
"""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fastflow import SHAPES, freia_to_ours, maps, settings

from tocoad.systems import fastflow

pytest.importorskip("anomalib")
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator  # noqa: E402
from anomalib.models.image.fastflow.loss import FastflowLoss  # noqa: E402
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block  # noqa: E402

REFERENCE = Path(__file__).parent / "reference" / "fastflow.safetensors"


def theirs(shape, steps=3, only3=False):
    "anomalib's normalisation and flow of a level, with other weights than fresh ones"
    level = torch.nn.Module()
    level.norm = torch.nn.LayerNorm(shape)
    level.flow = create_fast_flow_block(list(shape), only3, 1., steps)
    with torch.no_grad():
        for p in (*level.norm.parameters(), *(p for p in level.flow.parameters() if p.requires_grad)):
            p += torch.randn(p.shape) / 10
    return level


def weights(level):
    "By the names that `freia_to_ours` reads"
    return {k.replace("module_list.", "").removesuffix("_inv"): v for k, v in level.state_dict().items()
            if not k.endswith("w_perm_inv")}


def reference():
    "What anomalib makes of small maps"
    torch.manual_seed(0)
    found, stored = [], {}
    for k, (shape, x) in enumerate(zip(SHAPES, maps(), strict=True)):
        level = theirs(shape)
        with torch.no_grad():
            z, stretch = level.flow(level.norm(x))
        found.append((z, stretch))
        stored |= {f"{k}.{n}": v.contiguous() for n, v in (weights(level) | dict(x=x, z=z, stretch=stretch)).items()}
    zs, stretches = zip(*found, strict=True)
    M = AnomalyMapGenerator((32, 32))(list(zs))[:, 0]
    return stored | dict(loss=FastflowLoss()(list(zs), list(stretches)), map=M)


@pytest.mark.parametrize("only3", [False, True])
def test_forward_loss_and_map_agree(only3):
    torch.manual_seed(1)
    c, mine, found = settings(blocks=8, kernels="3x3" if only3 else "alternating"), [], []
    for shape, x in zip(SHAPES, maps(s=1), strict=True):
        level = theirs(shape, 8, only3)
        with torch.no_grad():
            found.append(level.flow(level.norm(x)))
            mine.append(freia_to_ours(fastflow.Level(shape, c), weights(level))(x))
        for a, b in zip(mine[-1], found[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    zs, stretches = (list(v) for v in zip(*found, strict=True))
    torch.testing.assert_close(fastflow.loss_of(mine), FastflowLoss()(zs, stretches), rtol=1e-4, atol=1e-4)
    M = fastflow.anomaly_map([fastflow.energy(z) for z, _ in mine], 48)
    torch.testing.assert_close(M, AnomalyMapGenerator((48, 48))(zs)[:, 0], rtol=1e-4, atol=1e-4)


def test_steps_of_training_agree():
    "Adam of rate 0.001 and decay 0.00001, as anomalib's `configure_optimizers`"
    torch.manual_seed(2)
    x, level = maps(4, s=2)[0], theirs(SHAPES[0], 2)
    mine = torch.nn.ModuleList([freia_to_ours(fastflow.Level(SHAPES[0], settings()), weights(level))])
    adam = torch.optim.Adam(level.parameters(), lr=1e-3, weight_decay=1e-5)
    losses = []
    for _ in range(5):
        z, stretch = level.flow(level.norm(x))
        loss = FastflowLoss()([z], [stretch])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    log = fastflow.train(mine, [x], settings(epochs=5, batch=4), False)
    assert [e["loss"] for e in log] == pytest.approx(losses, rel=1e-4)


def test_the_whole_model_of_resnet18_agrees():
    "From F's maps to image scores, of images of another size than 256"
    torch.manual_seed(3)
    model = FastflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=2).eval()
    images = torch.rand(2, 3, 64, 64)
    c, mine = settings(), []
    with torch.no_grad():
        answer, features = model(images), model.feature_extractor(images)
        for norm, flow, x in zip(model.norms, model.fast_flow_blocks, features, strict=True):
            level = torch.nn.Module()
            level.norm, level.flow = norm, flow
            mine.append(freia_to_ours(fastflow.Level(tuple(x.shape[1:]), c), weights(level))(x)[0])
    image, M = fastflow.maps_of({f"layer{k}": fastflow.energy(z).numpy() for k, z in enumerate(mine, 1)}, c)
    torch.testing.assert_close(torch.from_numpy(M), answer.anomaly_map[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(image), answer.pred_score.flatten(), rtol=1e-4, atol=1e-4)


def test_lite0_is_refused_there():
    with pytest.raises(ValueError, match="not supported"):
        FastflowModel((64, 64), "tf_efficientnet_lite0", pre_trained=False)


def test_the_reference_is_theirs():
    stored, now = load_file(REFERENCE), reference()
    assert stored.keys() == now.keys()
    for k, v in now.items():
        torch.testing.assert_close(stored[k], v, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file(reference(), REFERENCE)
