"The site's interactive figures in a real browser: they show what the library computes, and ask nobody for anything."
import ast
import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tocoad.data.images import crop, textures, to_float
from tocoad.data.load import load
from tocoad.method.coreset import radius
from tocoad.method.memory import Memory
from tocoad.method.perlin import blend, changed, perlin_mask, pick_textures
from tocoad.site.interactive import INTERACTIVE, coreset_data, seeded, washers

ROOT = Path(__file__).parents[1]
WIDTHS = (1280, 390)
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>All</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>:root{color-scheme:light dark}</style>"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "A page with every figure once"
    file = tmp_path_factory.mktemp("site") / "all.html"
    file.write_text(HEAD + "".join(INTERACTIVE[k]() for k in ("method/1_perlin", "method/7_memory")), "utf-8")
    return file


@pytest.fixture
def page(browser, file):
    "The page, open; when the test ends, it must have complained of nothing and asked for nothing"
    page, heard, asked = browser.new_page(viewport=dict(width=WIDTHS[0], height=900)), [], []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelector('#look-perlin .said').textContent")
    yield page
    assert not heard
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()]


def decoded(url):
    "The picture that an address holds"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))), int)


def put(page, figure, **values):
    "Set inputs of a figure, as a reader would"
    for name, value in values.items():
        page.locator(f"#look-{figure} [name={name}]").evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", str(value))


def pixels(page, name):
    "What a canvas shows (3, H, W)"
    shown = page.locator(f"#look-perlin [data-name={name}]").evaluate("canvas => canvas.toDataURL()")
    return torch.from_numpy(decoded(shown)).permute(2, 0, 1)[:3]


def said(page, figure): return page.locator(f"#look-{figure} .said").text_content()


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_the_keyboard_moves_it(page, width):
    page.set_viewport_size(dict(width=width, height=800))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert sorted(ids) == ["look-coreset", "look-nearest", "look-perlin"]
    sliders = page.locator("label:has(input[type=range])").all()
    assert len(sliders) == 4 + 1 + 2
    for label in sliders:
        before = label.locator("output").text_content()
        label.locator("input").focus()
        page.keyboard.press("ArrowRight")
        assert before and label.locator("output").text_content() not in ("", before)
        assert label.locator("span").text_content() # what the slider is called
    sizes = page.eval_on_selector_all("canvas, svg, .frame", "all => all.map(e => e.getBoundingClientRect().width)")
    assert len(sizes) == 6 + 2 + 5 and min(sizes) > 100


POSITIONS = ((.5, .3, 3, 1), (0, 0, 0, 3), (.07, .8, 5, 2), (.29, 1, 2, 1), (.2, .98, 3, 1), (.58, .57, 4, 3),
             (1, .5, 1, 2))


def test_mask_and_pseudo_anomaly_are_the_library_s(page):
    I = to_float(crop(load(category="washer", size=144).train.images[:1], 128))
    A = pick_textures(textures()[16:17], 1, (128, 128), seeded(0))
    for level, beta, cells, draw in POSITIONS:
        put(page, "perlin", threshold=level, beta=beta, scale=cells, draw=draw)
        M = perlin_mask(1, (128, 128), seeded(draw - 1), (cells, cells + 1), threshold=level)
        I_G = blend(I, A, M, torch.tensor([beta]))
        y_G = M & changed(I_G, I)
        assert torch.equal(pixels(page, "M"), 255 * M.expand(3, -1, -1))
        assert torch.equal(pixels(page, "y_G"), 255 * y_G.expand(3, -1, -1))
        assert torch.equal(pixels(page, "I"), (255 * I[0]).round().long())
        assert (pixels(page, "I_G") - 255 * I_G[0]).abs().max() < .51 # rounded
        covered, moved = (float(x) for x in re.findall(r"([\d.]+) %", said(page, "perlin")))
        assert abs(covered - 100 * M.float().mean()) < .051 and abs(moved - 100 * y_G.float().mean()) < .051


def test_radii_are_the_library_s(page):
    data = coreset_data()
    points = torch.tensor(data["points"]) / 100
    for n in (1, 2, 24, 63, 100):
        put(page, "coreset", picks=n)
        for name in ("random", "greedy"):
            svg = page.locator(f"#look-coreset [data-name={name}]")
            words = svg.get_attribute("aria-label")
            shown = float(words.split()[-1])
            assert words.startswith(f"{n} {name} pick") and abs(shown - radius(points, data[name][:n])) < .006
            assert svg.locator("path").last.get_attribute("d").count("M") == n # picks
            [line] = re.findall(r'd="M([-\d.,]+)L([-\d.,]+)"', svg.inner_html())
            ends = torch.tensor([[float(x) for x in end.split(",")] for end in line])
            assert abs((ends[0] - ends[1]).norm() - shown) < .006 # the line is the radius


@pytest.fixture(scope="module")
def nearest():
    "(number of a test image, row, column) -> distance, training image, row and column of the nearest stored patch"
    data, X, Q = washers()
    kept = Memory.fit(X, ratio=.1, generator=seeded(0)).idx
    def search(k, row, column):
        d = (X.flatten(0, 1)[kept].double() - Q[k, 16 * row + column].double()).norm(dim=1)
        at = kept[d.argmin()].item()
        return d.min().item(), at // 256, at % 256 // 16, at % 16
    return search


def told(page):
    "Distance; row and column pointed at; training image, row and column that are named"
    number = re.findall(r"[\d.]+(?<!\.)", said(page, "nearest"))
    d, row, column, there_row, there_column, image = map(float, number)
    return d, (row - 1, column - 1), (image, there_row - 1, there_column - 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_pointing_at_a_patch_shows_the_nearest_stored_one(page, nearest, width):
    page.set_viewport_size(dict(width=width, height=800))
    test = washers()[0].test
    page.locator("#look-nearest [name=image]").select_option("scratch")
    k, heat = test.defects.index("scratch"), page.locator("#look-nearest [data-name=heat]")
    side = heat.bounding_box()["width"]
    for row, column in ((0, 0), (3, 12), (15, 15), (7, 8), (12, 1)):
        heat.hover(position=dict(x=(column + .5) * side / 16, y=(row + .5) * side / 16))
        d, at, place = told(page)
        expected = nearest(k, row, column)
        assert at == (row, column) and place == expected[1:] and abs(d - expected[0]) < .006
    heat.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
    assert told(page)[1:] == ((11, 0), nearest(k, 11, 0)[1:]) # no further than the border
    put(page, "nearest", row=9, column=4)
    assert told(page)[1:] == ((8, 3), nearest(k, 8, 3)[1:])


def test_the_pictures_are_those_that_are_named(page, nearest):
    data = washers()[0]
    for kind in data.test.counts():
        page.locator("#look-nearest [name=image]").select_option(kind)
        k, (d, at, (j, *there)) = data.test.defects.index(kind), told(page)
        assert d == pytest.approx(max(nearest(k, *divmod(p, 16))[0] for p in range(256)), abs=.006) # it begins there
        for name, images in (("test", data.test.images[k]), ("patch", data.test.images[k]),
                             ("train", data.train.images[int(j)]), ("stored", data.train.images[int(j)])):
            true = crop(images, 128).permute(1, 2, 0).numpy().astype(int)
            shown = page.locator(f"#look-nearest [data-name={name}] img").first.get_attribute("src")
            assert abs(decoded(shown) - true).mean() < 4, name # as JPEG; another washer differs by more
        for zoomed, place in (("patch", at), ("stored", there)): # the patch lies under the frame in the middle
            frame, img = (page.locator(f"#look-nearest [data-name={zoomed}]{x}").bounding_box() for x in ("", " img"))
            for axis, size, cell in (("y", "height", place[0]), ("x", "width", place[1])):
                middle = (frame[axis] + frame[size] / 2 - img[axis]) / img[size] * 16
                assert abs(middle - (cell + .5)) < .05


def test_dark_pages_have_light_points_and_lines(page):
    for scheme, light in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        cloud = "#look-coreset path:not([stroke='#56b4e9'], [stroke='#d55e00'])" # neither discs nor picks
        drawn = page.eval_on_selector_all(cloud, "all => all.map(e => getComputedStyle(e).stroke)")
        assert len(drawn) == 4 # points and line, twice
        assert all((sum(map(int, re.findall(r"\d+", colour)[:3])) > 382) == light for colour in drawn)


def test_what_the_figures_read_is_shipped():
    written = re.search(r"package_data=\{lib: (\[.*?\])\}", (ROOT / "setup.py").read_text("utf-8"))[1]
    shipped = {p for pattern in ast.literal_eval(written) for p in (ROOT / "tocoad").glob(pattern)}
    others = {p for p in (ROOT / "tocoad").rglob("*.*") if p.suffix not in (".py", ".pyc")}
    assert others == shipped
