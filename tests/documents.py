"""What the documents hold: fenced blocks, words in backticks, commands, links, headings."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
]
SCRIPTS = sorted(
    path
    for folder in ("deploy", "experiments")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in (".yaml", ".yml", ".sbatch", "")
)
"""Files whose comments say how to run them."""
MODULES = sorted((ROOT / "raytune_vlm").rglob("*.py"))

START = re.compile(r"(?:^|(?<=[\s`]))(?:raytune-vlm|python -m raytune_vlm)(?= )")
"""Where one of our commands begins."""


@dataclass(frozen=True)
class Found:
    """A piece of a file, and where it stands."""

    file: Path
    line: int
    text: str
    language: str = ""
    """Of a fenced block."""
    is_whole: bool = True
    """Of a command: it stands by itself, and is not only mentioned within a sentence."""

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.text.partition(chr(10))[0]}"


def fences(page: Path) -> list[Found]:
    """The blocks between fences of a page."""
    found, start, block = [], 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.lstrip().startswith("```"):
            block.append(line)
        elif start == 0:
            start, language, block = number, line.strip("` "), []
        else:
            found.append(Found(page, start + 1, "\n".join(block), language))
            start = 0
    assert start == 0, f"{page.name}:{start}: a fence that does not end"
    return found


def prose(page: Path) -> str:
    """The page with its blocks blanked, so that lines keep their numbers."""
    text = page.read_text(encoding="utf-8")
    return re.sub(
        r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.S | re.M
    )


def spans(page: Path) -> list[Found]:
    """What stands between backticks, outside blocks; a line break in it is a blank."""
    text = prose(page)
    return [
        Found(page, 1 + text.count("\n", 0, span.start()), " ".join(span[1].split()))
        for span in re.finditer(r"`([^`]+)`", text)
    ]


def links(page: Path) -> list[Found]:
    """Targets of the links of a page."""
    text = re.sub(r"`[^`\n]*`", lambda span: "x" * len(span[0]), prose(page))
    return [
        Found(page, 1 + text.count("\n", 0, link.start()), link[1])
        for link in re.finditer(r"\]\(([^)\s]+)\)", text)
    ]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def shell_lines(page: Path) -> Iterator[Found]:
    """Lines of fenced blocks, those that end with a backslash joined; YAML and its like are not."""
    for block in fences(page):
        if block.language in ("", "sh"):
            yield from _joined(page, block.text.splitlines(), block.line)


def _joined(file: Path, lines: list[str], first: int) -> Iterator[Found]:
    start, text = first, ""
    for number, line in enumerate(lines, first):
        start = start if text else number
        text += line.strip() if not text else f" {line.strip().lstrip('# ')}"
        if text.endswith("\\"):
            text = text[:-1].rstrip()
            continue
        yield Found(file, start, text)
        text = ""


def commands() -> list[Found]:
    """Every command of ours in pages, in comments of scripts, in docstrings and in messages."""
    found = []
    for page in PAGES:
        found += [cut for line in shell_lines(page) for cut in _cut(line)]
        found += [cut for span in spans(page) for cut in _cut(span, is_whole=False)]
    for script in SCRIPTS:
        for line in _joined(script, script.read_text(encoding="utf-8").splitlines(), 1):
            found += _cut(line, is_whole="`" not in line.text)
    for module in MODULES:
        found += _of_module(module)
    return found


def _cut(found: Found, is_whole: bool = True) -> Iterator[Found]:
    """The part of a line that is our command, once for each of its alternatives `a|b`."""
    start = START.search(found.text)
    if start is None or "${" in found.text:
        return
    text = re.split(r"[;`]|  |, ", found.text[start.start() :])[0]
    text = re.sub(r" ?\.\.\.", "", text.replace("[", "").replace("]", ""))
    several = re.search(r"(?<= )\{?(\w+(?:\|\w+)+)\}?(?= |$)", text)
    for each in several[1].split("|") if several else [""]:
        whole = text.replace(several[0], each) if several else text
        yield Found(found.file, found.line, whole.strip(), is_whole=is_whole)


def _of_module(module: Path) -> Iterator[Found]:
    """Commands in backticks in any text of a module, and lines of docstrings that are one."""
    source = module.read_text(encoding="utf-8")
    if "raytune-vlm " not in source:
        return
    inside = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(value) for value in node.values}
            text = "".join(
                str(value.value) if isinstance(value, ast.Constant) else "PLACE"
                for value in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in inside:
                continue
            text = node.value
        else:
            continue
        for span in re.findall(r"`([^`]+)`", text):
            yield from _cut(Found(module, node.lineno, " ".join(span.split())), is_whole=False)
        for number, line in enumerate(text.splitlines()):
            if START.match(line.strip()):
                yield from _cut(Found(module, node.lineno + number, line.strip()))


def words(command: Found) -> list[str]:
    """The arguments of a command, without its name."""
    parts = shlex.split(command.text, comments=True)
    return parts[3:] if parts[0] == "python" else parts[1:]
