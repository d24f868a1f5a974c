"""Metrics on plain text: `exact_match@strip` and `cer@micro`.

Both strip white space at the two ends and change nothing else: no lower case, no Unicode
normalisation (a precomposed and a decomposed accent differ), no removal of Arabic vowel signs.
"""

from rapidfuzz.distance import Levenshtein

from raytune_vlm.evaluate.metrics.base import SampleScore


def exact_match(prediction: str, reference: str) -> SampleScore:
    """`exact_match@strip`: 1 if the texts are equal after `str.strip`, else 0."""
    return SampleScore(float(prediction.strip() == reference.strip()))


def character_error_rate(prediction: str, reference: str) -> SampleScore:
    """`cer@micro`: edit distance over the length of the reference, weighted by that length.

    The aggregate is the corpus rate, sum of the distances / sum of the reference lengths. Counted
    in Unicode code points, with insertion, deletion and substitution at 1 each (Levenshtein 1966),
    after stripping both ends, which are the defaults of `jiwer.cer`. May exceed 1.

    An empty reference counts as one character, so that what is invented for it is counted and the
    rate stays finite (jiwer refuses such a reference or returns the number of insertions).
    """
    prediction, reference = prediction.strip(), reference.strip()
    length = max(len(reference), 1)
    return SampleScore(Levenshtein.distance(prediction, reference) / length, float(length))
