"""Checkpoint files: the counters of their norm layers, as data alone.

A file is not to be trusted. So nothing in it is executed, imported, hashed or decompressed, and it is read in an
amount of memory and time that has a bound. torch's own loader has none: it builds every tensor, and calls functions
that the file chooses. (It also takes a quarter of a minute for 100,000 tensors, of which only the counters matter.)
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from momentum_fix.tables import printable, shortened
from momentum_fix.unpickling import (
    NO_MORE_THAN_OBJECTS,
    STEPS,
    TOO_MUCH,
    Dictionary,
    Name,
    Refused,
    Tensor,
    damaged,
    unpickle,
)

COUNTER = "num_batches_tracked"
_NAMES = (COUNTER, "running_mean", "running_var")
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_INDEX = ".index.json"
_NO_MODELS = re.compile(  # what trainers save beside a model, by exact name
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)(_\d+)?\.(pt|pth|bin)"
)
_LARGEST = 2**25  # bytes of a pickle or a header; 200,000 tensors need 20 MB
_MANY = 350_000  # entries of an index or a header
_LAYERS = 2**17
_WORDS = 2**24  # characters of the names of all layers, each with the way to it
_DEEP = 10_000  # containers in containers
_NOTE = 80  # characters of what is said about one counter

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
    try:
        if not path.is_dir():
            return [path]
        files = sorted(file for file in path.iterdir() if file.name.endswith((*_ENDINGS, _INDEX)))
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror})") from error
    shards: set[str] = set()
    for index in files:
        if index.name.endswith(_INDEX):
            try:
                shards.update(_weight_map(index).values())
            except Exception:
                continue  # reading the index itself will report it
    files = [file for file in files if file.name not in shards and not _NO_MODELS.fullmatch(file.name)]
    if not files:
        raise _unreadable(path, f"holds no file that ends in {', '.join(_ENDINGS)} or {_INDEX}")
    return files


def read(path: Path) -> list[tuple[str, Layers]]:
    """Give the counters of each state dict in a file, with the way to it.

    Damaged and foreign bytes can raise nearly anything on their way through a reader, so every error becomes
    one sentence here, with the original as its cause.

    Raises:
        UnreadableError: the file cannot be read.
    """
    collects = gc.isenabled()
    gc.disable()  # which would look for garbage among a file's objects again and again, and there is none
    try:
        found = _read(path)
        if sum(sum(map(len, layers)) + len(way) * len(layers) for way, layers in found) > _WORDS:
            raise Refused(TOO_MUCH)
        return found
    except Refused as error:
        raise _unreadable(path, str(error)) from error
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror or error})") from error
    except Exception as error:
        raise _unreadable(path, "is damaged or no checkpoint") from error
    finally:
        if collects:
            gc.enable()


def _unreadable(path: Path, reason: str) -> UnreadableError:
    return UnreadableError(printable(f"{shortened(str(path))}: {reason}"))


def _read(path: Path) -> list[tuple[str, Layers]]:
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    with _open(path) as file:
        if path.suffix == ".safetensors":
            return [("", _read_safetensors(file))]
        head = file.read(4)
        if head != b"PK\3\4" and head[:1] != b"\x80":
            raise damaged("it begins like none")
        tree, objects, fetch = _open_archive(file) if head == b"PK\3\4" else _open_legacy(file)
        found = [
            (way, {name: _resolved(value, fetch) for name, value in layers.items()})
            for way, layers in search(tree, _LAYERS)
        ]
    if objects and not found:
        raise Refused(NO_MORE_THAN_OBJECTS)
    return found


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


def search(tree: Any, most: float = math.inf) -> Iterator[tuple[str, Layers]]:
    """Find the mappings that hold running statistics or counters, wherever they are, with the way to each.

    Names are fit to be printed.

    Raises:
        Refused: there are more than `most` layers, or twice as many containers.
    """
    seen: set[int] = set()
    found = 0
    names: dict[str, tuple[str, str]] = {}  # once each, for many mappings may share one that is long
    path: list[tuple[Any, Iterator[tuple[Any, Any]]]] = [(None, iter([(None, tree)]))]
    while path:  # each container once, however often it holds itself
        way, items = path[-1]
        for key, node in items:
            if not isinstance(node, (Mapping, list, tuple)) or not node or id(node) in seen or len(path) > _DEEP:
                continue
            seen.add(id(node))
            inner = way if key is None and way is None else (way, key)
            layers: Layers = {}
            for text, value in _items(node):
                if isinstance(text, str) and text.endswith(_NAMES):
                    if text not in names:
                        name, _, kind = text.rpartition(".")
                        names[text] = _readable(name), kind
                    _enter(layers, *names[text], value)
                if found + len(layers) > most or len(seen) > 2 * most:
                    raise Refused(TOO_MUCH)
            if layers:
                found += len(layers)
                yield _written(inner), layers
            path.append((inner, _items(node)))
            break
        else:
            path.pop()


def _enter(layers: Layers, name: str, kind: str, counter: Any) -> None:
    if kind == COUNTER:
        layers[name] = counter
    elif kind in _NAMES:
        layers.setdefault(name, None)


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, Dictionary):
        items = iter(node)
        return zip(items, items, strict=True)
    return iter(node.items()) if isinstance(node, Mapping) else enumerate(node)


def _written(way: Any) -> str:
    """Write a way of nested keys; of one that is absurdly long, the end."""
    keys: list[str] = []
    while way is not None and len(keys) < 20:
        way, key = way
        small = type(key) is int and abs(key) < 10**20
        keys.append(_readable(key) if isinstance(key, str) else str(key) if small else f"({type(key).__name__})")
    if way is not None:
        keys.append("…")
    return shortened("".join(f"{key}/" for key in reversed(keys)))


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
    if isinstance(value, (Name, Dictionary)):
        kind = _readable(value, _NOTE) if isinstance(value, Name) else "dict"
        return Odd(f"is of type {kind}, not a whole number")
    return value


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
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise Refused("is TorchScript. Save `model.state_dict()` of what it was made from, and audit that")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                name = _readable(entry.filename)
                raise damaged(f"its entry {name} is compressed or encrypted, which torch.save never does")
        root = entries[0].filename.partition("/")[0] + "/"
        inside = (entry for entry in entries if entry.filename.startswith(root))
        places = {entry.filename[len(root) :]: (entry.header_offset, entry.file_size) for entry in inside}
        if len(places) != len(entries):
            raise damaged("it has two entries of one name, or several roots")
        if min(places.values())[0] != 0:
            raise damaged("something stands before its first entry")
    del archive, entries, entry, inside  # which take more memory than all that follows

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
    few, left = 2**16, iter(STEPS)
    magic, at, objects, _ = unpickle(data, 0, few, left)
    if objects:
        raise Refused(NO_MORE_THAN_OBJECTS)
    if magic != 0x1950A86A20F9469CFC6C:
        raise damaged("it begins like none")
    _, at, _, _ = unpickle(data, at, few, left)
    machine, at, _, _ = unpickle(data, at, few, left)
    tree, at, objects, storages = unpickle(data, at, steps=left)
    keys, at, _, _ = unpickle(data, at, _LARGEST, left)
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

_BETWEEN = re.compile(r'[\s,]*(?=["}])')
_IS_TEXT = re.compile(r'\s*:\s*(?=")')
_IS_OBJECT = re.compile(r"\s*:\s*(?={)")


def _read_safetensors(file: _Limited) -> Layers:
    """Read a header, the length of which stands before it; its offsets count from its end."""
    end = 8 + int.from_bytes(file.exactly(0, 8), "little")
    layers: Layers = {}

    def counted(tensor: Mapping[str, Any]) -> Any:
        start, stop = tensor["data_offsets"]
        if start < 0 or stop < start:
            raise damaged("a tensor ends before it starts")
        return _number(tensor["dtype"], tensor["shape"], lambda _: file.exactly(end + start, stop - start))

    for key, text in _described(file.exactly(8, end - 8).decode()):
        name, _, kind = key.rpartition(".")
        name = _readable(name)
        if kind == COUNTER and layers.get(name) is not None:
            raise damaged(f"it describes {name} twice")
        _enter(layers, name, kind, counted(json.loads(text)) if kind == COUNTER else None)
        if len(layers) > _LAYERS:
            raise Refused(TOO_MUCH)
    return layers


def _described(header: str) -> Iterator[tuple[str, str]]:
    """Give each tensor's name and description, one by one: a header that is made for it would fill the memory."""
    decode = json.JSONDecoder().raw_decode

    def after(pattern: re.Pattern[str], at: int) -> int:
        found = pattern.match(header, at)
        if found is None:
            raise damaged("its header is not of safetensors")
        return found.end()

    at, within = after(_BETWEEN, 1), False
    for _ in range(_MANY):
        if header[at] == "}":
            if not within:
                return
            at, within = at + 1, False
        else:
            name, at = decode(header, at)
            if within:  # texts of the one that saved it, which no reader needs
                _, at = decode(header, after(_IS_TEXT, at))
            elif name == "__metadata__":
                at, within = after(_IS_OBJECT, at) + 1, True
            else:
                start = after(_IS_OBJECT, at)
                at = header.index("}", start, start + 1000) + 1
                yield name, header[start:at]
        at = after(_BETWEEN, at)
    raise Refused(TOO_MUCH)


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
            for name, value in layers.items():
                if value is not None or way + name not in merged:  # another shard may have the counter
                    merged[way + name] = value
            if len(merged) > _LAYERS:
                raise Refused(TOO_MUCH)
    return [("", merged)]


def _weight_map(index: Path) -> dict[str, str]:
    with _open(index) as file:
        text = file.read(max(1, os.fstat(file.fileno()).st_size))
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
