"""Files that survive a kill, a full disk and a power cut: whole lines, moves, locks."""

import contextlib
import errno
import os
from pathlib import Path

from opd.records import BadInput

try:
    import fcntl
except ImportError:  # Windows: no lock, two writers of one file are not noticed there
    fcntl = None


def append_whole(file, lines):
    """Appends bytes to an unbuffered file in one piece; on a full disk the file is cut back to
    what it was."""
    before = os.fstat(file.fileno()).st_size
    written = 0
    try:
        while written < len(lines):
            written += file.write(lines[written:])
    except OSError as error:
        os.ftruncate(file.fileno(), before)
        raise BadInput(
            f"{file.name}: could not append ({error.strerror}); every record written before "
            f"is whole: make room and run the same command again"
        ) from None


def cut_torn_line(path):
    """A kill can leave half a line at the end of a JSONL file, and a power cut zeros in place
    of lines that were not on the disk yet: cut it off (its records are made again)."""
    with open(path, "r+b") as f:
        whole = sum(len(line) for line in f if line.endswith(b"\n"))
        f.truncate(whole)


def sync(path):
    """Puts the bytes of a file, or the names in a folder, on the disk.  Until then a power cut
    may take them, or leave zeros in their place."""
    if not fcntl:  # Windows cannot do it to a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder):
    """Puts a folder with all that is in it on the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(place, name))
        sync(place)


def make_folder(path):
    """Makes a folder and its parents, and puts their names on the disk."""
    path = Path(path)
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def rename_durably(old, new):
    """Moves a file or folder whose content is on the disk, so that the move is, too."""
    os.replace(old, new)
    for folder in {Path(new).parent, Path(old).parent}:
        sync(folder)


def write_atomically(path, text):
    """Writes a small file (a string, or an iterable of strings) so that a reader sees the old
    one or the new one, even after a power cut."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines([text] if isinstance(text, str) else text)
            f.flush()
            os.fsync(f.fileno())
        rename_durably(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a name that is too long is none to delete either
            temporary.unlink(missing_ok=True)
        raise BadInput(
            f"{path}: could not write ({error.strerror}): {advice_on_error(error)}"
        ) from None


def open_locked(path):
    """The file, open to append, with a lock that ends with this process or its close().  Raises
    BlockingIOError where another process has it."""
    while True:
        file = open(path, "ab", buffering=0)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            pass  # a file system without locks
        # who had the lock before may have replaced or removed the file meanwhile
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def advice_on_error(error):
    """What to do about an OSError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room and run the same command again"
    return "give another --out, or change what stands in its way and run again"
