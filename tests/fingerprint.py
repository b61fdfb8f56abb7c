"Whether two networks are the same, in 16 digits"
import hashlib


def state_hash(module):
    "Hash of a module's parameters and buffers"
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]
