"""Asking a server that speaks OpenAI's chat API (`POST <base_url>/chat/completions`).

Busy, broken and unreachable servers are asked again with growing pauses. The key comes from the
environment or a file of its own and stands in no message.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from raytune_vlm.config.server import ServerConfig
from raytune_vlm.errors import EvaluationError

Answer = TypeVar("Answer")

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be others a little later."""
LONGEST_PAUSE_S = 60.0
"""Also where the server asks for a longer one (`Retry-After`)."""


class Refused(EvaluationError):
    """The server refuses a request itself, whatever the try."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class NoAnswer(Exception):
    """Every try has failed; the text says how the last one did."""


class ChatServer:
    """A client of one server; may be used by several threads.

    Parameters
    ----------
    name
        What messages begin with: `evaluation.judge`, `--server`.
    key_option
        What named the environment variable of the key, for messages.

    Raises
    ------
    EvaluationError
        If the environment variable or the file that shall hold the key does not.
    """

    def __init__(
        self,
        config: ServerConfig,
        name: str,
        key_option: str,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._name, self._sleep = config, name, sleep
        self._key = _key_of(config, key_option)
        # A redirect or a proxy could carry what is sent to another host.
        handlers: list[Any] = [_NoRedirect]
        if config.is_local:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, body: dict[str, Any], read: Callable[[Any], Answer]) -> Answer:
        """What `read` makes of the server's reply to a request.

        Parameters
        ----------
        read
            Raises ValueError for a reply that it cannot read, which is asked for again.

        Raises
        ------
        Refused
            If the server refuses the request itself: an unknown model, a wrong key.
        NoAnswer
            If every try has failed.
        """
        why, wanted_s = "", 0.0
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                pause_s = max(min(2.0 ** (attempt - 1), 30.0), wanted_s)
                self._sleep(min(pause_s, LONGEST_PAUSE_S))
            wanted_s = 0.0
            try:
                return read(self._post(body))
            except urllib.error.HTTPError as error:
                reason = self._plain(_said(error))
                if error.code not in RETRIED:
                    where = f"{self._name}: {self._config.base_url}"
                    raise Refused(f"{where} answers {error.code}: {reason}", error.code) from None
                why, wanted_s = f"it answers {error.code}: {reason}", _retry_after(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # Out of reach, too slow, or no answer that can be read.
                why = self._plain(f"{type(error).__name__}: {error}")
        raise NoAnswer(
            f"{self._config.base_url} has failed {self._config.max_retries + 1} times; last: {why}"
        )

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self._config.base_url}/chat/completions", json.dumps(body).encode(), headers
        )
        with self._opener.open(request, timeout=self._config.timeout_s) as response:
            text = response.read().decode("utf-8")
            # A server may repeat the key, and replies are kept.
            return json.loads(text.replace(self._key, "...") if self._key else text)

    def _plain(self, text: str) -> str:
        """In one line, without the key."""
        line = " ".join(text.split())
        return line.replace(self._key, "...") if self._key else line


def _key_of(config: ServerConfig, key_option: str) -> str | None:
    """The key, if any; raises EvaluationError where it is not where it should be."""
    if config.api_key_file is not None:
        file = Path(config.api_key_file).expanduser()
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            key = ""
        if not key or not key.isprintable():
            raise EvaluationError(f"api_key_file={str(file)!r}: no such file, or it holds no key")
        return key
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise EvaluationError(
            f"{key_option}={config.api_key_env!r}: no such environment variable here"
        )
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of its refusal."""
    with error:
        try:
            return error.read(500).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """The seconds that the server asks to wait, or until its date; 0 where it says none."""
    value = error.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
