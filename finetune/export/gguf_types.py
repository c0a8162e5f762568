"""The quantisations of a GGUF file: which type each tensor gets, and llama.cpp's own functions that compute it.

The mixture of q4_k_m is that of llama.cpp's quantiser (src/llama-quant.cpp, llama_tensor_get_type) for models with one matrix
each for query, key and value; a test compares the bytes with those of llama-cpp-python's quantiser. The functions are those that
the package xllamacpp was built with, so that no compiler is needed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from gguf.constants import GGML_QUANT_SIZES

from finetune.errors import UserError
from finetune.machine.hardware import usable_cores
from finetune.models.llama_cpp import PACKAGE, version

FILE_TYPES = {
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "f32": LlamaFileType.ALL_F32,
}
"""Names of --quantize."""
_PLAIN = {"q8_0": Type.Q8_0, "f16": Type.F16, "bf16": Type.BF16, "f32": Type.F32}
_FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
"""For rows whose length is no multiple of 256."""
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_BLOCK_ROWS = 256
"""Rows that one thread quantises at a time."""

Quantiser = Callable[[numpy.ndarray], numpy.ndarray]


def type_of(name: str, shape: tuple[int, ...], quantization: str, *, layers: int, tied: bool) -> Type:
    """The type of a tensor by its name in GGUF. shape: (rows, columns). tied: whether the token embeddings are the output too."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return Type.F32
    if quantization != "q4_k_m":
        return _fitting(_PLAIN[quantization], shape[-1])
    return _fitting(_of_mixture(name, shape[-1], layers, tied), shape[-1])


def _of_mixture(name: str, columns: int, layers: int, tied: bool) -> Type:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return Type.Q8_0 if columns % 256 else Type.Q6_K
    match = _LAYER.fullmatch(name)
    if match and match[2] in ("attn_v", "ffn_down") and _more_bits(int(match[1]), layers):
        return Type.Q6_K
    return Type.Q4_K


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: Type, columns: int) -> Type:
    """The type, or one that can hold rows of this length."""
    for kind in (wanted, _FALLBACKS.get(wanted, Type.F16)):
        if columns % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return Type.F16


def byte_shape(shape: tuple[int, ...], kind: Type) -> tuple[int, ...]:
    """The shape of a tensor's bytes."""
    block, size = GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * size)


def quantised(values: numpy.ndarray, kind: Type) -> numpy.ndarray:
    """A float32 array as the bytes (uint8) of a type, its rows along the last dimension."""
    if kind == Type.F32:
        return values.view(numpy.uint8)
    if kind == Type.F16:
        return values.astype(numpy.float16).view(numpy.uint8)
    if kind == Type.BF16:
        from gguf import quants

        return numpy.asarray(quants.quantize(values, kind))
    return _by_llama_cpp(values, kind)


def _by_llama_cpp(values: numpy.ndarray, kind: Type) -> numpy.ndarray:
    quantise = _library().ggml_quantize_chunk
    rows, columns = values.reshape(-1, values.shape[-1]).shape
    values = numpy.ascontiguousarray(values, dtype=numpy.float32)
    found = numpy.empty(byte_shape((rows, columns), kind), dtype=numpy.uint8)

    def work(start: int) -> None:  # ctypes releases the lock of the interpreter
        count = min(_BLOCK_ROWS, rows - start)
        quantise(kind.value, values.ctypes.data, found.ctypes.data, start * columns, count, columns, None)

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(work, range(0, rows, _BLOCK_ROWS)))
    return found.reshape(byte_shape(values.shape, kind))


def check_quantiser() -> None:
    """Raises UserError if llama.cpp's functions are not there."""
    _library()


@cache
def _library() -> ctypes.CDLL:
    """llama.cpp's functions in the package xllamacpp. Raises UserError if it is missing or has none."""
    version()
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    for path in sorted(folder.glob(f"{PACKAGE}*.so")):
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "ggml_quantize_chunk"):
            continue
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        return library
    raise UserError(
        f"the installed {PACKAGE} {version()} has no quantiser; install the version that constraints.txt names",
        code="export.no_quantiser",
    )
