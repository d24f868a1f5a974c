"""Sweeps as jobs of a Ray cluster, and what can be asked of a sweep from outside its process.

`working_dir.py`: what a job is sent; `jobs.py`: Ray's job server; `folder.py`: a sweep folder.
"""
