"""The directory that a checkpoint is written to, whole or not at all.

Writing goes to a hidden directory beside the target, which then takes the target's place in one rename, so that a
process killed at any moment leaves the old directory or the new one.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jq.checkpoint import NOT_WEIGHTS, not_carried
from jq.errors import CheckpointError

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")


def checked(target: str | os.PathLike) -> Path:
    """The real path of a directory to write, which may be there or not; to ask before long work.

    Raises:
      CheckpointError: the target is a file, holds files but no checkpoint, is or holds the current directory, or no path.
    """
    if os.fspath(target) in ("", "."):  # the same for pathlib; the one is a shell's empty variable
        raise CheckpointError("no directory to write to: the path is empty or '.'; give a directory")
    try:
        path = Path(os.path.realpath(Path(target).expanduser()))  # a link stays one
        if os.path.exists(path) and not os.path.isdir(path):
            raise CheckpointError(f"{path}: is a file, and a directory is to be written there; give another path")
        if os.path.ismount(path):
            raise CheckpointError(f"{path}: is a mount point, whose place nothing can take; give a directory in it")
        if os.path.isdir(path) and _current().is_relative_to(path):
            raise CheckpointError(
                f"{path}: is or holds the current directory, which would be left without a name; write from elsewhere"
            )
        _kept(path)
    except (OSError, RuntimeError, ValueError) as e:  # no such user, a NUL
        raise CheckpointError(f"{str(target)!r}: cannot be written: {e}") from e
    return path


@contextmanager
def replacing(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary directory that takes `target`'s place when the block ends well, and vanishes when it does not.

    Of a checkpoint that was there the files go, directories within it and hidden files stay, and those that belong to none:
    what `not_carried` says.

    Raises:
      CheckpointError: what `checked` raises, or the target cannot be written.
    """
    target = checked(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target, "partial")
        temporary.mkdir()
        if os.path.isdir(target):
            shutil.copymode(target, temporary)
    except OSError as e:
        raise CheckpointError(f"{target}: cannot be written: {e}") from e
    try:
        yield temporary
        for item in _kept(target):
            if not os.path.lexists(temporary / item.name):
                _link(item, temporary / item.name)
        if not target.exists():
            os.rename(temporary, target)
        else:
            _exchange(temporary, target)
    except OSError as e:
        raise CheckpointError(f"{target}: cannot be written: {e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _current() -> Path:
    """The current directory; of one that is gone, a path that lies nowhere."""
    try:
        return Path(os.getcwd())
    except OSError:
        return Path()


def _beside(target: Path, suffix: str) -> Path:
    """A hidden name beside the target that nothing has."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def _kept(target: Path) -> list[Path]:
    """What stays of a directory whose checkpoint is replaced.

    Raises:
      CheckpointError: it holds no checkpoint, but other files, which would be lost.
    """
    found = sorted(target.iterdir()) if os.path.isdir(target) else []
    if found and not any(_of_a_model(f) for f in found):
        names = ", ".join(f.name for f in found[:4]) + (", ..." if len(found) > 4 else "")
        raise CheckpointError(
            f"{target}: holds files ({names}), but no checkpoint that a new one could replace; give a new or an empty "
            "directory"
        )
    return [f for f in found if f.name.startswith(".") or f.is_dir() or not_carried(f)]


def _of_a_model(file: Path) -> bool:
    """Whether a file tells that its directory is a checkpoint; a *.pt or a config.json may be any program's."""
    if file.name == "config.json":
        try:
            config = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(config, dict) and not {"model_type", "architectures", "quantization_config"}.isdisjoint(
            config
        )
    weights = file.name.startswith("pytorch_model") or file.name.endswith(_WEIGHTS)
    return weights and file.name not in NOT_WEIGHTS


def _link(item: Path, to: Path) -> None:
    """The same file or tree at another place, without a second copy of the bytes where the file system can."""

    def copy(source: str, copied: str) -> None:
        try:
            os.link(source, copied, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, copied, follow_symlinks=False)

    if item.is_dir() and not item.is_symlink():
        shutil.copytree(item, to, symlinks=True, copy_function=copy)
    else:
        copy(str(item), str(to))


def _exchange(new: Path, old: Path) -> None:
    """Swaps two directories; atomic on Linux (renameat2), two renames elsewhere."""
    at_cwd, rename_exchange = -100, 2
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), rename_exchange) == 0
    except (OSError, AttributeError):
        done = False
    if not done:
        aside = _beside(old, "old")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        shutil.rmtree(aside, ignore_errors=True)
