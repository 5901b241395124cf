"""The core on a GPU: training in half precision, killed and resumed; scores; adapters; weights."""

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adaptlab import adapter_files, adapters, evaluate, recipes, stats, train, weights
from gpu.card import DEVICE, DRY, in_turn, llama, once, peak, row, token_ids

CORE = Path(__file__).parents[1] / "core"
sys.path.insert(0, str(CORE))
import train_jobs as jobs

HALVES = ["no", "bf16"] if DRY else ["no", "bf16", "fp16"]
DTYPES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # and the error that each may make
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENIZER = recipes.byte_tokenizer()


def close(a, b, tolerance=1e-5):
    "Relative to the larger norm, wherever the tensors are."
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    assert a.shape == b.shape and torch.isfinite(a).all()
    assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-12)


# --- training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_fit_learns_on_the_card(precision, clip):
    model = jobs.mlp(0.2, True)
    found = train.fit(model, jobs.digits_like(), jobs.cross_entropy, steps=40, batch_size=16,
                      accumulate=2, lr=1e-2, precision=precision, clip=clip, schedule="cosine",
                      warmup=0.1, progress=False, log_every=10, device=DEVICE)
    losses = found.history["loss"].tolist()
    assert losses[-1] < losses[0] and found.steps == 40
    assert all(p.device.type == DEVICE and p.dtype == torch.float32 for p in model.parameters())


def test_losses_are_those_of_the_cpu():
    "The same model and rows: float32 agrees closely, half precision nearly; no step is skipped."
    def losses(where, half="no"):
        found = train.fit(jobs.tiny_lm(), jobs.token_rows(), collate_fn=jobs.collate, accumulate=2,
                          steps=12, batch_size=8, lr=1e-2, progress=False, log_every=3,
                          precision=half, device=where)
        return torch.tensor(found.history["loss"].tolist())

    wanted = losses("cpu")
    for half in HALVES:
        assert (losses(DEVICE, half) - wanted).abs().max() < (2e-3 if half == "no" else 0.15), half


def test_killed_and_resumed_bit_for_bit(tmp_path):
    "SIGKILL inside the writing of a checkpoint."
    command = [sys.executable, str(CORE / "train_jobs.py"), "kill-save", str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr[-2000:]
    whole, straight = jobs.run_resumable(None)
    resumed, found = jobs.run_resumable(tmp_path)
    assert 0 < found.resumed_from < jobs.STEPS
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert value.device.type == DEVICE
    assert found.history.equals(straight.history)


@pytest.mark.parametrize("precision", HALVES)
def test_resumed_in_half_precision(precision, tmp_path):
    "The loss scaler of fp16 is part of the checkpoint, like everything else that moves."
    class Dead(Exception):
        pass

    def die(state):
        if state.step == 18:
            raise Dead

    whole, _ = jobs.run_resumable(None, precision=precision)
    with pytest.raises(Dead):
        jobs.run_resumable(tmp_path, callbacks=[die], precision=precision)
    resumed, found = jobs.run_resumable(tmp_path, precision=precision)
    assert found.resumed_from == 14
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def train_step(model, ids):
    "A LoRA step as everybody writes it."
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(model.train()), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss

    return step


def with_lora(model, targets=LINEAR):
    return adapters.attach(model, partial(adapters.LoraAdapter, rank=16, alpha=32), targets)


def test_fit_against_a_bare_loop():
    "What the loop adds to a step of four layers of 8B shape."
    ids = token_ids(4, 512)
    rows = ids.cpu().repeat(16, 1)
    model = with_lora(llama("llama3-8b", layers=4))
    step, steps = train_step(model, ids), 2 if DRY else 16

    def bare():
        for _ in range(steps):
            step()

    def fitted():
        train.fit(model, {"input_ids": rows, "labels": rows}, steps=steps, batch_size=4, lr=1e-4,
                  progress=False, device=DEVICE, log_every=steps)

    ours, theirs = in_turn(fitted, bare, rounds=3, warm=1)
    row("fit, LoRA, 4 layers of 8B, 4 x 512 tokens", ours / steps, reference=theirs / steps,
        against="a bare loop", bound=1.03)


# --- evaluate -------------------------------------------------------------------------------------

def test_scores_of_tensors_on_the_card():
    logits, labels = torch.randn(200, 7), torch.randint(7, (200,))
    for score in (evaluate.accuracy, evaluate.macro_f1, evaluate.nll):
        found, wanted = score(logits.to(DEVICE), labels.to(DEVICE)), score(logits, labels)
        assert found == wanted and (found.items == wanted.items).all()
    values = torch.randn(30)
    assert stats.bootstrap(values.to(DEVICE)) == stats.bootstrap(values)
    assert stats.over_seeds(values[:3].to(DEVICE)) == stats.over_seeds(values[:3])
    assert stats.wilson((values > 0).to(DEVICE)) == stats.wilson(values > 0)
    assert stats.paired_difference(values.to(DEVICE), values.flip(0)).n == 30


def both_places(model):
    "The model on the card, and its twin on the CPU."
    return copy.deepcopy(model).to(DEVICE), model.to("cpu")


def test_predictions_come_home():
    here, cpu = both_places(recipes.SmallCNN())
    x = torch.randn(40, 1, 28, 28)
    found = evaluate.predict(here, x, batch_size=16)
    assert found.device.type == "cpu" and found.dtype == torch.float32
    close(found, evaluate.predict(cpu, x), 1e-3)
    close(evaluate.predict(here, x.to(DEVICE)), found, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_are_scored_as_on_the_cpu(dtype):
    torch.manual_seed(0)
    here, cpu = both_places(recipes.tiny_llama(layers=2))
    here = here.to(getattr(torch, dtype))
    texts = ["a short text", "another text, which is somewhat longer", "x y"]
    items = [{"context": "one and", "choices": [" two", " three", " a"], "answer": 1}] * 3
    tolerance = DTYPES[dtype]
    for a, b in zip(evaluate.token_losses(here, texts, TOKENIZER),
                    evaluate.token_losses(cpu, texts, TOKENIZER), strict=True):
        close(a, b, tolerance)
    ours, theirs = (evaluate.perplexity(m, texts, TOKENIZER).value for m in (here, cpu))
    assert ours == pytest.approx(theirs, rel=10 * tolerance)
    for a, b in zip(evaluate.choice_scores(here, TOKENIZER, items),
                    evaluate.choice_scores(cpu, TOKENIZER, items), strict=True):
        close(a, b, tolerance)
    assert evaluate.multiple_choice(here, TOKENIZER, items).n == 3
    said = evaluate.generate(here, TOKENIZER, texts, 8)
    if dtype == "float32":
        assert said == evaluate.generate(cpu, TOKENIZER, texts, 8)
    assert evaluate.exact_match(here, TOKENIZER, texts, said, max_new_tokens=8).n == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["llama3-8b", "llama2-7b"])  # grouped queries, and none
def test_flops_are_counted_alike(shape, dtype):
    """The CPU's count, whichever kernel the card takes for attention, forward and backward.

    Fused kernels compute the scores again on the way back: seven products in all. Where torch has
    none (float32 with shared keys, before 2.13) the scores are kept, and there are six.
    """
    here = llama(shape, layers=1, dtype=getattr(torch, dtype)) if DRY else small(shape, dtype)
    cpu = copy.deepcopy(here).to("cpu", torch.float32)
    ids = token_ids(2, 64)

    def step(model, ids):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    again = 2 * 2 * 8 * 64 * 64 * 64 if not DRY else 0  # the scores of the only layer
    found = evaluate.count_flops(lambda: step(here, ids))
    assert evaluate.count_flops(lambda: step(cpu, ids.cpu())) - found in (0, again)
    q = torch.randn(2, 8, 16, 64, device=DEVICE, dtype=getattr(torch, dtype), requires_grad=True)
    k = torch.randn(2, 2, 24, 64, device=DEVICE, dtype=q.dtype, requires_grad=True)
    attend = partial(F.scaled_dot_product_attention, q, k, k, enable_gqa=True)
    product = 2 * 2 * 8 * 16 * 24 * 64
    assert evaluate.count_flops(attend) == 2 * product
    kinds = (6, 7) if dtype == "float32" else (7,)
    assert evaluate.count_flops(lambda: attend().sum().backward()) in [n * product for n in kinds]


def small(shape, dtype):
    "One layer of a narrow model with the heads of a real one."
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = 2 if shape == "llama3-8b" else 8
    config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1024,
                         num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=shared)
    return LlamaForCausalLM(config).to(DEVICE, getattr(torch, dtype))


def test_memory_and_speed_are_measured():
    x = torch.randn(500, 500, device=DEVICE)
    x @ x  # the library's workspace
    assert evaluate.peak_memory(lambda: x @ x, DEVICE) in range(1_000_000, 1_001_000)
    assert evaluate.throughput(lambda: x @ x, 500).low > 0


# --- adapters -------------------------------------------------------------------------------------

def base(dtype):
    torch.manual_seed(0)
    return recipes.tiny_llama(layers=2).to(DEVICE, getattr(torch, dtype)).eval()


def moved(model):
    torch.manual_seed(1)
    for p in adapters.trainable_parameters(model):
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_life_of_an_adapter(dtype, tmp_path):
    "Attach, train, switch off, merge, take back, save, load, move, detach: nothing is lost."
    tolerance, ids = DTYPES[dtype], token_ids(3, 16) % 256 + 4
    model = base(dtype)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(ids).logits.clone()
    adapters.attach(model, partial(adapters.LoraAdapter, rank=4),
                    ["q_proj", "up_proj", "embed_tokens"], also_train="model.norm")
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.device.type == DEVICE for p in adapters.trainable_parameters(model))
    model.zero_grad()
    moved(model)
    with torch.no_grad():
        adapted = model(ids).logits.clone()
        with adapters.enabled(model, False):
            close(model(ids).logits, before)
        adapters.merge(model)
        close(model(ids).logits, adapted, tolerance)
        adapters.unmerge(model)
        close(model(ids).logits, adapted)
        path = adapter_files.save(model, tmp_path / "adapter.safetensors")
        again = adapter_files.load(base(dtype), path)
        assert all(p.device.type == DEVICE for p in again.parameters())
        close(again(ids).logits, adapted, tolerance)
        twin = copy.deepcopy(model)
        close(twin(ids).logits, adapted)
        model.to("cpu").to(DEVICE)
        close(model(ids).logits, adapted)
        adapters.merge_and_unload(twin)
        close(twin(ids).logits, adapted, tolerance)
        assert not adapters.adapters(twin)
    adapters.detach(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, kept[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_to_and_from_peft(dtype, tmp_path):
    peft = pytest.importorskip("peft")
    ids, model = token_ids(2, 16) % 256 + 4, base(dtype)
    moved(adapters.attach(model, partial(adapters.LoraAdapter, rank=4), ["q_proj", "up_proj"]))
    with torch.no_grad():
        wanted = model(ids).logits
        folder = adapter_files.to_peft(model, tmp_path / "peft")
        close(adapter_files.from_peft(base(dtype), folder)(ids).logits, wanted, DTYPES[dtype])
        theirs = peft.PeftModel.from_pretrained(base(dtype), str(folder))
        close(theirs(ids).logits, wanted, DTYPES[dtype])


def test_compiled():
    "A compiled LoRA step: no graph break, the same loss."
    import torch._dynamo as dynamo

    ids = token_ids(4, 512)
    model = with_lora(llama("llama3-8b", layers=1))
    dynamo.reset()
    dynamo.utils.counters.clear()
    eager = train_step(model, ids)
    wanted = model(input_ids=ids, labels=ids).loss.item()
    fast = torch.compile(model, backend="aot_eager" if DRY else "inductor")
    assert fast(input_ids=ids, labels=ids).loss.item() == pytest.approx(wanted, rel=2e-2)
    step = train_step(fast, ids)
    once(step)
    assert not sum(dynamo.utils.counters["graph_break"].values())
    compiled, plain = in_turn(step, eager, rounds=5, warm=1)
    row("LoRA step, 1 layer of 8B, compiled", compiled, reference=plain,
        against="the step not compiled")


def test_step_against_peft():
    "Time and peak memory of a step, all linear layers, r = 16, four layers of 8B shape."
    peft = pytest.importorskip("peft")
    ids = token_ids(4, 512)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR)
    ours = train_step(with_lora(llama("llama3-8b", layers=4)), ids)
    theirs = train_step(peft.get_peft_model(llama("llama3-8b", layers=4), config), ids)
    seconds = in_turn(ours, theirs)
    memory = [peak(step) for step in (ours, theirs)]
    row("LoRA step, 4 layers of 8B", seconds[0], reference=seconds[1], against="PEFT", bound=1.0)
    row("LoRA step, memory", gib=memory[0], reference=max(memory[1], 1e-9), against="PEFT",
        bound=1.0)


# --- weights --------------------------------------------------------------------------------------

def states(where, dtype=torch.float32, tensors=4, entries=700 * 300):
    large = entries * tensors > 10**7
    generator = torch.Generator(where if large else "cpu").manual_seed(0)
    return [{f"w{i}": torch.randn(entries, generator=generator, device=generator.device).to(
        where, dtype) for i in range(tensors)} for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_weights_stay_on_the_card(dtype):
    here, cpu = states(DEVICE, dtype), states("cpu", dtype)
    for work in (lambda s: weights.average(s), lambda s: weights.average(s, [0.5, 0.3, 0.2]),
                 lambda s: weights.interpolate(s[0], s[1], 0.3),
                 lambda s: weights.task_vector(s[0], s[1]),
                 lambda s: weights.add(s[0], weights.task_vector(s[1], s[2]), 0.7)):
        found, wanted = work(here), work(cpu)
        for name in wanted:
            assert found[name].device.type == DEVICE
            close(found[name], wanted[name], 1e-6 if dtype == torch.float32 else 1e-2)
    close(torch.tensor(weights.norm(here[0])), torch.tensor(weights.norm(cpu[0])), 1e-5)
    mixed = weights.average([cpu[0], here[1]])
    close(mixed["w0"], weights.average(cpu[:2])["w0"], 1e-6 if dtype == torch.float32 else 1e-2)


def test_average_against_plain_torch():
    "Three state dicts of 2 GB on the card: at most twice a loop over their tensors."
    made = states(DEVICE, torch.bfloat16, tensors=8 if DRY else 60, entries=1000 if DRY else 2**24)

    def plain():
        return {name: (sum(s[name].float() for s in made) / 3).to(torch.bfloat16)
                for name in made[0]}

    ours, theirs = in_turn(lambda: weights.average(made), plain, rounds=5, warm=1)
    close(weights.average(made)["w0"], plain()["w0"], 1e-2)
    row("weights.average, 3 x 2 GB", ours, reference=theirs, against="plain torch", bound=2.0)
