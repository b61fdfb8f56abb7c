"Networks with weights that need no file and no generator: the same numbers in the same order, whoever built them"
import math

import torch


def hashed(n, start=0):
    "n numbers in [0, 1) without visible order, the same on every machine"
    return (torch.cos(12.9898 * torch.arange(start, start + n, dtype=torch.float64)) * 43758.5453) % 1


def filled(*modules):
    "Fill the states of some modules, one after another, as if they were one; the modules, in eval mode"
    at = 0
    for module in modules:
        for name, t in module.state_dict().items():
            if not t.is_floating_point():
                continue
            u = hashed(t.numel(), at).reshape(t.shape)
            at += t.numel()
            if t.ndim > 1:
                u = (2 * u - 1) * math.sqrt(3 / t[0].numel())
            else:
                u = u + .5 if name.endswith(("weight", "running_var")) else u - .5
            t.copy_(u)
        module.eval()
    return modules


def picture(*shape, start=0):
    "A float tensor of hashed numbers in [0, 1)"
    return hashed(math.prod(shape), start).reshape(shape).float()
