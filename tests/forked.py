"""Children that begin with what takes long to load: torch, figures, and nbformat, whose grammar of addresses takes two
seconds. A process has one fork server, so all tests have one list."""
import multiprocessing

WAYS = multiprocessing.get_all_start_methods()
FORK = multiprocessing.get_context("forkserver" if "forkserver" in WAYS else "spawn")
FORK.set_forkserver_preload([
    "tocoad.cli", "tocoad.run.compare", "tocoad.paper.sheets", "matplotlib.pyplot", "execnb.shell", "nbformat.v4",
    "nbdev.clean", "nbdev.export", "nbdev.test", "papermill", "pytest", "yaml"])
