"""A log that goes on where its run does, whatever a killed process left."""

import pytest

from simclr_fast.utils.lines import keep_until


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 3', "\0\0\0", "[3]", '{"a": 1}'])
def test_later_and_incomplete_lines_are_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1}\n{"step": 2}\n'
    path.write_text(kept + '{"step": 3}\n' + torn)
    keep_until(path, 2)
    assert path.read_text() == kept
    keep_until(path, 0)
    assert path.read_text() == ""


def test_a_missing_log_is_created(tmp_path):
    keep_until(tmp_path / "run" / "metrics.jsonl", 0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
