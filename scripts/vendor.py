#!/usr/bin/env python3
"""Put the files of others that our pages need into the package: exact versions, with licence and hash in a lock file.

`scripts/vendor.py` fetches the packages below with npm and writes files and lock;
`scripts/vendor.py --check` holds the files against the lock and needs no network.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "multiverse_gateway" / "pages" / "static" / "vendor"
LOCK = TARGET / "vendor.json"
LANGUAGES = ("bash", "cpp", "java", "json", "python", "sql", "typescript", "xml", "yaml")
"""Languages whose code is highlighted in answers; `highlight.js` in our scripts names each and its aliases."""
PACKAGES = {
    "htmx.org@2.0.11": {"dist/htmx.min.js": "htmx.min.js"},
    "@picocss/pico@2.1.1": {"css/pico.min.css": "pico.min.css"},
    "swagger-ui-dist@5.35.0": {"swagger-ui-bundle.js": "swagger-ui-bundle.js", "swagger-ui.css": "swagger-ui.css"},
    "markdown-it@15.0.3": {"dist/browser/markdown-it.umd.min.js": "markdown-it.min.js"},
    "dompurify@3.5.0": {"dist/purify.min.js": "purify.min.js"},
    "@highlightjs/cdn-assets@11.12.0": {
        "es/core.min.js": "highlight-core.min.js",
        **{f"es/languages/{language}.min.js": f"highlight-{language}.min.js" for language in LANGUAGES},
    },
}
PICTURE = re.compile(rb'url\("data:(?:[^"\\]|\\.)*"\)|url\(data:[^)]*\)')
"""A picture within Swagger UI's style sheet: the policy of our pages lets none be shown, and browsers complain about each."""
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt")


def sha512(data: bytes) -> str:
    """Return a hash as npm and browsers write it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def fetch(package: str, files: dict[str, str]) -> dict[str, object]:
    """Write the files of one package and return what the lock says about it."""
    with tempfile.TemporaryDirectory() as directory:
        npm = ["npm", "pack", "--silent", "--pack-destination", directory, package]
        name = subprocess.run(npm, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603  names stand above
        archive = Path(directory, name)
        with tarfile.open(archive) as tar:
            members = {member.name.removeprefix("package/"): member for member in tar.getmembers() if member.isfile()}

            def read(path: str) -> bytes:
                file = tar.extractfile(members[path])
                assert file is not None
                return file.read()

            about = json.loads(read("package.json"))
            licence = next(read(path) for path in LICENCE_FILES if path in members)
            written = {}
            for source, target in files.items():
                data = PICTURE.sub(b"none", read(source)) if target == "swagger-ui.css" else read(source)
                (TARGET / target).write_bytes(data)
                written[target] = sha512(data)
            licence_file = f"{about['name'].replace('@', '').replace('/', '-')}.LICENSE"
            (TARGET / licence_file).write_bytes(licence)
            written[licence_file] = sha512(licence)
        first = licence.decode().strip().splitlines()[0].strip()
        return {
            "version": about["version"],
            "licence": about.get("license", first),
            "package": sha512(archive.read_bytes()),
            "files": written,
        }


def problems() -> list[str]:
    """Say what differs from the lock."""
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    found = []
    wanted = {package.rpartition("@")[0]: package.rpartition("@")[2] for package in PACKAGES}
    if wanted != {name: about["version"] for name, about in lock.items()}:
        found.append("the lock is not of the packages and versions that scripts/vendor.py names")
    known = {LOCK.name}
    for about in lock.values():
        for name, digest in about["files"].items():
            known.add(name)
            path = TARGET / name
            if not path.is_file() or sha512(path.read_bytes()) != digest:
                found.append(f"{name} is not the file that was fetched")
    found += [f"{path.name} is not in the lock" for path in sorted(TARGET.iterdir()) if path.name not in known]
    return found


def main() -> int:
    """Fetch or check; return the exit code."""
    if sys.argv[1:] == ["--check"]:
        found = problems()
        sys.stdout.write(("\n".join(found) or "every file is the one that was fetched") + "\n")
        return bool(found)
    TARGET.mkdir(parents=True, exist_ok=True)
    lock = {package.rpartition("@")[0]: fetch(package, files) for package, files in PACKAGES.items()}
    LOCK.write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
