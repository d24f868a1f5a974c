"""Multiple choice: accuracy by letter, with four ways of finding the letter.

The answers of the reference are letters (`B`), its `choices` the texts, in the order of the
letters. What names no letter is wrong: nothing is drawn at random, in no variant. Without choices
any letter may be meant, and a prediction equal to the answer is right whatever it is.
"""

import re
import string

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.evaluate.metrics.letters import lmms_letter, plain_letter, vlmevalkit_letter
from raytune_vlm.references import Reference


def letter_accuracy(prediction: str, reference: Reference) -> SampleScore:
    """`choice@letter`: 1 if the one letter that the prediction names is an answer.

    How it is found: `letters.plain_letter`, which never guesses.
    """
    return _right(prediction, plain_letter(prediction, reference.choices), reference)


def vlmevalkit_accuracy(prediction: str, reference: Reference) -> SampleScore:
    """`choice@vlmevalkit`: AI2D, RealWorldQA and others as VLMEvalKit scores them without a judge.

    How the letter is found: `letters.vlmevalkit_letter`.
    """
    return _right(prediction, vlmevalkit_letter(prediction, reference.choices), reference)


_OPENING_LETTER = re.compile(r"\s*([A-Z])\.")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def ai2d(prediction: str, reference: Reference) -> SampleScore:
    """`ai2d@lmms_eval`: the letter of `B. ...` at the start, else the whole text, is an answer.

    EvolvingLMMs-Lab/lmms-eval, `lmms_eval/tasks/ai2d/` (`ai2d.yaml`, `utils.py`): compared in lower
    case and without ASCII punctuation, but with its white space: `B ` is wrong. Choices are not
    needed. (Kembhavi et al. 2016, who made AI2D, only say accuracy.)
    """
    found = _OPENING_LETTER.match(prediction)
    given = _bare(found[1] if found else prediction)
    return SampleScore(float(any(_bare(answer) == given for answer in reference.answers)))


def realworldqa(prediction: str, reference: Reference) -> SampleScore:
    """`realworldqa@lmms_eval`: letters A to D by lmms-eval's search, other answers as texts.

    EvolvingLMMs-Lab/lmms-eval, `lmms_eval/tasks/realworldqa/utils.py`. An answer that is no letter
    is compared in lower case, without white space at the ends, and with or without the full stops
    at the end of the prediction (there only without). (xAI published the questions, not a script.)
    """
    return SampleScore(max(_realworldqa(prediction, answer) for answer in reference.answers))


def _realworldqa(prediction: str, answer: str) -> float:
    gold = answer.strip()
    if gold.upper() in ("A", "B", "C", "D"):
        return float(lmms_letter(prediction, ["", "", "", ""]) == gold.upper())
    given = prediction.lower().strip()
    return float(gold.lower() in (given, given.rstrip(".")))


def _bare(text: str) -> str:
    return text.lower().translate(_WITHOUT_PUNCTUATION)


def _right(prediction: str, letter: str | None, reference: Reference) -> SampleScore:
    if not reference.choices and prediction.strip() in (x.strip() for x in reference.answers):
        return SampleScore(1.0)
    golds = {answer.strip().upper() for answer in reference.answers}
    return SampleScore(float(letter is not None and letter in golds))
