#!/usr/bin/env python3
"""
Under which licences the locked packages are, and which known vulnerabilities they have.

Run by `make audit`, with the Python of `.venv`. Exit codes: 0, all is well; 1, a licence is not allowed, or a
vulnerability is known; 3, the licences are well, and whether there are vulnerabilities is NOT known, since no database
of them could be reached, or not for every package.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path


LOCK = Path(__file__).parents[1] / "requirements.lock"
PIP_AUDIT = "pip-audit==2.10.1"
FOUND, NOT_KNOWN = 1, 3

ALLOWED = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0"),
    *("CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib"),
}
"""Of what may be installed beside this package without a further thought."""

_NVIDIA = (
    *("nvidia-cublas", "nvidia-cuda-cccl", "nvidia-cuda-cupti", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"),
    *("nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-cufile", "nvidia-cusolver", "nvidia-cusparse"),
    *("nvidia-nccl-cu13", "nvidia-nvjitlink", "nvidia-nvshmem-cu13", "nvidia-nvtx"),
)
# What is under no such licence, and why it may be there. None of it is in what this project distributes.
EXCEPTIONS = {
    "easydict": ("LGPL-3.0-only", "imported, as it comes, by the LIBERO simulator; an extra"),
    "cuda-toolkit": ("", "NVIDIA's: names the libraries below"),
    **dict.fromkeys(_NVIDIA, ("LicenseRef-NVIDIA-Proprietary", "comes with PyTorch for GPUs")),
    "nvidia-cusparselt-cu13": ("NVIDIA Proprietary Software", "comes with PyTorch for GPUs"),
}

# In the order of trust: an expression of SPDX, the classifiers, the field "License", the beginning of the file.
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_TEXTS = {"MIT License": "MIT", "Apache License": "Apache-2.0", "Apache 2.0 License": "Apache-2.0"}


def locked(lock: Path = LOCK) -> set[str]:
    """Names of the packages in the lock file, as indexes write them."""
    lines = lock.read_text().splitlines()
    return {normalised(match[0]) for line in lines if (match := re.match(r"[A-Za-z0-9][\w.-]*(?===)", line))}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(package: Distribution) -> str:
    """The licence that an installed package says it is under, in SPDX's words as far as possible; `""` of none."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier") or ()]
    if found := [_CLASSIFIERS[each] for each in classifiers if each in _CLASSIFIERS]:
        return " AND ".join(found)
    said = (metadata.get("License") or "").strip()
    if said in ("", "UNKNOWN"):
        said = _beginning(package)
    return next((short for text, short in _TEXTS.items() if said.startswith(text)), said.split("\n")[0])


def _beginning(package: Distribution) -> str:
    for file in package.files or ():
        if ".dist-info" in str(file) and file.name.upper().startswith("LICENSE"):
            return file.read_text().strip()
    return ""


def parts(expression: str) -> list[str]:
    """The licences in an expression: all of those that it joins, also those that one may choose between."""
    return [part for part in re.split(r"\s+(?:AND|OR)\s+|[()]", expression) if part.strip()]


def refused(packages: Iterable[Distribution], names: set[str]) -> Iterator[str]:
    """What is wrong with the licences of the named packages, a line each."""
    for package in packages:
        name, found = normalised(package.metadata["Name"]), licence(package)
        if name not in names or (name in EXCEPTIONS and EXCEPTIONS[name][0] == found):
            continue
        if not found or not set(parts(found)) <= ALLOWED:
            yield f"{name} {package.version} is under {found or 'no licence that it tells'!r}"


def report_licences() -> bool:
    """Prints the licences of what is locked and installed; whether all are allowed."""
    names, packages = locked(), list(distributions())
    grouped = defaultdict(list)
    for package in packages:
        if (name := normalised(package.metadata["Name"])) in names:
            grouped[licence(package)].append(name)
    for found, under in sorted(grouped.items()):
        print(f"{found or 'not told'}: {', '.join(sorted(under))}")
    wrong = list(refused(packages, names))
    for line in wrong:
        print(f"NOT ALLOWED: {line}; see ALLOWED and EXCEPTIONS in {Path(__file__).name}", file=sys.stderr)
    return not wrong


def report_vulnerabilities() -> int:
    """Asks pip-audit, in an environment of its own; an exit code."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            # First for one: an index without a database need not be told all others.
            first = Path(folder) / "requirements.txt"
            first.write_text(next(re.finditer(r"^\S+==\S+", LOCK.read_text(), re.MULTILINE))[0] + "\n")
            report = _pip_audit(first)
            if not any("skip_reason" in package for package in report):
                report = _pip_audit(LOCK)
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
        return _not_known(f"pip-audit gave no report ({type(error).__name__})")
    return read_report(report)


def _pip_audit(requirements: Path) -> list[dict]:
    command = [Path(sys.executable).with_name("uv"), "tool", "run", "--from", PIP_AUDIT, "pip-audit"]
    command += ["--requirement", requirements, "--no-deps", "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(ended.stdout)["dependencies"]


def read_report(report: list[dict]) -> int:
    """An exit code for pip-audit's list of packages, after it was told. A package that it skipped is not well."""
    vulnerable = [package for package in report if package.get("vulns")]
    for package in vulnerable:
        for one in package["vulns"]:
            fixed = ", ".join(one.get("fix_versions", ())) or "none yet"
            print(
                f"VULNERABLE: {package['name']} {package['version']}: {one['id']}, mended in {fixed}", file=sys.stderr
            )
    skipped = [package["name"] for package in report if "skip_reason" in package]
    if vulnerable:
        return FOUND
    if skipped or not report:
        return _not_known(f"the database had nothing on {len(skipped)} of {len(report)} packages")
    print(f"no known vulnerability in {len(report)} packages")
    return 0


def _not_known(why: str) -> int:
    print(
        f"NOT AUDITED for vulnerabilities: {why}; repeat `make audit` where pypi.org can be reached", file=sys.stderr
    )
    return NOT_KNOWN


if __name__ == "__main__":
    sys.exit(report_vulnerabilities() if report_licences() else FOUND)
