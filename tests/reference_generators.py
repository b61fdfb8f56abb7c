"""The generators as they were before issue 13, word for word but for imports: what the new ones are compared with.

They stay until the house issue (the third of the three) is in; nothing but tests/test_generators.py reads them.
"""
import math
from dataclasses import dataclass, field
from functools import lru_cache
import numpy as np, torch
from fastcore.basics import patch
from torch.nn.functional import grid_sample, interpolate, max_pool2d, pad
from tocoad.data.images import BadInput, textures

def _rand(generator, *shape):
    return torch.rand(shape, generator=generator, device=generator.device if generator is not None else "cpu").cpu()

def _uniform(generator, lo, hi, *shape): return lo + (hi - lo) * _rand(generator, *shape)

def _below(generator, n, *shape): return (_rand(generator, *shape) * n).long()

def _to(x, device): return x.to(device, non_blocking=True) # the CPU goes on while the copy is made

def _parts(x): # of a batch: slices
    k = torch.get_num_threads() if x.device.type == "cpu" else len(x)
    return [slice(i, i + k) for i in range(0, len(x), k)]

def _turns(degrees, size, device): # -> complex (B, 1, W), (B, H, 1): their sums are where the pixels come from, x + iy in [-1, 1]
    h, w = size
    a = torch.deg2rad(_to(degrees, device))[:, None, None]; c, s = a.cos(), a.sin()
    y, x = ((torch.arange(n, device=device) * 2 + 1) / n - 1 for n in size)
    y = y[:, None]
    return torch.complex(c * x, s * (w / h) * x), torch.complex(-s * (h / w) * y, c * y)

def _at(images, row, column, mode="bilinear"): # 0 beyond the images
    return grid_sample(images, torch.view_as_real(row + column).to(images.dtype), mode, align_corners=False)

def turn(images:torch.Tensor,    # (B, C, H, W)
         degrees:torch.Tensor,   # (B,), counter-clockwise
         fill:float=0.,          # value where the turned image has nothing
         mode:str="bilinear",    # or "nearest"
         unit:bool=False,        # hold the result in [0, 1], which rounding may leave
        ) -> torch.Tensor:       # (B, C, H, W)
    "Each image turned about its centre by its own angle."
    (row, column), out = _turns(degrees, images.shape[-2:], images.device), images.new_empty(images.shape)
    for i in _parts(images):
        z = torch.add(_at(images[i] - fill, row[i], column[i], mode), fill, out=out[i])
        if unit: z.clamp_(0, 1)
    return out

ROTATIONS = ("both", "slight", "right", "none")

def rotate(images:torch.Tensor,   # (B, C, H, W); square for right angles
           how:str="both",        # "both", "slight", "right" or "none"
           angle:float=5.,        # largest slight angle, degrees
           fill:float=114/255,    # value of the corners
           generator=None,        # `torch.Generator`
          ) -> tuple:             # turned images, degrees (B,)
    "Random quarter turns and slight turns of the base images (gaps 23 to 27)."
    n, (h, w) = len(images), images.shape[-2:]
    if how in ("both", "right") and h != w: raise BadInput(f"quarter turns need square images, got {h} x {w}: use rotate='slight' or 'none'")
    k = _below(generator, 4, n) if how in ("both", "right") else torch.zeros(n, dtype=torch.long)
    if how in ("both", "slight"):
        degrees = 90 * k + _uniform(generator, -angle, angle, n)
        return turn(images, degrees, fill, unit=True), degrees
    if how == "right": images = torch.stack([x.rot90(q, (-2, -1)) for x, q in zip(images, k.tolist())])
    return images, 90. * k

_STILL, _SLIGHT = {"capsule", "metal_nut", "pill", "toothbrush", "transistor"}, {"wood", "zipper", "cable"}

def rotation_for(category:str, # name of a category
                ) -> str:      # one of `ROTATIONS`
    "DeSTSeg's choice of rotation for an MVTec AD category; \"both\" for any other (gap 26)."
    return "none" if category in _STILL else "slight" if category in _SLIGHT else "both"

def fade(t:torch.Tensor, # in [0, 1]
        ) -> torch.Tensor: # in [0, 1]
    "Perlin's fade curve: from 0 to 1 with no slope and no curvature at the ends."
    return t * t * t * (t * (6 * t - 15) + 10)

def _axis(cells, n, corners, device): # (B,) -> W, D: (B, n, corners)
    p = torch.arange(n, device=device) / n * _to(cells, device)[:, None]
    d = p[..., None] - torch.arange(corners, device=device)
    w = fade((1 - d.abs()).clamp(min=0))
    return w, w * d

def _factors(theta, cells, size): # of the noise: (B, H, 2K), (B, 2K, W)
    k, dev = theta.shape[-1], theta.device
    (wy, dy), (wx, dx) = (_axis(c, n, k, dev) for c, n in zip(cells.T, size))
    return torch.cat([wy @ theta.cos(), dy @ theta.sin()], -1) * math.sqrt(2), torch.cat([dx, wx], -1).mT

def perlin(theta:torch.Tensor, # (B, K, K) angles of the lattice gradients, radians
           cells:torch.Tensor, # (B, 2) cells along y and x, at most K - 1
           size:tuple,         # (H, W)
          ) -> torch.Tensor:   # (B, H, W) in [-1, 1]
    "Perlin noise from given lattice gradients."
    left, right = _factors(theta, cells, size)
    return left @ right

def perlin_noise(n:int,               # images
                 size:tuple,          # (H, W)
                 cells_y,             # int or (n,): lattice cells along y
                 cells_x,             # int or (n,): lattice cells along x
                 generator=None,      # `torch.Generator`
                 device="cpu",        # of the result
                ) -> torch.Tensor:    # (n, H, W) in [-1, 1]
    "Perlin noise on random lattices, of any number of cells per image and axis."
    cells = torch.stack([torch.as_tensor(c).expand(n) for c in (cells_y, cells_x)], 1)
    k = int(cells.max()) + 1
    return perlin(_to(2 * math.pi * _rand(generator, n, k, k), device), cells, size)

def _turned_parts(n, size, generator, scales, device): # yields slices of the batch and their noise
    cells = 2 ** (scales[0] + _below(generator, scales[1] - scales[0], n, 2))
    k = int(cells.max()) + 1
    left, right = _factors(_to(2 * math.pi * _rand(generator, n, k, k), device), cells, size)
    row, column = _turns(_uniform(generator, -90, 90, n), size, device)
    for i in _parts(left): yield i, _at((left[i] @ right[i])[:, None], row[i], column[i])[:, 0]

def turned_noise(n:int,               # images
                 size:tuple,          # (H, W)
                 generator=None,      # `torch.Generator`
                 scales:tuple=(0, 6), # cells are 2**k with k in range(*scales)
                 device="cpu",        # of the result
                ) -> torch.Tensor:    # (n, H, W) in [-1, 1]
    "Perlin noise of random scales (gap 28), turned by a random angle."
    return torch.cat([P for _, P in _turned_parts(n, size, generator, scales, device)])

def perlin_mask(n:int, size:tuple, generator=None, scales:tuple=(0, 6), # as above
                threshold:float=.5,   # noise above it is anomalous (gap 29)
                count:int=1,          # independent masks joined into one
                device="cpu",         # of the result
               ) -> torch.Tensor:     # bool (n, H, W)
    "Random masks: Perlin noise above a threshold."
    M = torch.zeros(n, *size, dtype=torch.bool, device=device)
    for _ in range(count):
        for i, P in _turned_parts(n, size, generator, scales, device): M[i] |= P > threshold
    return M

def _crops(T, n, size, generator): # -> n of uint8 (3, H, W)
    i = _below(generator, len(T), n).tolist()
    S = max(*size, *T.shape[-2:])
    top, left = (_below(generator, S - s + 1, n).tolist() for s in size)
    flips = [[d for d, f in zip((1, 2), fs) if f] for fs in _below(generator, 2, n, 2).tolist()]
    grow = (lambda x: interpolate(x[None].float(), (S, S), mode="bilinear")[0].round().byte()) if S > T.shape[-1] else lambda x: x
    return [grow(T[j])[:, t:t + size[0], l:l + size[1]].flip(f) for j, t, l, f in zip(i, top, left, flips)]

def _to_float(crops): return torch.stack(crops).float().div_(255)

def pick_textures(T:torch.Tensor,   # uint8 (T, 3, S, S)
                  n:int,            # images
                  size:tuple,       # (H, W)
                  generator=None,   # `torch.Generator`
                 ) -> torch.Tensor: # (n, 3, H, W) in [0, 1], on T's device
    "Random crops of random textures, mirrored at random."
    return _to_float(_crops(T, n, size, generator))

def changed(after:torch.Tensor,   # (B, 3, H, W) in [0, 1]
            before:torch.Tensor,  # same shape
           ) -> torch.Tensor:     # bool (B, H, W)
    "Pixels that differ by more than one grey level in some channel."
    d = (after - before).abs_()
    return torch.maximum(torch.maximum(d[:, 0], d[:, 1]), d[:, 2]) > 1.001 / 255

def _true(m): return torch.from_numpy(np.flatnonzero(m.numpy())) # bool (H, W) -> positions in the flattened

def otsu(d:torch.Tensor,    # (B, ...) any values
        ) -> torch.Tensor:  # (B,) the largest value of the lower group
    "Otsu's threshold of each row, exactly."
    z = d.flatten(1).sort(1).values; n = z.shape[1]
    w = torch.arange(1, n, device=z.device) / n
    s = z.cumsum(1, dtype=torch.float64); m0, m1 = s[:, :-1] / (w * n), (s[:, -1:] - s[:, :-1]) / ((1 - w) * n)
    return z.gather(1, (w * (1 - w) * (m1 - m0) ** 2).argmax(1, keepdim=True))[:, 0]

def _corners(x, k): # (..., H, W) -> (..., 4 k k), the pixels of four corner squares
    x = torch.cat([x[..., :k], x[..., -k:]], -1)
    return torch.cat([x[..., :k, :], x[..., -k:, :]], -2).flatten(-2)

def foreground(images:torch.Tensor, # (B, 3, H, W) in [0, 1]
               corner:float=.1,     # side of the corner squares, share of the image's
               most:float=.02,      # more of the corners than this beyond the cut: all is object
               close:float=.03,     # radius of the closing, share of the side
              ) -> torch.Tensor:    # bool (B, H, W)
    "Where the object is; everywhere for textures and full-frame images (gap 32)."
    k, r = (max(1, round(s * images.shape[-1])) for s in (corner, close))
    ground = _corners(images, k).median(-1).values
    d = (images - ground[..., None, None]).square().sum(1).sqrt()
    far = d > otsu(d[:, ::4, ::4])[:, None, None]
    m = max_pool2d(-max_pool2d(far[:, None].float(), 2 * r + 1, 1, r), 2 * r + 1, 1, r)[:, 0] < -.5
    return m | (_corners(far, k).float().mean(-1) > most)[:, None, None]

@dataclass(kw_only=True)
class Anomaly:
    "What all generators share: turn the base image, draw, label what changed."
    rotate: str = "none"       # how the base image is turned, one of `ROTATIONS` (gap 26)
    angle: float = 5.          # largest slight angle, degrees (gap 27)
    fill: float = 114 / 255    # value of turned corners (gap 27)
    foreground: bool = False   # only on the object (gap 32)
    count: int = 1             # anomalies drawn on each image
    label: str = "changed"     # or "full": the whole touched region (gap 35)

    def __post_init__(self):
        for name, have in (("rotate", ROTATIONS), ("label", ("changed", "full"))):
            if getattr(self, name) not in have: raise BadInput(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(have)}")
        if self.count < 1: raise BadInput(f"count={self.count}: draw at least one anomaly")

@patch
def base(self:Anomaly,
         images:torch.Tensor, # (B, 3, H, W) in [0, 1]
         generator=None,      # `torch.Generator`
        ) -> tuple:           # I_R (B, 3, H, W); the object, bool (B, H, W), or None for everywhere
    "The base image of Figure 3, and where the object is on it."
    I_R, degrees = rotate(images, self.rotate, self.angle, self.fill, generator)
    fg = turn(foreground(images)[:, None].float(), degrees, mode="nearest")[:, 0] > .5 if self.foreground else None
    return I_R, fg

@patch
def __call__(self:Anomaly,
             images:torch.Tensor, # (B, 3, H, W) in [0, 1]
             generator=None,      # `torch.Generator`
            ) -> tuple:           # I_G (B, 3, H, W) in [0, 1]; y_G, bool (B, H, W)
    "Eq. 1: pseudo-anomalies of a batch of normal images."
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise BadInput(f"a generator needs float images (B, 3, H, W) in [0, 1], got {str(images.dtype)[6:]} {tuple(images.shape)}: see `to_float`")
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        I_R, fg = self.base(images.detach(), generator)
        I_G, M, *y = self.draw(I_R, generator, fg)
        if fg is not None: M = M & fg; I_G = torch.where(M[:, None], I_G, I_R)
        if self.label == "full": return I_G, M
        return I_G, M & (y[0] if y else changed(I_G, I_R))

def blend(I_R:torch.Tensor,  # (B, 3, H, W) base image
          A:torch.Tensor,    # (B, 3, H, W) texture
          M:torch.Tensor,    # bool (B, H, W)
          beta:torch.Tensor, # (B,) share of the base image that shines through
         ) -> torch.Tensor:  # (B, 3, H, W)
    "The texture, part transparent, laid over the base image inside the mask."
    opacity = M[:, None] * (1 - _to(beta, I_R.device))[:, None, None, None]
    return torch.lerp(I_R, A, opacity)

def _blend_few(I_R, A, M, beta): # on a CPU; A: list of uint8 (3, H, W) -> the blend; M; which of M changed
    out, y = I_R.new_empty(I_R.shape), M.new_zeros(M.shape)
    for o, i, a, m, z, b in zip(out, I_R, A, M, y, beta):
        k = _true(m)
        o.copy_(i); before, a = (v.flatten(1).index_select(1, k) for v in (o, a)) # (3, few)
        after = torch.lerp(before, a.float().div_(255), 1 - b)
        o.flatten(1).index_copy_(1, k, after); z.view(-1)[k] = changed(after[None], before[None])[0]
    return out, M, y

@lru_cache(maxsize=4)
def _library(folder, device): return textures(folder or "embedded").to(device) # read and moved once

@dataclass
class Perlin(Anomaly):
    "Perlin-shaped pieces of texture (the paper's G)."
    textures: object = field(default=None, repr=False, compare=False) # folder, uint8 (T, 3, S, S), or None: the embedded
    beta: tuple = (0, .8)       # range of the transparency (gap 30)
    threshold: float = .5       # of the noise (gap 29)
    scales: tuple = (0, 6)      # cells per axis are 2**k with k in range(*scales) (gap 28)
    rotate: str = field(default="both", kw_only=True) # (gap 26)

@patch
def draw(self:Perlin,
         I:torch.Tensor, # (B, 3, H, W)
         generator=None, # `torch.Generator`
         fg=None,        # not needed: noise falls anywhere
        ) -> tuple:      # (B, 3, H, W); bool (B, H, W); on a CPU also where I changed
    "I with textures showing through Perlin masks."
    n, size = len(I), I.shape[-2:]
    M = perlin_mask(n, size, generator, self.scales, self.threshold, self.count, I.device)
    T = self.textures if isinstance(self.textures, torch.Tensor) else _library(self.textures, I.device)
    A, beta = _crops(T, n, size, generator), _uniform(generator, *self.beta, n)
    if I.device.type == "cpu": return _blend_few(I, [a.cpu() for a in A], M, beta)
    return blend(I, _to_float([_to(a, I.device) for a in A]), M, beta), M

_YIQ = torch.tensor([[.299, .587, .114], [.5959, -.2746, -.3213], [.2115, -.5227, .3112]])

def _jitters(n, amount, generator): # -> matrices of brightness, saturation and hue (n, 3, 3); contrasts (n,)
    b, c, s = 1 + _uniform(generator, -amount, amount, 3, n)
    a = 2 * math.pi * _uniform(generator, -amount, amount, n)
    chroma = torch.zeros(n, 3, 3); chroma[:, 0, 0] = 1
    chroma[:, 1:, 1:] = torch.stack([s * a.cos(), -s * a.sin(), s * a.sin(), s * a.cos()], -1).view(n, 2, 2)
    return b[:, None, None] * (_YIQ.inverse() @ chroma @ _YIQ), c

def _recolour(patch, inside, to, c):
    x = (_to(to, patch.device) @ patch.flatten(2)).view_as(patch)
    c, m = _to(c, patch.device)[:, None, None, None], inside[:, None]
    grey = (x * m * _to(_YIQ[0], patch.device)[:, None, None]).sum((1, 2, 3), keepdim=True) / m.sum((1, 2, 3), keepdim=True).clamp(min=1)
    return (c * x + (1 - c) * grey).clamp(0, 1)

def jitter_colour(patch:torch.Tensor,  # (B, 3, H, W) in [0, 1]
                  inside:torch.Tensor, # bool (B, H, W): pixels that count for the mean
                  amount:float=.1,     # largest change of brightness, contrast, saturation; of hue, in turns
                  generator=None,      # `torch.Generator`
                 ) -> torch.Tensor:    # (B, 3, H, W) in [0, 1]
    "Random brightness, contrast, saturation and hue of each patch."
    return _recolour(patch, inside, *_jitters(len(patch), amount, generator))

def place(generator,      # `torch.Generator`
          h:torch.Tensor, # (B,) heights
          w:torch.Tensor, # (B,) widths
          size:tuple,     # (H, W)
          fg=None,        # bool (B, H, W): centres lie on it; None: anywhere
         ) -> tuple:      # top, left: (B,), so that the rectangle lies inside the image
    "A random place for each rectangle."
    n, (H, W) = len(h), size
    if fg is None: return _below(generator, H - h + 1, n), _below(generator, W - w + 1, n)
    c = fg.flatten(1).cumsum(1, dtype=torch.float32)
    i = torch.searchsorted(c, (_to(_rand(generator, n), fg.device) * c[:, -1])[:, None], right=True)[:, 0].clamp(max=H * W - 1).cpu()
    return (i // W - h // 2).clamp(min=0).minimum(H - h), (i % W - w // 2).clamp(min=0).minimum(W - w)

def _windows(x, top, left, h, w): return torch.stack([a[..., t:t + h, l:l + w] for a, t, l in zip(x, top.tolist(), left.tolist())])

def _put(x, top, left, y): # x[b, ..., window b] = y[b]
    for a, t, l, b in zip(x, top.tolist(), left.tolist(), y): a[..., t:t + b.shape[-2], l:l + b.shape[-1]] = b

def surround(h:torch.Tensor,       # (B,) heights
             w:torch.Tensor,       # (B,) widths
             degrees:torch.Tensor, # (B,)
             size:tuple,           # (H, W)
            ) -> tuple:            # (B,) heights, widths, whole pixels, at most the image's
    "Sides of the upright box around a turned rectangle."
    a = torch.deg2rad(degrees); c, s = a.cos().abs(), a.sin().abs()
    return (h * c + w * s).ceil().long().clamp(max=size[0]), (w * c + h * s).ceil().long().clamp(max=size[1])

def lift(I:torch.Tensor,       # (B, 3, H, W)
         h:torch.Tensor,       # (B,) heights of the patches
         w:torch.Tensor,       # (B,) widths
         degrees:torch.Tensor, # (B,) by which they are turned
         to:tuple,             # top, left, height, width (B,) of the boxes they go to
         cut:tuple,            # top, left (B,) of where they are cut
        ) -> tuple:            # (top, left) of the windows; the windows (B, 3, h, w); bool (B, h, w): in the patch
    "Windows of I as they will look when pasted."
    n, (H, W), dev = len(I), I.shape[-2:], I.device
    size = [int(s.max()) for s in to[2:]]; corner = [t.clamp(max=S - s) for t, S, s in zip(to, (H, W), size)]
    u, v = ((c - t - (b - 1) / 2)[:, None] + torch.arange(s) for c, t, b, s in zip(corner, to, to[2:], size))
    per = lambda z: _to(z, dev).view(n, 1, 1)
    a = torch.deg2rad(degrees); c, s, u, v = per(a.cos()), per(a.sin()), _to(u, dev)[:, :, None], _to(v, dev)[:, None]
    y, x = c * u + s * v, c * v - s * u                                           # R^-1 u
    inside = (y.abs() < per(h) / 2) & (x.abs() < per(w) / 2)
    y, x = ((z + per(t + (k - 1) / 2)).round().clamp(0, S - 1) for z, t, k, S in zip((y, x), cut, (h, w), (H, W)))
    i = (y * W + x).long().view(n, 1, -1).expand(-1, 3, -1)
    return corner, I.flatten(2).gather(2, i).view(n, 3, *size), inside

@dataclass
class CutPaste(Anomaly):
    "A rectangle (or a thin turned strip) of the image, recoloured, pasted elsewhere (gap 34)."
    area: tuple = (.02, .15)   # share of the image
    aspect: tuple = (.3, 3.3)  # height / width
    jitter: float = .1         # of the colour
    scar: bool = False         # thin strips instead of rectangles
    strip: tuple = ((10, 25), (2, 16), (-45, 45)) # scar: length, width in pixels, degrees

    def shapes(self, n:int, size:tuple, generator=None): # patches; (H, W); `torch.Generator`
        "Heights, widths (whole pixels) and angles (degrees) of n patches."
        H, W = size
        if self.scar: h, w, a = (_uniform(generator, *r, n) for r in self.strip)
        else:
            area = _uniform(generator, *self.area, n) * H * W
            ratio = _uniform(generator, *(math.log(r) for r in self.aspect), n).exp()
            h, w, a = (area * ratio).sqrt(), (area / ratio).sqrt(), torch.zeros(n)
        return h.round().clamp(1, H).long(), w.round().clamp(1, W).long(), a

def _paste_(out, M, y, I, boxes, to, c, first): # in place, on a CPU; boxes: top, left, where cut, height, width
    luma, numbers = _YIQ[0].numpy()[:, None, None], (v.numpy() for v in (out, M, y, I, c))
    for o, m, z, i, s, a, k, (t, l, p, q, h, w) in zip(*numbers, I, to, boxes):
        if first: o[:] = i
        P, box = (k @ a[:, p:p + h, q:q + w].flatten(1)).view(3, h, w).numpy(), np.s_[..., t:t + h, l:l + w]
        grey = (luma * P).sum() / np.float32(h * w)
        o[box] = np.clip(s * P + (1 - s) * grey, 0, 1); m[box] = True
        z[box] = np.abs(o[box] - i[box]).max(0) > 1.001 / 255

@patch
def draw(self:CutPaste,
         I:torch.Tensor, # (B, 3, H, W)
         generator=None, # `torch.Generator`
         fg=None,        # bool (B, H, W): where centres may lie
        ) -> tuple:      # (B, 3, H, W); bool (B, H, W)
    "I with patches of itself pasted in, and where."
    n, size, slices = len(I), I.shape[-2:], I.device.type == "cpu" and not self.scar
    out, (M, y) = I.new_empty(I.shape) if slices else I.clone(), I.new_zeros(2, n, *size, dtype=torch.bool)
    for r in range(self.count):
        h, w, degrees = self.shapes(n, size, generator)
        bh, bw = surround(h, w, degrees, size)
        to, cut = place(generator, bh, bw, size, fg), place(generator, h, w, size, fg)
        colours = _jitters(n, self.jitter, generator)
        if slices: _paste_(out, M, y, I, torch.stack([*to, *cut, h, w], 1).tolist(), *colours, r == 0); continue
        corner, P, inside = lift(I, h, w, degrees, (*to, bh, bw), cut)
        P = _recolour(P, inside, *colours)
        _put(out, *corner, torch.where(inside[:, None], P, _windows(out, *corner, *P.shape[-2:])))
        _put(M, *corner, inside | _windows(M, *corner, *P.shape[-2:]))
    return (out, M, y) if slices else (out, M)

@lru_cache(maxsize=1024)
def _sines(n, device, dtype=torch.float32): # -> S (n, n), eigenvalues (n,)
    k, m = torch.arange(1., n + 1, device=device, dtype=torch.float64), n + 1
    S, l = math.sqrt(2 / m) * torch.sin(math.pi / m * torch.fmod(k[:, None] * k, 2 * m)), 2 * torch.cos(math.pi / m * k) - 2
    return S.to(dtype), l.to(dtype)

def _padded(ns, size, device): # the same for several n: (B, 1, size, size) and (B, 1, size), S filled up with zeros
    if len(ns) == 1: S, l = _sines(size, device); return S[None, None], l[None, None]
    S, l = zip(*(_sines(n, device) for n in ns.tolist()))
    S, l = [pad(s, (0, size - len(s)) * 2) for s in S], [pad(v, (0, size - len(v)), value=-1.) for v in l]
    return torch.stack(S)[:, None], torch.stack(l)[:, None]

def solve_poisson(f:torch.Tensor,  # (B, C, H, W) right-hand side
                  h:torch.Tensor,  # (B,) unknowns along y, at most H
                  w:torch.Tensor,  # (B,) unknowns along x, at most W
                 ) -> torch.Tensor: # (B, C, H, W), zero beyond h, w
    "The e with Laplacian f that is zero around an h x w rectangle."
    (Sy, ly), (Sx, lx) = (_padded(n, s, f.device) for n, s in zip((h, w), f.shape[-2:]))
    return Sy @ ((Sy @ f @ Sx) / (ly[..., None] + lx[..., None, :])) @ Sx

def _gradient(z): return pad(z.diff(dim=-1), (0, 1)), pad(z.diff(dim=-2), (0, 0, 0, 1)) # dx, dy

def correction(dst:torch.Tensor, # (B, C, h, w) windows of the destination
               src:torch.Tensor, # same shape: of the source
               h:torch.Tensor,   # (B,) heights of the boxes, from the window's corner
               w:torch.Tensor,   # (B,) widths
               mode:str="source", margin:int=0, strength=torch.hypot, # as in `poisson_blend`
              ) -> torch.Tensor: # (B, C, h - 2, w - 2): e on the inner pixels
    "What Poisson blending adds to the destination."
    keep = torch.zeros_like(dst[:, :1])
    for k, a, b in zip(keep, h.tolist(), w.tolist()): k[:, margin:a - margin, margin:b - margin] = 1
    if mode == "mixed": keep = keep * (strength(*_gradient(src)) > strength(*_gradient(dst)))
    d = src - dst
    gx, gy = (d[..., 1:-1, :].diff(dim=-1) * keep[..., 1:-1, :-1], d[..., 1:-1].diff(dim=-2) * keep[..., :-1, 1:-1])  # v - grad I_R
    return solve_poisson(gx.diff(dim=-1) + gy.diff(dim=-2), h - 2, w - 2)

@lru_cache(maxsize=1024)
def _seams(n, m): # for a margin m >= 1: S; eigenvalues; S inside the margin; S stepping over its two seams (2, n)
    S, l = _sines(n, torch.device("cpu"), torch.float64)
    S = pad(S, (0, 0, 1, 1))
    return [x.float().numpy() for x in (S[1:-1], l, S[m:-m], S[[m, -m - 1]] - S[[m - 1, -m]])]

def _heal(o, a, m): # NumPy (3, h, w): the source a blended into the box o, in place
    (h, w), M, T = o.shape[1:], max(m, 1), torch.from_numpy
    if min(h, w) <= 2 * M: return
    (Sy, ly, Ky, Jy), (Sx, lx, Kx, Jx) = _seams(h - 2, M), _seams(w - 2, M)
    y, x = slice(M, h - M), slice(M, w - M)
    rows, cols = np.s_[:, m:h - M + 1:h - M - m, x], np.s_[:, y, m:w - M + 1:w - M - m] # where d is read
    g = Jy.T @ ((a[rows] - o[rows]) @ Kx)
    g += Ky.T @ (a[cols] - o[cols]) @ Jx             # transform of g's Laplacian
    g /= ly[:, None] + lx
    o[:, y, x] = a[:, y, x]
    o[:, 1:-1, 1:-1] += Sy @ (g @ Sx) if h * w * max(h, w) < 2**18 else (T(Sy) @ (T(g) @ T(Sx))).numpy()

def _boxes(x, i, top, left, h, w): # boxes of the images i, filled up with zeros to the largest
    out = x[0].new_zeros(len(i), len(x[0]), int(h.max()), int(w.max()))
    for o, j, t, l, a, b in zip(out, *(v.tolist() for v in (i, top, left, h, w))): o[..., :a, :b] = x[j][..., t:t + a, l:l + b]
    return out

def _blend_(out, src, box, at, mode, margin, strength=torch.hypot, clamp=False): # in place
    cpu = out.device.type == "cpu"
    if cpu and mode == "source":
        for o, a, (t, l, h, w), (y, x) in zip(out.numpy(), src, box.tolist(), at.tolist()):
            o = o[:, t:t + h, l:l + w]; _heal(o, a.numpy()[:, y:y + h, x:x + w], margin)
            if clamp: o.clip(0, 1, out=o)
        return out
    for i in torch.arange(len(box)).split(1 if cpu else len(box)):
        (t, l, h, w), (y, x) = box[i].T, at[i].T
        e = correction(_boxes(out, i, t, l, h, w), _boxes(src, i, y, x, h, w), h, w, mode, margin, strength)
        for j, d, (t, l, h, w) in zip(i.tolist(), e, box[i].tolist()): out[j, :, t + 1:t + h - 1, l + 1:l + w - 1] += d[:, :h - 2, :w - 2]
    return out.clamp_(0, 1) if clamp else out

def poisson_blend(dst:torch.Tensor,   # (B, 3, H, W) destination
                  src:torch.Tensor,   # (B, 3, H, W) source
                  box:torch.Tensor,   # (B, 4) on the CPU: top, left, height, width in the destination; the outermost ring stays
                  at=None,            # (B, 2) on the CPU: top, left in the source; None: as in the destination
                  mode:str="source",  # gradients: "source" or "mixed"
                  margin:int=0,       # outermost pixels that keep the destination's gradients
                  strength=torch.hypot, # of a gradient (dx, dy), for the mixed mode
                 ) -> torch.Tensor:   # (B, 3, H, W), not clamped
    "Seamless cloning of one box of each source into its destination."
    return _blend_(dst.clone(), src, box, box[:, :2] if at is None else at, mode, margin, strength)

@dataclass
class NSA(Anomaly):
    "Patches of another image, Poisson-blended into this one (gap 36)."
    mode: str = "source"         # gradients: "source" for objects, "mixed" for textures
    patches: int = 3             # on each image, times `count`
    half: tuple = (.03, .4)      # bounds of the half-width, share of the side
    gamma: tuple = (.05, .03)    # scale and offset of the gamma draw (its shape is 2)
    margin: int = 3              # outermost pixels of a box that keep the image's own gradients

    def sides(self, n:int, size:int, generator=None): # boxes; the image's side in pixels; `torch.Generator`
        "Random side lengths in pixels."
        draw = self.gamma[1] - self.gamma[0] * (1 - _rand(generator, 2, n)).log().sum(0)
        return (2 * size * draw.clamp(*self.half)).round().long().clamp(min(size, 2 * self.margin + 3), size)

@patch
def draw(self:NSA,
         I:torch.Tensor, # (B, 3, H, W)
         generator=None, # `torch.Generator`
         fg=None,        # bool (B, H, W): where centres may lie
        ) -> tuple:      # (B, 3, H, W); bool (B, H, W)
    "I with boxes of another image blended in, and where."
    n, (H, W) = len(I), I.shape[-2:]
    k = 1 + int(_below(generator, n - 1, 1)) if n > 1 else 0      # which other image of the batch
    A, out, M = [I[j - k] for j in range(n)], I.clone(), torch.zeros_like(I[:, 0], dtype=torch.bool)
    for _ in range(self.patches * self.count):
        h, w = self.sides(n, H, generator), self.sides(n, W, generator)
        to, at = place(generator, h, w, (H, W), fg), place(generator, h, w, (H, W), None if fg is None else fg.roll(k, 0))
        box = torch.stack([*to, h, w], 1)
        _blend_(out, A, box, torch.stack(at, 1), self.mode, self.margin, clamp=True)
        for m, (t, l, h, w) in zip(M, box.tolist()): m[t + 1:t + h - 1, l + 1:l + w - 1] = True
    return out, M

def blending_for(category:str, # name of a category
                ) -> str:      # "source" or "mixed"
    "NSA's gradients for a category: mixed for textures, source for objects (gap 36)."
    return "mixed" if category in {"carpet", "grid", "leather", "tile", "wood", "brick", "grass", "gravel"} else "source"

GENERATORS = {"perlin": Perlin, "cutpaste": CutPaste, "nsa": NSA}
