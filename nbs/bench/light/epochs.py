"""The paper's epochs on real images: rows of Tables 5 and 7, several runs side by side, as many seeds as fit.

    python epochs.py DATA OUT --device cuda --seconds 280 --workers 10

DATA holds a folder for each category and `textures`. What is finished lies in OUT: records and scores as parts
of a store in tar files, each whole after every run.
"""
import argparse
import multiprocessing as mp
import os
import queue
import statistics
import tarfile
import time
from functools import cache
from pathlib import Path

METRICS = ("image_auroc", "pixel_auroc")
CATEGORIES = ("toothbrush", "leather", "bottle")
BIG = 100 # images of a category that can wait
MOST = 12e6 # bytes of a tar file


def jobs(images, seeds, profiles, settings):
    "(profile, category, seed, row), the most wanted first: a long one goes early or, beyond its first seed, last"
    from tocoad.paper import rows as rows_room
    from tocoad.run import config
    out = []
    for profile in profiles:
        bn2 = config.settings(settings).get("bn2", config.config(profile).bn2)
        rows = {repr(r.changes): r for t in ("table5", "table7") for r in rows_room.rows(t, bn2)
                if r is rows_room.FROZEN or r.changes["method"] != "frozen"}
        for i, row in enumerate(rows.values()):
            later = row.changes["method"].endswith("control") or row.changes.get("generator", "perlin") != "perlin"
            for category, n in images.items():
                for seed in range(seeds):
                    rank = seed + (seeds if n > BIG and (seed or later) else 0)
                    out.append(((rank, later, -n, i), (profile, category, seed, row)))
    return [job for _, job in sorted(out, key=lambda j: j[0])]


@cache
def data_of(folder, category, size):
    "A category's images, read once"
    from tocoad.data.load import load
    return load(folder, None, category, size)


def carry_out(job, a):
    "The metrics of one run, and the files of its store that are worth keeping"
    from tocoad.run import compare, config
    from tocoad.run import store as store_room
    profile, category, seed, row = job
    settings = config.settings([f"textures={a.data / 'textures'}", *a.set])
    size = settings.get("resize", 256)
    data, store = data_of(a.data / category, category, size), store_room.Store(a.store)
    cfg = config.config(profile, dataset=data.dataset, category=category, seed=seed, **row.changes)
    tasks = compare.tasks(cfg.replace(**settings), data, device=a.device)
    metrics = compare.carry_out(tasks["metrics"], data, store, device=a.device)
    files = [store.root / "store.json", *map(store.path, tasks.values()), store.path(tasks["scores"], ".safetensors")]
    return metrics["values"], [str(f.relative_to(store.root)) for f in files if f.exists()]


def work(todo, done, a):
    "A process: one run after the other"
    import torch
    torch.set_num_threads(1)
    while True:
        job = todo.get()
        if job is None:
            return
        start = time.time()
        try:
            said = carry_out(job, a)
        except Exception as e:
            said = f"{type(e).__name__}: {str(e).splitlines()[:1]}"
        done.put((job, said, time.time() - start))


class Kept:
    "Tar files of parts of a store, each whole after every addition"
    def __init__(self, store, out):
        "A store's folder, and the folder of the tar files"
        self.store, self.out, self.names, self.part = store, out, set(), 0

    def add(self, names):
        "Files of the store, by their paths inside it"
        path = self.out / f"store-{self.part}.tar"
        if path.exists() and path.stat().st_size > MOST:
            self.part += 1
            path = self.out / f"store-{self.part}.tar"
        with tarfile.open(path, "a") as t:
            for n in names:
                if n not in self.names:
                    t.add(self.store / n, n)
        self.names |= set(names)


def summary(found):
    "Means over seeds and the difference to the frozen F, in points"
    out = ["", "image / pixel AUROC, mean over seeds; differences to the frozen F, seed by seed"]
    cells = sorted({k[:2] for k in found})
    for profile, category in cells:
        frozen = {k[2]: v for k, v in found.items() if k[:2] == (profile, category) and k[3] == "frozen F"}
        for row in dict.fromkeys(k[3] for k in found if k[:2] == (profile, category)):
            mine = {k[2]: v for k, v in found.items() if k[:2] == (profile, category) and k[3] == row}
            mean = [100 * statistics.mean(v[m] for v in mine.values()) for m in METRICS]
            both = sorted(mine.keys() & frozen.keys())
            more = [" ".join(f"{100 * (mine[s][m] - frozen[s][m]):+.2f}" for s in both) for m in METRICS]
            out.append(f"{profile:8}{category:11}{row:34}{mean[0]:7.2f} / {mean[1]:.2f}  {len(mine)} seeds"
                       f"  image {more[0]}  pixel {more[1]}")
    return "\n".join(out)


def main():
    "Carry out the runs side by side until the time is over"
    start = time.time()
    p = argparse.ArgumentParser()
    p.add_argument("data", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--store", type=Path, default=None, help="folder of the store (default: beside the data)")
    p.add_argument("--device", default="cuda")
    p.add_argument("--seconds", type=float, default=280.)
    p.add_argument("--workers", type=int, default=10)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--profiles", nargs="+", default=["literal", "paper"])
    p.add_argument("--set", nargs="*", default=["backbone=tf_efficientnet_lite0", "patches=mean", "dims=none"])
    a = p.parse_args()
    a.data, a.store = a.data.resolve(), (a.store or a.data.with_name(f"{a.data.name}-store")).resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    images = {c: len(list((a.data / c).glob("**/train/good/*"))) for c in CATEGORIES if (a.data / c).is_dir()}
    every = jobs(images, a.seeds, a.profiles, a.set)
    context = mp.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for job in every + [None] * a.workers:
        todo.put(job)
    running = [context.Process(target=work, args=(todo, done, a), daemon=True) for _ in range(a.workers)]
    for r in running:
        r.start()
    kept, found = Kept(a.store, a.out), {}
    print(f"{len(every)} runs wanted, of {images}, {a.workers} at once on {a.device}", flush=True)
    while len(found) < len(every) and (left := start + a.seconds - time.time()) > 0:
        if not any(r.is_alive() for r in running):
            break
        try:
            (profile, category, seed, row), said, seconds = done.get(timeout=min(left, 5))
        except queue.Empty:
            continue
        ok = isinstance(said, tuple)
        values = "image {image_auroc:.4f} pixel {pixel_auroc:.4f}".format(**said[0]) if ok else f"failed: {said}"
        what = f"{profile} {category} seed {seed}, {row.name}"
        print(f"[{time.time() - start:4.0f} s] {what}: {values} ({seconds:.0f} s)", flush=True)
        if ok:
            found[profile, category, seed, row.name] = said[0]
            kept.add(said[1])
        else:
            every.remove((profile, category, seed, row))
    for r in running:
        r.terminate()
    print(summary(found), f"{len(found)} runs in {time.time() - start:.0f} s", sep="\n", flush=True)
    os._exit(0 if found else 1) # what is queued is of no use to anybody


if __name__ == "__main__":
    main()
