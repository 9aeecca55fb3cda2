"""A pretended NVIDIA GPU: the project's launchers run with CPU tensors, and nothing is launched.

Inside `pretended_gpu` the public functions take the route of CUDA tensors up to the launch. What
Triton would compile and launch is recorded with everything that the launch specialises on: dtypes,
divisibility by 16, integers equal to 1, constants and options. A `Launch` can then be compiled.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import ir, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from simclr_fast.kernels import nt_xent_configs
from simclr_fast.ops import library, nt_xent

# Multiprocessors of one GPU of each architecture: A100, RTX 3090, Orin, RTX 4090, H100, B200, B300,
# RTX 5090, GB10.
_FIRST_GPU = torch.device("cuda", 0)
PROCESSORS = {80: 108, 86: 82, 87: 16, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170, 121: 48}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, as the launcher asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    target: GPUTarget

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def __str__(self) -> str:
        """Types and constants; D16 marks what is a multiple of 16."""
        names, values = self.kernel.arg_names, self.named
        aligned = {names[path[0]] for path, value in self.attributes.items() if value}
        given = [
            f"{n}={values[n]}" if n in values else f"{n}:{t}{'D16' if n in aligned else ''}"
            for n, t in self.signature.items()
        ]
        return f"{self.name}[sm_{self.target.arch}]({', '.join(given)})"

    @property
    def named(self) -> dict[str, Any]:
        """The constants by their names."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}

    @property
    def variant(self) -> str:
        """Everything for which Triton compiles anew, with the architecture."""
        return f"{self.name} {self.signature} {self.constants} {self.attributes} {self.options}"

    @property
    def program(self) -> str:
        """What Triton's front end sees: the architecture and the number of warps do not count."""
        return f"{self.name} {self.signature} {self.constants} {self.attributes}"

    def compile(self) -> Any:
        """To machine code."""
        return triton.compile(self._source(), target=self.target, options=self.options.__dict__)

    def check_language(self) -> None:
        """Only Triton's front end, in a twentieth of the time: raises what the language refuses."""
        backend = make_backend(self.target)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(self.options)
        modules = backend.get_module_map()
        self._source().make_ir(self.target, self.options, functions, modules, context)

    def _source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


class _Driver:
    """Enough of a CUDA driver for a launch; a device index per architecture keeps caches apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _CudaRoute(TorchDispatchMode):
    """Sends the project's operators to what is registered for CUDA."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "simclr_fast":
            return func._op_dk(_key(func), *args, **kwargs or {})
        return func(*args, **kwargs or {})


def _key(func) -> torch._C.DispatchKey:
    """The dispatch key under which the kernel for CUDA tensors is registered."""
    own = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")
    keys = torch._C.DispatchKey
    return keys.CUDA if own else keys.CompositeExplicitAutograd


@contextmanager
def cuda_route(arch: int) -> Iterator[None]:
    """CPU tensors take the route of CUDA tensors, planned for compute capability arch / 10."""
    gpu = nt_xent_configs.Gpu(divmod(arch, 10), PROCESSORS.get(arch, 48))

    def same(tensor, *args, **kwargs):
        return tensor

    def as_on_cuda(device, dtype=torch.float32, *, on_cuda=library.Implementation.TRITON):
        return choose(torch.device("cuda"), dtype, on_cuda=on_cuda)

    choose = library.implementation_for
    users = [m for name, m in sys.modules.items() if name.startswith("simclr_fast.")]
    users = [m for m in users if getattr(m, "implementation_for", None) is choose]
    patches = [
        *((module, "implementation_for", as_on_cuda) for module in users),
        (library, "_triton_unusable", lambda initialized: None),
        (torch.Tensor, "is_cuda", True),
        (torch.Tensor, "pin_memory", same),
        (nt_xent_configs, "gpu_of", lambda device: gpu),
        (torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_of", lambda tensor: nullcontext()),
        (torch.cuda, "device", lambda device: nullcontext()),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
    ]
    with _patched(patches), _CudaRoute():
        yield


@contextmanager
def pretended_gpu(arch: int) -> Iterator[list[Launch]]:
    """List what the launchers inside would run on a GPU of compute capability arch / 10."""
    launches: list[Launch] = []
    run, grids = JITFunction.run, []

    def record_grid(self, *args, grid, warmup, **options):
        grids.append(tuple(grid))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    def record_launch(self, key, signature, device, constexprs, options, attrs, warmup):
        target = driver.active.get_current_target()
        launches.append(Launch(self, grids[-1], signature, constexprs, attrs, options, target))
        # Without a compiled kernel Triton's run returns before the launch.

    patches = [
        (driver, "_active", _Driver(arch)),
        (JITFunction, "run", record_grid),
        (JITFunction, "_do_compile", record_launch),
    ]
    with _patched(patches), cuda_route(arch):
        yield launches


class _Compiled:
    """Stands for a compiled kernel, whose launch does nothing."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, *args):
        pass


@contextmanager
def empty_launches(arch: int) -> Iterator[None]:
    """What the host does for NT-Xent on a GPU, without the kernels: for measuring its time.

    CPU tensors go through the dispatcher, the launchers and Triton's own launch as CUDA tensors
    would. Unlike `cuda_route`, this adds nothing to the path of a call.
    """
    gpu = nt_xent_configs.Gpu(divmod(arch, 10), PROCESSORS[arch])

    def compile_nothing(self, key, *args):
        kernel = _Compiled()
        self.device_caches[arch][0][key] = kernel
        return kernel

    choose = library.implementation_for

    def as_on_cuda(device, dtype=torch.float32, *, on_cuda=library.Implementation.TRITON):
        return choose(_FIRST_GPU, dtype, on_cuda=on_cuda)

    users = [m for name, m in sys.modules.items() if name.startswith("simclr_fast.")]
    users = [m for m in users if getattr(m, "implementation_for", None) is choose]
    patches = [
        *((module, "implementation_for", as_on_cuda) for module in users),
        (library, "_triton_unusable", lambda initialized: None),
        (torch.Tensor, "is_cuda", True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
        (nt_xent_configs, "gpu_of", lambda device: gpu),
        (driver, "_active", _Driver(arch)),
        (JITFunction, "_do_compile", compile_nothing),
    ]
    # In place of the extension's CPU kernels, as where CUDA tensors find none.
    overrides = torch.library.Library("simclr_fast", "IMPL")
    with _patched(patches), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*kernel for operator")
        for name, kernel in {
            "nt_xent": nt_xent._loss,
            "nt_xent_backward": nt_xent._backward,
        }.items():
            overrides.impl(name, kernel, "CPU", allow_override=True)
        library._why_plain_on_gpu.cache_clear()
        try:
            yield
        finally:
            library._why_plain_on_gpu.cache_clear()
            overrides._destroy()


@contextmanager
def _patched(patches: list[tuple[Any, str, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def other_launches(step: Callable[[], object]) -> list[str]:
    """The torch operators of a step that launch a kernel of their own on a GPU, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return [name for e in profile.events() if e.cpu_parent is None for name in _launching(e)]


# Operators that launch nothing: they make a tensor or a view, or read a value, which the project
# never does with a CUDA tensor.
_NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_"),
    *("detach", "detach_", "lift_fresh", "_local_scalar_dense"),
}


def _launching(event: Any) -> list[str]:
    """The event's name if it launches; the events inside it if it is made of others."""
    inside = [name for child in event.cpu_children for name in _launching(child)]
    if not event.name.startswith("aten::"):
        return inside
    name = event.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    overloads = [o for o in overloads if torch._C._dispatch_has_kernel(o.name())]
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if all(o.has_kernel_for_dispatch_key(composite) for o in overloads):
        return inside
    free = name in _NO_LAUNCH or any(o.is_view for o in overloads)
    return [] if free else [name]
