"""Packaging. `kernels/` and `integrations/` are folders that hold packages; they are not packages themselves."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
FOLDERS = {"kernels": "kif_kernels*", ".": "kif_runtime*", "integrations": "kif_*"}

package_dir: dict[str, str] = {}
packages: list[str] = []
for folder, pattern in FOLDERS.items():
    found = find_packages(str(HERE / folder), include=[pattern])
    packages += found
    package_dir |= {name: name if folder == "." else f"{folder}/{name}" for name in found if "." not in name}

DATA = ("json", "jsonl", "txt", "html", "jinja", "safetensors")
BAKE = ["peft>=0.18", "accelerate>=1.1"]
REPORT = ["jinja2>=3.1"]
AUDIT = ["scikit-learn>=1.5", *REPORT]
CERTIFICATE = ["cryptography>=42"]
DEMO = ["gguf>=0.17", "accelerate>=1.1", *REPORT]  # what transformers needs to read the embedded model's GGUF file
BENCH = ["pytest>=8", "pytest-benchmark>=5", "concept-erasure>=0.2.4"]  # the last: LEACE, by its authors
# torch brings triton only where it brings CUDA; its interpreter and its compilers need no GPU
ROUGE = ["rouge>=1.0", "rouge-score>=0.1.2"]  # what ROUGE-L is compared with
TEST = ["hypothesis>=6.100", "pytest-xdist>=3.6", "jsonschema>=4.20", "triton>=3.5; sys_platform == 'linux'", *ROUGE]

setup(
    name="kif-runtime",
    version=re.search(r'__version__ = "(.+)"', (HERE / "kif_runtime/__init__.py").read_text()).group(1),
    description="Erase what a language model knows about a subject: find its signature, suppress it, bake it in.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={"": [*(f"**/*.{end}" for end in DATA), "py.typed"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0,<5.20",
        "safetensors>=0.5",
        "numpy>=2.0",
        "scipy>=1.13",
        "filelock>=3.12",
        "typer>=0.15",
        "rich>=13.8",
    ],
    extras_require={
        "vllm": ["vllm>=0.32,<0.33"],
        "bake": BAKE,
        "report": REPORT,
        "audit": AUDIT,
        "certificate": CERTIFICATE,
        "demo": DEMO,
        "bench": BENCH,
        "dev": [*AUDIT, *BAKE, *BENCH, *CERTIFICATE, *DEMO, *TEST, "ruff>=0.9", "mypy>=1.14"],
    },
    entry_points={
        "console_scripts": ["kif=kif_cli.main:main"],
        "vllm.general_plugins": ["kif=kif_vllm.plugin:register"],
        "vllm.endpoint_plugins": ["kif=kif_vllm.plugin:endpoints"],
    },
)
