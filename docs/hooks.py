"""What mkdocs does while it builds the site: each `<!-- help: COMMAND -->` becomes its --help."""

import contextlib
import io
import os
import re
import textwrap
from typing import Any

from simclr_fast.commands.cli import run

_MARK = re.compile(r"<!-- help: ([a-z ]*) -->")
_WIDTH = 90
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def help_of(command: str) -> str:
    """What `simclr-fast COMMAND --help` prints, without colours."""
    printed, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_WIDTH)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            run([*command.split(), "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    lines = _COLOUR.sub("", printed.getvalue()).strip().splitlines()
    if not lines:
        raise ValueError(f"simclr-fast {command} --help prints nothing")
    # Descriptions come in one line each.
    return "\n".join(
        textwrap.fill(line, _WIDTH) if len(line) > _WIDTH else line.rstrip() for line in lines
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with the text of each page."""
    return _MARK.sub(lambda mark: f"```text\n{help_of(mark[1])}\n```", markdown)
