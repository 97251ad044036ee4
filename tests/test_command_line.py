"""``python -m flatmtl``."""

import subprocess
import sys

import pytest
import torch

from flatmtl.__main__ import main
from flatmtl.ops import OPERATORS


def test_info_names_every_operator_and_its_body(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in OPERATORS:
        line = next(row for row in text.splitlines() if row.split()[:1] == [name])
        assert set(line.split()[1:]) <= {"cpu", "cuda", "reference"}
    for word in ("torch", "CUDA toolkit of the build", "CUDA architectures", "CUDA driver"):
        assert word in text


def test_info_goes_on_where_a_device_cannot_be_asked(capsys, monkeypatch):
    """An old driver counts its devices and refuses to start."""

    def refuse(index):
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "0 cannot be asked (The NVIDIA driver on your system is too old)\n" in text
    assert OPERATORS[-1] in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "info" in text
    assert "demo" in text


def test_no_command_is_an_error_that_helps(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_missing_data_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "flatmtl", "demo", "--quick", "--data", "/nowhere"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr
