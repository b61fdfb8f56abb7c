"A component has another key, or none, whenever anything in it is another"
import importlib
import itertools
import re
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tocoad.method.perlin import Perlin
from tocoad.run.components import UNTOLD, source_of
from tocoad.run.source import sources

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be told")


def made(text, offset=0, module="cell"):
    "What a cell leaves under the name `part`, as if run at another place and time"
    space = {"__name__": module}
    exec(compile("\n" * offset + textwrap.dedent(text), f"<cell {offset}>", "exec"), space)
    return space["part"]


def key(x):
    "The key of a component; None if it has none"
    return None if UNTOLD in (text := source_of(x)) else text


SOURCE = '''
import collections, dataclasses, enum, functools, math
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

SCALE = 2
_HIDDEN = [1, {"a": (3, 4.5)}]
TABLE = torch.arange(5.)
ARRAY = np.arange(6)

class Kind(enum.Enum):
    ONE = 7
    TWO = 8

@dataclasses.dataclass
class Options:
    "What can be chosen"
    n: int = 9
    names: tuple = ("left", "right")

@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    x: float = .25

def noisy(by):
    def decorate(f):
        @functools.wraps(f)
        def call(*args, **kw):
            return f(*args, **kw) + by
        return call
    return decorate

@functools.lru_cache
def cached(x, y=10):
    return x + y

@noisy(11)
def shifted(x, *, by=12):
    return x * by if x in {13, 14} else x - SCALE

class Base:
    shared = torch.full((3,), 15.)
    limit = 16
    __slots__ = ("slot", "__dict__")
    def __init__(self):
        self.slot = 17
    @property
    def size(self):
        return self.limit + 18
    @staticmethod
    def still(x):
        return x ** 19
    @classmethod
    def kind(cls, x):
        return cls.limit - 20 + x
    @functools.cached_property
    def once(self):
        return 21

class Hook:
    def __getstate__(self):
        return {}
    def __init__(self):
        self.secret = 22

class Net(nn.Module, Base):
    class Inner:
        def act(self, x):
            return x + len(_HIDDEN) * 23
    def __init__(self):
        super().__init__()
        self.slot = 17
        self.pool = nn.Sequential(nn.AvgPool2d(3), nn.Conv2d(1, 1, 3, padding=1, bias=False))
        nn.init.constant_(self.pool[1].weight, .75)
        self.register_buffer("aside", torch.ones(2) * 24, persistent=False)
        self.register_buffer("kept", torch.ones(2) * 25)
        self.pool[0].mine = 26
        self._under = 27
        self.options, self.fixed, self.hook, self.inner = Options(), Fixed(), Hook(), self.Inner()
        self.counts = collections.Counter("aab")
        self.order = collections.OrderedDict(one=28)
        self.made = functools.partial(shifted, by=29)
        self.act = lambda x: F.relu(x) * 30
        self.dtype = torch.float32
        self.generator = np.random.default_rng(31)
        self.seeded = torch.Generator().manual_seed(32)
        self.kind_of = Kind.ONE
        self.shape = torch.zeros(2, 33)
    @torch.no_grad()
    def forward(self, x):
        def deep(y):
            return [z * 34 for z in y] + [math.sqrt(35)]
        return self.pool(x) + TABLE.sum() + ARRAY.sum() + cached(x) + shifted(x) + self.size + sum(deep([x]))
    def __call__(self, x):
        try:
            return super().__call__(x)
        except ValueError:
            return 36

part = Net()
'''
CHANGES = [(rf"\b{n}\b", str(n + 100)) for n in range(7, 37)] + [(re.escape(old), new) for old, new in [
    ("SCALE = 2", "SCALE = 2."), ("(3, 4.5)", "[3, 4.5]"), ("arange(5.)", "arange(6.)"), ("arange(6)", "arange(6.)"),
    ('"left"', '"up"'), (".25", ".26"), ("AvgPool2d(3)", "AvgPool2d(5)"), ("padding=1", "padding=0"),
    ("weight, .75", "weight, .5"), ('"aab"', '"aba"'), ("one=28", "two=28"), ("float32", "float16"),
    ("F.relu", "F.gelu"), ("math.sqrt", "math.cos"), ("Kind.ONE", "Kind.TWO"), ("@torch.no_grad()", ""),
    ("except ValueError", "except TypeError"), ("@noisy(11)", ""), ("@staticmethod", "@classmethod"),
    ("frozen=True, slots=True", "frozen=True"), ("x + y", "x - y"), ("z * 34", "34 * z"), ("ARRAY.sum", "ARRAY.min"),
    ("super().__call__", "super().forward"), ("persistent=False", "persistent=True"), ("sum(deep", "max(deep"),
    ("class Base:", "class Base(list):"), ("nn.Conv2d", "nn.ConvTranspose2d"), ("bias=False", "bias=True"),
    ("def __getstate__(self):", "def __getstate__(self, *no):"), ("{13, 14}", "{13, 15}"), ("(2, 33)", "(33, 2)")]]


def test_one_change_anywhere_gives_another_key():
    first = key(made(SOURCE))
    assert first
    found = {}
    for old, new in CHANGES:
        other = key(made(changed := re.sub(old, new, SOURCE, count=1)))
        assert changed != SOURCE, old
        assert other != first, f"{old} -> {new} went unnoticed"
        assert other is None or other not in found, f"{old} -> {new} is taken for {found[other]}"
        found[other] = old
    assert sum(k is None for k in found) == 0, "each of these can be told"


def test_the_same_made_twice_has_the_same_key():
    commented = SOURCE.replace('"What can be chosen"', '"Said otherwise"').replace("SCALE = 2", "SCALE = 2 # a remark")
    again = "\n".join(line + "  # said" if line.endswith(":") else line for line in commented.splitlines())
    assert key(made(SOURCE)) == key(made(SOURCE, offset=50)) == key(made(again))


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.frozensets(st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=2), inner, max_size=3), max_leaves=8)


def same(a, b):
    "Whether two values are the same in every type and bit"
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else repr(a) == repr(b) or (
        isinstance(a, frozenset) and a == b)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(VALUE, VALUE)
def test_values_have_one_key_exactly_if_they_are_the_same(a, b):
    assert (key(a) == key(b)) == same(a, b)
    for how in (lambda v: made("part = lambda: None") and Held(v), lambda v: captured(v), lambda v: defaults(v)):
        assert (key(how(a)) == key(how(b))) == same(a, b)


class Held:
    "An object with one attribute"
    def __init__(self, _v):
        self._v = _v


def captured(v):
    "A function with a closure"
    return lambda x: (x, v)


def defaults(v):
    "A function with a default"
    def f(x, *, v=v):
        return x, v
    return f


@pytest.fixture
def own(tmp_path, monkeypatch):
    "Write a module of one's own and give a function that imports it anew"
    monkeypatch.syspath_prepend(str(tmp_path))
    def write(**files):
        for name in [n for n in sys.modules if n.split(".")[0] in {f.split("__")[0] for f in files}]:
            monkeypatch.delitem(sys.modules, name)
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            (tmp_path / name.split("__")[0] / "__init__.py").touch() if "__" in name else None
        return files
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


USES = {
    "as a module": "import helpers\ndef part(x): return helpers.f(x)",
    "by name": "from helpers import f\ndef part(x): return f(x)",
    "while it runs": "def part(x):\n    import helpers\n    return helpers.f(x)",
    "by name while it runs": "def part(x):\n    from helpers import f\n    return f(x)",
    "in a class": "import helpers\nclass part:\n    @property\n    def y(self): return helpers.f(1)",
    "as a base": "import helpers\nclass part(helpers.B): pass"}


@pytest.mark.parametrize("how", USES)
def test_a_module_of_one_s_own_counts(own, how):
    keys = []
    for c in (1, 2, 1):
        own(helpers=f"C = {c}\ndef f(x): return x + C\nclass B:\n    c = C\n")
        keys.append(key(made(USES[how])))
    assert keys[0] == keys[2] != keys[1] and all(keys)


@pytest.mark.parametrize("how", ["as a module", "by name", "as a base"])
def test_a_module_that_was_edited_and_not_imported_anew_is_not_to_be_told(own, how):
    "Else what is stored for its old code would be shown for the new"
    own(helpers="C = 1\ndef f(x): return x + C\nclass B:\n    def g(self): return C\n")
    part = made(USES[how])
    assert key(part) == key(part) is not None
    path = sys.modules["helpers"].__file__
    with open(path, "a") as f:
        f.write("C = 22\n")
    assert key(part) is None
    importlib.reload(sys.modules["helpers"])
    assert key(made(USES[how])) is not None


def test_a_package_of_one_s_own_counts_down_to_its_inner_modules(own):
    keys = []
    for c in (1, 2, 1):
        own(mykit__deep=f"def f(x): return x + {c}\n")
        keys.append(key(made("def part(x):\n    from mykit import deep\n    return deep.f(x)")))
    assert keys[0] == keys[2] != keys[1] and all(keys)


def test_what_was_installed_from_a_folder_counts_by_its_files_and_not_by_its_version(tmp_path, monkeypatch):
    keys = []
    for c in (1, 2):
        site = tmp_path / str(c) / "site-packages"
        info = site / "ownkit-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "ownkit.py").write_text(f"def f(x): return x + {c}\n")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ownkit\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"ownkit.py,sha256={c},10\n")
        (info / "direct_url.json").write_text('{"dir_info": {}, "url": "file:///here"}')
        run = ("from ownkit import f\nfrom tocoad.run.components import source_of\n"
               "print(source_of(lambda x: f(x)), source_of(f))")
        path = {"PYTHONPATH": f"{site}:{':'.join(filter(None, sys.path))}"}
        found = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True, env=path)
        keys.append(found.stdout)
    assert keys[0] != keys[1] and UNTOLD not in "".join(keys)


UNKNOWN = {
    "a generator": "part = (i for i in range(3))", "an open file": "import os\npart = open(os.devnull)",
    "a lock within": "import threading\nclass P:\n    def __init__(self): self.lock = threading.Lock()\npart = P()",
    "a file read": "import numpy as np\npart = lambda x: x * np.load('scale.npy')",
    "an opened path": "from pathlib import Path\nclass part:\n    def f(self): return Path('a').read_text()",
    "text that is run": "part = lambda x: eval('x + 1')",
    "the environment": "import os\ndef part(x): return x * float(os.environ['A'])",
    "a docstring that is read": "def part(x):\n    'one'\n    return part.__doc__",
    "a module chosen by name": "import importlib\ndef part(n): return importlib.import_module(n)",
    "a script": "import torch\npart = torch.jit.script(torch.nn.ReLU())",
    "endless depth": "part = []\nfor _ in range(5000): part = [part]"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("what", UNKNOWN)
def test_what_cannot_be_told_has_no_key_and_one_line_says_so(what):
    x = made(UNKNOWN[what])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        a, b = source_of(x), source_of(x)
    assert UNTOLD in a and UNTOLD in b and a != b
    lines = [str(w.message) for w in said if "cannot be told" in str(w.message)]
    assert len(lines) == 2 and all("\n" not in line and "not stored" in line for line in lines)


def test_keys_are_the_same_in_another_process_whatever_its_order_of_sets(tmp_path):
    run = (f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom mine import part\n"
           "from tocoad.run.components import source_of\nprint(source_of(part))")
    (tmp_path / "mine.py").write_text(SOURCE)
    found = {subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True,
                            env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": str(seed)}).stdout
             for seed in (1, 2)}
    assert len(found) == 1 and UNTOLD not in found.pop()


def test_a_component_of_the_package_counts_by_the_code_it_reaches(monkeypatch):
    before = key(Perlin), key(Perlin(textures=torch.zeros(1, 3, 8, 8))), key(made("""
        from tocoad.method import perlin
        part = lambda x: perlin.Perlin(x)"""))
    assert all(before) and len(set(before)) == 3
    from tocoad.run import source
    later = sources()
    later["method.perlin"] += "\n# a remark\nNOBODY_READS = 1\n"
    monkeypatch.setattr(source, "_LOADED", later)
    monkeypatch.setattr(source, "check_loaded", lambda *a, **k: None)
    assert key(Perlin) == before[0]
    later["method.perlin"] += "\nprint()\n"
    assert key(Perlin) != before[0]


@pytest.mark.parametrize("a,b", [*itertools.combinations([
    torch.arange(4.), torch.arange(4.).to(torch.bfloat16), torch.arange(4), torch.arange(4.)[None],
    torch.arange(4.).requires_grad_(), torch.nn.Parameter(torch.arange(4.)), np.arange(4.), np.arange(4.)[::-1],
    np.ma.masked_array([0., 1, 2, 3], [1, 0, 0, 0]), np.array([0., 1, 2, 3], object), -torch.arange(4.)], 2)])
def test_arrays_that_differ_have_other_keys(a, b):
    assert key(a) and key(b) and key(a) != key(b)
