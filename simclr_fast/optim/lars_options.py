"""The options of LARS's parameter groups: their names in other libraries, and their checks."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from simclr_fast.utils.numbers import as_float

# That of float32.
_LARGEST = 3.4e38
# Every option of `optim.LARS` but lr and adapt. A subclass that follows another library keeps only
# that library's options in its groups, so that states can be exchanged; the others have these
# values.
DEFAULTS: dict[str, Any] = {
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "trust_coefficient": 1e-3,
    "eps": 1e-8,
    "trust_clip": False,
    "momentum_order": "torch",
    "norm": "split",
    "when_zero": "skip",
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
}
# Option → the names that it has elsewhere. The last three are options of some libraries only.
_OTHER_NAMES = {
    "trust_coefficient": ("eta", "trust_coeff"),
    "trust_clip": ("clip_lr", "clip_lars_lr"),
    "exclude_bias_n_norm": ("exclude_bias_n_norm_lars", "exclude_bias_and_norm"),
    "always_adapt": (),
    "differentiable": (),
}
_NUMBERS = ("momentum", "dampening", "weight_decay", "trust_coefficient", "eps")
_BOOLS = (
    *("nesterov", "trust_clip", "maximize", "capturable"),
    *("adapt", "always_adapt", "exclude_bias_n_norm"),
)
_FLAGS = frozenset((False, True))
_CHOICES = {
    "momentum_order": ("torch", "tf"),
    "norm": ("split", "joint"),
    "when_zero": ("skip", "decay"),
}

# options → the weight decay of the group's tensors, and whether they are adapted
Rule = Callable[[dict[str, Any]], tuple[float, bool]]


class OptionNames:
    """What the options are called in the groups of one optimizer, and what they may be.

    defaults: those of the optimizer. An option goes by the name that it has there.
    fixed: values of options that are not in `defaults`, where they differ from `DEFAULTS`.
    """

    def __init__(self, defaults: dict[str, Any], fixed: dict[str, Any]):
        self._fixed = DEFAULTS | fixed
        self._is_complete = defaults.keys() >= DEFAULTS.keys()
        self._renamed: list[tuple[str, str]] = []
        # Name → the option, and its name here, which is None if the optimizer lacks the option.
        self._foreign: dict[str, tuple[str, str | None]] = {}
        for option, others in _OTHER_NAMES.items():
            names = (option, *others)
            honoured = option if option in DEFAULTS else None
            here = next((name for name in names if name in defaults), honoured)
            self._foreign.update({name: (option, here) for name in names if name != here})
            if here is not None and here != option:
                self._renamed.append((option, here))
        self._foreign_names = frozenset(self._foreign)

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group's options under our names. Not to be written to."""
        if self._is_complete:
            return group
        options = self._fixed | group
        for option, here in self._renamed:
            options[option] = group[here]
        return options

    def check(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for a value that LARS cannot have."""
        options = self.options(group)
        shown = dict(self._renamed)
        lr = options["lr"]
        for name in _NUMBERS if isinstance(lr, Tensor) else ("lr", *_NUMBERS):
            here = shown.get(name, name)
            value = as_float(here, options[name])
            if type(options[name]) not in (int, float):
                # Checkpoints hold numbers of Python, which are read without running code.
                options[name] = value
                if here in group:
                    group[here] = value
        for name in _BOOLS:
            if not isinstance(options.get(name, True), bool):
                raise TypeError(f"{shown.get(name, name)} must be a bool, got {options[name]!r}")
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or lr.is_complex():
                raise ValueError(f"lr must be a float or a one-element real tensor, got {lr}")
        elif not options["lr"] >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        elif not options["lr"] < _LARGEST:
            raise ValueError(f"lr must be finite in float32, got {lr}")
        for name in ("momentum", "weight_decay", "trust_coefficient", "eps"):
            if not 0 <= options[name] < _LARGEST:
                raise ValueError(
                    f"{shown.get(name, name)} must be finite and at least 0, got {options[name]}"
                )
        if not math.isfinite(options["dampening"]):
            raise ValueError(f"dampening must be finite, got {options['dampening']}")
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening = 0, got "
                f"momentum={options['momentum']}, dampening={options['dampening']}"
            )
        for name, allowed in _CHOICES.items():
            if options[name] not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {options[name]!r}")
        if options["foreach"] and options["fused"]:
            raise ValueError("foreach=True and fused=True exclude each other")

    def check_choices(self, group: dict[str, Any], options: dict[str, Any]) -> None:
        """Raise for a choice or flag that was changed to what it cannot be, and would be ignored.

        options: those of the group. Called in each step, so it looks at no more than that.
        """
        if not (
            options["norm"] in _CHOICES["norm"]
            and options["momentum_order"] in _CHOICES["momentum_order"]
            and options["when_zero"] in _CHOICES["when_zero"]
            and _FLAGS.issuperset((options["nesterov"], options["trust_clip"], options["maximize"]))
        ):
            self.check(group)

    def has_foreign(self, group: dict[str, Any]) -> bool:
        """Whether `translate` and `settle` have something to do."""
        return not self._foreign_names.isdisjoint(group)

    def translate(self, group: dict[str, Any]) -> None:
        """Give options that have another name in other libraries their name here."""
        for name in self._foreign_names.intersection(group):
            here = self._foreign[name][1]
            if here is not None:
                group[here] = group.pop(name)

    def settle(self, group: dict[str, Any], rule: Rule) -> None:
        """Remove options that the optimizer lacks, if it can do what they say.

        Raises:
            ValueError: it cannot. The group is not changed.
        """
        for name in self._foreign_names.intersection(group):
            option, here = self._foreign[name]
            if here is None:
                self._settle_one(option, name, group, rule)
                del group[name]

    def _settle_one(self, option: str, name: str, group: dict[str, Any], rule: Rule) -> None:
        value = group[name]
        if option == "differentiable":
            if value:
                raise ValueError("differentiable=True is not supported by LARS, got it in a group")
            return
        weight_decay, adapt = rule(self.options(group))
        if option == "always_adapt":
            # timm adapts a group if it has weight decay or always_adapt.
            if value and not adapt:
                raise ValueError(
                    f"{name}={value!r} says that the group is adapted, but it is not. Remove "
                    f"{name}, and set adapt=True in the group if that is what you want"
                )
            if adapt and not value and weight_decay == 0:
                group["adapt"] = False
        elif value and (adapt or weight_decay) and any(p.ndim == 1 for p in group["params"]):
            raise ValueError(
                f"{name}={value!r} is an option of simclr_fast.compat.solo_learn.LARS. Remove it, "
                "and put tensors of one dimension into a group with weight_decay=0 and "
                "adapt=False, as simclr_fast.optim.lars_param_groups does"
            )
