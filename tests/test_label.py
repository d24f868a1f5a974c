"""Labels from teachers: real HTTP servers on loopback that answer, fail, hang and talk nonsense."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from made import cli_command, cli_environment, picture, serving
from PIL import Image
from test_sources import lines, read

from raytune_vlm.cli import cli
from raytune_vlm.config.label import Budget, LabelConfig, Task, Teacher, load_labels
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.errors import (
    ConfigError,
    DataError,
    EvaluationError,
    LabellingStopped,
    LeaseError,
)
from raytune_vlm.label.answers import AnswerLog
from raytune_vlm.label.folder import LabelFolder
from raytune_vlm.label.run import STOP_AFTER, Labelling
from raytune_vlm.records import read_json, read_json_lines

KEY = "s3cret/val+ue=="
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["wide", "tall"]}, "width": {"type": "integer"}},
    "required": ["kind", "width"],
    "additionalProperties": False,
}
TASKS = [
    {"name": "text", "prompt": "Write out the page.", "instruction": "read", "max_tokens": 40},
    {"name": "kind", "prompt": "What is it?", "answer_schema": SCHEMA, "max_tokens": 60},
]


class Server(ThreadingHTTPServer):
    """Answers by the width of the image; what is planned for a width and task comes first.

    A plan is a list of: a status, `closed`, `torn`, `empty`, `slow`, `cut`, `free`, or a text.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.keys, self.plans, self.most, self.now = [], [], {}, 0, 0
        self.lock, self.hold = threading.Lock(), None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        width = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).width
        prompt = body["messages"][0]["content"][-1]["text"]
        task = "kind" if prompt.startswith("What") else "text"
        with server.lock:
            server.asked.append((width, task, body))
            server.keys.append(self.headers.get("Authorization"))
            server.now += 1
            server.most = max(server.most, server.now)
            plan = server.plans.get((width, task), [])
            planned = plan.pop(0) if plan else None
        if server.hold is not None and planned == "held":
            server.hold.wait(20)
        if planned == "slow":
            time.sleep(1.5)
        try:
            self.answer(planned, width, task)
        except OSError:  # nobody waits any longer
            pass
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, planned, width, task):
        if planned == "closed":
            self.connection.close()
            return
        text = json.dumps({"kind": "wide", "width": width}) if task == "kind" else f"page {width}"
        if isinstance(planned, str) and planned not in WORDS:
            text = planned
        reply = {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            "echo": self.headers.get("Authorization"),
        }
        if planned == "cut":
            reply["choices"][0]["finish_reason"] = "length"
        if planned == "free":
            del reply["usage"]
        if planned == "empty":
            reply["choices"] = []
        data = json.dumps(reply).encode()
        status = planned if isinstance(planned, int) else 200
        if status != 200:
            data = f'{{"error": "no: {self.headers.get("Authorization")}"}}'.encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "7")
        if status == 503:
            self.send_header("Retry-After", format_datetime(datetime.now(UTC) + timedelta(days=1)))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:20] if planned == "torn" else data)

    def log_message(self, *_):
        pass


WORDS = ("slow", "cut", "free", "empty", "torn", "held")


@pytest.fixture
def server():
    with serving(Server()) as started:
        yield started


def scans(folder, *widths):
    (folder / "scans").mkdir()
    for width in widths:
        picture(width, width=width, height=20).save(folder / "scans" / f"{width}.png")


def labels_file(folder, server, *, teachers=None, **sections):
    """A labelling file of the scans; a teacher's settings are merged into the usual ones."""
    usual = {"name": "big", "base_url": server.url, "model": "m", "parallel": 1, "max_retries": 2}
    plain = {
        "output": str(folder / "out"),
        "root": str(folder),
        "files": ["scans"],
        "tasks": TASKS,
        "teachers": [usual | teacher for teacher in teachers or [{}]],
        **sections,
    }
    file = folder / "labels.yaml"
    file.write_text(json.dumps(plain))  # JSON is YAML
    return file


def label(file, waited=None, limit=None, **options):
    config = load_labels(file, **options)
    folder = LabelFolder(Path(config.output))
    sleep = (lambda _: None) if waited is None else waited.append
    with AnswerLog(folder.answers_file) as log:
        return Labelling(config, folder, log, limit, sleep=sleep).run()


def rows(folder, name):
    return read_json_lines(folder / "out" / name)


def test_labels_are_data_that_an_experiment_reads(server, tmp_path):
    scans(tmp_path, 30, 40)
    (tmp_path / "scans" / "copy.png").write_bytes((tmp_path / "scans" / "30.png").read_bytes())
    tally = label(labels_file(tmp_path, server))
    assert (tally.num_pages, tally.num_copies, tally.num_labels) == (2, 1, 4)
    found = read("messages", tmp_path / "out" / "labels.jsonl", tmp_path)
    assert [sample.answer for sample in found] == [
        "page 30", '{"kind": "wide", "width": 30}', "page 40", '{"kind": "wide", "width": 40}',
    ]  # fmt: skip
    assert found[0].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "read"}]
    assert found[2].images == [(tmp_path / "scans" / "40.png").read_bytes()]
    assert found[0].group_id == found[1].group_id != found[2].group_id
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    _, _, body = server.asked[1]
    assert json.dumps(SCHEMA) in body["messages"][0]["content"][1]["text"]
    assert (body["max_tokens"], body["temperature"], "seed" in body) == (60, 0.0, False)
    assert "response_format" not in body
    replies = rows(tmp_path, "answers.jsonl")
    assert replies[0]["reply"]["choices"][0]["message"]["content"] == "page 30"


def test_what_fails_for_a_while_is_asked_again(server, tmp_path):
    scans(tmp_path, 30, 40, 50, 60)
    waited = []
    server.plans = {
        (30, "text"): [429, 503],
        (40, "text"): ["torn"],
        (50, "text"): ["closed", "empty"],
        (60, "text"): ["slow"],
    }
    file = labels_file(tmp_path, server, teachers=[{"timeout_s": 0.5}], tasks=TASKS[:1])
    tally = label(file, waited)
    assert tally.num_labels == 4 and not tally.rejected
    assert waited == [7.0, 60.0, 1.0, 1.0, 2.0, 1.0]
    # What came and was of no use is kept, too, and counted.
    kept = rows(tmp_path, "answers.jsonl")
    assert [row["text"] for row in kept] == ["page 30", "page 40", None, "page 50", "page 60"]
    assert read_json(tmp_path / "out" / "cost.json")["total"]["replies"] == 5


def test_an_answer_that_does_not_fit_is_mended_once(server, tmp_path):
    scans(tmp_path, 30, 40, 50, 60)
    server.plans = {
        (30, "kind"): [
            '{"kind": "wide", "width": "30"}',
            '```json\n{"kind": "tall", "width": 3}\n```',
        ],
        (40, "kind"): ['{"kind":', "still not", "never asked"],
        (50, "kind"): ["cut"],
        (60, "kind"): ['{"kind": "wide", "width": NaN}', '{"kind": "\\ud800", "width": 1}'],
    }
    file = labels_file(tmp_path, server, tasks=TASKS[1:])
    tally = label(file)
    (result,) = rows(tmp_path, "results.jsonl")
    assert (result["value"], result["repaired"]) == ({"kind": "tall", "width": 3}, True)
    asked = [body for width, _, body in server.asked if width == 30]
    assert asked[1]["messages"][1]["content"] == '{"kind": "wide", "width": "30"}'
    assert "$.width: '30' is not of type 'integer'" in asked[1]["messages"][2]["content"]
    reasons = {row["origin"]: row["reason"] for row in rows(tmp_path, "quarantine.jsonl")}
    assert "nor its repair: it is no JSON: Expecting value" in reasons["scans/40.png"]
    assert "cut at max_tokens" in reasons["scans/50.png"]
    assert "half of a surrogate pair" in reasons["scans/60.png"]
    assert len(server.asked) == 7 and tally.num_asked == 7
    again = label(file)  # what will not do is not paid for again either
    assert len(server.asked) == 7 and again.num_asked == 0
    assert again.rejected == sorted(tally.rejected, key=lambda entry: entry.origin)


def test_a_killed_run_pays_for_nothing_twice(server, tmp_path):
    scans(tmp_path, *range(30, 36))
    file = labels_file(tmp_path, server, tasks=TASKS[:1])
    server.hold = threading.Event()
    server.plans = {(33, "text"): ["held"]}
    process = subprocess.Popen(
        cli_command("data", "label", file), env=cli_environment(), stdout=subprocess.DEVNULL
    )
    while len(server.asked) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.hold.set()
    answers = tmp_path / "out" / "answers.jsonl"
    with answers.open("a") as stream:
        stream.write('{"key": "torn')
    tally = label(file)
    assert [width for width, _, _ in server.asked] == [30, 31, 32, 33, 33, 34, 35]
    assert (tally.num_known, tally.num_asked, tally.num_labels) == (3, 3, 6)
    # Where the server is, and what a task is called, is no reason to ask again.
    with serving(Server()) as moved:
        renamed = [{**TASKS[0], "name": "content"}]
        assert label(labels_file(tmp_path, moved, tasks=renamed)).num_labels == 6
        assert moved.asked == []
        changed = [{**TASKS[0], "prompt": "Write out everything."}]
        label(labels_file(tmp_path, moved, tasks=changed))
        assert len(moved.asked) == 6


def test_a_stopped_run_keeps_the_replies_under_way(server, tmp_path):
    scans(tmp_path, 30, 31, 32)
    file = labels_file(tmp_path, server, teachers=[{"parallel": 2}], tasks=TASKS[:1])
    server.hold = threading.Event()
    server.plans = {(30, "text"): ["held"], (31, "text"): ["held"]}
    process = subprocess.Popen(
        cli_command("data", "label", file),
        env=cli_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(server.asked) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    server.hold.set()
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and errors.endswith("stopped\n")
    assert "2 requests answered now" in shown and len(rows(tmp_path, "labels.jsonl")) == 2
    assert label(file).num_labels == 3
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "budget, prices, num_asked",
    [
        ({"max_tokens": 500}, {}, 4),
        ({"max_cost": 0.00052}, {"input_price": 1, "output_price": 4}, 2),
    ],
)
def test_a_budget_is_kept_and_can_be_raised(budget, prices, num_asked, server, tmp_path):
    scans(tmp_path, *range(30, 36))
    teachers = [{"parallel": 4, **prices}]
    file = labels_file(tmp_path, server, tasks=TASKS[:1], teachers=teachers, budget=budget)
    # An answer takes 110 tokens and may take 140.
    for _ in range(2):
        with pytest.raises(LabellingStopped, match=r"budget.max_.* are spent, .*raise the budget"):
            label(file)
        assert len(server.asked) == num_asked
        assert len(rows(tmp_path, "labels.jsonl")) == num_asked
    cost = read_json(tmp_path / "out" / "cost.json")
    assert cost["total"]["input_tokens"] == 100 * num_asked
    if prices:
        assert cost["total"]["cost"] == pytest.approx(0.00014 * num_asked)
    (key,) = budget
    assert label(file, overrides=[f"budget.{key}=1000000"]).num_labels == 6
    assert len(server.asked) == 6 and server.most <= 4


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(server, tmp_path, monkeypatch):
    scans(tmp_path, 30, 31)
    file = labels_file(tmp_path, server, tasks=TASKS[:1])

    calls, real = [], os.fsync

    def full_after_the_first(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:  # the first one is that of labels.json
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched, pytest.raises(LabellingStopped, match="No space left"):
        patched.setattr(os, "fsync", full_after_the_first)
        label(file)
    assert len(server.asked) == 1
    assert label(file).num_labels == 2
    assert len(server.asked) == 2


def test_a_budget_needs_counts(server, tmp_path):
    scans(tmp_path, 30)
    server.plans = {(30, "text"): ["free"]}
    file = labels_file(tmp_path, server, tasks=TASKS[:1], budget={"max_tokens": 1000})
    with pytest.raises(EvaluationError, match="do not say how many tokens"):
        label(file)


@pytest.mark.parametrize("status", [401, 302])
def test_a_refusal_ends_the_run_and_that_of_a_page_does_not(status, server, tmp_path, monkeypatch):
    scans(tmp_path, *range(30, 36))
    monkeypatch.setenv("TEACHER_KEY", KEY)
    file = labels_file(tmp_path, server, tasks=TASKS[:1], teachers=[{"api_key_env": "TEACHER_KEY"}])
    server.plans = {(30, "text"): [400], (32, "text"): [status]}
    with pytest.raises(EvaluationError, match=rf"teachers\.big: .* answers {status}: ") as caught:
        label(file)
    assert "\n" not in caught.value.message and KEY not in caught.value.message
    assert [width for width, _, _ in server.asked] == [30, 31, 32]
    assert label(file).num_labels == 6
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_teacher_that_is_down_ends_the_run(server, tmp_path):
    scans(tmp_path, *range(30, 50))
    server.plans = {(width, "text"): [503] * 9 for width in range(30, 50)}
    file = labels_file(tmp_path, server, tasks=TASKS[:1], teachers=[{"max_retries": 0}])
    with pytest.raises(LabellingStopped, match=f"the last {STOP_AFTER} requests failed"):
        label(file)
    assert len(server.asked) == STOP_AFTER
    server.plans = {(31, "text"): [503]}
    tally = label(file)
    assert (tally.num_labels, tally.num_unanswered) == (19, 1)


def test_the_key_is_in_no_file_and_no_line(server, tmp_path, monkeypatch):
    scans(tmp_path, 30, 31)
    key = tmp_path / "key.txt"
    key.write_text(f"{KEY}\n")
    file = labels_file(tmp_path, server, teachers=[{"api_key_file": str(key)}], tasks=TASKS[:1])
    server.plans = {(30, "text"): [400], (31, "text"): [f"the key is Bearer {KEY}"]}
    done = subprocess.run(
        cli_command("data", "label", file), env=cli_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no label (1): " in done.stdout and "answers 400" in done.stdout
    assert server.keys[0] == f"Bearer {KEY}"
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"answers.jsonl", "labels.jsonl", "cost.json"}
    for text in (
        done.stdout,
        done.stderr,
        *(path.read_bytes().decode("latin-1") for path in written),
    ):
        assert KEY not in text and json.dumps(KEY)[1:-1] not in text  # fmt: skip


def test_pages_leave_this_machine_only_for_a_host_that_is_named(tmp_path, server):
    scans(tmp_path, 30)
    remote = {"base_url": "https://api.example.com/v1", "name": "far"}
    file = labels_file(tmp_path, server, teachers=[{}, remote])
    with pytest.raises(ConfigError, match=r"--allow-host api\.example\.com allows it"):
        cli.main(["data", "label", str(file)], standalone_mode=False)
    for wrong in (["example.com"], ["api.example.com", "127.0.0.1"]):
        with pytest.raises(ConfigError, match=f"--allow-host {wrong[-1]} has no effect"):
            load_labels(file, allowed_hosts=wrong)
    assert load_labels(file, allowed_hosts=["API.example.com"]).teachers[1].name == "far"
    assert not (tmp_path / "out").exists() and server.asked == []


def test_documents_and_samples_are_pages_and_what_cannot_be_read_is_told(server, tmp_path):
    scans(tmp_path, 30)
    for name, options in (("two.pdf", {"resolution": 72}), ("two.tiff", {})):
        first, second = [Image.new("RGB", (width, 40 + len(name)), "white") for width in (50, 60)]
        file = tmp_path / "scans" / name
        first.save(file, save_all=True, append_images=[second], **options)
    (tmp_path / "scans" / "bad.pdf").write_bytes(b"no document")
    (tmp_path / "scans" / "bad.png").write_bytes(b"no image")
    picture(1, width=3000, height=20).save(tmp_path / "wide.png")
    table = lines(tmp_path / "rows.jsonl", {"image": "wide.png", "text": "left out"})
    source = {"type": "image_text", "path": table.name}
    file = labels_file(
        tmp_path,
        server,
        tasks=TASKS[:1],
        sources=[source],
        documents={"dpi": 72},
        max_pixels=30_000,
        teachers=[{"parallel": 3}],
    )
    tally = label(file)
    assert server.most <= 3
    origins = [row["origin"] for row in rows(tmp_path, "labels.jsonl")]
    assert origins == [
        "scans/30.png",
        *(f"scans/two.{kind}:{page}" for kind in ("pdf", "tiff") for page in (1, 2)),
        "rows.jsonl:1",
    ]
    # Sent smaller, kept as it is.
    assert sorted(width for width, _, _ in server.asked)[-1] == 2121
    *_, last = read("messages", tmp_path / "out" / "labels.jsonl", tmp_path)
    assert last.images == [(tmp_path / "wide.png").read_bytes()]
    groups = [row["group_id"] for row in rows(tmp_path, "labels.jsonl")]
    assert groups[1] == groups[2] != groups[3] == groups[4]
    told = {entry.origin: entry.reason.partition(":")[0] for entry in tally.rejected}
    assert told == {
        "scans/bad.pdf": "the document is neither a PDF nor a TIFF",
        "scans/bad.png": "not an image, or of a format outside JPEG, PNG, WEBP, GIF, BMP, TIFF",
    }
    assert label(file, limit=2).num_pages == 2


def test_a_document_is_asked_about_once_by_its_first_pages(server, tmp_path):
    scans(tmp_path, 30)
    first, *others = [Image.new("RGB", (width, 40), "white") for width in (50, 60, 70)]
    file = tmp_path / "scans" / "three.pdf"
    first.save(file, save_all=True, append_images=others, resolution=72)
    Image.new("RGB", (90, 40), "white").save(tmp_path / "scans" / "one.pdf", resolution=72)
    tasks = [TASKS[0], TASKS[1] | {"scope": "document"}]
    settings = {"documents": {"dpi": 72}, "document_pages": 2}
    tally = label(labels_file(tmp_path, server, tasks=tasks, **settings))
    labels = rows(tmp_path, "labels.jsonl")
    found = [(row["origin"], row["task"], len(row["images"])) for row in labels]
    assert found == [
        ("scans/30.png", "text", 1),
        ("scans/30.png", "kind", 1),
        ("scans/one.pdf:1", "text", 1),
        ("scans/one.pdf", "kind", 1),
        ("scans/three.pdf:1", "text", 1),
        ("scans/three.pdf:2", "text", 1),
        ("scans/three.pdf:3", "text", 1),
        ("scans/three.pdf", "kind", 2),
    ]
    assert (tally.num_pages, tally.num_copies) == (7, 0)
    assert len({row["group_id"] for row in labels}) == 3
    shown = [body["messages"][0]["content"] for _, task, body in server.asked if task == "kind"]
    assert [len(content) for content in shown] == [2, 2, 3]
    alone = labels_file(tmp_path, server, tasks=tasks[1:], **settings)
    assert (label(alone).num_pages, label(alone, limit=1).num_labels) == (3, 1)


def test_two_teachers_and_samplings_are_each_asked(server, tmp_path):
    scans(tmp_path, 30)
    teachers = [
        {"temperature": 0.7, "samples": 2, "structured_output": True},
        {"name": "small", "temperature": None, "options": {"max_tokens": None, "reasoning": "low"}},
    ]
    tally = label(labels_file(tmp_path, server, tasks=TASKS[1:], teachers=teachers))
    bodies = [body for _, _, body in server.asked]
    assert (tally.num_results, tally.num_labels, len(bodies)) == (3, 1, 3)
    found = [(row["teacher"], row["sampling"]) for row in rows(tmp_path, "results.jsonl")]
    assert found == [("big", 0), ("big", 1), ("small", 0)]
    first = [body for body in bodies if body.get("temperature") == 0.7]
    assert {body["seed"] for body in first} == {0, 1}
    assert first[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    (other,) = [body for body in bodies if "temperature" not in body]
    assert other["reasoning"] == "low" and "max_tokens" not in other and "seed" not in other


def test_one_process_at_a_time_and_damage_is_told(server, tmp_path):
    scans(tmp_path, 30)
    file = labels_file(tmp_path, server)
    with AnswerLog(tmp_path / "out" / "answers.jsonl"), pytest.raises(LeaseError):
        label(file)
    (tmp_path / "out" / "answers.jsonl").write_text('{"key": 1}\nxx\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:1: is damaged"):
        label(file)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"files": []}, "nothing to label"),
        ({"tasks": [TASKS[0] | {"promt": "x"}]}, "tasks.0.promt: unknown key .*'prompt'"),
        ({"tasks": [TASKS[0], TASKS[0]]}, "the name 'text' is given twice"),
        ({"tasks": [TASKS[1] | {"answer_schema": {"type": "objct"}}]}, r"no JSON schema: \$.type"),
        ({"tasks": [TASKS[1] | {"answer_schema": {"$ref": "http://[::1]:1"}}]}, "leads nowhere"),
        ({"tasks": [TASKS[1] | {"answer_schema": "none.json"}]}, "none.json: No such file"),
        ({"teachers": [{"samples": 2}]}, "samples above 1 need a temperature"),
        ({"teachers": [{"input_price": 1}]}, "given together"),
        ({"teachers": [{"options": {"model": "x"}}]}, "options.model"),
        ({"teachers": [{"api_key": "x"}]}, "looks like a secret"),
        ({"teachers": [{"api_key_env": "A", "api_key_file": "b"}]}, "exclude each other"),
        ({"budget": {"max_cost": 1}}, "needs the prices of teacher 'big'"),
        ({"sources": [{"type": "messages", "path": "x", "split": "train"}]}, "split has no effect"),
        ({"document_pages": 2}, "document_pages has no effect"),
        ({"files": [], "sources": [{"type": "messages", "path": "x"}], "documents": {"dpi": 72}},
         "documents has no effect"),
    ],
)  # fmt: skip
def test_wrong_files_are_told_in_one_line(changes, why, server, tmp_path):
    file = labels_file(tmp_path, server, **changes)
    with pytest.raises(ConfigError, match=why) as caught:
        load_labels(file)
    assert "\n" not in caught.value.message and "labels.yaml" in caught.value.message


def test_a_schema_may_stand_in_a_file_and_a_key_has_to_be_there(server, tmp_path, monkeypatch):
    scans(tmp_path, 30)
    (tmp_path / "kind.json").write_text(json.dumps(SCHEMA))
    tasks = [TASKS[1] | {"answer_schema": "kind.json"}]
    assert load_labels(labels_file(tmp_path, server, tasks=tasks)).tasks[0].answer_schema == SCHEMA
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for name, value in (("api_key_env", "NO_SUCH_KEY"), ("api_key_file", str(tmp_path / "no"))):
        with pytest.raises(EvaluationError, match=f"{name}.*no such"):
            label(labels_file(tmp_path, server, teachers=[{name: value}]))


def test_shipped_labelling_files_load():
    folder = Path(__file__).parents[1] / "experiments" / "labels"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        assert load_labels(file).tasks
        header = file.read_text().split("output:")[0]
        assert all(word in header for word in ("Purpose", "Command", "Hardware", "Expected time"))


def test_the_environment_variable_of_a_key_may_be_named_in_an_experiment(tmp_path):
    judge = "{base_url: 'http://localhost:1/v1', model: m, api_key_env: JUDGE_KEY}"
    file = tmp_path / "x.yaml"
    file.write_text(
        "name: x\ndata: {sources: [{type: messages, path: a.jsonl}]}\n"
        f"evaluation: {{metrics: [mathvista@judge], judge: {judge}}}\n"
    )
    assert load_experiment(file).evaluation.judge.api_key_env == "JUDGE_KEY"


def test_the_docs_name_every_key():
    text = (Path(__file__).parents[1] / "docs" / "labelling.md").read_text()
    named = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", text)}
    keys = {key for model in (LabelConfig, Task, Teacher, Budget) for key in model.model_fields}
    assert keys - named == set()
