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
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import momentum_fix.files.unpickling as unpickling
from momentum_fix._tables import printable, shortened
from momentum_fix.files.unpickling import TOO_MUCH, Dictionary, Name, RefusedError, refuse_damaged, refuse_if, unpickle

COUNTER = "num_batches_tracked"
_NAMES = (COUNTER, "running_mean", "running_var")
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pt.tar", ".pth.tar", ".ckpt.tar")
INDEX = ".index.json"
# What trainers save beside a model, by exact name.
_BESIDE = re.compile(r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)(_\d+)?\.(pt|pth|bin)")
_MAX_BYTES = 2**25  # bytes of a pickle or a header; 200,000 tensors need 20 MB
_MAX_ENTRIES = 350_000  # entries of an index or a header
_MAX_LAYERS = 2**17
_MAX_CHARACTERS = 2**24  # characters of the names of all layers, each with its prefix
_MAX_DEPTH = 10_000  # containers in containers that are searched
_MAX_KEYS = 20  # keys that lead to a container and are written
_MAX_NOTE = 80  # characters of what is said about one counter

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


class NotANumber(NamedTuple):
    """What a counter is that is no number, as the end of a sentence."""

    what: str


def checkpoint_files(path: Path) -> list[Path]:
    """Give the path itself, or the checkpoints of a directory.

    Shards stand under their index, and what trainers save beside a model is left out. So are directories inside of it.

    Raises:
        UnreadableError: the path may not be looked at, or is a directory that holds none.
    """
    with _errors_as_sentences(path):
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
        refuse_if(not files and any(name.endswith(".distcp") for name in names), _DISTRIBUTED)
        inside = "; its own directories are not looked into: name them" * any((path / name).is_dir() for name in names)
        refuse_if(not files, f"holds no file that ends in {', '.join(_ENDINGS)} or {INDEX}{inside}")
        return files


def read(path: Path) -> list[tuple[str, Layers]]:
    """Give the counters of each state dict in a file, with the keys that lead to it, as "model/".

    Raises:
        UnreadableError: the file cannot be read.
    """
    with _errors_as_sentences(path):
        found = _read(path)
        characters = sum(sum(map(len, layers)) + len(prefix) * len(layers) for prefix, layers in found)
        refuse_if(characters > _MAX_CHARACTERS, TOO_MUCH)
        return found


@contextmanager
def _errors_as_sentences(path: Path) -> Iterator[None]:
    """Turn every error into one sentence: damaged and foreign bytes can raise nearly anything inside a reader."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, RefusedError) else "is damaged or no checkpoint"
        if isinstance(error, OSError):
            reason = f"cannot be read ({error.strerror or error})"
        traceback.clear_frames(error.__traceback__)  # they hold what was read
        raise UnreadableError(printable(f"{shortened(str(path))}: {reason}")) from error


def _read(path: Path) -> list[tuple[str, Layers]]:
    if path.name.endswith(INDEX):
        return _read_shards(path)
    refuse_if(path.suffix == ".distcp", _DISTRIBUTED)  # one archive after the other, as other damaged files are
    with _open(path) as file:
        head = file.read(300)
        if head[5:9] == b"\0\0\0{":  # after a length of 8 bytes
            return [("", _read_safetensors(file))]
        _refuse_formats(_BEGINNINGS, [head.decode("latin-1")])
        if head[:4] == b"PK\3\4":
            tree, objects, fetch = _open_archive(file)
        elif head[:1] == b"\x80":
            tree, objects, fetch = _open_legacy(file)
        else:
            refuse_damaged(True, "it begins as none does")
        found = [
            (prefix, {name: _read_counter(value, fetch) for name, value in layers.items()})
            for prefix, layers in search(tree, _MAX_LAYERS)
        ]
    refuse_if(objects and not found, unpickling.OBJECTS)
    return found


def _refuse_formats(kinds: Mapping[str, str], texts: Iterable[str]) -> None:
    for pattern, kind in kinds.items():
        refuse_if(any(re.match(pattern, text, re.DOTALL) for text in texts), kind)


class _Limited(io.FileIO):
    """A file that refuses to give much to the zip library at once, whatever size its own bytes declare."""

    def read(self, size: int | None = -1, /) -> Any:
        refuse_if(size is not None and size > _MAX_BYTES // 2, TOO_MUCH)
        return super().read(size)

    def read_at(self, start: int, size: int) -> bytes:
        refuse_damaged(start + size > self.seek(0, io.SEEK_END), "it is shorter than it says")
        refuse_if(size > _MAX_BYTES, TOO_MUCH)
        self.seek(start)
        return super().read(size)


def _open(path: Path) -> _Limited:
    status = os.stat(path)  # opening a FIFO or a device could wait for ever
    refuse_if(stat.S_ISDIR(status.st_mode), "is a directory")
    refuse_if(not stat.S_ISREG(status.st_mode), "is a device, a FIFO or a socket, no file")
    refuse_if(status.st_size == 0, "is empty")
    return _Limited(path)


# Where state dicts are, in a file or in memory.


def search(tree: Any, most: float = math.inf, models: tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Find the mappings that hold running statistics or counters, and the models, wherever they are.

    Gives the keys that lead to each, as "model/", and of a mapping the counter of each layer. Names can be printed.

    Raises:
        RefusedError: there are more than `most` layers, or twice as many containers.
    """
    kinds = (Mapping, list, tuple, *models)
    found = 0
    names: dict[str, tuple[str, str]] = {}  # once each, for many mappings may share one that is long
    seen = {id(tree): tree}  # each container once, however often it holds itself; held, so that ids stay theirs
    stack: list[tuple[int, tuple[Any, ...], Any]] = [(0, (), tree)] if isinstance(tree, kinds) else []
    while stack:
        depth, keys, node = stack.pop()
        if isinstance(node, models):
            yield _write_keys(keys), node
            continue
        layers: Layers = {}
        inner = []
        for key, value in node.items() if isinstance(node, (Mapping, Dictionary)) else enumerate(node):
            if isinstance(value, kinds) and id(value) not in seen and depth < _MAX_DEPTH:
                seen[id(value)] = value
                inner.append((depth + 1, (*keys[-_MAX_KEYS:], key), value))
            if isinstance(key, str) and key.endswith(_NAMES):
                if key not in names:
                    name, _, kind = key.rpartition(".")
                    names[key] = _write_name(name), kind
                name, kind = names[key]
                if kind in _NAMES:
                    layers[name] = value if kind == COUNTER else layers.get(name)
            refuse_if(found + len(layers) > most or len(seen) > 2 * most, TOO_MUCH)
        stack += reversed(inner)
        if layers:
            found += len(layers)
            yield _write_keys(keys), layers


def _write_keys(keys: tuple[Any, ...]) -> str:
    """Write the keys that lead to a container; of very many, the last."""
    written = ["…"] * (len(keys) > _MAX_KEYS) + [_write_key(key) for key in keys[-_MAX_KEYS:]]
    return shortened("".join(f"{key}/" for key in written))


def _write_key(key: Any) -> str:
    if isinstance(key, str):
        return _write_name(key)
    return str(key) if type(key) is int and abs(key) < 10**20 else f"({type(key).__name__})"


def _write_name(text: str, longest: int = 300) -> str:
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


def _read_number(kind: str, shape: Any, fetch: Callable[[int], bytes]) -> Any:
    """Give a stored tensor's number, with `fetch(size)` for its bytes."""
    numbers = len(shape) <= 64 and all(type(length) is int and abs(length) < 10**20 for length in shape)
    refuse_damaged(not numbers, "a shape is not made of numbers")
    if any(length != 1 for length in shape):
        return NotANumber(shortened(f"has shape {tuple(shape)}", _MAX_NOTE))
    if kind in _BFLOAT16:
        return struct.unpack("<f", b"\0\0" + fetch(2))[0]
    if kind not in _FORMATS:
        return _not_of_numbers(kind)
    return struct.unpack(f"<{_FORMATS[kind]}", fetch(_size(kind)))[0]


def _not_of_numbers(kind: str) -> NotANumber:
    return NotANumber(f"is of type {_write_name(kind, _MAX_NOTE)}, not a whole number")


# torch's files: a pickle, and the bytes of the tensors.


Fetch = Callable[[str, int, int], bytes]  # of a storage: where to begin, and how many bytes, the lowest first


def _read_counter(value: Any, fetch: Fetch) -> Any:
    """Give a counter's number or text, or what it is instead."""
    if isinstance(value, unpickling.Tensor):
        kind, key, offset = _describe_storage(value)
        return _read_number(kind, value.shape, lambda size: fetch(key, offset * size, size))
    return _not_of_numbers(value) if isinstance(value, Name) else value


def _describe_storage(tensor: unpickling.Tensor) -> tuple[str, str, int]:
    """Give the type and the storage of a tensor, and where it begins there."""
    described = isinstance(tensor.storage, tuple) and 5 <= len(tensor.storage) <= 6
    refuse_damaged(not described, "a tensor has no storage")
    kind, key, offset = tensor.kind or tensor.storage[1], tensor.storage[2], tensor.offset
    proper = isinstance(kind, Name) and isinstance(key, str) and len(key) < 100 and type(offset) is int and offset >= 0
    proper = proper and isinstance(tensor.shape, tuple) and tensor.storage[5:] in ((), (None,))
    refuse_damaged(not proper, "a tensor is not described as torch does")
    return kind.rpartition(".")[2], key, offset


def _open_archive(file: _Limited) -> tuple[Any, bool, Fetch]:
    """Read the pickle of a zip archive; give what it says, whether it holds objects, and how to read the storages."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        _refuse_formats(_ENTRIES, archive.namelist())
        plain = all(entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1 for entry in entries)
        refuse_damaged(not plain, "an entry is compressed or encrypted, which torch.save never does")
        root = entries[0].filename.partition("/")[0] + "/"
        inside = (entry for entry in entries if entry.filename.startswith(root))
        places = {entry.filename[len(root) :]: (entry.header_offset, entry.file_size) for entry in inside}
        refuse_damaged(len(places) != len(entries), "it has two entries of one name, or several roots")
        refuse_damaged(min(places.values())[0] != 0, "something stands before its first entry")
    del archive, entries, inside  # which take more memory than all that follows

    def read_entry(name: str, start: int = 0, size: int | None = None) -> bytes:
        header, length = places[name]
        signature, *lengths = struct.unpack("<4s22xHH", file.read_at(header, 30))
        there = signature == b"PK\3\4" and start + (size or 0) <= length
        refuse_damaged(not there, "its entries are not where it says")
        return file.read_at(header + 30 + sum(lengths) + start, length if size is None else size)

    order = -1 if "byteorder" in places and read_entry("byteorder") == b"big" else 1
    tree, _, objects, _ = unpickle(read_entry("data.pkl"))
    return tree, objects, lambda key, start, size: read_entry(f"data/{key}", start, size)[::order]


def _open_legacy(file: _Limited) -> tuple[Any, bool, Fetch]:
    """Read a file from before torch 1.6: pickles in a row, and each storage after its length."""
    end = file.seek(0, io.SEEK_END)
    data = file.read_at(0, min(end, _MAX_BYTES))
    at, steps = 0, iter(unpickling.STEPS)
    for _ in range(3):  # a magic number, the protocol, the machine
        machine, at, _, _ = unpickle(data, at, 2**16, steps)
    tree, at, objects, storages = unpickle(data, at, steps=steps)
    keys, at, _, _ = unpickle(data, at, _MAX_BYTES, steps)
    order = 1 if machine[machine.index("little_endian") + 1] is True else -1
    described = (_describe_storage(unpickling.Tensor(storage, 0, ())) for storage in storages)
    kinds = {key: kind for kind, key, _ in described}
    places = {}
    for key in keys:
        refuse_damaged(not isinstance(key, str), "a storage has no name")
        elements = int.from_bytes(file.read_at(at, 8)[::order], "little")
        places[key] = at + 8
        at += 8 + elements * _size(kinds[key])
        refuse_damaged(at > end, "it is shorter than it says")
    return tree, objects, lambda key, start, size: file.read_at(places[key] + start, size)[::order]


# Files of safetensors, and indexes of shards.

_STRING = r'"(?:[^"\\]++|\\.)*+"'  # possessive (++), or a header that is made for it would take for ever
_ENTRY = re.compile(rf'\s*+(?:({_STRING})\s*+:\s*+({{(?:[^"{{}}]++|{_STRING})*+}})\s*+)?+([,}}])', re.DOTALL)


def _read_safetensors(file: _Limited) -> Layers:
    """Read a header, the length of which stands before it; its offsets count from its end.

    Entry by entry, because read at once as JSON it could be made to fill the memory.
    """
    end = 8 + int.from_bytes(file.read_at(0, 8), "little")
    header, at = file.read_at(8, end - 8).decode(), 1
    decode = json.JSONDecoder().raw_decode
    layers: Layers = {}
    for _ in range(_MAX_ENTRIES):
        entry: Any = _ENTRY.match(header, at)
        refuse_damaged(entry is None, "its header is not of safetensors")
        at = entry.end()
        refuse_if(entry.end(1) - entry.start(1) > _MAX_BYTES // 2, TOO_MUCH)
        key = decode(header, entry.start(1))[0] if entry.start(1) > 0 else ""
        longest = _MAX_BYTES // 4 if key == "__metadata__" else 1000
        refuse_damaged(entry.end(2) - entry.start(2) > longest, "a description is too long")
        name, _, kind = key.rpartition(".")
        if kind in _NAMES:
            name = _write_name(name)
            known = layers.get(name)
            refuse_damaged(kind == COUNTER and known is not None, f"it describes {name} twice")
            layers[name] = known if kind != COUNTER else _read_tensor(decode(header, entry.start(2))[0], file, end)
        if len(layers) > _MAX_LAYERS:
            break
        if entry[3] == "}":
            return layers
    raise RefusedError(TOO_MUCH)


def _read_tensor(tensor: Mapping[str, Any], file: _Limited, end: int) -> Any:
    """Give a number from behind a header that ends there."""
    start, stop = tensor["data_offsets"]
    refuse_damaged(not 0 <= start <= stop, "a tensor ends before it starts")
    return _read_number(tensor["dtype"], tensor["shape"], partial(file.read_at, end + start))


def _read_shards(index: Path) -> list[tuple[str, Layers]]:
    """Read the shards that hold norm layers as one state dict."""
    needed = {file for name, file in _weight_map(index).items() if name.rpartition(".")[2] in _NAMES}
    merged: Layers = {}
    shards = {os.path.realpath(index.parent / file): file for file in sorted(needed)}  # each once, under any names
    for file in shards.values():
        try:
            parts = read(index.parent / file)
        except UnreadableError as error:
            raise RefusedError(f"a shard is unreadable: {error}") from error
        for prefix, layers in parts:
            new = {prefix + name: value for name, value in layers.items()}
            merged |= {name: value for name, value in new.items() if value is not None or name not in merged}
            refuse_if(len(merged) > _MAX_LAYERS, TOO_MUCH)
    return [("", merged)]


def _weight_map(index: Path) -> dict[str, str]:
    with _open(index) as file:
        text = file.read_at(0, file.seek(0, io.SEEK_END))
    try:
        if sum(map(text.count, (b",", b":", b"[", b"{", b"\\"))) > 2 * _MAX_ENTRIES:
            raise ValueError
        weight_map: dict[str, str] = json.loads(text)["weight_map"]
        shards = {Path(file).name == file and file.endswith(_ENDINGS) for file in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError("is no index of shards: it has no readable weight_map") from error
    refuse_if(False in shards, f"names shards outside its own directory, or that end in none of {', '.join(_ENDINGS)}")
    return weight_map
