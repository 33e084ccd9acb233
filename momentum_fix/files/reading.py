"""Checkpoint files: the counters of their norm layers, as data alone.

A file is not to be trusted. So nothing in it is executed, imported, hashed or decompressed, and it is read in an
amount of memory and time that has a bound. torch's own loader has none: it builds every tensor, and calls functions
that the file chooses. (It also takes a quarter of a minute for 100,000 tensors, of which only the counters matter.)
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from momentum_fix._tables import printable, shortened
from momentum_fix.files.unpickling import OBJECTS, STEPS, TOO_MUCH, Dictionary, Name, Refused, Tensor, damaged, unpickle

COUNTER = "num_batches_tracked"
_NAMES = (COUNTER, "running_mean", "running_var")
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pt.tar", ".pth.tar", ".ckpt.tar")
INDEX = ".index.json"
# What trainers save beside a model, by exact name.
_BESIDE = re.compile(r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)(_\d+)?\.(pt|pth|bin)")
_LARGEST = 2**25  # bytes of a pickle or a header; 200,000 tensors need 20 MB
_MANY = 350_000  # entries of an index or a header
_LAYERS = 2**17
_WORDS = 2**24  # characters of the names of all layers, each with the way to it
_DEEP = 10_000  # containers in containers that are searched
_WAY = 20  # keys on the way to a container that are written
_NOTE = 80  # characters of what is said about one counter

# What files of other formats are, by how they begin or by the names in an archive, and what to audit instead.
_INSTEAD = "Audit `model.state_dict()`, or a file that it was saved to"
_KERAS = "as Keras writes it, whose layers do not count batches. Of a PyTorch model, audit `model.state_dict()`"
_TOOL = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
_DISTRIBUTED = f"is a distributed checkpoint. Convert its directory with `{_TOOL} DIRECTORY FILE`, and audit that file"
_PROGRAM = "is a program of torch.export. Audit `torch.export.load(file).state_dict`"
_BEGINNINGS = {
    r"\x89HDF\r\n": f"is HDF5, {_KERAS}",
    r"\x93NUMPY": f"is a NumPy array, without names of layers. {_INSTEAD}",
    r"\x08[\3-\x1f](\x12.[ -~]|:)": f"is ONNX, an exported graph without counters. {_INSTEAD}",
    r"\x80(?!.{,20}l\xfc\x9cF\xf9)": f"is a pickle, but not of torch.save; nothing in it was executed. {_INSTEAD}",
    r"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": "is compressed. Decompress it, and audit what it holds",
    r".{257}ustar": "is a tar archive. Unpack it, and audit what it holds",
    r"version https://git-lfs": "is only a pointer to the file. Fetch the file itself with `git lfs pull`",
    r"(?i)\s*<(!doctype )?html": "is a web page. Open it: it may say why the file was not downloaded",
}
_ENTRIES = {
    r".*/constants\.pkl$": f"is TorchScript. {_INSTEAD}",
    r".*\b(archive_format|serialized_exported_program\.json)$": _PROGRAM,
    r".*\.npy$": "is a NumPy archive. If it holds a state dict, audit `numpy.load(file)`",
    r".*\.h5$": f"is a model {_KERAS}",
}

Layers = dict[str, Any]  # the counter of each layer, or None


class UnreadableError(ValueError):
    """A file cannot be read; the message names the file, the reason and the remedy."""


class Odd(NamedTuple):
    """A counter that is no number, and what it is instead."""

    what: str


def checkpoint_files(path: Path) -> list[Path]:
    """Give the path itself, or the checkpoints of a directory.

    Shards stand under their index, and what trainers save beside a model is left out.

    Raises:
        UnreadableError: the path may not be looked at, or is a directory that holds none.
    """
    with _sentences(path):
        if not path.is_dir():
            return [path]
        names = sorted(os.listdir(path))
    files = [path / name for name in names if name.endswith((*_ENDINGS, INDEX)) and not _BESIDE.fullmatch(name)]
    shards: set[str] = set()
    for index in files:
        if index.name.endswith(INDEX):
            with suppress(Exception):  # which reading the index itself will report
                shards.update(_weight_map(index).values())
    files = [file for file in files if file.name not in shards]
    if not files:
        nothing = f"holds no file that ends in {', '.join(_ENDINGS)} or {INDEX}"
        raise _unreadable(path, _DISTRIBUTED if any(name.endswith(".distcp") for name in names) else nothing)
    return files


def read(path: Path) -> list[tuple[str, Layers]]:
    """Give the counters of each state dict in a file, with the way to it.

    Raises:
        UnreadableError: the file cannot be read.
    """
    with _sentences(path):
        found = _read(path)
        if sum(sum(map(len, layers)) + len(way) * len(layers) for way, layers in found) > _WORDS:
            raise Refused(TOO_MUCH)
        return found


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn every error into one sentence: damaged and foreign bytes can raise nearly anything inside a reader."""
    try:
        yield
    except Refused as error:
        raise _unreadable(path, str(error)) from error
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror or error})") from error
    except Exception as error:
        raise _unreadable(path, "is damaged or no checkpoint") from error


def _unreadable(path: Path, reason: str) -> UnreadableError:
    return UnreadableError(printable(f"{shortened(str(path))}: {reason}"))


def _read(path: Path) -> list[tuple[str, Layers]]:
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == ".distcp":
        raise Refused(_DISTRIBUTED)  # which is an archive after the other, as other damaged files are
    with _open(path) as file:
        head = file.read(300)
        if head[5:9] == b"\0\0\0{":  # after a length of 8 bytes
            return [("", _read_safetensors(file))]
        _refuse(_BEGINNINGS, [head.decode("latin-1")])
        if head[:4] == b"PK\3\4":
            tree, objects, fetch = _open_archive(file)
        elif head[:1] == b"\x80":
            tree, objects, fetch = _open_legacy(file)
        else:
            raise damaged("it begins as none does")
        dicts = search(tree, _LAYERS)
        found = [(way, {name: _resolved(value, fetch) for name, value in layers.items()}) for way, layers in dicts]
    if objects and not found:
        raise Refused(OBJECTS)
    return found


def _refuse(kinds: Mapping[str, str], texts: Iterable[str]) -> None:
    for pattern, kind in kinds.items():
        if any(re.match(pattern, text, re.DOTALL) for text in texts):
            raise Refused(kind)


class _Limited(io.FileIO):
    """A file that refuses to give much to the zip library at once, whatever size its own bytes declare."""

    def read(self, size: int | None = -1, /) -> Any:
        if size is not None and size > _LARGEST // 2:
            raise Refused(TOO_MUCH)
        return super().read(size)

    def exactly(self, start: int, size: int) -> bytes:
        if start + size > self.seek(0, io.SEEK_END):
            raise damaged("it is shorter than it says")
        if size > _LARGEST:
            raise Refused(TOO_MUCH)
        self.seek(start)
        return super().read(size)


def _open(path: Path) -> _Limited:
    status = os.stat(path)  # opening a FIFO or a device could wait for ever
    if not stat.S_ISREG(status.st_mode):
        raise Refused("is a directory" if stat.S_ISDIR(status.st_mode) else "is a device, a FIFO or a socket, no file")
    if status.st_size == 0:
        raise Refused("is empty")
    return _Limited(path)


# Where state dicts are, in a file or in memory.


def search(tree: Any, most: float = math.inf, models: tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Find the mappings that hold running statistics or counters, and the models, wherever they are.

    Gives the way to each, and of a mapping the counter of each layer. Names are fit to be printed.

    Raises:
        Refused: there are more than `most` layers, or twice as many containers.
    """
    kinds = (Mapping, list, tuple, *models)
    found = 0
    names: dict[str, tuple[str, str]] = {}  # once each, for many mappings may share one that is long
    seen = {id(tree)}  # each container once, however often it holds itself
    stack: list[tuple[int, tuple[Any, ...], Any]] = [(0, (), tree)] if isinstance(tree, kinds) else []
    while stack:
        depth, way, node = stack.pop()
        if isinstance(node, models):
            yield _written(way), node
            continue
        layers: Layers = {}
        inner = []
        for key, value in node.items() if isinstance(node, (Mapping, Dictionary)) else enumerate(node):
            if isinstance(value, kinds) and id(value) not in seen and depth < _DEEP:
                seen.add(id(value))
                inner.append((depth + 1, (*way[-_WAY:], key), value))
            if isinstance(key, str) and key.endswith(_NAMES):
                if key not in names:
                    name, _, kind = key.rpartition(".")
                    names[key] = _readable(name), kind
                name, kind = names[key]
                if kind in _NAMES:
                    layers[name] = value if kind == COUNTER else layers.get(name)
            if found + len(layers) > most or len(seen) > 2 * most:
                raise Refused(TOO_MUCH)
        stack += reversed(inner)
        if layers:
            found += len(layers)
            yield _written(way), layers


def _written(way: tuple[Any, ...]) -> str:
    """Write the keys on the way to a container; of very many, the last."""
    return shortened("".join(f"{key}/" for key in ["…"] * (len(way) > _WAY) + [_key(key) for key in way[-_WAY:]]))


def _key(key: Any) -> str:
    if isinstance(key, str):
        return _readable(key)
    return str(key) if type(key) is int and abs(key) < 10**20 else f"({type(key).__name__})"


def _readable(text: str, longest: int = 300) -> str:
    return _escaped(shortened(text, longest), longest)


@lru_cache
def _escaped(text: str, longest: int) -> str:
    return shortened(printable(text), longest)


# What a counter is worth.

_KINDS = """
    LongStorage:q int64:q I64:q IntStorage:i int32:i I32:i ShortStorage:h int16:h I16:h CharStorage:b int8:b I8:b
    ByteStorage:B uint8:B U8:B uint16:H U16:H uint32:I U32:I uint64:Q U64:Q BoolStorage:? bool:? BOOL:?
    DoubleStorage:d float64:d F64:d FloatStorage:f float32:f F32:f HalfStorage:e float16:e F16:e
"""  # by the names of torch's storages, its types, and safetensors, as the struct module writes them
_FORMATS = dict(kind.split(":") for kind in _KINDS.split())
_BFLOAT16 = ("BFloat16Storage", "bfloat16", "BF16")  # the first half of a float32
_SIZES = dict.fromkeys(_BFLOAT16, 2) | {"ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "QInt32Storage": 4}


def _size(kind: str) -> int:
    return struct.calcsize(f"<{_FORMATS[kind]}") if kind in _FORMATS else _SIZES.get(kind, 1)


def _number(kind: str, shape: Any, fetch: Callable[[int], bytes]) -> Any:
    """Give a stored tensor's number, with `fetch(size)` for its bytes."""
    if len(shape) > 64 or not all(type(length) is int and abs(length) < 10**20 for length in shape):
        raise damaged("a shape is not made of numbers")
    if any(length != 1 for length in shape):
        return Odd(shortened(f"has shape {tuple(shape)}", _NOTE))
    if kind in _BFLOAT16:
        return struct.unpack("<f", b"\0\0" + fetch(2))[0]
    if kind not in _FORMATS:
        return Odd(f"is of type {_readable(kind, _NOTE)}, not a whole number")
    return struct.unpack(f"<{_FORMATS[kind]}", fetch(_size(kind)))[0]


# torch's files: a pickle, and the bytes of the tensors.


Fetch = Callable[[str, int, int], bytes]  # of a storage: where to begin, and how many bytes, the lowest first


def _resolved(value: Any, fetch: Fetch) -> Any:
    """Give a counter's number or text, or what it is instead."""
    if isinstance(value, Tensor):
        kind, key, offset = _place(value)
        return _number(kind, value.shape, lambda size: fetch(key, offset * size, size))
    return Odd(f"is of type {_readable(value, _NOTE)}, not a whole number") if isinstance(value, Name) else value


def _place(tensor: Tensor) -> tuple[str, str, int]:
    """Give the type and the storage of a tensor, and where it begins there."""
    if not isinstance(tensor.storage, tuple) or not 5 <= len(tensor.storage) <= 6:
        raise damaged("a tensor has no storage")
    kind, key, offset = tensor.kind or tensor.storage[1], tensor.storage[2], tensor.offset
    proper = isinstance(kind, Name) and isinstance(key, str) and len(key) < 100 and type(offset) is int and offset >= 0
    if not proper or not isinstance(tensor.shape, tuple) or tensor.storage[5:] not in ((), (None,)):
        raise damaged("a tensor is not described as torch does")
    return kind.rpartition(".")[2], key, offset


def _open_archive(file: _Limited) -> tuple[Any, bool, Fetch]:
    """Read the pickle of a zip archive; give what it says, whether it holds objects, and a way to the storages."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        _refuse(_ENTRIES, archive.namelist())
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise damaged("an entry is compressed or encrypted, which torch.save never does")
        root = entries[0].filename.partition("/")[0] + "/"
        inside = (entry for entry in entries if entry.filename.startswith(root))
        places = {entry.filename[len(root) :]: (entry.header_offset, entry.file_size) for entry in inside}
        if len(places) != len(entries):
            raise damaged("it has two entries of one name, or several roots")
        if min(places.values())[0] != 0:
            raise damaged("something stands before its first entry")
    del archive, entries, inside  # which take more memory than all that follows

    def whole(name: str, start: int = 0, size: int | None = None) -> bytes:
        header, length = places[name]
        signature, *lengths = struct.unpack("<4s22xHH", file.exactly(header, 30))
        if signature != b"PK\3\4" or start + (size or 0) > length:
            raise damaged("its entries are not where it says")
        return file.exactly(header + 30 + sum(lengths) + start, length if size is None else size)

    order = -1 if "byteorder" in places and whole("byteorder") == b"big" else 1
    tree, _, objects, _ = unpickle(whole("data.pkl"))
    return tree, objects, lambda key, start, size: whole(f"data/{key}", start, size)[::order]


def _open_legacy(file: _Limited) -> tuple[Any, bool, Fetch]:
    """Read a file from before torch 1.6: pickles in a row, and each storage after its length."""
    end = file.seek(0, io.SEEK_END)
    data = file.exactly(0, min(end, _LARGEST))
    at, steps = 0, iter(STEPS)
    for _ in range(3):  # a magic number, the protocol, the machine
        machine, at, _, _ = unpickle(data, at, 2**16, steps)
    tree, at, objects, storages = unpickle(data, at, steps=steps)
    keys, at, _, _ = unpickle(data, at, _LARGEST, steps)
    order = 1 if machine[machine.index("little_endian") + 1] is True else -1
    kinds = {key: kind for kind, key, _ in (_place(Tensor(storage, 0, ())) for storage in storages)}
    places = {}
    for key in keys:
        if not isinstance(key, str):
            raise damaged("a storage has no name")
        elements = int.from_bytes(file.exactly(at, 8)[::order], "little")
        places[key] = at + 8
        at += 8 + elements * _size(kinds[key])
        if at > end:
            raise damaged("it is shorter than it says")
    return tree, objects, lambda key, start, size: file.exactly(places[key] + start, size)[::order]


# Files of safetensors, and indexes of shards.

_STRING = r'"(?:[^"\\]++|\\.)*+"'  # possessive (++), or a header that is made for it would take for ever
_ENTRY = re.compile(rf'\s*+(?:({_STRING})\s*+:\s*+({{(?:[^"{{}}]++|{_STRING})*+}})\s*+)?+([,}}])', re.DOTALL)


def _read_safetensors(file: _Limited) -> Layers:
    """Read a header, the length of which stands before it; its offsets count from its end.

    Entry by entry, because read at once as JSON it could be made to fill the memory.
    """
    end = 8 + int.from_bytes(file.exactly(0, 8), "little")
    header, at = file.exactly(8, end - 8).decode(), 1
    decode = json.JSONDecoder().raw_decode
    layers: Layers = {}
    for _ in range(_MANY):
        entry = _ENTRY.match(header, at)
        if entry is None:
            raise damaged("its header is not of safetensors")
        at = entry.end()
        key = decode(header, entry.start(1))[0] if entry.start(1) > 0 else ""
        longest = _LARGEST // 4 if key == "__metadata__" else 1000
        if entry.end(2) - entry.start(2) > longest:
            raise damaged("a description is too long")
        name, _, kind = key.rpartition(".")
        if kind in _NAMES:
            name = _readable(name)
            known = layers.get(name)
            if kind == COUNTER and known is not None:
                raise damaged(f"it describes {name} twice")
            layers[name] = known if kind != COUNTER else _stored(decode(header, entry.start(2))[0], file, end)
        if len(layers) > _LAYERS:
            break
        if entry[3] == "}":
            return layers
    raise Refused(TOO_MUCH)


def _stored(tensor: Mapping[str, Any], file: _Limited, end: int) -> Any:
    """Give a number from behind a header that ends there."""
    start, stop = tensor["data_offsets"]
    if not 0 <= start <= stop:
        raise damaged("a tensor ends before it starts")
    return _number(tensor["dtype"], tensor["shape"], partial(file.exactly, end + start))


def _read_shards(index: Path) -> list[tuple[str, Layers]]:
    """Read the shards that hold norm layers as one state dict."""
    needed = {file for name, file in _weight_map(index).items() if name.rpartition(".")[2] in _NAMES}
    merged: Layers = {}
    shards = {os.path.realpath(index.parent / file): file for file in sorted(needed)}  # each once, under any names
    for file in shards.values():
        try:
            parts = read(index.parent / file)
        except UnreadableError as error:
            raise Refused(f"a shard is unreadable: {error}") from error
        for way, layers in parts:
            new = {way + name: value for name, value in layers.items()}
            merged |= {name: value for name, value in new.items() if value is not None or name not in merged}
            if len(merged) > _LAYERS:
                raise Refused(TOO_MUCH)
    return [("", merged)]


def _weight_map(index: Path) -> dict[str, str]:
    with _open(index) as file:
        text = file.exactly(0, file.seek(0, io.SEEK_END))
    try:
        if sum(map(text.count, (b",", b":", b"[", b"{"))) > 2 * _MANY:
            raise ValueError
        weight_map: dict[str, str] = json.loads(text)["weight_map"]
        shards = {Path(file).name == file and file.endswith(_ENDINGS) for file in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused("is no index of shards: it has no readable weight_map") from error
    if False in shards:
        raise Refused(f"names shards outside its own directory, or that end in none of {', '.join(_ENDINGS)}")
    return weight_map
