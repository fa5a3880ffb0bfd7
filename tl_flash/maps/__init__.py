"""The maps wing: the results of a decode and the questions that they answer.

`Readings` is what a decode gave; `NeuronMap` asks it (`search`), shows it (`reading`, `hits`), compares it and keeps it
on disk. `ConceptTable` is what a search for concepts gave (`concept_null` says by what chance), `ConceptHits` the best
of it.
"""

from tl_flash.maps.comparison import Comparison, compare
from tl_flash.maps.concept_hits import ConceptHit, ConceptHits
from tl_flash.maps.concept_null import ConceptNull, moments_by_bin
from tl_flash.maps.concept_table import ConceptTable, Rows
from tl_flash.maps.hits import Hit, Hits
from tl_flash.maps.later import while_unchanged
from tl_flash.maps.neuron_map import NeuronMap
from tl_flash.maps.null import Null
from tl_flash.maps.origin import Origin, Source
from tl_flash.maps.reading import NeuronReading
from tl_flash.maps.readings import Tracked
from tl_flash.maps.search import require_count
from tl_flash.maps.top_tokens import TopTokens, tau_of

__all__ = [
    "Comparison",
    "ConceptHit",
    "ConceptHits",
    "ConceptNull",
    "ConceptTable",
    "Hit",
    "Hits",
    "NeuronMap",
    "NeuronReading",
    "Null",
    "Origin",
    "Rows",
    "Source",
    "TopTokens",
    "Tracked",
    "compare",
    "moments_by_bin",
    "require_count",
    "tau_of",
    "while_unchanged",
]
