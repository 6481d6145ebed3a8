"""A quantised weight in parts: its bytes, an ordinary tensor, and what makes numbers of them.

To a compiler the products of such weights are operations that it does not look into. What it saw of a dense weight it
would keep for the backward pass, that of every layer at once.
"""

# T tokens, M inputs, N outputs

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "training_hub"

INT4, PART_OF_INT4, INT8 = "int4", "part of int4", "int8"


@dataclass(frozen=True)
class Packing:
    """What makes numbers of a quantised weight's bytes. sizes: of int4 its shape and those of both kinds of blocks, and
    of a part of one the place of its first block in the whole and how far from there that of its next row is; of int8
    that of its blocks. dtype: of the numbers.
    """

    form: str
    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> Packing:
        return self  # nothing changes it

    def dense(self, packed: Tensor) -> Tensor:
        """[N, M]: the weight of these bytes."""
        parts = [packed, *self.tensors]
        if torch.compiler.is_compiling():
            made: Tensor = torch.ops.training_hub.unpacked(parts, self.sizes, self.form, self.dtype)
            return made
        return _unpacked(parts, self.sizes, self.form, self.dtype)

    @property
    def block(self) -> int:
        """How many numbers, one behind the other, share a scale and cannot be parted; 1 where rows have one each."""
        return self.sizes[2] if self.form == INT4 else 1

    def laid_out(self, packed: Tensor, dimension: int) -> Tensor:
        """The bytes as a tensor that is cut as the weight is, along its rows (0) or its columns (1)."""
        return packed.view(self.sizes[0], -1) if self.form == INT4 and dimension else packed

    def part(self, dimension: int, place: int, among: int) -> Packing:
        """What makes numbers of the bytes that process `place` of `among` has of a weight, which is cut along its rows
        (0) or its columns (1) into equal parts of whole blocks. The numbers are those of the whole, bit for bit."""
        if self.form == INT8:
            numbers = tuple(one if dimension else one.chunk(among)[place].clone() for one in self.tensors)
            rows, columns = self.sizes
            return replace(self, tensors=numbers, sizes=(rows, columns // among if dimension else columns))
        codes, *tables = self.tensors
        outputs, inputs, *blocks = self.sizes
        codes = codes.view(outputs if dimension else 1, -1)
        mine = codes.chunk(among, 1)[place].clone()
        shape = (outputs, inputs // among) if dimension else (outputs // among, inputs)
        sizes = (*shape, *blocks, place * mine.shape[1], codes.shape[1])
        return replace(self, form=PART_OF_INT4, tensors=(mine, *tables), sizes=sizes)

    def product(self, x: Tensor, packed: Tensor, *, is_turned: bool) -> Tensor:
        """x W^T of x [..., M], or x W of x [..., N]."""
        parts = [packed, *self.tensors]
        multiply = torch.ops.training_hub.packed_product if torch.compiler.is_compiling() else _product
        made: Tensor = multiply(x, parts, self.sizes, self.form, self.dtype, is_turned)
        return made


def packed(weight: Any) -> tuple[Tensor, Packing]:
    """The bytes of a weight that bitsandbytes or torchao has quantised, and what makes its numbers of them."""
    _define()
    state = getattr(weight, "quant_state", None)
    if state is not None:
        second = state.state2
        tensors = (state.absmax, state.code, second.absmax, second.code, state.offset)
        return weight.data, Packing(INT4, tensors, (*state.shape, state.blocksize, second.blocksize), state.dtype)
    zeros = () if weight.zero_point is None else (weight.zero_point,)
    return weight.qdata, Packing(INT8, (weight.scale, *zeros), tuple(weight.block_size), weight.dtype)


def _int4(parts: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    low, scales, code, second_scales, second_code, offset = parts
    *shape, block, second_block = sizes
    second = QuantState(second_scales, code=second_code, blocksize=second_block, dtype=torch.float32)
    state = QuantState(scales, in_a_row(shape), code, block, "nf4", dtype, offset, second)
    return dequantize_4bit(low.view(-1, 1), state).view(shape)


def in_a_row(shape: Sequence[int]) -> torch.Size:
    """The shape of a weight's numbers one behind the other, as blocks of them are. Where rows are not whole blocks,
    bitsandbytes (0.50.2) takes other scales for them on a CPU."""
    return torch.Size([math.prod(shape)])


def _part_of_int4(parts: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Blocks of scales are those of the whole weight, of which a part may have any blocks; so it has all their scales,
    one for each 16,384 weights."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    low, codes, code, second_scales, second_code, offset = parts
    *shape, block, second_block, first, between = sizes
    rows, columns = (torch.arange(size, dtype=torch.int32, device=codes.device) for size in codes.shape)
    places = first + between * rows[:, None] + columns
    scales = second_code[codes.int()] * second_scales[places // second_block] + offset
    state = QuantState(scales.view(-1), in_a_row(shape), code, block, "nf4", dtype)
    return dequantize_4bit(low.view(-1, 1), state).view(shape)


def _int8(parts: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Int8Tensor

    low, scales, *zeros = parts
    made: Tensor = Int8Tensor(low, scales, list(sizes), dtype, *zeros).dequantize()
    return made


FORMS: dict[str, Callable[[Sequence[Tensor], Sequence[int], torch.dtype], Tensor]] = {
    INT4: _int4,
    PART_OF_INT4: _part_of_int4,
    INT8: _int8,
}
"""What makes numbers of bytes and the tensors of their packing, by its form."""


@cache
def _define() -> torch.library.Library:
    """Both as operations of torch's; there while this is."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    about = "Tensor[] parts, int[] sizes, str form, ScalarType dtype"
    for name, arguments, made, shaped in (
        ("unpacked", about, _unpacked, _unpacked_shape),
        ("packed_product", f"Tensor x, {about}, bool is_turned", _product, _product_shape),
    ):
        library.define(f"{name}({arguments}) -> Tensor")
        library.impl(name, made, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shaped, lib=library)
    return library


def _unpacked(parts: Sequence[Tensor], sizes: Sequence[int], form: str, dtype: torch.dtype) -> Tensor:
    return FORMS[form](parts, sizes, dtype)


def _unpacked_shape(parts: Sequence[Tensor], sizes: Sequence[int], form: str, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(_shape(parts, sizes, form), dtype=dtype)


def _product(
    x: Tensor, parts: Sequence[Tensor], sizes: Sequence[int], form: str, dtype: torch.dtype, is_turned: bool
) -> Tensor:
    weight_NM = _unpacked(parts, sizes, form, dtype).to(x.dtype)
    return x @ (weight_NM.T if is_turned else weight_NM)


def _product_shape(
    x: Tensor, parts: Sequence[Tensor], sizes: Sequence[int], form: str, dtype: torch.dtype, is_turned: bool
) -> Tensor:
    outputs, inputs = _shape(parts, sizes, form)
    return x.new_empty(*x.shape[:-1], outputs if is_turned else inputs)


def _shape(parts: Sequence[Tensor], sizes: Sequence[int], form: str) -> Sequence[int]:
    return parts[0].shape if form == INT8 else sizes[:2]
