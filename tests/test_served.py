"""Answers of a served model: a real `transformers serve`, and a server that fails, on loopback."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from made import experiment, serving
from PIL import Image
from test_label import label, labels_file, scans

from raytune_vlm.cli import cli
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.server import ServedModel
from raytune_vlm.errors import ConfigError, EvaluationError
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.evaluate.scoring import read_predictions
from raytune_vlm.evaluate.served import Served
from raytune_vlm.images import decode
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep.evaluate_served import score_served_benchmark
from raytune_vlm.sweep.jobs import PreparedBenchmark
from raytune_vlm.sweep.runner import Scoring

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def transformers_serve():
    """The address of `transformers serve` in this process; it loads the model it is asked for."""
    missing = [name for name in ("fastapi", "openai", "uvicorn") if find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {' and '.join(missing)}")
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    while not server.server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/v1"
    server.kill_server()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl", "gemma3"])
def test_a_served_model_answers_as_our_own_engine_does(
    family, transformers_serve, tiny_base, tiny_model, tiny_prompts
):
    base, split = tiny_base(family), tiny_prompts(family)
    rows, kept = [21, 0, 7, 35], []
    own = generate(base.model, base, split, rows, EvaluationConfig(max_new_tokens=NEW_TOKENS))
    server = ServedModel(base_url=transformers_serve, model=str(tiny_model(family)), parallel=2)
    found = served(server).answers(split, rows, kept.extend)
    # That server strips the answers of some families.
    assert [stripped(entry) for entry in found] == [stripped(entry) for entry in own]
    assert len({entry.text for entry in own}) > 1
    assert {entry.sample_id: entry for entry in kept} == {entry.sample_id: entry for entry in found}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_real_server_labels_pages(transformers_serve, tiny_model, tmp_path):
    scans(tmp_path, 60, 80)
    teacher = {"model": str(tiny_model("idefics3")), "name": "tiny"}
    tasks = [{"name": "text", "prompt": "read", "max_tokens": NEW_TOKENS}]
    at = SimpleNamespace(url=transformers_serve)
    file = labels_file(tmp_path, at, tasks=tasks, teachers=[teacher])
    tally = label(file)
    assert tally.num_asked == 2 and len(tally.rejected) + tally.num_labels == 2
    replies = read_json_lines(tmp_path / "out" / "answers.jsonl")
    assert all(row["input_tokens"] > 0 < row["output_tokens"] for row in replies)
    assert all(isinstance(row["text"], str) for row in replies)
    again = label(file)
    assert (again.num_asked, again.num_known, again.num_labels) == (0, 2, tally.num_labels)


def stripped(entry):
    return replace(entry, text=entry.text.strip())


def served(config, waited=None):
    sleep = (lambda _: None) if waited is None else waited.append
    settings = {"max_new_tokens": NEW_TOKENS, "seed": 3, "limits": ImageLimits()}
    return Served(config, **settings, sleep=sleep)


class Server(ThreadingHTTPServer):
    """Answers with the size of the first image; fails as it is told to, by that answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.keys, self.failures, self.finish = [], [], {}, "stop"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        answer = f"{image.width}x{image.height}"
        server.asked.append((answer, body))
        server.keys.append(self.headers.get("Authorization"))
        planned = server.failures.get(answer, [])
        failure = planned.pop(0) if planned else 200
        if failure == "closed":
            self.connection.close()
            return
        reply = {
            "choices": [{"message": {"content": answer}, "finish_reason": server.finish}],
            "usage": {"completion_tokens": 4},
        }
        data = json.dumps(reply).encode()
        if failure == "torn":
            failure, data = 200, data[:20]
        elif failure == "empty":
            failure, data = 200, b'{"choices": []}'
        elif failure != 200:
            data = f'{{"error": "no: {self.headers.get("Authorization")}"}}'.encode()
        self.send_response(failure)
        if failure == 429:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with serving(Server()) as started:
        yield started


def size(split, row):
    image = decode(split.images(row)[0], ImageLimits())
    return f"{image.width}x{image.height}"


def test_the_server_is_sent_the_pixels_and_asked_greedily(server, tiny_prompts, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "s3cret-value")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # what stays here goes through no proxy
    split = tiny_prompts("idefics3")
    server.finish = "length"
    config = ServedModel(base_url=server.url, model="big", api_key_env="SERVER_KEY")
    (found,) = served(config).answers(split, [5], lambda _: None)
    assert (found.sample_id, found.group_id, found.text) == ("s5", "g5", size(split, 5))
    assert found.truncated and found.num_tokens == 4
    ((_, body),) = server.asked
    shown = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))
    assert np.array_equal(pixels, np.asarray(decode(split.images(5)[0], ImageLimits())))
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "q"}
    settings = {"model": "big", "temperature": 0, "max_tokens": NEW_TOKENS, "seed": 3}
    assert settings.items() <= body.items()
    assert server.keys == ["Bearer s3cret-value"]


def test_what_fails_for_a_while_is_asked_again(server, tiny_prompts):
    split, waited = tiny_prompts("idefics3"), []
    rows = [0, 1, 2, 3]
    plans = ([429, 503], ["torn"], ["closed"], ["empty", "closed", 500])
    server.failures = {size(split, row): plan for row, plan in zip(rows, plans, strict=True)}
    config = ServedModel(base_url=server.url, model="m", parallel=1)
    found = served(config, waited).answers(split, rows, lambda _: None)
    assert [entry.text for entry in found] == [size(split, row) for row in rows]
    assert waited == [7.0, 2.0, 1.0, 1.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [400, 401, 302])
def test_a_refusal_is_one_line_without_the_key(status, server, tiny_prompts, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "s3cret-value")
    split, kept = tiny_prompts("idefics3"), []
    server.failures = {size(split, 1): [status]}
    config = ServedModel(base_url=server.url, model="m", api_key_env="SERVER_KEY", parallel=1)
    with pytest.raises(EvaluationError, match=rf"answers {status}: .*\(asked: s1\)") as caught:
        served(config).answers(split, [0, 1, 2, 3], kept.extend)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.sample_id for entry in kept] == ["s0"]
    assert len(server.asked) == 2


def test_a_broken_off_evaluation_asks_only_for_what_is_missing(server, tiny_prompts, tmp_path):
    split, folder = tiny_prompts("idefics3"), SweepFolder(tmp_path)
    config = ServedModel(base_url=server.url, model="org/big", parallel=1, max_retries=0)
    asked = PreparedBenchmark(
        name="mine",
        store=str(split._store),
        index_file=str(split._store / "index.arrow"),
        limit=6,
        evaluation=EvaluationConfig(max_new_tokens=NEW_TOKENS),
        metrics=("exact_match@strip",),
        facts={"digest": "one"},
    )
    scoring = Scoring(None, "mine", 0, benchmark=asked, served=config)
    rows = split.fixed_choice(6)
    server.failures = {size(split, rows[4]): [503]}
    own = experiment(evaluation={"num_bootstrap": 100})
    with pytest.raises(EvaluationError, match=f"no answer to s{rows[4]}: .*run the same command"):
        score_served_benchmark(own, folder, scoring, Monitor())
    assert len(server.asked) == 5
    scores = score_served_benchmark(own, folder, scoring, Monitor())
    assert [answer for answer, _ in server.asked[5:]] == [size(split, row) for row in rows[4:]]
    place = folder.trial("served-org-big").evaluation("mine", 0)
    predictions = read_predictions(place)
    assert [entry.text for entry in predictions] == [size(split, row) for row in rows]
    assert scores.benchmark["served_model"] == "org/big" and scores.num_samples == 6
    assert not (place / "answers").exists()
    assert score_served_benchmark(own, folder, scoring, Monitor()) == scores
    assert len(server.asked) == 7
    other = replace(scoring, benchmark=replace(asked, facts={"digest": "two"}))
    score_served_benchmark(own, folder, other, Monitor())
    assert len(server.asked) == 13


LOCAL = ["--server", "http://[::1]:1/v1", "--served-model", "m"]


@pytest.mark.parametrize(
    "options, why",
    [
        (LOCAL[2:], "--served-model has no effect without --server"),
        (LOCAL[:2], "--server needs --served-model"),
        ([*LOCAL[2:], "--server", "localhost:1"], "--server 'localhost:1': .*address"),
        (
            [*LOCAL[2:], "--server", "https://api.example.com/v1"],
            "another machine, .* --server-host api.example.com allows it",
        ),
        ([*LOCAL, "--server-host", "x"], "--server-host x has no effect"),
        ([*LOCAL, "--server-parallel", "0"], "--server-parallel 0: Input should be greater"),
        ([*LOCAL, "--trial", "best"], "--trial has no effect with --server"),
        ([*LOCAL, "--adapter", "x"], "--adapter has no effect with --server"),
        (
            [*LOCAL, "--benchmarks", "cord", "evaluation.batch_size=3"],
            "batch_size has no effect on a server's answers",
        ),
    ],
)
def test_wrong_use_is_one_clear_line(options, why):
    with pytest.raises(ConfigError, match=why) as caught:
        cli.main(["evaluate", "x", *options], standalone_mode=False)
    assert "\n" not in caught.value.message


def test_another_machine_has_to_be_named():
    remote = {"base_url": "https://api.example.com/v1", "model": "m"}
    assert ServedModel(**remote, allowed_host="api.example.com").host == "api.example.com"
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert ServedModel(base_url=f"http://{host}:8000/v1", model="m").is_local
