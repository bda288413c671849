"""The dry run's arithmetic and checks, and the tiny twins of real architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from raygrpo.checks.arithmetic import batch_facts, fullest_step
from raygrpo.checks.memory import FullUpdate
from raygrpo.cli import app
from raygrpo.commands.dry_run import dry_run, print_plan
from raygrpo.commands.smoke import save_tiny_twin, shrunk, smoke_changes, smoke_run
from raygrpo.config import RunConfig
from raygrpo.config.file import dump_config, load_config
from raygrpo.errors import ConfigError
from tests.tiny import save_tiny_model, tiny_tokenizer

REWARDS = """
def good(completions, answer, **_):
    return [float(c == a) for c, a in zip(completions, answer)]


def bad(completions, **_):
    raise RuntimeError("the judge is out to lunch")
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preflight")
    save_tiny_model(path / "model", "qwen2", max_positions=64)
    rows = [{"prompt": "1" * (i % 10 + 1) + "\n", "answer": str(i)} for i in range(1200)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "rewards.py").write_text(REWARDS)
    return path


TRAIN = {"steps": 10, "groups_per_step": 8, "num_minibatches": 2, "num_iterations": 3}


def run_config(directory: Path, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "model": {"path": str(directory / "model")},
        "data": {"source": str(directory / "rows.jsonl"), "max_prompt_length": 32},
        "sampling": {"num_completions": 4, "max_tokens": 6},
        "train": TRAIN,
        "rewards": [{"func": f"{directory}/rewards.py:good", "weight": 2.0}],
        "ray": {"address": "local"},
        **sections,
    }
    return load_config(tree)


def test_the_plan_says_what_a_run_would_do(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = dry_run(run_config(directory))
    assert plan["data"]["prompts"].startswith("1200 ")
    assert plan["data"]["first prompt"] == repr("1\n"), "escaped, as the model sees it"
    # Lengths go 2, 3, ..., 11 over and over: the mean is 6.5, and one in ten has 11.
    lengths = plan["data"]["prompt tokens of 1000"]
    assert lengths == "mean 6.5, p95 11, max 11 of max_prompt_length 32"
    batch = plan["batch"]
    assert batch["completions a step"].startswith("32 ")
    assert batch["sequences an update"] == "16"
    assert batch["updates"].startswith("60 ")
    assert batch["tokens a step"].startswith(f"at most {32 * (11 + 6)} ")
    assert batch["epochs"] == f"{80 / 1200:.2f}"
    assert plan["rewards"]["good (weight 2)"].startswith("1 in ")
    assert plan["rewards"]["sum"] == "2"
    assert plan["rewards"]["fake completion"] == "'0'", "the row's own answer"
    assert plan["placement"]["processes"].startswith("5: ")
    assert not (directory / "run").exists()
    print_plan(run_config(directory))
    shown = capsys.readouterr().out
    assert all(name in shown for facts in plan.values() for name in facts)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_microbatches_hold_the_whole_update(directory: Path, ranks: int, budget: int) -> None:
    train = {**TRAIN, "tokens_per_microbatch": budget}
    config = run_config(directory, learner={"num_ranks": ranks}, train=train)
    update = fullest_step(config, 11, hidden_size=1000, layout="shared")
    number, longest = update.microbatches, update.longest
    # By hand: 4 groups of 4 an update. A row of all 4 completions has 11 + 4 * 6 = 35 tokens,
    # and attention at this width costs next to nothing, so sharing the prompt is cheapest;
    # three ranks share four groups evenly only by rows of 2 completions, of 11 + 2 * 6 tokens.
    if budget == 1:
        assert (number, longest) == (-(-16 // ranks), 17)
    elif budget == 100:
        assert (number, longest) == {1: (2, 35), 3: (1, 23)}[ranks]
    else:
        assert (number, longest) == {1: (1, 35), 3: (1, 23)}[ranks]


@pytest.mark.parametrize("shares_tokens", [False, True])
@pytest.mark.parametrize("budget", [100, 10_000])
def test_packed_rows_of_a_full_update(directory: Path, budget: int, shares_tokens: bool) -> None:
    """As above, four trees of 35 tokens, now in one row a microbatch: two in 100 tokens.

    Each of the 4 completions of a tree copies the prompt's 11 tokens. Ranks that share tokens have
    a row a tree instead, under a mask over each row.
    """
    ranks = 2 if shares_tokens else 1
    learner = {"num_ranks": ranks, "sequence_parallel": ranks}
    train = {**TRAIN, "tokens_per_microbatch": budget}
    config = run_config(directory, learner=learner, train=train)
    update = fullest_step(config, 11, hidden_size=1000, layout="packed")
    trees = 2 if budget == 100 else 4
    expected = FullUpdate(
        microbatches=4 // trees,
        tokens=min(budget, 4 * 35),
        longest=35 if shares_tokens else trees * 35,
        copied=0 if shares_tokens else trees * 4 * 11,
        mask=trees * 35 * 35 if shares_tokens else 0,
    )
    assert update == expected


def test_a_stream_has_no_epochs(directory: Path) -> None:
    update = FullUpdate(microbatches=1, tokens=9, longest=9)
    facts = batch_facts(run_config(directory), update, longest_prompt=3, num_prompts=None)
    assert facts["epochs"] == "unknown"


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"sampling": {"max_tokens": 60}}, ["64 positions", "max_tokens to 53"]),
    ({"ray": {"gpus": {"learner": 900}}}, ["900 GPUs", "this machine has"]),
    ({"learner": {"deepspeed": {"fp16": {"enabled": True}}}}, ["fp16", "model.dtype"]),
    ({"learner": {"num_ranks": 3, "sequence_parallel": 3}}, ["sequence_parallel 3", "4 heads"]),
    ({"learner": {"deepspeed": {"zero_optimisation": {}}}}, ["not supported", "zero_optimization"]),
    ({"learner": {"lora": {"lora_dropout": 0.1}}}, ["lora_dropout", "set it to 0"]),
    ({"learner": {"lora": {"rr": 8}}}, ["unknown key learner.lora.rr", "'r'"]),
    ({"data": {"source": "{dir}/rows.jsonl", "max_prompt_length": 5}}, ["6 tokens"]),
    ({"rewards": [{"func": "{dir}/rewards.py:bad"}]}, ['raise RuntimeError("the judge']),
    ({"rewards": [{"func": "{dir}/rewards.py:godo"}]}, ["'good'"]),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES, ids=[next(iter(m[0])) for m in MISTAKES])
def test_mistakes_exit_with_2(
    directory: Path, tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    changes = json.loads(json.dumps(change).replace("{dir}", str(directory)))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run_config(directory, **changes)))
    result = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert not (directory / "run").exists()


def test_rewards_that_need_actors_are_said_to_be_skipped(directory: Path) -> None:
    model = {"func": "reward_model", "params": {"path": str(directory / "model")}}
    plan = dry_run(run_config(directory, rewards=[model]))
    assert plan["rewards"]["reward_model"].startswith("skipped")
    assert "sum" not in plan["rewards"]


def real_configs() -> dict[str, Any]:
    """Configurations as the models of these names have them, weights aside."""
    from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen2Config

    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    longrope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.1] * 48,
        "short_factor": [1.0] * 48, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    sliding = ["sliding_attention"] * 5
    common: dict[str, Any] = {"vocab_size": 1000}  # other sizes are the kind's defaults
    return {
        "llama": LlamaConfig(
            **common, num_key_value_heads=8, head_dim=64, rope_parameters=llama3,
            max_position_embeddings=131072, tie_word_embeddings=True,
        ),
        "qwen2": Qwen2Config(**common, num_key_value_heads=2, tie_word_embeddings=True),
        "gemma3": Gemma3TextConfig(
            **common, num_hidden_layers=18, num_key_value_heads=1, sliding_window=512,
            layer_types=[*sliding, "full_attention"] * 3,
        ),
        "phi3": Phi3Config(
            **common, rope_parameters=longrope, max_position_embeddings=131072, pad_token_id=0
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "phi3"])
def test_a_twin_is_tiny_and_of_the_same_kind(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    real = real_configs()[kind]
    tiny = shrunk(real)
    assert type(tiny) is type(real)
    assert tiny.num_hidden_layers == 2
    assert tiny.vocab_size == real.vocab_size
    assert tiny.tie_word_embeddings == real.tie_word_embeddings
    assert tiny.max_position_embeddings == real.max_position_embeddings
    assert tiny.rope_parameters == real.rope_parameters
    # Shared or single key-value heads stay so; equal ones stay equal.
    assert (tiny.num_key_value_heads == 1) == (real.num_key_value_heads == 1)
    equal = real.num_attention_heads == real.num_key_value_heads
    assert (tiny.num_attention_heads == tiny.num_key_value_heads) == equal
    if kind == "gemma3":
        assert tiny.layer_types == ["sliding_attention", "full_attention"]
        assert tiny.sliding_window == real.sliding_window
    model = AutoModelForCausalLM.from_config(tiny, attn_implementation="sdpa")
    body = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    assert body - tiny.vocab_size * tiny.hidden_size < 5_000_000
    logits = model(torch.arange(5)[None]).logits
    assert logits.shape == (1, 5, 1000)
    assert torch.isfinite(logits).all()


def test_a_twin_has_the_tokenizer_and_the_stops(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from raygrpo.models import load_model

    path = save_tiny_model(tmp_path / "model", "gemma3")
    GenerationConfig(eos_token_id=[1, 5]).save_pretrained(path)
    model = run_config(tmp_path, model={"path": str(path)}).model
    save_tiny_twin(model, tmp_path / "twin")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "twin")
    assert tokenizer("1+1=a\n")["input_ids"] == tiny_tokenizer()("1+1=a\n")["input_ids"]
    assert GenerationConfig.from_pretrained(tmp_path / "twin").eos_token_id == [1, 5]
    twin = model.model_copy(update={"path": str(tmp_path / "twin"), "random_init": True})
    assert load_model(twin, seed=0, dtype=torch.float32).config.vocab_size == len(tokenizer)


def test_what_a_smoke_run_changes(directory: Path) -> None:
    config = run_config(
        directory,
        sampling={"num_completions": 4, "max_tokens": 900, "filters": {"min_tokens": 20}},
        eval={"eval_steps": 25, "num_prompts": 500, "best": {"metric": "eval/greedy/reward"}},
        tracking={"wandb": "online"},
        learner={"num_ranks": 2, "zero_stage": 3},
        checkpoint={"save_steps": 50},
    )
    said: list[str] = []
    with smoke_run(config, said.append) as small:
        root = Path(small.run_dir).parent
        assert root.is_dir()
        assert small.train.steps == 2
        assert small.train.groups_per_step == 2
        assert (small.sampling.max_tokens, small.sampling.filters.min_tokens) == (16, 16)
        assert (small.eval.eval_steps, small.eval.num_prompts) == (2, 4)
        assert small.tracking.wandb == "disabled"
        assert small.model.random_init
        # Everything else is the run's own.
        for name in ("data", "rewards", "loss", "advantage", "optimizer", "learner", "generators"):
            assert getattr(small, name) == getattr(config, name)
        assert small.train.num_iterations == 3
        assert small.eval.best.metric == "eval/greedy/reward"
    assert not root.exists()
    text = "\n".join(said)
    assert "train.steps: 2" in text
    assert "sampling.max_tokens: 16" in text
    assert "qwen2" in text
    assert "train.num_iterations" not in text


@pytest.mark.parametrize(("minibatches", "groups"), [(1, 2), (2, 2), (4, 4)])
def test_minibatches_still_divide_the_groups(
    directory: Path, minibatches: int, groups: int
) -> None:
    config = run_config(directory, train={**TRAIN, "num_minibatches": minibatches})
    assert smoke_changes(config)["train"]["groups_per_step"] == groups


def test_a_smoke_run_needs_a_model(directory: Path, tmp_path: Path) -> None:
    config = run_config(directory, model={"path": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="does not exist"), smoke_run(config, print):
        pass
