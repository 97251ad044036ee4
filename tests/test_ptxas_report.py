"""The static report on the kernels: what it makes of ptxas' words, and of what it cannot see."""

import pytest

from bench import ptxas_report

LOG = """
ptxas info    : Compiling entry function '{name}' for 'sm_{arch}'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 2048 bytes smem
"""


def kernel(arch, *, registers=32, stack=0, stores=0, loads=0):
    text = LOG.format(
        name="copy", arch=arch, registers=registers, stack=stack, stores=stores, loads=loads
    )
    (found,) = ptxas_report.parse(text)
    return found


@pytest.mark.parametrize(
    ("arch", "registers", "cell"),
    [
        ("80", 32, "32 regs, 100%"),
        ("80", 64, "64 regs, 50%"),
        ("86", 32, "32 regs, 100%"),
        ("87", 64, "64 regs, 67%"),
        ("89", 64, "64 regs, 67%"),
        ("90a", 32, "32 regs, 100%"),
        ("103", 128, "128 regs, 25%"),
        ("121f", 64, "64 regs, 67%"),
        ("999", 64, "64 regs, occupancy unknown"),
    ],
)
def test_every_architecture_has_a_cell(arch, registers, cell):
    found = kernel(arch, registers=registers)
    assert found.cell == cell
    assert cell in ptxas_report.table([found])


def test_spills_and_stack_frames_are_named():
    assert kernel("80").clean
    spilled = kernel("80", stack=16, stores=4, loads=8)
    assert not spilled.clean
    assert "sm_80: 12, 16" in ptxas_report.table([spilled])


def test_loads_that_cannot_be_seen_do_not_pass(monkeypatch):
    monkeypatch.setattr(ptxas_report, "find_cuobjdump", lambda: None)
    lines, passed = ptxas_report.check_wide([])
    assert lines == ["wide loads: not checked, cuobjdump was not found"]
    assert not passed
