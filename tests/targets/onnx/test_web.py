"""Target `web`: the same data as genai, every factor an input, and the page in chromium."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from conftest import byte_tokenizer
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError, MissingExtraError
from qwlora.nn import packed_weights
from qwlora.system import optional_packages
from qwlora.system.optional_packages import node_package
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.onnx.onnx_model import DATA_FILE, MODEL_FILE
from qwlora.targets.onnx.switchable_graph import operands
from qwlora.targets.onnx.web import ADAPTER, NO_ADAPTER, _script
from qwlora.targets.proof.folder import write_record
from qwlora.targets.proof.readme import usage
from qwlora.targets.registry import TARGETS, WEB_LIBRARY
from qwlora.targets.target import ExportedBase
from targets.proofs import verify_weights
from targets.weights.bundles import write_adapter, write_base
from targets.weights.test_weights_targets import adapters, base, target

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
Bundle = tuple[Path, Any]
PROMPT = "what was trained?"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
LIBRARIES = {  # of npm, which the page takes from a CDN
    "onnxruntime-web": "1.30.0",
    "@huggingface/tokenizers": "0.2.0",
    "@huggingface/jinja": "0.5.11",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("web")
    model, tokenizer = base("w4-block32"), byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "base").mkdir()
    target("web").write_base(ExportedBase(model, tokenizer), folder / "base")
    adapted = adapters(model, folder / "trained")
    for name in ("first", "second"):
        write_adapter(target("web"), folder, name)
    for name in ("base", "first", "second"):
        write_record(folder / name, "web", "of the base")
    return folder, adapted


def test_web_and_genai_have_all_adapters_in_one_session(bundle: Bundle, tmp_path: Path) -> None:
    """The graph for the web is the other's without defaults of factors, and gives the same bits."""
    folder, adapted = bundle
    write_base(target("genai"), base("w4-block32"), tmp_path)
    data = [(place / "base" / DATA_FILE).read_bytes() for place in (folder, tmp_path)]
    assert data[0] == data[1]  # a server of both keeps one copy
    shutil.copytree(folder / "trained", tmp_path / "trained")
    path = tmp_path / "base" / MODEL_FILE
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("MatMulNBits") == 4  # q, k and v are one
    genai = onnxruntime.InferenceSession(path)
    web = onnxruntime.InferenceSession(folder / "base" / MODEL_FILE)
    ids = IDS[:1].numpy()
    feeds = {"input_ids": ids, "attention_mask": ids * 0 + 1, "position_ids": ids * 0}
    feeds["position_ids"] += range(ids.shape[1])
    feeds |= {f"past_key_values.0.{n}": np.zeros((1, 2, 0, 16), "f4") for n in ("key", "value")}
    empty = {n: a for n, a in load_file(folder / "base" / NO_ADAPTER).items() if not a.size}
    assert {i.name for i in web.get_inputs()} - {i.name for i in genai.get_inputs()} == {*empty}
    before = dict[str | None, Any]()
    for name in ("first", None, "second", None, "first"):
        options = onnxruntime.RunOptions()
        factors = empty if name is None else load_file(folder / name / ADAPTER)
        if name is not None:
            write_adapter(target("genai"), tmp_path, name)
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(tmp_path / name / "adapter.onnx_adapter"))
            options.add_active_adapter(loaded)
        found = web.run(["logits"], feeds | factors)[0]
        alone = onnxruntime.InferenceSession(path)
        for session in (genai, alone):
            assert (found == session.run(["logits"], feeds, options)[0]).all()
        assert (before.setdefault(name, found) == found).all()
        if name is not None:
            adapted.set_adapter(name)
        with torch.no_grad(), adapted.disable_adapter() if name is None else nullcontext():
            expected = adapted(input_ids=IDS[:1]).logits.numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert not (before["first"] == before["second"]).all()
    unknown = CanonicalAdapter({"model.layers.9.mlp.up_proj": (torch.ones(2, 64),) * 2}, None)
    with pytest.raises(ExportError, match=r"no place .*model\.layers\.9\.mlp\.up_proj"):
        target("genai").write_adapter(unknown, tmp_path / "base", tmp_path / "first")


def test_no_library_is_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "node_modules" / "onnxruntime-web"
    place.mkdir(parents=True)
    (place / "package.json").write_text('{"version": "1.30.0"}')
    monkeypatch.chdir(tmp_path)  # as in a downloaded bundle
    monkeypatch.setattr(optional_packages, "_global_packages", lambda: ())
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(MissingExtraError, match="npm install --global onnxruntime-web"):
        node_package(WEB_LIBRARY)
    assert "npm install" in str(TARGETS["web"].missing())
    assert TARGETS["web"].missing(to_write=True) is None
    monkeypatch.setenv("NODE_PATH", str(tmp_path / "node_modules"))
    assert node_package(WEB_LIBRARY) == (place, "1.30.0")


@pytest.mark.client
def test_a_wrong_code_fails_the_proof(bundle: Bundle, tmp_path: Path) -> None:
    folder, adapted = bundle
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    layer = packed_weights(adapted)["model.layers.0.mlp.down_proj.weight"]
    codes, data = operands(layer)["codes"].tobytes(), (copy / "base" / DATA_FILE).read_bytes()
    assert data.count(codes) == 1
    wrong = bytes([codes[0] ^ 8]) + codes[1:]  # the first code, by half of its grid
    (copy / "base" / DATA_FILE).write_bytes(data.replace(codes, wrong))
    for place, is_right in ((folder, True), (copy, False)):
        adapted.set_adapter("second")
        runtime = target("web").open(place / "base", "base")
        found = verify_weights(runtime, adapted, place / "second", as_sequences(IDS))
        assert (found.problems == []) == is_right
    assert runtime.process_bytes > 20e6
    model = onnx.load(copy / "base" / MODEL_FILE, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, copy / "base" / MODEL_FILE)
    with pytest.raises(ExportError, match=r"ONNX Runtime Web cannot run .*base"):
        TARGETS["web"].open(copy)


READY = """!document.querySelector('button').disabled
    || !/^Load/.test(document.querySelector('[role=status]').textContent)"""


class Server(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def page(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Any]:
    """The page in chromium, at the address in the README. Files of its CDN come from npm's, or the
    folder has them, or there are none."""
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=bundle[0]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = bundle[0] / "node_modules"
    for name, version in LIBRARIES.items() if request.param == "node_modules" else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(node_package(f"{name}@{version}")[0])

    def library(route: Any) -> None:
        found = re.fullmatch(r"https://cdn\.\w+\.net/npm/(.+)@([\d.]+)/(.+)", route.request.url)
        assert found is not None, route.request.url
        assert LIBRARIES[found[1]] == found[2]
        if request.param != "CDN":
            route.abort()
            return
        file = node_package(f"{found[1]}@{found[2]}")[0] / found[3]
        kinds = {".wasm": "application/wasm"}
        headers = {"access-control-allow-origin": "*"}
        headers["content-type"] = kinds.get(file.suffix, "text/javascript")
        route.fulfill(body=file.read_bytes(), headers=headers)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.route(lambda url: "127.0.0.1" not in url, library)
        link = re.search(
            r"\(http://localhost:8000(/\S+)\)", usage("web", "base", "first", True, "second")
        )
        assert link is not None
        opened.goto(f"http://127.0.0.1:{server.server_port}{link[1]}")
        opened.wait_for_function(READY, timeout=300_000)
        yield opened
        browser.close()
    server.shutdown()
    server.server_close()
    shutil.rmtree(folder, ignore_errors=True)


ANSWER = """async () => {
    document.querySelector("button").click();
    const status = document.querySelector("[role=status]");
    status.textContent = "";
    while (!status.textContent) await new Promise((resolve) => setTimeout(resolve, 20));
    return [document.querySelector("output").value, status.textContent];
}"""
LOGITS = """async ([ids, file]) => {
    const loaded = performance.getEntriesByType("resource").map(({ name }) => name);
    const ort = await import(loaded.findLast((name) => name.endsWith("/ort.wasm.min.mjs")));
    const { Model, readSafetensors } = await import("./model.mjs");
    const read = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
    window.opened ??= await Model.load(ort, read);
    const { logits } = await opened.run(ids, readSafetensors(ort, await read(file)));
    return Array.from(logits.data);
}"""


def test_the_readme_installs_what_the_page_loads() -> None:
    page, readme = _script("index.html").read_text(), usage("web", "base", "first", True)
    for name, version in LIBRARIES.items():
        assert f'"{name}", "{version}"' in page
        assert f"{name}@{version}" in readme


@pytest.mark.client
@pytest.mark.parametrize("page", ["neither"], indirect=True)
def test_the_page_says_which_library_is_missing(page: Any) -> None:
    assert "npm install onnxruntime-web@1.30.0" in page.inner_text("[role=status]")


@pytest.mark.client
@pytest.mark.parametrize("page", ["CDN", "node_modules"], indirect=True)
def test_the_page_answers_and_switches_adapters(page: Any, bundle: Bundle) -> None:
    _, adapted = bundle
    assert page.inner_text("[role=status]") == "Ready"
    tokenizer = byte_tokenizer()
    ids = tokenizer(f"user: {PROMPT}\n", return_tensors="pt")["input_ids"]
    page.fill("textarea", PROMPT)
    page.fill("[name=count]", "8")
    answers, before = [], dict[str, list[float]]()
    for name in ("", "first", "second", "", "first"):
        if name:
            adapted.set_adapter(name)
        with torch.no_grad(), nullcontext() if name else adapted.disable_adapter():
            expected, tokens = adapted(input_ids=ids).logits, greedy(adapted, ids)
        page.select_option("select", label=name or "none")
        answer, status = page.evaluate(ANSWER)
        assert re.match(r"\d+ tokens, [\d.]+ a second", status)
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append(answer)
        file = f"../{name}/{ADAPTER}" if name else NO_ADAPTER
        logits = page.evaluate(LOGITS, [ids[0].tolist(), file])
        found = torch.tensor(logits).view_as(expected)
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        assert before.setdefault(name, logits) == logits  # bit for bit
    assert len({*answers}) == 3
    record = bundle[0] / "second" / "qwlora.json"
    kept = record.read_text()
    record.write_text(json.dumps({**json.loads(kept), "base_fingerprint": "another"}))
    page.reload()
    page.wait_for_function(READY, timeout=300_000)
    page.select_option("select", label="second")
    assert "another base" in page.evaluate(ANSWER)[1]
    record.write_text(kept)


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < 8:
        whole = torch.cat([ids, torch.tensor([tokens], dtype=torch.int64)], dim=1)
        tokens.append(int(model(input_ids=whole).logits[0, -1].argmax()))
        if tokens[-1] == model.config.eos_token_id:
            return tokens[:-1]
    return tokens
