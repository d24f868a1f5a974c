"""The study as a SQLite file, for optuna-dashboard. It is only written: the ledger has it all."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, create_trial

from raytune_vlm.errors import LeaseError
from raytune_vlm.monitor import Say
from raytune_vlm.records import SweepFolder
from raytune_vlm.sweep.study_notes import Notes

LOCK_TIMEOUT_S = 20
"""How long a write waits for another process that has locked the file."""


class Mirror:
    """A copy of the ended trials of a study in a file, without what samplers keep for themselves,
    and with notes for optuna-dashboard.

    Raises
    ------
    LeaseError
        If another process has locked the file.
    """

    def __init__(self, file: Path, name: str, directions: Sequence[str], say: Say) -> None:
        _remove(file)
        self._file, self._say = file, say
        self._is_gone = False
        # Trials are written to it, not to the study, which would keep and compare all of them.
        self._storage = optuna.storages.RDBStorage(
            f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}}
        )
        study = optuna.create_study(
            storage=self._storage, study_name=name, directions=list(directions)
        )
        self._study_id = self._storage.get_study_id_from_name(name)
        self._notes = Notes(SweepFolder(file.parent), study)
        self._notes.write_head()

    def add(self, trial: FrozenTrial) -> None:
        """Copy a trial that has ended, and write its note."""
        if self._is_gone:
            return
        try:
            written = self._storage.create_new_trial(self._study_id, template_trial=_copy(trial))
            self._notes.write(written, trial)
        except StorageInternalError as error:
            self._is_gone = True
            reason = str(error.__cause__ or error).splitlines()[0]
            self._say(
                f"{self._file} cannot be written any more ({reason}): a dashboard will not see "
                "what follows, the sweep goes on; `resume` writes the file anew"
            )


def _copy(trial: FrozenTrial) -> FrozenTrial:
    copy = create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        intermediate_values=trial.intermediate_values,
        constraints=trial.constraints,
    )
    copy.datetime_start, copy.datetime_complete = trial.datetime_start, trial.datetime_complete
    return copy


def _remove(file: Path) -> None:
    """Remove the file of an earlier life of the sweep, unless somebody is at work in it."""
    if not file.exists():
        return
    connection = sqlite3.connect(file, timeout=1)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise LeaseError(
                f"{file} is locked by another process, perhaps a dashboard; close it and try again"
            ) from None
    except sqlite3.DatabaseError:
        pass  # no database at all: it is written anew in any case
    finally:
        connection.close()
    file.unlink()
