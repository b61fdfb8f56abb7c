"Every choice that the paper leaves open has a row, and every mention of one leads to it."

import csv
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from nbconvert.filters import markdown2html

from tocoad.paper.gaps import SECTIONS, gap, gaps
from tocoad.run.config import PROFILES
from tocoad.systems.settings import Config

ROOT = Path(__file__).parents[1]
LIST = ROOT / "nbs" / "paper" / "gaps.ipynb"
SKIP = {".ipynb_checkpoints", "reports", "runs"}
NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not SKIP & set(p.parts))
CODE = sorted(p for folder in ("tocoad", "tests") for p in (ROOT / folder).rglob("*.py") if p != Path(__file__))
AND = r"(?:,\s+and\s+|,\s+or\s+|,\s*|\s+and\s+|\s+or\s+|\s+to\s+|\s*[-–]\s*)"
NUMBER = r"\d+(?![\d%]|\.\d|\s%)"
SAID = re.compile(rf"\b[Gg]ap\s+({NUMBER})|\b[Gg]aps\s+({NUMBER}(?:{AND}{NUMBER})*)")
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]*)#gap-(\d+)\)")


def mentions(text):
    "Numbers of the gaps that a text names, linked or not"
    plain = re.sub(r"\[([^\[\]]*)\]\([^()\s]*\)", r"\1", text)
    return [int(n) for m in SAID.finditer(plain) for n in re.findall(r"\d+", "".join(g or "" for g in m.groups()))]


def prose(text):
    "Markdown without what is no running text: fenced blocks, code spans, headings, formulas"
    text = re.sub(r"^[ >]*(```|~~~).*?(^[ >]*\1|\Z)", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)|^[ >]*#{1,6} .*$|\$[^$\n]+\$", "", text, flags=re.M)


@cache
def cells(nb, kind=None):
    found = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if kind in (None, c["cell_type"])]


def named(row):
    return set(gap(row).settings)


def test_the_list_is_complete():
    with open(ROOT / "tocoad" / "paper" / "gaps.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["gap"]) for r in rows] == list(range(1, 70)) == [n for s in SECTIONS.values() for n in s]
    assert list(rows[0]) == "gap item paper siblings default alternatives decided sensitivity".split()
    assert not [(r["gap"], k) for r in rows for k, v in r.items() if not v or v != v.strip()], (
        "empty or padded fields"
    )
    assert not [(r["gap"], k) for r in rows for k, v in r.items() if re.search(r"[*`<>|$\[\]]|\b_|_\b", v)], (
        "would not survive markdown"
    )


def test_every_row_says_where_it_is_decided():
    fields = set(Config.__dataclass_fields__)
    for n, where in gaps().decided.items():
        if where.startswith(("fixed: ", "data: ")):
            assert len(where.split()) > 3, f"gap {n} gives no reason"
        else:
            assert set(where.split()) <= fields, f"gap {n}: {sorted(set(where.split()) - fields)} are no settings"


def test_every_setting_that_names_a_gap_is_named_by_it():
    text = (ROOT / "tocoad" / "systems" / "settings.py").read_text(encoding="utf-8")
    bodies = re.findall(r"class (?:\w+Settings|Shared|Config)\b.*?(?=^    def |\n# %%)", text, re.S | re.M)
    said = [x for body in bodies for x in re.findall(r"^    (\w+)\s*:[^#\n]*#(.*)$", body, re.M)]
    assert len(bodies) == 6 and {field for field, _ in said} == set(Config.__dataclass_fields__)
    wrong = [(field, n) for field, comment in said for n in mentions(comment) if field not in named(n)]
    assert not wrong, f"settings and gaps that do not name them: {wrong}"


def test_profiles_differ_where_the_list_says_so():
    if "literal" not in PROFILES:
        pytest.fail("there is no profile literal")
    a, b = PROFILES["literal"], PROFILES["paper"]
    differ = {k for k in Config.__dataclass_fields__ if getattr(a, k) != getattr(b, k)} - {"profile"}
    rows = gaps()[gaps().default.str.contains(r"^literal .*; paper ")].index
    assert differ <= set().union(*map(named, rows)), (
        f"no row tells: {sorted(differ - set().union(*map(named, rows)))}"
    )
    assert not [n for n in rows if not named(n) & differ], "rows whose settings are equal in both profiles"


@pytest.mark.parametrize("p", [*NBS, *CODE], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_gap_that_is_named_exists(p):
    texts = cells(p) if p.suffix == ".ipynb" else [p.read_text(encoding="utf-8")]
    assert not {n for t in texts for n in mentions(t)} - set(range(1, 70))


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_every_mention_in_a_text_cell_is_a_link(nb):
    base = (
        ROOT if nb == ROOT / "nbs" / "index.ipynb" else nb.parent
    )  # README.md, made of the index, lies one folder higher
    path = "" if nb == LIST else Path(os.path.relpath(LIST, base)).as_posix()
    for text in map(prose, cells(nb, "markdown")):
        bare = mentions(LINK.sub(lambda m: "" if re.match("[Gg]ap", m[1]) else "0", text))
        assert not set(bare) - {0}, f"no link: gaps {bare}; write [gap {bare[0]}]({path}#gap-{bare[0]})"
        for said, to, n in LINK.findall(text):
            assert to == path and re.findall(r"\d+", said)[-1:] == [n], (
                f"[{said}]({to}#gap-{n}) in {nb.name}: write {path}#gap-{n}"
            )


def test_a_link_finds_its_row():
    "The list as committed, through the markdown of nbconvert: each place once, and the row of today's file under it"
    found = json.loads(LIST.read_text(encoding="utf-8"))["cells"]
    shown = [
        "".join(o["data"]["text/markdown"])
        for c in found
        for o in c.get("outputs", [])
        if "text/markdown" in o.get("data", {})
    ]
    html = "".join(map(markdown2html, shown))
    assert re.findall(r'<h4 id="(gap-\d+)"', html) == [f"gap-{n}" for n in range(1, 70)]
    assert len(re.findall(r'id="gap-\d+"', html)) == 69
    for n in range(1, 70):
        assert f"#### gap {n}\n\n{gap(n)._repr_markdown_()}" in "\n".join(shown), (
            f"gap {n} has changed: run nbs/paper/gaps.ipynb"
        )
    numbers = [
        int(n) for t in cells(LIST, "markdown") for a, n in re.findall(r"\[(\d+)\]\(#gap-(\d+)\)", t) if a == n
    ]
    assert numbers == list(range(1, 70)), "the index at the top"


@pytest.mark.parametrize(
    "text, numbers",
    (
        ("gap 26", [26]),
        ("(Gap 51: x)", [51]),
        ("gaps 23 to 27", [23, 27]),
        ("gaps 1, 18 and 2", [1, 18, 2]),
        ("gaps [2](x#gap-2) and [3](x#gap-3)", [2, 3]),
        ("gap 5.5 wide", []),
        ("the gaps of 3", []),
    ),
)
def test_mentions_are_found(text, numbers):
    assert mentions(text) == numbers


def test_the_room_never_imports_torch():
    code = (
        "import sys, tocoad.paper.gaps as g; g.gaps(); g.gap(27)._repr_markdown_(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
