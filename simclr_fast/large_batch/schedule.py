"""What lockstep keeps of a step: chosen by the planner, executed by `lockstep`."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Keep = Literal["kept", "once", "again"]
"""How a value of the forward reaches the backward.

"kept": it is kept until its last use. "once": it is made again in the first backward pass of its
stage and kept from there. "again": it is made again whenever an operation asks for it.
"""
Wide = Literal["kept", "again"]
Turn = Literal["kept", "mask", "again"]


@dataclass(frozen=True)
class Stage:
    """The choices for `blocks` consecutive blocks of a model.

    input: the value that enters the stage.
    output: the output of every block but the last, which is the `input` of the next stage.
    last: the inputs of the deepest batch norms of a block, except wide ones: x2 of a bottleneck.
    inner: the inputs of the other batch norms, except wide ones: x1.
    wide: outputs of expanding 1×1 convolutions, as the last of a bottleneck and the downsample.
    turn: what is held between the last two backward passes of a block. "kept": x1 and the block's
        input. "mask": x1 and, as bits, where the block's input is positive. "again": nothing.
    """

    blocks: int
    input: Keep = "kept"
    output: Keep = "again"
    last: Keep = "kept"
    inner: Keep = "again"
    wide: Wide = "again"
    turn: Turn = "kept"

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )


CHOICES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("input", "output", "last", "inner"), get_args(Keep)),
    "wide": get_args(Wide),
    "turn": get_args(Turn),
}


@dataclass(frozen=True)
class Schedule:
    """How lockstep runs a step.

    micro_batch: rows per micro-batch.
    stages: the choices for all blocks of the model, in order.
    gram: take statistics of batch norms after expanding 1×1 convolutions from the Gram matrix of
        the convolution's input, wherever `Stage.wide` is "again".
    device_bytes: the most bytes of kept values on the device. None: no limit.
    host_bytes: host memory for kept values that do not fit into device_bytes.
    """

    micro_batch: int
    stages: tuple[Stage, ...]
    gram: bool = True
    device_bytes: int | None = None
    host_bytes: int = 0

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if not self.stages:
            raise ValueError("stages must hold at least one Stage")
        if self.device_bytes is not None and self.device_bytes < 0:
            raise ValueError(f"device_bytes must be at least 0, got {self.device_bytes}")
        if self.host_bytes < 0:
            raise ValueError(f"host_bytes must be at least 0, got {self.host_bytes}")

    @property
    def blocks(self) -> int:
        """The number of blocks of the model."""
        return sum(stage.blocks for stage in self.stages)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Schedule":
        """The schedule that `to_json` wrote.

        Raises:
            ValueError: the text is no schedule.
        """
        try:
            given: dict[str, Any] = json.loads(text)
            stages = tuple(Stage(**stage) for stage in given.pop("stages"))
            return Schedule(stages=stages, **given)
        except (TypeError, KeyError, AttributeError) as error:
            names = ", ".join(field.name for field in fields(Schedule))
            raise ValueError(f"a schedule has the fields {names}: {error}") from error


def uniform(blocks: int, micro_batch: int, **choices: Any) -> Schedule:
    """A schedule with one stage per block, all with the same choices (see `Stage`)."""
    return Schedule(micro_batch, (Stage(1, **choices),) * blocks)
