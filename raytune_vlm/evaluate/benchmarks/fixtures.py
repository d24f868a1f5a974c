"""Makes `fixture_data/`: for each benchmark a few drawn rows in the exact schema of its data set.

    python -m raytune_vlm.evaluate.benchmarks.fixtures [FOLDER]

They show that a benchmark is read, asked and scored as it should be; their scores say nothing of a
model. The same program makes the same rows; Parquet's and PNG's bytes depend on the libraries.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_vlm.evaluate.benchmarks import fixture_rows as rows

FOLDER = Path(__file__).parent / "fixture_data"


_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


MMMU_SCHEMA = _schema(
    id=_TEXT,
    question=_TEXT,
    options=_TEXT,
    explanation=_TEXT,
    **{f"image_{number}": _IMAGE for number in range(1, 8)},
    img_type=_TEXT,
    answer=_TEXT,
    topic_difficulty=_TEXT,
    question_type=_TEXT,
    subfield=_TEXT,
)
"""MMMU/MMMU: choices and kinds of images are texts of Python lists."""


MATHVISTA_SCHEMA = _schema(
    pid=_TEXT,
    question=_TEXT,
    image=_TEXT,
    decoded_image=_IMAGE,
    choices=_TEXTS,
    unit=_TEXT,
    precision=pa.float64(),
    answer=_TEXT,
    question_type=_TEXT,
    answer_type=_TEXT,
    metadata=pa.struct(
        {
            "category": _TEXT,
            "context": _TEXT,
            "grade": _TEXT,
            "img_height": pa.int64(),
            "img_width": pa.int64(),
            "language": _TEXT,
            "skills": _TEXTS,
            "source": _TEXT,
            "split": _TEXT,
            "task": _TEXT,
        }
    ),
    query=_TEXT,
)
"""AI4Math/MathVista: `image` is a path, the picture itself is `decoded_image`."""


_AI2D_SCHEMA = _schema(question=_TEXT, options=_TEXTS, answer=_TEXT, image=_IMAGE)
_DOCVQA_SCHEMA = _schema(
    questionId=_TEXT,
    question=_TEXT,
    question_types=_TEXTS,
    image=_IMAGE,
    docId=pa.int64(),
    ucsf_document_id=_TEXT,
    ucsf_document_page_no=_TEXT,
    answers=_TEXTS,
    data_split=_TEXT,
)
_VQAV2_ANSWER = pa.struct({"answer": _TEXT, "answer_confidence": _TEXT, "answer_id": pa.int64()})

TABLES: dict[str, tuple[pa.Schema, rows.Rows]] = {
    "mmmu/validation": (MMMU_SCHEMA, rows.mmmu_rows("validation")),
    "mmmu/test": (MMMU_SCHEMA, rows.mmmu_rows("test")),
    "mathvista/testmini": (MATHVISTA_SCHEMA, rows.mathvista_rows()),
    "ocrbench/test": (
        _schema(dataset=_TEXT, question=_TEXT, question_type=_TEXT, answer=_TEXTS, image=_IMAGE),
        rows.ocrbench_rows(),
    ),
    "ai2d/test": (_AI2D_SCHEMA, rows.ai2d_rows(masked=True)),
    "ai2d_no_mask/test": (_AI2D_SCHEMA, rows.ai2d_rows(masked=False)),
    "chartqa/test": (
        _schema(type=_TEXT, question=_TEXT, answer=_TEXT, image=_IMAGE),
        rows.chartqa_rows(),
    ),
    "docvqa/validation": (_DOCVQA_SCHEMA, rows.docvqa_rows("validation")),
    "docvqa/test": (_DOCVQA_SCHEMA, rows.docvqa_rows("test")),
    "textvqa/validation": (
        _schema(
            image_id=_TEXT,
            question_id=pa.int32(),
            question=_TEXT,
            question_tokens=_TEXTS,
            image=_IMAGE,
            image_width=pa.int32(),
            image_height=pa.int32(),
            flickr_original_url=_TEXT,
            flickr_300k_url=_TEXT,
            answers=_TEXTS,
            image_classes=_TEXTS,
            set_name=_TEXT,
            ocr_tokens=_TEXTS,
        ),
        rows.textvqa_rows(),
    ),
    "realworldqa/test": (
        _schema(image=_IMAGE, question=_TEXT, answer=_TEXT),
        rows.realworldqa_rows(),
    ),
    "vqav2/validation": (
        _schema(
            question_type=_TEXT,
            multiple_choice_answer=_TEXT,
            answers=pa.list_(_VQAV2_ANSWER),
            image_id=pa.int64(),
            answer_type=_TEXT,
            question_id=pa.int64(),
            question=_TEXT,
            image=_IMAGE,
        ),
        rows.vqav2_rows(),
    ),
    "coco_karpathy/test": (
        _schema(
            image=_IMAGE,
            filepath=_TEXT,
            sentids=pa.list_(pa.int32()),
            filename=_TEXT,
            imgid=pa.int32(),
            split=_TEXT,
            sentences_tokens=pa.list_(_TEXTS),
            sentences_raw=_TEXTS,
            sentences_sentid=pa.list_(pa.int32()),
            cocoid=pa.int32(),
            id=pa.int64(),
        ),
        rows.coco_rows(),
    ),
    "cord/test": (_schema(image=_IMAGE, ground_truth=_TEXT), rows.cord_rows()),
    "rdr/train": (_schema(image=_IMAGE, text=_TEXT), rows.rdr_rows()),
    "vqa_rad/test": (_schema(image=_IMAGE, question=_TEXT, answer=_TEXT), rows.vqa_rad_rows()),
    "slake/test": (
        _schema(
            img_id=pa.int64(),
            img_name=_TEXT,
            question=_TEXT,
            answer=_TEXT,
            q_lang=_TEXT,
            location=_TEXT,
            modality=_TEXT,
            answer_type=_TEXT,
            base_type=_TEXT,
            content_type=_TEXT,
            triple=_TEXTS,
            qid=pa.int64(),
        ),
        rows.slake_rows(),
    ),
}
"""Folder and split -> schema and rows."""


def write_fixtures(folder: Path) -> list[Path]:
    """Write every fixture as `<folder>/<benchmark>/<split>-00000-of-00001.parquet`."""
    files = []
    for name, (schema, entries) in TABLES.items():
        file = folder / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(entries, schema=schema), file)
        files.append(file)
    for number in range(100, 104):
        file = folder / f"slake/imgs/xmlab{number}/source.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rows.draw(f"scan {number}")["bytes"])
    return files


if __name__ == "__main__":
    write_fixtures(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
