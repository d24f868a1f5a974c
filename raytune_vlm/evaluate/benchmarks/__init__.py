"""The table of benchmarks, and finding one by name.

To add one: an entry here; its name in `config.evaluation.BENCHMARK_NAMES`; a fixture in
`fixtures.py` (run it); a row in `docs/benchmarks.md`. `tests/test_benchmarks.py` then holds it
against its contract. No `revision` is pinned: commits of the hub's data sets are noted with the
scores when they are read.

Where a prompt is lmms-eval's, its file is in `lmms_eval/tasks/` of EvolvingLMMs-Lab/lmms-eval.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raytune_vlm.config.benchmark import Benchmark, Columns
from raytune_vlm.config.evaluation import BENCHMARK_NAMES
from raytune_vlm.config.yaml_lines import read_yaml
from raytune_vlm.errors import ConfigError, did_you_mean

SHORT = "{question}\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 and after it lmms-eval ask for short answers."""

LETTER = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."

_MMMU_COLUMNS = Columns(
    images=tuple(f"image_{number}" for number in range(1, 8)),
    question="question",
    answers="answer",
    choices="options",
    id="id",
)
_MMMU_PROMPT = (
    "{question}\n\n{choices}\n\n\nAnswer with the option's letter from the given choices directly."
)
_MMMU_SOURCE = "MMMU-Benchmark/MMMU mmmu/configs/llava1.5.yaml, mmmu/utils/data_utils.py"
_DOCVQA_COLUMNS = Columns(
    question="question", answers="answers", id="questionId", group="ucsf_document_id"
)
_MEDICAL = (
    "medical_open@llava_med_recall",
    "medical_open@llava_med_f1",
    "medical_closed@llava_med",
    "medical_closed@exact",
)
_CAPTION = ("cider@coco", "bleu4@coco", "rouge_l@coco")

BENCHMARKS: dict[str, Benchmark] = {
    "mmmu": Benchmark(
        about="college questions of 30 subjects, several images among the words; validation",
        path="hf://datasets/MMMU/MMMU/*/validation-*.parquet",
        dataset_split="validation",
        num_samples=900,
        function="mmmu",
        columns=_MMMU_COLUMNS,
        prompt=_MMMU_PROMPT,
        prompt_source=_MMMU_SOURCE,
        choice_form="({letter}) {text}",
        metrics=("mmmu@official",),
        max_new_tokens=128,
        submission="mmmu",
    ),
    "mmmu_test": Benchmark(
        about="the same, test: the answers are secret, a file for the server is written",
        path="hf://datasets/MMMU/MMMU/*/test-*.parquet",
        folder="mmmu",
        dataset_split="test",
        num_samples=10500,
        function="mmmu",
        columns=_MMMU_COLUMNS,
        prompt=_MMMU_PROMPT,
        prompt_source=_MMMU_SOURCE,
        choice_form="({letter}) {text}",
        max_new_tokens=128,
        submission="mmmu",
    ),
    "mathvista": Benchmark(
        about="mathematics in pictures, testmini",
        path="hf://datasets/AI4Math/MathVista",
        dataset_split="testmini",
        num_samples=1000,
        function="mathvista",
        columns=Columns(
            images=("decoded_image",),
            question="query",
            answers="answer",
            choices="choices",
            id="pid",
            group="image",
            category="metadata.task",
            type="answer_type",
            precision="precision",
        ),
        prompt="{question}",
        prompt_source="the data's own column query, lupantech/MathVista evaluation/build_query.py",
        metrics=("mathvista@rules",),
        max_new_tokens=256,
    ),
    "ocrbench": Benchmark(
        about="1,000 questions on reading; score x 1,000 is the benchmark's",
        path="hf://datasets/echo840/OCRBench",
        dataset_split="test",
        num_samples=1000,
        columns=Columns(question="question", answers="answer", category="question_type"),
        prompt="{question}",
        prompt_source="Yuliang-Liu/MultimodalOCR OCRBench/scripts/; the same as lmms-eval's",
        metrics=("ocrbench@official",),
        max_new_tokens=128,
    ),
    "ai2d": Benchmark(
        about="diagrams of school books; labels are masked by letters",
        path="hf://datasets/lmms-lab-encoder/ai2d",
        dataset_split="test",
        num_samples=3088,
        columns=Columns(question="question", answers="answer", choices="options"),
        answer_is="index",
        prompt=LETTER,
        prompt_source="lmms-eval's ai2d.yaml",
        metrics=("ai2d@lmms_eval", "choice@letter"),
        answer="choice",
        max_new_tokens=16,
    ),
    "ai2d_no_mask": Benchmark(
        about="the same with the labels to be read; its scores are other and higher",
        path="hf://datasets/Efficient-Large-Model/ai2d-no-mask",
        dataset_split="test",
        num_samples=3088,
        columns=Columns(question="question", answers="answer", choices="options"),
        answer_is="index",
        prompt=LETTER,
        prompt_source="lmms-eval's ai2d_no_mask.yaml",
        metrics=("ai2d@lmms_eval", "choice@letter"),
        answer="choice",
        max_new_tokens=16,
    ),
    "chartqa": Benchmark(
        about="charts, half of the questions by people, half made from captions",
        path="hf://datasets/lmms-lab-encoder/ChartQA",
        dataset_split="test",
        num_samples=2500,
        columns=Columns(question="question", answers="answer", category="type"),
        categories={"human_test": "human", "augmented_test": "augmented"},
        prompt="{question}\nAnswer the question with a single word.",
        prompt_source="lmms-eval's chartqa.yaml",
        metrics=("relaxed_accuracy@pix2struct",),
        max_new_tokens=16,
    ),
    "docvqa": Benchmark(
        about="scanned documents, validation",
        path="hf://datasets/lmms-lab-encoder/DocVQA/DocVQA",
        dataset_split="validation",
        num_samples=5349,
        columns=_DOCVQA_COLUMNS,
        prompt=SHORT,
        prompt_source="lmms-eval's docvqa/_default_template_docvqa_yaml",
        metrics=("anls@rrc",),
        max_new_tokens=32,
        submission="docvqa",
    ),
    "docvqa_test": Benchmark(
        about="the same, test: the answers are secret, a file for the server is written",
        path="hf://datasets/lmms-lab-encoder/DocVQA/DocVQA",
        folder="docvqa",
        dataset_split="test",
        num_samples=5188,
        columns=_DOCVQA_COLUMNS,
        prompt=SHORT,
        prompt_source="lmms-eval's docvqa/_default_template_docvqa_yaml",
        max_new_tokens=32,
        submission="docvqa",
    ),
    "textvqa": Benchmark(
        about="text in photographs, ten annotators, validation; no OCR tokens are given",
        path="hf://datasets/lmms-lab-encoder/textvqa",
        dataset_split="validation",
        num_samples=5000,
        columns=Columns(question="question", answers="answers", id="question_id", group="image_id"),
        capitalize=True,
        prompt=SHORT,
        prompt_source="lmms-eval's textvqa/_default_template_textvqa_yaml and utils.py",
        metrics=("vqa@m4c",),
        max_new_tokens=32,
    ),
    "realworldqa": Benchmark(
        about="views from vehicles and elsewhere; the choices stand in the question",
        path="hf://datasets/xai-org/RealworldQA",
        dataset_split="test",
        num_samples=765,
        columns=Columns(question="question", answers="answer"),
        prompt="{question}",
        prompt_source="the data's own questions; the same as lmms-eval's realworldqa.yaml",
        metrics=("realworldqa@lmms_eval",),
        max_new_tokens=16,
    ),
    "vqav2": Benchmark(
        about="photographs of COCO, ten annotators, validation",
        path="hf://datasets/lmms-lab-encoder/VQAv2",
        dataset_split="validation",
        num_samples=214354,
        columns=Columns(
            question="question",
            answers="answers",
            id="question_id",
            group="image_id",
            category="answer_type",
        ),
        prompt=SHORT,
        prompt_source="lmms-eval's vqav2/_default_template_vqav2_yaml",
        metrics=("vqa@official",),
        max_new_tokens=16,
    ),
    "coco_karpathy": Benchmark(
        about="captions of COCO, Karpathy's test split, five references",
        path="hf://datasets/Multimodal-Fatima/COCO_captions_test",
        dataset_split="test",
        num_samples=5000,
        columns=Columns(answers="sentences_raw", id="cocoid", group="cocoid"),
        prompt="Provide a one-sentence caption for the provided image.",
        prompt_source="lmms-eval's coco_cap/utils.py",
        metrics=_CAPTION,
        max_new_tokens=64,
    ),
    "cord": Benchmark(
        about="receipts to tags, CORD-v2 test",
        path="hf://datasets/naver-clova-ix/cord-v2",
        dataset_split="test",
        num_samples=100,
        function="cord",
        columns=Columns(answers="ground_truth"),
        prompt="Parse this document into JSON tags.",
        prompt_source="the source cord of this package (Donut has no prompt in words)",
        metrics=("nted@donut", "field_f1@donut"),
        answer="json_tags",
        max_new_tokens=768,
    ),
    "rdr": Benchmark(
        about="drawn items of a game with captions (rdr-items); it has no test split",
        path="hf://datasets/quintend/rdr-items",
        dataset_split="train",
        columns=Columns(answers="text"),
        prompt="Describe this image.",
        prompt_source="NVIDIA-NeMo/Automodel components/datasets/vlm/datasets.py",
        metrics=_CAPTION,
        max_new_tokens=128,
    ),
    "vqa_rad": Benchmark(
        about="radiology, test; closed: the answer is yes or no",
        path="hf://datasets/flaviagiammarino/vqa-rad",
        dataset_split="test",
        num_samples=451,
        function="yes_no",
        columns=Columns(question="question", answers="answer"),
        prompt=SHORT,
        prompt_source="as SLAKE's; its authors give none",
        metrics=_MEDICAL,
        max_new_tokens=32,
    ),
    "slake": Benchmark(
        about="radiology, test, the questions in English",
        path="hf://datasets/BoKelvin/SLAKE",
        dataset_split="test",
        unreadable="its images are in imgs.zip: download it, unpack that, and give the folder's "
        "parent as --data (DIR/slake/test.json, DIR/slake/imgs/)",
        num_samples=1061,
        columns=Columns(
            images=("img_name",),
            question="question",
            answers="answer",
            id="qid",
            group="img_id",
            category="content_type",
            type="answer_type",
        ),
        keep={"q_lang": "en"},
        image_folder="imgs/",
        prompt=SHORT,
        prompt_source="lmms-eval's slake/_default_template_yaml",
        metrics=_MEDICAL,
        max_new_tokens=32,
    ),
}


@dataclass(frozen=True)
class Chosen:
    """A benchmark that is asked for."""

    name: str
    """`chartqa@human`, or the stem of a user's own file."""
    entry: Benchmark
    category: str | None = None
    """Only this category of it."""
    base: Path = Path()
    """Where relative paths of a user's own benchmark start: the folder of its file."""

    @property
    def key(self) -> str:
        """The name as part of a file's path."""
        return self.name.replace("@", "-")

    @property
    def folder(self) -> str:
        """The folder under `--data`."""
        return self.entry.folder or self.name.split("@")[0]


def find_benchmark(name: str) -> Chosen:
    """A benchmark by its name, `name@category`, or the path of a YAML file of one's own.

    Raises
    ------
    ConfigError
        If there is none, with the nearest name, or the file is not a benchmark.
    """
    if name.endswith((".yaml", ".yml")):
        return _own(Path(name))
    plain, at, category = name.partition("@")
    if plain not in BENCHMARKS:
        near = did_you_mean(plain, BENCHMARK_NAMES)
        raise ConfigError(f"no benchmark {plain!r}{near}, nor a YAML file of your own")
    entry = BENCHMARKS[plain]
    if not at:
        return Chosen(plain, entry)
    known = _categories(plain)
    if category not in known:
        has = did_you_mean(category, known) or " (it has none)"
        raise ConfigError(f"benchmark {plain!r} has no category {category!r}{has}")
    return Chosen(name, entry, category)


def _categories(name: str) -> list[str]:
    from raytune_vlm.evaluate.metrics.mmmu import GROUPS

    if BENCHMARKS[name].function == "mmmu":
        return [subject for subjects in GROUPS.values() for subject in subjects]
    return list(BENCHMARKS[name].categories.values())


def find_benchmarks(names: str) -> list[Chosen]:
    """The benchmarks of a comma-separated list, `all` being every one; raises ConfigError."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if "all" in listed:
        listed = [name for each in listed for name in (BENCHMARKS if each == "all" else [each])]
    if not listed:
        raise ConfigError("--benchmarks names none")
    found = {chosen.key: chosen for chosen in map(find_benchmark, dict.fromkeys(listed))}
    return list(found.values())


def _own(file: Path) -> Chosen:
    from pydantic import ValidationError

    try:
        plain, lines = read_yaml(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise ConfigError(f"benchmark {file}: {error.strerror}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"benchmark {file}: must be a mapping of keys")
    try:
        entry = Benchmark.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        at = f"{file}:{lines[key]}" if key in lines else str(file)
        why = str(first.get("ctx", {}).get("error", first["msg"]))
        fields = Columns.model_fields if key.startswith("columns.") else Benchmark.model_fields
        near = did_you_mean(key.rpartition(".")[2], fields)
        if first["type"] == "extra_forbidden":
            why = f"unknown key{near}"
        where = f"{key}: " if key else ""
        raise ConfigError(f"benchmark {at}: {where}{why}") from None
    if file.stem in BENCHMARKS:
        raise ConfigError(f"benchmark {file}: {file.stem} is one of ours, choose another name")
    return Chosen(file.stem, entry, base=file.resolve().parent)
