"""Who holds the cluster's resources: what a person needs to know when nothing moves."""

from __future__ import annotations

MOST_HOLDERS = 6


def holders() -> str:
    """One line: what is in use, and the placement groups that hold most of it; never raises."""
    try:
        return _holders()
    except Exception as error:  # it must not hide what it is to explain
        return f"the cluster does not say who holds its resources ({type(error).__name__})"


def _holders() -> str:
    import ray
    from ray.util import placement_group_table

    there, free = ray.cluster_resources(), ray.available_resources()
    used = ", ".join(
        f"{kind} {there[kind] - free.get(kind, 0):g} of {there[kind]:g} in use"
        for kind in ("CPU", "GPU")
        if there.get(kind)
    )
    groups = []
    for group in placement_group_table().values():
        if group["state"] == "REMOVED":
            continue
        bundles = group["bundles"].values()
        cpus = sum(bundle.get("CPU", 0) for bundle in bundles)
        gpus = sum(bundle.get("GPU", 0) for bundle in bundles)
        name = group["name"] or group["placement_group_id"][:8]
        asked = f"{cpus:g} CPU" + (f", {gpus:g} GPU" if gpus else "")
        waiting = " (waiting)" if group["state"] == "PENDING" else ""
        groups.append((cpus + 100 * gpus, f"{name}: {asked}{waiting}"))
    named = [text for _, text in sorted(groups, reverse=True)[:MOST_HOLDERS]]
    rest = f" and {len(groups) - len(named)} more" if len(groups) > len(named) else ""
    held = "; ".join(named) + rest if named else "no placement group holds any"
    return f"{used or 'no CPU in the cluster'}; {held}"
