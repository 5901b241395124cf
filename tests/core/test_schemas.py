"""Presets of full scale name only what the hub has; stand-ins refuse what the hub refuses."""
import dataclasses
import importlib
import importlib.util
import re

import pytest
import schemas

from adaptlab import catalog, data

# what the presets of the first nine lessons load: name, columns, and the rows that they need
NEEDED = [
    ("DKYoon/SlimPajama-6B#train", ["text"], 20_000),  # Adapt-Pruner
    ("Salesforce/wikitext@wikitext-2-raw-v1#test", ["text"], 1),
    ("Open-Orca/OpenOrca#train", ["system_prompt", "question", "response"], 1),
    ("teknium/OpenHermes-2.5#train", ["conversations"], 1),
    ("databricks/databricks-dolly-15k#train", ["instruction", "context", "response"], 1),
    ("allenai/WildChat-1M#train", ["conversation"], 1),
    ("lmsys/lmsys-chat-1m#train", ["conversation"], 1),
    ("HuggingFaceH4/ultrachat_200k#train_sft", ["messages"], 1),
    ("openbmb/UltraInteract_sft#train", ["instruction", "response"], 1),
    ("yahma/alpaca-cleaned#train", ["instruction", "input", "output"], 1),
    ("O1-OPEN/OpenO1-SFT#train", ["instruction", "output"], 1),
    ("cais/mmlu@all#dev", ["question", "choices", "answer", "subject"], 57 * 5),
    ("cais/mmlu@all#test", ["question", "choices", "answer", "subject"], 57),
    ("openai/gsm8k@main#train", ["question", "answer"], 7_000),  # DONOD
    ("openai/gsm8k@main#test", ["question", "answer"], 1_000),
    ("google-research-datasets/nq_open#validation", ["question", "answer"], 3_000),
    ("Salesforce/wikitext@wikitext-103-raw-v1#train", ["text"], 68_000),  # MEND
    ("sam2ai/openwebtext-10k#train", ["text"], 10_000),
    ("Salesforce/wikitext@wikitext-2-raw-v1#train", ["text"], 256),  # CorDA
    ("meta-math/MetaMathQA#train[:100000]", ["query", "response"], 100_000),
    ("m-a-p/CodeFeedback-Filtered-Instruction#train[:100000]", ["query", "answer"], 100_000),
    ("fxmeng/WizardLM_evol_instruct_V2_143k#train[:100000]", ["conversation"], 100_000),
    ("mandarjoshi/trivia_qa@rc.nocontext#validation", ["question", "answer"], 1_000),
    ("stanfordnlp/web_questions#test", ["question", "answers"], 1_000),
    ("allenai/ai2_arc@ARC-Easy#test", ["question", "choices", "answerKey"], 500),  # CoLa
    ("ILSVRC/imagenet-1k#validation", ["image", "label"], 50_000),  # LAME
    *((f"autogluon/chronos_datasets@{name}#train", ["timestamp", column], 1) for name, column in (
        ("monash_australian_electricity", "target"), ("monash_kdd_cup_2018", "target"),
        ("monash_london_smart_meters", "target"), ("monash_saugeenday", "T1"),
        ("monash_weather", "target"), ("solar", "power_mw"), ("wind_farms_hourly", "target"))),
]


@pytest.mark.parametrize("source, columns, n", NEEDED, ids=[x[0] for x in NEEDED])
def test_what_presets_name_is_there(recorded, source, columns, n):
    found = data.load(source, columns)
    assert found.column_names == columns and 0 < len(found) <= recorded.most
    assert schemas.rows(source.partition("[")[0]) >= n
    assert recorded.asked == [source]


def test_the_mixture_of_adapt_pruner_has_the_papers_size():
    "The paper trains on 7,714,363 conversations of nine sets."
    sets = [s for s, _, _ in NEEDED[2:11]]
    assert sum(map(schemas.rows, sets)) == 7_714_363


def test_programs_are_refused_with_a_way_out(recorded):
    for source in ("ptb-text-only/ptb_text_only#validation", "stas/openwebtext-10k#train"):
        with pytest.raises(ValueError, match="is a program.*refs/convert/parquet"):
            data.load(source)
        assert len(data.load(source, revision="refs/convert/parquet"))


def test_stand_ins_refuse_what_the_hub_refuses(recorded):
    for source, message in (
        ("openai/gsm8k#train", "Config name is missing.*main"),
        ("openai/gsm8k@mian#train", "BuilderConfig 'mian' not found"),
        ("openai/gsm8k@main#validation", "Unknown split"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(source)
    with pytest.raises(ValueError, match="has no column 'solution'; there are .*question"):
        data.load("openai/gsm8k@main#train", "solution")
    with pytest.raises(AssertionError, match="some/thing is not recorded"):
        data.load("some/thing")


def test_stand_ins_have_types_parts_and_all_splits(recorded):
    assert data.load("cais/mmlu@all#test").features["answer"].names == ["A", "B", "C", "D"]
    images, labels = data.as_tensors(data.load("ILSVRC/imagenet-1k#validation[:3]"))
    assert images.shape == (3, 3, 64, 48) and labels.max() < 1000
    both = data.load("openai/gsm8k@main")
    assert set(both) == {"train", "test"} and both["train"][0] != both["test"][0]
    first, second = (data.load(f"openai/gsm8k@main#train[{cut}]") for cut in (":50", "50:100"))
    assert not set(first["question"]) & set(second["question"])
    assert data.load("openai/gsm8k", name="main", split="test")[:] == both["test"][:]


def test_files_of_presets(recorded, tmp_path):
    table = data.load(recorded.write("ETTh1.csv", tmp_path))
    assert len(table) == 17_420 and table.column_names[-1] == "OT"
    folder = recorded.write("LLM-Adapters", tmp_path)
    for file in ("ft-training_set/math_10k.json", "dataset/boolq/test.json"):
        assert data.load(folder / file, ["instruction", "input", "output", "answer"])
    pictures = data.load(recorded.write("imagenetv2", tmp_path))
    assert data.as_tensors(pictures)[0].shape[1:] == (3, 64, 48)
    parts = recorded.write("imagenet", tmp_path)
    assert {p.name for p in parts.iterdir()} == {"train", "val", "imagenet-sketch"}


def test_bundled_data_is_real(recorded):
    assert len(data.load("digits")) == 1797 and recorded.asked == []


PRESETS = [p for p in catalog.papers() if importlib.util.find_spec("adaptlab.experiments")
           and importlib.util.find_spec(p.experiment_module)]
LOCAL = ("LLM-Adapters/", "data/", "iid/", "class/")  # folders and streams that look like ids


def _strings(value):
    "All strings in a configuration."
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _strings(getattr(value, field.name))
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))


@pytest.mark.parametrize("paper", PRESETS, ids=[p.slug for p in PRESETS])
def test_every_hub_name_in_a_full_preset_is_recorded(paper, recorded):
    "A new data set or base model in a preset must be looked up, and recorded in tests/schemas.py."
    full = importlib.import_module(paper.experiment_module).FULL
    for text in _strings(full):
        name = text.partition("@")[0].partition("#")[0]
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]+/[\w.-]+", name) or name.startswith(LOCAL):
            continue
        ids = {known.partition("@")[0] for known in schemas.SCHEMAS}
        assert name in ids | schemas.MODELS, f"{text!r} is not recorded in tests/schemas.py"
        if "#" in text:
            data.load(text)
