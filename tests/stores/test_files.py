"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from multiverse_gateway.stores.files import publish


def write(draft: Path) -> None:
    """Write something."""
    assert draft.stat().st_mode & 0o777 == 0o600
    draft.write_bytes(b"new")


def test_the_first_one_wins(tmp_path: Path) -> None:
    """The second one changes nothing and knows it."""
    path = tmp_path / "file"
    assert publish(path, write)
    assert not publish(path, lambda draft: None)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"new"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        draft.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_links_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT has none."""

    def refuse(draft: Path, path: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert publish(tmp_path / "file", write)
    assert not publish(tmp_path / "file", lambda draft: None)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"new"]
