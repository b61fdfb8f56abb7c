"""The cells of gpu.ipynb one after the other, their results kept after each; then where a step's time goes.

    python speed.py OUT --device cuda [--quick] [--set compiled=False copies=(4,)]
"""
import argparse
import ast
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
NOTEBOOK = Path(__file__).parents[1] / "gpu.ipynb"


def show(x):
    "Print a table or a value; nothing for None"
    if x is not None:
        print(x.to_string() if hasattr(x, "to_string") else x, flush=True)


def run(source, names):
    "A cell, and what its last line gives"
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "gpu.ipynb", "exec"), names)
    if last:
        show(eval(compile(last, "gpu.ipynb", "eval"), names))


def profile(f, device, steps=3):
    "What a call does: kernels or operators by time, and how many of them a step has"
    import torch
    from torch.profiler import ProfilerActivity
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    f()
    with torch.profiler.profile(activities=kinds) as p:
        for _ in range(steps):
            f()
        if device != "cpu":
            torch.cuda.synchronize()
    kernels = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in p.events())
    by = [f"self_{k}_time_total" for k in (["device"] if device != "cpu" else []) + ["cpu"]]
    tables = [p.key_averages().table(sort_by=b, row_limit=12, max_name_column_width=60) for b in by]
    return f"{kernels / steps:.0f} kernels and copies a step\n" + "\n".join(tables)


def main():
    "Run the notebook's cells, then profile a step of each stage"
    p = argparse.ArgumentParser()
    p.add_argument("out", type=Path)
    p.add_argument("--device", default="cuda")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--set", nargs="*", default=[], help="names that a cell gives a value, and another value for them")
    a = p.parse_args()
    given = dict(device=a.device, out=str(a.out), quick=a.quick)
    changes = {k: ast.literal_eval(v) for k, _, v in (s.partition("=") for s in a.set)}
    names, start = {"__name__": "gpu"}, time.perf_counter()
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            if source.startswith("#"):
                print(f"\n{source.splitlines()[0]}", flush=True)
            continue
        before = set(names)
        run(source, names)
        names |= given if "parameters" in cell["metadata"].get("tags", []) else {}
        names |= {k: v for k, v in changes.items() if k in set(names) - before}
        if "b" in names:
            names["b"].save()
        print(f"[{time.perf_counter() - start:.0f} s]", flush=True)
    with names["arithmetic"]("tf32", a.device):
        said = "\n".join(f"stage {n}: {profile(names[f'work{n}'], a.device)}" for n in (1, 2))
    (a.out / "bench" / "profile.txt").write_text(said)
    print(said, f"[{time.perf_counter() - start:.0f} s]", sep="\n", flush=True)


if __name__ == "__main__":
    main()
