"PatchCore against anomalib's on the same maps and memory; as a script it writes what test_patchcore.py compares with."
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("anomalib")
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from tocoad.method.memory import Memory, anomaly_maps, patch_features, score_plain
from tocoad.systems.maps import smooth
from tocoad.systems.patchcore import image_score

REFERENCE = Path(__file__).parent / "reference" / "patchcore.safetensors"


def features():
    "Maps of layers 2 and 3 of four images, and a memory of 60 patches"
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return dict(layer2=draw(4, 6, 8, 8), layer3=draw(4, 10, 4, 4), bank=draw(60, 16) / 2)


def by_anomalib(r, b=9):
    "Its patches (N h w, d), patch scores (N, h w), image scores (N,) and maps at 64 pixels"
    model = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False, num_neighbors=b)
    model.memory_bank = r["bank"]
    Q = model.reshape_embedding(model.generate_embedding({k: model.feature_pooler(r[k]) for k in ("layer2", "layer3")}))
    s, at = (x.view(4, 64) for x in model.nearest_neighbors(Q, 1))
    maps = model.anomaly_map_generator(s.view(4, 1, 8, 8), (64, 64))[:, 0]
    return dict(embedding=Q, patch_scores=s, image=model.compute_anomaly_score(s, at, Q)), maps


@pytest.mark.parametrize("b", [1, 2, 9, 100]) # 100: more than there are
def test_scores(b):
    r = features()
    theirs, maps = by_anomalib(r, b)
    Q, M = patch_features([r["layer2"], r["layer3"]], None, "mean"), Memory(r["bank"])
    torch.testing.assert_close(Q.flatten(0, 1), theirs["embedding"], rtol=1e-5, atol=1e-5)
    s = score_plain(M, Q)
    torch.testing.assert_close(s, theirs["patch_scores"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(image_score(M, Q, s, b), theirs["image"], rtol=1e-4, atol=1e-4)
    repeated = s.view(4, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2) # as it enlarges; ours is bilinear
    inside = slice(None), slice(16, -16), slice(16, -16) # at the border its Gaussian mirrors without the last pixel
    torch.testing.assert_close(smooth(repeated, 4)[inside], maps[inside], rtol=1e-4, atol=1e-4)
    assert (anomaly_maps(s, (8, 8), 64) - maps).abs().max() > 1e-2


def test_the_reference_is_anomalibs():
    r = load_file(REFERENCE)
    assert all(torch.equal(r[k], v) for k, v in features().items())
    for k, v in by_anomalib(r)[0].items():
        torch.testing.assert_close(r[k], v, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    r = features()
    r |= {k: v.contiguous() for k, v in by_anomalib(r)[0].items()}
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file(r, sys.argv[1] if sys.argv[1:] else REFERENCE)
