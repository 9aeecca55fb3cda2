"""The state of a drop-in for the library's own class, so that a run goes on without simclr_fast."""

from typing import Any

from simclr_fast.optim.lars import LARS
from simclr_fast.optim.lars_options import DEFAULTS

# Options that change how a step is computed, and not its result.
_NO_MATTER = frozenset({"foreach", "fused", "capturable"})
# Options by which a library says which tensors are adapted.
_SWITCHES = ("always_adapt", "exclude_bias_n_norm", "exclude_bias_n_norm_lars")


def library_state(optimizer: LARS) -> dict[str, Any]:
    """The state_dict of a drop-in of `simclr_fast.compat` that the library's own class can load.

    Its groups have the library's options alone. ::

        ours = simclr_fast.compat.timm.Lars(model.parameters(), lr=1.0)
        ours.load_state_dict(state_of_simclr_fast_LARS)
        timm_lars.load_state_dict(library_state(ours))

    The groups of all three optimizers must hold the same parameters in the same order. timm's
    differs from `LARS` for tensors whose norm or gradient is zero: there set when_zero="decay" in
    the groups before.

    Raises:
        ValueError: a group has an option that the library lacks, and that changes its steps.
    """
    state = optimizer.state_dict()
    ours = ("adapt", *DEFAULTS)
    for number, (group, saved) in enumerate(
        zip(optimizer.param_groups, state["param_groups"], strict=True)
    ):
        wanted = _rules(optimizer, group)
        options = optimizer._names.options({k: v for k, v in group.items() if k != "adapt"})
        without = {k: v for k, v in group.items() if k not in ours or k in optimizer.defaults}
        fixed = optimizer._names.options(without)
        for name in DEFAULTS:
            if name not in _NO_MATTER and options[name] != fixed[name]:
                raise ValueError(
                    f"group {number} has {name}={options[name]!r}, and the library's optimizer can "
                    f"only have {fixed[name]!r}: set that first if you want it"
                )
        switches: list[str | None] = [None, *(name for name in _SWITCHES if name in without)]
        for switch in switches:
            tried = without if switch is None else without | {switch: not without[switch]}
            if _rules(optimizer, tried) == wanted:
                break
        else:
            raise ValueError(
                f"group {number} has adapt={group.get('adapt')} and "
                f"weight_decay={group['weight_decay']}, and the library's optimizer has no options "
                "that say the same"
            )
        for name in list(saved):
            if name not in tried:
                del saved[name]
            elif name != "params":
                saved[name] = tried[name]
    return state


def _rules(optimizer: LARS, group: dict[str, Any]) -> list[tuple[float, bool]]:
    """Weight decay of each tensor of a group, and whether it is adapted."""
    options = optimizer._names.options(group)
    return [optimizer._rule(options, optimizer._apart(p)) for p in group["params"]]
