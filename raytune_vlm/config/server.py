"""Servers that speak OpenAI's chat API: where one is, and how it is asked."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from raytune_vlm.config.section import Section


class ServerConfig(Section):
    """An OpenAI-compatible server and one of its models."""

    base_url: str
    """Where it is, with the version: `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """The model to ask, as the server names it."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key; the key itself is not written here."""
    api_key_file: str | None = None
    """File of nothing but the key, instead of an environment variable."""
    timeout_s: float = Field(default=60.0, gt=0)
    """The longest that one request may take."""
    max_retries: int = Field(default=4, ge=0)
    """Tries after the first, with growing pauses, where the server is busy or out of reach."""
    parallel: int = Field(default=4, ge=1, le=64)
    """Requests at once."""

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is no address: http://HOST:PORT/v1 is wanted")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("an address without user, password and query is wanted")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _has_one_key(self) -> ServerConfig:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env and api_key_file exclude each other")
        return self

    @property
    def host(self) -> str:
        """The name or number of the machine."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether what is sent stays on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class ServedModel(ServerConfig):
    """A model that a server answers for, in `evaluate --server`."""

    timeout_s: float = Field(default=300.0, gt=0)
    """The longest that one answer may take."""
    parallel: int = Field(default=8, ge=1, le=256)
    """Questions at once."""
    allowed_host: str | None = None
    """The machine that images may be sent to, where it is not this one."""

    @model_validator(mode="after")
    def _images_stay_here(self) -> ServedModel:
        if self.allowed_host is None and not self.is_local:
            raise ValueError(
                f"{self.host} is another machine, and images and questions would be sent there; "
                f"--server-host {self.host} allows it"
            )
        if self.allowed_host is not None and self.allowed_host.lower() != self.host:
            raise ValueError(
                f"--server-host {self.allowed_host} has no effect: --server is at {self.host}"
            )
        return self
