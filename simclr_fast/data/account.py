"""What opening a source found: images used, what was left out and why, damage, labels."""

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

OnError = Literal["raise", "skip"]
# Names that are kept of each reason to leave something out.
EXAMPLES = 100


class DamagedDataError(ValueError):
    """A part of the data is damaged, so that images would be missing."""


@dataclass
class Account:
    """What a source holds.

    used: its images. left_out: reason → how many files, records or members were not used.
    examples: reason → the first names of them. lost: damage, which on_error="raise" does not allow.
    labels: what the labels are, or why there are none. classes: class → its images.
    unlabelled: images without a label.
    """

    on_error: OnError = "raise"
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    labels: str = ""
    classes: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {self.on_error!r}")

    @property
    def found(self) -> int:
        return self.used + sum(self.left_out.values())

    def leave_out(self, reason: str, name: str, count: int = 1) -> None:
        self.left_out[reason] += count
        names = self.examples.setdefault(reason, [])
        if len(names) < EXAMPLES:
            names.append(printable(name))

    def damage(self, message: str) -> None:
        """Raise DamagedDataError, or note `message` if on_error is "skip"."""
        if self.on_error == "raise":
            raise DamagedDataError(f"{message} (on_error 'skip' goes on without what is lost)")
        self.lost.append(message)

    def line(self) -> str:
        """The account in one line."""
        parts = [f"{self.used:,} image{'s' * (self.used != 1)}"]
        if self.classes:
            kind = "class" if len(self.classes) == 1 else "classes"
            parts[0] += f", {len(self.classes):,} {kind} ({self.labels})"
            if self.unlabelled:
                parts[0] += f", {self.unlabelled:,} unlabelled"
        elif self.labels:
            parts.append(f"labels not usable: {self.labels}")
        if self.left_out:
            counts = (f"{n:,} {reason}" for reason, n in self.left_out.most_common())
            parts.append(f"left out: {', '.join(counts)}")
        if self.lost:
            more = f" and {len(self.lost) - 1:,} more" if len(self.lost) > 1 else ""
            parts.append(f"LOST: {self.lost[0]}{more}")
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """The whole account: a line per class, per reason and per damage."""
        labels = self.labels or "none"
        if not self.classes and self.labels:
            labels = f"not usable: {self.labels}"
        out = [
            f"found          {self.found:,}",
            f"used           {self.used:,} images",
            f"labels         {labels}",
        ]
        out += [f"  {name}: {n:,} images" for name, n in self.classes.items()]
        if self.unlabelled and self.classes:
            out.append(f"  unlabelled: {self.unlabelled:,} images")
        out.append(f"left out       {sum(self.left_out.values()):,}")
        for reason, n in self.left_out.most_common():
            names = self.examples.get(reason, [])
            out += [f"  {n:,} {reason}", *(f"    {name}" for name in names)]
            if names and n > len(names):
                out.append(f"    and {n - len(names):,} more")
        out.append(f"lost           {len(self.lost):,}")
        return [*out, *(f"  {message}" for message in self.lost)]

    def to_json(self) -> dict[str, Any]:
        return {
            "found": self.found,
            "used": self.used,
            "left_out": dict(self.left_out),
            "lost": self.lost,
            "labels": self.labels,
            "classes": self.classes,
            "unlabelled": self.unlabelled,
        }


def printable(name: str | os.PathLike[str]) -> str:
    """A name as text that can be printed: bytes that are not UTF-8 become \\xNN, and control
    characters what Python writes for them."""
    text = os.fspath(name)
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _escaped(character: str) -> str:
    # Python reads a byte NN of a name that is not UTF-8 as the surrogate DCNN.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return repr(character)[1:-1]
