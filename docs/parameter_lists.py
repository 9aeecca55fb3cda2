"""How the reference shows docstrings: a line `name: what it is` becomes an item of a list.

Docstrings here describe parameters by such lines, each with its further lines indented. Markdown
would run them together. `"choice": what it does`, indented, becomes an item within the item.
"""

import re
from typing import Any

import griffe

_NAME = r"\*{0,2}[a-z_]\w*"
_ITEM = re.compile(rf"({_NAME}(?:, {_NAME})*):(?: +(\S.*))?$")
# A star of a file name or of keys, where Markdown sees emphasis.
_STAR = re.compile(r"(?<=[.\-])\*|\*(?=\.)")
_CHOICE = re.compile(r"    (\"[\w-]+\": .*)")


def as_lists(text: str) -> str:
    """The docstring with Markdown lists; code after `::` stays as it is."""
    lines: list[str] = []
    inside = code = False
    for raw in text.split("\n"):
        line = raw if code and raw[:1] in ("", " ") else _STAR.sub(r"\\*", raw)
        code = line.endswith("::") or (code and line[:1] in ("", " "))
        last = lines[-1] if lines else ""
        # Within a sentence such a line is no item.
        starts = inside or not last or last.endswith((".", ":"))
        if line.endswith("::"):
            inside, line = False, line[:-1].removesuffix(":") + ":" * (len(line) > 2)
        elif not code and starts and (item := _ITEM.match(line)):
            lines += [""] if last and not inside else []
            inside, line = True, f"- **{item[1]}**: {item[2] or ''}".rstrip()
        elif inside and (choice := _CHOICE.match(line)):
            lines += [""] if last.startswith("- ") else []
            line = f"    - {choice[1]}"
        elif inside and line and line[0] != " ":
            if last.endswith(".") or not last:
                # The text goes on after the list.
                lines += [""] if last else []
                inside = False
            else:
                line = f"    {line}"
        lines.append(line)
    return "\n".join(lines)


class ParameterLists(griffe.Extension):
    """griffe calls this with each object that it reads."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        # mkdocstrings itself makes a list of "Args:".
        has_list = re.search(r"^Args:$", text, re.M)
        obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M) if has_list else as_lists(text)
