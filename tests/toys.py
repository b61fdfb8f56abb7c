"Small drawn sets: pictures of noise with a square as the defect"
import numpy as np
from PIL import Image


def noise(k, size=32):
    "The k-th picture, uint8 (size, size, 3)"
    return np.random.default_rng(k).integers(40, 200, (size, size, 3), dtype=np.uint8)


def mark(k=0, size=32):
    "The mask of the k-th defect, bool (size, size)"
    m = np.zeros((size, size), bool)
    m[8 + k:16 + k, 8:20 - k] = True
    return m


def save(path, a, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    (a if isinstance(a, Image.Image) else Image.fromarray(a)).save(path, **kw)


def toy(root, masks=(), end=".png", n=(3, 2, 2), **kw):
    "One category `cog` in MVTec AD's layout; masks: one picture a defect, or a function of the mask that draws it"
    for j, (place, m) in enumerate(zip(("train/good", "test/good", "test/dent"), n, strict=True)):
        for k in range(m):
            save(root / f"cog/{place}/{k}.png", noise(10 * j + k))
    for k in range(n[2]):
        a = masks(mark(k)) if callable(masks) else masks[k] if len(masks) else mark(k)
        save(root / f"cog/ground_truth/dent/{k}_mask{end}", a, **kw)
    return root
