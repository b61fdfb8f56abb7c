"""One change, before and after: how fast a stage trains with some settings, and with others.

    python change.py OUT --stage stage2 --before precision=tf32 --after precision=tf32 compile=true --copies 1 4
"""
import argparse
import sys
from pathlib import Path

from tocoad.run import config, keys, store

sys.path.insert(0, str(Path(__file__).parents[1]))
import measuring  # noqa: E402


def main():
    "Measure each stage before and after, and keep what was found after each measurement"
    p = argparse.ArgumentParser()
    p.add_argument("out", type=Path)
    p.add_argument("--device", default="cuda")
    p.add_argument("--profile", default="paper")
    p.add_argument("--stage", nargs="+", default=["stage1", "stage2"])
    p.add_argument("--before", nargs="*", default=[], help="settings, as key=value")
    p.add_argument("--after", nargs="*", default=["compile=true"], help="settings, as key=value")
    p.add_argument("--copies", nargs="+", type=int, default=[1], help="runs side by side")
    p.add_argument("--images", type=int, default=512)
    p.add_argument("--epochs", type=int, default=3)
    a = p.parse_args()
    c = config.config(a.profile, dataset="mini", category="washer", weights="random", textures="embedded")
    found = []
    for stage in a.stage:
        for copies in a.copies:
            rate = {}
            for when in ("before", "after"):
                settings = getattr(a, when)
                cfg = c.replace(**config.settings(settings))
                rate[when], losses = measuring.training_rate(stage, cfg, a.device, copies, a.images, a.epochs)
                found.append(dict(stage=stage, copies=copies, when=when, settings=settings, images_s=rate[when],
                                  losses=losses[0]))
                print(f"{stage}, {copies} at once, {when} {' '.join(settings) or '-'}: {rate[when]:,.1f} images/s, "
                      f"losses {' '.join(f'{x:.5f}' for x in losses[0])}", flush=True)
                hardware = keys.hardware(_name(a.device))
                store.write_json(dict(hardware=hardware, results=found), a.out / "change.json")
            print(f"{stage}, {copies} at once: {rate['after'] / rate['before']:.2f} times as fast", flush=True)


def _name(device):
    "What a GPU calls itself"
    if device == "cpu":
        return None
    import torch
    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
