"""Every check of the project, by name: `nox -l` lists them, `nox -s NAME -- ARGS` passes arguments through."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|venv"
nox.options.error_on_external_run = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
nox.options.sessions = ["lint", "types", f"tests-{HERE if HERE in PYTHONS else PYTHONS[0]}", "docs"]  # what a change needs, in minutes
EXTRAS = f".[{','.join(PYPROJECT['project']['optional-dependencies'])}]"


def install(session: nox.Session, *groups: str) -> None:
    session.install("--editable", EXTRAS, *nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run all tests but the e2e ones, with coverage shown and not judged (scripts/test judges it)."""
    install(session, "test")
    data = {"COVERAGE_FILE": str(Path(session.create_tmp(), ".coverage"))}
    session.run("coverage", "run", "-m", "pytest", "-m", "not e2e", *session.posargs, env=data)
    session.run("coverage", "combine", "--quiet", env=data)
    session.run("coverage", "report", env=data)


@nox.session
def e2e(session: nox.Session) -> None:
    """Run the tests that open sockets, start processes and talk to a real model server."""
    install(session, "test")
    session.run("pytest", "-m", "e2e", *session.posargs)


@nox.session(name="property")
def property_(session: nox.Session) -> None:
    """Run the property tests far longer than usual."""
    install(session, "test")
    session.run("pytest", "-m", "hypothesis", "--hypothesis-profile=thorough", *session.posargs)


@nox.session
def reliability(session: nox.Session) -> None:
    """Measure the figures of docs/explanation/reliability.md; `-- --scale 10` with ten times as many requests."""
    install(session, "test")
    session.run("python", "benchmarks/reliability.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a request and a chunk cost beside nginx; `-- --help` tells the options."""
    install(session, "test")
    session.run("python", "-m", "benchmarks.speed", *session.posargs)


@nox.session
def balancing(session: nox.Session) -> None:
    """Compare the balancers on simulated hosts; `-- --help` tells the options."""
    install(session)
    session.run("python", "-m", "benchmarks.balancing", *session.posargs)


@nox.session
def scaling(session: nox.Session) -> None:
    """Measure what grows with servers and gateways; `-- simulate` goes on to ten thousand of one and a hundred of the other."""
    install(session, "test")
    session.run("python", "-m", "benchmarks.scaling", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Let random faults rain for minutes, and fail on whatever leaks; `-- --minutes 30 --seed 1`."""
    install(session, "test")
    session.run("python", "benchmarks/reliability.py", "soak", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feed the parsers what a coverage-guided fuzzer thinks up (atheris); `-- sse -max_total_time=600` for one of them, longer."""
    install(session, "test")
    session.install("atheris")
    targets = [argument for argument in session.posargs if not argument.startswith("-")]
    options = [argument for argument in session.posargs if argument.startswith("-")] or ["-max_total_time=60"]
    targets = targets or ["sse", "envelope", "url", "head", "answer", "wire"]
    for target in targets:
        session.run("python", "tests/faults/fuzz.py", target, *options)


@nox.session
def screenshots(session: nox.Session) -> None:
    """Take the pictures of README and documentation anew (needs chromium); `-- dashboard` for some of them."""
    install(session, "test")
    session.run("python", "tests/browser/pictures.py", *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly, of the package and its tests."""
    install(session, "test", "types")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; `nox -s docs -- serve` shows it while you write."""
    install(session, "docs")
    session.run("mkdocs", *(session.posargs or ("build", "--strict", "--site-dir", str(Path(session.create_tmp(), "site")))))


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, check both, try the wheel alone in its own environment, and list its parts in sbom/."""
    session.install("build", "twine", "cyclonedx-bom")
    dist, sbom = Path("dist"), Path("sbom")
    for directory in (dist, sbom):
        shutil.rmtree(directory, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *(str(path) for path in dist.iterdir()))
    session.run("python", "scripts/check_dist.py", str(dist))
    (wheel,) = dist.glob("*.whl")
    clean = Path(session.create_tmp(), "clean").absolute()
    session.run("python", "-m", "venv", "--clear", str(clean))
    (scripts,) = [path for path in (clean / "bin", clean / "Scripts") if path.is_dir()]
    python = str(scripts / "python")
    session.run(python, "-m", "pip", "install", "--quiet", str(wheel), external=True)
    sbom.mkdir()
    session.run("cyclonedx-py", "environment", "--output-reproducible", "--output-file", str(sbom / f"{wheel.stem}.cdx.json"), python)
    with session.chdir(session.create_tmp()):
        command = str(scripts / "multiverse-gateway")
        session.run(command, "--help", external=True)
        session.run(command, "demo", "--once", external=True)


@nox.session
def clients(session: nox.Session) -> None:
    """Use the gateway with other people's libraries, each in its own environment; `-- --write` notes the result in the documentation."""
    install(session, "test")
    session.install("uv")
    session.run("python", "tests/docs/clients.py", *session.posargs)
