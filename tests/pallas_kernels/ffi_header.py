# SPDX-License-Identifier: Apache-2.0
"""The structures of xla/ffi/api/c_api.h, as ctypes has them, read from the header of jaxlib."""

import ctypes
import functools
import pathlib
import re

import jaxlib

HEADER = pathlib.Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h"
_SCALARS = {
    "size_t": ctypes.c_size_t,
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int": ctypes.c_int,
}


@functools.cache
def _text():
    text = re.sub(r"//.*|/\*.*?\*/|^#.*\\\n.*$", "", HEADER.read_text(), flags=re.MULTILINE)
    return re.sub(r"\b(const|struct)\s", "", text)


def define(name):
    """A number that the header defines."""
    return int(re.search(rf"^#define {name} (\d+)$", HEADER.read_text(), re.MULTILINE)[1])


@functools.cache
def struct(name):
    """A structure as a class of ctypes; pointers are numbers."""
    (body,) = re.findall(rf"\b{name} {{([^{{}}]*)}}", _text())
    fields = [_field(declaration) for declaration in body.split(";") if declaration.strip()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _field(declaration):
    if function := re.fullmatch(r"\s*_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", declaration):
        return function[1], ctypes.c_void_p
    kind, pointers, name = re.fullmatch(r"\s*(\w+)\s*(\**)\s*(\w+)\s*", declaration).groups()
    return name, ctypes.c_void_p if pointers else _type(kind)


def _type(name):
    if name in _SCALARS:
        return _SCALARS[name]
    if re.search(rf"typedef enum {{[^}}]*}} {name};", _text()):
        return ctypes.c_int
    if alias := re.search(rf"typedef (\w+) {name};", _text()):
        if alias[1] != name:
            return _type(alias[1])
    return struct(name)


def constant(name):
    """A number of an enumeration."""
    return int(re.search(rf"\b{name} = (\d+)", _text())[1])
