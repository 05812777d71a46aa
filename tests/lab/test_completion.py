"""What a shell completes: the names that the commands know, in each shell's own protocol, and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shellingham

from emerging_optimizers.lab import names, tasks
from emerging_optimizers.lab.cli import main
from emerging_optimizers.lab.race import optimizers
from emerging_optimizers.plan.sources import PRESETS

ROOT = Path(__file__).parents[2]


def completed(shell: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("_SOAP_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit):
        main([])
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


def test_the_names_are_those_that_the_commands_know() -> None:
    assert names.PRESETS == PRESETS
    assert tuple(tasks.BUILT_IN) == names.TASKS
    assert names.OPTIMIZERS == optimizers.OPTIMIZERS


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("soap ", "plan race inspect"),
        ("soap in", "inspect"),
        ("soap plan ", " ".join(PRESETS)),
        ("soap plan llama", "llama-3-8b llama-3-70b"),
        ("soap plan gpt2 --dtype b", "bfloat16"),
        ("soap plan gpt2 --tokens lots --dtype b", "bfloat16"),  # a mistake further left is the command's business
        ("soap plan gpt2 --mem", "--memory"),
        ("soap race --task ", "charlm digits pinn"),
        ("soap race --optimizers ", "soap soap-kronecker kl-soap adamw muon"),
        ("soap race --optimizers muon,soap,", "muon,soap,soap-kronecker muon,soap,kl-soap muon,soap,adamw"),
        ("soap plan ./weights", ""),  # nothing, so that the shell goes on with files
        ("soap inspect run", ""),
        ("soap race --resume r", ""),
        ("soap race --text r", ""),
        ("soap inspect x.pt --out r", ""),
    ],
)
def test_bash_is_given_names_or_left_to_complete_files(
    line: str, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed("bash", line, monkeypatch, capsys).split() == wanted.split()


def test_zsh_and_fish_are_given_names_with_what_they_mean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "soap-kronecker\n" in completed("fish", "soap race --optimizers ", monkeypatch, capsys)
    assert "--pack-factors\tkeep a triangle" in completed("fish", "soap plan gpt2 --pack", monkeypatch, capsys)
    assert '(("llama-3-8b"\n"llama-3-70b"))' in completed("zsh", "soap plan llama", monkeypatch, capsys)
    assert '"race":"train a model' in completed("zsh", "soap ", monkeypatch, capsys)
    assert completed("zsh", "soap inspect run", monkeypatch, capsys) == "_files\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_the_script_that_is_installed_completes_in_bash_and_waits_for_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("bash", "bash"))
    with pytest.raises(SystemExit) as end:
        main(["--install-completion"])
    assert end.value.code in (0, None)
    script = tmp_path / ".bash_completions" / "soap.sh"
    assert str(script) in capsys.readouterr().out
    assert f"source '{script}'" in (tmp_path / ".bashrc").read_text()
    with pytest.raises(SystemExit):
        main(["--show-completion"])
    assert capsys.readouterr().out == script.read_text() + "\n"

    command = tmp_path / "soap"
    look = "import sys; sys.modules['torch'] = None; from emerging_optimizers.lab.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{look}"\n')
    command.chmod(0o755)
    lines = f"source {script}; COMP_WORDS=(soap plan gpt2-); COMP_CWORD=2; _soap_completion {command} gpt2- plan"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", lines + "; echo ${COMPREPLY[@]}"], capture_output=True, text=True, env=environment
    )
    assert (done.stdout, done.stderr) == ("gpt2-xl\n", "")
