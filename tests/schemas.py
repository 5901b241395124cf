"""What the hub's data sets look like, so that a preset of full scale can be tried without the hub.

A preset names data sets, configurations, splits and columns. A wrong name is found by the reader,
on a GPU that costs money, unless a test finds it. `SCHEMAS` records what the hub has (from the
data sets' cards): names, configurations, splits with their true numbers of rows, columns and
types. `recorded` puts tiny stand-ins of exactly these schemas in the hub's place. They refuse what
the hub refuses: an unknown name, configuration, split or column.

In a test of a lesson, with the fixture of the same name (see `tests/conftest.py`):

    def test_full_builds_its_data(recorded, tmp_path):
        folder = recorded.write("LLM-Adapters", tmp_path)  # files that a preset expects on disk
        cfg = FULL.replace(tasks_root=str(folder / "dataset"), n_train=20)
        train, test = text_task(cfg, seed=0)  # calls `data.load` as on the hub
        assert recorded.asked == ["openai/gsm8k@main#train", "openai/gsm8k@main#test"]
        assert schemas.rows("openai/gsm8k@main#train") >= FULL.n_train  # of the hub, not of here

A data set that is not recorded raises `AssertionError`: add it here, from its card.
"""
from __future__ import annotations

import datetime
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WORDS = """the a of to and in is that it was for on are as with his they at be this from have or by
one had not but what all were when we there can an your which their said if do will each about how
up out them then she many some so these would other into has more her two like him see time could
no make than first been its who now people my made over did down only way find use may water long
little very after word called just where most know""".split()


def prose(i: int, words: int) -> str:
    "Text number `i`: that many words, the same each time, ending with a full stop."
    rng = np.random.default_rng(zlib.crc32(f"{i}-{words}".encode()))
    text = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), words))
    return text[0].upper() + text[1:] + "."


@dataclass(frozen=True)
class Schema:
    "One configuration of a data set on the hub."

    splits: dict[str, int]  # split -> number of rows that the hub has
    row: Callable[[int], dict[str, Any]]  # number -> a row with the columns and types of the hub
    script: bool = False  # a program: refused, but for revision="refs/convert/parquet"
    features: Callable[[], dict] = field(default=dict)  # types that rows alone do not tell


def _glue(columns: str, labels: float) -> Callable[[int], dict[str, Any]]:
    "A row of GLUE: texts, a class (of STS-B a score), a number."
    def row(i: int) -> dict[str, Any]:
        texts = {name: prose(i + k, 9) for k, name in enumerate(columns.split())}
        return {**texts, "label": i * 0.7 % labels if isinstance(labels, float) else i % labels,
                "idx": i}
    return row


def _chat(i: int, who: str, what: str, roles: tuple[str, str]) -> list[dict[str, str]]:
    "Four turns."
    return [{who: roles[t % 2], what: prose(10 * i + t, 12)} for t in range(4)]


def _series(columns: tuple[str, ...], statics: dict[str, Any] | None = None, minutes: int = 60):
    "One whole series of 1,500 steps per row."
    def row(i: int) -> dict[str, Any]:
        rng, n = np.random.default_rng(i), 1500
        start = datetime.datetime(2015, 1, 1)
        wave = 5 + np.sin(np.arange(n) * 2 * np.pi / 24)
        times = [start + datetime.timedelta(minutes=minutes * k) for k in range(n)]
        values = {c: (wave + 0.3 * rng.normal(size=n)).tolist() for c in columns}
        return {"id": f"T{i:06d}", "timestamp": times, **values, **(statics or {})}

    return row


def _image(i: int) -> dict[str, Any]:
    from datasets import Image

    pixels = np.random.default_rng(i).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    return {"image": Image().encode_example(pixels), "label": i * 37 % 1000}


def _image_features() -> dict[str, Any]:
    from datasets import ClassLabel, Image

    return {"image": Image(), "label": ClassLabel(num_classes=1000)}


def _pictures(n: int) -> Schema:
    "Images alone."
    def features() -> dict[str, Any]:
        return {"image": _image_features()["image"]}

    return Schema({"train": n}, lambda i: {"image": _image(i)["image"]}, features=features)


def _photos(sizes: dict[str, int], classes: int, image: str = "image", label: str = "label",
            other: tuple[str, ...] = ()) -> Schema:
    "Photographs in classes, in the columns of the data set."
    def row(i: int) -> dict[str, Any]:
        made = _image(i)
        return {image: made["image"], label: i * 37 % classes, **dict.fromkeys(other, 0)}

    def features() -> dict[str, Any]:
        from datasets import ClassLabel, Image

        return {image: Image(), label: ClassLabel(num_classes=classes)}

    return Schema(sizes, row, features=features)


def _room(i: int) -> dict[str, Any]:
    "A room of NYUv2: classes, depth, normals (on the hub 288 x 384 places; here fewer)."
    rng = np.random.default_rng(i)
    normal = rng.normal(size=(3, 32, 48))
    return {"image": rng.random((3, 32, 48)).tolist(),
            "segmentation": rng.integers(-1, 13, (32, 48)).tolist(),
            "depth": (rng.random((1, 32, 48)) * 5).tolist(),
            "normal": (normal / np.linalg.norm(normal, axis=0)).tolist(),
            "noise": rng.random((1, 32, 48)).tolist()}


def _letter_features() -> dict[str, Any]:
    from datasets import ClassLabel

    return {"answer": ClassLabel(names=["A", "B", "C", "D"])}


def _trivia(i: int) -> dict[str, Any]:
    aliases = [prose(i, 1)[:-1], prose(i + 1, 2)[:-1]]
    answer = {"aliases": aliases, "normalized_aliases": [a.lower() for a in aliases],
              "matched_wiki_entity_name": "", "normalized_matched_wiki_entity_name": "",
              "normalized_value": aliases[0].lower(), "type": "WikipediaEntity",
              "value": aliases[0]}
    return {"question": prose(i, 12), "question_id": f"tc_{i}", "question_source": "",
            "answer": answer}


def _arc(i: int) -> dict[str, Any]:
    # a few questions have three options, or numbers instead of letters
    label = (list("ABCD"), list("ABC"), list("1234"))[0 if i % 7 else i // 7 % 3]
    options = {"text": [prose(i + k, 3) for k in range(len(label))], "label": label}
    return {"id": f"Mercury_{i}", "question": prose(i, 15), "choices": options,
            "answerKey": label[i % len(label)]}


def _text(words: int, column: str = "text") -> Callable[[int], dict[str, Any]]:
    # WikiText has empty rows and headings between its paragraphs
    return lambda i: {column: prose(i, words)}


def _wikitext(i: int) -> dict[str, Any]:
    return {"text": ("", f" = Heading {i} = \n", f" {prose(i, 180)} \n")[i % 3]}


_WIKITEXT = {"test": 4_358, "validation": 3_760}
_GSM8K = {"train": 7_473, "test": 1_319}
SCHEMAS: dict[str, Schema] = {  # "id" or "id@configuration"
    # running text
    "Salesforce/wikitext@wikitext-2-raw-v1": Schema({**_WIKITEXT, "train": 36_718}, _wikitext),
    "Salesforce/wikitext@wikitext-103-raw-v1": Schema(
        {**_WIKITEXT, "train": 1_801_350}, _wikitext),
    "DKYoon/SlimPajama-6B": Schema(
        {"train": 5_489_000, "validation": 9_347, "test": 9_346},
        lambda i: {"text": prose(i, 200), "meta": {"redpajama_set_name": "RedPajamaC4"},
                   "__index_level_0__": i}),
    "sam2ai/openwebtext-10k": Schema({"train": 10_000}, _text(250)),
    "stas/openwebtext-10k": Schema({"train": 10_000}, _text(250), script=True),
    "ptb-text-only/ptb_text_only": Schema(
        {"train": 42_068, "test": 3_761, "validation": 3_370}, _text(21, "sentence"), script=True),
    # instructions
    "meta-math/MetaMathQA": Schema(
        {"train": 395_000},
        lambda i: {"type": "GSM_Rephrased", "query": prose(i, 45), "original_question":
                   prose(i, 40), "response": f"{prose(i, 60)}\n#### {i}\nThe answer is: {i}"}),
    "m-a-p/CodeFeedback-Filtered-Instruction": Schema(
        {"train": 156_526},
        lambda i: {"query": prose(i, 40), "answer": prose(i + 1, 80), "resource": "evolinstruct",
                   "lang": "python"}),
    "fxmeng/WizardLM_evol_instruct_V2_143k": Schema(
        {"train": 143_000},
        lambda i: {"conversation_id": i, "category": "general", "conversation": [
            {"human": prose(i, 30), "assistant": prose(i + 1, 60)}], "dataset": "evol_instruct"}),
    "Open-Orca/OpenOrca": Schema(
        {"train": 4_233_923},
        lambda i: {"id": f"flan.{i}", "system_prompt": "" if i % 3 else "Be brief.",
                   "question": prose(i, 30), "response": prose(i + 1, 40)}),
    "teknium/OpenHermes-2.5": Schema(
        {"train": 1_001_551},
        lambda i: {"id": None, "source": "airoboros2.2", "category": "orca", "system_prompt": None,
                   "conversations": _chat(i, "from", "value", ("human", "gpt"))}),
    "databricks/databricks-dolly-15k": Schema(
        {"train": 15_011},
        lambda i: {"instruction": prose(i, 12), "context": "" if i % 2 else prose(i, 30),
                   "response": prose(i + 1, 40), "category": "closed_qa"}),
    "allenai/WildChat-1M": Schema(
        {"train": 837_989},
        lambda i: {"conversation_hash": f"{i:032x}", "model": "gpt-4-0314", "turn": 2,
                   "conversation": _chat(i, "role", "content", ("user", "assistant")),
                   "language": "English", "toxic": False, "redacted": False}),
    "lmsys/lmsys-chat-1m": Schema(
        {"train": 1_000_000},
        lambda i: {"conversation_id": f"{i:032x}", "model": "vicuna-13b", "turn": 2,
                   "conversation": _chat(i, "role", "content", ("user", "assistant")),
                   "language": "English", "redacted": False}),
    "HuggingFaceH4/ultrachat_200k": Schema(
        {"train_sft": 207_865, "test_sft": 23_110, "train_gen": 256_032, "test_gen": 28_304},
        lambda i: {"prompt": prose(i, 20), "prompt_id": f"{i:064x}",
                   "messages": _chat(i, "role", "content", ("user", "assistant"))}),
    "openbmb/UltraInteract_sft": Schema(
        {"train": 288_579},
        lambda i: {"task": "Coding", "dataset": "codecontest", "instruction": prose(i, 40),
                   "response": prose(i + 1, 60), "id": str(i), "parent_id": ""}),
    "yahma/alpaca-cleaned": Schema(
        {"train": 51_760},
        lambda i: {"output": prose(i + 1, 40), "input": "" if i % 2 else prose(i, 8),
                   "instruction": prose(i, 12)}),
    "O1-OPEN/OpenO1-SFT": Schema(
        {"train": 77_685}, lambda i: {"instruction": prose(i, 20), "output": prose(i + 1, 90)}),
    **{f"allenai/tulu-3-sft-personas-{name}": Schema(
        {"train": n}, lambda i: {"id": f"personas_{i}", "prompt": prose(10 * i, 12), "messages":
                                 _chat(i, "role", "content", ("user", "assistant"))[:2]})
       for name, n in (("math", 149_960), ("math-grade", 49_980), ("algebra", 20_000))},
    # questions
    "openai/gsm8k@main": Schema(
        _GSM8K, lambda i: {"question": prose(i, 45), "answer": f"{prose(i + 1, 50)}\n#### {i}"}),
    "openai/gsm8k@socratic": Schema(
        _GSM8K, lambda i: {"question": prose(i, 45), "answer": f"{prose(i + 1, 50)}\n#### {i}"}),
    "google-research-datasets/nq_open": Schema(
        {"train": 87_925, "validation": 3_610},
        lambda i: {"question": prose(i, 9)[:-1].lower(),
                   "answer": [prose(i, 2)[:-1]] * (1 + i % 2)}),
    "mandarjoshi/trivia_qa@rc.nocontext": Schema(
        {"train": 138_384, "validation": 17_944, "test": 17_210}, _trivia),
    "stanfordnlp/web_questions": Schema(
        {"train": 3_778, "test": 2_032},
        lambda i: {"url": "http://www.freebase.com/view/en/x", "question": prose(i, 8),
                   "answers": [prose(i, 2)[:-1]] * (1 + i % 3)}),
    "nyu-mll/glue@cola": Schema(
        {"train": 8_551, "validation": 1_043, "test": 1_063}, _glue("sentence", 2)),
    "nyu-mll/glue@sst2": Schema(
        {"train": 67_349, "validation": 872, "test": 1_821}, _glue("sentence", 2)),
    "nyu-mll/glue@mrpc": Schema(
        {"train": 3_668, "validation": 408, "test": 1_725}, _glue("sentence1 sentence2", 2)),
    "nyu-mll/glue@rte": Schema(
        {"train": 2_490, "validation": 277, "test": 3_000}, _glue("sentence1 sentence2", 2)),
    "nyu-mll/glue@stsb": Schema(
        {"train": 5_749, "validation": 1_500, "test": 1_379}, _glue("sentence1 sentence2", 5.0)),
    "nyu-mll/glue@qqp": Schema(
        {"train": 363_846, "validation": 40_430, "test": 390_965}, _glue("question1 question2", 2)),
    "nyu-mll/glue@qnli": Schema(
        {"train": 104_743, "validation": 5_463, "test": 5_463}, _glue("question sentence", 2)),
    "nyu-mll/glue@mnli": Schema(
        {"train": 392_702, "validation_matched": 9_815, "validation_mismatched": 9_832,
         "test_matched": 9_796, "test_mismatched": 9_847}, _glue("premise hypothesis", 3)),
    "EdinburghNLP/xsum": Schema(
        {"train": 204_045, "validation": 11_332, "test": 11_334},
        lambda i: {"document": prose(i, 40), "summary": prose(i + 1, 12), "id": str(i)},
        script=True),
    "wmt/wmt16@ro-en": Schema(
        {"train": 610_320, "validation": 1_999, "test": 1_999},
        lambda i: {"translation": {"ro": prose(i, 12), "en": prose(i + 1, 12)}}),
    "allenai/ai2_arc@ARC-Easy": Schema({"train": 2_251, "test": 2_376, "validation": 570}, _arc),
    "allenai/ai2_arc@ARC-Challenge": Schema(
        {"train": 1_119, "test": 1_172, "validation": 299}, _arc),
    "cais/mmlu@all": Schema(
        {"test": 14_042, "validation": 1_531, "dev": 285, "auxiliary_train": 99_842},
        lambda i: {"question": prose(i, 20), "subject": ("abstract_algebra", "anatomy")[i // 5 % 2],
                   "choices": [prose(i + k, 3) for k in range(4)], "answer": i % 4},
        features=_letter_features),
    # images
    "ILSVRC/imagenet-1k": Schema(
        {"train": 1_281_167, "validation": 50_000, "test": 100_000}, _image,
        features=_image_features),
    "uoft-cs/cifar10": _photos({"train": 50_000, "test": 10_000}, 10, "img"),
    "uoft-cs/cifar100": _photos({"train": 50_000, "test": 10_000}, 100, "img", "fine_label",
                                ("coarse_label",)),
    "blanchon/EuroSAT_RGB": _photos({"train": 16_200, "validation": 5_400, "test": 5_400}, 10),
    "nelorth/oxford-flowers": _photos({"train": 7_169, "test": 1_020}, 102),
    "tanganke/stanford_cars": _photos({"train": 8_144, "test": 8_041}, 196),
    "tanganke/nyuv2": Schema({"train": 795, "val": 654}, _room),
    **{f"google/dreambooth@{name}": _pictures(4) for name in (  # 4 to 6 of each
        "backpack", "bear_plushie", "can", "candle", "cat", "clock", "dog", "duck_toy",
        "fancy_boot", "robot_toy", "teapot", "vase")},
    "tanganke/dtd": _photos({"train": 3_760, "test": 1_880}, 47),
    "tanganke/gtsrb": _photos({"train": 26_640, "test": 12_630}, 43),
    "tanganke/resisc45": _photos({"train": 18_900, "test": 6_300}, 45),
    "tanganke/sun397": _photos({"train": 19_850, "test": 19_850}, 397),
    "ylecun/mnist": _photos({"train": 60_000, "test": 10_000}, 10),
    "ufldl-stanford/svhn@cropped_digits": _photos(
        {"train": 73_257, "test": 26_032, "extra": 531_131}, 10),
    # series: one per row; the name of the column of values differs
    **{f"autogluon/chronos_datasets@{name}": Schema({"train": n}, row) for name, n, row in (
        ("monash_australian_electricity", 5, _series(("target",), minutes=30)),
        ("monash_kdd_cup_2018", 270, _series(("target",), {
            "city": "Beijing", "station": "aotizhongxin_aq", "measurement": "PM2.5"})),
        ("monash_london_smart_meters", 5_560, _series(("target",), minutes=30)),
        ("monash_saugeenday", 1, _series(("T1",), minutes=1440)),
        ("monash_weather", 3_010, _series(("target",), {"subset": "rain"}, minutes=1440)),
        ("solar", 5_166, _series(("power_mw",), {"latitude": 33.0, "longitude": -86.0,
                                                 "capacity_mw": 5.0, "subset": "al-pv-2006"}, 5)),
        ("solar_1h", 5_166, _series(("power_mw",), {"latitude": 33.0, "longitude": -86.0,
                                                    "capacity_mw": 5.0, "subset": "al-pv-2006"})),
        ("wind_farms_hourly", 337, _series(("target",))),
    )},
}
MODELS = {  # base models that presets name
    "smollm2", "minilm", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "Qwen/Qwen2.5-0.5B",
    "EleutherAI/gpt-neo-2.7B", "distilbert/distilgpt2", "yahma/llama-7b-hf",
    "FacebookAI/roberta-base", "openai/clip-vit-base-patch32", "google/vit-base-patch16-224",
    "google/vit-base-patch16-224-in21k", "FacebookAI/roberta-large", "HuggingFaceTB/SmolLM2-135M",
    "FacebookAI/xlm-roberta-base", "microsoft/deberta-v3-base", "huggyllama/llama-7b",
    *(f"timdettmers/qlora-{name}-7b" for name in (
        "alpaca", "chip2", "longform", "oasst1", "self-instruct", "hh-rlhf", "flan",
        "unnatural-instructions", "flan-v2")),
    "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", "allenai/OLMo-2-1124-7B",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "microsoft/swin-tiny-patch4-window7-224", "meta-llama/Llama-2-13b-hf", "facebook/bart-large",
    "facebook/mbart-large-cc25",
    "microsoft/resnet-18", "microsoft/resnet-50", "microsoft/resnet-101",
    "timm/efficientnet_b4.ra2_in1k",
    "emilyalsentzer/Bio_ClinicalBERT", "cambridgeltl/SapBERT-from-PubMedBERT-fulltext-mean-token",
}


def rows(
    source: str,  # "id#split" or "id@configuration#split"
) -> int:
    "How many rows the hub has."
    name, _, split = source.partition("#")
    return SCHEMAS[name].splits[split]


def _schema(path: str, config: str | None, revision: str | None) -> Schema:
    "The schema, or the error of `datasets` for what is not there."
    known = {k.partition("@")[2]: s for k, s in SCHEMAS.items() if k.partition("@")[0] == path}
    if not known:
        raise AssertionError(f"{path} is not recorded: add it to tests/schemas.py, from its card")
    if "" in known and config in (None, "", "default"):
        found = known[""]
    elif not config:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: "
                         f"{sorted(known)}")
    elif config not in known:
        raise ValueError(f"BuilderConfig '{config}' not found. Available: {sorted(known)}")
    else:
        found = known[config]
    if found.script and revision != "refs/convert/parquet":
        file = path.split("/")[-1] + ".py"
        raise RuntimeError(f"Dataset scripts are no longer supported, but found {file}")
    return found


def _piece(schema: Schema, split: str, most: int) -> Any:
    "At most `most` rows of a split; what it says is checked against the true number of rows."
    from datasets import Dataset, Features, ReadInstruction

    name = split.partition("[")[0]
    if "+" not in split and name not in schema.splits:
        raise ValueError(f'Unknown split "{name}". Should be one of {list(schema.splits)}.')
    cuts = ReadInstruction.from_spec(split).to_absolute(schema.splits)
    numbers: list[int] = []
    for cut in cuts:
        first = cut.from_ or 0
        last = schema.splits[cut.splitname] if cut.to is None else cut.to
        numbers += range(first, min(last, first + most))
    offset = 1000 * list(schema.splits).index(cuts[0].splitname)  # no row is in two splits
    made = [schema.row(offset + n) for n in numbers]
    more = schema.features()
    features = Features({**Dataset.from_list(made).features, **more}) if more else None
    return Dataset.from_list(made, features=features)


@dataclass
class Recorded:
    "The stand-ins, and what was asked of them."

    most: int = 40  # rows per split, at most
    asked: list[str] = field(default_factory=list)  # "id@configuration#split", in order

    def load_dataset(self, path, name=None, split=None, revision=None, **options) -> Any:
        "`datasets.load_dataset` for the recorded sets."
        from datasets import DatasetDict

        schema = _schema(path, name, revision)
        self.asked.append(path + (f"@{name}" if name else "") + (f"#{split}" if split else ""))
        if split is not None:
            return _piece(schema, str(split), self.most)
        return DatasetDict({s: _piece(schema, s, self.most) for s in schema.splits})

    def write(self, name: str, folder: Path) -> Path:
        """Files that a preset expects on disk, as their authors publish them.

        "ETTh1.csv" (any ETT name): 17,420 hours, seven channels. "LLM-Adapters": the folder with
        `ft-training_set/*.json` and `dataset/<task>/test.json`. "imagenetv2": a folder of images
        per class number. "imagenet": the folders `train`, `val` and `imagenet-sketch`, with images
        per WordNet id, as model soups read them.
        """
        if name.startswith("ETT"):
            return _ett(Path(folder) / name)
        makers = {"LLM-Adapters": _llm_adapters, "imagenetv2": _imagenet_v2, "imagenet": _imagenet}
        return makers[name](Path(folder) / name, self.most)


def _ett(path: Path) -> Path:
    n, channels = 17_420, ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    wave = np.sin(np.arange(n) * 2 * np.pi / 24)[:, None]
    values = wave + np.random.default_rng(0).normal(size=(n, 7))
    start = datetime.datetime(2016, 7, 1)
    lines = [f"{start + datetime.timedelta(hours=i)}," + ",".join(f"{v:.3f}" for v in row)
             for i, row in enumerate(values)]
    path.write_text("date," + ",".join(channels) + "\n" + "\n".join(lines) + "\n")
    return path


def _llm_adapters(folder: Path, most: int) -> Path:
    answers = {"boolq": "true", "piqa": "solution1", "winogrande": "option2",
               "hellaswag": "ending3"}
    commonsense = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy",
                   "ARC-Challenge", "openbookqa")
    arithmetic = ("AQuA", "mawps", "SVAMP", "gsm8k", "MultiArith", "AddSub", "SingleEq")

    def row(i: int, answer: Any) -> dict[str, Any]:
        return {"instruction": prose(i, 30), "input": "", "answer": answer,
                "output": f"the correct answer is {answer}"}

    sets = {f"dataset/{t}/test.json": [row(i, answers.get(t, "answer1")) for i in range(6)]
            for t in commonsense}
    sets |= {f"dataset/{t}/test.json": [row(i, "A" if t == "AQuA" else float(i)) for i in range(6)]
             for t in arithmetic}
    sets["ft-training_set/commonsense_170k.json"] = [row(i, "true") for i in range(5 * most)]
    sets["ft-training_set/math_10k.json"] = [row(i, str(i)) for i in range(5 * most)]
    for name, content in sets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def _imagenet_v2(folder: Path, most: int) -> Path:
    for i in range(most):
        place = folder / str(i * 37 % 1000)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(_image(i)["image"]["bytes"])
    return folder


def _imagenet(folder: Path, most: int) -> Path:
    for part in ("train", "val", "imagenet-sketch"):
        for i in range(most):
            place = folder / part / ("n01440764", "n01443537", "n01484850")[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(_image(i)["image"]["bytes"])
    return folder


def recorded(
    monkeypatch: Any,  # pytest's
    most: int = 40,  # rows per split, at most
) -> Recorded:
    """Put the recorded data sets in the hub's place for `adaptlab.data.load`.

    Bundled data, files and folders are read as always. See the head of this file.
    """
    import datasets

    from adaptlab import data

    found, real = Recorded(most), datasets.load_dataset
    local = {"csv", "json", "parquet", "text", "imagefolder", "arrow"}

    def load_dataset(path: str, *args: Any, **options: Any) -> Any:
        if path in local or Path(path).exists():
            return real(path, *args, **options)
        return found.load_dataset(path, *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "hub_problem", lambda: "")
    return found
