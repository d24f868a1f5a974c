"""`experiment.json` of a sweep folder as every command reads it: ours and whole, or one clear line.

A folder may be another program's, of another version of this one, or edited by hand.
"""

from __future__ import annotations

from typing import Any

from raytune_vlm import __version__
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.loader import validated
from raytune_vlm.errors import ConfigError, first_line
from raytune_vlm.records import SweepFolder, read_json

_KINDS = {"experiment": dict, "fingerprint": str, "data": str, "versions": dict}


def read_head(folder: SweepFolder, *needed: str) -> dict[str, Any]:
    """What `experiment.json` holds: `experiment`, and the keys that are `needed`, for certain.

    Raises
    ------
    ConfigError
        If it is not there, cannot be read, or is not as a sweep writes it.
    """
    file = folder.experiment_file
    if not file.is_file():
        raise ConfigError(f"{folder.root} is not a sweep folder: it has no experiment.json")
    try:
        head = read_json(file)
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{file}: is not as a sweep writes it: {first_line(error)}") from None
    for key in ("experiment", *needed):
        if not isinstance(head.get(key), _KINDS[key]):
            raise ConfigError(f"{file}: {key}: is missing or of another kind: not written by us")
    return head


def experiment_in(folder: SweepFolder, **changes: Any) -> ExperimentConfig:
    """The experiment of a sweep folder, with some of its keys changed.

    Raises
    ------
    ConfigError
        As `read_head`; or if the experiment is not one of this version, one line a problem.
    """
    head, name = read_head(folder), str(folder.experiment_file)
    versions = head.get("versions")
    before = versions.get("raytune-vlm") if isinstance(versions, dict) else None
    if before not in (None, __version__):
        name += f" (written by raytune-vlm {before}, this is {__version__})"
    return validated(ExperimentConfig, {**head["experiment"], **changes}, {"": name})
