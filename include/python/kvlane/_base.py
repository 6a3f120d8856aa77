"""What the generated module `kvlane.capi` stands on: the library, errors, views of arrays, and structs that keep what they point to."""

from __future__ import annotations

import ctypes as C
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = C.CDLL(os.environ.get("KVLANE_LIBRARY", str(Path(__file__).with_name("libkvlane.so.0"))))
LIBRARY.kvl_last_error.restype = C.c_size_t
LIBRARY.kvl_last_error.argtypes = [C.c_void_p, C.c_size_t]

# The element types of the library in the order of their numbers.
TYPES = ("float32", "float16", "bfloat16", "int8")


class Error(ValueError):
    """A call that the library refused, or that failed. `status` is one of `KVL_STATUS_*`; the message names the argument."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def check(status: int) -> None:
    """Raises the sentence of a status other than 0."""
    if status != 0:
        sentence = C.create_string_buffer(1024)
        LIBRARY.kvl_last_error(sentence, len(sentence))
        raise Error(status, sentence.value.decode())


def text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


class Array:
    """An array of the caller's: numpy's, or one that DLPack describes. `strides` count elements; `keep` owns the memory."""

    def __init__(self, x: Any, name: str) -> None:
        if isinstance(x, np.ndarray):
            if not x.dtype.isnative or any(s % x.itemsize for s in x.strides):
                raise TypeError(f"{name} has elements in another byte order, or between others")
            self.keep, self.data, self.shape, self.writable = x, x.ctypes.data, x.shape, x.flags.writeable
            self.dtype, self.itemsize = x.dtype.name, x.itemsize
            self.strides = tuple(s // x.itemsize for s in x.strides)
        elif hasattr(x, "__dlpack__"):
            self._from_dlpack(x, name)
        else:
            raise TypeError(f"{name} is {type(x).__name__}, which is neither an array of numpy nor one with __dlpack__")

    def _from_dlpack(self, x: Any, name: str) -> None:
        device = x.__dlpack_device__()
        if device[0] != 1:
            raise TypeError(f"{name} is on device {device}; the library reads memory of the CPU, (1, 0)")
        capsule = x.__dlpack__()
        tensor = DLTensor.from_address(_pointer(capsule, b"dltensor"))
        bits, lanes = tensor.dtype_bits, tensor.dtype_lanes
        kind = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}.get(tensor.dtype_code)
        if kind is None or lanes != 1:
            raise TypeError(f"{name} has elements of type {tensor.dtype_code} of DLPack with {lanes} lanes")
        self.keep, self.writable = (x, capsule), True
        self.dtype, self.itemsize = "bool" if kind == "bool" else f"{kind}{bits}", bits // 8
        self.data = (tensor.data or 0) + tensor.byte_offset
        self.shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        if tensor.strides:
            self.strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
        else:
            self.strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(tensor.ndim))

    def behind(self) -> int:
        """Bytes from the first element to the end of the last one; 0, for unknown, if elements lie before the first."""
        if 0 in self.shape or any(s < 0 for s in self.strides):
            return 0
        return (sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1) * self.itemsize

    def is_list(self) -> bool:
        """Whether the elements lie one behind the other, in the order of the axes."""
        wanted = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides)):
            if n > 1 and stride != wanted:
                return False
            wanted *= n
        return True


class DLTensor(C.Structure):
    _fields_ = (
        ("data", C.c_void_p),
        ("device_type", C.c_int32),
        ("device_id", C.c_int32),
        ("ndim", C.c_int32),
        ("dtype_code", C.c_uint8),
        ("dtype_bits", C.c_uint8),
        ("dtype_lanes", C.c_uint16),
        ("shape", C.POINTER(C.c_int64)),
        ("strides", C.POINTER(C.c_int64)),
        ("byte_offset", C.c_uint64),
    )


_pointer = C.pythonapi.PyCapsule_GetPointer
_pointer.restype = C.c_void_p
_pointer.argtypes = [C.py_object, C.c_char_p]


def four_axes(array: Array, name: str) -> None:
    if len(array.shape) != 4:
        raise TypeError(f"{name} has {len(array.shape)} axes, not the 4 of [batch, seq, heads, dim]")


def fill_view(view: C.Structure, x: Any, name: str, written: bool) -> Any:
    """Describes an array of four axes; returns what keeps its memory."""
    array = Array(x, name)
    four_axes(array, name)
    if array.dtype not in TYPES:
        raise TypeError(f"{name} is {array.dtype}, which is none of {', '.join(TYPES)}")
    if written and not array.writable:
        raise TypeError(f"{name} is written, but is read-only")
    C.Structure.__setattr__(view, "data", array.data)
    view.dtype, view.bytes = TYPES.index(array.dtype), array.behind()
    view.shape[:], view.strides[:] = array.shape, array.strides
    return array.keep


def fill_mask(view: C.Structure, x: Any, name: str) -> Any:
    array = Array(x, name)
    four_axes(array, name)
    if array.dtype not in ("bool", "uint8"):
        raise TypeError(f"{name} is {array.dtype}, not bool")
    C.Structure.__setattr__(view, "data", array.data)
    view.bytes = array.behind()
    view.shape[:], view.strides[:] = array.shape, array.strides
    return array.keep


def pointer(value: Any, name: str, element: str, read_only: bool) -> tuple[Any, Any]:
    """The address of a list or a struct, and what keeps it alive. Lists are never converted from another type: the library would
    read other numbers. Only a list or tuple of Python's becomes an array, where the library reads it."""
    if value is None or isinstance(value, int):
        return value, None
    if isinstance(value, C.c_void_p):
        return value.value, value
    if isinstance(value, C.Structure):
        return C.addressof(value), value
    if isinstance(value, (C.Array, C._SimpleCData)):
        return C.addressof(value), value
    if isinstance(value, (list, tuple)) and read_only and element in ("int32", "uint32", "int64", "float32", "float64"):
        exact = np.asarray(value)
        if exact.size and exact.dtype.kind not in ("iu" if "int" in element else "iuf"):
            raise TypeError(f"{name} has elements of {exact.dtype}, which is not {element}")
        if exact.size and "int" in element:
            limits = np.iinfo(element)
            if exact.min() < limits.min or exact.max() > limits.max:
                raise OverflowError(f"{name} has a number outside of {element}")
        value = exact.astype(element)
    array = Array(value, name)
    if element in ("int32", "uint32", "int64", "float32", "float64", "uint8"):
        if array.dtype != element and not (element == "uint8" and array.dtype == "bool"):
            raise TypeError(f"{name} is {array.dtype}, but the library has {element} there; convert it")
    elif element != "void":
        raise TypeError(f"{name} is an array, but the library has a {element} there")
    if not array.is_list():
        raise TypeError(f"{name} is a list with gaps: its elements must lie one behind the other")
    if not (read_only or array.writable):
        raise TypeError(f"{name} is written, but is read-only")
    return array.data, array.keep


class Struct(C.Structure):
    """A struct of the header. Fields that are not given are zero, its own size is filled in, and what it points to is kept."""

    _pointers_: dict[str, tuple[str, bool]] = {}

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        if self._fields_[0][0] == "struct_size":
            self.struct_size = C.sizeof(self)
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = dict(self._fields_)
        if name not in kinds:
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        kept, kind = value, kinds[name]
        if name in self._pointers_:
            value, kept = pointer(value, f"{type(self).__name__}.{name}", *self._pointers_[name])
        elif isinstance(kind, type) and issubclass(kind, Struct) and not isinstance(value, kind):
            if value is None:
                value = kind()
                return super().__setattr__(name, value)
            part = getattr(self, name)
            fill = fill_mask if kind.__name__ == "kvl_mask" else fill_view
            written = () if kind.__name__ == "kvl_mask" else (kind.__name__ == "kvl_view",)
            self.__dict__[name + "_"] = fill(part, value, name, *written)
            return
        super().__setattr__(name, value)
        self.__dict__[name + "_"] = kept


def argument(value: Any, name: str, element: str, read_only: bool) -> Any:
    """A pointer of a call. Arrays become views where the header has one; the caller's frame keeps what is passed."""
    if element in ("kvl_view", "kvl_const_view") and not isinstance(value, (C.Structure, C.c_void_p, int, type(None))):
        from . import capi

        view = getattr(capi, element)()
        view.__dict__["array_"] = fill_view(view, value, name, element == "kvl_view")
        return C.byref(view)
    if isinstance(value, (C.Structure, C.Array, C._SimpleCData)) and not isinstance(value, C.c_void_p):
        return C.byref(value)
    if type(value).__name__ == "CArgObject":
        return value
    if isinstance(value, C.c_void_p) and element == "pointer":
        return C.byref(value)
    address, kept = pointer(value, name, element, read_only)
    passed = _Kept(address)
    passed.kept = kept
    return passed


class _Kept(C.c_void_p):
    """An address with what keeps it valid during the call."""
