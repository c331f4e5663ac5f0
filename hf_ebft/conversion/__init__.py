"""Converts configurations of other programs to those of `hf-ebft train`."""

from hf_ebft.conversion.axolotl import Conversion, convert_axolotl
from hf_ebft.conversion.report import to_yaml

__all__ = ["Conversion", "convert_axolotl", "to_yaml"]
