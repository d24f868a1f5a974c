"""Answers of a model behind a server that speaks OpenAI's chat API.

The server is sent what `generate` starts from: the messages of a prompt and the decoded, upright
pixels of its images, as PNG files inside the request. Template, resizing and generation are the
server's. Greedy, as our own.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Protocol

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.server import ServedModel
from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.chat_server import ChatServer, NoAnswer
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.images import decode, encode_png

NAME = "--server"


class Conversations(Protocol):
    """What is asked, by row number: a `PreparedSplit` of prompts."""

    @property
    def sample_ids(self) -> list[str]:
        """The id of each row."""

    @property
    def group_ids(self) -> list[str]:
        """The group of each row."""

    def text(self, number: int, column: str) -> str:
        """`prompt` or `reference` of a row."""

    def conversation(self, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Messages and tools of a row."""

    def images(self, number: int) -> list[bytes]:
        """The encoded images of a row."""


class Served:
    """Asks one model of a server.

    Parameters
    ----------
    max_new_tokens, seed
        Sent with every request; the seed decides nothing where the server is greedy.
    limits
        Of the images, as they were prepared with.

    Raises
    ------
    EvaluationError
        If the environment variable that shall hold the key is not set.
    """

    def __init__(
        self,
        config: ServedModel,
        *,
        max_new_tokens: int,
        seed: int,
        limits: ImageLimits,
        **client: Any,
    ) -> None:
        self._config, self._limits = config, limits
        self._settings = {"temperature": 0, "max_tokens": max_new_tokens, "seed": seed}
        self._server = ChatServer(config, NAME, "--server-key-env", **client)

    def answers(
        self,
        split: Conversations,
        rows: Sequence[int],
        keep: Callable[[Sequence[Prediction]], None],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Prediction]:
        """The answers to some rows, in their order.

        Parameters
        ----------
        keep
            Given every answer as it comes.
        progress
            Told how many rows are answered.

        Raises
        ------
        EvaluationError
            At the first row that the server refuses or does not answer; requests that are under
            way then are waited for, and their answers kept.
        """
        found: dict[int, Prediction] = {}
        failed: Exception | None = None
        left = iter(rows)
        with ThreadPoolExecutor(self._config.parallel) as pool:
            running: dict[Future[Prediction], int] = {}
            while True:
                # No more than are asked at once, so that only their images are held.
                free = 0 if failed else self._config.parallel - len(running)
                for row in islice(left, free):
                    running[pool.submit(self._answer, split, row)] = row
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    row = running.pop(done)
                    error = done.exception()
                    if isinstance(error, Exception):
                        failed = failed or error
                        continue
                    found[row] = done.result()
                    keep([found[row]])
                progress(len(found))
        if failed is not None:
            raise failed
        return [found[row] for row in rows]

    def _answer(self, split: Conversations, row: int) -> Prediction:
        sample_id, request = split.sample_ids[row], self._request(split, row)
        try:
            text, num_tokens, truncated = self._server.ask(request, _read)
        except EvaluationError as error:
            raise EvaluationError(f"{error.message} (asked: {sample_id})") from None
        except NoAnswer as error:
            raise EvaluationError(
                f"{NAME}: no answer to {sample_id}: {error}; what was answered is kept: run the "
                "same command again to go on"
            ) from None
        return Prediction(
            sample_id=sample_id,
            group_id=split.group_ids[row],
            prompt=split.text(row, "prompt"),
            reference=split.text(row, "reference"),
            text=text,
            num_tokens=num_tokens,
            truncated=truncated,
        )

    def _request(self, split: Conversations, row: int) -> dict[str, Any]:
        messages, tools = split.conversation(row)
        if tools or any("tool_calls" in message for message in messages):
            raise EvaluationError(f"{NAME}: {split.sample_ids[row]} has tools, which are not sent")
        images = iter(split.images(row))
        asked = [
            {
                "role": message["role"],
                "content": [
                    self._image(next(images))
                    if part["type"] == "image"
                    else {"type": "text", "text": part["text"]}
                    for part in message["content"] or [{"type": "text", "text": ""}]
                ],
            }
            for message in messages
        ]
        return {"model": self._config.model, "messages": asked, **self._settings}

    def _image(self, data: bytes) -> dict[str, Any]:
        png = base64.b64encode(encode_png(decode(data, self._limits))).decode("ascii")
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}


def _read(reply: Any) -> tuple[str, int, bool]:
    """Text, number of tokens and whether it was cut; raises ValueError for anything else.

    A reply without content is an empty answer: all its tokens went into reasoning.
    """
    try:
        choice = reply["choices"][0]
        content, reason = choice["message"].get("content"), choice["finish_reason"]
        num_tokens = reply["usage"]["completion_tokens"]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("the reply is not a chat completion with usage") from None
    text = "" if content is None else content
    if not isinstance(text, str) or not isinstance(num_tokens, int):
        raise ValueError("the reply's content is no text, or its usage no number")
    return text, num_tokens, reason == "length"
