"""What compiled code says of itself: NVIDIA's from the disassembler that ships with Triton, AMD's from its assembly."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from linecache import getline
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# A source line that loads or stores whole rows names its columns, or a pointer `…at` that was made with them.
_ROW = re.compile(r"tl\.(load|store)\((\w*at\b|[^,]*\bcolumn\b)")
_NVIDIA = re.compile(r"\b(LDGSTS|LDG|STG|LDL|STL)\b((?:\.\w+)*)")  # not LDGDEPBAR, which moves nothing
_AMD = re.compile(r"\b(?:buffer|global|flat)_(load|store)_(\w+)")
_AMD_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "b32": 32, "b64": 64, "b128": 128}
_AMD_BITS |= {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "short_d16": 16}


@dataclass(frozen=True)
class Resources:
    """registers per thread; spills: loads and stores of spilt ones (AMD: how many are spilt); local: bytes a thread."""

    registers: int
    spills: int
    local: int


@dataclass(frozen=True)
class Access:
    """`count` instructions of `bits` for global memory, made from one line of source. of_row: it moves whole rows."""

    kind: str
    bits: int
    count: int
    file: str
    line: int

    @property
    def of_row(self) -> bool:
        return _ROW.search(getline(self.file, self.line)) is not None


def read(asm: dict[str, Any], amd: bool) -> tuple[Resources, tuple[Access, ...]]:
    """`asm` as Triton gives it."""
    return _of_amd(asm["amdgcn"]) if amd else _of_nvidia(asm["cubin"])


def _of_nvidia(cubin: bytes) -> tuple[Resources, tuple[Access, ...]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-g", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    found: Counter[tuple[str, int, str, int]] = Counter()
    spills, place = 0, ("", 0)
    for text in listing.splitlines():
        if at := re.search(r'//## File "([^"]+)", line (\d+)', text):
            place = (at[1], int(at[2]))
        elif instruction := _NVIDIA.search(text):
            name, suffixes = instruction.groups()
            if name in ("LDL", "STL"):
                spills += 1
            else:
                found["store" if name == "STG" else "load", _nvidia_bits(suffixes), *place] += 1
    return Resources(used["REG"], spills, used["STACK"] + used["LOCAL"]), _accesses(found)


def _nvidia_bits(suffixes: str) -> int:
    width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffixes)
    return int(width[1]) if width else 32


def _of_amd(assembly: str) -> tuple[Resources, tuple[Access, ...]]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    files = {n: f"{folder}/{name}" for n, folder, name in re.findall(r'\.file\s+(\d+)\s+"(.*?)"\s+"(.*?)"', assembly)}
    found: Counter[tuple[str, int, str, int]] = Counter()
    place = ("", 0)
    for text in assembly.splitlines():
        if at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text):
            place = (files.get(at[1], ""), int(at[2]))
        elif (instruction := _AMD.search(text)) and instruction[2] in _AMD_BITS:
            found[instruction[1], _AMD_BITS[instruction[2]], *place] += 1
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    registers = number("vgpr_count") + number("agpr_count")
    return Resources(registers, spills, number("private_segment_fixed_size")), _accesses(found)


def _accesses(found: Counter[tuple[str, int, str, int]]) -> tuple[Access, ...]:
    return tuple(Access(kind, bits, count, file, line) for (kind, bits, file, line), count in sorted(found.items()))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
