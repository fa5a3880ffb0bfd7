"""The kernel wing: read directions through an unembedding, exactly, in bounded memory. It needs torch alone.

A direction x [d_model] scores every token, s = (gain * x) . W_U. For Llama 3.1 8B's neurons that is 59 billion
scores, so none is kept: a tile of rows is scored by one matrix product, reduced at once, and only the answer
stays. `reference_decode` is the plain definition of that answer.

The answer is exact although the product that finds it is not. Every score of the product has a bound on its error:
the rounding of both factors and of the sum, by Cauchy-Schwarz, token by token. The tokens of greatest upper bound
are scored again in float64. Where the k-th of these is above every upper bound left outside, the top k are proven;
where it is not, the row is repaired: every token whose bound reaches the k-th score is scored again, or where these
are many the row is first screened in float32. Hence the tokens named depend neither on the device nor on tiles,
threads or `max_bytes`.
"""

from tl_flash.kernel.arithmetic import parts, plain_arithmetic
from tl_flash.kernel.columns import Columns, centred_columns, column_cosines, column_lengths
from tl_flash.kernel.kept import forget, held_bytes
from tl_flash.kernel.readout import Readout
from tl_flash.kernel.reference import reference_decode
from tl_flash.kernel.scores import extreme_tokens, greatest_z, token_scores, token_z, widest_tokens
from tl_flash.kernel.screens import fast_dtype, screened_in
from tl_flash.kernel.streaming import decode, decode_each
from tl_flash.kernel.unembedding import Unembedding, prepare

__all__ = [
    "Columns",
    "Readout",
    "Unembedding",
    "centred_columns",
    "column_cosines",
    "column_lengths",
    "decode",
    "decode_each",
    "extreme_tokens",
    "fast_dtype",
    "forget",
    "greatest_z",
    "held_bytes",
    "parts",
    "plain_arithmetic",
    "prepare",
    "reference_decode",
    "screened_in",
    "token_scores",
    "token_z",
    "widest_tokens",
]
