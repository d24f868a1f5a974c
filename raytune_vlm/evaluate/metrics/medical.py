"""Open and closed answers of VQA-RAD, SLAKE and PathVQA.

The rules of LLaVA-Med (Li et al. 2023; microsoft/LLaVA-Med, `llava/eval/run_eval.py` and
`eval_metrics/`): texts are normalised as for VQA accuracy, twice. The reference's `type` says
whether it is `open` or `closed`, in any case; a metric of the other kind has no score for it. A
reference without a type is scored by both.
"""

from collections import Counter

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.evaluate.metrics.vqa import normalise
from raytune_vlm.references import Reference

_NO_SCORE = SampleScore(float("nan"))


def open_recall(prediction: str, reference: Reference) -> SampleScore:
    """`medical_open@llava_med_recall`: the share of the answer's words that the prediction has.

    It does not mind what else a prediction says, so long answers gain. A word that the prediction
    repeats counts as often as it stands there, also above the line: that is LLaVA-Med's rule.
    """
    return _best_open(prediction, reference, want_f1=False)


def open_f1(prediction: str, reference: Reference) -> SampleScore:
    """`medical_open@llava_med_f1`: the F1 of that recall and of the precision over words."""
    return _best_open(prediction, reference, want_f1=True)


def closed_contains(prediction: str, reference: Reference) -> SampleScore:
    """`medical_closed@llava_med`: 1 if the prediction holds `yes` or `no`, and the answer.

    As parts of words too: `abnormal` holds `no`. LLaVA-Med leaves a prediction that holds `yes` or
    `no` but not the answer out of the mean; here it counts as wrong.
    """
    if not _is_of(reference, "closed"):
        return _NO_SCORE
    given = _clean(prediction)
    has_word = "yes" in given or "no" in given
    return SampleScore(float(has_word and any(_clean(x) in given for x in reference.answers)))


def closed_equals(prediction: str, reference: Reference) -> SampleScore:
    """`medical_closed@exact`: 1 if the normalised texts are equal, else 0."""
    if not _is_of(reference, "closed"):
        return _NO_SCORE
    given = _clean(prediction)
    return SampleScore(float(any(_clean(answer) == given for answer in reference.answers)))


def _best_open(prediction: str, reference: Reference, *, want_f1: bool) -> SampleScore:
    if not _is_of(reference, "open"):
        return _NO_SCORE
    words = _counts(prediction)
    scores = (_open(words, _counts(answer), want_f1) for answer in reference.answers)
    return SampleScore(max(scores))


def _open(words: Counter[str], gold: Counter[str], want_f1: bool) -> float:
    if not words and not gold:
        return 1.0  # 0 there: nothing was asked for and nothing was said
    hits = sum(count for word, count in words.items() if word in gold)
    if not hits:
        return 0.0
    missed = sum(count for word, count in gold.items() if word not in words)
    recall, precision = hits / (hits + missed), hits / words.total()
    return 2 * precision * recall / (precision + recall) if want_f1 else recall


def _is_of(reference: Reference, kind: str) -> bool:
    return reference.type.lower() in ("", kind)


def _clean(text: str) -> str:
    return _once(_once(text.lower()))


def _once(text: str) -> str:
    return normalise(text).replace(",", "")


def _counts(text: str) -> Counter[str]:
    return Counter(_once(_clean(text)).lower().split())
