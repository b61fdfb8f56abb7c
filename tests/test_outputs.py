"""Run anew on one thread, every notebook shows what it was committed with.

`pytest -m slow tests/test_outputs.py` runs all, `-k NAME` one. Texts, tables and numbers are equal; pictures have the
same size and all but the same pixels. Times, keys of stages and the numbers by which pandas tells its tables apart may
differ. A cell that shows other measurements carries the tag `varies`: it must show the same kinds of output, no more.
The notebooks in `bench` measure, and are left out.
"""
import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from PIL import Image

NBS = Path(__file__).parents[1] / "nbs"
SHOWN = sorted(p for p in NBS.rglob("*.ipynb") if not {".ipynb_checkpoints", "bench", "reports"} & {*p.parent.parts})
NEAR, SHARE = 3, .001 # a pixel differs if it does by more than 3 of 255; a thousandth may
PASSING = re.compile(r"\b\d[\d.,]* ?(?:ms|s|min|minutes|h|hours)\b|\b[0-9a-f]{24}\b|(?<=T_)[0-9a-f]{5}(?=[_\"{ ])")


def outputs(cell):
    "(kind, content) of what a cell shows, streams joined"
    out = []
    for o in cell.get("outputs", []):
        if o.output_type == "stream" and out and out[-1][0] == o.name:
            out[-1] = (o.name, out[-1][1] + o.text)
        elif o.output_type == "stream":
            out.append((o.name, o.text))
        else:
            out += sorted(o.data.items())
    return out


def pixels(content): return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), int)


def unlike(old, new):
    "What differs between two outputs of one kind; None if nothing does"
    kind, before, now = old[0], old[1], new[1]
    if kind not in ("image/png", "image/jpeg"):
        return None if PASSING.sub("#", before) == PASSING.sub("#", now) else f"{kind} was\n{before}\nand is\n{now}"
    a, b = pixels(before), pixels(now)
    if a.shape != b.shape:
        return f"{kind} was {a.shape[:2]} and is {b.shape[:2]}"
    share = (abs(a - b) > NEAR).any(2).mean()
    return f"{kind}: {share:.2%} of its pixels differ" if share > SHARE else None


def compare(old, new):
    "What differs between two runs of a notebook, a line a cell"
    for n, (a, b) in enumerate(zip(old.cells, new.cells, strict=True)):
        if a.cell_type != "code":
            continue
        before, now = outputs(a), outputs(b)
        if [k for k, _ in before] != [k for k, _ in now]:
            yield f"cell {n} showed {[k for k, _ in before]} and shows {[k for k, _ in now]}"
        elif "varies" not in a.metadata.get("tags", []):
            yield from (f"cell {n}: {why}" for x in zip(before, now, strict=True) if (why := unlike(*x)))


@pytest.mark.slow
@pytest.mark.parametrize("nb", SHOWN, ids=lambda p: p.relative_to(NBS).with_suffix("").as_posix())
def test_notebook_shows_what_it_was_committed_with(nb, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found") # what tqdm misses are progress bars
    old, new = (nbformat.read(nb, 4) for _ in range(2))
    where = dict(metadata=dict(path=str(nb.parent)))
    NotebookClient(new, timeout=3600, kernel_name="python3", resources=where).execute()
    clean_nb(new, allowed_cell_metadata_keys=["tags"])
    bad = list(compare(old, new))
    assert not bad, "\n\n".join(bad)


def shows(kind, content, tags=()):
    "A notebook of one cell that shows something"
    data = nbformat.v4.new_output("display_data", {kind: content})
    cell = nbformat.v4.new_code_cell("", outputs=[data], metadata=dict(tags=list(tags)))
    return nbformat.v4.new_notebook(cells=[cell])


def png(a):
    f = io.BytesIO()
    Image.fromarray(a).save(f, "png")
    return base64.b64encode(f.getvalue()).decode()


def test_a_difference_is_found():
    "A digit, a pixel in fifty, another size, a table that is gone; not a grey level, not where it varies"
    grey = np.full((20, 20, 3), 100, np.uint8)
    paler, spot = grey + 1, grey.copy()
    spot[:2, :4] = 0
    for kind, a, b, n in (("text/plain", "0.981", "0.982", 1), ("text/plain", "0.981", "0.981", 0),
                          ("text/plain", "60 images in 0.3 s", "60 images in 1.2 s", 0),
                          ("text/plain", "60 images in 0.3 s", "61 images in 0.3 s", 1),
                          ("text/plain", f"'{'0f' * 12}'", f"'{'ab' * 12}'", 0),
                          ("text/html", '<td id="T_0aa1f_row0">1', '<td id="T_b7aef_row0">1', 0),
                          ("text/html", '<td id="T_0aa1f_row0">1', '<td id="T_b7aef_row1">1', 1),
                          ("image/png", png(grey), png(spot), 1), ("image/png", png(grey), png(paler), 0),
                          ("image/png", png(grey), png(grey[1:]), 1)):
        assert len(list(compare(shows(kind, a), shows(kind, b)))) == n
        assert not list(compare(shows(kind, a, ["varies"]), shows(kind, b)))
    assert list(compare(shows("text/html", "<table>", ["varies"]), shows("text/plain", "<table>")))
