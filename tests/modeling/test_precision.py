"""Precision: the given one, or with `auto` what the hardware computes natively and fast."""

from typing import Any

import pytest
import torch

from lora_or_full.config import compose
from lora_or_full.config.schema import TrainerConfig, validate
from lora_or_full.modeling import precision
from lora_or_full.modeling.precision import frozen_dtype, resolve_precision

CUDA, CUDA_BF16 = "cuda.is_available", "cuda.is_bf16_supported"
AVX, AMX = "cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported"
MPS = "backends.mps.is_available"


def machine(monkeypatch: pytest.MonkeyPatch, *has: str) -> None:
    """A machine that has nothing but what is named; its processor's bfloat16 is fast."""
    monkeypatch.setattr(precision, "cpu_gain", lambda: 4.0)
    for name in (CUDA, CUDA_BF16, AVX, AMX, MPS):
        monkeypatch.setattr(f"torch.{name}", lambda found=name in has, **_: found)


def trainer(precision: str | int, accelerator: str) -> TrainerConfig:
    values = compose.compose([], [])["trainer"]
    return TrainerConfig.model_validate(
        values | {"precision": precision, "accelerator": accelerator}
    )


@pytest.mark.parametrize(
    ("accelerator", "has", "expected"),
    [
        ("cpu", [], "32-true"),
        ("cpu", [AVX], "bf16-mixed"),
        ("cpu", [AMX], "bf16-mixed"),
        ("cpu", [CUDA, CUDA_BF16], "32-true"),
        ("auto", [], "32-true"),
        ("auto", [AVX], "bf16-mixed"),
        ("auto", [MPS, AVX], "32-true"),  # the run is on MPS
        ("auto", [CUDA, AVX], "32-true"),  # on a GPU that only emulates it
        ("auto", [CUDA, CUDA_BF16], "bf16-mixed"),
        ("cuda", [CUDA, CUDA_BF16], "bf16-mixed"),
        ("gpu", [CUDA, CUDA_BF16], "bf16-mixed"),
        ("gpu", [CUDA], "32-true"),
        ("gpu", [MPS, AVX], "32-true"),
        ("mps", [MPS, AVX], "32-true"),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_of_the_run_has_it(
    accelerator: str, has: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *has)
    assert resolve_precision(trainer("auto", accelerator)) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.55, "32-true"), (1.9, "bf16-mixed")])
def test_a_processor_whose_bfloat16_is_slower_computes_in_float32(
    gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, AVX)
    monkeypatch.setattr(precision, "cpu_gain", lambda: gain)
    assert resolve_precision(trainer("auto", "cpu")) == expected


@pytest.mark.parametrize("onednn", [True, False])
def test_the_speed_of_bfloat16_is_measured_once(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float32 as the layers of a model compute it on this processor."""
    ticks = iter(range(1000))
    clock, turns = [0.0], [0]

    def product(x: torch.Tensor, y: torch.Tensor, seconds: float) -> None:
        assert x.shape == y.shape == (512, 768)
        clock[0] += seconds * (100 if next(ticks) < 2 else 1)  # the first turn of each takes longer
        turns[0] += 1

    def linear(x: torch.Tensor, y: torch.Tensor) -> None:
        product(x, y, 4 if x.dtype == torch.float32 else 2)

    def multiply(x: torch.Tensor, y: torch.Tensor) -> None:
        assert x.dtype == torch.float32
        product(x, y, 3)

    monkeypatch.setattr(precision, "linear", linear)
    monkeypatch.setattr(precision, "multiply", multiply)
    monkeypatch.setattr(precision, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    precision.cpu_gain.cache_clear()
    assert [precision.cpu_gain() for _ in range(2)] == [1.5 if onednn else 2.0] * 2
    assert turns == [42]
    precision.cpu_gain.cache_clear()


def test_emulation_by_a_gpu_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    machine(monkeypatch, CUDA)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **words: asked.append(words))
    resolve_precision(trainer("auto", "cuda"))
    assert asked == [{"including_emulation": False}]


@pytest.mark.parametrize("wanted", ["32-true", "bf16-mixed", "bf16-true", "16-mixed", 32])
@pytest.mark.parametrize("has", [[], [AVX, CUDA, CUDA_BF16]])
def test_a_given_precision_is_kept(
    wanted: str | int, has: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *has)
    assert resolve_precision(trainer(wanted, "auto")) == str(wanted)


@pytest.mark.parametrize(
    ("wanted", "precision", "expected"),
    [
        ("auto", "bf16-mixed", torch.bfloat16),
        ("auto", "16-mixed", torch.float16),
        ("auto", "32-true", torch.float32),
        ("auto", "64-true", torch.float32),
        ("float32", "bf16-mixed", torch.float32),
        (None, "bf16-mixed", torch.float32),  # full fine-tuning: nothing is frozen
    ],
)
def test_frozen_weights_are_stored_as_products_round_them(
    wanted: str | None, precision: str, expected: torch.dtype
) -> None:
    mode = ["mode=full"] if wanted is None else [f"frozen_dtype={wanted}"]
    config = validate(compose.compose(mode, [])).with_precision(precision)
    assert frozen_dtype(config) == expected


def test_frozen_weights_stay_float32_for_dora_which_uses_their_norm() -> None:
    for dora, expected in (("false", torch.bfloat16), ("true", torch.float32)):
        config = validate(compose.compose([f"+adapter.use_dora={dora}"], []))
        assert frozen_dtype(config.with_precision("bf16-mixed")) == expected
