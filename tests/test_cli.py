"""The command line, as a person calls it."""

import json
import os
import subprocess
import sys

import families
import pytest
import torch

from llmlib import presets
from llmlib.cli import BOOK_MODEL, ends_of, main, parser, short
from llmlib.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer

TEXT = "def read(path):\n    return path.read_text()\n" * 50


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama with a tokenizer of its own."""
    _, folder = families.saved("llama", tmp_path_factory.mktemp("checkpoints"))
    tokenizer = BPETokenizer.train([TEXT], 256 + 40)
    tokenizer.save(folder / "tokenizer.json")
    families.edit_config(folder, vocab_size=97)
    return folder


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_info_prints_the_published_numbers(capsys):
    status, out, _ = run(capsys, "info", "llama-3-8b", "--context", 8192)
    assert status == 0
    for expected in ("8,030,261,248", "8.03 B", "131,072", "32 ×", "Attention", "SwiGLU", "1.00 GiB"):
        assert expected in out


def test_info_for_machines(capsys, tmp_path):
    svg = tmp_path / "gpt2.svg"
    _, out, _ = run(capsys, "info", "gpt2", "--json", "--dtype", "float32", "--batch", 2, "--svg", svg)
    facts = json.loads(out)
    assert facts["parameters"]["total"] == 124_439_808
    assert facts["cache_bytes_per_token"] == 2 * 4 * 768 * 12
    assert facts["memory_bytes"]["cache"] == 2 * 4096 * facts["cache_bytes_per_token"]
    assert facts["memory_bytes"]["total"] == facts["memory_bytes"]["weights"] + facts["memory_bytes"]["cache"]
    assert svg.read_text(encoding="utf-8").startswith("<svg")


def test_info_of_a_folder_and_of_yaml(capsys, checkpoint, tmp_path):
    _, out, _ = run(capsys, "info", checkpoint, "--json", "--context", 32)
    held = json.loads(out)["parameters"]["total"]
    assert held == families.reference("llama").num_parameters()
    file = tmp_path / "config.yaml"
    file.write_text(presets.get("gpt2").to_yaml())
    _, out, _ = run(capsys, "info", file, "--json", "--context", 32)
    assert json.loads(out)["parameters"]["total"] == 124_439_808


def test_compare(capsys, tmp_path):
    _, out, _ = run(capsys, "compare", "llama-2-7b", "llama-3-8b", "--svg", tmp_path / "d.svg")
    assert "mixer.num_kv_heads  32          8" in out
    assert (tmp_path / "d.svg").exists()
    _, out, _ = run(capsys, "compare", "llama-2-7b", "llama-3-8b", "--json")
    assert {"what": "vocab_size", "llama-2-7b": "32,000", "llama-3-8b": "128,256"} in json.loads(out)


def test_generate_prints_what_the_model_says(capsys, tmp_path):
    model, tokenizer = open_book()
    prompt = "def read(path):"
    expected = model.generate(torch.tensor([tokenizer.encode(prompt)]), 20)[0]
    status, out, _ = run(capsys, "generate", "--preset", prompt, "--max-new-tokens", 20)
    assert status == 0
    assert out == tokenizer.decode(expected.tolist()) + "\n"
    _, named, _ = run(capsys, "generate", BOOK_MODEL, prompt, "--max-new-tokens", 20)
    assert named == out


def open_book():
    from llmlib import load

    return load(BOOK_MODEL), load_tokenizer(BOOK_MODEL)


@pytest.fixture(scope="module")
def begins(tmp_path_factory):
    """A tiny Llama whose tokenizer puts <s> before a text and ends it with </s>; also transformers' view of both."""
    from tokenizers.processors import TemplateProcessing

    theirs, folder = families.saved("llama", tmp_path_factory.mktemp("begins"))
    special = {"<s>": 0, "</s>": 1}
    tokenizer = families.small_tokenizer(list(special))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=list(special.items()))
    tokenizer.save(str(folder / "tokenizer.json"))
    return theirs, tokenizer, folder


def greedy(theirs, tokens, **options):
    x = torch.tensor([tokens])
    options |= {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    return theirs.generate(x, attention_mask=torch.ones_like(x), **options)[0]


def test_a_prompt_begins_as_the_model_was_trained_to_expect(capsys, begins):
    theirs, tokenizer, folder = begins
    families.edit_config(folder, eos_token_id=None)
    (folder / "generation_config.json").write_text('{"_from_model_config": true}')
    for prompt in ("the end", "x"):
        tokens = tokenizer.encode(prompt).ids
        assert tokens[0] == 0
        expected = tokenizer.decode(greedy(theirs, tokens, eos_token_id=None).tolist(), skip_special_tokens=True)
        _, out, _ = run(capsys, "generate", folder, prompt, "--max-new-tokens", 30)
        assert out == expected + "\n"
        _, out, _ = run(capsys, "generate", folder, prompt, "--max-new-tokens", 30, "--json")
        assert json.loads(out)["text"] == expected


def test_any_of_several_tokens_ends_a_text(capsys, begins):
    """generation_config.json says which; config.json does where that says nothing."""
    theirs, tokenizer, folder = begins
    tokens = tokenizer.encode("the end").ids
    free = greedy(theirs, tokens, eos_token_id=None).tolist()[len(tokens) :]
    late, early, other = free[12], free[4], next(t for t in range(97) if t not in free)
    for first, second, ends in (
        ([other, early], late, [other, early]), (early, late, [early]), (None, [late, other], [late, other]),
    ):  # fmt: skip
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first, "top_k": 5}))
        families.edit_config(folder, eos_token_id=second)
        expected = greedy(theirs, tokens, eos_token_id=ends).tolist()[len(tokens) : -1]
        assert len(expected) < 30 - 1
        _, out, _ = run(capsys, "generate", folder, "the end", "--max-new-tokens", 30, "--json")
        assert json.loads(out)["tokens"] == expected
        _, out, _ = run(capsys, "generate", folder, "the end", "--max-new-tokens", 30)
        assert out == tokenizer.decode([*tokens, *expected]) + "\n"


def test_a_batch_of_prompts_and_json(capsys):
    prompts = ["import os", "class A:", "for i in"]
    options = ["--max-new-tokens", 8, "--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--seed", 3]
    _, out, _ = run(capsys, "generate", "--preset", *prompts, *options, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt"] for a in answers] == prompts
    assert all(a["text"].startswith(a["prompt"]) and len(a["tokens"]) == 8 for a in answers)
    _, again, _ = run(capsys, "generate", "--preset", *prompts, *options, "--json")
    assert again == out


def test_the_model_trained_in_the_book_writes_python():
    """It has learnt its text: far below the 8 bits per byte of a model that knows nothing, and as recorded."""
    from llmlib.notebook import recorded

    result = recorded("book_model")["model"]
    assert result["validation_bits_per_byte"] < 3
    model, tokenizer = open_book()
    assert model.num_parameters() == result["parameters"]
    tokens = torch.tensor(
        [tokenizer.encode("import os\n\n\ndef main():\n    for name in names:\n        print(name)\n")]
    )
    per_byte = model.loss(tokens).item() * (tokens.shape[1] - 1) / 66 / 0.693
    assert per_byte < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "llama-9"], "there is no preset 'llama-9'; the nearest are llama-"),
        (["info", "./nowhere"], "there is no folder ./nowhere"),
        (["info", "config.yaml"], "config.yaml can't be read"),
        (["generate"], "python -m llmlib generate --preset"),
        (["generate", "./nowhere", "hello"], "generate --preset PROMPT"),
        (["generate", "--preset"], "there is no prompt"),
        (["generate", "--preset", ""], "has no tokens"),
        (["generate", "--preset", "x", "--temperature", "-1"], "temperature is -1"),
        (["generate", "--preset", "x", "--device", "potato"], "--device potato can't be used here"),
        (["generate", "--preset", "x", "--device", "meta"], "--device meta can't be used here"),
        (
            ["generate", "llama-3-8b", "hello"],
            "'llama-3-8b' is a preset, which has sizes and no weights: give a folder",
        ),
        (["info", "gpt2", "--batch", "0"], "--batch is 0, and must be at least 1"),
        (["info", "gpt2", "--context", "-3"], "--context is -3, and must be at least 1"),
        (["info", "gpt2", "--context", "1" + 20 * "0"], "and must be at least 1 and at most 1,000,000,000"),
        (["generate", "--preset", "a\udcff"], "the prompt 'a\\udcff' isn't valid Unicode"),
        (["generate", "a prompt of many words " * 99, "x"], "there is no folder a prompt of many words"),
        (["generate", "--preset", "x", "--temperature", "1", "--seed", "9" * 30], "must fit in 64 bits"),
        (["info", r"C:\models\llama"], r"there is no folder C:\models\llama"),
        (["info", "~nobody-here/llama"], "there is no folder ~nobody-here/llama"),
        (["info", __file__], "test_cli.py is a file: give the folder that it is in"),
        (["info", "gpt2", "--svg", "none/a.svg"], "--svg none/a.svg can't be written (No such file or directory)"),
        (["compare", "gpt2", "llama-3-8b", "--svg", "none/a.svg"], "--svg none/a.svg can't be written"),
    ],
)
def test_mistakes_are_one_line_on_stderr(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert out == ""


@pytest.mark.parametrize("ends", ['"a"', "[1, [2]]", "2.5", "true", "[null]"])
def test_ends_that_are_no_tokens(ends, tmp_path):
    from llmlib import CheckpointError

    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id is .*must be whole numbers"):
        ends_of(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert ends_of(tmp_path) == set()


def test_a_text_longer_than_its_model_is_meant_for(capsys):
    status, out, err = run(capsys, "generate", "--preset", "x" * 600, "--max-new-tokens", 2)
    assert status == 0
    assert err.startswith("llmlib generate: the text may grow to ")
    assert "beyond 512, which this model is meant for" in err
    assert run(capsys, "generate", "--preset", "x", "--max-new-tokens", 2)[2] == ""


def test_comparing_equals(capsys):
    assert run(capsys, "compare", "gpt2", "gpt2")[1] == "gpt2 and gpt2 are the same\n"
    assert run(capsys, "compare", "gpt2", "gpt2", "--json")[1] == "[]\n"


class Interrupted:
    """Standard output of someone who presses Ctrl-C, or whose disk is full, or who has gone."""

    def __init__(self, error):
        self.error = error

    def write(self, _):
        raise self.error

    def flush(self):
        pass


def test_ctrl_c_and_a_full_disk_leave_no_traceback(capsys, monkeypatch):
    for error, status, message in (
        (KeyboardInterrupt(), 130, "\n"),
        (OSError(28, "No space left on device"), 2, "llmlib info: [Errno 28] No space left on device\n"),
    ):
        monkeypatch.setattr(sys, "stdout", Interrupted(error))
        assert main(["info", "gpt2"]) == status
        monkeypatch.undo()
        assert capsys.readouterr().err == message


def test_a_terminal_that_lacks_letters_and_a_reader_that_goes():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "llmlib", "info", "gpt2"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "embedding  50,257 ? 768" in result.stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_training_resumes_and_reports(capsys, tmp_path):
    from llmlib.attention import Attention
    from llmlib.ffn import SwiGLU
    from llmlib.model import Layer, ModelConfig, spec
    from llmlib.norm import RMSNorm

    layer = Layer(spec(Attention, num_heads=2, rope_theta=1e4), spec(SwiGLU, d_ff=32))
    config = ModelConfig(vocab_size=256, d_model=16, norm=spec(RMSNorm), layers=(layer,))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    (tmp_path / "text.txt").write_text(TEXT * 3)
    (tmp_path / "other.txt").write_text(TEXT)
    options = ["--data", tmp_path, "--steps", 6, "--time", 32, "--batch-size", 4, "--out", tmp_path / "run.pt"]
    status, out, _ = run(capsys, "train", tmp_path / "c.yaml", *options)
    assert status == 0
    assert "validation loss" in out
    _, again, _ = run(capsys, "train", tmp_path / "c.yaml", *options)
    assert again == out
    (tmp_path / "d.yaml").write_text(config.replace(vocab_size=300).to_yaml())
    status, _, err = run(capsys, "train", tmp_path / "d.yaml", *options)
    assert "vocab_size is 300; training reads bytes, so it must be 256" in err


def test_the_module_runs_and_its_help_reads_well():
    result = subprocess.run([sys.executable, "-m", "llmlib", "--help"], capture_output=True, text=True, check=True)
    for word in ("info", "generate", "compare", "train", "examples:", "The capital city of France is"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    status, out, err = run(capsys, "generate", "--preset", "x", "--device", "cuda")
    assert (status, out) == (2, "")
    assert "--device cuda can't be used here" in err


@pytest.mark.parametrize("command", ["info", "generate", "compare", "train"])
def test_the_help_of_a_command_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    choices = next(a.choices for a in parser()._actions if a.choices)
    for action in choices[command]._actions:
        assert action.help, action.dest
        assert all(name in shown for name in action.option_strings)


def test_bpe_is_lossless_and_shorter_than_bytes(tmp_path):
    tokenizer = BPETokenizer.train([TEXT], 300)
    for text in (TEXT, "naïve Ελληνικά 漢字 🙂\x00", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 3
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
    assert BPETokenizer.train([TEXT], 300).encode(TEXT) == tokenizer.encode(TEXT)


def test_tokenizers_that_are_missing_or_broken(tmp_path):
    from llmlib import CheckpointError, ConfigError

    with pytest.raises(CheckpointError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="can't be read as a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="texts is one string, and must be several"):
        BPETokenizer.train(TEXT, 300)
    with pytest.raises(ConfigError, match="vocab_size is 200, and byte-level BPE starts from 256"):
        BPETokenizer.train([TEXT], 200)


def test_a_tokenizer_neither_cuts_nor_pads_a_prompt(tmp_path):
    tokenizer = families.small_tokenizer([])
    expected = tokenizer.encode("a" * 50).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a" * 50) == expected


def test_older_tokenizers_run_no_code_and_ask_no_question(tmp_path):
    from llmlib import CheckpointError

    code = "raise SystemExit('this code was run')"
    (tmp_path / "code.py").write_text(code)
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="vocab.json can't be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_units():
    assert [short(n) for n in (12, 1500, 124_439_808, 8.03e9, 1.04e12)] == ["12", "1.5 k", "124 M", "8.03 B", "1.04 T"]
