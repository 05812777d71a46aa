"""What the package must never do with what comes from outside: run it, unpickle it, send it, or print it raw."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Container, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from emerging_optimizers.lab import cli
from emerging_optimizers.lab.common import printable
from emerging_optimizers.lab.race import display
from emerging_optimizers.lab.race.race import Options, Race
from tests.lab.conftest import TINY, complaint

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "emerging_optimizers"

# --- no code runs but the package's own and what the user names ----------------------------------------------------

#: Names that no module may import or mention, with all that is in them.
FORBIDDEN = {
    "unpickles": "pickle _pickle marshal shelve dill joblib cloudpickle torch.load torch.serialization.load numpy.load "
    "pandas.read_pickle yaml torch.package",
    "reaches the network": "socket ssl urllib urllib3 requests http httpx aiohttp ftplib smtplib socketserver xmlrpc "
    "webbrowser asyncio torch.hub torch.utils.model_zoo",
    "runs code": "builtins runpy code codeop ctypes pty imp subprocess eval exec compile __import__ __builtins__ "
    "importlib.import_module importlib.util.spec_from_file_location importlib.util.module_from_spec "
    "importlib.machinery os.system os.popen os.posix_spawn os.fork os.execl os.execv os.execve os.execvp os.spawnl "
    "os.spawnv torch.jit.load torch.utils.cpp_extension torch.serialization.add_safe_globals "
    "torch.serialization.safe_globals",
    "can be guessed": "tempfile.mktemp",
}
RULES = {name: why for why, names in FORBIDDEN.items() for name in names.split()}
BUILTINS = ("eval", "exec", "compile", "__import__", "__builtins__")
#: (file, call): the module that a user names on the command line, or that a race was begun with.
ALLOWED = {
    ("emerging_optimizers/lab/tasks/__init__.py", "importlib.import_module(module_name)"),
    ("emerging_optimizers/plan/sources.py", "importlib.import_module(module_name)"),
}


def violations(source: str, file: str = "planted.py", allowed: Container[tuple[str, str]] = ALLOWED) -> list[str]:
    """Find what a module's source must not contain: ``file:line: rule`` for each."""
    tree = ast.parse(source)
    names, safe, found = {}, set(), []

    def full_name(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        mentioned = []
        if isinstance(node, ast.Import):
            mentioned = [alias.name for alias in node.names]
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            mentioned = [node.module or ""]
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            weights_only = full_name(node.func) == "torch.load" and keywords.get("weights_only") == "True"
            if weights_only or (file, ast.unparse(node)) in allowed:
                safe.add(node.func)
        elif isinstance(node, ast.Attribute) or (
            isinstance(node, ast.Name) and (node.id in names or node.id in BUILTINS)
        ):
            mentioned = [] if node in safe else [full_name(node)]
        for name in mentioned:
            parts = name.split(".")
            why = [RULES[head] for n in range(len(parts)) if (head := ".".join(parts[: n + 1])) in RULES]
            found += [f"{file}:{getattr(node, 'lineno', 0)}: {name} {why[0]}"] if why else []
    return found


@pytest.mark.parametrize("allowed", [ALLOWED, ()], ids=["all", "without what is allowed"])
def test_no_module_unpickles_evaluates_uses_a_shell_or_the_network(allowed: Container[tuple[str, str]]) -> None:
    found = [
        each
        for path in sorted(PACKAGE.rglob("*.py"))
        for each in violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix(), allowed)
    ]
    assert len(found) == (0 if allowed else len(ALLOWED)), found


PLANTED = """
    import torch; torch.load('x')
    import torch; torch.load('x', weights_only=safe)
    from torch import load as read; read('x')
    import torch; loader = torch.load
    from torch import serialization; serialization.load('x')
    import torch; torch.hub.load('a', 'b')
    import pickle
    from pickle import loads
    eval('1')
    run = eval
    import os; os.system('ls')
    from os import popen; popen('ls')
    import os as o; o.execv('ls', [])
    __import__('os')
    import importlib; importlib.import_module(name)
    import tempfile; tempfile.mktemp()
    from urllib.request import urlopen
"""


@pytest.mark.parametrize("source", PLANTED.strip().splitlines())
def test_each_kind_of_mention_is_seen(source: str) -> None:
    assert violations(source.strip())


# --- names from outside --------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;title\x07\x1b[31m\x9b2J\x00\x7f\u202e"  # sets a title, colours, clears, turns the writing round
MARKUP = "[bold red]m/s[/bold red] [/nope] [link=x]"
EVIL = f"""<script>alert("1")</script>'&amp;<img src=x onerror=a()>--><!-- ]]></style> {MARKUP} {ESCAPES}"""

HOSTILE = f"""
{TINY}

EVIL = {EVIL!r}


class Hostile(Tiny):
    name, metric, steps, eval_every = EVIL, "metric " + EVIL, 4, 2

    def model(self):
        model = nn.Sequential()
        for name, layer in zip((EVIL, "b" + EVIL), (nn.Linear(6, 8), nn.Linear(8, 1))):
            model.add_module(name, layer)
        return model


class Bad(Tiny):
    def __init__(self, seed):
        raise TypeError(EVIL)


class Diverges(Hostile):
    scores = 0

    def validate(self, model):
        self.scores += 1
        return 1.0 if self.scores == 1 else float("nan")


globals()[EVIL.replace("\\x00", "")] = Hostile  # an argument of a command cannot hold the byte 0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "hostile_tasks.py").write_text(HOSTILE, encoding="utf-8")
    (tmp_path / "raises.py").write_text(f"raise ValueError({EVIL!r})", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("hostile_tasks", "raises"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


class Page(HTMLParser):
    """What a browser makes of a page: its elements, attributes and words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.style = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.style += data
        else:
            self.words += data


HTML = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "div", "figure", "details", "summary",
        "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip
SVG = {"svg", "g", "path", "use", "defs", "clippath", "rect"}


def problems(page: str) -> list[str]:
    """Find in a report what is not its own: elements, scripts, and addresses of anything outside the page."""
    parsed = Page(page)
    found = [f"element {tag}" for tag in sorted(parsed.tags - HTML - SVG)]
    for name, value in parsed.attributes:
        if name.startswith("on"):
            found.append(f"attribute {name}")
        if name in ("src", "srcset", "href", "xlink:href", "action", "formaction", "data") and value[:1] != "#":
            found.append(f"address {name}={value}")
        if name.startswith("xmlns"):  # a name, which nothing is loaded from
            continue
        if "://" in value or "url(" in value.replace("url(#", ""):
            found.append(f"address in {name}={value}")
    if "@import" in parsed.style or "url(" in parsed.style or "</style" in parsed.style:
        found.append("the style sheet loads something")
    return found


@pytest.mark.parametrize("planted", ["<script>a()</script>", "<img src=x>", "<p onclick=a()>", '<use href="http://a/b">',
                                     "<style>@import 'a'</style>", '<p style="background:url(http://a)">'])  # fmt: skip
def test_the_look_at_a_page_sees_what_does_not_belong_there(planted: str) -> None:
    assert problems(f"<html><body>{planted}</body></html>")


def assert_nothing_raw(text: str) -> None:
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


@pytest.mark.parametrize("task", ["Hostile", "Diverges", EVIL.replace("\x00", "")], ids=["Hostile", "Diverges", "EVIL"])
def test_the_page_of_a_race_with_hostile_names_holds_them_as_words(
    folder: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", f"hostile_tasks:{task}", "--optimizers", "soap,adamw", "--threads", "1", "--out", "out"]
    assert cli.main(["race", *words]) == 0
    captured = capsys.readouterr()
    assert_nothing_raw(captured.out + captured.err)
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert problems(page) == []
    shown = Page(page).words
    assert_nothing_raw(page)
    assert f"soap race: {printable(EVIL)}" in shown
    assert f"scores: metric {printable(EVIL)}, lower" in shown
    assert f"{printable(EVIL)}.weight" in shown  # a parameter's name
    assert f"task: hostile_tasks:{printable(task)}" in shown
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["task"]["name"] == printable(EVIL)
    if task == "Diverges":
        assert "nan at step" in shown
        assert "nan at step" in results["runs"][0]["diverged"]


def test_the_page_of_a_race_on_a_hostile_text_holds_its_name_as_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "<img src=x onerror=a()>'&\"\udce9\x1b[31m.txt"  # not even UTF-8
    (folder / os.fsdecode(os.fsencode(name))).write_text((EVIL + " words of the text\n") * 120, encoding="utf-8")
    words = ["race", "--text", name, "--optimizers", "adamw", "--steps", "1", "--threads", "1"]
    assert cli.main([*words, "--out", "out\udce9\x1b[31m"]) == 0
    captured = capsys.readouterr()
    assert_nothing_raw(captured.out + captured.err)
    assert "Report: out\\udce9\\x1b[31m/report.html" in captured.out
    page = (folder / "out\udce9\x1b[31m" / "report.html").read_text(encoding="utf-8")
    assert problems(page) == []
    assert "<img src=x onerror=a()>'&\"\\udce9" in Page(page).words
    assert "words of the text" not in page


@pytest.mark.parametrize(
    "words",
    [
        ["--task", f"nothing{ESCAPES}"],
        ["--task", f"no{ESCAPES}module:Task"],
        ["--task", f"hostile_tasks:No{ESCAPES}"],
        ["--task", "hostile_tasks:Bad"],
        ["--task", "raises:Task"],
        ["--optimizers", f"soap,{ESCAPES}"],
        ["--lr", f"soap={ESCAPES}"],
        ["--seeds", ESCAPES],
        [f"--steps{ESCAPES}", "1"],
        ["--text", f"missing{ESCAPES}.txt".replace("\x00", "")],
        ["--resume", f"missing{ESCAPES}".replace("\x00", "")],
        ["--resume", "missing\udce9"],
        [f"--{ESCAPES}"],
        [EVIL],
    ],
    ids=lambda words: words[0] if len(words) > 1 else ascii(words)[:12],
)
def test_an_error_line_shows_hostile_words_as_escapes(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    err = complaint(capsys, "race", *words)
    assert "\\x1b" in err or "\\udce9" in err


def test_the_live_table_shows_hostile_words_as_they_are_but_harmless(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = Race(Options("hostile_tasks:Hostile", None, {"adamw": (1e-2,)}, (0,), None, 10, 1))
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=500, color_system=None)
    monkeypatch.setattr(display, "REDRAW_SECONDS", 0.0)
    display.print_routing(race, console)
    with display.live(race, console) as update:
        for run in race.play():
            update(run)
    shown = file.getvalue()
    words = " ".join(shown.split())  # the caption is as narrow as the table
    assert f"scores: metric {printable(EVIL)}; Ctrl-C" in words
    assert MARKUP in words
    assert re.sub(r"\b\d+\b", "*", printable(EVIL)) + ".weight" in words
    for part in ("\x1b]0;", "\x07", "\x1b[31m", "\x9b", "\x00", "\u202e"):
        assert part not in shown


def test_the_final_table_and_verdict_on_a_terminal_are_harmless(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    assert cli.main(["race", "--task", "hostile_tasks:Hostile", "--optimizers", "soap,adamw", "--out", "out"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b[" in out  # rich's own
    for part in ("\x1b]0;", "\x07", "\x9b", "\x00", "\u202e"):
        assert part not in out + err
    assert f"best metric {printable(EVIL)}" in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünï ⚡ [m/s] 中文", "plain, ünï ⚡ [m/s] 中文"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b\x07\x7f\x00", "\\x9b\\x07\\x7f\\x00"),
        ("a\tb\nc\rd\u2028e\u00a0f", "a b c d e f"),
        ("\u202eabc\u2066\u200b", "\\u202eabc\\u2066\\u200b"),
        ("\udce9", "\\udce9"),
        (Path("x\x1b"), "x\\x1b"),
    ],
)
def test_printable_keeps_letters_and_escapes_controls(text: object, shown: str) -> None:
    assert printable(text) == shown


WATCHED = """
import sys
seen = []
def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.")):
        if event not in ("socket.__new__", "socket.gethostname"):
            seen.append((event, repr(arguments)))
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "pickle.find_class"):
        seen.append((event, repr(arguments)))
    if event == "subprocess.Popen" and not isinstance(arguments[1], (list, tuple)):
        seen.append((event, repr(arguments)))
from emerging_optimizers.lab.cli import main
import torch, matplotlib.figure, emerging_optimizers.lab.race.report
sys.addaudithook(watch)
print([main(["race", *words.split()]) for words in sys.argv[1:]], seen)
"""


@pytest.mark.slow
def test_a_race_and_its_resume_open_no_connection_start_no_shell_and_unpickle_nothing(folder: Path) -> None:
    """Python itself reports these events, whichever library they come from."""
    (folder / "stops.py").write_text(HOSTILE + "\n\nclass Stops(Tiny):\n    def batch(self, step):\n"
        "        import signal\n        step == 3 and signal.raise_signal(signal.SIGTERM)\n"
        "        return super().batch(step)\n", encoding="utf-8")  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WATCHED, "--task stops:Stops --threads 1 --out out", "--resume out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("[143, 143] []\n")
