#!/usr/bin/env python3
"""Hold a wheel and an sdist against what a release has to be: `scripts/check_dist.py DIRECTORY`."""

import re
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "multiverse_gateway"
LARGEST = {".whl": 3_000_000, ".gz": 6_000_000}
"""Bytes."""
LEFT_OUT = ("__pycache__", ".pyc")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml", "noxfile.py", "deploy/install.sh", "examples/README.md")


def problems(directory: Path) -> list[str]:
    """Say what is wrong with the two files in a directory."""
    wheels, sdists = list(directory.glob("*.whl")), list(directory.glob("*.tar.gz"))
    if (len(wheels), len(sdists)) != (1, 1):
        return [f"{directory} holds {len(wheels)} wheels and {len(sdists)} sdists instead of one of each"]
    found = [
        f"{path.name} has {path.stat().st_size:,} bytes, more than {LARGEST[path.suffix]:,}"
        for path in (*wheels, *sdists)
        if path.stat().st_size > LARGEST[path.suffix]
    ]
    return found + wheel_problems(wheels[0]) + sdist_problems(sdists[0])


def wheel_problems(path: Path) -> list[str]:
    """The wheel holds our package, whole, and nothing else."""
    wanted = {
        file.relative_to(PACKAGE.parent).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and not any(word in str(file) for word in LEFT_OUT)
    }
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = {name for name in names if ".dist-info/" in name}
        (metadata,) = (name for name in info if name.endswith("/METADATA"))
        about = BytesParser().parsebytes(archive.read(metadata))
    found = [f"{path.name} lacks {name}" for name in sorted(wanted - names)]
    found += [f"{path.name} has {name}, which is no part of the package" for name in sorted(names - info - wanted)]
    if not any(name.endswith("licenses/LICENSE") for name in info):
        found.append(f"{path.name} lacks the licence")
    if about["Version"] != version():
        found.append(f"{path.name} says version {about['Version']}, the package {version()}")
    fields = ("Summary", "License-Expression", "Requires-Python")
    return found + [f"{path.name} says nothing about {field}" for field in fields if not about[field]]


def sdist_problems(path: Path) -> list[str]:
    """The sdist holds what is needed to build, test and read."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    unwanted = sorted(name for name in names if any(word in name for word in (*LEFT_OUT, ".git/")))
    return [f"{path.name} lacks {name}" for name in SOURCES if name not in names] + [f"{path.name} has {name}" for name in unwanted]


def version() -> str:
    """Return the version that the source says."""
    match = re.search(r'__version__ = "([^"]+)"', (PACKAGE / "_version.py").read_text(encoding="utf-8"))
    assert match is not None
    return match[1]


def main() -> int:
    """Check; return the exit code."""
    found = problems(Path(sys.argv[1]))
    sys.stdout.write("\n".join(found or ["wheel and sdist are as they should be"]) + "\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
