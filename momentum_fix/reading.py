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
from pathlib import Path
from typing import Any, NamedTuple

from momentum_fix.tables import printable, shortened
from momentum_fix.unpickling import NO_MORE_THAN_OBJECTS, TOO_MUCH, Dictionary, Name, Refused, Tensor, damaged, unpickle

COUNTER = "num_batches_tracked"
_NAMES = (COUNTER, "running_mean", "running_var")
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_INDEX = ".index.json"
_NO_MODELS = re.compile(  # what trainers save beside a model, by exact name
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)(_\d+)?\.(pt|pth|bin)"
)
_LARGEST = 2**25  # bytes of a pickle or a header; 200,000 tensors need 20 MB
_MANY = 350_000  # entries of an index
_LAYERS = 2**17
_DEEP = 10_000  # containers in containers
_LENGTHS = 64  # dimensions
_ABSURD = 10**20

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
        return _read(path)
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
        if head == b"PK\3\4":
            tree, value, objects = _open_archive(file)
        elif head[:1] == b"\x80":
            tree, value, objects = _open_legacy(file)
        else:
            raise damaged("it begins like none")
        found = [
            (way, {name: value(item) if isinstance(item, Tensor) else _plain(item) for name, item in layers.items()})
            for way, layers in search(tree, _LAYERS)
        ]
    if objects and not found:
        raise Refused(NO_MORE_THAN_OBJECTS)
    return found


class _Limited(io.FileIO):
    """A file that refuses to read much at once, whatever size its own bytes declare."""

    limit = _LARGEST

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.length = self.seek(0, io.SEEK_END)
        self.seek(0)

    def read(self, size: int | None = -1, /) -> Any:
        if size is not None and size > self.limit:
            raise Refused(TOO_MUCH)
        return super().read(size)


def _open(path: Path) -> _Limited:
    status = os.stat(path)  # opening a FIFO or a device could wait for ever
    if not stat.S_ISREG(status.st_mode):
        raise Refused("is a directory" if stat.S_ISDIR(status.st_mode) else "is a device, a FIFO or a socket, no file")
    if status.st_size == 0:
        raise Refused("is empty")
    return _Limited(path)


def _exactly(file: _Limited, start: int, size: int) -> bytes:
    if start + size > file.length:
        raise damaged("it is shorter than it says")
    file.seek(start)
    data: bytes = file.read(size)
    return data


# Where state dicts are, in a file or in memory.


def search(tree: Any, most: float = math.inf) -> Iterator[tuple[str, Layers]]:
    """Find the mappings that hold running statistics or counters, wherever they are, with the way to each.

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
            if not isinstance(node, (Mapping, list, tuple)) or id(node) in seen or len(path) > _DEEP:
                continue
            seen.add(id(node))
            inner = way if key is None and way is None else (way, key)
            layers: Layers = {}
            for text, value in _items(node):
                if not isinstance(text, str) or not text.endswith(_NAMES):
                    continue
                if text not in names:
                    name, _, kind = text.rpartition(".")
                    names[text] = shortened(name), kind
                name, kind = names[text]
                if kind == COUNTER:
                    layers[name] = value
                elif kind in _NAMES:
                    layers.setdefault(name, None)
                if found + len(layers) > most:
                    raise Refused(TOO_MUCH)
            if len(seen) > 2 * most:
                raise Refused(TOO_MUCH)
            if layers:
                found += len(layers)
                yield _written(inner), layers
            path.append((inner, _items(node)))
            break
        else:
            path.pop()


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
        small = type(key) is int and abs(key) < _ABSURD
        keys.append(shortened(key) if isinstance(key, str) else str(key) if small else f"({type(key).__name__})")
    if way is not None:
        keys.append("…")
    return shortened("".join(f"{key}/" for key in reversed(keys)))


# What a counter is worth.

_FORMATS = {  # as the struct module writes them, by the names of torch's storages, its types, and safetensors
    **dict.fromkeys(("LongStorage", "int64", "I64"), "q"),
    **dict.fromkeys(("IntStorage", "int32", "I32"), "i"),
    **dict.fromkeys(("ShortStorage", "int16", "I16"), "h"),
    **dict.fromkeys(("CharStorage", "int8", "I8"), "b"),
    **dict.fromkeys(("ByteStorage", "uint8", "U8"), "B"),
    **dict.fromkeys(("uint16", "U16"), "H"),
    **dict.fromkeys(("uint32", "U32"), "I"),
    **dict.fromkeys(("uint64", "U64"), "Q"),
    **dict.fromkeys(("DoubleStorage", "float64", "F64"), "d"),
    **dict.fromkeys(("FloatStorage", "float32", "F32"), "f"),
    **dict.fromkeys(("HalfStorage", "float16", "F16"), "e"),
    **dict.fromkeys(("BoolStorage", "bool", "BOOL"), "?"),
    **dict.fromkeys(("BFloat16Storage", "bfloat16", "BF16"), "bfloat16"),
}
_OTHER_SIZES = {"ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "QInt32Storage": 4}


def _number(kind: str, shape: Any, fetch: Callable[[int], bytes]) -> Any:
    """Give a stored tensor's number, with `fetch(size)` for its bytes."""
    if len(shape) > _LENGTHS or not all(type(length) is int and abs(length) < _ABSURD for length in shape):
        raise damaged("a shape is not made of numbers")
    if any(length != 1 for length in shape):
        return Odd(shortened(f"has shape {tuple(shape)}"))
    if kind not in _FORMATS:
        return Odd(shortened(f"is of type {kind}, not a whole number"))
    data = fetch(_size(kind))
    if kind in ("BFloat16Storage", "bfloat16", "BF16"):
        return struct.unpack("<f", b"\0\0" + data)[0]
    return struct.unpack(f"<{_FORMATS[kind]}", data)[0]


def _size(kind: str) -> int:
    form = _FORMATS.get(kind)
    return _OTHER_SIZES.get(kind, 1) if form is None else 2 if form == "bfloat16" else struct.calcsize(f"<{form}")


def _plain(value: Any) -> Any:
    """Give a counter that is no tensor: the number or text, or what it is instead."""
    if isinstance(value, Name):
        return Odd(shortened(f"is of type {value}, not a whole number"))
    return Odd("is of type dict, not a whole number") if isinstance(value, Dictionary) else value


# torch's files: a pickle, and the bytes of the tensors.


def _place(tensor: Tensor) -> tuple[str, str, int, Any]:
    """Give the type and the storage of a tensor, where it begins there, and its shape."""
    if not isinstance(tensor.storage, tuple) or not 5 <= len(tensor.storage) <= 6:
        raise damaged("a tensor has no storage")
    kind, key, offset, shape = tensor.kind or tensor.storage[1], tensor.storage[2], tensor.offset, tensor.shape
    proper = isinstance(kind, Name) and isinstance(key, str) and len(key) < 100 and isinstance(shape, tuple)
    if not proper or type(offset) is not int or offset < 0 or tensor.storage[5:] not in ((), (None,)):
        raise damaged("a tensor is not described as torch does")
    return kind.rpartition(".")[2], key, offset, shape


def _open_archive(file: _Limited) -> tuple[Any, Callable[[Tensor], Any], bool]:
    """Read the table of contents of a zip archive; give it, a reader of its tensors, and whether it holds objects."""
    file.limit //= 2
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise Refused(
                    f"is damaged or no checkpoint (its entry {shortened(entry.filename)} is compressed or encrypted, "
                    "which torch.save never does)"
                )
        root = entries[0].filename.partition("/")[0]
        places = {
            entry.filename[len(root) + 1 :]: (entry.header_offset, entry.file_size)
            for entry in entries
            if entry.filename.startswith(f"{root}/")
        }
        if len(places) != len(entries):
            raise damaged("it has two entries of one name, or several roots")
    del archive, entries, entry  # which take more memory than all that follows
    file.limit *= 2

    def fetch(name: str, start: int = 0, size: int | None = None) -> bytes:
        header, length = places[name]
        signature, *lengths = struct.unpack("<4s22xHH", _exactly(file, header, 30))
        if signature != b"PK\3\4" or start + (size or 0) > length:
            raise damaged("its entries are not where it says")
        return _exactly(file, header + 30 + sum(lengths) + start, length if size is None else size)

    tree, _, objects, _ = unpickle(fetch("data.pkl"))
    swapped = "byteorder" in places and fetch("byteorder") == b"big"

    def value(tensor: Tensor) -> Any:
        kind, key, offset, shape = _place(tensor)
        return _number(kind, shape, lambda size: fetch(f"data/{key}", offset * size, size)[:: -1 if swapped else 1])

    return tree, value, objects


def _open_legacy(file: _Limited) -> tuple[Any, Callable[[Tensor], Any], bool]:
    """Read a file from before torch 1.6: pickles in a row, and each storage after its length."""
    data = _exactly(file, 0, min(file.length, _LARGEST))
    magic, at, _, _ = unpickle(data)
    if magic != 0x1950A86A20F9469CFC6C:
        raise damaged("it begins like none")
    _, at, _, _ = unpickle(data, at)
    machine, at, _, _ = unpickle(data, at)
    tree, at, objects, storages = unpickle(data, at)
    keys, at, _, _ = unpickle(data, at)
    swapped = machine[machine.index("little_endian") + 1] is not True
    kinds = {key: kind for kind, key, _, _ in (_place(Tensor(storage, 0, ())) for storage in storages)}
    places = {}
    for key in keys:
        if not isinstance(key, str):
            raise damaged("a tensor has no storage")
        elements = int.from_bytes(_exactly(file, at, 8), "big" if swapped else "little")
        at += 8
        places[key] = at
        at += elements * _size(kinds[key])
        if at > file.length:
            raise damaged("it is shorter than it says")

    def value(tensor: Tensor) -> Any:
        kind, key, offset, shape = _place(tensor)
        return _number(
            kind, shape, lambda size: _exactly(file, places[key] + offset * size, size)[:: -1 if swapped else 1]
        )

    return tree, value, objects


# Files of safetensors, and indexes of shards.

_SPACE = re.compile(r"[\s,]*")
_COLON = re.compile(r"\s*:\s*")


def _read_safetensors(file: _Limited) -> Layers:
    """Read a header, the length of which stands before it; its offsets count from its end."""
    end = 8 + int.from_bytes(_exactly(file, 0, 8), "little")
    layers: Layers = {}
    for key, text in _described(_exactly(file, 8, end - 8).decode()):
        name, _, kind = key.rpartition(".")
        name = shortened(name)
        if len(layers) > _LAYERS:
            raise Refused(TOO_MUCH)
        if kind == COUNTER:
            if layers.get(name) is not None:
                raise damaged(f"it describes {shortened(key)} twice")
            tensor = json.loads(text)
            start, stop = tensor["data_offsets"]

            def fetch(size: int, start: int = start, stop: int = stop) -> bytes:
                if start < 0 or stop - start != size:
                    raise damaged("a tensor is not as long as its type")
                return _exactly(file, end + start, size)

            layers[name] = _number(tensor["dtype"], tensor["shape"], fetch)
        elif kind in _NAMES:
            layers.setdefault(name, None)
    return layers


def _described(header: str) -> Iterator[tuple[str, str]]:
    """Give each tensor's name and description, one by one: a header that is made for it would fill the memory."""
    decode = json.JSONDecoder().raw_decode

    def text(at: int) -> tuple[str, int]:
        if header[at] != '"':
            raise damaged("its header is not of safetensors")
        return decode(header, at)

    def after(pattern: re.Pattern[str], at: int) -> int:
        found = pattern.match(header, at)
        if found is None:
            raise damaged("its header is not of safetensors")
        return found.end()

    at, within = after(_OPEN, 0), False
    for _ in range(_MANY):
        if header[at] == "}":
            if not within:
                return
            at, within = after(_SPACE, at + 1), False
            continue
        name, at = text(at)
        at = after(_COLON, at)
        if within:  # texts of the one that saved it, which no reader needs
            _, at = text(at)
        elif name == "__metadata__":
            at, within = after(_OPEN, at), True
            continue
        else:
            end = header.index("}", at, at + 1000) + 1
            yield name, header[at:end]
            at = end
        at = after(_SPACE, at)
    raise Refused(TOO_MUCH)


_OPEN = re.compile(r"\s*\{\s*")


def _read_shards(index: Path) -> list[tuple[str, Layers]]:
    """Read the shards that hold norm layers as one state dict."""
    needed = {file for name, file in _weight_map(index).items() if name.rpartition(".")[2] in _NAMES}
    merged: Layers = {}
    for file in sorted(needed):
        try:
            parts = read(index.parent / file)
        except UnreadableError as error:
            raise Refused(f"a shard is unreadable: {error}") from error
        for way, layers in parts:
            for name, value in layers.items():
                if value is not None or way + name not in merged:  # another shard may have the counter
                    merged[way + name] = value
    return [("", merged)]


def _weight_map(index: Path) -> dict[str, str]:
    with _open(index) as file:
        file.limit //= 2
        text = _exactly(file, 0, file.length)
    try:
        if sum(map(text.count, (b",", b":", b"[", b"{"))) > 2 * _MANY:
            raise ValueError
        weight_map: dict[str, str] = json.loads(text)["weight_map"]
        names = set(weight_map.values())
        inside = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused("is no index of shards, for it has no readable weight_map") from error
    if not inside:
        raise Refused("names shards outside its own directory")
    if not all(name.endswith(_ENDINGS) for name in names):
        raise Refused(f"names shards that end in none of {', '.join(_ENDINGS)}")
    return weight_map
