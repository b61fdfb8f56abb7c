"The page of scores in a browser: sorted, filtered, its threshold dragged, at two widths and with 5,000 parts"
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tocoad.data.mini import draw
from tocoad.parts.fit import false_alarms, fit
from tocoad.parts.page import layers, page
from tocoad.parts.score import score
from tocoad.run.config import config

CFG = config("smoke", resize=64, size=64, sigma=2.)
NASTY = "<img src=x onerror=alert(1)>.png", "</script><b>b.png", "部品 $\\frac$.png", "new\nline.png", "x" * 200


def opened(browser, html, width, tmp_path):
    "The page, and what went wrong on it"
    (tmp_path / "report.html").write_text(html, "utf-8")
    tab, wrong = browser.new_page(viewport=dict(width=width, height=900)), []
    for event in ("pageerror", "dialog", "requestfailed"):
        tab.on(event, lambda e: wrong.append(str(e)))
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    tab.goto((tmp_path / "report.html").as_uri())
    return tab, wrong


def made(n):
    "A detector by name only, and scores of n parts"
    rng = np.random.default_rng(0)
    held = torch.from_numpy(rng.normal(10, 1, 99)).sort().values
    d = SimpleNamespace(held=held, threshold=float(held[95]) * 1.00001, text=lambda: "detector\n  system  frozen F")
    values = np.sort(np.concatenate([rng.normal(10, 1, n - n // 20), rng.normal(16, 2, n // 20)]))[::-1]
    names = [*NASTY, *(f"box {k % 40}/{k:05}.png" for k in range(n - len(NASTY)))]
    rows = [(name, float(s), "") for name, s in zip(names, values, strict=True)]
    picture = layers(Image.new("RGB", (300, 200), (200, 180, 150)), np.eye(64) * 5, .1, 2.)
    return d, [*rows, ("torn.png", None, "it is <i>torn</i>")], dict.fromkeys(names[:6], picture)


@pytest.mark.parametrize("width", [1280, 390])
def test_five_thousand_parts(browser, tmp_path, width):
    d, rows, pictures = made(5000)
    tab, wrong = opened(browser, page(d, rows, pictures, "5,000 <parts>", ["a <b>warning</b>"]), width, tmp_path)
    texts = lambda s: tab.locator(s).all_inner_texts()
    count = lambda: tab.locator(".count").inner_text()
    assert tab.title() == "5,000 <parts>" and texts(".warned p") == ["a <b>warning</b>"]
    assert count() == "5,001 of 5,001" and len(texts(".row")) < 80
    assert texts(".row span:nth-child(2)")[:4] == [n.replace("\n", "\\n") for n in NASTY[:4]]
    assert tab.locator("img").count() == 2 and tab.locator(".both b, .row b, .row img").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    above = sum(s > d.threshold for _, s, _ in rows[:-1])
    mean, bound = false_alarms(99, 96)
    said = tab.locator(".said").inner_text
    assert said().startswith(f"{above} of 5,000 parts lie above") and f"{100 * mean:.1f} %" in said()
    assert f"below {100 * bound:.1f} % in 95 of 100 draws" in said() and "quantile" not in said()
    tab.screenshot(path=tmp_path / "page.png", full_page=True)

    tab.get_by_label("part of a name").fill("box 7/")
    wanted = sum("box 7/" in n for n, _, _ in rows)
    assert count() == f"{wanted} of 5,001"
    tab.get_by_label("part of a name").fill("")
    tab.get_by_label("decision").select_option("unreadable")
    assert texts(".row")[0].split("\n")[:2] == ["–", "torn.png"]
    tab.locator(".row").first.click()
    assert texts("figcaption p") == ["torn.png", "it is <i>torn</i>"] and tab.locator(".both img").count() == 0
    tab.get_by_label("decision").select_option("")
    tab.get_by_role("button", name="score").click()
    tab.get_by_role("button", name="score").click()
    assert [x.split("\n")[1] for x in texts(".row")[:2]] == ["torn.png", rows[-2][0]]
    tab.get_by_role("button", name="name").click()
    names = texts(".row span:nth-child(2)")
    assert names == sorted(n.replace("\n", "\\n") for n, _, _ in rows)[:len(names)]

    tab.get_by_role("button", name="rank").click()
    tab.get_by_label("threshold, exact").fill(str(float(d.held[49]) + 1e-6))
    tab.get_by_label("threshold, exact").press("Enter")
    assert "--quantile 0.5000 comes nearest" in said() and "50.0 % are expected" in said()
    before = said()
    box = tab.locator("canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * .3, box["y"] + 20)
    tab.mouse.down()
    start = time.perf_counter()
    for k in range(30):
        tab.mouse.move(box["x"] + box["width"] * (.3 + k / 100), box["y"] + 20)
    tab.mouse.up()
    assert said() != before and time.perf_counter() - start < 10, "dragging over 5,000 parts does not stall"
    tab.get_by_role("button", name="as fitted").click()
    assert said().startswith(f"{above} of 5,000") and tab.locator(".back").is_disabled()

    tab.locator(".row").first.click()
    tab.get_by_label("parts", exact=True).focus()
    for _ in range(2):
        tab.keyboard.press("ArrowDown")
    assert tab.locator(".row[aria-selected=true] span").nth(1).inner_text() == NASTY[2]
    tab.locator(".list").evaluate("e => { e.scrollTop = e.scrollHeight; }")
    tab.locator("#part-5001").wait_for()
    tab.get_by_label("heat").fill("0")
    assert not wrong


def test_the_page_of_a_run(browser, tmp_path):
    "Pictures and heat maps are really there, and nothing is asked of the network"
    for k in range(12):
        (tmp_path / "good").mkdir(exist_ok=True)
        Image.fromarray(draw("washer", k, size=64)[0]).save(tmp_path / f"good/{k}.png")
    d = fit(tmp_path / "good", CFG, progress=False)
    (tmp_path / "parts").mkdir()
    Image.fromarray(draw("washer", 300, "hole", size=96)[0]).save(tmp_path / "parts/hole.png")
    Image.fromarray(draw("washer", 301, size=96)[0]).save(tmp_path / "parts/<b>good.png")
    (tmp_path / "parts/torn.png").write_bytes(b"torn")
    done = score(d, tmp_path / "parts", tmp_path / "out", progress=False)
    tab, wrong = opened(browser, (tmp_path / "out/report.html").read_text("utf-8"), 1280, tmp_path)
    sizes = tab.locator(".both img").evaluate_all("a => a.map(i => [i.naturalWidth, i.width, i.height])")
    assert [s[0] for s in sizes] == [96, 64] and sizes[0][1:] == sizes[1][1:]
    assert tab.locator(".row").count() == 3 and tab.locator(".both img").first.get_attribute("alt") == done.scores[0][0]
    assert tab.locator(".about").inner_text().endswith("frozen F") and not wrong
