"Names as they are: no folder, file or category colours a terminal, becomes a tag or is computed by a spreadsheet"
import ast
import csv
import html
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from tocoad import cli, names
from tocoad.data.load import load
from tocoad.paper import drawing, regenerate, report
from tocoad.run.report import text
from tocoad.systems.settings import Shared

NAMES = ["=1+1", "<b>x", "a\x1b[31mred", "$\\nothing{$ | `x`", "+1", "two\nlines \x9b2J", "@x\u202ey",
         "瓶子 🍾"]
TINY = ["size=32", "resize=32", "width=32", "batch=8"]
ROOMS = Path(cli.__file__).parent


class Tags(HTMLParser):
    "The tags and the text of a page"
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs): self.tags.append(tag)

    def handle_data(self, data): self.text += data


def category(root, name):
    "A category and a kind of defect of this name"
    toys.toy(root)
    (root / "cog").rename(root / name)
    for place in ("test", "ground_truth"):
        (root / name / place / "dent").rename(root / name / place / name)
    return root


def obeyed(said):
    "What a terminal would obey"
    return re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_shows_a_name_and_does_not_obey_it(name, tmp_path, capsys):
    root = category(tmp_path / "set", name)
    run = ["run", "--root", root, "--category", name, "--profile", "smoke", "--systems", "frozen", "--quiet", "--out",
           tmp_path / "out", "--store", tmp_path / "store", "--set", *TINY]
    assert cli.main([*map(str, run)]) == 0
    assert cli.main(["runs", "list", "--store", str(tmp_path / "store")]) == 0
    cli.main(["data", "verify", str(root)])
    assert cli.main(["data", "verify", str(root / name / "no")]) == 1
    said = capsys.readouterr()
    assert not obeyed(said.out + said.err)
    assert repr(name)[1:-1].replace("\\\\", "\\") in said.out and "two\nlines" not in said.out + said.err
    assert (tmp_path / "out" / f"own_{name}_smoke_maps.png").stat().st_size > 1000


def test_own_parts_are_a_table_of_texts(tmp_path, capsys):
    for k in range(8):
        toys.save(tmp_path / f"good/{k}.png", toys.noise(k))
    for k, name in enumerate(n for n in NAMES if "/" not in n):
        toys.save(tmp_path / f"<i>\x1b[1m/{name}.png", toys.noise(k))
    (tmp_path / "<i>\x1b[1m" / "=2.png").write_bytes(b"no image")
    (tmp_path / "<i>\x1b[1m").rename(tmp_path / "-1-1")
    out, model = tmp_path / "=out\x1b[7m", str(tmp_path / "m.safetensors")
    assert cli.main(["fit", "--good", str(tmp_path / "good"), "--model", model, "--quiet", "--set", "size=32"]) == 0
    assert cli.main(["score", "--model", model, "--images", str(tmp_path / "-1-1"), "--out", str(out), "--quiet"]) == 1
    said = capsys.readouterr()
    assert not obeyed(said.out + said.err)
    with open(out / "scores.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {"'=1+1.png", "'+1.png", "'@x\u202ey.png", "'=2.png"} <= {r["path"] for r in rows}
    assert all(float(r["score"]) > 0 for r in rows if r["score"])
    assert not [v for r in rows for v in r.values() if v[:1] in tuple("=+@\t\r")]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_a_name_and_does_not_obey_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCOAD_CACHE", str(tmp_path / "cache"))
    data = load(category(tmp_path / "set", name), "own", name, size=32)
    told = Shared(dataset="own", category=name)._repr_markdown_()
    pages = data._repr_markdown_(), data.test._repr_markdown_(), told
    shown = names.markup(name)
    for page in pages:
        assert shown in page and not Tags(page).tags and not obeyed(page)
        widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
        assert len(widths) == 1, "a name makes no column"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph") # a sign without a glyph would be a box
        data.test.show()
        drawing.save(drawing.heat_maps(data.test.images, None, dict(frozen=data.test.images[:, 0]), [name] * 4,
                                       heading=name), tmp_path / "x.png")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_a_table_show_names(name, tmp_path):
    frame = pd.DataFrame({name: [-1.5, 2.], "gain": ["-0.50 [-1.00, +0.20]", name]}, index=[name, "b"])
    note = f"Failed: {name}: cannot be read"
    csv_, md, page, _ = report.write_table({"": frame}, "table5", name, [note], tmp_path)
    with open(csv_, newline="", encoding="utf-8") as f:
        [(_, head, gain), (first, number, kept), (_, _, last)] = csv.reader(f)
    assert (head, first, last) == (names.cell(name),) * 3 and (number, kept) == ("-1.5", "-0.50 [-1.00, +0.20]")
    lines = md.read_text(encoding="utf-8").splitlines()
    assert not Tags("\n".join(lines)).tags and {x.count("|") for x in lines if x.startswith("|")} == {4}
    seen = Tags(page.read_text(encoding="utf-8"))
    assert not {"b", "i"} & set(seen.tags)
    assert html.unescape(name) in seen.text or "\n" in name
    assert not {"b"} & set(Tags(names.listed([note])).tags)


def test_the_report_of_all_tables_shows_why_one_failed(tmp_path):
    why = "<script>alert(1)</script> cannot be read"
    page = regenerate.write_index(tmp_path, {"table1": why}).read_text(encoding="utf-8")
    assert "script" not in Tags(page).tags and why in Tags(page).text


def test_a_system_of_any_name_in_a_table_of_methods():
    one = dict(mean=50., std=0.)
    record = dict(dataset="own", category="<b>|x", profile="smoke", seeds=[0], methods={"<i>a|b": dict(aupro=one)},
                  hardware=dict(device="cpu", cpu="c", cores=2))
    said = text(record, markdown=True)
    assert not Tags(said).tags and len({x.count("|") for x in said.splitlines() if x.startswith("|")}) == 1


@given(st.text(max_size=12))
def test_any_text_goes_out_as_it_is(text):
    assert not obeyed(names.markup(text)) and not Tags(names.markup(text)).tags
    assert "|" not in names.markup(text) and "`" not in names.markup(text)
    safe = names.cell(text)
    assert safe in (text, f"'{text}") and (safe[:1] not in tuple("=@\t\r\n") or not safe)
    if safe[:1] in ("+", "-") and safe != "-":
        float(re.split(" [±[]", safe)[0])


def test_every_line_of_the_command_goes_through_the_one_door():
    for room in ("cli", "cli_parts", "cli_runs", "command"):
        tree = ast.parse((ROOMS / f"{room}.py").read_text(encoding="utf-8"))
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert "print" not in calls, room
    written = [p.name for p in ROOMS.rglob("*.py") if re.search(r"\bcsv\.writer|\.to_csv\(", p.read_text("utf-8"))]
    assert sorted(written) == ["report.py", "score.py"], "whatever writes CSV uses names.cell"
