"""The example in the documents prints what stands below it."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()


def test_the_example_prints_what_stands_below_it(capsys):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out == re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1]


def test_every_finding_has_a_line_in_the_table():
    package = Path(__file__).parents[2] / "simclr_fast" / "doctor"
    text = "".join(path.read_text() for path in package.glob("*.py"))
    names = set(re.findall(r'Finding\(\s*"([a-z-]+)"', text))
    assert len(names) > 25
    table = PAGE[PAGE.index("| Finding |") :]
    assert names == set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", table)) & names
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    assert not [name for name in names if f'"{name}"' not in tested]
