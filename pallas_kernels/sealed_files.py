"""Files that are sure to be as this user wrote them: machine code that is kept on disk, and run when it is found.

    DIRECTORY/secret            32 random bytes
    DIRECTORY/KEY.SUFFIX        a MAC over the key and the content, then the content

A file is believed only if the directory is this user's and nobody else may write to it, and only if its MAC shows that
it was written with the secret that lies there, under that key: what is damaged, or was put there by somebody else, is
as good as not there.
"""

import contextlib
import hashlib
import hmac
import logging
import os
import pathlib
import secrets
import stat
import tempfile

_MAC_BYTES = hashlib.sha256().digest_size

_logger = logging.getLogger(__name__)


class SealedFiles:
    """Of one directory, which must be there. Raises ValueError if others could have written to it."""

    def __init__(self, directory: pathlib.Path, suffix: str, most_bytes: int):
        """With more than `most_bytes`, those go first that were not used for the longest time."""
        self._directory, self._suffix, self._most_bytes = directory, suffix, most_bytes
        if problem := not_private(directory):
            raise ValueError(problem)
        self._secret = _read_secret(directory / "secret")

    def path(self, key: str) -> pathlib.Path:
        return self._directory / f"{key}.{self._suffix}"

    def read(self, key: str) -> bytes | None:
        """None if it is not there, or not as it was written."""
        path = self.path(key)
        try:
            mac, content = (sealed := path.read_bytes())[:_MAC_BYTES], sealed[_MAC_BYTES:]
        except OSError:
            return None
        with contextlib.suppress(OSError):  # where nothing may be written, nothing has to make room either
            os.utime(path)
        if not hmac.compare_digest(mac, self._mac(key, content)):
            _logger.warning("%s is damaged, or was not written here: it is made anew", path)
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Whole or not at all; OSError if it cannot."""
        path = self.path(key)
        with tempfile.TemporaryDirectory(dir=self._directory) as beside:
            (new := pathlib.Path(beside) / path.name).write_bytes(self._mac(key, content) + content)
            new.replace(path)
        self._make_room()

    def _make_room(self) -> None:
        found = [(path, path.stat()) for path in self._directory.glob(f"*.{self._suffix}")]
        excess = sum(about.st_size for _, about in found) - self._most_bytes
        for path, about in sorted(found, key=lambda entry: entry[1].st_mtime):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= about.st_size

    def _mac(self, key: str, content: bytes) -> bytes:
        return hmac.new(self._secret, key.encode() + content, hashlib.sha256).digest()


def make_private(directory: pathlib.Path) -> pathlib.Path:
    """The directory, which is made if it is not there. OSError if it cannot be."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory


def not_private(directory: pathlib.Path) -> str | None:
    """Why what lies in a directory may not be this user's own; None: it is."""
    about = directory.stat()
    if about.st_uid != os.geteuid():
        return f"{directory} belongs to another user"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {directory}; run chmod go-w {directory}"
    return None


def _read_secret(path: pathlib.Path) -> bytes:
    """Made by whoever comes first; the same for all."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.write(secrets.token_bytes(_MAC_BYTES))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
    return path.read_bytes()
