#!/usr/bin/env python3
"""Print what the changelog says about a version, the text of its release: `scripts/release_notes.py 1.2.3`."""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def notes(changelog: str, version: str) -> str | None:
    """Return the section of a version without its heading, or nothing when there is none or it says nothing."""
    match = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## \[|^\[[^\]]+\]: |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return match[1].strip() or None if match else None


def main() -> int:
    """Print; return the exit code."""
    text = notes(CHANGELOG.read_text(encoding="utf-8"), sys.argv[1])
    if text is None:
        sys.stderr.write(f"CHANGELOG.md says nothing about {sys.argv[1]}: give its section that name and the date\n")
        return 1
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
