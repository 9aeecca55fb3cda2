"""HTML pages that hold their data: one file without references to others."""

import json
from importlib.resources import files
from typing import Any


def fill_page(template: str, data: dict[str, Any]) -> str:
    """The page assets/`template` with `data` in it, as JSON."""
    text = (files("simclr_fast") / "assets" / template).read_text(encoding="utf-8")
    # Escaped, so that a name with "</script>" cannot end the script element that holds it.
    return text.replace("DATA_GOES_HERE", json.dumps(data).replace("<", "\\u003c"), 1)
