"""Where a verb is to run: `ssh://user@host[:port]/dir`, read so that no part of it can become an option of ssh."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

from edgecomp.errors import InvalidSpec

__all__ = ["Place", "read_place"]

_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*")  # a name, IPv4, or IPv6
_PART = re.compile(r"[A-Za-z0-9_.+@][A-Za-z0-9_.+@,=-]*")
_FORM = "write ssh://user@host[:port]/folder, or ssh://user@host/~/folder for one below the home there"
_LONGEST = 1024


class Place(msgspec.Struct, frozen=True):
    """A folder on another machine.

    Attributes:
        url: as it was given.
        user: "" leaves it to ssh's own configuration.
        host: a name (one of ssh's configuration, too) or an address.
        port: 0 leaves it to ssh's own configuration.
        folder: absolute, or `~/...`.
    """

    url: str
    user: str
    host: str
    port: int
    folder: str

    @property
    def login(self) -> str:
        """What a person types behind `ssh`."""
        return f"{f'-p {self.port} ' if self.port else ''}{f'{self.user}@' if self.user else ''}{self.host}"


def read_place(url: str) -> Place:
    """Read the value of `--on`.

    Raises:
        InvalidSpec: it is no such address, or a part of it holds a character that a shell or ssh could misread.
    """
    if len(url) > _LONGEST or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidSpec(f"--on {url[:80]!r} holds a space, a line break or a character beyond ASCII; {_FORM}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidSpec(f"--on {url}: {error}; {_FORM}") from None
    if parts.scheme != "ssh" or not parts.netloc:
        raise InvalidSpec(f"--on {url}: the only way to another machine is ssh; {_FORM}")
    if parts.password is not None:
        hidden = url.replace(f":{parts.password}@", ":...@", 1)
        raise InvalidSpec(f"--on {hidden}: edgecomp takes no password; set up a key with ssh-copy-id and leave it out")
    if "?" in url or "#" in url:
        raise InvalidSpec(f"--on {url}: `?` and `#` have no meaning here; {_FORM}")
    user, at, host = parts.netloc.rpartition("@")
    host = _without_port(host)
    if (at and not _USER.fullmatch(user)) or not _HOST.fullmatch(host) or port == 0:
        what = f"user {user!r}" if at and not _USER.fullmatch(user) else f"host {host!r} or its port"
        raise InvalidSpec(f"--on {url}: the {what} is not one that ssh takes as it stands; {_FORM}")
    return Place(url, user, host, port or 0, _read_folder(url, parts.path))


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _read_folder(url: str, path: str) -> str:
    parts = path.rstrip("/").split("/")[1:]
    at_home = parts[:1] == ["~"]
    below = parts[1:] if at_home else parts
    if not below:
        raise InvalidSpec(f"--on {url}: a folder of edgecomp's own is missing; {_FORM}")
    for part in below:
        if part in (".", "..") or not _PART.fullmatch(part):
            raise InvalidSpec(
                f"--on {url}: {part!r} in the folder is not plain; take letters, digits and _ . + @ , = - "
                "without a hyphen in front"
            )
    return "/".join(["~", *below]) if at_home else "/" + "/".join(below)
