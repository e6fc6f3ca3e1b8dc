"""How the runs of a sweep are named: by all that it varies."""

from argparse import Namespace
from pathlib import Path

import pytest

from lora_or_full.config.command_line import prepare


def names(*words: str) -> list[str]:
    asked = Namespace(overrides=words, multirun=True, config_dir=None)
    return [job.run_name for job in prepare(asked).jobs]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # What the names of the modes tell already stays as it is.
        (["seed=1,2"], ["lora_r8_lr0.0002_seed1", "lora_r8_lr0.0002_seed2"]),
        (
            ["mode=lora,full", "rank=4,8"],
            ["lora_r4_lr0.0002_seed1", "lora_r8_lr0.0002_seed1"] + 2 * ["full_lr2e-05_seed1"],
        ),
        (
            ["batch_size=4,8", "mode=full"],
            ["full_lr2e-05_seed1_batch_size4", "full_lr2e-05_seed1_batch_size8"],
        ),
        (
            ["model=gpt2,builtin", "data.split_by=article,question"],
            [
                f"lora_r8_lr0.0002_seed1_model-{model}_split_by-{by}"
                for model in ("gpt2", "builtin")
                for by in ("article", "question")
            ],
        ),
        (
            ["mode=lora,full", "frozen_dtype=auto,float32"],
            [
                *(f"lora_r8_lr0.0002_seed1_frozen_dtype-{dtype}" for dtype in ("auto", "float32")),
                *(2 * ["full_lr2e-05_seed1"]),
            ],
        ),
        (
            ["adapter.target_modules=[c_attn,c_fc],all-linear", "run_name=mine"],
            ["mine_target_modules-c_attn+c_fc", "mine_target_modules-all-linear"],
        ),
        (
            ["+adapter.use_dora=true,false", "data.path=/a/b.json,'c d.json'"],
            [
                f"lora_r8_lr0.0002_seed1_use_dora-{dora}_path-{path}"
                for dora in ("true", "false")
                for path in ("a-b.json", "c-d.json")
            ],
        ),
        (["run_name=a,b"], ["a", "b"]),
        (["model.name=x,y", "data.path=a,b", "model.config.attn_pdrop=0,0.1"], None),
    ],
)  # fmt: skip
def test_a_run_is_named_by_what_its_sweep_varies(
    words: list[str], expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = names(*words)
    assert found == (expected or found)
    assert len(set(found)) == len(set(expected or found))
    if expected is None:
        assert len(set(found)) == 8
