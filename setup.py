"""Builds the native extension: simclr_fast/_C.abi3.so, and with nvcc simclr_fast/_C_cuda.abi3.so.
Everything else is in pyproject.toml.

Environment variables:

SIMCLR_FAST_BUILD_EXT=0       do not build it: no compiler is needed, and plain torch is used
SIMCLR_FAST_CUDA=auto|0|1     auto: with CUDA kernels if torch has CUDA and an nvcc for it works
TORCH_CUDA_ARCH_LIST          GPUs to compile for, as torch reads it; by default all that nvcc knows
CXXFLAGS                      further flags; they come last, so that -O1 or -g take effect
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# The stable ABIs of torch 2.10 and Python 3.10: one binary for these and all later versions.
ABI_MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
# Those that nvcc knows are compiled. CUDA 13 dropped older ones, CUDA 12.8 added the last two.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
LINKED = {("simclr_fast", "kernels"), ("simclr_fast", "benchmarks")}
USER_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
KERNEL_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]


AVX512 = [
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
    *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
]
# Each csrc/*_kernel.cpp is compiled once per entry; csrc/isa.h picks one at run time.
INSTRUCTION_SETS = {"base": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512}
# The same for csrc/nt_xent*_kernel.cpp and bfloat16 inputs.
BF16_FLAGS = [*AVX512, "-mavx512bf16", "-DSIMCLR_BF16"]
BF16_INSTRUCTION_SETS = {"avx512_bf16": BF16_FLAGS, "amx": [*BF16_FLAGS, "-DSIMCLR_AMX"]}


def compile_units(compiler: Any, folder: str, kernels: list[str]) -> dict[str, tuple]:
    """Instruction set → its flags and the kernels to compile for it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"base": ([], kernels)}
    units = {isa: (flags, kernels) for isa, flags in INSTRUCTION_SETS.items()}
    if knows_bf16(compiler, folder):
        half = [kernel for kernel in kernels if "nt_xent" in kernel]
        units |= {isa: (flags, half) for isa, flags in BF16_INSTRUCTION_SETS.items()}
    return units


def knows_bf16(compiler: Any, folder: str) -> bool:
    """Whether compiler and assembler know AVX512_BF16 and AMX: GCC from 11 on, clang from 12 on."""
    trial = Path(folder, "bf16_trial.cpp")
    trial.parent.mkdir(parents=True, exist_ok=True)
    trial.write_text('void trial() { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }\n')
    try:
        compiler.compile([str(trial)], output_dir=folder, extra_postargs=BF16_FLAGS)
    except CompileError:
        print("simclr_fast: no bfloat16 kernels: this compiler lacks them", file=sys.stderr)
        return False
    return True


class NoCuda(Exception):
    """Why the CUDA kernels cannot be compiled here."""


def find_cuda() -> bool:
    """Whether to compile the CUDA kernels. Sets TORCH_CUDA_ARCH_LIST if the user has not."""
    wanted = os.environ.get("SIMCLR_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SIMCLR_FAST_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0" or not glob("csrc/*.cu"):
        return False
    try:
        check_cuda(wanted)
    except NoCuda as reason:
        if wanted == "1":
            raise SystemExit(f"SIMCLR_FAST_CUDA=1, but {reason}") from None
        print(f"simclr_fast: no CUDA kernels are compiled, as {reason}", file=sys.stderr)
        return False
    print(f"simclr_fast: CUDA kernels for {', '.join(compiled_architectures())}", file=sys.stderr)
    return True


def check_cuda(wanted: str) -> None:
    """Raises NoCuda unless there is an nvcc that knows the architectures and compiles.

    wanted: with "auto", torch must have CUDA too, not older than nvcc's: its driver may be too old
    for the code. With "1" any torch will do, as the binary depends on none's CUDA.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if wanted == "auto" and not torch.version.cuda:
        raise NoCuda("this torch has no CUDA (torch.version.cuda is None)")
    nvcc = CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc or not nvcc.exists():
        raise NoCuda(f"there is no nvcc (CUDA_HOME is {CUDA_HOME})")
    release = re.search(r"release (\d+)\.", run_nvcc(nvcc, "--version"))
    if not release:
        raise NoCuda(f"{nvcc} is from an unknown CUDA")
    if wanted == "auto" and int(release[1]) > int(torch.version.cuda.split(".")[0]):
        raise NoCuda(
            f"{nvcc} is from CUDA {release[1]}, but torch is built for CUDA {torch.version.cuda}"
        )
    known = set(re.findall(r"sm_\d+", run_nvcc(nvcc, "--list-gpu-code")))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        usable = [a for a in CUDA_ARCHITECTURES if "sm_" + a.replace(".", "") in known]
        if not usable:
            raise NoCuda(f"{nvcc} knows none of {', '.join(CUDA_ARCHITECTURES)}")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(usable) + "+PTX"
    asked = os.environ["TORCH_CUDA_ARCH_LIST"]
    try:
        names = compiled_architectures()
    except ValueError as error:
        raise NoCuda(f"torch does not read TORCH_CUDA_ARCH_LIST={asked}: {error}") from None
    for name in names:
        if re.sub(r"compute_(\d+).*", r"sm_\1", name).rstrip("af") not in known:
            raise NoCuda(f"{nvcc} does not know {name} of TORCH_CUDA_ARCH_LIST={asked}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text("#include <cuda_fp16.h>\n__global__ void trial() {}\n")
        run_nvcc(nvcc, "-c", str(source), "-o", str(source.with_suffix(".o")))


def run_nvcc(nvcc: Path, *arguments: str) -> str:
    command = [str(nvcc), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise NoCuda(f"{nvcc} does not run: {error}") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        raise NoCuda(f"`{' '.join(command)}` failed: {' '.join(said[:3])}") from None


def toolkit_libraries() -> list[str]:
    """The toolkit's folders of libraries, as nvcc reports them. CUDA_HOME may be wrong if nvcc is a
    link or a wrapper script."""
    from torch.utils.cpp_extension import CUDA_HOME

    command = [str(Path(CUDA_HOME, "bin", "nvcc")), "--dryrun", "-c", "-x", "cu", os.devnull]
    dry_run = subprocess.run(command, capture_output=True, text=True).stderr
    root = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    folders = [Path(root[1].strip(), name) for name in ("lib64", "lib")] if root else []
    return [str(folder) for folder in folders if folder.is_dir()]


def architecture_flags() -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    return list(dict.fromkeys(_get_cuda_arch_flags()))


def compiled_architectures() -> list[str]:
    """Names of the code that nvcc will be asked for, such as sm_80 and compute_120 (PTX)."""
    return sorted({flag.rpartition("code=")[2] for flag in architecture_flags()})


def check_compiler() -> None:
    """End with what to do if there is no C++ compiler. MSVC is found by setuptools itself."""
    if sys.platform == "win32":
        return
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None and shutil.which("c++") is None:
        raise SystemExit(
            f"simclr_fast: the C++ compiler {compiler!r} is missing. Install one (on Debian and "
            "Ubuntu: apt install g++), or set SIMCLR_FAST_BUILD_EXT=0 to install without the C++ "
            "kernels: plain torch computes then, slower"
        )


def extension_options() -> dict:
    commands = {"sdist": SourceDistribution}
    # The kernels are written for GCC and Clang. Windows gets plain torch.
    default = "0" if sys.platform == "win32" else "1"
    if os.environ.get("SIMCLR_FAST_BUILD_EXT", default) == "0":
        return {"cmdclass": commands}
    check_compiler()
    from torch.utils import cpp_extension

    kernels = sorted(glob("csrc/*_kernel.cpp"))
    cuda_sources = sorted(glob("csrc/*cuda*.cpp"))
    sources = sorted(set(glob("csrc/*.cpp")) - {*kernels, *cuda_sources})
    debug = any(flag.startswith("-g") for flag in USER_FLAGS)
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": [
            "-std=c++17",
            "-O3",
            "-fvisibility=hidden",
            *ABI_MACROS,
            *USER_FLAGS,
        ],
        # Python's own flags have -g, and debug symbols are most of the binary.
        "extra_link_args": ["-Wl,-s"] if sys.platform == "linux" and not debug else [],
        "py_limited_api": True,
        "depends": [*kernels, *glob("csrc/*.h"), *glob("csrc/*.cu")],
    }
    extensions = [cpp_extension.CppExtension("simclr_fast._C", sources, **options)]
    if find_cuda():
        architectures = ",".join(compiled_architectures())
        options["extra_compile_args"] = [
            *options["extra_compile_args"],
            "-DUSE_CUDA",
            f"-DSIMCLR_CUDA_ARCHITECTURES={architectures}",
        ]
        # Linked statically and hidden: torch loads a runtime of its own, maybe of another version.
        options["extra_link_args"] = [*options["extra_link_args"], "-Wl,--exclude-libs,ALL"]
        options["library_dirs"] = toolkit_libraries()
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        extensions.append(
            cpp_extension.CppExtension("simclr_fast._C_cuda", cuda_sources, **options)
        )

    class Build(cpp_extension.BuildExtension):
        def build_extension(self, ext):
            if ext.name.endswith("_cuda"):
                ext.extra_objects += self.compile_cuda()
            else:
                units = compile_units(self.compiler, self.build_temp, kernels)
                if "amx" in units:
                    ext.define_macros.append(("SIMCLR_WITH_BF16", None))
                for isa, (flags, sources_of_isa) in units.items():
                    ext.extra_objects += self.compiler.compile(
                        sources_of_isa,
                        output_dir=os.path.join(self.build_temp, isa),
                        include_dirs=["csrc"],
                        macros=[("SIMCLR_ISA", isa)],
                        extra_postargs=KERNEL_FLAGS + flags + USER_FLAGS,
                        depends=glob("csrc/*.h"),
                    )
            super().build_extension(ext)

        def compile_cuda(self):
            """csrc/*.cu know nothing of torch. nvcc is called here, as BuildExtension refuses an
            nvcc of another CUDA than torch's."""
            nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            if "compress-mode" in run_nvcc(nvcc, "--help"):
                flags.append("--compress-mode=size")
            objects = []
            for source in sorted(glob("csrc/*.cu")):
                objects.append(os.path.join(self.build_temp, f"{Path(source).stem}.cu.o"))
                Path(objects[-1]).parent.mkdir(parents=True, exist_ok=True)
                command = [str(nvcc), *flags, *architecture_flags(), "-Icsrc", "-c", source]
                subprocess.run([*command, "-o", objects[-1]], check=True)
            return objects

    return {
        "ext_modules": extensions,
        "cmdclass": commands | {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def link_packages() -> None:
    """Make simclr_fast/kernels and simclr_fast/benchmarks, links to the folders at the top.

    A clone has them. A source distribution holds the files once, and so no links.
    """
    for package, name in LINKED:
        link = ROOT / package / name
        if link.is_dir():
            continue
        # On Windows git may write a link as a file that holds the path.
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(Path("..", name), target_is_directory=True)
        except OSError:
            shutil.copytree(ROOT / name, link)


class SourceDistribution(sdist):
    """Keeps links to files: pages of docs/ are links to files at the top, and link from there.
    Leaves out the folders that `link_packages` makes."""

    def make_release_tree(self, base_dir, files):
        files = [f for f in files if Path(f).parts[:2] not in LINKED]
        super().make_release_tree(base_dir, files)
        for source in filter(os.path.islink, files):
            copy = Path(base_dir, source)
            copy.unlink()
            copy.symlink_to(os.readlink(source))


def repository() -> str | None:
    """The address of the repository, which GitHub's workflows name; None elsewhere."""
    name = os.environ.get("GITHUB_REPOSITORY")
    return name and f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}"


def readme() -> str:
    """README.md. A package index shows it alone, so links to files name the repository."""
    text = (ROOT / "README.md").read_text("utf-8")
    if home := repository():
        text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{home}/raw/HEAD/", text)
        text = re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:)", rf"\1{home}/blob/HEAD/", text)
    return text


def project_urls() -> dict[str, str]:
    """The addresses in the metadata."""
    urls = {"Method": "https://arxiv.org/abs/2002.05709"}
    if home := repository():
        urls |= {"Source": home, "Issues": f"{home}/issues"}
        urls |= {"Documentation": f"{home}/tree/HEAD/docs"}
        urls |= {"Changelog": f"{home}/blob/HEAD/CHANGELOG.md"}
    return urls


link_packages()
packages = [
    "simclr_fast",
    *(f"simclr_fast.{p.parent.name}" for p in sorted(ROOT.glob("simclr_fast/*/__init__.py"))),
    "simclr_fast.assets",
    "simclr_fast.kernels",
    "simclr_fast.benchmarks",
]
setup(
    packages=packages,
    # So an editable install puts this folder on Python's path, where type checkers look as well.
    package_dir={"": "."},
    include_package_data=False,
    package_data={
        "simclr_fast": ["py.typed"],
        # Not the licence of the images, which is among the metadata.
        "simclr_fast.assets": ["*.html", "*.xz"],
        "simclr_fast.kernels": ["*.md"],
    },
    license="MIT",
    license_files=["LICENSE", "simclr_fast/assets/LICENSE.fashion-mnist"],
    project_urls=project_urls(),
    long_description=readme(),
    long_description_content_type="text/markdown",
    **extension_options(),
)
