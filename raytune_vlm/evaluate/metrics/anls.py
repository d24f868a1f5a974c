"""ANLS, the average normalised Levenshtein similarity: `anls@rrc` and `anls@strict`.

Biten et al. 2019, "Scene Text Visual Question Answering", equation 1: 1 - NL(prediction, answer)
for the answer that is nearest, and 0 where NL reaches the threshold of 0.5. NL is the edit distance
over the length of the longer text.
"""

from rapidfuzz.distance import Levenshtein

from raytune_vlm.evaluate.metrics.base import SampleScore

THRESHOLD = 0.5


def rrc(prediction: str, answer: str) -> SampleScore:
    """`anls@rrc`: DocVQA and InfographicVQA as the Robust Reading Competition scores them.

    The competition's script, as ported in EvolvingLMMs-Lab/lmms-eval, `lmms_eval/api/metrics.py`,
    `anls`: lower case, one blank for any white space, none at the ends. A similarity of exactly 0.5
    counts. The length is that of the texts *before* this, so white space is not quite free.
    """
    texts = [" ".join(text.strip().lower().split()) for text in (prediction, answer)]
    length = max(len(answer.upper()), len(prediction.upper()))
    similarity = 1 - (Levenshtein.distance(*texts) / length if length else 0.0)
    return SampleScore(similarity if similarity >= THRESHOLD else 0.0)


def strict(prediction: str, answer: str) -> SampleScore:
    """`anls@strict`: lower case and nothing else; a similarity of exactly 0.5 scores 0.

    The paper's inequality, as google-research/pix2struct, `pix2struct/metrics.py`, `anls_metric`
    has it. Two empty texts score 1 (division by zero there).
    """
    first, second = prediction.lower(), answer.lower()
    length = max(len(first), len(second))
    distance = Levenshtein.distance(first, second) / length if length else 0.0
    return SampleScore(1 - distance if distance < THRESHOLD else 0.0)
