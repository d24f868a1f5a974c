"""The report of a sweep: an HTML page, plots, leaderboard files and the winner's model card.

Reads a sweep folder, also a copied one, also one whose sweep still runs. Imports neither torch
nor ray. `html.build_report` is not imported here: who only formats a number needs no matplotlib.
"""
