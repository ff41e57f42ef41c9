"""What a pod has, and whether a store may be used from it: `doctor` of the pipelines runs this in one."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from distillery.code_version import code_version
from distillery.errors import DistilleryError
from distillery.store import check_access

SHM = "/dev/shm"


def probe(uri: str = "") -> dict[str, Any]:
    """This process's version and surroundings.

    Args:
        uri: a place to write to, read, list and delete; "" for none.

    Returns:
        `version`, `user` (number), `shm` (bytes of shared memory), `home` (whether HOME and the folder for temporary
        files can be written to) and `fault` (what is wrong with the place, and what to do; "" when it works).
    """
    fault = ""
    if uri:
        try:
            check_access(uri)
        except DistilleryError as error:
            fault = str(error)
    return {"version": code_version(), "user": os.getuid(), "shm": _size(SHM), "home": _home(), "fault": fault}


def _size(folder: str) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_frsize * found.f_blocks


def _home() -> bool:
    try:
        for folder in (os.path.expanduser("~"), None):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError:
        return False
    return True
