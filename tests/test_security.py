"""Attacks that SECURITY.md names, tried with real files; other tests that try some stand there."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made import experiment
from rich.console import Console
from safetensors.torch import save_file
from sweep_folder_example import build_example
from test_sources import lines, png, read, reasons

from raytune_vlm import cli, cli_jobs, doctor
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.config.sources import PythonSource
from raytune_vlm.errors import CheckpointError, ConfigError, DataError, ModelError
from raytune_vlm.models import chat_template
from raytune_vlm.models.loading import load_base, load_processor
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import SweepFolder, read_json
from raytune_vlm.report.html import build_report
from raytune_vlm.sources.containers import parquet
from raytune_vlm.submission import jobs
from raytune_vlm.sweep.benchmarks import check_adapter
from raytune_vlm.sweep.folder_copy import FolderCopy, bring_back
from raytune_vlm.sweep.mirror import Mirror
from raytune_vlm.sweep.runner import recorded_experiment
from raytune_vlm.train import checkpoint

ROOT = Path(__file__).parents[1]
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"


class Payload:
    """Unpickled, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A finished sweep folder; not to be changed."""
    return build_example(tmp_path_factory.mktemp("built") / "sweep").root


@pytest.fixture
def example(built, tmp_path):
    """A sweep folder from elsewhere."""
    return SweepFolder(shutil.copytree(built, tmp_path / "sweep"))


@pytest.fixture
def mark(tmp_path):
    """What a pickle that is read would make."""
    file = tmp_path / "mark"
    pickle.loads(pickle.dumps(Payload(file)))
    assert file.exists(), "the payload works"
    file.rmdir()
    yield file
    assert not file.exists(), "code that came with data has run"


# --- the table ----------------------------------------------------------------------------------


def test_every_test_that_the_table_names_is_there():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
    table = text.split("| attack | refusal | test |\n|---|---|---|\n")[1].split("\n\n")[0]
    assert not [row for row in table.splitlines() if "::" not in row.split("|")[3]]


# --- pickles and code ---------------------------------------------------------------------------


def test_a_base_model_in_pickles_is_not_loaded(tiny_model, tmp_path, mark):
    folder = shutil.copytree(tiny_model("idefics3"), tmp_path / "model")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ModelError, match=r"not loaded: .*safetensors"):
        load_base(ModelConfig(name=str(folder)))


def test_a_pickle_under_the_name_of_a_safetensors_file_is_not_loaded(tiny_model, tmp_path, mark):
    folder = shutil.copytree(tiny_model("idefics3"), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ModelError, match="not loaded: "):
        load_base(ModelConfig(name=str(folder)))


def test_a_base_model_does_not_name_another_one_by_an_adapter(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("idefics3"), tmp_path / "model")
    config = {"peft_type": "LORA", "base_model_name_or_path": "somebody/else"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="holds an adapter"):
        load_base(ModelConfig(name=str(folder)))


def test_an_adapter_in_a_pickle_is_refused(tmp_path, mark):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        check_adapter(tmp_path, experiment())


def test_a_pickle_as_state_of_a_checkpoint_is_refused(tiny_base, tmp_path, mark):
    base = tiny_base("idefics3")
    model = attach(base.model, base.family, LoraConfig(rank=2), seed=0)
    try:
        checkpoint.save_adapter(model, tmp_path)
        optimizer = tmp_path / "optimizer.safetensors"
        optimizer.write_bytes(pickle.dumps(Payload(mark)))
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is no whole safeten"):
            checkpoint.load(tmp_path, model, None, rank=0, device="cpu")
        save_file({}, optimizer)
        (tmp_path / "adapter_model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is no whole safe"):
            checkpoint.load(tmp_path, model, None, rank=0, device="cpu")
    finally:
        base.model = detach(model)


STATE = {"step": 1, "plan_digest": "", "recipe_digest": "", "samples_seen": 1}


@pytest.mark.parametrize(
    ("state", "tensors", "reason"),
    [
        ("[]", {}, "state.json is damaged"),
        ('{"step": "one"}', {}, "state.json is damaged: step: "),
        (json.dumps({**STATE, "other": 1}), {}, "unknown key 'other'"),
        (json.dumps(STATE), {"rng/0/cpu": 3}, "its random state is damaged"),
        (json.dumps(STATE), {"rng/0/python": 3}, "its random state is damaged"),
        (json.dumps(STATE), {"w/exp_avg": 3}, "exp_avg of .* is \\(3,\\), not"),
    ],
)
def test_a_foreign_checkpoint_that_fits_nothing_is_refused(
    state, tensors, reason, tiny_base, tmp_path
):
    base = tiny_base("idefics3")
    model = attach(base.model, base.family, LoraConfig(rank=2), seed=0)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    try:
        checkpoint.save_adapter(model, tmp_path)
        (tmp_path / "state.json").write_text(state)
        named = {key.replace("w/", f"{name}/"): torch.zeros(n) for key, n in tensors.items()}
        save_file(named, tmp_path / "optimizer.safetensors")
        optimizer = torch.optim.AdamW([parameter])
        with pytest.raises(CheckpointError, match=reason):
            checkpoint.load(tmp_path, model, optimizer, rank=0, device="cpu")
    finally:
        base.model = detach(model)


def test_pickles_and_arrays_in_a_tar_are_not_read(tmp_path, mark):
    array = io.BytesIO()
    np.save(array, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for suffix, content in (
            ("pkl", pickle.dumps(Payload(mark))),
            ("npy", array.getvalue()),
            ("pth", pickle.dumps(Payload(mark))),
        ):
            for name, data in ((f"{suffix}.txt", b"t"), (f"{suffix}.{suffix}", content)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    found = reasons(read("webdataset", "x.tar", tmp_path))
    assert len(found) == 3 and all("unexpected member" in reason for reason in found)


@pytest.mark.parametrize("function", ["os:system", "builtins:eval", "subprocess:run", "runpy:f"])
def test_a_source_s_function_is_not_one_of_python_s(function):
    with pytest.raises(ValueError, match="must be a function of your own"):
        PythonSource(type="python", path="x", function=function)


def test_the_rules_of_the_linter_find_what_runs_code_of_data():
    attacks = {
        "S102": "exec(x)",
        "S202": "import tarfile\ntarfile.open(x).extractall()",
        "S301": "import pickle\npickle.loads(x)",
        "S302": "import marshal\nmarshal.loads(x)",
        "S307": "eval(x)",
        "S506": "import yaml\nyaml.load(x)",
        "S602": "import subprocess\nsubprocess.run(x, shell=True)",
        "S605": "import os\nos.system(x)",
        "TID251": "import torch\ntorch.load(x)",
    }
    code = "x = input()\n" + "\n".join(attacks.values()) + "\n"
    command = [Path(sys.executable).with_name("ruff"), "check", "--stdin-filename"]
    ours = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([*command, "raytune_vlm/x.py", "-"], input=code, **ours)
    assert not {rule for rule in attacks if f"{rule} " not in done.stdout}
    rules = ",".join(attacks)
    done = subprocess.run([*command[:2], "--select", rules, "raytune_vlm"], **ours)
    assert done.returncode == 0, done.stdout
    files = [file.read_text() for file in (ROOT / "raytune_vlm").rglob("*.py")]
    assert not any(re.search(f"noqa.*({rules.replace(',', '|')})", text) for text in files)


# --- sweep folders from elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize(
    "trial_id", ["../../x", "/etc", "..", "a/../b", "t0000/seed-1/..", "", "."]
)
def test_a_trial_s_id_leads_nowhere_else(trial_id, tmp_path):
    with pytest.raises(DataError, match="is no id of a trial"):
        SweepFolder(tmp_path).trial(trial_id)
    assert SweepFolder(tmp_path).trial("t0003/seed-1").root.is_relative_to(tmp_path)


def test_a_winner_s_id_in_a_foreign_result_leads_nowhere_else(example):
    plain = read_json(example.result_file)
    example.result_file.write_text(json.dumps({**plain, "winner": "../../../outside"}))
    with pytest.raises(DataError, match="is no id of a trial"):
        build_report(example.root)


def test_links_out_of_a_sweep_folder_are_refused_and_not_uploaded(example, tmp_path):
    (tmp_path / "key").write_text("secret")
    (example.root / "report").mkdir(exist_ok=True)
    (example.root / "inside").symlink_to(example.experiment_file)
    example.check_links()
    link = example.trial("t0000").root / "notes"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "key")
    with pytest.raises(DataError, match=r"is a link out of the sweep folder, to .*key"):
        recorded_experiment(example, None)
    FolderCopy(example, "memory://links/sweep").sync()
    try:
        there = fsspec.filesystem("memory").find("/links")
        assert there and not any(name.endswith(("notes", "inside")) for name in there)
    finally:
        fsspec.filesystem("memory").rm("/links", recursive=True)


def test_names_in_a_store_do_not_lead_out_of_the_folder(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/slip/sweep/experiment.json", b"{}")
    store.pipe("/slip/sweep/../../escaped", b"x")
    try:
        with pytest.raises(ConfigError, match="would be written outside"):
            bring_back("memory://slip/sweep", tmp_path / "runs")
    finally:
        store.rm("/slip", recursive=True)
    assert not any(file.name == "escaped" for file in tmp_path.rglob("*"))


def test_a_study_in_a_foreign_folder_is_not_read(tmp_path, mark):
    file = tmp_path / "study.db"
    file.write_bytes(pickle.dumps(Payload(mark)))
    Mirror(file, "x", ["maximize"], lambda line: None)
    assert file.read_bytes().startswith(b"SQLite format 3")


# --- what rows name -----------------------------------------------------------------------------


def test_no_address_in_a_row_is_asked(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        names = [
            f"http://127.0.0.1:{port}/a.png",
            f"HTTP://localhost:{port}/a.png",
            f"http://[::ffff:127.0.0.1]:{port}/a.png",
            f"http://2130706433:{port}/a.png",
            "http://169.254.169.254/latest/meta-data/",
            f"ftp://127.0.0.1:{port}/a.png",
            f"//127.0.0.1:{port}/a.png",
            f"url:http://127.0.0.1:{port}/a.png",
            "file:///etc/hostname",
            "file:/etc/hostname",
            "s3://bucket/a.png",
        ]
        rows = [{"image": name, "text": "t"} for name in names]
        rows += [{"image": {"bytes": None, "path": name}, "text": "t"} for name in names]
        found = reasons(read("image_text", lines(tmp_path / "x.jsonl", *rows), tmp_path))
        part = [{"type": "image_url", "image_url": {"url": names[0]}}]
        turns = [{"role": "user", "content": part}, {"role": "assistant", "content": "t"}]
        found += reasons(
            read("messages", lines(tmp_path / "y.jsonl", {"messages": turns}), tmp_path)
        )
        server.shutdown()
    assert all(found) and not asked


def test_a_fifo_or_a_device_in_place_of_an_image_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    rows = [{"image": f"{name}.png", "text": "t"} for name in ("fifo", "zero", "loop")]
    found = reasons(read("image_text", lines(tmp_path / "x.jsonl", *rows), tmp_path))
    assert "not found" in found[0] and "outside" in found[1] and found[2]


@pytest.mark.parametrize("bytes_at_once", [1 << 20, 1 << 30])
def test_a_parquet_file_that_would_fill_the_memory_costs_its_rows(
    bytes_at_once, tmp_path, monkeypatch
):
    monkeypatch.setattr(parquet, "BOMB_BYTES", bytes_at_once)
    images = [png(), b"\0" * (4 << 20)]
    table = pa.table({"image": images, "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", row_group_size=1)
    found = reasons(read("image_text", "x.parquet", tmp_path))
    assert found[0] == ""
    assert ("would decompress to" in found[1]) == (bytes_at_once == 1 << 20)


# --- chat templates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}",
            "1 s of",
        ),
        ("{% for a in range(9999) %}{{ messages }}{% endfor %}", "more than 1048576 characters"),
        ("{{ 'x' * 10**10 }}", "beyond all bounds: MemoryError"),
        ("{{ range(10**9) }}", "beyond all bounds: Range too big"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str'"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", "access to attribute '__init__'"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "",
        ),
    ],
)
def test_chat_templates_that_loop_or_reach_attributes_are_refused(
    template, reason, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    check = functools.partial(chat_template.check_template.__wrapped__, template, "owner/model")
    if not reason:
        check()
        assert len(list((tmp_path / "raytune_vlm" / "templates").iterdir())) == 1
        return
    with pytest.raises(ModelError, match=r"name='owner/model': its chat template is refu") as told:
        check()
    assert reason in told.value.message and "\n" not in told.value.message


def test_a_model_with_such_a_template_is_not_loaded(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("idefics3"), tmp_path / "model")
    for file in folder.glob("chat_template*"):
        file.unlink()
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ModelError, match="chat template is refused: it reaches for"):
        load_processor(ModelConfig(name=str(folder)))


# --- what is shown ------------------------------------------------------------------------------


def said(capsys, monkeypatch, *arguments):
    """Exit status and output of a command line in this process."""
    monkeypatch.setattr(sys, "argv", ["raytune-vlm", *map(str, arguments)])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    return status, out + err


def test_names_of_files_do_not_steer_the_terminal(tmp_path, capsys, monkeypatch):
    status, text = said(capsys, monkeypatch, "validate", tmp_path / f"x{ESCAPE}.yaml")
    assert status == 2 and "no such file" in text and "␛[2J" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_messages_and_tables_do_not_steer_the_console():
    stream = io.StringIO()
    with Monitor(Console(file=stream, force_terminal=True, highlight=False, width=99)) as monitor:
        monitor.say(f"read a{ESCAPE}.png\n[0:00] the winner is t0666")
        monitor.progress(f"[/x]{ESCAPE}", 1, 2, f"[/y]{ESCAPE}")
        monitor.table(f"[/t]{ESCAPE}", ["a", "[link=x]b"], [["[/z]", f"c{ESCAPE}"]])
    text = stream.getvalue()
    assert "\x1b]0;owned" not in text and "\x07" not in text and "\u202e" not in text
    assert "\n    [0:00] the winner is t0666" in text and "[/z]" in text and "[link=x]b" in text


def test_an_event_is_one_line_of_the_log(tmp_path, capsys, monkeypatch):
    message = f"boom{ESCAPE}\n2026-01-01 00:00:00 t0666 finished"
    row = {"seq": 1, "time": 0.0, "event": "failed", "trial_id": "t0000", "message": message}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "experiment.json").write_text("{}")
    status, text = said(capsys, monkeypatch, "logs", tmp_path)
    assert status == 0 and text.count("\n") == 1 and "\x1b" not in text and "␛[2J" in text


def test_the_leaderboard_holds_no_formulas(example):
    record = example.trial(example.trial_ids()[0]).record_file
    formula = '=HYPERLINK("http://host/"&A1)'
    record.write_text(json.dumps({**read_json(record), "status": "failed", "failure": formula}))
    build_report(example.root)
    text = (example.report / "leaderboard.csv").read_text()
    assert "'=HYPERLINK" in text
    assert not re.search(r'(^|[,"])[=+@]', text.replace("'=", ""), re.MULTILINE)


# --- secrets, modes and addresses ---------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "AIza" + "a1B2c" * 7,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.c2lnbmF0dXJl",
    ],
)
def test_keys_and_tokens_without_a_telling_name_are_refused(value, tmp_path):
    file = tmp_path / "x.yaml"
    source = f"{{type: messages, path: '{value}'}}"
    file.write_text(f"name: x\nmodel: {{name: demo}}\ndata: {{sources: [{source}]}}\n")
    with pytest.raises(ConfigError, match="the value looks like a secret") as told:
        load_experiment(file)
    assert value not in told.value.message
    with pytest.raises(ConfigError, match="looks like a secret") as told:
        jobs.read_env([f"A={value}"])
    assert value not in told.value.message


def test_doctor_tells_of_a_folder_in_which_everybody_writes(tmp_path):
    tmp_path.chmod(0o777)
    found = list(doctor.check_folder("storage", tmp_path))
    assert any("every user of this machine" in each.what for each in found)
    assert any(each.remedy == f"chmod o-w {tmp_path}" for each in found)
    tmp_path.chmod(0o1777)
    found = list(doctor.check_folder("storage", tmp_path))
    assert not any("every user of this machine" in each.what for each in found)


def test_no_job_goes_to_an_open_cluster_on_a_network_unasked(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self):
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    sent = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"

        @contextmanager
        def client(_):
            yield SimpleNamespace(get_address=lambda: address)

        monkeypatch.setattr(jobs, "job_client", client)
        monkeypatch.setattr(jobs, "submit", lambda *_: sent.append(1) or "x")
        new = jobs.Submission("x", "/runs/x", ["sweep"], {}, None)
        monkeypatch.setattr(doctor, "_own_address", lambda host: [])
        cli_jobs.start_job(address, new, open_cluster=False)  # a loopback address
        # The same server, as if this loopback address were one on a network.
        monkeypatch.setattr(doctor, "_is_loopback", lambda host: False)
        with pytest.raises(ConfigError, match="asks for no token: whoever reaches it runs code"):
            cli_jobs.start_job(address, new, open_cluster=False)
        assert len(sent) == 1
        cli_jobs.start_job(address, new, open_cluster=True)
        Handler.status = 401
        cli_jobs.start_job(address, new, open_cluster=False)  # it asks for a token
        server.shutdown()
    assert len(sent) == 3
