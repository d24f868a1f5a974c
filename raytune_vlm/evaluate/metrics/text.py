"""Metrics on plain text: exact match, character and word error rate, token F1.

`exact_match@strip`, `cer@micro` and `wer@micro` strip white space at the two ends and change
nothing else: no lower case, no Unicode normalisation (a precomposed and a decomposed accent
differ), no removal of Arabic vowel signs. The `@squad` variants normalise English.
"""

import re
import string
from collections import Counter

from rapidfuzz.distance import Levenshtein

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.references import Reference


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


def word_error_rate(prediction: str, reference: str) -> SampleScore:
    """`wer@micro`: as `cer@micro`, in words; a word is what stands between white space.

    As `jiwer.wer` does by default, except for what an empty reference counts, and that only blanks
    part words there. Chinese, Japanese and Thai are written without any: use `cer@micro` for them.
    """
    words, gold = prediction.split(), reference.split()
    length = max(len(gold), 1)
    return SampleScore(Levenshtein.distance(words, gold) / length, float(length))


def squad_exact_match(prediction: str, reference: Reference) -> SampleScore:
    """`exact_match@squad`: 1 if the text equals an answer after SQuAD's normalisation, else 0.

    Normalisation and empty answers as in `token_f1@squad`.
    """
    return SampleScore(float(_squad_tokens(prediction) in _squad_answers(reference)))


def squad_token_f1(prediction: str, reference: Reference) -> SampleScore:
    """`token_f1@squad`: F1 over the words of two texts, each counted as often as in both.

    Rajpurkar et al. 2016, "SQuAD"; rajpurkar/SQuAD-explorer, `evaluate-v2.0.py`: lower case,
    without ASCII punctuation and the articles a, an, the. The best answer counts. Answers without
    words count only if there are no others: then a prediction without words scores 1.
    """
    found = _squad_tokens(prediction)
    return SampleScore(max(_f1(found, gold) for gold in _squad_answers(reference)))


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    return 2 * (Counter(found) & Counter(gold)).total() / (len(found) + len(gold))


def _squad_answers(reference: Reference) -> list[list[str]]:
    answers = [_squad_tokens(answer) for answer in reference.answers]
    return [answer for answer in answers if answer] or [[]]


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _squad_tokens(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()
