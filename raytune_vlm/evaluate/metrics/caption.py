"""Captions, as the COCO evaluation scores them: CIDEr-D, BLEU-1 to 4 and ROUGE-L, all `@coco`.

Chen et al. 2015, "Microsoft COCO Captions"; tylin/coco-caption and its Python 3 port
salaniz/pycocoevalcap, `bleu/bleu_scorer.py`, `cider/cider_scorer.py`, `rouge/rouge.py`. Texts are
cut into words by `caption_words.caption_words`, which is near to, but not, the Java tokeniser.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

from raytune_vlm.evaluate.metrics.base import Combine, Floats, SampleScore
from raytune_vlm.evaluate.metrics.caption_words import caption_words
from raytune_vlm.references import Reference

Ngram = tuple[str, ...]

ORDERS = 4
"""The longest n-grams, in words."""
SIGMA = 6.0
"""CIDEr-D's tolerance for a difference in length."""
BETA = 1.2
"""ROUGE-L's weight of recall."""


def cider(predictions: Sequence[str], references: Sequence[Reference]) -> list[SampleScore]:
    """`cider@coco`: CIDEr-D (Vedantam et al. 2015), 0 to 10, times 10 as usual there.

    For n = 1 to 4 the cosine of the tf-idf vectors of prediction and reference, clipped to the
    reference's counts, times exp(-(difference in length)^2 / 72); the mean over n and references.
    A length is the number of two-word sequences, as in the official code.

    The document frequency of an n-gram is the number of samples *scored together* of whose
    references at least one has it. So a sample's score depends on the corpus: scores of different
    sets of samples do not compare, a corpus of one sample scores 0, and the bootstrap, which draws
    from the samples' scores, holds the frequencies fixed.
    """
    gold = [[_ngrams(caption_words(answer)) for answer in entry.answers] for entry in references]
    seen = Counter(ngram for entry in gold for ngram in {x for counts in entry for x in counts})
    weights = {ngram: math.log(len(gold)) - math.log(count) for ngram, count in seen.items()}
    unseen = math.log(max(len(gold), 1))
    scores = []
    for text, entry in zip(predictions, gold, strict=True):
        found = _Vector(_ngrams(caption_words(text)), weights, unseen)
        total = sum(found.similarity(_Vector(counts, weights, unseen)) for counts in entry)
        scores.append(SampleScore(10 * total / ORDERS / len(entry)))
    return scores


class _Vector:
    """The tf-idf weights of a text's n-grams, their norm for each n, and the text's length."""

    def __init__(self, counts: Counter[Ngram], weights: dict[Ngram, float], unseen: float) -> None:
        self.values = {x: count * weights.get(x, unseen) for x, count in counts.items()}
        self.norms = [0.0] * ORDERS
        for ngram, value in self.values.items():
            self.norms[len(ngram) - 1] += value**2
        self.norms = [math.sqrt(norm) for norm in self.norms]
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def similarity(self, reference: "_Vector") -> float:
        """The sum over n."""
        sums = [0.0] * ORDERS
        for ngram, value in self.values.items():
            gold = reference.values.get(ngram, 0.0)
            sums[len(ngram) - 1] += min(value, gold) * gold
        norms = (one * other for one, other in zip(self.norms, reference.norms, strict=True))
        cosine = sum(s / norm if norm else s for s, norm in zip(sums, norms, strict=True))
        return cosine * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))


def bleu(prediction: str, reference: Reference, order: int) -> SampleScore:
    """`bleu1@coco` to `bleu4@coco` (Papineni et al. 2002): a corpus metric, which adds up counts.

    The value is the sentence's own BLEU, as the official code lists it; the score of a corpus is
    not its mean but `combine_bleu` of the summed counts, and so in every bootstrap resample.

    Sums: words, words of the reference nearest in length (of two the shorter), n-grams for n = 1
    to 4, those of them in a reference (each as often as in one of them at most), and 1.
    """
    words = caption_words(prediction)
    gold = [caption_words(answer) for answer in reference.answers]
    counts, most = _ngrams(words), Counter[Ngram]()
    for answer in gold:
        most |= _ngrams(answer)
    shared = [0] * ORDERS
    for ngram, count in (counts & most).items():
        shared[len(ngram) - 1] += count
    nearest = min((abs(len(answer) - len(words)), len(answer)) for answer in gold)[1]
    asked = [max(0, len(words) - order) for order in range(ORDERS)]
    sums = tuple(map(float, (len(words), nearest, *asked, *shared, 1)))
    return SampleScore(float(combine_bleu(order)(np.array(sums))), sums=sums)


def combine_bleu(order: int) -> Combine:
    """From totals of what `bleu` sums up to BLEU-`order`, with the official tiny constants."""

    def combine(totals: Floats) -> Floats:
        words, nearest = totals[..., 0], totals[..., 1]
        asked, shared = totals[..., 2 : 2 + order], totals[..., 2 + ORDERS : 2 + ORDERS + order]
        precision = ((shared + 1e-15) / (asked + 1e-9)).prod(axis=-1) ** (1 / order)
        ratio = (words + 1e-15) / (nearest + 1e-9)
        return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))

    return combine


def rouge_l(prediction: str, reference: Reference) -> SampleScore:
    """`rouge_l@coco`: F of the longest common subsequence of words (Lin 2004), recall weighs 1.2.

    Precision and recall are each the best over the references, so they may be of different ones.
    A text without words counts as one empty word: two such score 1.
    """
    words = caption_words(prediction) or [""]
    gold = [caption_words(answer) or [""] for answer in reference.answers]
    common = [LCSseq.similarity(words, answer) for answer in gold]
    precision = max(common) / len(words)
    recall = max(count / len(answer) for count, answer in zip(common, gold, strict=True))
    if not precision:
        return SampleScore(0.0)
    return SampleScore((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision))


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    """How often each sequence of 1 to 4 words stands in a text."""
    counts: Counter[Ngram] = Counter()
    for order in range(1, ORDERS + 1):
        counts.update(zip(*(words[start:] for start in range(order)), strict=False))
    return counts
