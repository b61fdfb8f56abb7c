"""README.md from nbs/index.ipynb. usage: python nbs/make_readme.py [FOLDER]  (default: the repository)"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

here = Path(__file__).parent
out = Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent
nb = nbformat.read(here / "index.ipynb", 4)
nb.metadata["language_info"] = {"name": "python"}
nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and re.search(r"^#\|\s*hide", c.source, re.M))]
[seen] = re.findall(r"^#\| fig-alt: (.*)", "\n".join(c.source for c in nb.cells), re.M)
for c in nb.cells:
    if c.cell_type == "code" and re.search(r"^#\|\s*echo:\s*false", c.source, re.M):
        c.source = ""
text, resources = MarkdownExporter().from_notebook_node(nb, {"output_files_dir": "README_files"})
text = re.sub(r"```python\s*```\n", "", text)
text = text.replace("![png]", f"![{seen}]")
for name, data in resources["outputs"].items():
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(data)
(out / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")
