"""simclr-fast selfcheck: what it reports, and that it can fail."""

import torch

from simclr_fast.commands import selfcheck
from simclr_fast.commands.cli import run


def test_this_machine_passes(capsys):
    assert run(["selfcheck", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("0 failed")
    statuses = {line[5:39].strip(): line.split()[0] for line in lines[:-1]}
    assert statuses["NT-Xent bfloat16"] == statuses["10 steps of pretraining"] == "ok"
    assert statuses["second GPU"] == "skip"
    assert "no GPU" in next(line for line in lines if "second GPU" in line)


def test_a_wrong_loss_is_found_and_the_rest_still_checked(monkeypatch, capsys):
    def wrong(z, temperature):
        return 1.0001 * right(z, temperature=temperature)

    right = selfcheck.nt_xent_loss
    monkeypatch.setattr(selfcheck, "nt_xent_loss", wrong)
    monkeypatch.setattr(selfcheck, "_ten_steps", lambda device: "left out here")
    assert run(["selfcheck", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL NT-Xent float32" in out
    assert "loss off by 1.0e-04" in out
    assert "ok   LARS float32" in out
    assert out.splitlines()[-1].endswith("2 failed")


def test_nonsense_is_refused(capsys):
    assert run(["selfcheck", "--device", "mps"]) == 1
    assert "device must be cpu or cuda, got mps" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(["selfcheck", "--device", "cuda"]) == 1
        assert "torch sees no GPU" in capsys.readouterr().err
