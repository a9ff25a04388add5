"""`qwlora push` against a hub on this machine, and the model cards that it uploads."""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download

import qwlora
from cli.command_line import answered, refused
from cli.command_line import qwlora as command
from conftest import flip_bit, write_recipe
from docs.snippets import ROOT, blocks
from pipeline.fake_hub import TOKEN, FakeHub, Repository, fake_hub
from qwlora.errors import DirectoryError, SourceError
from qwlora.formats import manifest
from qwlora.formats.model_card import ModelCardInfo
from qwlora.pipeline.commands.push import prepared, send
from qwlora.pipeline.results import read_job
from qwlora.pipeline.run import run
from qwlora.pipeline.store import STAGE, read_record
from qwlora.recipe import load_recipe
from qwlora.report import model_cards
from qwlora.report.model_cards import Repositories, card_text
from qwlora.targets.proof.folder import RECORD, proofs
from qwlora.targets.proof.readme import write_readme

CARD = "README.md"
IDS = torch.arange(12)[None]
STAGES = ("quantize", "train", "evaluate", "export", "verify")


@pytest.fixture(scope="module")
def job(tmp_path_factory: Any, corpus: Path, checkpoints: dict[str, Path]) -> Path:
    """Trained and exported for transformers; the model has a license, nothing is captured."""
    folder = tmp_path_factory.mktemp("job")
    model = shutil.copytree(checkpoints["llama"], folder / "tiny-model")
    (model / CARD).write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
    adapters = [{"name": "first", "rank": 4, "steps": 3, "warmup_steps": 1}]
    path = write_recipe(folder, model, corpus, adapters=adapters, export={"targets": ["hf"]})
    run(load_recipe(path), folder / "out", STAGES)
    return folder / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, job: Path) -> Iterator[FakeHub]:
    with fake_hub() as server:
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
    (job / ".qwlora" / "pushed.json").unlink(missing_ok=True)


def assert_unprepared(
    job: Path, message: str, adapter: str | None = None, error: Any = DirectoryError
) -> None:
    with pytest.raises(error, match=message), prepared(job, "me/it", adapter):
        pass


def test_card_text_is_escaped(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'bsd.\n\n## Proof\n\n| all | passed |\n\n<iframe src="x">'
    origin = ModelCardInfo("n <b>\n# n", None, text, stated_in="README.md")
    monkeypatch.setattr(model_cards, "_known_origin", lambda source: origin)
    found, recipe = read_job(job), load_recipe(job / "recipe.yaml")
    places = Repositories(license="mit\n## Mine")
    cards = [card_text(found, recipe, a, p) for a in (None, "first") for p in (None, places)]
    bundle = shutil.copytree(job / "export" / "hf", tmp_path / "hf")
    record = manifest.read(bundle / "base" / RECORD) | {"license": text, "model": "n\n# n"}
    manifest.write(bundle / "base", RECORD, record, [])
    write_readme(bundle, {"first": False}, {"first": proofs(bundle)["first"]})
    for page in (*cards, (bundle / CARD).read_text()):
        body = page.partition("\n---\n")[2] or page
        assert body.count("\n## Proof") <= (page not in cards)
        assert "## Mine" not in body.replace("\\#", "")
        assert "<b>" not in re.sub(r"`[^`]*`", "", body)
        assert "<iframe" not in body
        assert page in cards or "\n# n" not in page


BASE_CARD, ADAPTER_CARD = "base/README.md", "adapters/first/README.md"
PAGES = {  # folders that the Python of a page or a card reads, by their names there
    "docs/push.md": {"base": "base", "support": "adapters/first"},
    "docs/deploy-pytorch.md": {
        "out/export/hf/base": "export/hf/base",
        "out/export/hf/support": "export/hf/first",
    },
    BASE_CARD: {"base": "base", "export/hf/base": "export/hf/base"},
    ADAPTER_CARD: {name: name for name in ("base", "adapters/first", "export/hf")},
}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_loads_the_files(page, job, tmp_path, monkeypatch) -> None:
    for name, there in PAGES[page].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(job / there)
    monkeypatch.chdir(tmp_path)
    expected = qwlora.load_base(job / "base")
    if page != BASE_CARD:
        expected = qwlora.load_adapter(expected, job / "adapters/first").eval()
    file = ROOT / page if page.startswith("docs/") else job / page
    codes = [block.text for block in blocks(file) if block.language == "python"]
    for code in codes[:1] if page.startswith("docs/") else codes:
        names: dict[str, Any] = {}
        exec(compile(code, page, "exec"), names)
        with torch.no_grad():
            found = names["model"].eval()(IDS).logits
        torch.testing.assert_close(found, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert len(codes) >= 1 + page.endswith(CARD)


def test_a_card_is_written_again_unless_the_user_edited_it(job: Path) -> None:
    file, recipe = job / "base" / CARD, load_recipe(job / "recipe.yaml")
    written = file.read_text()
    changed = written.replace("apache-2.0", "mit")
    by_user = changed.replace("<!-- Written by", "<!--")
    with edited(file, written):
        for text, expected in ((changed, written), (by_user, by_user)):
            file.write_text(text)
            said: list[str] = []
            run(recipe, job, STAGES, say=said.append)
            stages = [line for line in said if line.startswith(("quantize", "train", "export"))]
            assert all("skipped" in line for line in stages)
            assert file.read_text() == expected
        with prepared(job, "me/base", None) as upload:
            assert upload.files[CARD].read_text() == by_user


def test_uploads_are_private_and_load_from_there(job: Path, hub: FakeHub, tmp_path: Path) -> None:
    answered("push", job, "--to", "me/base", "--yes")
    adapter = ("--adapter", "first", "--to", "me/first", "--license", "mit", "--yes")
    answered("push", job, *adapter)
    base, first = hub.repositories["me/base"], hub.repositories["me/first"]
    assert (base.private, first.private) == (True, True)
    assert len(base.commits) == len(first.commits) == 1
    assert {"base.json", "base.safetensors", CARD, "hf/config.json"} <= base.files.keys()
    assert not any(name.startswith("moments") for name in base.files)
    of_adapter = {"adapter_model.safetensors", "qwlora.json", "hf/adapter_config.json"}
    assert of_adapter <= first.files.keys()
    found = ModelCard(first.files[CARD].decode()).data.to_dict()
    assert (found["license"], found["base_model"]) == ("mit", "me/base")
    assert (found["library_name"], found["base_model_relation"]) == ("peft", "adapter")
    config = json.loads(first.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/base"
    secret = str(job.parent).encode()
    for repository in (base, first):
        assert [name for name, data in repository.files.items() if secret in data] == []

    folders = [snapshot_download(name, cache_dir=tmp_path) for name in ("me/base", "me/first")]
    there = qwlora.load_adapter(qwlora.load_base(folders[0]), folders[1]).eval()
    here = qwlora.load_adapter(qwlora.load_base(job / "base"), job / "adapters/first").eval()
    assert torch.equal(there(IDS).logits, here(IDS).logits)


def test_an_upload_deletes_only_what_an_earlier_one_left(job: Path, hub: FakeHub) -> None:
    mine = {"base-00001-of-00002.safetensors": b"", "gguf/notes.txt": b"", "hf/mine.md": b"mine"}
    hub.repositories["me/base"] = Repository(private=True, files=dict(mine))
    with prepared(job, "me/base", None) as upload:
        files = {**upload.files, "gguf/base.gguf": upload.files["config.json"]}
        send(replace(upload, files=files), job)
    assert "gguf/base.gguf" in hub.repositories["me/base"].files
    asking = command("push", job, "--to", "me/base")
    assert (asking.returncode, "--yes" in asking.stderr) == (2, True)
    assert "gguf/base.gguf will be deleted there" in asking.stdout
    assert "gguf/base.gguf" in hub.repositories["me/base"].files
    answered("push", job, "--to", "me/base", "--yes")
    assert "gguf/base.gguf" not in hub.repositories["me/base"].files
    assert mine.keys() <= hub.repositories["me/base"].files.keys()


def test_a_repository_that_is_public_or_has_other_files_is_left_alone(job, hub) -> None:
    push = ("push", job, "--to", "me/it", "--yes")
    for is_private, files, words, named in (
        (True, {"base.json": b"{}"}, ("--adapter", "first"), "base.json"),
        (True, {"qwlora.json": b"{}"}, (), "qwlora.json"),
        (False, {}, (), "--public"),
    ):
        hub.repositories["me/it"] = Repository(is_private, files=dict(files))
        assert named in refused(*push, *words)
        assert hub.repositories["me/it"].files == files
    answered(*push, "--public")
    assert "base.json" in hub.repositories["me/it"].files


@contextmanager
def edited(file: Path, content: bytes | str) -> Iterator[None]:
    """Another content of a file, which may not be there before."""
    before = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield
    finally:
        file.write_bytes(before) if before is not None else file.unlink()


def test_what_was_not_run_or_has_changed_is_refused(job: Path) -> None:
    text = (job / "recipe.yaml").read_text()
    with edited(job / "recipe.yaml", text.replace("steps: 3", "steps: 4")):
        message = r"train/first: adapters\.first\.steps: 3 -> 4.*qwlora run"
        assert_unprepared(job, message, "first")
    with edited(job / "recipe.yaml", f"base: {{weights: w8-channel}}\n{text}"):
        assert_unprepared(job, r"quantize: base\.weights.*qwlora run")
    file = job / "adapters/first/adapter_model.safetensors"
    with edited(file, file.read_bytes()):
        flip_bit(file)
        assert_unprepared(job, r"has changed.*Run first: qwlora run", "first")
    assert_unprepared(job, "no adapter 'frist'", "frist")
    assert "OWNER/NAME" in refused("push", job, "--to", "base", "--yes")


def test_files_of_others_and_files_that_were_not_checked_are_not_uploaded(job: Path) -> None:
    folders, names = ("base", "adapters/first", "export/hf/first"), ("secret.pem", ".env")
    with ExitStack() as added:
        for folder, name in itertools.product(folders, names):
            added.enter_context(edited(job / folder / name, "mine"))
        for adapter in (None, "first"):
            with prepared(job, "me/it", adapter) as upload:
                assert not any("secret" in name or ".env" in name for name in upload.files)
    with edited(job / "export" / "hf" / "proof" / "first" / STAGE, "{}"):
        for adapter in (None, "first"):
            with prepared(job, "me/it", adapter) as upload:
                assert not any(name.startswith("hf/") for name in upload.files)
                assert any("verify/hf/first" in note for note in upload.notes)
                assert "### transformers" not in upload.files[CARD].read_text()


def test_a_link_or_a_record_that_leads_out_of_the_job_uploads_nothing(job, tmp_path) -> None:
    (key := tmp_path / "key").write_text("PRIVATE KEY")
    for name in ("base/README.md", "adapters/first/qwlora.json", "export/hf/x"):
        copied = Path(shutil.copytree(job, tmp_path / name.replace("/", "-")))
        (copied / name).unlink(missing_ok=True)
        (copied / name).symlink_to(key)
        assert_unprepared(copied, f"{name}' is a link", error=SourceError)
    file = job / "base" / STAGE
    record = read_record(file)
    assert record is not None
    there = os.path.relpath(key, file.parent)
    files = {**record.files, there: hashlib.sha256(key.read_bytes()).hexdigest()}
    with edited(file, replace(record, files=files).text()):
        assert read_record(file) is None
        assert_unprepared(job, "quantize: base: its record is damaged")


REFUSED = {"/api/repos/create": (401, "hf auth login"), "/preupload/": (403, "may write")}
REFUSED |= {"/commit/": (400, "400"), "no hub": (0, "HF_ENDPOINT")}


@pytest.mark.parametrize("path", REFUSED)
def test_what_the_hub_refuses_is_one_message(path, job, hub, monkeypatch) -> None:
    hub.answers[path], words = REFUSED[path]
    if path == "no hub":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert words in refused("push", job, "--to", "me/base", "--yes")
    assert not hub.repositories.get("me/base", Repository(True)).files
    assert not (job / ".qwlora" / "pushed.json").exists()
