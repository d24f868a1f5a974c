"""The report of a sweep: an HTML page, plots, leaderboard files and the winner's model card.

Reads a sweep folder, also a copied one, also one whose sweep still runs. Imports neither torch
nor ray.
"""

from raytune_vlm.report.html import build_report

__all__ = ["build_report"]
