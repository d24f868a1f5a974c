"""`python -m raytune_vlm`: the command line, as it runs under `ray job submit`."""

from raytune_vlm.cli import main

main()
