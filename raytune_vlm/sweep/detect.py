"""What a sweep can be expected to show: the smallest differences that its splits would tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raytune_vlm.config.evaluation import NO_SHARES
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.evaluate.statistics import detectable_difference
from raytune_vlm.records import BASE_TRIAL, Scores, SweepFolder, read_json


def detectable(
    experiment: ExperimentConfig, num_groups: int, pilot: Scores | None = None
) -> float | None:
    """The difference in the deciding metric that a split of so many groups would likely show.

    Parameters
    ----------
    pilot
        The base model's scores on any split; without them the variance is taken as the largest
        that a share can have.

    Returns
    -------
    float or None
        None without groups, and without a pilot where the metric is no share.
    """
    metric = experiment.metric
    is_share = metric not in NO_SHARES
    if num_groups < 1 or (pilot is None and not is_share):
        return None
    confidence = experiment.evaluation.confidence
    if pilot is None or pilot.num_groups < 2:
        return detectable_difference(num_groups, confidence=confidence)
    estimate = pilot.metrics[metric]
    return detectable_difference(
        num_groups,
        confidence=confidence,
        mode=experiment.mode,
        value=estimate.value,
        standard_error=estimate.standard_error,
        pilot_groups=pilot.num_groups,
        is_share=is_share,
    )


def base_scores(folder: SweepFolder, split: str = "select") -> Scores | None:
    """The base model's scores on a split, if it was scored."""
    file = folder.trial(BASE_TRIAL).evaluation(split, 0) / "scores.json"
    return Scores.from_json(read_json(file)) if file.exists() else None


def pilot_scores(experiment: ExperimentConfig, folder: SweepFolder) -> Scores | None:
    """The base model's scores on `select`, of this sweep or of one that it starts from.

    A sweep of `sweep.warm_start` is a pilot where it has to be on the same data and base model.
    """
    places = [folder.root]
    if not experiment.sweep.warm_start_across_data:
        places += map(Path, experiment.sweep.warm_start)
    for place in places:
        found = base_scores(SweepFolder(place))
        if found is not None and experiment.metric in found.metrics:
            return found
    return None


def detectable_lines(
    experiment: ExperimentConfig,
    sizes: Mapping[str, tuple[int, int]],
    pilot: Scores | None = None,
) -> list[str]:
    """What `select` and `report` can tell, a line each, for people.

    Parameters
    ----------
    sizes
        Split -> samples and groups; splits without samples are left out.
    """
    limits = {
        "select": experiment.data.max_select_samples,
        "report": experiment.data.max_report_samples,
    }
    lines = []
    for split, limit in limits.items():
        samples, groups = sizes.get(split, (0, 0))
        if samples == 0:
            continue
        # A choice of samples holds at most so many groups; it is about a share of them.
        used = min(samples, limit or samples)
        groups = min(groups, used)
        found = detectable(experiment, groups, pilot)
        where = f"{split} ({used} samples in at most {groups} groups)"
        if found is None:
            lines.append(
                f"{where}: what it can tell of {experiment.metric} is known when the base "
                "model is scored"
            )
            continue
        why = "from the base model's scores" if pilot else "at the largest variance there is"
        lines.append(
            f"{where}: differences in {experiment.metric} from {found:.3f} are told in 80 % of "
            f"sweeps, {why}"
        )
    return lines
