"""RD4AD beside anomalib's ReverseDistillation: equal weights, equal numbers, and the differences by name.

`python tests/test_anomalib_rd4ad.py` writes the reference tensors anew, which tests/test_rd4ad.py compares with.
"""
from pathlib import Path

import pytest
import torch
from filled import filled, picture
from safetensors.torch import load_file, save_file

from tocoad.systems import rd4ad

pytest.importorskip("anomalib")
from anomalib.models import ReverseDistillation  # noqa: E402
from anomalib.models.components.backbone import get_decoder  # noqa: E402
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerator  # noqa: E402
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer  # noqa: E402
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss  # noqa: E402

REFERENCE = Path(__file__).parent / "reference" / "rd4ad.safetensors"
CHANNELS = dict(resnet18=(64, 128, 256, 512), wide_resnet50_2=(256, 512, 1024, 2048))


def features(backbone, n=2, size=64):
    "Hashed maps of layers 1-3"
    return [picture(n, c, size // s, size // s, start=s) for c, s in zip(CHANNELS[backbone], (4, 8, 16), strict=False)]


def theirs(backbone):
    "anomalib's bottleneck and decoder"
    ocbe, decoder = get_bottleneck_layer(backbone), get_decoder(backbone)
    filled(ocbe)
    filled(decoder)
    return ocbe, decoder


def ours(backbone, ocbe, decoder):
    "Our student with their weights, by order: they list the blocks before the strided convolutions"
    S = rd4ad.student(CHANNELS[backbone], backbone)
    used = [v for k, v in ocbe.state_dict().items() if not k.startswith(("conv4", "bn4"))]
    order = [k for part in ("squeeze", "low", "middle") for k in S[0].state_dict() if k.startswith(part)]
    S[0].load_state_dict(dict(zip(order, used, strict=True)))
    S[1].load_state_dict(dict(zip(S[1].state_dict(), decoder.state_dict().values(), strict=True)))
    return S.eval()


def reference():
    "What anomalib makes of hashed maps with hashed weights; every eighth channel of the first layer"
    ocbe, decoder = theirs("resnet18")
    maps = features("resnet18")
    with torch.inference_mode():
        found = decoder(ocbe(maps))
        loss = ReverseDistillationLoss()(maps, found)
        whole = AnomalyMapGenerator((64, 64), mode="add")(maps, found)[:, 0]
    layers = {f"layer{k}": m[:, ::8].contiguous() for k, m in enumerate(found, 1)}
    return layers | dict(loss=loss, map=whole)


@pytest.mark.parametrize("backbone,mode", [("resnet18", "eval"), ("resnet18", "train"), ("wide_resnet50_2", "eval")])
def test_bottleneck_decoder_loss_and_map_agree(backbone, mode):
    ocbe, decoder = theirs(backbone)
    S, maps = ours(backbone, ocbe, decoder), features(backbone)
    for m in (ocbe, decoder, S):
        m.train(mode == "train")
    with torch.no_grad():
        code = ocbe(maps)
        a, b = decoder(code), S(maps)
        torch.testing.assert_close(S[0](maps), code, rtol=1e-4, atol=1e-4)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rd4ad.distance(maps, b), ReverseDistillationLoss()(maps, a), rtol=1e-4, atol=1e-4)
        whole = AnomalyMapGenerator((96, 96), mode="add")(maps, a)[:, 0]
        mine = rd4ad.anomaly_map([rd4ad.place_distance(t, s) for t, s in zip(maps, b, strict=True)], 96)
    inside = slice(16, -16) # the Gaussian of sigma 4 reaches 16 pixels; beyond, the borders are mirrored otherwise
    torch.testing.assert_close(mine[:, inside, inside], whole[:, inside, inside], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mine[:, 0], whole[:, 0], rtol=1e-4, atol=1e-4)


def test_steps_of_training_agree_with_their_betas():
    maps, (ocbe, decoder) = features("resnet18", 4), theirs("resnet18")
    S = ours("resnet18", ocbe, decoder)
    adam = torch.optim.Adam([*decoder.train().parameters(), *ocbe.train().parameters()], lr=1e-3, betas=(.5, .99))
    found = []
    for _ in range(4):
        loss = ReverseDistillationLoss()(maps, decoder(ocbe(maps)))
        adam.zero_grad()
        loss.backward()
        adam.step()
        found.append(loss.item())
    log = rd4ad.train(S, maps, epochs=4, batch=4, lr=1e-3, betas=(.5, .99), progress=False)
    assert [e["loss"] for e in log] == pytest.approx(found, rel=1e-3)


def test_their_second_beta_is_another():
    theirs = ReverseDistillation(backbone="resnet18", pre_trained=False).configure_optimizers().param_groups[0]
    assert theirs["betas"] == (.5, .99) and rd4ad.Settings().betas == (.5, .999)
    assert theirs["lr"] == rd4ad.Settings().lr


def test_lite0_is_refused_there():
    with pytest.raises(ValueError, match="(?i)not supported"):
        get_decoder("tf_efficientnet_lite0")


def test_the_reference_is_theirs():
    stored, now = load_file(REFERENCE), reference()
    assert stored.keys() == now.keys()
    for k, v in now.items():
        torch.testing.assert_close(stored[k], v, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file(reference(), REFERENCE)
