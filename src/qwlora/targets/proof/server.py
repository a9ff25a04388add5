"""A client that asks a language model's server for single tokens.

Responses are data: a redirect is an error, and no other address is contacted, proxies included.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qwlora.errors import SourceError, described, escaped, listed, shortened
from qwlora.targets.proof.canary import TOP, Answer, Context, likeliest

LARGEST = 2**20  # bytes of a response
KEY = "QWLORA_SERVER_KEY"  # environment variable: the server's API key
ONE_ADAPTER = "lora:"  # as a model: llama-server with the adapter of this number only, or with none
_COUNT = TOP + 1
# Only if asked for them, vLLM returns token ids.
_OPENAI: dict[str, Any] = {"max_tokens": 1, "logprobs": _COUNT, "return_tokens_as_token_ids": True}
# Path, how the context is sent, and more. These are tried in turn, until one works.
_FORMS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("/v1/completions", "tokens", _OPENAI),
    ("/v1/completions", "text", _OPENAI),
    ("/v1/completions", "text", _OPENAI | {"logprobs": True, "top_logprobs": _COUNT}),  # mlx_lm
    ("/completion", "tokens", {"n_predict": 1, "n_probs": _COUNT}),  # llama-server
)


@dataclass(frozen=True)
class Reply:
    """The next token, or None if only its text is known and it is that of none of our tokens.
    `log_probs` is empty if the server gives none."""

    token: int | None
    log_probs: Answer


class Server:
    """A server at one address. Every method raises SourceError if it does not answer in time.

    Args:
        timeout: seconds, for all requests together.
        pieces: texts of tokens, for a server that returns no token ids.
    """

    def __init__(self, url: str, timeout: float, pieces: Mapping[int, str]):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise SourceError(f"{url!r} is no address of a server; give http://HOST:PORT")
        self._url, self._timeout = url, timeout
        self._deadline = time.monotonic() + timeout
        secure = parts.scheme == "https"
        self._kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._host, self._port = parts.hostname, port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._forms = _FORMS
        # Numbers of llama-server's adapters; None for another server.
        self._adapters: list[int] | None = None
        texts = list(pieces.values())
        self._tokens = {text: token for token, text in pieces.items() if texts.count(text) == 1}

    def models(self) -> list[str]:
        """The names that it lists."""
        match self._get("/v1/models"):
            case {"data": [*entries]}:
                return [str(e["id"]) for e in entries if isinstance(e, dict) and "id" in e]
        return []

    def adapters(self) -> dict[int, str]:
        """Paths of the adapters that llama-server has loaded, by number."""
        match self._get("/lora-adapters"):
            case [*entries]:
                known = [e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), int)]
                self._adapters = [entry["id"] for entry in known]
                return {entry["id"]: str(entry.get("path", "")) for entry in known}
        return {}

    def usable(self, contexts: Sequence[Context], model: str) -> list[int]:
        """The numbers of the contexts that the server can be asked."""
        with_text = [n for n, context in enumerate(contexts) if context.text is not None]
        self.ask(contexts[(with_text or [0])[0]], model)
        takes_tokens = self._forms[0][1] == "tokens"
        return [*range(len(contexts))] if takes_tokens else with_text

    def ask(self, context: Context, model: str) -> Reply:
        """The next token after a context."""
        errors = list[str]()
        for path, kind, settings in self._forms:
            prompt = context.tokens if kind == "tokens" else context.text
            body = {"prompt": prompt, "temperature": 0, **settings, **self._choice(model)}
            try:
                status, content = self._call("POST", path, body)
                if status == 200:
                    reply = self._reply(content)
                    self._forms = ((path, kind, settings),)
                    return reply
                errors.append(f"{self._url}{path} has status {status}: {_text(content)}")
            # mlx_lm.server closes the connection of a request that it does not understand.
            except SourceError as error:
                errors.append(str(error))
        raise SourceError(errors[0])

    def _choice(self, model: str) -> dict[str, Any]:
        # Prompts that llama-server keeps may have been read with another adapter.
        choice: dict[str, Any] = {} if self._adapters is None else {"cache_prompt": False}
        if not model.startswith(ONE_ADAPTER):
            return choice | ({"model": model} if model else {})
        names, wanted = ["none", *map(str, self._adapters or ())], model.removeprefix(ONE_ADAPTER)
        if wanted not in names:
            raise SourceError(f"{self._url} has no {model}; there are {ONE_ADAPTER}{listed(names)}")
        # An empty list would leave all adapters as they are.
        scales = [{"id": n, "scale": float(str(n) == wanted)} for n in self._adapters or ()]
        return choice | {"lora": scales}

    def _reply(self, content: bytes) -> Reply:
        try:
            found = _log_probs(json.loads(content))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise SourceError(
                f"{self._url} did not answer with a completion: {_text(content)}"
            ) from error
        if isinstance(found, str):
            return Reply(self._tokens.get(found), {})
        known = {self._tokens.get(k, -1) if isinstance(k, str) else k: v for k, v in found.items()}
        if not all(math.isfinite(value) and value <= 1e-3 for value in known.values()):
            raise SourceError(f"{self._url} returned numbers that are no log-probabilities")
        return Reply(likeliest(known), known)

    def _get(self, path: str) -> Any:
        status, content = self._call("GET", path)
        with suppress(ValueError, RecursionError):
            return json.loads(content) if status == 200 else None
        return None

    def _call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise SourceError(f"{self._url} did not answer within {self._timeout:g} s")
        connection = self._kind(self._host, self._port, timeout=left)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        timer = threading.Timer(left, lambda: _shut(opened))
        timer.daemon = True
        try:
            connection.connect()
            opened = connection.sock
            # The timeout of a socket is that of one read: a server could send a byte at a time.
            timer.start()
            content = None if body is None else json.dumps(body)
            connection.request(method, self._prefix + path, content, headers)
            response = connection.getresponse()
            answer = response.read(LARGEST + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= self._deadline:
                raise SourceError(
                    f"{self._url} did not answer within {self._timeout:g} s"
                ) from error
            raise SourceError(f"{self._url} does not answer: {described(error)}") from error
        finally:
            timer.cancel()
            connection.close()
        if time.monotonic() >= self._deadline:
            raise SourceError(f"{self._url} did not answer within {self._timeout:g} s")
        if 300 <= response.status < 400:
            target = escaped(shortened(response.headers.get("Location", ""), 100))
            raise SourceError(f"{self._url} redirects to {target!r}; give the server's own address")
        if len(answer) > LARGEST:
            raise SourceError(f"{self._url} answers with more than {LARGEST} bytes")
        return response.status, answer


def _shut(opened: socket.socket) -> None:
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)


def _text(content: bytes) -> str:
    return escaped(shortened(content.decode(errors="replace"), 200))


def _log_probs(answer: Any) -> dict[int | str, float] | str:
    """Log-probabilities of the first token, by id or text; its text if there are none."""
    choice = answer["choices"][0] if "choices" in answer else answer
    listed = choice.get("logprobs") or {"content": choice.get("completion_probabilities")}
    if entries := listed.get("content"):  # llama-server
        first = entries[0]
        return {e["id"]: float(e["logprob"]) for e in [*first["top_logprobs"], first]}
    if tops := listed.get("top_logprobs"):
        # mlx_lm.server has ids as keys, vLLM `token_id:N`, others the tokens' texts.
        has_ids = isinstance(listed["tokens"][0], int)
        named = {key.removeprefix("token_id:"): key for key in tops[0]}
        is_id = {k: has_ids or k != key for k, key in named.items()}
        return {int(k) if is_id[k] else k: float(tops[0][key]) for k, key in named.items()}
    return str(choice["text"] if "text" in choice else choice["content"])
