__version__ = "0.1.0"

import os
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait leave the core to other work; read when torch starts


def __getattr__(name):
    if name == "Detector":  # torch is loaded by whoever asks for it
        from .parts.export import Detector
        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
