"""Files made to break a reader: each a name and a function that writes it, the same every time."""

import io
import json
import os
import pickle
import random
import socket
import struct
import zipfile
from functools import partial

import torch

COUNTER = "num_batches_tracked"
NAME = f"a.{COUNTER}"


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def old(before, *last):
    """Make the beginning of a file from before torch 1.6, with these operations in each of its pickles."""
    magic = b"\x80\x02(\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" + before + b"."
    pickles = (b"K\1", text("little_endian") + b"\x88t", *last)
    return magic + b"".join(b"\x80\x02(" + before + each + b"." for each in pickles)


def state(**counters):
    return {f"{name}.{COUNTER}": torch.tensor(count) for name, count in counters.items()}


def saved(tree, **options):
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


def legacy(tree):
    return saved(tree, _use_new_zipfile_serialization=False)


def archive(entries, method=zipfile.ZIP_STORED, comment=b""):
    """Make a zip archive of (name, data)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        made.comment = comment
        for name, data in entries:
            made.writestr(name, data)
    return file.getvalue()


def bomb(megabytes):
    """Make an archive that would unpack to this much."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made, made.open("m/data.pkl", "w") as entry:
        for _ in range(megabytes):
            entry.write(bytes(MB))
    return file.getvalue()


def program(body, storages=(b"\x07" + bytes(7),)):
    """Make an archive around the operations of a pickle."""
    entries = [("m/data.pkl", b"\x80\x02" + body + b".")]
    return archive([*entries, *((f"m/data/{i}", data) for i, data in enumerate(storages))])


def tensor(kind=b"ctorch\nLongStorage\n", key="0", offset=b"K\0", shape=b")", function=b"_rebuild_tensor_v2", last=b""):
    """Give the operations that make a tensor."""
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + b"K\1tQ"
    made = b"ctorch._utils\n" + function + b"\n(" + storage + offset + shape + b")\x89ccollections\nOrderedDict\n)R"
    return made + last + b"tR"


def one(value):
    """Give the operations that make a state dict with this counter, and a good one beside it."""
    return b"}(" + text(NAME) + value + text(f"b.{COUNTER}") + tensor() + b"u"


def called(function, *arguments):
    return b"c" + function.replace(b" ", b"\n") + b"\n(" + b"".join(arguments) + b"tR"


def doubled(start, times, operation=b"\x86"):
    """Pair a thing with itself, again and again."""
    steps = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + operation for i in range(times))
    return start + steps


def directory(count):
    """Make an archive of one entry that is listed again and again, under other names."""
    entry = b"PK\3\4" + struct.pack("<5H3L2H", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"m"
    listed = b"PK\1\2" + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
    entries = b"".join(listed + b"%06x" % i for i in range(count))
    return entry + entries + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 65535, 65535, len(entries), len(entry), 0)


def many(count):
    """Make a file as before torch 1.6 that holds many counters: 1, 2, 3, ..."""
    head = legacy({})
    tensors = (text(f"{i}.{COUNTER}") + tensor(key=str(i)) for i in range(count))
    pickled = b"\x80\x02}(" + b"".join(tensors) + b"u.\x80\x02](" + b"".join(text(str(i)) for i in range(count)) + b"e."
    return head[: head.index(b"\x80\x02}q\0.")] + pickled + b"".join(struct.pack("<qq", 1, i + 1) for i in range(count))


def safetensors(header, data=b"\x07" + bytes(7), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(dtype="I64", shape=(), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header_of(good, end, **changes):
    """Change fields of an archive's end-of-directory record."""
    at = good.rfind(b"PK\5\6")
    fields = dict(
        zip(
            ("disk", "cd", "here", "all", "size", "start", "comment"),
            struct.unpack("<4H2LH", good[at + 4 : at + 22]),
            strict=True,
        )
    )
    return good[: at + 4] + struct.pack("<4H2LH", *(fields | changes).values()) + good[at + 22 : len(good) + end]


MB = 2**20
ESCAPES = "\x1b[2J\x1b]0;x\x07\n\r\x9b31m\u202e\u2028\ud800"
GOOD = program(one(tensor()))

TORCH = {
    # not what torch.save writes
    "deflated": lambda: archive(
        [("m/data.pkl", b"\x80\x02" + one(tensor()) + b"."), ("m/data/0", b"\x64" + bytes(7))], zipfile.ZIP_DEFLATED
    ),
    "bomb in data.pkl": lambda: bomb(600),
    "bomb in DATA.PKL": lambda: archive([("m/data.pkl", b"\x80\x02}."), ("m/DATA.PKL", bytes(MB))], zipfile.ZIP_BZIP2),
    "bomb in version": lambda: archive([("m/data.pkl", b"\x80\x02}."), ("m/version", bytes(MB))], zipfile.ZIP_LZMA),
    "no data.pkl": lambda: archive([("m/data/0", bytes(8))]),
    "no entries": lambda: archive([]),
    "two roots": lambda: archive([("m/data.pkl", b"\x80\x02}."), ("n/data.pkl", b"\x80\x02}.")]),
    "entry with escapes": lambda: archive(
        [("m" + ESCAPES.replace("\ud800", "") + "/data.pkl", b"}."), ("n", b"")], zipfile.ZIP_DEFLATED
    ),
    "many entries": lambda: archive([("m/data.pkl", b"\x80\x02}."), *((f"m/{i}", b"") for i in range(60_000))]),
    "huge directory": lambda: directory(320_000),
    "larger directory": lambda: directory(900_000),
    "long comment": lambda: archive([("m/data.pkl", b"\x80\x02" + one(tensor()) + b".")], comment=b"PK\5\6" * 10_000),
    "huge directory declared": lambda: header_of(GOOD, 0, size=2**32 - 2),
    "huge count declared": lambda: header_of(GOOD, 0, all=2**16 - 2, here=2**16 - 2),
    "directory elsewhere": lambda: header_of(GOOD, 0, start=2**32 - 2),
    "zip64 without locator": lambda: header_of(GOOD, 0, start=2**32 - 1, size=2**32 - 1),
    "local headers elsewhere": lambda: GOOD.replace(b"PK\3\4", b"PK\3\5").replace(b"PK\3\5", b"PK\3\4", 1),
    "huge entry declared": lambda: GOOD.replace(struct.pack("<L", 8) * 2, struct.pack("<L", 2**31) * 2),
    "storage too short": lambda: program(one(tensor(offset=b"K\x09"))),
    "storage from before its beginning": lambda: program(one(tensor(offset=b"J\xff\xff\xff\xff"))),
    "storage missing": lambda: program(one(tensor(key="1"))),
    "storage with a huge key": lambda: program(one(tensor(key="x" * MB))),
    # pickles
    "empty pickle": lambda: program(b""),
    "unknown operation": lambda: program(b"\xff"),
    "harmful": lambda: program(called(b"posix mkdir", text("harm"))),
    "harmful beside a state dict": lambda: program(b"(" + one(tensor()) + called(b"posix mkdir", text("harm")) + b"t"),
    "eval": lambda: program(called(b"builtins eval", text("open('harm', 'w')"))),
    "getattr chain": lambda: program(b"cos\nmkdir\nctorch\nload\nbN\x81"),
    "bytearray of a terabyte": lambda: program(one(called(b"builtins bytearray", b"\x8a\x06" + bytes(5) + b"\1"))),
    "tensor of a terabyte": lambda: program(one(called(b"torch FloatTensor", b"\x8a\x06" + bytes(5) + b"\1"))),
    "slow codec": lambda: program(one(called(b"_codecs encode", text("ä" * MB), text("punycode")))),
    "nested tuples as a key": lambda: program(b"}" + doubled(b")", 200) + b"Ns"),
    "deep tuples as a key": lambda: program(b"}" + b")" + b"\x85" * 500_000 + b"Ns"),
    "deep tuples": lambda: program(b")" + b"\x85" * 900_000),
    "deep lists": lambda: program(b"]" * 500_000 + b"a" * 499_999),
    "deep marks": lambda: program(b"(" * 8 * MB),
    "deep rebuilding": lambda: program(
        b"ctorch._tensor\n_rebuild_from_type_v2\nq\0" + b"(h\0N" * 5000 + b"t" * 5000 + b"R"
    ),
    "doubled dictionaries": lambda: program(doubled(one(tensor()), 200)),
    "lists of themselves": lambda: program(b"]q\0" + b"h\0" * 1000 + b"a" * 1000),
    "copies of a list": lambda: program(
        b"](" + b"NN\x86" * 100_000 + b"eq\0" + b"ccollections\nOrderedDict\nh\0\x85R" * 10_000 + b"(" + b"t"
    ),
    "empty dictionaries": lambda: program(b"(" + b"}" * 30 * MB + b"l"),
    "nothing, often": lambda: program(b"(" + b"N" * 31 * MB + b"t"),
    "memo far away": lambda: program(b"Nr\xff\xff\xff\x7f"),
    "memo often": lambda: program(b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(6_000_000))),
    "memo of nothing": lambda: program(b"h\x63"),
    "small numbers": lambda: program(b"(" + b"M\xe8\x03" * 10 * MB + b"t"),
    "strings": lambda: program(b"(" + b"U\2ab" * 7 * MB + b"t"),
    "one huge string": lambda: program(text("\U0001f600" + "x" * 31 * MB)),
    "string beyond the end": lambda: program(b"X\xff\xff\xff\xff"),
    "one huge name": lambda: program(b"c" + b"x" * 10 * MB + b"\ny\n"),
    "counter of 10**5000": lambda: program(one(pickle.dumps(10**5000, 2)[2:-1])),
    "ten to the 5000 in the way": lambda: program(b"}" + pickle.dumps(10**5000, 2)[2:-1] + one(tensor()) + b"s"),
    "a shape of a huge number": lambda: program(one(tensor(shape=pickle.dumps((10**5000,), 2)[2:-1]))),
    "a shape shared": lambda: program(
        b"("
        + b"K\1" * 50_000
        + b"tq\0}("
        + b"".join(text(f"{i}.{COUNTER}") + tensor(shape=b"h\0") for i in range(5000))
        + b"ut"
    ),
    "a storage shared": lambda: program(
        b"("
        + b"N" * 50_000
        + b"tq\0}("
        + b"".join(text(f"{i}.{COUNTER}") + b"ctorch._utils\n_rebuild_tensor_v2\n(h\0NNtR" for i in range(5000))
        + b"ut"
    ),
    "a long key shared": lambda: program(text("x" * 5 * MB + "." + COUNTER) + b"q\0(" + b"}h\0NsK\1" * 30_000 + b"t"),
    "a long way": lambda: program(
        b"".join(b"}" + text("x" * 1000 + str(i)) for i in range(9000)) + one(tensor()) + b"s" * 9000
    ),
    "many state dicts": lambda: program(text(NAME) + b"q\0(" + b"}h\0K\1s" * 1_000_000 + b"t"),
    "many layers": lambda: program(b"}(" + b"".join(text(f"{i}.{COUNTER}") + b"K\1" for i in range(300_000)) + b"u"),
    "names with escapes": lambda: program(
        b"}(" + text(f"{ESCAPES}.{COUNTER}") + tensor() + text(f"{ESCAPES}x.{COUNTER}") + text(ESCAPES) + b"u"
    ),
    "type with escapes": lambda: program(one(called(b"x\x1b[2J y\x07"))),
    # counters
    **{
        f"counter of {kind}": partial(lambda kind: program(one(tensor(f"ctorch\n{kind}Storage\n".encode()))), kind)
        for kind in ("QInt8", "QUInt4x2", "ComplexDouble", "Bool", "Half", "Nonsense", "BFloat16")
    },
    "counter of four bits": lambda: program(
        one(tensor(kind=b"ctorch.storage\nUntypedStorage\n", function=b"_rebuild_tensor_v3", last=b"ctorch\nuint4\nN"))
    ),
    "counter of nothing": lambda: program(one(b"N")),
    "counter of a dictionary": lambda: program(one(one(tensor()))),
    "counter of a name": lambda: program(one(b"cos\nsystem\n")),
    "counter without storage": lambda: program(one(b"ctorch._utils\n_rebuild_tensor_v2\n(NNNtR")),
    "counter with half a storage": lambda: program(one(b"ctorch._utils\n_rebuild_tensor_v2\n(NtR")),
    "counter at a list": lambda: program(one(tensor(offset=b"]"))),
    "counter quantized": lambda: program(one(called(b"torch._utils _rebuild_qtensor", text("x")))),
    "sparse": lambda: saved({**state(a=5), f"s.{COUNTER}": torch.ones(1).to_sparse()}),
    "meta": lambda: saved({**state(a=5), f"s.{COUNTER}": torch.ones(1, device="meta")}),
    "parameter": lambda: saved({**state(a=5), f"s.{COUNTER}": torch.nn.Parameter(torch.ones(()))}),
    "of size 0": lambda: saved({**state(a=5), f"s.{COUNTER}": torch.ones(0)}),
    # names and counters that grow when they are printed
    **{
        f"{layers} layers under one way of {kind}": partial(
            lambda way, layers: program(
                b"}" + text(way) + b"}(" + b"".join(text(f"{i}.{COUNTER}") + b"M\1\1" for i in range(layers)) + b"us"
            ),
            way,
            layers,
        )
        for kind, way, layers in (
            ("escapes", "\U000e0001" * 300, 130_000),
            ("wide letters", "\U00020000" * 300, 50_000),
            ("letters", "x" * 300, 50_000),
        )
    },
    "one name in many mappings": lambda: program(
        b"}"
        + text("\U000e0001" * 300)
        + b"("
        + text("\U000e0001" * 250 + f".{COUNTER}")
        + b"q\0"
        + b"}h\0Ns" * 130_000
        + b"ts"
    ),
    "one type of many counters": lambda: program(
        b"c"
        + ("\U000e0001" * 48).encode()
        + b"\n"
        + ("\U000e0001" * 48).encode()
        + b"\nq\0}("
        + b"".join(text(f"{i}.{COUNTER}") + b"h\0" for i in range(130_000))
        + b"u"
    ),
    # from before 1.6
    "legacy, each pickle slow": lambda: old(b"N" + b"Nb" * 3_000_000, b"}", b"]"),
    "legacy, each pickle large": lambda: old(b"}" * 1_200_000 + b"N" * 5_000_000, b"t", b"t"),
    "legacy, cut": lambda: legacy(state(a=5, b=6))[:-20],
    "legacy, huge storage": lambda: legacy(state(a=5))[:-16] + struct.pack("<q", 2**62) + bytes(8),
    "legacy, negative storage": lambda: legacy(state(a=5))[:-16] + struct.pack("<q", -1) + bytes(8),
    "legacy, no more than its beginning": lambda: legacy({})[:17],
    "legacy, keys that are nested": lambda: legacy(state(a=5)).replace(
        b"\x80\x02]q\0X", b"\x80\x02" + doubled(b")", 200) + b".X"
    ),
    "plain pickle": lambda: pickle.dumps({NAME: 5}, 2),
    "tar": lambda: b"x" * 257 + b"ustar\0" + bytes(10_000),
    "zeros": lambda: bytes(50 * MB),
    "a hundred thousand": lambda: many(100_000),
}
SAFETENSORS = {
    "length 2**64": lambda: safetensors(b"{}", length=2**64 - 1),
    "length beyond the end": lambda: safetensors(b"{}", length=100),
    "huge header": lambda: safetensors(b"{" + b" " * 40 * MB + b"}"),
    "header of spaces": lambda: safetensors(b"{" + b" " * 30 * MB + b"}"),
    "header of many": lambda: safetensors(b"{" + b",".join(b'"%d.running_var":{}' % i for i in range(MB)) + b"}"),
    "header of lists": lambda: safetensors(b'{"a":{"b":[' + b"[]," * 9 * MB + b"1]}}"),
    "header of metadata": lambda: safetensors(
        b'{"__metadata__":{' + b",".join(b'"%d":"x"' % i for i in range(2 * MB)) + b"}}"
    ),
    "metadata of lists": lambda: safetensors(b'{"__metadata__":{"x":[' + b"[]," * 9 * MB + b"1]}}"),
    "metadata with braces": lambda: safetensors({"__metadata__": {"x": '}{"' * 1000}, NAME: described()}),
    "deep header": lambda: safetensors(b'{"a":' * 100_000),
    "not JSON": lambda: safetensors(b"{nothing}"),
    "a list": lambda: safetensors(b"[]"),
    "no header": lambda: safetensors(b""),
    "twice": lambda: safetensors(b'{"%s":%s,"%s":%s}' % ((NAME.encode(), json.dumps(described()).encode()) * 2)),
    "outside": lambda: safetensors({NAME: described(offsets=(2**62, 2**62 + 8))}),
    "negative": lambda: safetensors({NAME: described(offsets=(-8, 0))}),
    "shape of text": lambda: safetensors({NAME: described(shape=("x",))}),
    "shape of one huge": lambda: safetensors({NAME: described(shape=(10**300,))}),
    "no description": lambda: safetensors({NAME: {}}),
    "null": lambda: safetensors({NAME: None}),
    "odd types": lambda: safetensors(
        {f"{kind}.{COUNTER}": described(kind) for kind in ("F8_E4M3", "F4", "C64", ESCAPES[:-1], "F64")}
    ),
    "name with escapes": lambda: safetensors({f"{ESCAPES}.{COUNTER}": described()}),
    "a hundred thousand": lambda: safetensors(
        {f"{i}.{COUNTER}": described(offsets=(8 * i, 8 * i + 8)) for i in range(100_000)},
        b"".join(struct.pack("<q", i + 1) for i in range(100_000)),
    ),
    "name that grows when it is printed": lambda: safetensors(
        b'{"\xf0\x9f\x98\x80' + b"\\n" * 15 * MB + b'.num_batches_tracked":' + json.dumps(described()).encode() + b"}"
    ),
    "name of a megabyte": lambda: safetensors({"x" * MB + f".{COUNTER}": described(), NAME: described()}),
}
INDEXES = {
    "itself": lambda: {NAME: "itself.index.json"},
    "another index": lambda: {NAME: "missing.index.json"},
    "missing": lambda: {NAME: "missing.safetensors"},
    "outside": lambda: {NAME: "../x.pt"},
    "above": lambda: {NAME: ".."},
    "here": lambda: {NAME: "."},
    "nowhere": lambda: {NAME: ""},
    "null byte": lambda: {NAME: "a\0b.pt"},
    "escapes": lambda: {NAME: f"{ESCAPES[:-1]}.pt"},
    "half a character": lambda: {NAME: "\ud800.pt"},
    "numbers": lambda: {NAME: 5},
    "lists": lambda: {NAME: []},
    "a list": lambda: [NAME],
    "long": lambda: {NAME: "x" * 5000 + ".pt"},
}
JSONS = {
    "deep": lambda: b'{"weight_map":' + b"[" * MB,
    "deep braces": lambda: b'{"a":' * MB,
    "of lists": lambda: b'{"weight_map":[' + b"[]," * 5 * MB + b"1]}",
    "of names": lambda: b'{"weight_map":{' + b",".join(b'"%d":"a"' % i for i in range(MB)) + b"}}",
    "of escapes": lambda: b'{"weight_map":{"\xf0\x9f\x98\x80' + b"\\n" * 15 * MB + b'":"a.pt"}}',
    "huge": lambda: b'{"weight_map":{"a":"' + b"x" * 40 * MB + b'"}}',
    "huge number": lambda: b'{"weight_map":' + b"9" * 10 * MB + b"}",
    "not text": lambda: b"\xff" * 100,
    "without": lambda: b"{}",
    "zeros": lambda: bytes(100),
}


def damaged(seed):
    """Change a few bytes of a good file, or cut it."""
    chance = random.Random(seed)
    make = chance.choice(
        [
            lambda: saved(state(a=5, b=10)),
            lambda: legacy(state(a=5, b=10)),
            lambda: GOOD,
            lambda: safetensors({NAME: described()}),
        ]
    )
    data = bytearray(make())
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256), *b"(]}RQct."])
    return bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)


def write(folder):
    """Write all files; give their paths."""
    for kind, ending, made in (
        ("torch", ".pt", TORCH),
        ("safe", ".safetensors", SAFETENSORS),
        ("json", ".index.json", JSONS),
    ):
        for name, make in made.items():
            (folder / f"{kind} {name}{ending}").write_bytes(make())
    for name, make in INDEXES.items():
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": make()}))
    for seed in range(200):
        (folder / f"damaged {seed}{'.pt' if seed % 4 else '.safetensors'}").write_bytes(damaged(seed))
    os.mkfifo(folder / "fifo.pt")
    (folder / "directory.pt").mkdir()
    (folder / "zero.pt").symlink_to("/dev/zero")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "lost.pt").symlink_to("nowhere.pt")
    (folder / f"x{ESCAPES}.pt".replace("\ud800", "\udcff")).write_bytes(b"nothing")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket.pt"))
    return sorted(folder.iterdir())


def _files(form, *names):
    return [form.format(name) for name in names]


EXPECTED = {
    **dict.fromkeys(_files("torch {}.pt", "deflated", "bomb in DATA.PKL", "bomb in version", "two roots"), "refused"),
    **dict.fromkeys(_files("torch {}.pt", "harmful", "memo far away", "small numbers", "many layers"), "refused"),
    **dict.fromkeys(_files("torch {}.pt", "storage too short", "storage from before its beginning"), "refused"),
    **dict.fromkeys(_files("torch {}.pt", "harmful beside a state dict", "slow codec", "deep tuples"), "read"),
    **dict.fromkeys(_files("safe {}.safetensors", "length 2**64", "twice", "outside", "header of metadata"), "refused"),
    **dict.fromkeys(_files("safe {}.safetensors", "name that grows when it is printed"), "refused"),
    **dict.fromkeys(_files("safe {}.safetensors", "metadata with braces", "name of a megabyte"), "read"),
    **dict.fromkeys(_files("{}.index.json", *INDEXES, *(f"json {name}" for name in JSONS)), "refused"),
    **dict.fromkeys(_files("{}.pt", "fifo", "directory", "zero", "loop", "lost", "socket"), "refused"),
}
