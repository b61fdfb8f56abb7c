"A mask means what was drawn, or a sentence asks: load, verify and run agree"
import numpy as np
import pytest
from PIL import Image
from toys import mark, noise, save, toy

from tocoad import cli
from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.data.verify import verify


def read(root, **kw):
    return load(root, category="cog", size=32, cache=False, **kw)


def alpha(mode, colour):
    def draw(m):
        im = Image.new(mode, m.shape[::-1], colour)
        im.putalpha(Image.fromarray(m.astype(np.uint8) * 255))
        return im
    return draw


def palette(m):
    "White everywhere, and one index of it transparent"
    im = Image.fromarray(m.astype(np.uint8)).convert("P")
    im.putpalette([255] * 6)
    im.info["transparency"] = 0
    return im


def levels(*values):
    "The lower rows of the defect take the later values"
    def draw(m):
        rows = np.cumsum(m.any(1)) * len(values) // (m.any(1).sum() + 1)
        return np.where(m, np.array(values)[rows][:, None], 0).astype(np.uint8)
    return draw


def rgba(m):
    return Image.fromarray(m.astype(np.uint8) * 255).convert("RGBA")


RIGHT = { # how it is drawn -> the picture, its suffix, what a note says
    "white": (lambda m: m.astype(np.uint8) * 255, ".png", None),
    "one": (lambda m: m.astype(np.uint8), ".png", None),
    "bilevel": (lambda m: m, ".png", None),
    "16 bits": (lambda m: m.astype(np.uint16) * 65535, ".png", None),
    "nearly white": (levels(250, 255), ".png", None),
    "opaque colours": (rgba, ".png", None),
    "red": (lambda m: np.stack([m * np.uint8(200), m * 0, m * 0], -1).astype(np.uint8), ".png", None),
    "classes": (levels(1, 2, 5), ".png", "class numbers up to 5"),
    "classes in 16 bits": (lambda m: levels(1, 3)(m).astype(np.uint16), ".png", "class numbers up to 3"),
    "white brush": (alpha("RGB", "white"), ".png", "transparency"),
    "black brush": (alpha("RGB", "black"), ".png", "transparency"),
    "grey with alpha": (alpha("L", 255), ".png", "transparency"),
    "palette with transparency": (palette, ".png", "transparency"),
    "JPEG": (lambda m: m.astype(np.uint8) * 255, ".jpg", "soft borders or noise"),
    "WebP": (lambda m: m.astype(np.uint8) * 255, ".webp", "soft borders or noise"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_was_drawn_is_read(tmp_path, kind):
    draw, end, note = RIGHT[kind]
    got = read(toy(tmp_path, draw, end))
    want = np.stack([mark(0), mark(1)] + [mark() * False] * 2)
    assert (got.test.masks.numpy() == want).all()
    said = [n for n in got.notes if "mask" in n]
    assert (not said) if note is None else (len(said) == 1 and note in said[0])
    assert verify(tmp_path).ok and [r for r in verify(tmp_path).remarks if "mask" in r] == said


def inverted(m):
    return np.where(m, 0, 255).astype(np.uint8)


def second(wrong):
    "The first mask is right, the second is not"
    return lambda: [mark(0).astype(np.uint8) * 255, wrong(mark(1))]


WRONG = { # what -> masks, words of the question
    "inverted": (lambda: [inverted(mark(k)) for k in (0, 1)], "0_mask.png marks"),
    "one of two inverted": (second(inverted), "1_mask.png marks"),
    "all white": (second(lambda m: inverted(m * 0)), "1_mask.png marks 100%"),
    "white and opaque": (second(lambda m: Image.new("RGBA", (32, 32), "white")), "1_mask.png marks 100%"),
    "a background that is not 0": (lambda: [np.where(mark(k), 255, 130).astype(np.uint8) for k in (0, 1)], "marks"),
    "class numbers from 1": (lambda: [mark(k).astype(np.uint8) + 1 for k in (0, 1)], "0_mask.png marks"),
    "a picture": (second(lambda m: noise(7)), "1_mask.png"),
    "its own image": (second(lambda m: noise(21)), "1_mask.png"),
    "a dark picture": (second(lambda m: noise(7) // 20 + noise(8) // 30 * 6), "1_mask.png"),
    "a picture in grey": (lambda: [noise(k)[..., 0] for k in (3, 4)], "0_mask.png"),
    "few levels": (lambda: [levels(60, 127, 255)(mark(k)) for k in (0, 1)], "0_mask.png holds the numbers 60, 127"),
    "classes and white": (lambda: [levels(1, 2)(mark(0)), mark(1).astype(np.uint8) * 255], "0_mask.png holds"),
    "colours and transparency": (second(lambda m: Image.fromarray(np.dstack([noise(1), m * np.uint8(90)]))),
                                 "1_mask.png is no mask that can be told"),
    "a hole in an opaque ground": (second(lambda m: alpha("RGB", "black")(~m)), "1_mask.png marks"),
    "opaque among transparent": (lambda: [alpha("L", 0)(mark(0)), Image.new("LA", (32, 32), (0, 255))], "1_mask.png"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_told_is_asked(tmp_path, kind, capsys):
    make, words = WRONG[kind]
    with pytest.raises(BadInput, match=words) as e:
        read(toy(tmp_path, make()))
    assert "\n" not in str(e.value) and ": " in str(e.value)
    [problem] = verify(tmp_path).problems
    assert words in problem and problem == str(e.value).replace(f"{tmp_path}/", "")
    assert cli.main(["run", "--root", str(tmp_path), "--category", "cog", "--profile", "smoke", "--quiet"]) == 1
    assert words in capsys.readouterr().err


def test_classes_in_a_lossy_file_are_asked(tmp_path):
    with pytest.raises(BadInput, match=r"0_mask\.jpg holds the numbers"):
        read(toy(tmp_path, lambda m: levels(5, 20)(m), ".jpg", quality=95))


def test_a_soft_mask_that_never_reaches_the_cut_is_asked(tmp_path):
    faint = [mark(0).astype(np.uint8) * 255, mark(1).astype(np.uint8) * 60]
    root = toy(tmp_path, faint, ".jpg", quality=60)
    with pytest.raises(BadInput, match="1_mask.jpg holds no number above 127"):
        read(root)


def test_masks_of_all_kinds_share_one_rule(tmp_path):
    "Soft masks in one folder decide how those of another are cut"
    toy(tmp_path)
    save(tmp_path / "cog/test/chip/0.png", noise(50))
    save(tmp_path / "cog/ground_truth/chip/0_mask.jpg", mark(2).astype(np.uint8) * 255, quality=60)
    got = read(tmp_path)
    assert (got.test.masks[0].numpy() == mark(2)).all() and (got.test.masks[1].numpy() == mark(0)).all()


@pytest.mark.parametrize("name,mine", [("part_label", "part_label_mask"), ("part_label", "part_label"),
                                       ("part_mask", "part_mask_mask")])
def test_a_longer_name_comes_first(tmp_path, name, mine):
    root = toy(tmp_path, n=(3, 2, 0))
    for k, (image, mask) in enumerate((("part", "part_mask" if "label" in name else "part_label"), (name, mine))):
        save(root / f"cog/test/dent/{image}.bmp", noise(60 + k))
        save(root / f"cog/ground_truth/dent/{mask}.png", mark(k))
    if name == "part_mask": # beside `part`, it is that one's mask
        with pytest.raises(BadInput, match="part_mask"):
            read(root)
        return
    got = read(root).test
    assert (got.masks[got.paths.index("test/dent/part.bmp")].numpy() == mark(0)).all()
    assert (got.masks[got.paths.index(f"test/dent/{name}.bmp")].numpy() == mark(1)).all()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [(32, 32), (32, 20)])
def test_a_turned_image_and_its_mask(tmp_path, turn, size):
    "Turned both, or told by the sides; else it is asked"
    a, m = noise(70)[: size[1], : size[0]], mark(1)[: size[1], : size[0]]
    exif = Image.Exif()
    exif[0x0112] = turn
    for both in (True, False):
        root = toy(tmp_path / f"{both}", n=(3, 2, 1))
        save(root / "cog/test/dent/0.png", a, exif=exif)
        save(root / "cog/ground_truth/dent/0_mask.png", m, **(dict(exif=exif) if both else {}))
        turned_sides = turn > 4 and size[0] != size[1]
        if both or turn == 1:
            got = read(root).test
            assert got.masks[0].sum() > 30 and verify(root).ok
        else:
            words = "pixels but its image" if turned_sides else "is turned by its EXIF note"
            with pytest.raises(BadInput, match=words):
                read(root)
            assert any(words in p for p in verify(root).problems)


def test_btad_cuts_where_its_layout_says(tmp_path):
    for place, m in (("train/ok", 3), ("test/ok", 2), ("test/ko", 1)):
        for k in range(m):
            save(tmp_path / f"01/{place}/{k}.png", noise(len(place) * 9 + k))
    save(tmp_path / "01/ground_truth/ko/0.png", levels(100, 200, 255)(mark()))
    got = load(tmp_path, category="01", size=32, cache=False)
    assert (got.test.masks.numpy().any(0) == (levels(100, 200, 255)(mark()) > 127)).all()
