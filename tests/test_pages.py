"What the command writes to be looked at, looked at: its pages in a browser at two widths, and its pictures."
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tocoad.data import images
from tocoad.paper import columns, drawing, panel, regenerate, report
from tocoad.paper.published import CATEGORIES
from tocoad.paper.rows import rows

WIDTHS = {"desk": dict(width=1280, height=900), "phone": dict(width=390, height=844)}
PAGES = "index.html", "tables/table1.html", "tables/table5.html", "tables/panel.html"


def sheet(target, places, plan):
    "A sheet of made-up results with two seeds: every row a bit better than the one before"
    rng, at = np.random.default_rng(0), [dict(dataset=d, category=c) for d, c in places]
    metrics = dict(image_auroc=97., pixel_auroc=96., aupro=90.)
    runs = [p | dict(row=r.name, seed=s, training="learned", values={m: v + rng.random() for m, v in metrics.items()})
            for p in at for r in plan for s in (0, 1)]
    gains = [p | dict(row=r.name, base="frozen F", metric=m, mean=d, low=d - .3, high=d + .3)
             for p in at for r in plan[1:] for m in metrics for d in [rng.normal(0, .4)]]
    sets = [p | dict(train=209, good=20, bad=63, fingerprint="0123456789abcdef", own_split=False) for p in at]
    return dict(target=target, profile="laptop", settings=[], seeds=[0, 1], mini=False, missing={}, failed=[],
                arrays=[], hardware=[dict(device="Some GPU")], runs=runs, differences=gains, sets=sets)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    "A folder as `tocoad reproduce` leaves it, from made-up results: three tables, a figure, a failure"
    out = tmp_path_factory.mktemp("reports")
    mvtec = [("mvtec_ad", c) for c in CATEGORIES["mvtec_ad"]]
    folders = [("a folder of mine <b>", "leather"), ("mvtec_ad", "screw")]
    for target, places in dict(table1=mvtec, table5=mvtec, panel=folders).items():
        plan = rows(target, systems=["tocoad"])
        r = report.Results(sheet(target, places, plan), plan=plan)
        if target == "table1":
            frames = {"": columns.comparison(r), "Paired differences": columns.gains(r)}
            forest = drawing.comparison_forest(r)
        elif target == "table5":
            frames, forest = {"": report.ablation(r)}, drawing.ablation_forest(r)
        else:
            frames, forest = {"": panel.table(r), "Sets": panel.sets(r)}, panel.forest(r)
        report.write_table(frames, target, r.title(), report.notes(r), out, None, report.records(r), forest)
    drawing.save(drawing.board(10, 4)[0], out / "figures" / "figure7.png")
    regenerate.write_index(out, dict(table9="broke <here>"))
    return out


@pytest.fixture(params=WIDTHS)
def opened(request, browser, reports):
    "name -> the page, open; at the end nothing was complained of and nothing was asked from outside"
    tab, said = browser.new_page(viewport=WIDTHS[request.param]), []
    tab.on("console", lambda m: said.append(m.text))
    tab.on("pageerror", lambda e: said.append(str(e)))
    tab.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    def open(name):
        tab.goto((reports / name).as_uri())
        return tab
    yield open
    assert not said


HEADINGS = "all => all.map(h => +h.tagName[1])"
PALE = """all => {
    const parts = c => c.match(/[\\d.]+/g).map(Number)
    const light = c => {
        const [r, g, b] = parts(c).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        return .2126 * r + .7152 * g + .0722 * b
    }
    const ground = e => {
        for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor
            if ((parts(c)[3] ?? 1) > 0) return c
        }
    }
    const ratio = e => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x)
        return (a + .05) / (b + .05)
    }
    const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
    return all.filter(own).filter(e => ratio(e) < 4.5).map(e => e.outerHTML)
}"""


def test_pages_can_be_read(opened):
    for tab in map(opened, PAGES):
        readable(tab)


def readable(tab):
    "Nothing is pale, too wide, out of order or without a name"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it moves sideways only inside its boxes"
    levels = tab.locator("h1, h2, h3, h4").evaluate_all(HEADINGS)
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels, append=levels[-1])) <= 1
    assert not tab.locator("body *").evaluate_all(PALE), "letters too pale"
    ids = tab.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert tab.title() and tab.locator("html").get_attribute("lang") == "en" and tab.locator("main").count() == 1


def test_pictures_are_there_and_told(opened):
    for name in PAGES:
        seen = opened(name).locator("img").evaluate_all("all => all.map(i => [i.alt, i.naturalWidth, i.clientWidth])")
        assert len(seen) == (4 if name == "index.html" else 1)
        assert all(len(alt) > 40 and pixels >= shown >= 340 for alt, pixels, shown in seen), name
        assert [alt for alt, *_ in seen if "of whose intervals" in alt], "a forest in words"


def test_what_names_rows_and_columns_stays_in_sight(opened):
    for tab in map(opened, PAGES):
        steady(tab)


def steady(tab):
    "Headings stay while the first table moves beneath them"
    box = tab.locator(".wide:has(table)").first
    x, y = (lambda css, side=side: box.locator(css).first.bounding_box()[side] for side in "xy")
    row, cell, head = ".gt_stub", "tbody tr:last-child td:last-child", "thead th"
    before = x(row), x(cell), y(head), y(cell)
    moved = box.evaluate("b => { b.scrollLeft = 150; b.scrollTop = 60; return [b.scrollLeft, b.scrollTop] }")
    assert (x(row), y(head)) == (before[0], before[2])
    assert (before[1] - x(cell), before[3] - y(cell)) == pytest.approx(moved, abs=1)
    if tab.viewport_size["width"] < 500:
        assert moved[0] == 150 and box.locator(row).first.bounding_box()["width"] < 150, "room for numbers"


def test_records_are_a_click_away_and_the_keyboard_goes_everywhere(opened):
    tab, reached = opened("tables/table5.html"), []
    assert not tab.get_by_text("0123456789abcdef").first.is_visible()
    for _ in range(12):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.tagName"))
        assert reached[-1] == "BODY" or tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        if reached[-1] == "SUMMARY":
            break
    tab.keyboard.press("Enter")
    assert {"DIV", "SUMMARY"} <= set(reached), reached
    assert tab.get_by_text("0123456789abcdef").first.is_visible()


def test_the_page_of_all_explains_once_and_leads_everywhere(opened, reports):
    tab = opened("index.html")
    assert tab.get_by_text("What the columns mean").count() == 1
    terms = tab.locator("dt").all_inner_texts()
    assert {"NCL", "DNP", "I-AUROC (%)", "P-AUROC (%)", "AUPRO"} <= set(terms) and len(terms) == len(set(terms))
    titles = tab.locator("h2").all_inner_texts()
    assert "Table 5: which of the two stages helps?" in titles and not re.search("table[0-9]", " ".join(titles))
    assert tab.get_by_text("broke <here>").is_visible()
    for link in tab.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))"):
        assert tab.locator(link).count() == 1 if link[0] == "#" else (reports / link).exists(), link
    assert (reports / "index.html").stat().st_size < 600_000


def test_titles_of_pictures_are_whole_and_apart(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    titles = "good", "a title that is longer than its picture", "$I_G$", "055.png\n22.3", "no_space_in_a_title", "m"
    images.show(np.zeros((6, 3, 32, 32), np.uint8), titles=titles, cols=3)
    fig = plt.gcf()
    fig.canvas.draw()
    seen = [ax.title.get_window_extent() for ax in fig.axes]
    pictures = [ax.get_window_extent() for ax in fig.axes]
    assert all(0 <= t.x0 and t.x1 <= fig.bbox.x1 and t.y1 <= fig.bbox.y1 for t in seen), "cut off"
    for k, t in enumerate(seen):
        assert not [o for i, o in enumerate([*seen, *pictures]) if i != k and o.overlaps(t)], titles[k]
    assert min(ax.title.get_fontsize() for ax in fig.axes) >= 10
    plt.close(fig)
