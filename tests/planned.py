"What must be seen of a planned file: the truth that readers are held to"
from pathlib import Path

import numpy as np
from PIL import Image

from tocoad.data.trees import drawn


def exact(f): return Path(f.path).suffix.lower() not in (".jpg", ".jpeg") # the file keeps every value


def seen(f, seed=0):
    "A file's picture, uint8 (H, W, 3), and its mask, bool (H, W), as they must come out of a reader"
    a, m = drawn(f, seed)
    im = Image.fromarray(a)
    if f.how in ("grey", "deep"):
        im = im.convert("L")
    if f.how == "palette":
        im = im.convert("RGB").quantize(64)
    a = np.array(im.convert("RGB"))
    if f.how == "glass":
        a[:, :a.shape[1] // 8] = 255 # white shows through
    return a, m & (f.label and f.ink != "empty")
