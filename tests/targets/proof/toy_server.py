"""A server that answers with given log-probabilities, in the ways of several real ones."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qwlora.targets.proof.canary import Answer

Models = Mapping[str, Callable[[tuple[int, ...]], Answer]]
COUNT = 5


def _piece(token: int) -> str:
    return f"<{token}>"


def completion(form: str, answer: Answer) -> dict[str, Any]:
    """The response with the likeliest tokens of `answer`, as program `form` sends it."""
    tokens = sorted(answer, key=answer.__getitem__, reverse=True)[:COUNT]
    text, logprobs = _piece(tokens[0]), dict[str, Any]()
    entries = [{"id": t, "token": _piece(t), "logprob": answer[t]} for t in tokens]
    content = [{**entries[0], "top_logprobs": entries}]
    if form in ("llama-server", "mlx_lm"):
        logprobs = {"content": content}
    elif form == "native":
        return {"content": text, "completion_probabilities": content}
    elif form != "greedy":
        name = "token_id:{}".format if form == "vllm" else _piece
        logprobs = {
            "tokens": [name(tokens[0])],
            "top_logprobs": [{name(t): answer[t] for t in tokens}],
        }
    return {"choices": [{"text": text, "logprobs": logprobs or None}]}


@contextmanager
def serving(
    form: str, models: Models, adapters: list[dict[str, Any]] | None = None, key: str = ""
) -> Iterator[str]:
    """Serve `models` by name, `""` to requests without one. Yields the address.

    Args:
        form: a program (`vllm`, `sglang`, `llama-server`, `native`, `mlx_lm`, `greedy`).
        adapters: what llama-server lists; a request names models `lora:N` or `lora:none`.
        key: that requests must have.
    """

    def answer(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/lora-adapters" and adapters is not None:
            return 200, adapters
        if path == "/v1/models" and form != "native":
            return 200, {"data": [{"id": name} for name in models if name]}
        wanted = "/completion" if form == "native" else "/v1/completions"
        if body is None or path != wanted:
            return 404, {"error": "no such path"}
        if form == "mlx_lm" and not (isinstance(body["prompt"], str) and body["logprobs"] is True):
            return -1, None
        name, loras = body.get("model", ""), body.get("lora")
        if loras is not None:
            # As llama-server: what is not listed has scale 0, but an empty list changes nothing.
            active = [lora["id"] for lora in loras if lora["scale"]]
            name = f"lora:{active[0] if active else 'none'}" if loras else ""
        if name not in models:
            return 404, {"message": f"The model `{name}` does not exist."}
        prompt = body["prompt"]
        ids = tuple(map(int, prompt.split()) if isinstance(prompt, str) else prompt)
        return 200, completion(form, models[name](ids))

    with http_server(answer, key) as url:
        yield url


@contextmanager
def http_server(answer: Callable[[str, Any], Any], key: str = "") -> Iterator[str]:
    """Serve what `answer` returns of a path and a body: status and content (bytes, or JSON), status
    -1 for a closed connection; or a function that writes to the socket."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._answer(json.loads(self.rfile.read(length)))

        def _answer(self, body: Any) -> None:
            is_allowed = not key or self.headers["Authorization"] == f"Bearer {key}"
            answered = answer(self.path, body) if is_allowed else (401, "no key")
            if callable(answered):
                answered(self.wfile)
                return
            status, content, *headers = answered
            if status < 0:
                self.close_connection = True
                return
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
