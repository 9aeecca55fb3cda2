"""What the doctor found."""

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    name: a short fixed name, such as "detached-gradient".
    severity: "error": the step does not compute what SimCLR defines. "warning": it probably trains
        worse than it could.
    seen: what was observed, with numbers. why: why it hurts. remedy: what to change.
    """

    name: str
    severity: Severity
    seen: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.severity}: {self.name}\n"
            f"  seen    {self.seen}\n"
            f"  why     {self.why}\n"
            f"  change  {self.remedy}"
        )


@dataclass
class Report:
    """Findings, errors first.

    findings: filled when `watch` ends.
    facts: what was measured, for example "temperature: 0.1".
    unchecked: what could not be checked, and why.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def serious(self) -> bool:
        """Whether any finding is an error."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def names(self) -> list[str]:
        """The names of the findings."""
        return [finding.name for finding in self.findings]

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["nothing wrong was found"]
        lines += [f"measured: {fact}" for fact in self.facts]
        lines += [f"not checked: {reason}" for reason in self.unchecked]
        return "\n".join(lines)
