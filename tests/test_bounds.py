"No setting, seed or device that cannot work gets as far as the work."
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocoad import cli
from tocoad.data.errors import BadInput
from tocoad.paper import plan
from tocoad.paper.rows import TARGETS, rows
from tocoad.run.compare import compare, find_device, member
from tocoad.run.config import PROFILES, config, settings
from tocoad.systems.settings import Config, Shared, distinct, kinds

CFG = Config()
KINDS = kinds(Config)


def core(kind):
    "A setting's type without None, and that of a tuple's items"
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    return core(get_args(kind)[0]) if get_origin(kind) is tuple else kind


RANGES = {name: get_args(core(kind)) for name, kind in KINDS.items() if get_origin(core(kind)) is Annotated}
NUMBERS, NAMES = ([name for name, (of, _) in RANGES.items() if (of is str) == text] for text in (False, True))


@pytest.mark.parametrize("name", ["size", "resize"])
def test_a_shape_is_a_size_whose_sides_are_in_the_range(name):
    whole = lambda x: CFG.replace(size=x, resize=x)
    for x, kept in {"320x96": "320x96", "96x96": 96, "96": 96, (96, 320): "320x96", np.int64(96): 96}.items():
        assert getattr(whole(x), name) == kept == getattr(whole(kept), name)
    for x in ("320x", "x320", "320x9000", "16x320", "320x96x3", "auto", (320, 96.5), (320,)):
        refused(name, x)
    with pytest.raises(BadInput, match="size must be a multiple of 32, at most resize"):
        CFG.replace(size="320x100")
    with pytest.raises(BadInput, match="size must be a multiple of 32, at most resize"):
        CFG.replace(size="320x96", resize="288x96")


def like(name, x):
    "A value in the shape of the setting: x itself, or a tuple that holds it"
    old = getattr(CFG, name)
    return (*old[:-1], x) if isinstance(old, tuple) else x


def refused(name, value):
    "One sentence that names the setting, from Config, replace, a method of compare and, as text, --set"
    change = {name: value}
    for how in (lambda: Config(**change), lambda: CFG.replace(**change), lambda: member(CFG, "mine", change)):
        with pytest.raises(BadInput, match=f"{name} must be ") as e:
            how()
        assert "\n" not in str(e.value)


def test_every_setting_that_is_a_number_states_its_range():
    plain = {name for name, kind in KINDS.items() if core(kind) in (int, float)}
    assert not plain, f"settings without a range: {sorted(plain)}"
    assert len(NUMBERS) > 30 and {"sigma", "lr_head", "layers", "seed", "size"} <= set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_its_range_is_refused(name):
    of, ends = RANGES[name]
    low, high = ends.low, ends.high
    assert -math.inf < low < high < math.inf
    step = 1 if of is int else 1e-9 * (1 + high)
    for x in (math.inf, -math.inf, math.nan, low - step, high + step, -1e300, 1e300, "3", True, [], np.array([1, 2])):
        refused(name, like(name, x))
    for text in ("inf", "nan", "-inf", str(high + step), str(low - step), "many", ""):
        with pytest.raises(BadInput, match=f"--set {name}=.*{name} must be "):
            settings([f"{name}={text}"])


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"size", "resize", "scales"}))
def test_both_ends_of_a_range_are_in_it(name):
    for x in (RANGES[name][1].low, RANGES[name][1].high):
        assert getattr(CFG.replace(**{name: like(name, x)}), name) == like(name, x)


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if core(k) is bool or get_origin(core(k)) is Literal])
def test_a_choice_is_one_of_its_values(name):
    for x in ("none of these", 2, None, ["eval"], math.nan):
        refused(name, x)
    with pytest.raises(BadInput, match=f"--set {name}=other: {name} must be "):
        settings([f"{name}=other"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["", "n" * 250, "ö" * 100, "\udcfcber", 3, None, b"bottle"], ids=ascii)
def test_a_name_fits_into_names_of_files(name, text):
    refused(name, text)


def test_one_value_has_one_form():
    "What is equal is stored under one key, and can be written"
    c = CFG.replace(lam=1, epochs1=np.int64(3), lr2=np.float32(.5), layers=[2, 3], scales=np.array([0, 3]))
    assert repr(c) == repr(CFG.replace(lam=1., epochs1=3, lr2=.5, layers=(2, 3), scales=(0, 3)))


def test_every_row_and_profile_fits():
    "The ranges refuse nothing that the paper's tables need"
    for profile, c in PROFILES.items():
        for t in TARGETS:
            for row in rows(t, c.bn2):
                PROFILES[profile].replace(**row.changes)


def test_an_unknown_setting_is_named():
    wrong = dict(epoch2=3)
    for how in (lambda: CFG.replace(**wrong), lambda: config("smoke", **wrong), lambda: member(CFG, "x", wrong)):
        with pytest.raises(BadInput, match="a setting cannot be 'epoch2': take epochs2"):
            how()


def test_the_settings_of_a_system_are_held_to_their_types():
    @dataclass(frozen=True)
    class Mine(Shared):
        rate: float = 1.
        depth: int = 3
    assert isinstance(Mine(rate=2).rate, float)
    for wrong in (dict(rate=math.nan), dict(rate="fast"), dict(depth=1.5), dict(seed=2**64)):
        with pytest.raises(BadInput, match=f"{next(iter(wrong))} must be a"):
            Mine(**wrong)


ONCE, BE = "give each seed once", "seeds must be one or more values, each a whole number from"
WRONG = [((0, 0), ONCE), ((1, 0, 1), ONCE),
         ((), BE), (3, BE), ((0, 2**64), BE), ((0, .5), BE), ((True,), BE), ("0", BE)]


@pytest.mark.parametrize("seeds, says", WRONG, ids=lambda x: str(x)[:20])
def test_seeds_are_some_and_each_is_there_once(seeds, says):
    with pytest.raises(BadInput, match=says):
        compare(CFG, seeds, data=object(), device="cpu")
    if not isinstance(seeds, (str, int)):
        with pytest.raises(BadInput, match=says):
            plan.options("smoke", seeds=seeds)


@pytest.mark.parametrize("words", [
    "run --seeds 0 0 0", "run --seeds 18446744073709551616", "reproduce table5 --seeds 1 2 1", "run --set sigma=inf",
    "run --set lr_head=-.1", "reproduce table5 --set dims=0", "fit --good . --model m --set width=-3",
    "fit --good . --model m --seed 99999999999999999999"])
def test_the_command_refuses_before_the_work(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, err = cli.main([*words.split(), "--quiet"]), capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and err.startswith("tocoad: ") and not list(tmp_path.iterdir())


@given(st.lists(st.integers(-2**63, 2**63 - 1), min_size=1))
def test_seeds_stay_as_they_are(seeds):
    if len(set(seeds)) == len(seeds):
        assert distinct(seeds) == tuple(seeds) == distinct(np.array(seeds))
    else:
        with pytest.raises(BadInput, match="once"):
            distinct(seeds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["meta", "hpu", "cuda:99", "xla", "gpu", "mkldnn", "privateuseone", "cpu:x", -7.5])
def test_a_device_can_compute(name):
    with pytest.raises(BadInput, match="There is no device .* here") as e:
        find_device(name)
    assert len(str(e.value)) < 400
