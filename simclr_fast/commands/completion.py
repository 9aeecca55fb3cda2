"""simclr-fast completion."""

import contextlib
import io
import os
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import tyro

from simclr_fast.commands.cli import COMMANDS

# Starts zsh's completion, if ~/.zshrc has not, and its stand-in for bash's.
_ZSH = (
    "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }",
    "autoload -U +X bashcompinit && bashcompinit",
)
_OPTION = r"--[a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*"


@dataclass(frozen=True)
class Completion:
    """Print a script that completes commands, options and their values in a shell.

    bash: simclr-fast completion bash > ~/.simclr-fast.bash; add `source ~/.simclr-fast.bash` to
    ~/.bashrc. zsh: the same with zsh in place of bash.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]] = "bash"
    """The shell."""


def run(arguments: list[str]) -> int:
    """Print the script."""
    print(script(tyro.cli(Completion, args=arguments, prog="simclr-fast completion").shell))
    return 0


def script(shell: Literal["bash", "zsh"]) -> str:
    """The script, made from the `--help` of every command."""
    options, values = [], []
    for name in COMMANDS:
        shown = _help(name)
        # The protocols of eval are commands of their own.
        words = re.findall(r"^  ([a-z]+) {2,}", shown, re.M) if name == "eval" else []
        shown += "".join(_help(name, protocol) for protocol in words)
        for choices in re.findall(r"^usage: .*\[\{([\w,-]+)\}", shown, re.M):
            words += choices.split(",")
        words += sorted(set(re.findall(rf"(?<![\w-]){_OPTION}", shown)))
        options.append(f'    {name}) words="{" ".join(words)}" ;;')
        for option, choices in dict(re.findall(rf"({_OPTION}) \{{([^}}]+)\}}", shown)).items():
            if named := [choice for choice in choices.split(",") if choice != "None"]:
                values.append(f'    "{name} {option}") words="{" ".join(named)}" ;;')
    lines = [
        *(_ZSH if shell == "zsh" else ()),
        "_simclr_fast() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" words=""',
        '  case "${COMP_WORDS[1]}" in',
        *options,
        "  esac",
        f'  [ "$COMP_CWORD" -eq 1 ] && words="{" ".join(COMMANDS)} --help --version"',
        '  case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in',
        *values,
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "# Files where nothing else fits.",
        "complete -o default -F _simclr_fast simclr-fast",
    ]
    return "\n".join(lines)


def _help(*command: str) -> str:
    module = import_module(f"simclr_fast.commands.{command[0]}")
    printed, before = io.StringIO(), os.environ.get("COLUMNS")
    # Wide enough that no list of choices is broken.
    os.environ["COLUMNS"] = "2000"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            module.run([*command[1:], "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return printed.getvalue()
