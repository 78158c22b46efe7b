"""Arrays in .npz files and in files of torch.save that nobody vouches for.

Sizes are checked before memory is taken, and nothing in a file is run: of a pickle only those
names are resolved that a dictionary or list of plain arrays needs, and names of numpy lead to
classes of this file.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from deit_fast.errors import InputError, first_line, is_out_of_memory, printable

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 1 << 24  # bytes of what one sample stores, packed or not; the largest known has 2.4 MB
_MAX_CALLS, _MAX_STEPS = 64, 4096  # of a pickle; a call may make an object of LIMIT bytes
_CODES = ("f2", "f4", "f8", "i4", "i8", "b1")
_TENSORS = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in ("BFloat16", "Half", "Float", "Double")),
}  # fmt: skip


def gunzip(content: bytes) -> bytes:
    """What a gzip file of one part holds.

    Raises:
        InputError: it is damaged, incomplete or larger than LIMIT.
    """
    reader = zlib.decompressobj(wbits=31)
    try:
        result = reader.decompress(content, LIMIT + 1)
    except zlib.error as error:
        raise InputError(f"no gzip file, or a damaged one ({error})") from None
    if len(result) > LIMIT:
        raise InputError(f"more than {LIMIT} bytes when unpacked")
    if not reader.eof:
        raise InputError("the gzip file is incomplete")
    return result


def unzip(content: bytes) -> dict[str, bytes]:
    """The members of a zip archive, whose checksums are right.

    Raises:
        InputError: it is damaged, or they have more than LIMIT bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > LIMIT:
                raise InputError(f"{size} bytes when unpacked, more than {LIMIT}")
            return {name: archive.read(name) for name in archive.namelist()}
    except InputError:
        raise
    except Exception as error:  # zipfile raises half a dozen types
        raise InputError(f"no zip archive, or a damaged one ({first_line(error, 80)})") from None


def read_npz(content: bytes) -> dict[str, Tensor]:
    """The floating-point arrays of an .npz file.

    Raises:
        InputError: it is damaged, too large, or holds something else, such as pickled objects.
    """
    import torch

    tensors = {}
    for name, member in unzip(content).items():
        stream, name = io.BytesIO(member), printable(name.removesuffix(".npy"))
        try:
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0,
                      (2, 0): np.lib.format.read_array_header_2_0}[version]  # fmt: skip
            shape, _, dtype = header(stream)
        except Exception as error:  # of all types
            raise InputError(f"{name} is no array ({first_line(error, 80)})") from None
        if dtype.hasobject:
            raise InputError(f"{name} holds pickled objects, which are not read")
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise InputError(f"{name} is {dtype}, not an array of floating-point numbers")
        if math.prod(shape) * dtype.itemsize != len(member) - stream.tell():
            raise InputError(f"{name} has {len(member)} bytes, not those of its shape {shape}")
        stream.seek(0)
        array = np.lib.format.read_array(stream, allow_pickle=False)
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        tensors[name] = torch.from_numpy(array.reshape(shape))
    return tensors


def read_torch_tensors(content: bytes) -> dict[str, Tensor]:
    """The floating-point tensors of a dictionary that torch.save wrote.

    Raises:
        InputError: it is damaged, too large, or holds something else.
    """
    import torch

    value = _load(content, _TENSORS, [])
    if type(value) is not dict:
        raise InputError(f"it holds a {type(value).__name__}, not a dictionary")
    for name, tensor in value.items():
        if type(name) is not str or type(tensor) is not torch.Tensor:
            raise InputError(f"{printable(name)} is no tensor")
        if not tensor.is_floating_point() or not tensor.is_contiguous():
            raise InputError(f"{printable(name)} is no plain tensor of floating-point numbers")
    return {printable(name): tensor for name, tensor in value.items()}


def read_torch_arrays(content: bytes) -> list[np.ndarray]:
    """The numpy arrays of a list that torch.save wrote.

    Raises:
        InputError: it is damaged, too large, or holds something else.
    """
    names = {"numpy.core.multiarray._reconstruct": _Array, "numpy._core.multiarray._reconstruct":
             _Array, "numpy.ndarray": _Array, "numpy.dtype": _Dtype}  # fmt: skip
    allowed = {" ".join(name.rsplit(".", 1)) for name in names} | {"_codecs encode"}
    value = _load(content, allowed, [(kind, name) for name, kind in names.items()])
    if type(value) is not list or not all(type(item) is _Array for item in value):
        raise InputError(f"it holds a {type(value).__name__}, not a list of arrays")
    return [item.values for item in value]


def _load(content: bytes, allowed: set[str], names: list[Any]) -> Any:
    """What torch.save wrote, if its pickle names nothing but ``allowed``."""
    import torch

    from deit_fast.runtime.torch_files import load_torch

    members = unzip(content)
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise InputError("torch.save did not write it")
    # torch reads what was unpacked and counted here, not an archive that it may see differently.
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    try:
        _require_plain(members[pickles[0]], allowed)
        with torch.serialization.safe_globals(names):
            return load_torch(plain)[0]
    except InputError:
        raise
    except Exception as error:  # torch and pickletools raise a dozen types
        if is_out_of_memory(error):
            raise
        raise InputError(f"damaged ({first_line(error, 120)})") from None


def _require_plain(pickle: bytes, allowed: set[str]) -> None:
    calls = 0
    for step, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        if "GLOBAL" in opcode.name and argument not in allowed:
            raise InputError(f"it has an object of {printable(argument)[:100]}, which is not read")
        calls += opcode.name in ("REDUCE", "NEWOBJ", "BUILD")
        if calls > _MAX_CALLS or step > _MAX_STEPS:
            raise InputError("it has more objects than arrays need")


class _Dtype:
    """Stands for numpy.dtype in a pickle."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _CODES:
            raise InputError(f"it has an array of dtype {printable(code)[:20]}, which is not read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder("=" if state[1] == "|" else state[1])


class _Array:
    """Stands for numpy's arrays in a pickle, whose own code trusts what it reads."""

    def __init__(self, *_: object) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, content = state
        if -1 in shape:
            raise InputError(f"it has an array of shape {shape}")
        values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if is_fortran else "C")
        self.values = np.array(values, kind.dtype.newbyteorder("="), order="C")  # writable
