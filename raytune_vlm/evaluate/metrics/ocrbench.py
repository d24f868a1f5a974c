"""OCRBench: `ocrbench@official` and how its categories add up.

Liu et al. 2024, "OCRBench: On the Hidden Mystery of OCR in Large Multimodal Models"; the rule
stands in each script of Yuliang-Liu/MultimodalOCR, `OCRBench/scripts/` (`monkey.py`).
"""

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.references import Reference

FORMULAS = "Handwritten Mathematical Expression Recognition"
"""The category whose samples are those of HME100k."""

GROUPS = {
    "Text Recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    )
}
"""The subtotal of 300 points. The others are categories: VQA on scenes 200, on documents 200, key
information 200, formulas 100; the total of all 1,000 samples is the score of 0 to 1000."""


def contains(prediction: str, reference: Reference) -> SampleScore:
    """`ocrbench@official`: 1 if the prediction contains one of the answers, else 0.

    Lower case, no white space at the ends, newlines as blanks. For formulas (HME100k) case
    matters and blanks and newlines do not. An empty answer is contained in anything.
    """
    is_formula = reference.category == FORMULAS

    def clean(text: str) -> str:
        if is_formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    found = clean(prediction)
    return SampleScore(float(any(clean(answer) in found for answer in reference.answers)))
