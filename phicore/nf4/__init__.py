"""The NF4 number format: code book, encode, decode, NF4Tensor, NF4Linear."""

from phicore.nf4.convert import quantize_
from phicore.nf4.linear import NF4Linear, linear
from phicore.nf4.tensor import NF4Tensor, quantize

__all__ = ["NF4Linear", "NF4Tensor", "linear", "quantize", "quantize_"]
