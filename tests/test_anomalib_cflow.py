"""CFLOW-AD beside anomalib's `Cflow`: equal weights, equal numbers, and the differences by name.

`python tests/test_anomalib_cflow.py` writes the reference tensors anew, which tests/test_cflow.py compares with.
"""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cflow import SHAPES, freia_to_ours, maps, settings

from tocoad.systems import cflow

pytest.importorskip("anomalib")
from anomalib.models.image.cflow.anomaly_map import AnomalyMapGenerator  # noqa: E402
from anomalib.models.image.cflow.torch_model import CflowModel  # noqa: E402
from anomalib.models.image.cflow.utils import cflow_head, get_logp, positional_encoding_2d  # noqa: E402

REFERENCE = Path(__file__).parent / "reference" / "cflow.safetensors"
D = 8 # numbers of a code


def theirs(channels, blocks=2, condition=D, soft=True):
    "anomalib's flow of a layer, with other weights than fresh ones"
    flow = cflow_head(condition, blocks, 1.9, channels, permute_soft=soft)
    with torch.no_grad():
        for p in (p for p in flow.parameters() if p.requires_grad):
            p += torch.randn(p.shape) / 10
    return flow


def weights(flow):
    "By the names that `freia_to_ours` reads"
    state = {k.removeprefix("module_list."): v for k, v in flow.state_dict().items() if not k.endswith("w_perm_inv")}
    return {k: v.argmax(1) if k.endswith("w_perm") and (v.amax(1) == 1).all() else v for k, v in state.items()}


def their_log_p(flow, m, condition=D):
    "As their `forward`: rows, codes, logarithm of the density for each channel"
    rows = lambda t: t.permute(0, 2, 3, 1).flatten(0, 2)
    code = positional_encoding_2d(condition, *m.shape[2:]).expand(len(m), -1, -1, -1)
    z, stretch = flow(rows(m), [rows(code)])
    return get_logp(m.shape[1], z, stretch) / m.shape[1]


def their_map(log_ps, size):
    place = dict(height=[s[1] for s in SHAPES], width=[s[2] for s in SHAPES])
    return AnomalyMapGenerator(["2", "3", "4"])(distribution=log_ps, image_size=(size, size), **place)


def reference():
    "What anomalib makes of small maps"
    torch.manual_seed(0)
    stored, found = {}, []
    for k, (shape, x) in enumerate(zip(SHAPES, maps(), strict=True)):
        flow = theirs(shape[0])
        with torch.no_grad():
            log_p = their_log_p(flow, x)
        code = positional_encoding_2d(D, *shape[1:]).flatten(1).T
        loss = -torch.nn.functional.logsigmoid(log_p).mean() # as their `training_step`
        found.append(log_p)
        here = weights(flow) | dict(x=x, code=code, log_p=log_p, loss=loss)
        stored |= {f"{k}.{n}": v.contiguous() for n, v in here.items()}
    return stored | dict(map=their_map(found, 32))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("condition", [8, 128])
def test_codes_likelihoods_and_map_agree(soft, condition):
    torch.manual_seed(1)
    c, mine, found = settings(blocks=8, condition=condition), [], []
    for shape, x in zip(SHAPES, maps(s=1), strict=True):
        flow = theirs(shape[0], 8, condition, soft)
        state = weights(flow)
        ours = cflow.flow_for(shape[0], c)
        for k, block in enumerate(ours):
            block.mix = state[f"{k}.w_perm"]
        with torch.no_grad():
            found.append(their_log_p(flow, x, condition))
            mine.append(cflow.per_channel(freia_to_ours(ours, state), *cflow.places(x, condition)))
        torch.testing.assert_close(mine[-1], found[-1], rtol=1e-4, atol=1e-4)
    by_batch = [p.view(-1, *s[1:]) - p.max() for p, s in zip(mine, SHAPES, strict=True)]
    M = cflow.anomaly_map(by_batch, 48)
    torch.testing.assert_close(M - M.min(), their_map(found, 48), rtol=1e-4, atol=1e-4)


def test_their_score_depends_on_the_batch():
    "By how much: the same first image, alone and beside two others"
    torch.manual_seed(2)
    x, flows = maps(s=2), [theirs(s[0]) for s in SHAPES]
    with torch.no_grad():
        log_ps = [their_log_p(f, m) for f, m in zip(flows, x, strict=True)]
    alone = their_map([p[:len(p) // 3] for p in log_ps], 32)[0].max()
    assert abs(their_map(log_ps, 32)[0].max() - alone) > .02


def test_steps_of_training_agree_with_their_rate_and_mixing():
    "Adam of a constant rate, fibres of equal places; theirs drops no place, so a whole number of fibres is taken"
    torch.manual_seed(3)
    m, flow = maps(4, s=3)[0], theirs(SHAPES[0][0])
    ours, c = freia_to_ours(cflow.flow_for(8, settings()), weights(flow)), settings(fibre=64)
    losses, adam = [], torch.optim.Adam(flow.parameters(), lr=1e-3)
    x, code = cflow.places(m, D)
    for idx in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(64):
        z, stretch = flow(x[idx], [code[idx]])
        loss = -torch.nn.functional.logsigmoid(get_logp(8, z, stretch) / 8).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    mine = cflow.steps(ours, m, torch.optim.Adam(ours.parameters(), lr=1e-3), c, torch.Generator().manual_seed(0))
    assert [v.item() for v in mine] == pytest.approx(losses, rel=1e-4) and len(mine) == 4


def test_the_whole_model_of_resnet18_agrees_but_for_the_top():
    torch.manual_seed(4)
    model = CflowModel("resnet18", ["layer2", "layer3", "layer4"], pre_trained=False, condition_vector=D,
                       coupling_blocks=2).eval()
    images, c = torch.rand(2, 3, 64, 64), settings()
    with torch.no_grad():
        answer, features = model(images), model.encoder(images)
        mine = []
        for flow, x in zip(model.decoders, features.values(), strict=True):
            ours, state = cflow.flow_for(x.shape[1], c), weights(flow)
            for k, block in enumerate(ours):
                block.mix = state[f"{k}.w_perm"]
            log_p = cflow.per_channel(freia_to_ours(ours, state), *cflow.places(x, D))
            mine.append((log_p - log_p.max()).view(2, *x.shape[2:])) # of the batch
    image, M = cflow.maps_of({f"layer{k}": p.numpy() for k, p in enumerate(mine, 2)}, c)
    torch.testing.assert_close(torch.from_numpy(M - M.min()), answer.anomaly_map, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(image - M.min()), answer.pred_score, rtol=1e-4, atol=1e-4)


def test_the_reference_is_theirs():
    stored = load_file(REFERENCE)
    assert REFERENCE.stat().st_size < 200_000
    for k, shape in enumerate(SHAPES): # rotations come of NumPy's draw: the stored weights are taken
        flow, here = theirs(shape[0]), {n.partition(f"{k}.")[2]: v for n, v in stored.items() if n.startswith(f"{k}.")}
        state = flow.state_dict()
        state |= {f"module_list.{n}": v for n, v in here.items() if f"module_list.{n}" in state}
        flow.load_state_dict(state)
        with torch.no_grad():
            torch.testing.assert_close(their_log_p(flow, here["x"]), here["log_p"], rtol=1e-4, atol=1e-4)
    found = [stored[f"{k}.log_p"] for k in range(3)]
    torch.testing.assert_close(their_map(found, 32), stored["map"], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    save_file(reference(), REFERENCE)
