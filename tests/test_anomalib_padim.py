"PaDiM against anomalib's `Padim` on the same features; as a script it writes what test_padim.py compares with."
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("anomalib")
from anomalib.models.image.padim.torch_model import PadimModel

from tocoad.systems.padim import embedding, gaussians, mahalanobis, packed, unpacked
from tocoad.systems.tocoad import anomaly_maps

REFERENCE = Path(__file__).parent / "reference" / "padim.safetensors"
SHAPES = (8, 8, 8), (12, 4, 4), (16, 2, 2) # of layers 1 to 3


def features():
    "Maps of 12 training and 4 test images, and 20 of their 36 channels"
    g = torch.Generator().manual_seed(0)
    out = {f"{split}{k}": torch.randn(n, *shape, generator=g)
           for split, n in (("train", 12), ("test", 4)) for k, shape in enumerate(SHAPES, 1)}
    return out | dict(idx=torch.randperm(36, generator=g)[:20])


def inverse(A):
    "What `torch.linalg.inv` should give; on a CPU torch 2.15's fails for many matrices at once"
    return torch.cholesky_inverse(torch.linalg.cholesky(A.double())).float()


def by_anomalib(r, monkeypatch):
    "anomalib's distances (4, 8, 8), and its maps at 64 pixels"
    monkeypatch.setattr(torch.linalg, "inv", inverse)
    model = PadimModel("resnet18", pre_trained=False, n_features=20)
    model.idx = r["idx"]
    train, test = (model.generate_embedding({f"layer{k}": r[f"{split}{k}"] for k in (1, 2, 3)})
                   for split in ("train", "test"))
    stats = model.gaussian.fit(train)
    distances = model.anomaly_map_generator.compute_distance(test, stats)[:, 0]
    return distances, model.anomaly_map_generator.compute_anomaly_map(test, *stats, image_size=(64, 64))[:, 0]


def by_us(r, ridge):
    train, test = (embedding([r[f"{split}{k}"] for k in (1, 2, 3)], r["idx"]) for split in ("train", "test"))
    mean, S = gaussians(train.split(5), ridge)
    return mahalanobis(test, mean, unpacked(packed(S), 20))


def test_distances(monkeypatch):
    r = features()
    theirs, maps = by_anomalib(r, monkeypatch)
    ours = by_us(r, .01 + 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    off = lambda ridge: ((by_us(r, ridge) - theirs) / theirs).abs().max()
    assert off(.01) > 5 * off(.01 + 1e-5) # without the further 1e-5 they differ
    mine, inside = anomaly_maps(ours.flatten(1), (8, 8), 64), (slice(None), slice(16, -16), slice(16, -16))
    torch.testing.assert_close(mine[inside], maps[inside], rtol=1e-4, atol=1e-4)
    assert (mine - maps).abs().max() > 1e-3 # at the border its Gaussian mirrors without the outermost pixel


def test_the_reference_is_anomalibs(monkeypatch):
    r = load_file(REFERENCE)
    assert all(torch.equal(r[k], v) for k, v in features().items())
    torch.testing.assert_close(r["distances"], by_anomalib(r, monkeypatch)[0], rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    r = features()
    with pytest.MonkeyPatch.context() as m:
        r["distances"] = by_anomalib(r, m)[0].contiguous()
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file(r, sys.argv[1] if sys.argv[1:] else REFERENCE)
