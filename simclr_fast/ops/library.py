"""The native extension, the registration of ops, and the rule for which implementation runs."""

import re
import warnings
from collections.abc import Callable
from enum import Enum
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from simclr_fast.utils.install import build_command, hidden_copy

# The ops that the extension has CPU kernels for.
NATIVE_OPS = (
    "augment_views",
    "lars_",
    "norm_act",
    "norm_act_",
    "norm_train",
    "norm_train_backward",
    "nt_xent",
    "nt_xent_backward",
    "nt_xent_normalize",
    "nt_xent_row_loss",
    "sup_con_backward",
    "sup_con_normalize",
    "sup_con_row_loss",
)


def _load_extension() -> Any:
    """simclr_fast._C, which registers its kernels when it is imported.

    Raises:
        ImportError: it is missing, cannot be loaded, or was built from another version's sources.
            With such an extension some ops would silently be slow.
    """
    extension = import_module("simclr_fast._C")
    for op in NATIVE_OPS:
        try:
            there = torch._C._dispatch_has_kernel_for_dispatch_key(f"simclr_fast::{op}", "CPU")
        except RuntimeError:
            there = False
        if not there:
            raise ImportError(f"it was built from another version's sources: no kernel of {op}")
    return extension


EXTENSION: Any = None
EXTENSION_ERROR: ImportError | None = None
try:
    EXTENSION = _load_extension()
except ImportError as error:
    EXTENSION_ERROR = error

_LIBRARY = torch.library.Library("simclr_fast", "FRAGMENT")
_ORDINARY = (Tensor, torch.nn.Parameter)
# Devices on which torch cannot make a float64 tensor.
_WITHOUT_FLOAT64 = {"mps"}

# On older GPUs tl.dot becomes scalar multiply-adds, and Triton does not support them.
TRITON_CAPABILITY = (8, 0)


class Implementation(Enum):
    NATIVE = "the extension's C++ kernels"
    TRITON = "Triton kernels"
    CUDA = "the extension's CUDA kernels"
    PLAIN = "plain torch operations"


def define_op(
    schema: str,
    *,
    kernel: Callable[..., Any],
    shapes: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> Any:
    """Register an op of torch.ops.simclr_fast and return it.

    kernel: computes on every device for which the extension has registered no kernel.
    shapes: makes outputs without values; reads only the metadata of its arguments.
    autograd: called instead of `kernel`, on every device, if gradients may be needed.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")

    def checked_shapes(*args: Any, **kwargs: Any) -> Any:
        refuse_mixed_devices(name, (args, kwargs))
        return shapes(*args, **kwargs)

    torch.library.register_fake(f"simclr_fast::{name}", checked_shapes, lib=_LIBRARY)
    if autograd is not None:
        _LIBRARY.impl(name, autograd, "Autograd")
    return getattr(torch.ops.simclr_fast, name).default


def refuse_mixed_devices(name: str, arguments: Any) -> None:
    """Raise ValueError unless all tensors among the arguments of an op are on one device.

    A single tensor on the meta device makes torch call the op's shape function. The result would be
    a tensor of arbitrary values on the device of the others.
    """
    devices = {t.device for t in tree_leaves(arguments) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(
            f"simclr_fast::{name}: all tensors must be on one device, got "
            f"{', '.join(sorted(map(str, devices)))}"
        )


def refuse_gradient_of(name: str) -> None:
    """Raise an error if a gradient goes through this op, which itself computes a gradient."""
    torch.library.register_autograd(
        f"simclr_fast::{name}",
        _no_double_backward,
        setup_context=lambda ctx, inputs, output: None,
        lib=_LIBRARY,
    )


def _no_double_backward(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "the contrastive losses have no double backward (create_graph=True); the plain-torch "
        "losses of simclr_fast.reference have one"
    )


def has_ambient_state() -> bool:
    """Whether a tensor that is created now may not be a plain one, and must not be cached.

    While modes (FakeTensorMode, a default device), transforms of torch.func or torch.compile are
    active, torch's functions may return other kinds of tensors.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def goes_straight_to_cuda(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would only pass these tensors of an op on to its kernel for CUDA.

    Then the kernel can be called without it. For a kernel in Python, the dispatcher takes the host
    about 10 µs. It is needed where something watches or changes ops: a mode, a transform, a tracer,
    a subclass of Tensor, or a tensor that is negated or filled with zeros only when it is read.
    """
    if has_ambient_state():
        return False
    for t in tensors:
        if t is None:
            continue
        if not t.is_cuda or type(t) not in _ORDINARY or t.is_neg() or t._is_zerotensor():
            return False
    return True


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    if device.type in _WITHOUT_FLOAT64:
        return torch.float32
    if device.type == "xpu" and torch.xpu.is_available():
        has_float64 = torch.xpu.get_device_properties(device).has_fp64
        return torch.float64 if has_float64 else torch.float32
    return torch.float64


def has_extension() -> bool:
    """Whether the compiled extension is loaded."""
    return EXTENSION_ERROR is None


def implementation_for(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    on_cuda: Implementation = Implementation.TRITON,
) -> Implementation:
    """The implementation that runs for this device and dtype. All ops use this rule.

    Plain torch runs for every device and dtype without a kernel. A RuntimeWarning gives the reason,
    once per process and reason.

    on_cuda: the kind of GPU kernels that the op has, TRITON or CUDA.
    """
    reason = why_plain(device, dtype, on_cuda=on_cuda)
    kind = device.type
    if reason is not None:
        if kind != "meta":
            _warn_once(kind, reason)
        return Implementation.PLAIN
    return Implementation.NATIVE if kind == "cpu" else on_cuda


def why_plain(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    on_cuda: Implementation = Implementation.TRITON,
) -> str | None:
    """Why plain torch runs for this device and dtype, and what to do; None if a kernel runs."""
    kind = device.type
    if kind == "meta":
        return "tensors of the meta device hold no values."
    if kind == "cpu":
        return _extension_missing()
    if kind != "cuda":
        return "the kernels are for the CPU and for NVIDIA GPUs."
    if device.index is not None and torch.cuda.is_initialized():
        return _why_plain_on_gpu(device, dtype, on_cuda)
    return _why_plain_on_gpu.__wrapped__(device, dtype, on_cuda)


@cache
def _why_plain_on_gpu(
    device: torch.device, dtype: torch.dtype, on_cuda: Implementation
) -> str | None:
    """Does not change in a process once CUDA is initialised, and takes the host a while to find."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs and this torch is built for ROCm."
    if on_cuda is Implementation.CUDA:
        return _extension_missing() or _no_cuda_code(_capability(device))
    if dtype == torch.float64:
        return "no kernel computes in float64. Use float32."
    return _no_triton_code(_capability(device)) or _triton_unusable(torch.cuda.is_initialized())


def _extension_missing() -> str | None:
    if EXTENSION_ERROR is None:
        return None
    advice = f"`{build_command()}` with a C++17 compiler builds it."
    if (other := hidden_copy()) is not None:
        advice = (
            f"The simclr_fast of the current folder hides the installed one, {other}: use the "
            f"command simclr-fast, or start Python in another folder. {advice}"
        )
    return f"the native extension is not loaded ({EXTENSION_ERROR}). {advice}"


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for the device of a fake tensor if CUDA is not initialised.

    If there is a real CUDA tensor, CUDA is initialised. For a fake one, asking must not do it.
    """
    if not torch.cuda.is_initialized():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_capability(index)


def _no_triton_code(capability: tuple[int, int] | None) -> str | None:
    if capability is None or capability >= TRITON_CAPABILITY:
        return None
    return (
        f"the Triton kernels need a GPU of compute capability {_dotted(TRITON_CAPABILITY)} or "
        f"higher, and this one has {_dotted(capability)}."
    )


@cache
def _triton_unusable(initialized: bool) -> str | None:
    """Why Triton cannot be used; None if it can.

    Cached separately for before and after CUDA's initialisation, as Triton's driver needs a GPU.
    """
    try:
        driver = import_module("triton.runtime").driver
        if initialized:
            # Compiles a small C module, so a missing compiler or header shows here.
            driver.active.get_current_device()
    except Exception as error:
        return (
            f"Triton cannot be used ({type(error).__name__}: {error}). It needs the triton package "
            "of this torch (`pip install triton`) and a C compiler."
        )
    return None


@cache
def _cuda_kernels() -> tuple[str, str]:
    """The GPU code in simclr_fast._C_cuda, such as "sm_80,sm_90", and why there is none, or "".

    Loaded on the first call. A fault in it leaves the CPU kernels as they are.
    """
    try:
        module = import_module("simclr_fast._C_cuda")
        if not torch._C._dispatch_has_kernel_for_dispatch_key("simclr_fast::lars_", "CUDA"):
            raise ImportError("it was built from another version's sources: no kernel of lars_")
    except ImportError as error:
        return "", str(error)
    return module.architectures(), ""


def _no_cuda_code(capability: tuple[int, int] | None) -> str | None:
    architectures, error = _cuda_kernels()
    if error:
        return (
            f"the extension's CUDA kernels are not loaded ({error}). "
            f"`{build_command('SIMCLR_FAST_CUDA=1')}` with CUDA's compiler nvcc builds them."
        )
    if capability is None or has_code(architectures, capability):
        return None
    command = build_command(f"TORCH_CUDA_ARCH_LIST={_dotted(capability)}")
    return (
        f"the native extension holds CUDA code for {architectures}, and this GPU has compute "
        f"capability {_dotted(capability)}. `{command}` builds code for it."
    )


def has_code(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU can run a binary with this code, such as "sm_75,sm_80,compute_120".

    Machine code (sm) runs on the same major version from its minor version on. PTX (compute) is
    compiled by the driver for any later GPU. Code of an "a" architecture runs on that one only.
    Source: NVIDIA CUDA programming guide, "Compute capabilities" and "Binary compatibility".
    """
    for name in architectures.split(","):
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        kind, built, variant = match[1], (int(match[2]), int(match[3])), match[4]
        same_major = built[0] == capability[0]
        if variant == "a":
            runs = built == capability
        elif kind == "sm" or variant == "f":
            runs = same_major and built <= capability
        else:
            runs = built <= capability
        if runs:
            return True
    return False


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


_given_reasons: set[tuple[str, str]] = set()


def _warn_once(device_type: str, reason: str) -> None:
    if (device_type, reason) not in _given_reasons:
        _given_reasons.add((device_type, reason))
        warnings.warn(
            f"simclr_fast runs plain torch operations on {device_type!r} tensors, which are "
            f"slower than its kernels: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
