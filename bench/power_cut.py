"""What a power cut leaves of a folder: the recorder behind bench/faults.py and its tests.

    with Recorder(folder) as recorder:
        work()
    for cut in recorder.cuts(20, seed=0):
        cut.restore(folder)     # as the disk may be when the machine comes up again

A disk is sure to hold only what was fsynced.  The recorder looks at the folder before every
operation that Python announces (sys.addaudithook: open, rename, remove, mkdir, rmdir, truncate)
and at every os.fsync.  A cut at any of these moments restores

- names: every folder as it stood at one earlier moment, the same for all folders (file systems
  keep the order of such changes), but not before it was fsynced itself;
- bytes: what a file held at its last fsync; behind this, of what was written since: nothing, a
  part, all of it, or zeros of full length.
"""

import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Moment(NamedTuple):
    names: dict  # {inode of a folder: {name: inode}}
    bytes: dict  # {inode of a file: its bytes}
    synced_bytes: dict  # {inode of a file: its bytes at its last fsync}
    synced_names: dict  # {inode of a folder: the number of the moment of its last fsync}


class Recorder:
    """Moments of a folder while the block runs.  Files stay open, so that no inode is used
    twice; the folder should be small."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.moments = []
        self.open_files = {}
        self.known = {}  # inode: ((size, time of change), bytes)
        self.synced_bytes = {}
        self.synced_names = {}
        self.busy = True
        self.root = self._inode(self.folder)

    def __enter__(self):
        self._look()
        self.synced_bytes |= self.moments.pop().bytes  # what is there lies on the disk
        self._look()
        self.fsync = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._hook)  # it stays for ever, and is told to sleep
        self.busy = False
        return self

    def __exit__(self, *_):
        self._look()
        self.busy = True
        os.fsync = self.fsync
        for descriptor in self.open_files.values():
            os.close(descriptor)

    def _hook(self, event, _):
        if event in CHANGES and not self.busy:
            self._look()

    def _fsync(self, descriptor):
        self.fsync(descriptor)
        self._look()
        inode = os.fstat(descriptor).st_ino
        now = self.moments[-1]
        if inode in now.names:
            self.synced_names[inode] = len(self.moments) - 1
        if inode in now.bytes:
            self.synced_bytes[inode] = now.bytes[inode]

    def _look(self):
        self.busy = True
        names = {}
        contents = {}
        for place, folders, found in os.walk(self.folder):
            inodes = {name: self._inode(os.path.join(place, name)) for name in folders + found}
            names[self._inode(place)] = inodes
            contents |= {inodes[name]: self._read(os.path.join(place, name)) for name in found}
        moment = Moment(names, contents, {**self.synced_bytes}, {**self.synced_names})
        if not self.moments or moment != self.moments[-1]:
            self.moments.append(moment)
        self.busy = False

    def _inode(self, path):
        inode = os.stat(path).st_ino
        if inode not in self.open_files:
            self.open_files[inode] = os.open(path, os.O_RDONLY)
        return inode

    def _read(self, path):
        stat = os.stat(path)
        version = (stat.st_size, stat.st_mtime_ns)
        if self.known.get(stat.st_ino, [None])[0] != version:
            self.known[stat.st_ino] = version, Path(path).read_bytes()
        return self.known[stat.st_ino][1]

    def cuts(self, count, seed):
        """Yields `count` cuts at moments drawn at random, the last one among them."""
        draw = random.Random(seed)
        for number in range(count):
            last = len(self.moments) - 1
            at = draw.randrange(len(self.moments)) if number else last
            yield Cut(self, at, draw)


class Cut:
    """The power goes at moment `at`."""

    def __init__(self, recorder, at, draw):
        self.recorder = recorder
        self.at = at
        self.draw = draw
        self.journal = draw.choice([0, at, draw.randint(0, at)])  # names as of this moment

    @property
    def ended(self):
        """Whether the work had come to its end before."""
        return self.at == len(self.recorder.moments) - 1

    def restore(self, folder):
        """Replaces what is in a folder by what the disk holds."""
        shutil.rmtree(folder, ignore_errors=True)
        self._restore(self.recorder.root, Path(folder))

    def _restore(self, inode, folder):
        moments = self.recorder.moments
        synced = moments[self.at].synced_names.get(inode, 0)
        moment = moments[max(self.journal, synced)]
        folder.mkdir(parents=True)
        for name, inside in moment.names.get(inode, {}).items():
            if inside in moment.names:
                self._restore(inside, folder / name)
            else:
                (folder / name).write_bytes(self._content(inside))

    def _content(self, inode):
        now = self.recorder.moments[self.at]
        sure = now.synced_bytes.get(inode, b"")
        held = now.bytes.get(inode, sure)
        if not held.startswith(sure):  # cut off or written over since
            return self.draw.choice([sure, held])
        more = held[len(sure) :]
        part = more[: self.draw.randint(0, len(more))]
        return sure + self.draw.choice([b"", part, more, bytes(len(more))])
