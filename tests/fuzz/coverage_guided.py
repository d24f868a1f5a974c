"""Coverage-guided fuzzing of one reader with atheris (libFuzzer); not a part of the tests.

    pip install atheris
    python tests/fuzz/coverage_guided.py "webdataset tar" -max_total_time=60

What stands behind the reader's name are options of libFuzzer. An input that breaks the reader's
promise is written to `crash-<hash>` in the working directory, one that takes too long to
`timeout-<hash>`; `run_fuzz.py --replay` reads it again. Only Python is instrumented: inside Pillow,
PDFium and Arrow the fuzzer sees no branches.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
INSTRUMENTED = ["raytune_vlm", "PIL", "tarfile", "gzip", "json", "yaml"]

with atheris.instrument_imports(include=INSTRUMENTED):
    import gzip  # noqa: F401
    import json  # noqa: F401
    import tarfile  # noqa: F401

    import run_fuzz


def main() -> None:
    name, *options = sys.argv[1:]
    target = run_fuzz.TARGETS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary) / "folder", Path(temporary) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        target.prepare(folder)
        for number, data in enumerate(target.valid()):
            (corpus / str(number)).write_bytes(data)
            list(target.read(data, folder))
        before = run_fuzz.memory()
        limits = [f"-timeout={run_fuzz.CPU_SECONDS}", "-max_len=65536", "-verbosity=0"]

        def one(data: bytes) -> None:
            run_fuzz.execute(target, data, folder, before, timers=False)

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", *options, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
