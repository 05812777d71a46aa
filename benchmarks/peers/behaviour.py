"""How the SOAP implementations on PyPI behave, seen from outside, beside ours: the facts of ``docs/migration.md``.

    python -m benchmarks.peers.behaviour                     # minutes; may install the peers' environment
    python -m benchmarks.peers.behaviour --peers heavyball   # beside ours only

Runs ``experiments.py`` on each, as a process of its own in the peers' environment (which is made on first use), and
``training.py`` with settings as near to each other as the options allow. Nobody's source is read.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import PACKAGES, ROOT, heading, parser, peers_python, table, write

SCRIPTS = ROOT / "benchmarks/peers"
NVIDIA = "emerging-optimizers"  # its 0.3.0 says that it needs Python 3.12; see subjects.optimizer_class


class Pair(NamedTuple):
    """Settings of a peer, and ours that come as near as our options allow."""

    peer: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    skip_first: bool


COMMON = {"lr": 3e-3, "weight_decay": 0.01, "precondition_frequency": 10}
PAIRS = {
    "heavyball": Pair(
        "heavyball",
        {**COMMON, "betas": (0.9, 0.95), "max_precond_dim": 10_000, "use_precond_schedule": False},
        {**COMMON, "betas": (0.9, 0.95), "merge_dims": True},
        True,
    ),
    "pytorch-optimizer": Pair(
        "pytorch-optimizer",
        {**COMMON, "betas": (0.95, 0.95)},
        {**COMMON, "betas": (0.95, 0.95), "shampoo_beta": -1, "correct_shampoo_beta_bias": False},
        True,
    ),
    NVIDIA: Pair(NVIDIA, {"lr": 3e-3}, {"lr": 3e-3}, False),
    f"{NVIDIA}, use_eigh": Pair(NVIDIA, {"lr": 3e-3, "use_eigh": True}, {"lr": 3e-3, "use_eigh": True}, False),
}


@cache
def python_of(name: str) -> str:
    """The interpreter that has an implementation; NVIDIA's is added to the peers' environment."""
    if name in ("ours", "adamw"):
        return sys.executable
    python = peers_python(name if name != NVIDIA else None)
    if name == NVIDIA and NVIDIA not in installed(python):
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "absl-py"], check=True)
        # Its requirements are met; --no-deps, since pip would give up torch's build for the index's.
        subprocess.run([*pip, "--no-deps", "--ignore-requires-python", f"{NVIDIA}==0.3.0"], check=True)
    return python


def installed(python: str) -> dict[str, str]:
    """The distributions of an interpreter and their versions."""
    listing = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    return {one["name"].replace("_", "-"): one["version"] for one in json.loads(listing.stdout)}


def run(name: str, *words: str) -> Any:
    """What Python prints with an implementation at hand; peers print as they like, so the last line counts."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if name == "ours":
        environment["PYTHONPATH"] = str(ROOT)
    command = [python_of(name), *words]
    done = subprocess.run(command, cwd=SCRIPTS, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ask(name: str, code: str) -> Any:
    """What a line of Python gives in the environment of an implementation, whose class of optimizer is ``SOAP``."""
    start = f"import inspect, json, pkgutil, subjects; SOAP = subjects.optimizer_class({name!r}); "
    return run(name, "-c", f"{start}print(json.dumps({code}))")


def signature(name: str) -> dict[str, str]:
    """The options of an implementation and their defaults; "a global default" where it is a placeholder."""
    options = "inspect.signature(SOAP).parameters.values()"
    defaults = ask(name, f"{{o.name: '' if o.default is o.empty else repr(o.default) for o in {options}}}")
    return {option: "a global default" if " object at " in value else value for option, value in defaults.items()}


def functions() -> dict[str, str]:
    """The public functions of NVIDIA's ``soap.soap`` and ``soap.soap_utils`` and their parameters."""
    found: dict[str, str] = {}
    for module in ("emerging_optimizers.soap.soap", "emerging_optimizers.soap.soap_utils"):
        members = f"inspect.getmembers(__import__({module!r}, fromlist=['*']), inspect.isfunction)"
        public = f"n[0] != '_' and f.__module__ == {module!r}"
        listing = f"{{n: ', '.join(inspect.signature(f).parameters) for n, f in {members} if {public}}}"
        found.update(ask(NVIDIA, listing))
    return found


def compare(pair: Pair, folder: Path) -> dict[str, Any]:
    """A small training of a peer, of ours as near as possible, of ours as it comes, and of AdamW."""
    plain = {key: pair.theirs[key] for key in ("lr", "precondition_frequency") if key in pair.theirs}
    contenders = {
        "theirs": (pair.peer, pair.theirs, []),
        "ours, as near as possible": ("ours", pair.ours, ["skip-first"] if pair.skip_first else []),
        "ours, same lr and frequency": ("ours", plain, []),
        "AdamW": ("adamw", {"lr": pair.theirs["lr"], "betas": (0.9, 0.95)}, []),
    }
    result: dict[str, Any] = {"settings": {"theirs": pair.theirs, "ours": pair.ours, "skip_first": pair.skip_first}}
    weights = {}
    for label, (subject, options, flags) in contenders.items():
        file = folder / "weights.pt"
        answer = run(subject, "training.py", subject, str(file), json.dumps(options), *flags)
        weights[label] = torch.load(file, weights_only=True)
        result[label] = {"losses": [float(f"{loss:.3g}") for loss in answer["losses"]]}
    for label in contenders:
        if label != "theirs":
            pairs = list(zip(weights["theirs"], weights[label], strict=True))
            result[label]["distance"] = [round(median(distance(a, b, i) for a, b in pairs), 3) for i in (1, 2)]
    return result


def distance(theirs: list[Tensor], others: list[Tensor], snapshot: int) -> float:
    """How far apart two trainings are, over how far theirs has come."""
    return float((others[snapshot] - theirs[snapshot]).norm() / (theirs[snapshot] - theirs[0]).norm())


def training_table(trainings: dict[str, Any]) -> str:
    """The trainings as the page has them."""
    rows = []
    for name, training in trainings.items():
        for label, one in training.items():
            if label != "settings":
                cells = [f"{number:.3g}" for number in one["losses"]]
                cells += [f"{number:.2f}" for number in one.get("distance", [])] or ["", ""]
                rows.append([name if label == "theirs" else "", label, *cells])
    return table("Peer | Training | Seed 0 | Seed 1 | Seed 2 | Distance at 10 | at 200", rows)


def main() -> None:
    arguments = parser(__doc__, "peers_behaviour.json")
    arguments.add_argument("--peers", default=",".join((*PACKAGES, NVIDIA)))
    given = arguments.parse_args()
    names = given.peers.split(",") if given.peers else []
    answers = {name: run(name, "experiments.py", name) for name in ["ours", *names]}
    with tempfile.TemporaryDirectory() as folder:
        trainings = {name: compare(pair, Path(folder)) for name, pair in PAIRS.items() if pair.peer in names}
    result = {
        **heading(),
        "peers": {name: installed(python_of(name))[name] for name in names},
        "heavyball": "compile_mode = None",
        "signatures": {name: signature(name) for name in ["ours", *names]},
        "experiments": {one: {name: answers[name][one] for name in answers} for one in answers["ours"]},
        "trainings": trainings,
    }
    if NVIDIA in names:
        packages = "[m.name for m in pkgutil.iter_modules(__import__('emerging_optimizers').__path__)]"
        result[NVIDIA] = {"functions": functions(), "modules": ask(NVIDIA, packages)}
    for experiment, found in result["experiments"].items():
        print(experiment, *(f"    {name}: {one}" for name, one in found.items()), sep="\n")
    print(training_table(trainings))
    write(given.out, result)


if __name__ == "__main__":
    main()
