"""CUDA's virtual memory management, for pages that pass between processes.

These are ctypes and not cuda-bindings: the eight calls have a stable ABI, and that import has no
types and delays each worker by tenths of a second.
"""

from __future__ import annotations

import ctypes
from typing import Any


class Driver:
    """The memory of one device (CUDA driver API, 6.14). Sizes are multiples of 2 MiB, in bytes.

    All methods raise RuntimeError with the call and CUDA's error.
    """

    _DEVICE = _PINNED = _DESCRIPTOR = 1  # CU_MEM_LOCATION_TYPE_, _ALLOCATION_TYPE_, _HANDLE_TYPE_
    _READ_AND_WRITE = 3
    _SHARES = 103  # CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED

    def __init__(self, device: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._location = (self._DEVICE, device)  # CUmemLocation of cuda.h: type, id
        number, address, size = ctypes.c_int, ctypes.c_ulonglong, ctypes.c_size_t
        pointer = ctypes.c_void_p
        for name, arguments in (
            ("cuDeviceGetAttribute", [pointer, number, number]),
            ("cuMemCreate", [pointer, size, pointer, address]),
            ("cuMemMap", [address, size, size, address, address]),
            ("cuMemSetAccess", [address, size, pointer, size]),
            ("cuMemUnmap", [address, size]),
            ("cuMemRelease", [address]),
            ("cuMemExportToShareableHandle", [pointer, address, number, address]),
            ("cuMemImportFromShareableHandle", [pointer, pointer, number]),
        ):
            getattr(self._library, name).argtypes = arguments
        found = number()
        self._call("cuDeviceGetAttribute", ctypes.byref(found), self._SHARES, device)
        self.shares = bool(found.value)

    def _call(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._library, name)(*arguments):
            why = "out of memory" if error == 2 else f"error {error}"  # cuda.h
            raise RuntimeError(f"CUDA: {why} from {name}")

    def create(self, size: int, *, shared: bool) -> int:
        """Return a handle of new memory; with `shared` it can have a descriptor."""
        handle = ctypes.c_ulonglong()
        kind = self._DESCRIPTOR if shared else 0
        # CUmemAllocationProp of cuda.h: type, handle types, location; 16 bytes that stay 0.
        properties = (ctypes.c_int * 8)(self._PINNED, kind, *self._location)
        self._call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), 0)
        return handle.value

    def of(self, descriptor: int) -> int:
        """Return a handle of a descriptor's memory; the descriptor stays open."""
        handle = ctypes.c_ulonglong()
        name = "cuMemImportFromShareableHandle"
        self._call(name, ctypes.byref(handle), descriptor, self._DESCRIPTOR)
        return handle.value

    def descriptor(self, handle: int) -> int:
        """Return a new file descriptor of a handle's memory."""
        found = ctypes.c_int()
        name = "cuMemExportToShareableHandle"
        self._call(name, ctypes.byref(found), handle, self._DESCRIPTOR, 0)
        return found.value

    def map(self, address: int, size: int, handle: int) -> None:
        self._call("cuMemMap", address, size, 0, handle, 0)

    def allow(self, address: int, size: int) -> None:
        """Allow reading and writing."""
        # CUmemAccessDesc of cuda.h: location, flags.
        access = (ctypes.c_int * 3)(*self._location, self._READ_AND_WRITE)
        self._call("cuMemSetAccess", address, size, ctypes.byref(access), 1)

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", address, size)

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)
