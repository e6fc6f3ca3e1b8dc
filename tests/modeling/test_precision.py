"""Precision: the given one, or with `auto` what the hardware computes natively and fast."""

from pathlib import Path

import pytest
import torch

from lora_or_full.config import compose
from lora_or_full.config.schema import TrainerConfig, validate
from lora_or_full.modeling import precision
from lora_or_full.modeling.precision import frozen_dtype, resolve_precision

CUDA = "cuda.is_available"
AVX, AMX = "cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported"
MPS = "backends.mps.is_available"


def machine(monkeypatch: pytest.MonkeyPatch, *has: str) -> None:
    """A machine that has nothing but what is named; its processor's bfloat16 is fast."""
    monkeypatch.setattr(precision, "cpu_gain", lambda: 4.0)
    for name in (CUDA, AVX, AMX, MPS):
        monkeypatch.setattr(f"torch.{name}", lambda found=name in has, **_: found)


def trainer(precision: str | int, accelerator: str) -> TrainerConfig:
    values = compose.compose()["trainer"]
    return TrainerConfig.model_validate(
        values | {"precision": precision, "accelerator": accelerator}
    )


@pytest.mark.parametrize(
    ("accelerator", "has", "expected"),
    [
        ("cpu", [], "32-true"),
        ("cpu", [AVX], "bf16-mixed"),
        ("cpu", [AMX], "bf16-mixed"),
        ("cpu", [CUDA], "32-true"),
        ("auto", [], "32-true"),
        ("auto", [AVX], "bf16-mixed"),
        ("auto", [MPS, AVX], "32-true"),  # the run is on MPS
        ("gpu", [MPS, AVX], "32-true"),
        ("mps", [MPS, AVX], "32-true"),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_of_the_run_has_it(
    accelerator: str, has: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *has)
    assert resolve_precision(trainer("auto", accelerator), 768) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.55, "32-true"), (1.9, "bf16-mixed")])
def test_a_processor_whose_bfloat16_is_slower_computes_in_float32(
    gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, AVX)
    monkeypatch.setattr(precision, "cpu_gain", lambda: gain)
    assert resolve_precision(trainer("auto", "cpu"), 768) == expected


def test_a_small_model_computes_in_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, AVX)
    assert [resolve_precision(trainer("auto", "cpu"), width) for width in (192, 511, 512)] == [
        "32-true", "32-true", "bf16-mixed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("accelerator", "has", "expected"),
    [
        ("cpu", [CUDA], "bf16-mixed"),
        ("auto", [], "bf16-mixed"),
        ("auto", [CUDA], "16-mixed"),
        ("gpu", [MPS], "16-mixed"),
    ],
)
def test_float16_on_a_cpu_is_what_lightning_makes_of_it(
    accelerator: str, has: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *has)
    assert resolve_precision(trainer("16-mixed", accelerator), 768) == expected


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


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), "32-true"),  # GTX 10xx, P40
        ((7, 0), "16-mixed"),  # V100
        ((7, 5), "16-mixed"),  # T4, RTX 20xx: torch emulates bfloat16 there
        ((8, 0), "bf16-mixed"),  # A100
        ((8, 9), "bf16-mixed"),  # L4, RTX 40xx
        ((9, 0), "bf16-mixed"),  # H100
        ((12, 0), "bf16-mixed"),  # RTX 50xx
    ],
)
def test_auto_on_a_gpu_is_what_its_units_compute(
    accelerator: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, CUDA, AVX)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    assert resolve_precision(trainer("auto", accelerator), 768) == expected


@pytest.mark.parametrize("wanted", ["32-true", "bf16-mixed", "bf16-true", "16-true", 32])
@pytest.mark.parametrize("has", [[], [AVX, CUDA]])
def test_a_given_precision_is_kept(
    wanted: str | int, has: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, *has)
    assert resolve_precision(trainer(wanted, "auto"), 768) == str(wanted)


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
    config = validate(compose.compose(mode)).with_precision(precision)
    assert frozen_dtype(config) == expected


def test_frozen_weights_stay_float32_for_dora_which_uses_their_norm() -> None:
    for dora, expected in (("false", torch.bfloat16), ("true", torch.float32)):
        config = validate(compose.compose([f"+adapter.use_dora={dora}"]))
        assert frozen_dtype(config.with_precision("bf16-mixed")) == expected


@pytest.mark.parametrize(
    ("card", "has", "cuda", "expected"),
    [
        (True, [], None, "built without CUDA"),
        (True, [], "13.0", "CUDA 13.0 of this torch can't use its driver"),
        (True, [CUDA], "13.0", ""),
        (False, [], None, ""),
    ],
)
def test_a_card_that_torch_can_not_use_is_told(
    card: bool, has: list[str], cuda: str | None, expected: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    machine(monkeypatch, *has)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(precision, "NVIDIA", tmp_path if card else tmp_path / "none")
    precision.warn_of_unused_gpu()
    printed = capsys.readouterr().err
    assert expected in printed
    assert bool(printed) == bool(expected)
    assert not printed or "The run is on cpu" in printed
