from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raygrpo.config import RunConfig
from raygrpo.config.describe import describe_keys
from raygrpo.config.file import dump_config, load_config
from raygrpo.config.moved import MOVED
from raygrpo.config.recipes import RECIPES
from raygrpo.errors import ConfigError
from tests import builders
from tests.builders import SMALLEST


def test_weakest_to_strongest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, "recipe": "trl024", "loss": {"clip_high": 0.25}}))
    config = load_config(path, ["--optimizer.lr=3e-5", "sampling.stop=['a']"])
    assert config.advantage.scale == "group"  # recipe
    assert config.loss.clip_low == 0.2  # recipe, although the file has the section too
    assert config.loss.clip_high == 0.25  # file over recipe
    assert config.optimizer.lr == 3e-5  # override, although YAML reads 3e-5 as text
    assert config.sampling.stop == ["a"]
    assert config.optimizer.schedule == "linear"


MAPPINGS = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text())
SOURCE_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "source": st.text(min_size=1),
    "params": MAPPINGS,
    "columns": st.dictionaries(st.text(), st.text()),
    "template": st.none() | st.text(),
    "chat": st.none() | st.booleans(),
    "chat_params": MAPPINGS,
    "max_prompt_length": st.integers(1, 9999),
    "overlong": st.sampled_from(["error", "drop", "truncate_left"]),
    "max_pass_rate": st.none() | st.floats(0.01, 1),
}
PARTS = st.lists(
    st.fixed_dictionaries(
        {}, optional={**SOURCE_KEYS, "name": st.text(), "weight": st.floats(0.01, 99)}
    ),
    max_size=2,
)
CHANGES = st.fixed_dictionaries({}, optional={**SOURCE_KEYS, "mixture": PARTS})
SECTIONS = st.fixed_dictionaries(
    {"model": st.just({"path": "m"}), "data": CHANGES.map(lambda keys: {"source": "d", **keys})},
    optional={
        "recipe": st.sampled_from(sorted(RECIPES)),
        "seed": st.integers(0),
        "eval": st.fixed_dictionaries({"data": CHANGES}),
        "optimizer": st.fixed_dictionaries({"lr": st.floats(0, 1)}),
        "sampling": st.fixed_dictionaries({"stop": st.lists(st.text(), max_size=3)}),
        "ray": st.fixed_dictionaries({"gpus": st.fixed_dictionaries({"learner": st.floats(0, 8)})}),
        "learner": st.fixed_dictionaries({"lora": MAPPINGS, "deepspeed": MAPPINGS}),
    },
)


@settings(max_examples=100, deadline=None)
@given(sections=SECTIONS)
def test_a_dumped_configuration_loads_to_the_same(sections: dict[str, Any]) -> None:
    config = load_config(sections)
    again = load_config(yaml.safe_load(dump_config(config)))
    assert again == config
    assert set_keys(again) == set_keys(config), "other keys are inherited"
    assert pickle.loads(pickle.dumps(config)) == config


def set_keys(config: RunConfig) -> list[set[str]]:
    changes = (config.eval.data, *config.data.mixture, *config.eval.data.mixture)
    return [keys.model_fields_set for keys in changes]


FILTERED = {"filters": {"min_p": 0.1}}
COLOCATED, ZONE = {"placement": "colocate"}, {"zone": "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"step": 3}}, "unknown key train.step\n  fix: did you mean 'steps'"),
        ({"modle": {}}, "unknown key modle\n  fix: did you mean 'model'"),
        ({"rewards": [{"fnc": "exact"}]}, "did you mean 'func'"),
        ({"recipe": "dap0"}, "did you mean 'dapo'"),
        ({"train": {"groups_per_step": 8, "num_minibatches": 3}}, "no multiple"),
        ({"sampling": {"num_completions": 1}}, "baseline"),
        ({"sampling": {"filters": {"min_tokens": 9}, "max_tokens": 4}}, "min_tokens is larger"),
        ({"deterministic": True, "train": {"max_staleness": 1}}, "max_staleness: 0"),
        (
            {"generators": {"options": {"weight_transfer": "ipc"}}},
            "options.weight_transfer\n  fix: the key is weights.transport now",
        ),
        (
            {"sampling": {"filters": {"topp": 1}}},
            "unknown key sampling.filters.topp\n  fix: did you",
        ),
        ({"ray": {"timeouts_s": {"stop": 9}}}, "unknown key ray.timeouts_s.stop\n  fix: did you"),
        ({"ray": {"timeouts_s": {"start": 0}}}, "ray.timeouts_s.start: Input should be greater"),
        ({"ray": {"threads": {"scorer": 1}}}, "unknown key ray.threads.scorer"),
        ({"optimizer": {"adamw": {"betas": [0.9, 1.0]}}}, "optimizer.adamw.betas[1]: Input"),
        ({"rewards": [{"func": "exact"}, {"func": "exact"}]}, "distinct names"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr"),
        ({"learner": {"zero_stage": 4}}, "learner.zero_stage"),
        ({"learner": {"num_ranks": 3, "sequence_parallel": 2}}, "num_ranks (3) is no multiple"),
        ({"generators": COLOCATED, "train": {"max_staleness": 1}}, "needs train.max_staleness: 0"),
        ({"generators": COLOCATED, "ray": {"gpus": {"learner": 1, "generator": 1}}}, "add up to 1"),
        ({"generators": COLOCATED, "ray": {"labels": {"generator": ZONE}}}, "same ray.labels for"),
        ({"train": "fast"}, "train"),
        ({"loss": {"kl_estimator": "k1"}}, "gradient of zero on average"),
        ({"loss": {"correction": "tis"}, "sampling": FILTERED}, "renormalised"),
        ({"loss": {"ratio_anchor": "sampler"}, "sampling": FILTERED}, "renormalised"),
        ({"loss": {"loss": "dppo_tv"}, "sampling": FILTERED}, "renormalised"),
        ({"loss": {"off_policy_threshold": 0.1}, "sampling": FILTERED}, "renormalised"),
        ({"loss": {"ratio_anchor": "sampler", "correction": "tis"}}, "corrects"),
        ({"loss": {"loss": "dppo_tv", "correction": "icepop"}}, "corrects"),
        ({"loss": {"loss": "reinforce", "ratio_anchor": "sampler"}}, "has no ratio"),
        ({"loss": {"loss": "reinforce"}, "train": {"num_iterations": 2}}, "may have one update"),
        ({"loss": {"loss": "cispo", "delta": 2.0}}, "delta acts with loss: clip and gspo only"),
        ({"loss": {"loss": "sapo", "dual_clip": 2.0}}, "dual_clip acts with"),
        ({"loss": {"correction": "icepop", "correction_min": 3.0}}, "larger than correction_max"),
        ({"learner": {"reference": {"sync_steps": 2}}}, "set loss.beta too"),
        (
            {"learner": {"reference": {"sync_steps": 2}, "lora": {"r": 4}}, "loss": {"beta": 0.1}},
            "without the adapter",
        ),
        ({"advantage": {"scale": "gdpo", "overlong_buffer": 0.2}}, "add the reward `length`"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_their_fix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        builders.config(**change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "no valid YAML"), ("- 1", "mapping"), ("model: {}", "missing key model.path")],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="no configuration file at nowhere"):
        load_config("nowhere.yaml")


def test_what_is_named_leaves_the_other_values_alone() -> None:
    config = load_config(
        {**SMALLEST, "ray": {"timeouts_s": {"start": 5}}},
        ["ray.timeouts_s.update=7", "data.chat=true"],
    )
    deadlines = {"start": 5.0, "generate": 1800.0, "update": 7.0, "sync": 600.0}
    assert config.ray.timeouts_s.model_dump() == deadlines
    assert config.data.chat is True


def test_moved_keys_name_keys_that_exist() -> None:
    keys = {row.path for row in describe_keys()}
    assert not keys & MOVED.keys()
    assert set(MOVED.values()) <= keys


def test_bad_overrides() -> None:
    for override, message in (("--train.steps", "cannot read"), ("model.path.x=1", "no section")):
        with pytest.raises(ConfigError, match=message):
            load_config(SMALLEST, [override])


def test_overrides_leave_the_mapping_alone() -> None:
    load_config(SMALLEST, ["model.path=other"])
    assert SMALLEST["model"]["path"] == "m"


def test_every_key_is_described() -> None:
    rows = {row.path: row[1:] for row in describe_keys()}
    assert rows["model.path"][:2] == ("str", "required")
    meaning = "Steps of the run; each makes one version of the weights."
    assert rows["train.steps"] == ("int", "100", "steps", meaning)
    assert rows["loss.kl_estimator"][0] == "k2 | k3"
    assert rows["data.template"][0] == "str | null"
    assert "rewards[].timeout_s" in rows
    assert rows["ray.timeouts_s.sync"][1:3] == ("600.0", "seconds")
    assert all(meaning.endswith(".") for *_, meaning in rows.values())
