"""Mentions of gaps in markdown cells, such as "gap 26" or "gaps 23 to 27", become links to the row in paper/gaps.ipynb.

    python link_gaps.py [FOLDER ...]

FOLDER: nbs folders (default: nbs). A second run changes nothing; a link to the list from a notebook that has moved
gets its new path. Code spans, fenced blocks, headings, existing links, HTML tags and formulas stay as they are;
nbs/index.ipynb links as README.md needs it.
"""
import json
import os
import re
import sys
from pathlib import Path

LIST, LAST = "paper/gaps.ipynb", 69
KEEP = re.compile(r"""(?P<fence>^[ >]*(?P<tick>`{3,}|~{3,})[^\n]*\n.*?(?:^[ >]*(?P=tick)[`~]*[ ]*$|\Z))  # fenced block
    | (?P<atx>^[ >]*\#{1,6}[ ][^\n]*$) | (?P<setext>^[^\n]+\n[ ]*(?:=+|-+)[ ]*$)                          # headings
    | (?P<span>(?P<quote>`+)(?!`).+?(?<!`)(?P=quote)(?!`))                                                # code span
    | (?P<link>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\](?:\([^()\s]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\]))           # link
    | (?P<anchor><a\b.*?</a>) | (?P<tag><[^<>\n]*>)
    | (?P<maths>\$\$.+?\$\$|\$[^$\n]+\$)""", re.M | re.S | re.X)
NUMBER = r"(?:[1-9]\d?)(?!\d|\.\d|\s*%)"
BETWEEN = r"(?:,\s+and\s+|,\s+or\s+|,\s*|\s+and\s+|\s+or\s+|\s+to\s+|\s*[-–]\s*)"
MENTION = re.compile(rf"\b(?P<one>[Gg]ap\s+{NUMBER})|\b[Gg]aps\s+(?P<many>{NUMBER}(?:{BETWEEN}{NUMBER})*)")


def linked(
    text, # markdown
    to, # path of the list as seen from the notebook; "" in the list itself
) -> str:
    "A text with its mentions as links"
    def link(m):
        "A number of the list as a link"
        n = int(re.search(r"\d+", m[0])[0])
        return f"[{m[0]}]({to}#gap-{n})" if 1 <= n <= LAST else m[0]

    def mention(m):
        "One gap as a link, or each of several"
        if m["one"]:
            return link(m)
        at = m.start("many") - m.start()
        return m[0][:at] + re.sub(r"\d+", link, m[0][at:])

    out, at = [], 0
    for k in KEEP.finditer(text):
        kept = k[0]
        if k["link"]:
            kept = re.sub(r"\]\([^()\s]*gaps\.ipynb#gap-(\d+)\)$", rf"]({to}#gap-\1)", kept)
        out += [MENTION.sub(mention, text[at:k.start()]), kept]
        at = k.end()
    return "".join(out + [MENTION.sub(mention, text[at:])])


def path_from(nb, nbs):
    "Where the list is as seen from a notebook; README.md, made of the index, lies one folder higher"
    if nb == nbs / LIST:
        return ""
    if nb == nbs / "index.ipynb":
        return f"{nbs.name}/{LIST}"
    return Path(os.path.relpath(nbs / LIST, nb.parent)).as_posix()


def main(folders):
    "Link the gaps in all notebooks of some folders"
    for nbs in map(Path, folders or ["nbs"]):
        for p in sorted(nbs.rglob("*.ipynb")):
            if {".ipynb_checkpoints", "reports", "runs"} & set(p.parts):
                continue
            nb, n = json.loads(p.read_text(encoding="utf-8")), 0
            for c in nb["cells"]:
                old = "".join(c["source"])
                if c["cell_type"] != "markdown" or (new := linked(old, path_from(p, nbs))) == old:
                    continue
                c["source"] = new.splitlines(keepends=True)
                n += new.count("#gap-") - old.count("#gap-") or 1
            if n:
                p.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
                print(f"{p}: {n}")


if __name__ == "__main__":
    main(sys.argv[1:])
