"""The drawn rows of the fixtures, one function a data set; see `fixtures.py`."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image, ImageDraw

SIZE = (96, 64)
COLOURS = ("red", "green", "blue", "orange", "purple", "black")

Rows = list[dict[str, Any]]


def draw(text: str, colour: str = "black") -> dict[str, Any]:
    """A picture of a word on white, a bar in a colour under it, as the hub holds pictures."""
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((6, 8), text, fill="black")
    pen.rectangle((6, 40, 6 + 10 * len(text), 54), fill=colour)
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def mmmu_rows(split: str) -> Rows:
    """Six subjects, one a domain: one image, three in question and choices, open questions."""
    subjects = ("Art", "Accounting", "Biology", "Pharmacy", "History", "Computer_Science")
    rows = []
    for number, subject in enumerate(subjects, 1):
        images: list[Any] = [draw(subject[:8], COLOURS[number - 1]), None, None, None, None, None]
        question, options, answer = "What does <image 1> show?", ["a bar", "a cat", "it's 3"], "A"
        if number == 2:
            images[1:3] = [draw("second", "red"), draw("third", "blue")]
            question = "Compare <image 2> with <image 1>: which bar is blue?"
            options, answer = ["<image 3>", "<image 2>", "neither", "both"], "A"
        if number in (3, 6):
            question, options, answer = "How many bars has <image 1>?", [], "1"
            if number == 6:
                answer = "['one', '1']"
        rows.append(
            {
                "id": f"{split}_{subject}_{number}",
                "question": question,
                "options": str(options),
                "explanation": "",
                **{f"image_{n}": image for n, image in enumerate([*images, None], 1)},
                "img_type": "['Diagrams']",
                "answer": answer if split == "validation" else "?",
                "topic_difficulty": "Easy",
                "question_type": "multiple-choice" if options else "open",
                "subfield": subject,
            }
        )
    return rows


def mathvista_rows() -> Rows:
    """The five kinds of answers; two questions on one picture."""
    kinds: list[tuple[str, Any, Any, str]] = [
        ("text", ["longer", "shorter"], None, "longer"),
        ("integer", None, None, "7"),
        ("float", None, 1.0, "2.5"),
        ("list", None, None, "[1, 2]"),
        ("text", ["yes", "no"], None, "no"),
        ("integer", None, None, "-4"),
    ]
    tasks = ("geometry problem solving", "figure question answering")
    rows = []
    for number, (kind, choices, precision, answer) in enumerate(kinds, 1):
        asked = f"Question: What is the answer of picture {number}?"
        if choices:
            listed = "\n".join(f"({x}) {text}" for x, text in zip("AB", choices, strict=True))
            asked += f"\nChoices:\n{listed}"
        rows.append(
            {
                "pid": str(number),
                "question": asked.splitlines()[0].removeprefix("Question: "),
                "image": f"images/{(number + 1) // 2}.jpg",
                "decoded_image": draw(f"x={(number + 1) // 2}", COLOURS[(number - 1) // 2]),
                "choices": choices,
                "unit": None,
                "precision": precision,
                "answer": answer,
                "question_type": "multi_choice" if choices else "free_form",
                "answer_type": kind,
                "metadata": {
                    "category": "math-targeted-vqa",
                    "context": "synthetic scene",
                    "grade": "elementary school",
                    "img_height": SIZE[1],
                    "img_width": SIZE[0],
                    "language": "english",
                    "skills": ["arithmetic reasoning"],
                    "source": "drawn",
                    "split": "testmini",
                    "task": tasks[number % 2],
                },
                "query": f"Hint: Please answer the question.\n{asked}",
            }
        )
    return rows


def ocrbench_rows() -> Rows:
    """One of each of eight kinds of questions."""
    kinds = (
        ("IIIT5K", "Regular Text Recognition", ["STOP"]),
        ("CUTE80", "Irregular Text Recognition", ["bend"]),
        ("WordArt", "Artistic Text Recognition", ["art"]),
        ("IAM", "Handwriting Recognition", ["hand"]),
        ("ORAND", "Digit String Recognition", ["4711"]),
        ("STVQA", "Scene Text-centric VQA", ["exit", "Exit 3"]),
        ("FUNSD", "Key Information Extraction", ["12 May"]),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x + y = 2"]),
    )
    return [
        {
            "dataset": dataset,
            "question": f"what is written in picture {number}?",
            "question_type": kind,
            "answer": answers,
            "image": draw(answers[0]),
        }
        for number, (dataset, kind, answers) in enumerate(kinds)
    ]


def ai2d_rows(*, masked: bool) -> Rows:
    """Three choices each, the answer by its number; masked: letters stand where labels stood."""
    words = ("root", "stem", "leaf", "seed", "bud", "bark")
    return [
        {
            "question": f"Which label names part {number}?",
            "options": [words[number], words[number - 1], "none of them"],
            "answer": str(number % 2),
            "image": draw("ABC"[number % 3] if masked else words[number - number % 2]),
        }
        for number in range(6)
    ]


def chartqa_rows() -> Rows:
    """Numbers, a percentage, a year, words; every second question by people."""
    answers = ("14", "0.57", "2019", "Yes", "12%", "blue")
    return [
        {
            "type": ("human_test", "augmented_test")[number % 2],
            "question": f"What is the value of bar {number}?",
            "answer": answer,
            "image": draw(answer, COLOURS[number]),
        }
        for number, answer in enumerate(answers)
    ]


def docvqa_rows(split: str) -> Rows:
    """Two questions a page, two pages a document; the answers of `test` are secret."""
    words = ("ITC Limited", "1958", "March 3", "Dr. Noble", "42", "New York")
    return [
        {
            "questionId": str(49000 + number),
            "question": f"What does line {number} say?",
            "question_types": ["handwritten", "form"] if split == "validation" else None,
            "image": draw(words[number - number % 2]),
            "docId": 14000 + number // 2,
            "ucsf_document_id": f"pybv02{number // 3}",
            "ucsf_document_page_no": str(number // 2),
            "answers": [word, word.upper()] if split == "validation" else None,
            "data_split": "val" if split == "validation" else "test",
        }
        for number, word in enumerate(words)
    ]


def textvqa_rows() -> Rows:
    """Ten annotators; eight agree. Two questions an image."""
    words = ("nokia", "copenhagen", "22", "yes", "budweiser", "july 4")
    return [
        {
            "image_id": f"003a8ae2ef43b9{number // 2}",
            "question_id": 34600 + number,
            "question": f"what does word {number} of the Sign say?",
            "question_tokens": ["what", "does", "word", str(number), "say"],
            "image": draw(words[number - number % 2]),
            "image_width": SIZE[0],
            "image_height": SIZE[1],
            "flickr_original_url": "https://example.invalid/a.jpg",
            "flickr_300k_url": "https://example.invalid/b.jpg",
            "answers": [word] * 8 + ["unanswerable", "sign"],
            "image_classes": ["Sign"],
            "set_name": "val",
            "ocr_tokens": [word],
        }
        for number, word in enumerate(words)
    ]


def realworldqa_rows() -> Rows:
    """Letters with the choices in the question, words, numbers."""
    letters = (
        "Which way?\n\nA. Left\nB. Right\nC. Straight\n"
        "Please answer directly with only the letter of the correct option and nothing else."
    )
    words = "How many cars?\nPlease answer directly with a single word or number."
    return [
        {
            "image": draw(f"road {number}"),
            "question": letters if number % 2 else words,
            "answer": answer,
        }
        for number, answer in enumerate(("2", "B", "Downhill", "C", "0", "A"))
    ]


def vqav2_rows() -> Rows:
    """Ten annotators a question, eight of whom agree; two questions an image."""
    kinds = (
        ("yes", "yes/no"),
        ("2", "number"),
        ("red", "other"),
        ("no", "yes/no"),
        ("10", "number"),
        ("bar", "other"),
    )
    return [
        {
            "question_type": "what is the",
            "multiple_choice_answer": answer,
            "answers": [
                {
                    "answer": answer if annotator <= 8 else "maybe",
                    "answer_confidence": "yes",
                    "answer_id": annotator,
                }
                for annotator in range(1, 11)
            ],
            "image_id": 262148 + number // 2,
            "answer_type": kind,
            "question_id": 262148000 + number,
            "question": f"What is thing {number}?",
            "image": draw(f"thing {number // 2}", COLOURS[number // 2]),
        }
        for number, (answer, kind) in enumerate(kinds)
    ]


def coco_rows() -> Rows:
    """Five sentences an image."""
    rows = []
    for number, colour in enumerate(COLOURS):
        sentences = [
            f"A {colour} bar lies under the word {number}.",
            f"There is a {colour} bar on white paper",
            f"a bar that is {colour}, below some black text ",
            f"One {colour} bar and one number.",
            f"The picture shows a {colour} rectangle.",
        ]
        rows.append(
            {
                "image": draw(str(number), colour),
                "filepath": "val2014",
                "sentids": list(range(5 * number, 5 * number + 5)),
                "filename": f"COCO_val2014_{391895 + number:012d}.jpg",
                "imgid": number,
                "split": "test",
                "sentences_tokens": [text.lower().strip(" .").split() for text in sentences],
                "sentences_raw": sentences,
                "sentences_sentid": list(range(5 * number, 5 * number + 5)),
                "cocoid": 391895 + number,
                "id": number,
            }
        )
    return rows


def cord_rows() -> Rows:
    """Receipts of one to six lines: `ground_truth` is JSON with `gt_parse` and much else."""
    rows = []
    for number in range(6):
        menu = [
            {"nm": f"TEA {line}", "cnt": str(line + 1), "price": f"{3 + line},000"}
            for line in range(number + 1)
        ]
        parse = {"menu": menu, "total": {"total_price": f"{number + 4},000"}}
        truth = {
            "gt_parse": parse,
            "meta": {"version": "2.0", "image_id": number},
            "valid_line": [],
        }
        rows.append({"image": draw(f"TEA {number}"), "ground_truth": json.dumps(truth)})
    return rows


def rdr_rows() -> Rows:
    """One sentence a picture."""
    return [
        {"image": draw(f"item {n}", colour), "text": f"a {colour} bar, item number {n}"}
        for n, colour in enumerate(COLOURS)
    ]


def vqa_rad_rows() -> Rows:
    """Open and closed questions; the last is an exact copy of the first, as the data set has."""
    words = ("yes", "no", "left lung", "Yes", "chest x-ray", "yes")
    return [
        {
            "image": draw(f"scan {number % 5}"),
            "question": f"what is finding {number % 5}?",
            "answer": answer,
        }
        for number, answer in enumerate(words)
    ]


def slake_rows() -> Rows:
    """English and Chinese questions, open and closed; images are files beside."""
    words = (
        ("en", "OPEN", "Organ", "Liver"),
        ("en", "CLOSED", "Abnormality", "No"),
        ("zh", "CLOSED", "Abnormality", "没有"),
        ("en", "CLOSED", "Modality", "CT"),
        ("zh", "OPEN", "Organ", "肝脏"),
        ("en", "OPEN", "Position", "Upper Left, Lower Right"),
        ("en", "CLOSED", "KG", "Yes"),
    )
    return [
        {
            "img_id": 100 + number // 2,
            "img_name": f"xmlab{100 + number // 2}/source.png",
            "question": f"What is part {number}?" if language == "en" else f"第{number}部分",
            "answer": answer,
            "q_lang": language,
            "location": "Abdomen",
            "modality": "CT",
            "answer_type": kind,
            "base_type": "vqa",
            "content_type": content,
            "triple": ["vhead", "_", "_"],
            "qid": 11000 + number,
        }
        for number, (language, kind, content, answer) in enumerate(words)
    ]
