"""A language model that reads the answer out of a longer text, on an OpenAI-compatible server.

For `mathvista@judge`. The prompt has the parts of the official one (Lu et al. 2024; lupantech/
MathVista, `evaluation/prompts/ext_ans.py`): a task line, worked examples of question, response and
extracted answer, then the case. The wording and the examples are our own, so scores are near those
of the official prompt and not the same.

What was asked is kept in `judge.jsonl` beside the predictions, by the digest of the whole request:
an evaluation that is scored again asks nothing twice. A request that fails for good is counted,
never guessed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raytune_vlm.config.evaluation import JudgeConfig
from raytune_vlm.evaluate.chat_server import ChatServer, NoAnswer
from raytune_vlm.evaluate.metrics.mathvista import short_cut
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.records import read_json_lines, write_text
from raytune_vlm.references import read_reference

JUDGE_FILE = "judge.jsonl"
MAX_TOKENS = 256
"""Of the judge's answer."""
MAX_RESPONSE = 20_000
"""Characters of the model's text that the judge is shown: its end, where answers stand."""

_TASK = (
    "A model was asked a question about an image. Find the final answer in its response and repeat "
    "only that answer, in the form that the hint asks for. Do not solve the question yourself."
)
_EXAMPLES = (
    (
        "Hint: Answer with a whole number.\nQuestion: How many bars are taller than 40?",
        "Two of the bars, B and D, go beyond the line at 40.",
        "2",
    ),
    (
        "Hint: Answer with a number with one decimal.\nQuestion: What is the slope of the line?",
        "It rises by 3 over 2 units, so the slope is 1.5 per unit.",
        "1.5",
    ),
    (
        "Hint: Answer with a list.\nQuestion: Which years are marked?",
        "The marked years are 1998 and 2004.",
        "[1998, 2004]",
    ),
    (
        "Hint: Answer with the letter of the choice.\nQuestion: Which shape has more sides?\n"
        "Choices:\n(A) the blue one\n(B) the red one",
        "The red shape is a hexagon and the blue one a square, so it is the red one.",
        "B",
    ),
)


class Judge:
    """Extracts answers for one evaluation folder.

    Raises
    ------
    EvaluationError
        If the environment variable that shall hold the key is not set.
    """

    def __init__(
        self, config: JudgeConfig, folder: Path, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._config = config
        self._server = ChatServer(
            config, "evaluation.judge", "evaluation.judge.api_key_env", sleep=sleep
        )
        self._file = folder / JUDGE_FILE
        rows = read_json_lines(self._file)
        if rows and not self._file.read_bytes().endswith(b"\n"):  # its writer was killed
            write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))
        self._known = {row["digest"]: row["answer"] for row in rows}

    def extract(self, predictions: Sequence[Prediction]) -> list[str | None]:
        """The answer in each prediction; None where the server gave none.

        Raises
        ------
        EvaluationError
            If the server refuses the request itself: an unknown model, a wrong key.
        """
        references = [read_reference(entry.reference) for entry in predictions]
        found = [
            short_cut(entry.text, reference)
            for entry, reference in zip(predictions, references, strict=True)
        ]
        requests = {
            place: self._request(entry)
            for place, entry in enumerate(predictions)
            if found[place] is None
        }
        digests = {place: _digest(request) for place, request in requests.items()}
        asked = {digests[place]: request for place, request in requests.items()}
        new = {digest: body for digest, body in asked.items() if digest not in self._known}
        with ThreadPoolExecutor(self._config.parallel) as pool:
            futures = {digest: pool.submit(self._ask, body) for digest, body in new.items()}
            try:
                for digest, future in futures.items():
                    self._keep(digest, future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for place, digest in digests.items():
            found[place] = self._known.get(digest)
        return found

    def _request(self, prediction: Prediction) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "messages": [{"role": "user", "content": extraction_prompt(prediction)}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }

    def _keep(self, digest: str, answer: str | None) -> None:
        if answer is None:
            return  # asked again the next time
        self._known[digest] = answer
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="ascii") as stream:
            stream.write(json.dumps({"digest": digest, "answer": answer}) + "\n")

    def _ask(self, body: dict[str, Any]) -> str | None:
        """The server's answer to a request; None if it has failed at every try."""
        try:
            return self._server.ask(body, _answer)
        except NoAnswer:
            return None


def extraction_prompt(prediction: Prediction) -> str:
    """The whole text that the judge is asked with."""
    cases = [*_EXAMPLES, (prediction.prompt, prediction.text[-MAX_RESPONSE:], "")]
    shown = [
        f"{question}\n\nResponse: {response}\n\nExtracted answer: {answer}".rstrip()
        for question, response, answer in cases
    ]
    return "\n\n---\n\n".join([_TASK, *shown])


def _answer(reply: Any) -> str:
    """The text of a chat completion; raises ValueError where there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError("the reply holds no text")
    return content.strip()


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
