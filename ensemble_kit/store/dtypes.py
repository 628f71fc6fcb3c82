"""The types that tensors are stored in, each under every name that it goes by.

The one table of them: safetensors, NumPy, torch and ONNX each have their own names, and a name that
is looked up in two tables is sooner or later missing in one. Torch's types are not here, because
nothing in this folder imports torch; torch calls each type by ``StorageType.numpy``.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, get_args

from ensemble_kit.choices import BLOCK_DTYPES, BLOCK_OPSET, Dtype


class StorageType(NamedTuple):
    """A type of stored numbers.

    Attributes:
        name: What the kit calls it; ``--dtype`` takes some of them.
        safetensors: Its name in the header of a safetensors file.
        numpy: Its name in NumPy and in torch; NumPy itself has no ``bfloat16``.
        onnx: Its name in ONNX's ``TensorProto.DataType``.
        onnx_number: Its number there.
        num_bytes: The bytes that one number takes, or that two do of ``int4``.
    """

    name: str
    safetensors: str
    numpy: str
    onnx: str
    onnx_number: int
    num_bytes: int

    def bytes_of(self, num_values: int) -> int:
        """Return what some numbers take."""
        return -(-num_values * self.num_bytes // (2 if self.name == "int4" else 1))

    @property
    def is_floating(self) -> bool:
        """Whether its numbers are floating point."""
        return "float" in self.numpy


STORAGE_TYPES = (
    StorageType("fp64", "F64", "float64", "DOUBLE", 11, 8),
    StorageType("fp32", "F32", "float32", "FLOAT", 1, 4),
    StorageType("fp16", "F16", "float16", "FLOAT16", 10, 2),
    StorageType("bf16", "BF16", "bfloat16", "BFLOAT16", 16, 2),
    StorageType("int64", "I64", "int64", "INT64", 7, 8),
    StorageType("int32", "I32", "int32", "INT32", 6, 4),
    StorageType("int8", "I8", "int8", "INT8", 3, 1),
    StorageType("int4", "U8", "uint8", "INT4", 22, 1),  # two a byte
    StorageType("uint8", "U8", "uint8", "UINT8", 2, 1),
    StorageType("bool", "BOOL", "bool", "BOOL", 9, 1),
)
BY_NAME: Mapping[str, StorageType] = MappingProxyType({t.name: t for t in STORAGE_TYPES})
BY_SAFETENSORS: Mapping[str, StorageType] = MappingProxyType(
    {t.safetensors: t for t in STORAGE_TYPES}
)
BY_NUMPY: Mapping[str, StorageType] = MappingProxyType({t.numpy: t for t in STORAGE_TYPES})
BY_ONNX: Mapping[int, StorageType] = MappingProxyType({t.onnx_number: t for t in STORAGE_TYPES})
FLOATING = frozenset(t.safetensors for t in STORAGE_TYPES if t.is_floating)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)  # finest first
BLOCKS_BY_SAFETENSORS: Mapping[str, Dtype] = MappingProxyType(
    {BY_NAME[dtype].safetensors: dtype for dtype in BLOCK_DTYPES}
)


def finest_first(dtypes: Iterable[str | None]) -> tuple[Dtype, ...]:
    """Return the precisions among some values, each once, finest first."""
    found = set(dtypes)
    return tuple(dtype for dtype in DTYPES if dtype in found)


def types_of_weights(dtype: Dtype) -> tuple[StorageType, ...]:
    """Return the types that weights are stored in, last what is used outside of blocks."""
    names = (dtype, "bf16") if dtype in BLOCK_DTYPES else (dtype,)
    return tuple(BY_NAME[name] for name in names)


def types_of_onnx_weights(dtype: Dtype, opset: int) -> list[str]:
    """Return ONNX's names for the types that a file in some operator set stores weights in."""
    types = [each.onnx for each in types_of_weights(dtype)]
    if dtype == "int4" and opset < BLOCK_OPSET:
        types[0] = BY_NAME["uint8"].onnx
    return types
