"""The notes and images that optuna-dashboard shows beside a trial's numbers."""

from __future__ import annotations

import optuna
import pytest
from watched import Watched, config

from raytune_vlm.sweep.ledger import replay
from raytune_vlm.sweep.study import SweepStudy
from raytune_vlm.sweep.study_notes import how_to_watch, images_folder, plain

dashboard = pytest.importorskip("optuna_dashboard")


def test_a_trial_s_note_has_recipe_interval_and_answers_beside_their_images(tmp_path):
    watched = Watched(tmp_path)
    watched.write_pictures()
    watched.first_life()
    settings = config()
    for _ in range(2):  # the study is made anew in each life
        SweepStudy(settings, tmp_path / "study.db", replay(tmp_path / "ledger.jsonl").values(), (),
                   pytest.fail)  # fmt: skip
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.load_study(study_name="test", storage=storage)
    (trial,) = study.trials
    assert trial.duration is not None and trial.user_attrs["trial"] == "t0000"
    assert trial.state.name == "PRUNED" and trial.intermediate_values == {10: 0.5}
    note = dashboard.get_note(optuna.trial.Trial(study, trial._trial_id))
    assert note.startswith("# t0000: stopped at step 10")
    assert "| `lora.rank` | 4 |" in note and "0.500 | 0.400 to 0.600" in note
    assert "bun or a bun" in note and "![x]" not in note and "<b>" not in note
    stored = {file.name for file in images_folder(watched.folder).iterdir()}
    known = {meta.artifact_id for meta in optuna.artifacts.get_all_artifact_meta(study)}
    assert len(stored) == 2 and stored == known
    for name in stored:
        assert f"![](/artifacts/{study._study_id}/{name})" in note
    assert str(tmp_path / "study.db") in how_to_watch(watched.folder)


def test_data_without_images_has_notes_too(tmp_path):
    watched = Watched(tmp_path)
    watched.first_life()
    SweepStudy(config(), tmp_path / "study.db", replay(tmp_path / "ledger.jsonl").values(), (),
               pytest.fail)  # fmt: skip
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path / 'study.db'}")
    (trial,) = study.trials
    assert dashboard.get_note(optuna.trial.Trial(study, trial._trial_id)).startswith("# t0000")


def test_text_from_outside_stays_text():
    assert plain("a|b\n*c* <i>") == r"a\|b \*c\* \<i\>"
    assert len(plain("x" * 1000)) == 401
