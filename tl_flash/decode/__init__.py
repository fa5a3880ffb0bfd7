"""The decode wing: from weights through the kernel to a map, in memory or into a file that may be killed on the way."""

from tl_flash.decode.directions import decode_directions
from tl_flash.decode.neurons import flash_decode
from tl_flash.decode.resume import decode_to_file

__all__ = ["decode_directions", "decode_to_file", "flash_decode"]
