"""The command line: fast starts, bad input as one clear line and status 2, nothing half-written."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from clusters import OF_A_CLUSTER
from made import run_cli

from raytune_vlm.cli import main

pytestmark = [*OF_A_CLUSTER]

PROBE = """
import sys
sys.argv = ["raytune-vlm", *sys.argv[1:]]
from raytune_vlm.cli import main
try:
    main()
except SystemExit as end:
    status = end.code or 0
else:
    status = 0
heavy = sorted({"torch", "ray", "transformers", "peft"} & set(sys.modules))
print("HEAVY", heavy)
sys.exit(status)
"""


def refused(*arguments: object) -> str:
    """The one line that the command line ends with, after status 2."""
    done = run_cli(*arguments, check=False)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def refused_here(*arguments: object) -> str:
    """As `refused`, by `main` in this process, which spares a start."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stderr(said),
        pytest.raises(SystemExit) as end,
    ):
        patch.setattr(sys, "argv", ["raytune-vlm", *map(str, arguments)])
        main()
    assert end.value.code == 2 and "Traceback" not in said.getvalue(), said.getvalue()
    return said.getvalue().strip().splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["validate"], ["schema"]])
def test_help_validate_and_schema_load_nothing_heavy(arguments, write_experiment):
    if arguments == ["validate"]:
        arguments = ["validate", "--quick", str(write_experiment()[0])]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout[-300:]


def test_validate_predicts_parameters_by_scope_and_memory(write_experiment):
    file, _ = write_experiment(lora={"rank": 4, "rank_by_scope": {"vision": 2}, "scope": "vision"})
    line = run_cli("validate", file, "lora.modules_to_save=projector").stdout.splitlines()[-1]
    assert "vision 1,664 at rank 2" in line and "projector 8,192 in full" in line
    assert "a worker needs about" in line and "samples of 2,04" in line


def test_a_dry_run_takes_a_tiny_model_of_a_family(write_experiment, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    file, _ = write_experiment(model={"name": "somebody/Some-Model-7B", "revision": "main"})
    found = run_cli("validate", file, "--quick", "--tiny", "llava").stdout
    assert "tiny:llava (llava)" in found
    assert "no such family (did you mean 'llava'" in refused_here(
        "validate", file, "--tiny", "lava"
    )


def test_a_typo_in_a_key_names_file_line_and_nearest(write_experiment):
    file, folder = write_experiment(own_data=True, lora={"rnak": 4})
    line = 1 + file.read_text().splitlines().index("  rnak: 4")
    message = refused("sweep", file)
    assert f"{file.name}:{line}" in message and "did you mean 'rank'" in message
    assert not folder.parent.exists()


def test_bad_values_spaces_and_overrides_are_refused(write_experiment):
    file, folder = write_experiment(own_data=True)
    assert "override train.batch_size=0" in refused_here("sweep", file, "train.batch_size=0")
    assert "did you mean" in refused_here("sweep", file, "train.lerning_rate=1")
    file, _ = write_experiment(
        own_data=True,
        sweep={
            "scheduler": {"type": "fifo"},
            "search_space": {"lora.rnk": {"type": "choice", "values": [1]}},
        },
    )
    assert "lora.rnk" in refused_here("validate", file)
    assert not folder.parent.exists()


def test_missing_data_and_models_are_named_with_the_nearest(write_experiment):
    file, folder = write_experiment(own_data=True)
    assert "did you mean" in refused_here("sweep", file, "data.sources.0.path=trian.jsonl")
    assert "/no/such/folder" in refused_here("sweep", file, "data.root=/no/such/folder")
    assert "did you mean 'demo'" in refused("sweep", file, "model.name=dmeo")
    assert not folder.parent.exists()
    assert "is not a sweep folder" in refused_here("resume", folder)
    assert "No such command 'swep'" in refused_here("swep", file)


@pytest.mark.usefixtures("ray_cluster")
def test_bad_rows_are_named_and_leave_no_sweep_folder(write_experiment):
    file, folder = write_experiment(own_data=True)
    train = Path(file).parent / "data" / "train.jsonl"
    rows = train.read_text().splitlines()
    image = Path(file).parent / "data" / "images" / "train-0.png"
    image.write_bytes(image.read_bytes()[:300])
    rows[4] = rows[0].replace('{"type": "image"},', '{"type": "image"}, {"type": "image"},')
    rows[6] = rows[6][:40]
    train.write_text("\n".join(rows) + "\n")
    message = refused("sweep", file)
    assert "3 of 46 samples cannot be used" in message
    assert "train.jsonl:1" in message and "truncated" in message
    assert "train.jsonl:5: 2 <image> placeholders but 1 image" in message
    assert "train.jsonl:7: malformed JSON" in message
    assert not folder.exists()
    allowed = run_cli("prepare", file, "data.max_bad_fraction=0.2")
    assert "3 quarantined" in allowed.stdout


@pytest.mark.usefixtures("ray_cluster")
def test_an_empty_data_set_is_refused(write_experiment):
    file, folder = write_experiment(own_data=True)
    train = Path(file).parent / "data" / "train.jsonl"
    train.write_text("")
    assert "no training samples" in refused("sweep", file) and not folder.exists()


@pytest.mark.usefixtures("ray_cluster")
def test_an_over_long_sample_is_one_line_where_it_is_an_error(write_experiment):
    file, folder = write_experiment("refused")
    done = run_cli("prepare", file, "data.max_length=10", "data.over_long=error", check=False)
    assert done.returncode == 2 and not folder.exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "tokens, more than data.max_length=10" in lines[0]
    assert "Traceback" not in done.stderr
