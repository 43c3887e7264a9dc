"""The safetensors files of a checkpoint, checked by their headers alone: no tensor is read.

A safetensors file is an 8-byte little-endian header length, a JSON header that gives each tensor's dtype,
shape and byte range, and the bytes. A download that stopped early is found here, before any rank starts.
"""

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringserve.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# Names in a safetensors header. What is not here (fp8, packed fp4) only occurs in quantised checkpoints.
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
              "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Shards:
    files: tuple[Path, ...]
    n_bytes: int
    """Bytes of all tensors together."""
    dtype: str | None
    """The floating dtype that most bytes have, in torch's words; None when no tensor is floating."""


def read_shards(directory: Path) -> Shards:
    """Finds and checks the weights; raises CheckpointError with the file and the numbers."""
    names_of_file = _tensors_by_file(directory)
    bytes_of_dtype: Counter[str] = Counter()
    for file, names in names_of_file.items():
        header = _read_header(file)
        if missing := sorted(names - header.keys()):
            raise CheckpointError(f"{file} lacks {len(missing)} of the tensors that the index places in it, "
                                  f"for example {missing[0]}")
        for entry in header.values():
            begin, end = entry["data_offsets"]
            bytes_of_dtype[entry["dtype"]] += end - begin
    floating = {DTYPE_NAMES[name]: n for name, n in bytes_of_dtype.items() if name in DTYPE_NAMES}
    return Shards(files=tuple(names_of_file), n_bytes=bytes_of_dtype.total(),
                  dtype=max(floating, key=lambda name: floating[name]) if floating else None)


def _tensors_by_file(directory: Path) -> dict[Path, set[str]]:
    """The files to load, with the tensors each must hold; a single file comes first, as in transformers."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
            raise CheckpointError(f"{directory} has its weights as pickle files (.bin or .pt) only, which "
                                  "can run code when they are opened; convert them to safetensors")
        raise CheckpointError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files: dict[Path, set[str]] = {}
    for tensor, name in sorted(weight_map.items()):
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} places {tensor} in {name!r}, which is not a file beside it")
        files.setdefault(directory / name, set()).add(tensor)
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{directory} lacks {len(absent)} of the {len(files)} weight files of its "
                              f"index, for example {absent[0]}")
    return files


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors of one file by name, after its size and every byte range have been checked."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if prefix == b"version ":
            raise CheckpointError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull`")
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, max(size - 8, 0)):
            raise CheckpointError(f"{file} is truncated or no safetensors file: it has {size} bytes and its "
                                  f"header claims {length}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            ranges = sorted((*entry["data_offsets"], name) for name, entry in header.items())
            position = 0
            for begin, end, name in ranges:
                width = ITEM_BYTES.get(header[name]["dtype"])
                if begin != position or (width and end - begin != width * math.prod(header[name]["shape"])):
                    raise CheckpointError(
                        f"{file} is damaged: the byte range of {name} does not fit its shape")
                position = end
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} has a safetensors header that cannot be read: {error!r}") from error
    if position + 8 + length != size:
        word = "truncated" if size < position + 8 + length else "longer than its header says"
        raise CheckpointError(f"{file} is {word}: {size} bytes of {position + 8 + length}")
    return header  # type: ignore[no-any-return]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value
