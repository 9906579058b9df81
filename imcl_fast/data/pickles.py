"""Reads the pickled arrays in which CIFAR and ImageNet32 come, without running their code.

A pickle is a program that may call anything. This reader lets it name nothing but what a
numpy array is put together from, and even for these it puts its own stand-ins: no function
of numpy's runs on what a file says.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import DataError

DTYPES = {
    "b1": torch.bool, "u1": torch.uint8, "i1": torch.int8, "i2": torch.int16,
    "i4": torch.int32, "i8": torch.int64, "f4": torch.float32, "f8": torch.float64,
}  # fmt: skip


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dict of plain values and numpy arrays, as Python 2 or 3 wrote it.

    Returns:
        The dict; its text is str, also where it was bytes, and its arrays are Tensors.

    Raises:
        DataError: the file is damaged, is no dict, or names something that an array isn't
            made of.
    """
    try:
        # Python 2 wrote its strings, text and raw data alike, as bytes.
        value = _plain(_Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load())
    except _Refused as error:
        raise DataError(f"{path}: refused, since it is no mere data: {error}") from error
    except Exception as error:  # a damaged pickle may fail in any way
        problem = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: can't be read as a pickle ({problem}); delete it and get it again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a pickled dict, got {type(value).__name__}")
    return value


class _Refused(Exception):
    """A pickle names what no array is made of."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; files have either.
        stand_in = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if stand_in is None:
            raise _Refused(f"it names {module}.{name}")
        if isinstance(stand_in, type):
            return stand_in
        # A pickle can set attributes of what it has named: those of a throwaway.
        return lambda *args: stand_in(*args)


class _Dtype:
    """In place of numpy.dtype."""

    def __init__(self, code: str, align: object = None, copy: object = None) -> None:
        if code not in DTYPES:
            raise _Refused(f"it has an array of dtype {code!r}")
        self.torch = DTYPES[code]

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            raise _Refused("it has an array in big-endian byte order")


class _Array:
    """In place of numpy.ndarray."""

    value: Tensor

    def __init__(self, *args: object) -> None:  # an empty array at first, of whatever shape
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _tensor(data, dtype, shape, "F" if is_fortran else "C")


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = _tensor(data, dtype, shape, order)
    return array


def _encode(text: str, encoding: str) -> bytes:
    # How pickles before protocol 3 spell bytes.
    if encoding != "latin1":
        raise _Refused(f"it has text in the encoding {encoding!r}")
    return text.encode("latin1")


def _tensor(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> Tensor:
    content = bytearray(data.encode("latin1") if isinstance(data, str) else data)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype.torch)
    flat = torch.frombuffer(content, dtype=dtype.torch)
    if order == "F":
        return flat.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.view(shape)


def _scalar(dtype: _Dtype, data: Any) -> int | float:
    return _tensor(data, dtype, (), "C").item()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("latin1")
    return value.value if isinstance(value, _Array) else value


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *args: _Array(),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # how they spell none
}
