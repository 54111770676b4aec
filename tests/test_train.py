"""The loop does what its parts say, stops on NaN, and an interrupted run ends with the weights of a whole one."""

import copy
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlib import train as training
from llmlib.data import IGNORED, Batch, load_corpus
from llmlib.errors import ConfigError, TrainingError
from llmlib.ffn import SwiGLU
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.moe import MoE
from llmlib.norm import RMSNorm
from llmlib.ssm import GatedDeltaNet, Mamba, Mamba2, Mamba3
from llmlib.train import automatic_precision, evaluate, learning_rate_at, loss_of, parameter_groups, train

torch.set_num_threads(1)


class Tiny(nn.Module):
    """A bigram model with dropout: small, but with randomness of its own."""

    def __init__(self, vocab=7, d=8, dropout=0.0):
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(vocab, d), nn.Dropout(dropout), nn.Linear(d, vocab)

    def forward(self, tokens):
        return self.head(self.dropout(self.embedding(tokens)))


def cycle(step):
    tokens = (torch.arange(9) + torch.arange(4)[:, None] + step) % 7
    return tokens[:, :-1], tokens[:, 1:]


def tiny(**options):
    torch.manual_seed(0)
    return Tiny(**options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_steps_are_those_of_the_plain_loop():
    """Against a loop written out with torch.optim.AdamW, in the same arithmetic."""
    model, oracle = tiny(), tiny()
    options = {"learning_rate": 0.02, "warmup": 3, "clip": 0.05, "weight_decay": 0.3}
    history = train(model, cycle, steps=10, **options)
    groups = [
        {"params": [oracle.embedding.weight, oracle.head.weight], "weight_decay": 0.3},
        {"params": [oracle.head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for step in range(10):
        rate = 0.02 * (step + 1) / 3 if step < 3 else 0.002 + 0.018 * (1 + math.cos(math.pi * (step - 3) / 6)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = cycle(step)
        loss = -oracle(inputs).log_softmax(-1).gather(-1, targets[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in oracle.parameters()]).norm()
        for p in oracle.parameters():
            p.grad *= min(1.0, 0.05 / (norm.item() + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, abs=1e-5)
    assert torch.allclose(weights(model), weights(oracle), atol=1e-5)
    assert not model.training


def test_it_learns():
    model = tiny()
    history = train(model, cycle, steps=150, learning_rate=0.05, weight_decay=0.0)
    assert history.losses[0] > 1.5
    assert history.losses[-1] < 0.05
    assert history.smoothed(10)[-1] == pytest.approx(sum(history.losses[-10:]) / 10)
    assert history.smoothed(10)[0] == history.losses[0]


@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_schedule(schedule):
    rates = [learning_rate_at(s, steps=100, peak=2.0, warmup=10, schedule=schedule, floor=0.05) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    halfway = {"constant": 1.0, "cosine": 0.5, "linear": 0.5, "trapezoid": 1.0}
    late = {"constant": 1.0, "cosine": (1 + math.cos(0.8 * math.pi)) / 2, "linear": 0.2, "trapezoid": 0.5}
    for step, expected in ((5, halfway), (8, late)):
        rate = learning_rate_at(step, steps=11, peak=1.0, schedule=schedule, floor=0.0)
        assert rate == pytest.approx(expected[schedule])


def test_weight_decay_groups():
    model = tiny()
    model.embedding.undecayed = ("weight",)
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    model.frozen = frozen
    decayed, spared = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model.head.weight)]
    assert {id(p) for p in spared["params"]} == {id(model.embedding.weight), id(model.head.bias)}


def test_biases_of_stacked_experts_are_spared_after_copying():
    experts = MoE(8, num_experts=2, top_k=1, expert=spec(SwiGLU, d_ff=12, bias=True))
    for module in (experts, copy.deepcopy(experts)):
        spared = {id(p) for p in parameter_groups(module, 0.1)[1]["params"]}
        assert all((id(p) in spared) == name.endswith("bias") for name, p in module.named_parameters())


@pytest.mark.parametrize("mixer", [Mamba, Mamba2, Mamba3, GatedDeltaNet], ids=lambda mixer: mixer.__name__)
def test_state_space_models_train_in_bfloat16(mixer):
    sizes = {Mamba: {}, GatedDeltaNet: {"num_heads": 2, "head_dim": 4}}.get(mixer, {"head_dim": 8, "d_state": 8})
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=7, d_model=8, layers=(Layer(spec(mixer, **sizes)),), norm=spec(RMSNorm)))
    history = train(model, cycle, steps=30, learning_rate=0.02, precision=torch.bfloat16, progress=False)
    assert history.losses[-1] < history.losses[0] - 0.1


def test_auxiliary_loss_is_minimised_but_not_reported_as_loss():
    class WithAuxiliary(Tiny):
        def auxiliary_loss(self):
            return 10 * (self.head.bias - 1).square().sum()

    torch.manual_seed(0)
    model = WithAuxiliary()
    history = train(model, cycle, steps=200, learning_rate=0.03)
    assert history.auxiliary_losses[0] > 1
    assert history.auxiliary_losses[-1] < 0.01
    assert torch.allclose(model.head.bias, torch.ones(7), atol=0.05)
    assert history.losses[0] < 3


def test_experts_are_balanced_between_steps_and_resume(tmp_path):
    from llmlib.ffn import SwiGLU
    from llmlib.model import CausalLM, Layer, ModelConfig, spec
    from llmlib.moe import MoE, TopKRouter
    from llmlib.norm import RMSNorm

    router = spec(TopKRouter, scoring="sigmoid", correction_bias=True)
    moe = spec(MoE, num_experts=4, top_k=1, expert=spec(SwiGLU, d_ff=8), router=router, bias_update_rate=0.01,
               load_balance_alpha=0.01)  # fmt: skip
    config = ModelConfig(vocab_size=7, d_model=8, layers=(Layer(ffn=moe),), norm=spec(RMSNorm))

    def build():
        torch.manual_seed(0)
        return CausalLM(config)

    whole, resumed = build(), build()
    expected = train(whole, cycle, steps=6)
    assert whole.layers[0].ffn.router.e_score_correction_bias.abs().max() > 0
    assert expected.auxiliary_losses[0] > 0
    with pytest.raises(KeyboardInterrupt):
        train(resumed, _interrupted_at(4), steps=6, checkpoint=tmp_path / "moe.pt", checkpoint_every=2)
    assert train(resumed, cycle, steps=6, checkpoint=tmp_path / "moe.pt", checkpoint_every=2) == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def _interrupted_at(step):
    def task(at):
        if at == step:
            raise KeyboardInterrupt
        return cycle(at)

    return task


def test_ignored_targets_and_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x, y):
            return F.one_hot(x + y, 3).float() + self.bias

    x = torch.tensor([[0, 0]])
    targets = torch.tensor([[2, IGNORED]])
    logits = torch.tensor([0.0, 1.0, 0.0])
    assert loss_of(Sum(), ((x, x + 1), targets)).item() == pytest.approx(-logits.log_softmax(0)[2].item())


def test_documents_reach_the_model():
    class Sees(Tiny):
        def forward(self, tokens, documents=None):
            self.documents = documents
            return super().forward(tokens)

    torch.manual_seed(0)
    model = Sees()
    inputs, targets = cycle(0)
    loss_of(model, Batch(inputs, targets, inputs * 0 + 3))
    assert model.documents.unique().tolist() == [3]
    loss_of(model, Batch(inputs, targets))
    assert model.documents is None


def test_evaluation_is_the_mean_over_targets(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 40 + "\n")
    corpus = load_corpus(tmp_path)
    torch.manual_seed(0)
    model = Tiny(vocab=256)
    text = corpus.train.tokens.long()
    expected = F.cross_entropy(model(text[:80]), text[1:81]).item()
    assert evaluate(model, corpus.train, time=16, windows=None, batch_size=3) == pytest.approx(expected, rel=1e-5)
    boundary = int(corpus.train.ends[0]) - 1
    keep = [i for i in range(80) if i != boundary]
    packed = F.cross_entropy(model(text[:80])[keep], text[1:81][keep]).item()

    class Sees(Tiny):
        def forward(self, tokens, documents=None):
            return super().forward(tokens)

    torch.manual_seed(0)
    score = evaluate(Sees(vocab=256), corpus.train, time=16, windows=None, batch_size=3, packed=True)
    assert score == pytest.approx(packed, rel=1e-5)
    history = train(model, corpus, steps=5, evaluate_every=2, time=16)
    assert [step for step, _ in history.evaluations] == [2, 4, 5]
    assert history.evaluations[-1][1] == pytest.approx(evaluate(model, corpus.validation, time=16))


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_nan_loss_names_the_step_and_the_remedy():
    def poisoned(step):
        inputs, targets = cycle(step)
        return inputs, torch.full_like(targets, IGNORED) if step == 4 else targets

    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 4 \(learning rate .*a third of the learning rate"
    ):
        train(tiny(), poisoned, steps=10)


def test_infinite_gradient_is_caught_before_it_reaches_the_weights():
    class Overflow(Tiny):
        def forward(self, tokens):
            return super().forward(tokens) + self.head.bias[0].abs().sqrt()  # at zero its gradient is infinite

    torch.manual_seed(0)
    model = Overflow()
    with torch.no_grad():
        model.head.bias.zero_()
    with pytest.raises(TrainingError, match="the gradient is (nan|inf) at step 0"):
        train(model, cycle, steps=3)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"schedule": "cosin"}, "schedule='cosin' is not one of constant, cosine, linear, trapezoid"),
        ({"warmup": 11}, "warmup=11 must lie between 0 and steps=10"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
        ({"evaluate_every": 5}, "evaluate_every needs a Corpus"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny(), cycle, **({"steps": 10} | options))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_bfloat16_only_where_the_gpu_computes_with_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert automatic_precision("cuda") == dtype
    assert automatic_precision("cpu") == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns_and_keeps_float32_weights(dtype):
    model = tiny()
    history = train(model, cycle, steps=100, learning_rate=0.05, precision=dtype)
    assert history.losses[-1] < 0.2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    float32 = train(tiny(), cycle, steps=1)
    assert history.gradient_norms[0] == pytest.approx(float32.gradient_norms[0], rel=0.05)


def test_float16_overflow_skips_the_step(monkeypatch):
    """The scaler starts too high for float16 gradients, skips, halves its scale, and training goes on."""
    original = torch.amp.GradScaler
    scales = []

    def high(device, enabled):
        scaler = original(device, enabled=enabled, init_scale=2.0**40)
        scales.append(scaler)
        return scaler

    monkeypatch.setattr(torch.amp, "GradScaler", high)
    history = train(tiny(), cycle, steps=60, learning_rate=0.05, precision=torch.float16)
    assert scales[0].get_scale() < 2.0**40
    assert not math.isfinite(history.gradient_norms[0])
    assert history.losses[-1] < history.losses[0]


# --- interruption -----------------------------------------------------------------------------------------------------

INTERRUPTED = """
    import os, signal, torch
    from test_train import cycle, tiny
    from llmlib.train import train

    def killed(step):
        if step == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return cycle(step)

    train(tiny(dropout=0.3), killed, steps=20, checkpoint={path!r}, checkpoint_every=4, learning_rate=0.02)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_run_resumes_bit_for_bit(tmp_path):
    path = tmp_path / "run.pt"
    whole = tiny(dropout=0.3)
    expected = train(whole, cycle, steps=20, learning_rate=0.02)

    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    code = textwrap.dedent(INTERRUPTED).format(path=str(path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert os.listdir(tmp_path) == ["run.pt"]

    drawn = []

    def watched(step):
        drawn.append(step)
        return cycle(step)

    resumed = tiny(dropout=0.3)
    torch.manual_seed(99)  # the generator's state comes from the checkpoint
    history = train(resumed, watched, steps=20, checkpoint=path, checkpoint_every=4, learning_rate=0.02)
    assert drawn == list(range(8, 20))
    assert torch.equal(weights(resumed), weights(whole))
    assert history == expected

    again = tiny(dropout=0.3)
    assert train(again, watched, steps=20, checkpoint=path, checkpoint_every=4, learning_rate=0.02) == expected
    assert torch.equal(weights(again), weights(whole))
    assert drawn == list(range(8, 20))


def test_corpus_run_resumes_bit_for_bit(tmp_path):
    corpus = load_corpus()
    options = {"steps": 6, "batch_size": 4, "time": 16, "evaluate_every": 2, "seed": 3}
    whole, resumed = Tiny(256), Tiny(256)
    resumed.load_state_dict(whole.state_dict())
    expected = train(whole, corpus, **options)
    real = training._step

    def stops(model, data, optimizer, scaler, dtype, clip, step):
        if step == 5:
            raise KeyboardInterrupt
        return real(model, data, optimizer, scaler, dtype, clip, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(resumed, corpus, checkpoint=tmp_path / "c.pt", checkpoint_every=2, **options)
    assert train(resumed, corpus, checkpoint=tmp_path / "c.pt", checkpoint_every=2, **options) == expected
    assert torch.equal(weights(resumed), weights(whole))


def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    path, save, calls = tmp_path / "run.pt", torch.save, []

    def disk_full_the_second_time(state, file):
        calls.append(state["step"])
        if len(calls) == 1:
            return save(state, file)
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full_the_second_time)
    with pytest.raises(OSError, match="No space left"):
        train(tiny(), cycle, steps=8, checkpoint=path, checkpoint_every=4)
    assert calls == [4, 8]
    assert torch.load(path)["step"] == 4


def test_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    train(tiny(), cycle, steps=4, checkpoint=path)
    with pytest.raises(TrainingError, match=r"run.pt belongs to another run \(seed was 0, is 1\): delete"):
        train(tiny(), cycle, steps=4, checkpoint=path, seed=1)
    with pytest.raises(TrainingError, match=r"(?s)belongs to another model.*head.weight.*delete"):
        train(tiny(d=9), cycle, steps=4, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"run.pt can't be read .*delete .*run.pt to start afresh"):
        train(tiny(), cycle, steps=4, checkpoint=path)


# --- the bar ----------------------------------------------------------------------------------------------------------


def test_bar_is_shown_only_to_a_reader(capsys, monkeypatch):
    train(tiny(), cycle, steps=3)
    assert capsys.readouterr().err == ""
    train(tiny(), cycle, steps=3, progress=True)
    assert "0/3" in capsys.readouterr().err
    monkeypatch.setenv("LLMLIB_PROGRESS", "1")
    train(tiny(), cycle, steps=3)
    assert "0/3" in capsys.readouterr().err
    monkeypatch.setenv("LLMLIB_PROGRESS", "0")
    train(tiny(), cycle, steps=3)
    assert capsys.readouterr().err == ""
