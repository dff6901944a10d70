"""What ptxas says about the CUDA kernels: registers, spills and shared memory of each, as
``benchmarks/results/ptxas_<arch>.json``; where a ``cuobjdump`` is found, also what their machine code consists of.

    python benchmarks/ptxas_report.py --arch 80 90

Needs nvcc and no GPU. Ends with status 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kernel_sgd.cu", "kernel_adam.cu", "step.cu")
#: In a mangled name: the rule and the number of gradients.
STEP_KERNEL = re.compile(r"step_kernelILNS_4RuleE(\d)ELi(\d)E")
#: Instructions worth counting: 16-byte accesses to device and shared memory, and any access to local memory.
COUNTED = {
    "ldg_128": r"\bLDG\.E\.128",
    "stg_128": r"\bSTG\.E\.128",
    "lds_128": r"\bLDS\.128",
    "sts_128": r"\bSTS\.128",
    "local": r"\b(?:LDL|STL)\b",
}


def short_name(mangled: str) -> str:
    """``"step (adam, 2 gradients)"``."""
    if match := STEP_KERNEL.search(mangled):
        return f"step ({('sgd', 'adam')[int(match[1])]}, {match[2]} gradients)"
    return "upload" if "upload_kernel" in mangled else mangled


def compile_source(nvcc: str, source: str, arch: str, target: Path) -> str:
    """Compiles for one architecture and returns what ptxas reported."""
    command = [
        nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v",
        f'-DGRADPROM_CUDA_ARCHITECTURES="{arch}-real"', "-c", str(ROOT / "csrc" / "cuda" / source), "-o", str(target),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(run.stderr)
    return run.stderr


def resources(report: str) -> dict[str, dict[str, int]]:
    """Registers, spills and memory of each kernel in a report of ``ptxas -v``."""
    kernels: dict[str, dict[str, int]] = {}
    for name, text in re.findall(
        r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", report, re.DOTALL
    ):

        def number(pattern: str, text: str = text) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        kernels[short_name(name)] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "static_shared_bytes": number(r"(\d+) bytes smem"),
        }
    return kernels


def instructions(cuobjdump: str, target: Path, arch: str) -> dict[str, dict[str, int]]:
    """Number of instructions of each kernel, and of those in :data:`COUNTED`."""
    command = [cuobjdump, "--dump-sass", "--gpu-architecture", f"sm_{arch}", str(target)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels: dict[str, dict[str, int]] = {}
    for block in run.stdout.split("Function : ")[1:]:
        name, _, code = block.partition("\n")
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)", code, re.MULTILINE)
        counts = {key: sum(bool(re.search(pattern, line)) for line in lines) for key, pattern in COUNTED.items()}
        kernels[short_name(name.strip())] = {"instructions": len(lines), **counts}
    return kernels


def find_cuobjdump() -> str | None:
    """On the path, or in the copy that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="compute capabilities without the dot")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None:
        sys.exit("nvcc was not found")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    args.out.mkdir(parents=True, exist_ok=True)
    spills = False
    for arch in args.arch:
        kernels: dict[str, dict[str, Any]] = {}
        for source in SOURCES:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "kernel.o"
                kernels |= resources(compile_source(nvcc, source, arch, target))
                for name, counts in (instructions(cuobjdump, target, arch) if cuobjdump else {}).items():
                    kernels[name] |= counts
        kernels = dict(sorted(kernels.items()))
        match = re.search(r"release ([\d.]+)", version)
        report = {
            "command": f"python benchmarks/ptxas_report.py --arch {arch}",
            "nvcc": match[1] if match else "unknown",
            "arch": f"sm_{arch}",
            "kernels": kernels,
        }
        (args.out / f"ptxas_{arch}.json").write_text(json.dumps(report, indent=2) + "\n")
        print(f"sm_{arch}")
        for name, k in kernels.items():
            local = f", {k['instructions']} instructions, {k['local']} of them local" if "local" in k else ""
            print(f"  {name:<26}{k['registers']:>4} registers, {k['spill_stores']} + {k['spill_loads']} bytes spilled"
                  f"{local}")  # fmt: skip
            spills = spills or k["spill_stores"] + k["spill_loads"] > 0
    return int(spills)


if __name__ == "__main__":
    sys.exit(main())
