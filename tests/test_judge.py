"""The judge against a real HTTP server on loopback that speaks /v1/chat/completions."""

from __future__ import annotations

import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from made import serving

from raytune_vlm.config.evaluation import JudgeConfig
from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.judge import Judge
from raytune_vlm.evaluate.scoring import Prediction, rescore, score, write_evaluation
from raytune_vlm.references import Reference

NUMBER = Reference(("14",), type="integer").to_text()
CHOICE = Reference(("blue",), choices=("red", "blue"), type="text").to_text()
TEXTS = [
    ("14", NUMBER),
    ("There are eight and six of them, 14 in all", NUMBER),
    ("It is the second one, the blue", CHOICE),
    ("blue", CHOICE),
    ("no idea", NUMBER),
]
PREDICTIONS = [
    Prediction(f"s{place}", f"g{place}", f"question {place}", reference, text, 5, False)
    for place, (text, reference) in enumerate(TEXTS)
]


class Server(ThreadingHTTPServer):
    """Answers by what the last response in the prompt holds; remembers what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.keys, self.failures = [], [], {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"].split("---")[-1]
        server.asked.append((self.path, body["model"], prompt))
        server.keys.append(self.headers.get("Authorization"))
        place = prompt.split("question ")[1][0]
        planned = server.failures.get(place, [])
        status = planned.pop(0) if planned else 200
        answer = {"1": " 14 ", "2": "B", "4": "none"}[place]
        reply = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        if status == "empty":
            status, reply = 200, {"choices": []}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Server()) as started:
        yield started


def judge(server, folder, **changes):
    config = JudgeConfig(base_url=server.url, model="judge-1", **changes)
    waited = []
    made = Judge(config, folder, sleep=waited.append)
    return made, waited


def scored(extracted):
    return score(
        PREDICTIONS,
        trial_id="t0000",
        step=1,
        split="report",
        metrics=["mathvista@rules", "mathvista@judge"],
        answer="text",
        confidence=0.9,
        num_bootstrap=100,
        seed=0,
        seconds=0.0,
        extracted=extracted,
    )


def test_answers_are_extracted_once_and_scored(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret-value")
    made, _ = judge(server, tmp_path, api_key_env="JUDGE_KEY")
    found = made.extract(PREDICTIONS)
    assert found == ["14", "14", "B", "blue", "none"]
    assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
    assert len(server.asked) == 3  # a number and a choice by themselves need no judge
    assert set(server.keys) == {"Bearer s3cret-value"}
    assert "second one" in "".join(prompt for _, _, prompt in server.asked)
    with (tmp_path / "judge.jsonl").open("a") as stream:
        stream.write('{"digest": "torn')
    again, _ = judge(server, tmp_path)
    assert again.extract(PREDICTIONS) == found
    assert len(server.asked) == 3
    assert "s3cret" not in "".join(file.read_text() for file in tmp_path.iterdir())
    scores, table = scored({"mathvista@judge": found})
    assert table["mathvista@judge"].to_pylist() == [1, 1, 1, 1, 0]
    assert scores.extraction_failures == {"mathvista@judge": 0}
    write_evaluation(tmp_path, scores, table)
    options = {"confidence": 0.9, "num_bootstrap": 100, "seed": 0}
    assert rescore(tmp_path, **options) == scores
    assert len(server.asked) == 3


def test_failures_are_tried_again_and_then_counted(server, tmp_path):
    server.failures = {"1": [503, "empty"], "2": [500] * 9}
    made, waited = judge(server, tmp_path, max_retries=2, parallel=1)
    found = made.extract(PREDICTIONS)
    assert found == ["14", "14", None, "blue", "none"]
    assert waited == [1.0, 2.0, 1.0, 2.0]
    scores, table = scored({"mathvista@judge": found})
    assert math.isnan(table["mathvista@judge"].to_pylist()[2])
    assert scores.extraction_failures == {"mathvista@judge": 1}
    assert scores.metrics["mathvista@judge"].value == 0.75
    server.failures = {}
    assert made.extract(PREDICTIONS)[2] == "B"


def test_a_server_that_is_not_there_fails_every_answer(server, tmp_path):
    made, _ = judge(server, tmp_path, max_retries=1, timeout_s=5)
    server.shutdown()
    server.server_close()
    assert made.extract(PREDICTIONS) == ["14", None, None, "blue", None]


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_refused_request_is_an_error_at_once(status, server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret-value")
    server.failures = {place: [status] * 9 for place in "124"}
    made, waited = judge(server, tmp_path, api_key_env="JUDGE_KEY")
    with pytest.raises(EvaluationError, match=f"answers {status}") as caught:
        made.extract(PREDICTIONS)
    assert "s3cret" not in str(caught.value)
    assert not waited


def test_a_missing_key_and_a_missing_extraction_are_told(server, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(EvaluationError, match="NO_SUCH_KEY"):
        judge(server, tmp_path, api_key_env="NO_SUCH_KEY")
    with pytest.raises(EvaluationError, match=r"evaluation\.judge"):
        scored({})


@pytest.mark.parametrize("address", ["localhost:8000", "file:///etc", "http://me:key@host/v1"])
def test_a_wrong_address_is_refused(address):
    with pytest.raises(ValueError, match="address"):
        JudgeConfig(base_url=address, model="m")
