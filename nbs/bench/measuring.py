"""How long it takes beside the same work done by others, on the same machine in the same minute.

Ours and each peer get the same inputs and run in turn; each pair of neighbouring runs gives one ratio. The median is
the result, the smallest and largest are its spread. Where there is no peer there is a counted floor: the operations
that the work cannot do without, at the rate at which this machine multiplies matrices. Compare both sides' results
before a race: a race between two different results has no winner.
"""
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch.utils.flop_counter import FlopCounterMode

from tocoad.data.errors import BadInput
from tocoad.data.load import load as load_images
from tocoad.method.arithmetic import arithmetic
from tocoad.method.finetune import finetune
from tocoad.method.pretrain import pretrain
from tocoad.paper.drawing import GREY, HUES, INK
from tocoad.run.keys import hardware, versions
from tocoad.run.store import write_json
from tocoad.systems import tocoad as tocoad_room
from tocoad.systems.settings import resolved

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR) # it misses CUDA where there is none
from torch.utils.benchmark import Timer, timer  # noqa: E402

PEERS = ("anomalib", "torchmetrics", "opencv-python-headless", "scikit-learn", "scipy")
FAR = 1000 # longer bars are cut


def timed(f, repeats=3, warm=1, clock=timer): # the clock of torch.utils.benchmark waits for a GPU
    "Seconds of each of `repeats` calls"
    def once():
        start = clock()
        f()
        return clock() - start
    return [once() for _ in range(warm + repeats)][warm:]


def matmul_rate(device="cpu", shape=(4096, 1024, 2048), dtype="float32", seconds=2):
    "Operations a second of a matrix product (rows, inner, columns); a multiplication and an addition count as two"
    m, k, n = shape
    A, B = (torch.rand(s, device=device).to(getattr(torch, dtype)) for s in ((m, k), (k, n)))
    t = Timer("A @ B", globals=dict(A=A, B=B), num_threads=torch.get_num_threads())
    return 2 * m * k * n / min(t.blocked_autorange(min_run_time=seconds).times)


def flop(f):
    "Operations of a call, as PyTorch counts them"
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def mvtec(root, category):
    "The folder `mvtec_ad` below `root` or TOCOAD_DATA that holds a category; None: there is none"
    places = [f"{p}/mvtec_ad" for p in (root, os.environ.get("TOCOAD_DATA")) if p]
    return next((p for p in places if os.path.isdir(f"{p}/{category}")), None)


class Watch:
    """Peak memory of a block above its start: `mb` after the block; of the GPU if one is in use.

    Linux keeps the highest resident memory of a process and lets it be reset; elsewhere, and for kernel=False, a
    thread looks every two milliseconds. Memory that was freed but not yet returned goes back to the system first,
    since a call that fills such holes would seem to need nothing.
    """
    def __init__(self, kernel=True): self.kernel = kernel

    def __enter__(self):
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (AttributeError, OSError, TypeError):
            pass
        self.gpu = torch.cuda if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        if self.gpu:
            self.gpu.reset_peak_memory_stats()
            self.gpu_start = self.gpu.memory_allocated()
        self.me = psutil.Process().memory_info
        self.start = self.top = self.me().rss
        self.on, self.thread = True, None
        if not (self.kernel and self._reset()):
            self.thread = threading.Thread(target=self._look, daemon=True)
            self.thread.start()
        return self

    def _reset(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _look(self):
        while self.on:
            self.top = max(self.top, self.me().rss)
            time.sleep(.002)

    def __exit__(self, *_):
        self.on = False
        if self.thread:
            self.thread.join()
        else:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.top = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        used = self.gpu.max_memory_allocated() - self.gpu_start if self.gpu else max(self.top - self.start, 0)
        self.mb = used / 1e6


def result(name, peer, ours_s, peer_s, ratios=None, **more): # seconds; peer / ours of each round
    "One measurement: name, peer, ours_s, peer_s, ratio, low, high, peak_mb and more"
    ratios = ratios or [peer_s / ours_s]
    found = dict(ratio=statistics.median(ratios), low=min(ratios), high=max(ratios), peak_mb=None)
    return dict(name=name, peer=peer, ours_s=ours_s, peer_s=peer_s) | found | more


def race(name, ours, peers, repeats=3, scale=None, warm=1, clock=timer, **more):
    """Ours and its peers (name -> function that computes the same) in turn, a result for each peer.

    scale: peer -> factor on its seconds, where it was given a part of the work. Memory is watched in the first round.
    """
    runners, scale = {None: ours} | peers, scale or {}
    seconds, peak = {k: [] for k in runners}, {}
    for i in range(-warm, repeats):
        for k in list(runners)[::1 if i % 2 else -1]:
            if i == -warm:
                with Watch() as w:
                    s = timed(runners[k], 1, 0, clock)[0]
                peak[k] = w.mb
            else:
                s = timed(runners[k], 1, 0, clock)[0]
            if i >= 0:
                seconds[k].append(s * scale.get(k, 1))
    middle = {k: statistics.median(s) for k, s in seconds.items()}
    def one(k):
        ratios = [p / o for p, o in zip(seconds[k], seconds[None], strict=True)]
        scaled = {"scaled": scale[k]} if k in scale else {}
        return result(name, k, middle[None], middle[k], ratios, peak_mb=peak[None], peer_peak_mb=peak[k],
                      repeats=repeats, **scaled, **more)
    return [one(k) for k in peers]


class Goal(NamedTuple):
    "What a measurement should reach"
    name: str    # of results; * stands for anything
    peer: str    # its beginning; "" for any
    field: str   # of a result; those that end in _h100 exist only on that card
    least: bool  # the field should be at least, or at most,
    value: float
    words: str   # the goal in words

    def holds(self, r): return r[self.field] >= self.value if self.least else r[self.field] <= self.value

    def fits(self, r):
        return fnmatchcase(r["name"], self.name) and r["peer"].startswith(self.peer) and r.get(self.field) is not None


GOALS = [Goal(*g) for g in (
    ("coreset.bottle", "plain greedy", "ratio", True, 8, "8 times"),
    ("coreset.bottle", "anomalib", "ratio", True, 50, "50 times"),
    ("coreset.bottle", "matrix product", "ratio", True, .5, "within 2x of the floor"),
    ("coreset.bottle", "matrix product", "peak_inputs", False, 2, "memory under 2 x the features"),
    ("neighbours.bottle", "faiss", "ratio", True, 1 / 1.3, "within 1.3x"),
    ("scores.bottle", "anomalib", "ratio", True, 2, "2 times"),
    ("metrics.5m", "scikit-learn", "ratio", True, 10, "10 times"),
    ("metrics.5m", "scikit-learn", "ours_s", False, 1, "under 1 s"),
    ("*.29m", "scikit-learn", "peak_inputs", False, 3, "memory under 3 x the scores"),
    ("*.16", "F and D", "ratio", True, 10, "a tenth of F and D's step"),
    ("perlin.16", "NumPy", "ratio", True, 3, "3 times"),
    ("cutpaste.16", "NumPy", "ratio", True, 1, "no slower"),
    ("nsa.16", "OpenCV", "ratio", True, 1, "no slower"),
    ("stage*", "F and D", "ratio", True, .9, "under 10 % outside F and D"),
    ("parts.fit.1", "anomalib", "ratio", True, 10, "10 times"),
    ("parts.score", "a tenth", "ratio", True, 2.5, "2.5 times"),
    ("parts.score.1", "anomalib", "ratio", True, 5, "5 times"),
    ("import", "import torch", "ours_s", False, .3, "under 0.3 s"),
    ("help", "", "ours_s", False, 1, "under 1 s"),
    ("scaling.*", "", "excess", False, .15, "exponent as expected"),
    ("scaling.*", "", "memory_excess", False, .15, "memory's too"),
    ("gpu.features.best", "", "images_s_h100", True, 6500, "6,500 images/s"),
    ("gpu.stage1.best", "", "images_s_h100", True, 2500, "2,500 images/s"),
    ("gpu.stage2.best", "", "images_s_h100", True, 900, "900 images/s"),
    ("gpu.coreset", "", "ours_s_h100", False, 2, "at most 2 s"),
    ("gpu.category", "", "ours_s_h100", False, 5, "at most 5 s"),
    ("gpu.hours", "", "hours_h100", False, 5, "at most 5 hours"))]


def goals(r):
    "The goals of a result: pairs of words and whether it is reached"
    return [(g.words, g.holds(r)) for g in GOALS if g.fits(r)]


def span(s):
    "Seconds in words"
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms" if s >= 1e-3 else f"{1e6 * s:.3g} µs"


def table(results, judged=True):
    "Results as a reader wants them, beside their goals"
    def row(r):
        reached = goals(r) if judged else []
        return {"": r["name"], "beside": r["peer"] + (f" (x {r['scaled']:.3g})" if "scaled" in r else ""),
                "ours": span(r["ours_s"]), "peer": span(r["peer_s"]),
                "peer / ours": f"{r['ratio']:.3g} [{r['low']:.3g}, {r['high']:.3g}]",
                "peak MB": "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}",
                "goal": "; ".join(f"{w}: {'reached' if ok else 'missed'}" for w, ok in reached)}
    return pd.DataFrame([row(r) for r in results]).set_index("") if results else pd.DataFrame()


def rates(results):
    "Of those with rates: images and operations a second, share of the fastest matrix product, gain over the peer"
    rows = [{"": r["name"], "images/s": f"{r['images_s']:,.0f}", "TFLOP/s": f"{r['tflops']:.3g}",
             "share": f"{r['share']:.0%}", "beside": r["peer"], "gain": f"{r['ratio']:.2f}"}
            for r in results if "images_s" in r]
    return pd.DataFrame(rows).set_index("") if rows else pd.DataFrame()


def have(*modules):
    "Whether some modules are installed"
    return all(find_spec(m) for m in modules)


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Bench:
    "The results of one notebook, shown as they come and written at the end; `quick`: small sizes, one thread"
    def __init__(self, name, out="reports", device="cpu", quick=False):
        if quick:
            torch.set_num_threads(1)
        self.name, self.out, self.results, self.missing, self.more = name, Path(out), [], [], {}
        gpu = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else None
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        self.head = dict(hardware=hardware(gpu), versions=versions() | {p: _version(p) for p in PEERS}, quick=quick,
                         load=load)

    def race(self, *args, **kw):
        "A race whose results are kept: see `race`"
        return self.keep(*race(*args, **kw))

    def keep(self, *results):
        "Keep results, return their table; small sizes have no goals"
        self.results += results
        return table(results, not self.head["quick"])

    def lacks(self, name, peer, why="needs the extra bench"):
        "Say that a peer of a measurement was not measured, and why"
        self.missing.append(dict(name=name, peer=peer, why=why))
        print(f"{name}, {peer}: not measured, {why}")

    def save(self):
        "Write `bench/<name>.json`, whole or not at all; returns its path"
        every = self.head | self.more | dict(results=self.results, missing=self.missing)
        return write_json(every, self.out / "bench" / f"{self.name}.json")


def load(paths):
    "Several notebooks' results, written by `Bench.save`, as one"
    parts = []
    for p in map(Path, paths):
        try:
            parts.append(json.loads(p.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise BadInput(f"{p} is not a file of results: run `tocoad bench {p.stem}`.") from None
    for k in ("hardware", "versions", "quick"):
        if any(p[k] != parts[0][k] for p in parts):
            raise BadInput(f"the results in {Path(paths[0]).parent} differ in {k}: "
                           "measure them in one run of `tocoad bench`.")
    every = {(r["name"], r["peer"]): r for p in parts for r in p["results"]}
    more = {k: v for p in parts for k, v in p.items() if k not in ("load", "results", "missing")}
    return more | dict(load=max((p["load"] or 0 for p in parts), default=None), results=list(every.values()),
                       missing=[m for p in parts for m in p["missing"]])


def text(b): # from `load`
    "Everything in words: machine, table, what is missing"
    hw, every = b["hardware"], [] if b["quick"] else [ok for r in b["results"] for _, ok in goals(r)]
    machine = hw["device"] if hw["device"] != "cpu" else f"{hw['cpu']}, {hw['cores']} cores"
    head = f"{machine}, load {b['load']}" + " (quick: small sizes, which have no goals)" * b["quick"]
    body = table(b["results"], not b["quick"]).to_string() if b["results"] else "no speeds here: see the notebook"
    lacks = [f"{m['name']}, {m['peer']}: not measured, {m['why']}" for m in b["missing"]]
    reached = [f"{sum(every)} of {len(every)} goals reached"] if every else []
    return "\n".join([head, "", body, "", *lacks, *reached])


def plot(results, heading="", judged=True):
    "Ratios as bars on a logarithmic axis, their spread, and the goals as marks: green reached, red missed, grey none"
    fig, ax = plt.subplots(figsize=(8.4, 1.1 + .3 * len(results)), layout="constrained")
    for y, r in enumerate(results):
        g = next((g for g in GOALS if judged and g.field == "ratio" and g.fits(r)), None)
        colour = GREY if g is None else HUES["good"] if g.holds(r) else HUES["bad"]
        ax.plot([1, min(r["ratio"], 2 * FAR)], [y, y], color=colour, lw=7, solid_capstyle="butt", alpha=.9)
        ax.plot([r["low"], r["high"]], [y, y], color=INK, lw=1)
        if g:
            ax.plot([g.value] * 2, [y - .38, y + .38], color=INK, lw=2)
        label, at = f"{r['ratio']:,.3g}" if r["ratio"] < FAR else f"{r['ratio']:,.0f}", min(max(r["high"], 1), FAR)
        ax.annotate(label, (at, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    ax.axvline(1, color=INK, lw=.8)
    low, high = min(r["low"] for r in results), max(r["high"] for r in results)
    ax.set(xscale="log", ylim=(len(results) - .4, -.6), xlim=(min(.7, low / 1.3), max(2, min(high, FAR)) * 1.9))
    ax.set_xlabel("seconds of the peer / seconds of ours (thick mark: goal; thin line: smallest to largest pair)",
                  fontsize=8)
    ax.set_yticks(range(len(results)), [f"{r['name']}  |  {r['peer']}" for r in results], fontsize=8)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="x", color="#e3e5e8", lw=.7)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_title(heading, loc="left", fontsize=10, color=INK)
    return fig


def _loop(stage, c, images, device):
    "A stage's training loop with its networks: function of (epochs, seed)"
    (F, D), G = tocoad_room.make_networks(c, device), tocoad_room.make_generator(c, device=device)
    shared = dict(batch=c.batch, size=c.size, progress=False)
    if stage == "stage1":
        loss = tocoad_room._loss(c.loss1, c, {})
        return lambda n, seed: pretrain(F, D, G, images, n, lr=c.lr1, loss=loss, bn=c.bn1, seed=seed, **shared)
    C, loss = tocoad_room.make_contrast(c, F), tocoad_room._loss(c.loss, c, {})
    shared |= dict(lr=c.lr2, lr_head=c.lr_head, lam=c.lam, loss=loss, bn=c.bn2, freeze=c.freeze, view_of=c.view_of,
                   train_d=c.train_d)
    return lambda n, seed: finetune(F, C, images, D, G, n, seed=seed, **shared)


def _train(stage, cfg, device, n, epochs, threads, start=None):
    "Warm up, wait for the others, train: images a second, losses of the measured epochs"
    if device == "cpu":
        torch.set_num_threads(threads)
    c = resolved(cfg)
    images = load_images(None, "mini", c.category, c.resize).train.images
    run = _loop(stage, c, images[torch.arange(n) % len(images)].to(device), device)
    with arithmetic(c.precision, device):
        run(1, 1)
        if start:
            start.wait()
        log = run(epochs, 0)
    losses = [e["L_dis" if stage == "stage1" else "L_neg"] for e in log]
    return n / statistics.median(e["seconds"] for e in log), losses


def _join(barrier): globals()["_barrier"] = barrier
def _copy(args): return _train(*args, globals()["_barrier"])


def training_rate(stage, cfg, device="cpu", copies=1, n=32, epochs=3, threads=None):
    """Images a second of all copies of a stage's training loop together, and the losses of each.

    Each copy has a process of its own and, on a CPU, its share of the threads; all begin together, after a first
    epoch that is not counted. n: images; epochs: those that are measured.
    """
    threads = threads or max(1, hardware()["cores"] // copies)
    if copies == 1 and device != "cpu": # a process of its own is for its threads, and takes its time to start
        rate, losses = _train(stage, cfg, device, n, epochs, threads)
        return rate, [losses]
    ctx = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(copies, ctx, _join, (ctx.Barrier(copies, timeout=900),)) as pool:
        got = list(pool.map(_copy, [(stage, cfg, device, n, epochs, threads)] * copies))
    return sum(r for r, _ in got), [losses for _, losses in got]


def covered(spans):
    "How much of a line some intervals (start, end) cover"
    total, end = 0., -np.inf
    for a, b in sorted(spans):
        total, end = total + max(0, b - max(a, end)), max(b, end)
    return total


def busy(f, device="cpu"):
    "Share of a call during which a kernel ran on the GPU; on a CPU: of the threads' time that was used"
    if device == "cpu":
        cpu, wall = time.process_time(), time.perf_counter()
        f()
        return (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        wall = timed(f, 1, 0)[0]
    events = (e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return covered((e.time_range.start, e.time_range.end) for e in events) * 1e-6 / wall


def exponent(sizes, seconds):
    "a in seconds = c * size**a: slope of a straight line through the logarithms"
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth(name, run, sizes, expected, memory=None, repeats=3):
    """Ours at the largest size beside what the smallest and the expected exponent promise.

    run: size -> function; memory: exponent of the peak memory, None where it says nothing; repeats: timed calls after
    the one whose memory is watched, 0 times that one.
    """
    seconds, peaks = [], []
    run(sizes[0])() # a first call pays for what a process loads once
    for n in sizes:
        f = run(n)
        with Watch() as w:
            first = timed(f, 1, 0)
        seconds.append(min(timed(f, repeats, 0) or first))
        peaks.append(w.mb)
    promised, a = seconds[0] * (sizes[-1] / sizes[0])**expected, exponent(sizes, seconds)
    m = exponent(sizes, peaks) if memory is not None and min(peaks) > 2 else None # less than 2 MB is not seen well
    return result(name, f"size ** {expected:g}", seconds[-1], promised, peak_mb=peaks[-1], sizes=list(sizes),
                  seconds=seconds, peaks=peaks, exponent=a, expected=expected, excess=a - expected, memory_exponent=m,
                  memory_expected=memory, memory_excess=None if m is None else m - memory)
