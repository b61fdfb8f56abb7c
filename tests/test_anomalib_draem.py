"""DRAEM beside anomalib's: equal weights, equal numbers, and the differences by name.

`python tests/test_anomalib_draem.py` writes the reference tensors anew, which tests/test_draem.py compares with.
"""
from pathlib import Path

import pytest
import torch
from filled import filled, picture
from safetensors.torch import load_file, save_file

from tocoad.systems import draem

pytest.importorskip("anomalib")
from anomalib.models.image.draem.loss import DraemLoss  # noqa: E402
from anomalib.models.image.draem.torch_model import (  # noqa: E402
    DiscriminativeSubNetwork,
    DraemModel,
    ReconstructiveSubNetwork,
)
from kornia.losses import FocalLoss  # noqa: E402

REFERENCE = Path(__file__).parent / "reference" / "draem.safetensors"
WIDTHS = 4, 4 # channels of the first level of either network


def images(n=2, size=64):
    "Normal images, the same with a bright square, its mask"
    I = picture(n, 3, size, size)
    y = torch.zeros(n, size, size, dtype=torch.bool)
    y[:, 5:25, 10:30] = True
    return I, torch.where(y[:, None], (I + 1) / 2, I), y


def theirs():
    "anomalib's two networks, narrow"
    model = DraemModel()
    model.reconstructive_subnetwork = ReconstructiveSubNetwork(base_width=WIDTHS[0])
    model.discriminative_subnetwork = DiscriminativeSubNetwork(6, 2, base_width=WIDTHS[1])
    return filled(model)[0]


def ours(model):
    "Our networks with their weights, by order"
    net = draem.Draem(1 / 32)
    net.repair, net.segment = draem.Repair(WIDTHS[0]), draem.Segment(WIDTHS[1])
    for mine, of in ((net.repair, model.reconstructive_subnetwork), (net.segment, model.discriminative_subnetwork)):
        mine.load_state_dict(dict(zip(mine.state_dict(), of.state_dict().values(), strict=True)))
    return net.eval()


def patched(I, rebuilt, y, logits):
    "Their loss with a focal loss that weighs both classes by 1"
    loss = DraemLoss()
    loss.focal_loss = FocalLoss(alpha=None, reduction="mean") # over both classes, of which one is 0: so once more
    return loss(I, rebuilt, y, logits) + loss.focal_loss(logits, y[:, 0].long())


def reference():
    "What anomalib makes of two hashed images with hashed weights, and its loss once it is patched"
    model, (I, I_G, y) = theirs(), images(size=32)
    with torch.inference_mode():
        rebuilt, logits = _forward(model, I_G)
        return dict(rebuilt=rebuilt, logits=logits, loss=patched(I, rebuilt, y[:, None].float(), logits))


def _forward(model, x):
    "Both outputs with stored statistics: in eval mode their model keeps the repair to itself"
    rebuilt = model.reconstructive_subnetwork(x)
    return rebuilt, model.discriminative_subnetwork(torch.cat([x, rebuilt], 1))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_networks_agree(mode):
    model, I_G = theirs(), images(4)[1].double() # in float32 batch norm of few places differs by 7e-4
    net = ours(model).double().train(mode == "train")
    model.double().train(mode == "train")
    with torch.no_grad():
        for a, b in zip(net(I_G), _forward(model, I_G), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_the_loss_agrees_once_both_classes_count_and_not_before():
    model, (I, I_G, y) = theirs(), images()
    with torch.no_grad():
        rebuilt, logits = _forward(model, I_G)
    logits.requires_grad_()
    mine = sum(draem.losses(rebuilt, logits, I, y))
    right, wrong = (loss(I, rebuilt, y[:, None].float(), logits) for loss in (patched, DraemLoss()))
    torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    slopes = [torch.autograd.grad(x, logits)[0].abs().amax(1) for x in (mine, right, wrong)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-9)
    assert slopes[0][~y].min() > 0 and not slopes[2][~y].any() # theirs: nothing on normal pixels
    torch.testing.assert_close(slopes[2][y], slopes[0][y] / 2, rtol=1e-4, atol=1e-9) # and half on the others


def test_their_image_score_is_the_largest_pixel():
    model, (_, I_G, _) = theirs(), images()
    with torch.inference_mode():
        found = model.eval()(I_G)
        maps = ours(model)(I_G)[1].softmax(1)[:, 1]
    torch.testing.assert_close(found.anomaly_map, maps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pred_score, draem.image_scores(maps, 1), rtol=1e-4, atol=1e-4)
    assert (draem.image_scores(maps) < found.pred_score).all()


def test_the_full_networks_have_equal_parts():
    with torch.device("meta"):
        model, net = DraemModel(), draem.Draem()
    for mine, of in ((net.repair, model.reconstructive_subnetwork), (net.segment, model.discriminative_subnetwork)):
        assert [v.shape for v in mine.state_dict().values()] == [v.shape for v in of.state_dict().values()]


def test_the_reference_is_theirs():
    stored, now = load_file(REFERENCE), reference()
    assert stored.keys() == now.keys()
    for k, v in now.items():
        torch.testing.assert_close(stored[k], v, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file(reference(), REFERENCE)
