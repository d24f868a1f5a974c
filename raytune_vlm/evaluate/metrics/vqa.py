"""VQA accuracy: how many of (usually ten) annotators gave the predicted answer.

The measure is that of Antol et al. 2015, "VQA: Visual Question Answering", section 3:
min(annotators who agree / 3, 1). GT-Vision-Lab/VQA,
`PythonEvaluationTools/vqaEvaluation/vqaEval.py` computes it ten times, each time without one
annotator, and takes the mean. The variants differ in that and in when texts are normalised. Digits
are any Unicode digits, as in Python 3 ports of that script (Python 2 knew ASCII ones only).

Rule of ours: a reference of a single answer stands for ten annotators who agree.
"""

import re
from collections.abc import Callable, Sequence

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.references import Reference

_CONTRACTIONS = (  # noqa: SIM905 -- more than a screen as a list
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't "
    "she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
    "y'all'd've you'd you'd've you'll you're you've"
).split()
_CONTRACTED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""A word that lacks one apostrophe -> the word; the last entry stands so in the official table."""
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_NUM_PERIODS = 32
"""The official script passes a flag where the number of replacements belongs: no more are made."""


def official(prediction: str, reference: Reference) -> SampleScore:
    """`vqa@official`: texts are normalised only where the annotators' answers differ."""
    given, answers = _flat(prediction), [_flat(answer) for answer in _annotators(reference)]
    if len(set(answers)) > 1:
        given, answers = normalise(given), [normalise(answer) for answer in answers]
    return SampleScore(leave_one_out(given, answers))


def always_normalise(prediction: str, reference: Reference) -> SampleScore:
    """`vqa@always_normalise`: as `vqa@official`, but texts are normalised in any case.

    What open-compass/VLMEvalKit, `vlmeval/dataset/utils/vqa_eval.py`, method `vqa_score`, and many
    others do. There a period after a digit stays (`5.` is not `5`); here it goes, as officially.
    """
    given, answers = _prepared(prediction, reference)
    return SampleScore(leave_one_out(given, answers))


def min_k_over_3(prediction: str, reference: Reference) -> SampleScore:
    """`vqa@min_k_over_3`: the measure as the paper prints it, no annotator left out."""
    given, answers = _prepared(prediction, reference)
    return SampleScore(min(1.0, answers.count(given) / 3))


def m4c(prediction: str, reference: Reference) -> SampleScore:
    """`vqa@m4c`: TextVQA with the evaluator of M4C (Hu et al. 2020).

    facebookresearch/mmf, `mmf/utils/m4c_evaluators.py`, `TextVQAAccuracyEvaluator`: before the
    usual normalisation, texts are lower case, commas and question marks go, and `'s` becomes a
    word. That one insists on ten answers; here any number will do.
    """
    given, answers = _m4c_word(prediction), [_m4c_word(text) for text in _annotators(reference)]
    return SampleScore(leave_one_out(given, answers))


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """The mean over annotators of min(agreeing *others* / 3, 1)."""
    same = answers.count(prediction)
    with_it, without = min(1.0, max(same - 1, 0) / 3), min(1.0, same / 3)
    return (same * with_it + (len(answers) - same) * without) / len(answers)


def normalise(text: str) -> str:
    """Punctuation, then words: numbers as digits, no articles, apostrophes put back.

    A punctuation mark goes if it stands next to a blank anywhere in the text, or if the text has a
    comma between digits; else it becomes a blank. A period goes unless a digit follows.
    """
    return _words(_without_punctuation(text, has_comma=re.search(r"\d,\d", text) is not None))


def _without_punctuation(text: str, *, has_comma: bool) -> str:
    output = text
    for mark in _PUNCTUATION:
        goes = has_comma or f"{mark} " in text or f" {mark}" in text
        output = output.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", output, count=_NUM_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _prepared(prediction: str, reference: Reference) -> tuple[str, list[str]]:
    clean: Callable[[str], str] = lambda text: normalise(_flat(text))  # noqa: E731
    return clean(prediction), [clean(answer) for answer in _annotators(reference)]


def _m4c_word(text: str) -> str:
    word = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(_flat(word))


def _annotators(reference: Reference) -> tuple[str, ...]:
    return reference.answers * 10 if len(reference.answers) == 1 else reference.answers
