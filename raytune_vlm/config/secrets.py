"""Secrets do not belong into an experiment: it is copied into every sweep folder and report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_KEY = re.compile(
    r"(^|[_-])(token|password|passwd|secret|credentials?|api_?key|access_?key|private_?key|auth)"
    r"([_-]|$)(?!env$|file$)",  # `api_key_env` and `api_key_file` say where a key is to be had
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"(?<![A-Za-z0-9])("
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{16,}"  # OpenAI and its like
    r"|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|AKIA[A-Z0-9]{16}"
    r"|xox[abprs]-[\w-]{10,}"
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}"  # a JSON web token
    r")|://[^/\s:@]+:[^/\s@]+@"  # user:password in an address
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def secret_problems(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys that look like secrets, each with a message without the value."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            dotted = f"{path}.{key}" if path else str(key)
            if isinstance(key, str) and _KEY.search(key):
                yield dotted, f"{dotted}: looks like a secret; {_ADVICE}"
            else:
                yield from secret_problems(value, dotted)
    elif isinstance(data, str) and _VALUE.search(data):
        yield path, f"{path}: the value looks like a secret; {_ADVICE}"


def hides_secret(text: str) -> bool:
    """Whether a text, such as an override not yet read, contains what looks like a secret."""
    return _VALUE.search(text) is not None


_ADVICE = "never put one into an experiment, use an environment variable (HF_TOKEN for the hub)"
