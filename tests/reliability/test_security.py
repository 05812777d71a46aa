"""What the package must never do with what comes from outside: run it, unpickle it, send it, or print it raw."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from emerging_optimizers.lab import cli
from emerging_optimizers.lab.common import printable
from emerging_optimizers.lab.race import display
from emerging_optimizers.lab.race.race import Options, Race
from tests.lab.conftest import TINY

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "emerging_optimizers"

# --- no code runs but the package's own and what the user names ----------------------------------------------------

FORBIDDEN_MODULES = {
    **dict.fromkeys(("pickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"), "unpickles"),
    **dict.fromkeys(("socket", "ssl", "urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "ftplib", "smtplib",
                     "socketserver", "xmlrpc", "webbrowser", "asyncio"), "reaches the network"),
    **dict.fromkeys(("builtins", "runpy", "code", "codeop", "ctypes", "pty", "imp"), "runs code"),
}  # fmt: skip
FORBIDDEN_NAMES = ("eval", "exec", "compile", "__import__", "__builtins__")
FORBIDDEN_CALLS = (
    "os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "subprocess.getoutput",
    "subprocess.getstatusoutput", "tempfile.mktemp", "torch.hub.", "torch.package.", "torch.jit.load",
    "torch.serialization.add_safe_globals", "torch.serialization.safe_globals", "torch.utils.model_zoo.",
    "torch.utils.cpp_extension.", "importlib.util.spec_from", "importlib.machinery.", "pandas.read_pickle",
)  # fmt: skip
UNSAFE_YAML = ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load")
LOADERS = {"torch.load": ("weights_only", True), "torch.serialization.load": ("weights_only", True)}

#: (file, call) -> why it may stand.
ALLOWED = {
    ("emerging_optimizers/lab/tasks/__init__.py", "importlib.import_module(module_name)"): (
        "the task that the user names as package.module:Class on the command line, or that a race was begun with"
    ),
    ("emerging_optimizers/plan/sources.py", "importlib.import_module(module_name)"): (
        "the model that the user names as package.module:function"
    ),
}


def violations(source: str, file: str = "planted.py") -> list[str]:
    """Find what a module's source must not contain: ``file:line: rule`` for each."""
    tree = ast.parse(source)
    names = dict(_imported_names(tree))
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}

    def full_name(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return "?"

    found = []
    for node in ast.walk(tree):
        for rule in _rules(node, full_name, called):
            call = called.get(id(node))
            if call is None or (file, ast.unparse(call)) not in ALLOWED:
                found.append(f"{file}:{getattr(node, 'lineno', 0)}: {rule}")
    return found


def _imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _rules(node: ast.AST, full_name, called: dict[int, ast.Call]) -> Iterator[str]:  # noqa: ANN001
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for module in modules:
            if why := FORBIDDEN_MODULES.get(module.split(".")[0]):
                yield f"imports {module}, which {why}"
            if module == "torch.hub" or module.startswith("torch.package"):
                yield f"imports {module}, which runs code"
    if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
        return
    name = full_name(node).replace("np.", "numpy.", 1) if full_name(node).startswith("np.") else full_name(node)
    call = called.get(id(node))
    keywords = {keyword.arg: keyword.value for keyword in call.keywords} if call else {}

    def constant(argument: str) -> object:
        value = keywords.get(argument)
        return value.value if isinstance(value, ast.Constant) else value

    if name in FORBIDDEN_NAMES:
        yield f"{name} runs code"
    if any(name.startswith(call_name) for call_name in FORBIDDEN_CALLS):
        yield f"{name} runs code, reaches the network or is unsafe"
    if name in UNSAFE_YAML:
        yield f"{name} makes any object: yaml.safe_load does not"
    if name in LOADERS and constant(LOADERS[name][0]) is not LOADERS[name][1]:
        yield f"{name} without {LOADERS[name][0]}={LOADERS[name][1]} unpickles"
    if name == "numpy.load" and (call is None or None in keywords or constant("allow_pickle") not in (None, False)):
        yield "numpy.load with allow_pickle unpickles"
    if name.startswith(("subprocess.", "asyncio.create_subprocess_shell")) and constant("shell") not in (None, False):
        yield f"{name} with a shell"
    if name == "importlib.import_module" and not (
        call and call.args and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    ):
        yield "importlib.import_module of a name that is not written there"


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", package_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_unpickles_evaluates_uses_a_shell_or_the_network(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


def test_every_allowance_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = len(ALLOWED)
    monkeypatch.setattr(sys.modules[__name__], "ALLOWED", {})
    found = [v for path in package_files() for v in violations(path.read_text(encoding="utf-8"), str(path))]
    assert len(found) == wanted, found


PLANTED = {
    "torch.load": "import torch\ntorch.load('x')",
    "torch.load, off": "import torch\ntorch.load('x', weights_only=False)",
    "torch.load, variable": "import torch\ntorch.load('x', weights_only=safe)",
    "torch.load, renamed": "from torch import load as read\nread('x')",
    "torch.load, handed on": "import torch\nloader = torch.load",
    "torch.serialization.load": "from torch import serialization\nserialization.load('x')",
    "torch.jit.load": "import torch\ntorch.jit.load('x')",
    "torch.hub": "import torch\ntorch.hub.load('a', 'b')",
    "safe globals": "import torch\ntorch.serialization.add_safe_globals([f])",
    "pickle": "import pickle",
    "pickle, from": "from pickle import loads",
    "pickle, inside": "def f():\n    import pickle as p\n    return p",
    "marshal": "import marshal",
    "shelve": "import shelve",
    "dill": "import dill",
    "joblib": "from joblib import load",
    "eval": "eval('1')",
    "eval, handed on": "run = eval",
    "exec": "exec('1')",
    "compile": "compile('1', 'x', 'exec')",
    "builtins": "import builtins\nbuiltins.eval('1')",
    "os.system": "import os\nos.system('ls')",
    "os.popen": "from os import popen\npopen('ls')",
    "os.execv": "import os as o\no.execv('ls', [])",
    "subprocess": "import subprocess\nsubprocess.run('ls', shell=True)",
    "subprocess, Popen": "from subprocess import Popen\nPopen('ls', shell=1)",
    "subprocess, variable": "import subprocess\nsubprocess.run('ls', shell=anything)",
    "getoutput": "import subprocess\nsubprocess.getoutput('ls')",
    "yaml": "import yaml\nyaml.load(f)",
    "yaml, loader": "import yaml\nyaml.load(f, Loader=yaml.FullLoader)",
    "numpy": "import numpy as np\nnp.load('x', allow_pickle=True)",
    "numpy, variable": "import numpy\nnumpy.load('x', allow_pickle=yes)",
    "numpy, unpacked": "import numpy as np\nnp.load('x', **options)",
    "__import__": "__import__(name)",
    "__import__, constant": "__import__('os')",
    "import_module": "import importlib\nimportlib.import_module(name)",
    "import_module, from": "from importlib import import_module\nimport_module(f'a.{b}')",
    "spec": "import importlib.util\nimportlib.util.spec_from_file_location('a', 'b')",
    "runpy": "import runpy",
    "mktemp": "import tempfile\ntempfile.mktemp()",
    "urllib": "from urllib.request import urlopen",
    "requests": "import requests",
    "socket": "import socket",
    "http": "import http.client",
    "webbrowser": "import webbrowser",
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_rule_sees_what_it_forbids(name: str) -> None:
    assert len(violations(PLANTED[name])) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "import re, torch\nre.compile('x')\ntorch.compile(f)\nmodel.eval()",
        "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.safe_load(f)",
        "import subprocess\nsubprocess.run(['ls'])\nsubprocess.run(['ls'], shell=False)",
        "import importlib\nimportlib.import_module('emerging_optimizers.soap')",
        "import tempfile\ntempfile.mkstemp()",
        "import json\njson.load(f)",
    ],
)
def test_no_rule_sees_more_than_it_forbids(source: str) -> None:
    assert violations(source) == []


# --- names from outside --------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;title\x07\x1b[31m\x9b2J\x00\x7f\u202e"  # sets a title, colours, clears, turns the writing round
MARKUP = "[bold red]m/s[/bold red] [/nope] [link=x]"
EVIL = f"""<script>alert("1")</script>'&amp;<img src=x onerror=a()>--><!-- ]]></style> {MARKUP} {ESCAPES}"""

HOSTILE = f'''
{TINY}

EVIL = {EVIL!r}


class Hostile(Tiny):
    name, metric, steps, eval_every = EVIL, "metric " + EVIL, 4, 2

    def model(self):
        model = nn.Sequential()
        for name, layer in zip((EVIL, "b" + EVIL), (nn.Linear(6, 8), nn.Linear(8, 1))):
            model.add_module(name, layer)
        return model


class Bad:
    def __init__(self, seed):
        raise TypeError(EVIL)

    def model(self): ...
    def batch(self, step): ...
    def loss(self, model, batch): ...
    def validate(self, model): ...


class Diverges(Hostile):
    def validate(self, model):
        return float("nan") if model.training is False and getattr(self, "seen", 0) else self.first()

    def first(self):
        self.seen = 1
        return 1.0


globals()[EVIL.replace("\\x00", "")] = Hostile  # an argument of a command cannot hold the byte 0
'''


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
        self._in_style = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
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
    assert cli.main(["race", *words]) == 2
    out, err = capsys.readouterr()
    assert_nothing_raw(out + err)
    assert err.startswith("soap: ")
    assert err.count("\n") == 1
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
code = main(sys.argv[1:])
print(seen or "nothing seen")
sys.exit(code)
"""


@pytest.mark.slow
def test_a_race_and_its_resume_open_no_connection_start_no_shell_and_unpickle_nothing(folder: Path) -> None:
    """Python itself reports these events, whichever library they come from."""
    (folder / "stops.py").write_text(HOSTILE + "\n\nclass Stops(Tiny):\n    def batch(self, step):\n"
        "        import signal\n        step == 3 and signal.raise_signal(signal.SIGTERM)\n"
        "        return super().batch(step)\n", encoding="utf-8")  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for words, code in ((["--task", "stops:Stops", "--threads", "1", "--out", "out"], 143), (["--resume", "out"], 143)):
        command = [sys.executable, "-c", WATCHED, "race", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.endswith("nothing seen\n")
