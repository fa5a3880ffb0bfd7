"""The decode wing: from weights through the kernel to a map, in memory or into a file that may be killed on the way.

`flash_decode` names every neuron's tokens; `find_neurons` and `concepts` go the other way, from a word to its neurons
(`wording` says which tokens a word has, `scan` scores every neuron on them in one pass).
"""

from tl_flash.decode.directions import decode_directions
from tl_flash.decode.find import concepts, find_neurons
from tl_flash.decode.neurons import flash_decode
from tl_flash.decode.resume import decode_to_file

__all__ = ["concepts", "decode_directions", "decode_to_file", "find_neurons", "flash_decode"]
