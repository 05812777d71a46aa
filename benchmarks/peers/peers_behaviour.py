"""How the SOAP implementations on PyPI behave, seen from outside, beside ours: the facts of ``docs/migration.md``.

    python -m benchmarks.peers_behaviour

Runs ``benchmarks/peers_experiments.py`` on each, as a process of its own in the peers' environment (which is made on
first use), and the training of ``benchmarks/peers_training.py`` with settings as near to each other as the options
allow. Nobody's source is read. Results go to ``benchmarks/results/peers_behaviour.json``; the tables are printed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step_time import ROOT, heading, peers_python

SCRIPTS = ROOT / "benchmarks"
RESULTS = ROOT / "benchmarks/results/peers_behaviour.json"
NVIDIA = "emerging-optimizers==0.3.0"  # it says that it needs Python 3.12; see optimizer_class in the experiments
MODULES = {
    "heavyball": "heavyball",
    "pytorch-optimizer": "pytorch_optimizer",
    "emerging-optimizers": "emerging_optimizers.soap",
}


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
    "emerging-optimizers": Pair("emerging-optimizers", {"lr": 3e-3}, {"lr": 3e-3}, False),
    "emerging-optimizers, use_eigh": Pair(
        "emerging-optimizers", {"lr": 3e-3, "use_eigh": True}, {"lr": 3e-3, "use_eigh": True}, False
    ),
}


@cache
def python_of(name: str) -> str:
    """The interpreter that has an implementation; NVIDIA's is added to the peers' environment."""
    if name in ("ours", "adamw"):
        return sys.executable
    python = peers_python()
    if name == "emerging-optimizers" and "emerging-optimizers" not in installed(python):
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "absl-py"], check=True)
        # Its requirements are met; --no-deps, since pip would give up torch's build for the index's.
        subprocess.run([*pip, "--no-deps", "--ignore-requires-python", NVIDIA], check=True)
    return python


def installed(python: str) -> dict[str, str]:
    """The distributions of an interpreter and their versions."""
    listing = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    return {one["name"].replace("_", "-"): one["version"] for one in json.loads(listing.stdout)}


def run(script: str, name: str, *arguments: str) -> Any:
    """What a script prints about an implementation; peers print as they like, so the last line counts."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if name == "ours":
        environment["PYTHONPATH"] = str(ROOT)
    command = [python_of(name), str(SCRIPTS / script), name, *arguments]
    done = subprocess.run(command, cwd=SCRIPTS, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ask(name: str, code: str) -> Any:
    """What a line of Python gives in the environment of an implementation, whose class of optimizer is ``SOAP``."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if name == "ours":
        environment["PYTHONPATH"] = str(ROOT)
    start = f"import inspect, json, pkgutil, peers_subjects; SOAP = peers_subjects.optimizer_class({name!r}); "
    command = [python_of(name), "-c", f"{start}print(json.dumps({code}))"]
    done = subprocess.run(command, cwd=SCRIPTS, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


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
        found.update(ask("emerging-optimizers", listing))
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
        answer = run("peers_training.py", subject, str(file), json.dumps(options), *flags)
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


def table(trainings: dict[str, Any]) -> Iterator[str]:
    """The trainings as rows of the page."""
    yield "| Peer | Training | Seed 0 | Seed 1 | Seed 2 | Distance at 10 | at 200 |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, training in trainings.items():
        for label, one in training.items():
            if label != "settings":
                cells = [f"{number:.3g}" for number in one["losses"]]
                cells += [f"{number:.2f}" for number in one.get("distance", [])] or ["", ""]
                yield "| " + " | ".join([name if label == "theirs" else "", label, *cells]) + " |"


def main() -> None:
    names = list(MODULES)
    answers = {name: run("peers_experiments.py", name) for name in ["ours", *names]}
    with tempfile.TemporaryDirectory() as folder:
        trainings = {name: compare(pair, Path(folder)) for name, pair in PAIRS.items()}
    versions = {name: installed(python_of(name))[name] for name in names}
    signatures = {name: signature(name) for name in ["ours", *names]}
    packages = "[m.name for m in pkgutil.iter_modules(__import__('emerging_optimizers').__path__)]"
    api = {"functions": functions(), "modules": ask("emerging-optimizers", packages)}
    about = {**heading("cpu"), "peers": versions, "heavyball": "compile_mode = None"}
    experiments = {one: {name: answers[name][one] for name in answers} for one in answers["ours"]}
    result = {
        **about,
        "signatures": signatures,
        "emerging-optimizers": api,
        "experiments": experiments,
        "trainings": trainings,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for experiment, given in experiments.items():
        print(experiment, *(f"    {name}: {one}" for name, one in given.items()), sep="\n")
    print(*table(trainings), sep="\n")


if __name__ == "__main__":
    main()
