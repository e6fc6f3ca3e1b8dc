"""Every key of conf/ is explained and checked."""

import re
from typing import Any

import pytest

from lora_or_full.config import compose
from lora_or_full.config.near_misses import HABITS, unknown
from lora_or_full.config.schema import FIELDS, VALID, as_now, flat, typed, validate
from lora_or_full.errors import UserError


@pytest.mark.parametrize(
    "words",
    [
        [], ["mode=full"], ["model=llama"], ["model=qwen3"], ["experiment=demo"],
        ["experiment=reference"],
        ["experiment=fast"], ["experiment=subset"], ["experiment=squad", "mode=full"],
        ["debug=fast"], ["debug=overfit"], ["debug=profile"], ["callbacks=early_stopping"],
        ["logger=[tensorboard,csv,wandb,mlflow]"], ["optimizer=sgd", "scheduler=cosine"],
        ["optimizer=adafactor", "scheduler=constant"],
    ],
)  # fmt: skip
def test_every_key_of_conf_is_explained_and_passes_its_check(words: list[str]) -> None:
    settings = compose.compose(words)
    assert validate(settings).to_dict() == settings
    # Null in full; of torch's SGD.
    assert set(flat(settings, FIELDS)) - set(FIELDS) <= {"adapter", "optimizer.momentum"}


def test_every_explained_key_is_in_conf() -> None:
    assert set(FIELDS) == set(flat(compose.compose(), FIELDS))
    assert all(field.description for field in FIELDS.values())


def test_the_configuration_of_an_older_run_means_what_it_meant() -> None:
    older = compose.compose(["scheduler.num_warmup_steps=7", "optimizer.weight_decay=0.1"])
    expected = validate(older)
    for name in ("scheduler", "logger", "callbacks"):
        del older[name]
    older["optimizer"] = {
        "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "warmup_steps": 7,
    }  # fmt: skip
    assert validate(as_now(older)) == expected
    with pytest.raises(UserError, match="can't be left out"):  # no default hides in the code
        validate(older)


@pytest.mark.parametrize("old", ["optimizer.warmup_steps", "scheduler.warmup_steps"])
def test_a_key_of_another_name_is_told_its_name(old: str) -> None:
    now = HABITS[old]
    assert now in FIELDS
    assert f"Did you mean {now}?" in str(unknown(old, VALID))
    with pytest.raises(UserError, match=f"{old}=3: there is no such key; it is {now}"):
        validate(compose.compose([f"+{old}=3"]))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_defaults_are_the_recipe(mode: str) -> None:
    s = compose.compose([f"mode={mode}"])
    assert (s["model"]["name"], s["data"]["path"]) == ("gpt2", "rajpurkar/squad")
    assert (s["batch_size"], s["trainer"]["max_epochs"], s["max_length"]) == (4, 3, 512)
    assert (s["data"]["train_size"], s["data"]["validation_size"]) == (2000, 200)
    assert s["trainer"]["gradient_clip_val"] == 1.0
    assert (s["packing"], s["data"]["draw_by"], s["trainer"]["precision"]) == (
        True, "question", "auto",
    )  # fmt: skip
    assert s["optimizer"] == {
        "_target_": "torch.optim.AdamW", "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8,
        "fused": True,
    }  # fmt: skip
    assert s["scheduler"] == {
        "_target_": "transformers.get_linear_schedule_with_warmup", "num_warmup_steps": 0,
    }  # fmt: skip
    if mode == "lora":
        assert s["adapter"] == {
            "_target_": "peft.LoraConfig", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
            "target_modules": "auto",
        }  # fmt: skip
        assert (s["lr"], s["frozen_dtype"]) == (2e-4, "auto")
    else:
        assert (s["adapter"], s["lr"], s["frozen_dtype"]) == (None, 2e-5, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0), ("lr", -1.0), ("lr", "high"), ("lr", float("nan")), ("lr", float("inf")),
        ("rank", 0), ("rank", 2.5), ("seed", -1), ("seed", True), ("batch_size", 0),
        ("max_length", 0), ("mask_prompt", "yes"), ("resume", 3),
        ("packing", "maybe"), ("packing", None), ("packed_length", 0), ("packed_length", None),
        ("packed_length", 1.5), ("frozen_dtype", "bfloat16"),
        ("data.draw_by", "foo"), ("data.draw_by", None),
    ],
)  # fmt: skip
def test_a_value_that_can_not_be_is_refused_by_name(key: str, value: Any) -> None:
    settings = compose.compose()
    group, _, name = key.rpartition(".")
    (settings[group] if group else settings)[name] = value
    with pytest.raises(UserError, match=f"^{re.escape(key)}="):
        validate(settings)


@pytest.mark.parametrize(
    "words",
    [
        ["frozen_dtype=float32"], ["frozen_dtype=auto"], ["packing=false"], ["packed_length=1"],
        ["data.draw_by=paragraph"], ["mode=full", "packing=false"], ["trainer.precision=bf16-true"],
    ],
)  # fmt: skip
def test_a_value_that_can_be_passes(words: list[str]) -> None:
    validate(compose.compose(words))


def test_all_problems_are_told_at_once() -> None:
    settings = compose.compose() | {"lr": 0, "seed": -1}
    settings["data"]["split_by"] = "page"
    with pytest.raises(UserError) as refusal:
        validate(settings)
    assert len(str(refusal.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=null"], "rank=8: mode=lora has no rank, since it has no adapter"),
        (["~adapter"], "can't be left out: adapter"),
        (["~adapter._target_"], "can't be left out: adapter._target_"),
        (["adapter._target_=os.system"], "adapter._target_=os.system: must be the name of a PEFT"),
        (["adapter.r=4"], "adapter.r=4: rank=8 sets it"),
        (["rank=null"], "rank=null: mode=lora needs a rank"),
        (["run_name=../x"], "run_name=../x: must be a name"),
        (["run_name=."], "run_name=.: must be a name"),
        (["study=/x"], "study=/x: must be a name"),
        ([f"study={'x' * 201}"], "must be a name of .* up to 200 bytes"),
        (["+trainer.limit_test_batches=1"], "trainer.limit_test_batches: a run sets this itself"),
        (["+trainer.max_steps=9"], "trainer.max_steps: a run sets this itself"),
        (["+trainer.plugins=[a]"], "trainer.plugins: a run sets this itself"),
        (["+trainer.sync_batchnorm={a:1}"], "trainer.sync_batchnorm={'a': 1}: must be one word"),
        (["+trainer.detect_anomaly=[no]"], "trainer.detect_anomaly=['no']: must be one word or"),
        (["+trainer.logger=csv"], "trainer.logger: a run sets this itself. Loggers: logger=csv"),
        (["+trainer.callbacks=[a]"], "a run sets this itself. Callbacks: callbacks=early_stopping"),
        (["+trainer.profiler=simple"], "a run sets this itself. A profile: debug=profile."),
        (["+trainer.fast_dev_run=true"], "a run sets this itself. A quick trial: debug=fast."),
        (["+trainer.overfit_batches=1"], "One batch learned by heart: debug=overfit."),
        (["+optimizer.lr=1"], "optimizer.lr=1: lr sets it; leave it out."),
        (["optimizer._target_=SGD"], "optimizer._target_=SGD: must be a Python name"),
        (["+callbacks.mine.x=1"], "callbacks={'mine': {'x': 1}}: must be names, each with the"),
    ],
)
def test_what_contradicts_or_leads_elsewhere_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*")):
        validate(compose.compose(words))


@pytest.mark.parametrize(("key", "value"), [("rank", 8), ("frozen_dtype", "float32")])
def test_what_belongs_to_an_adapter_is_refused_without_one(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key}={value}: mode=full has no {key}"):
        validate(compose.compose(["mode=full", f"{key}={value}"]))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batchsize", "batch_size"),
        ("r", "rank"),
        ("lora.r", "rank"),
        ("alpha", "adapter.lora_alpha"),
        ("lora.lora_alpha", "adapter.lora_alpha"),
        ("lora.use_rslora", "+adapter.use_rslora"),
        ("adapter.use_rslora", "+adapter.use_rslora"),
        ("epochs", "trainer.max_epochs"),
        ("trainer.epochs", "trainer.max_epochs"),
        ("learning_rate", "lr"),
        ("gradient_checkpointing", "model.gradient_checkpointing"),
        ("target_modules", "adapter.target_modules or model.target_modules"),
    ],
)
def test_a_misspelt_key_is_told_the_word_that_works(name: str, meant: str) -> None:
    message = str(unknown(name, VALID))
    assert f"Did you mean {meant}?" in message


def test_what_is_far_from_all_keys_is_told_those_that_are_accepted() -> None:
    listed = str(unknown("zzz", VALID)).rstrip(".").partition("Valid keys: ")[2].split(", ")
    given = flat(compose.compose(), FIELDS)
    # Each with its own value.
    validate(compose.compose([f"{key}={typed(given[key])}" for key in {*listed} & {*given}]))
    assert {*FIELDS} - {*listed} == {"adapter.r"}
