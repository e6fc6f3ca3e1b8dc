"""Prefix packing: the layout of a sequence, and the same loss and gradients as separate rows."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import add_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from datamodule import sequences
from lora_or_full.data.prompt import IGNORED, PromptTokens
from lora_or_full.modeling import attention, packed_rows, prefix_packing
from lora_or_full.modeling.loading import load_model
from lora_or_full.modeling.prefix_packing import (
    CONTEXT_SEGMENT,
    PADDING_SEGMENT,
    Packed,
    packed,
    padded,
)

KINDS = ["gpt2_folder", "llama_folder", "grouped_llama_folder"]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
TARGETS = {"gpt2_folder": ["c_attn", "c_fc"]}  # of the others:
LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]

Rows = tuple[list[list[int]], list[list[int]], list[list[int]]]  # contexts, branches, labels


def drawn(rng: random.Random, rows: int) -> Rows:
    """Rows over three contexts (or fewer), one of them empty; labels at the ends of the branches,
    each another number, so that they tell their row."""
    shared = [[rng.randrange(9) for _ in range(size)] for size in (0, 7, 30)]
    contexts = [rng.choice(shared) for _ in range(rows)]
    branches = [[rng.randrange(9) for _ in range(rng.randrange(2, 12))] for _ in range(rows)]
    labels = [
        [IGNORED] * (len(branch) - 2) + [100 + row, 200 + row]
        for row, branch in enumerate(branches)
    ]
    return contexts, branches, labels


# Layout


def test_each_question_attends_to_its_context_and_itself_with_continued_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_packing, "PAD_MULTIPLE", 4)
    contexts = [[1, 2], [9], [1, 2], [1, 2]]
    branches = [[3, 4], [5, 6], [7], [8, 3]]
    labels = [[IGNORED, 4], [5, 6], [IGNORED], [IGNORED, 3]]
    sequence = packed(contexts, branches, labels, 100)
    no = IGNORED
    assert sequence.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 3, 0, 9, 5, 6, 0]]
    assert sequence.position_ids.tolist() == [[0, 1, 2, 3, 2, 2, 3, 0, 0, 1, 2, 0]]
    assert sequence.labels.tolist() == [[no, no, no, 4, no, no, 3, no, no, 5, 6, no]]
    assert sequence.segment_of.tolist() == [
        0,
        0,
        1,
        1,
        2,
        3,
        3,
        PADDING_SEGMENT,
        0,
        1,
        1,
        PADDING_SEGMENT,
    ]
    assert sequence.block_of.tolist() == [0] * 8 + [1] * 4
    first, second = sequence.blocks
    assert (first.start, first.stop, first.keys) == (0, 8, None)
    assert (second.start, second.stop, second.keys) == (8, 12, None)
    assert drawing(first.mask) == [
        # 1 2 3 4 7 8 3 -
        "x . . . . . . .",  # the context
        "x x . . . . . .",
        "x x x . . . . .",  # its first question
        "x x x x . . . .",
        "x x . . x . . .",  # its second
        "x x . . . x . .",  # its third
        "x x . . . x x .",
        "x x . . . . . x",  # what fills up
    ]
    assert drawing(second.mask) == ["x . . .", "x x . .", "x x x .", "x . . x"]


def test_common_first_tokens_of_questions_are_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_packing, "PAD_MULTIPLE", 1)
    no = IGNORED
    branches = [[5, 6, 7, 8], [5, 6, 7, 9, 8]]
    sequence = packed([[1, 2]] * 2, branches, [[no, no, no, 8], [no, no, no, no, 8]], 100)
    # Not the third, 7: the first question's label is predicted there.
    assert sequence.input_ids.tolist() == [[1, 2, 5, 6, 7, 8, 7, 9, 8]]
    assert sequence.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6]]
    assert sequence.segment_of.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert sequence.labels.tolist() == [[no, no, no, no, no, 8, no, no, 8]]
    other = packed([[1, 2]] * 2, branches, [[no, no, no, 8], [no, no, 7, no, 8]], 100)
    assert other.input_ids.tolist() == [[1, 2, 5, 6, 7, 8, 6, 7, 9, 8]]


def drawing(mask: torch.Tensor) -> list[str]:
    return [" ".join("x" if seen else "." for seen in row) for row in mask.tolist()]


@pytest.mark.parametrize("length", [1, 20, 45, 1000])
def test_every_row_is_in_one_block_and_has_its_labels_once(length: int) -> None:
    rng = random.Random(length)
    for count in (1, 2, 9, 30):
        contexts, branches, labels = drawn(rng, count)
        sequence = packed(contexts, branches, labels, length)
        found = []
        for number, block in enumerate(sequence.blocks):
            ids, targets, positions, owners = (
                tensor[..., block.start : block.stop].flatten()
                for tensor in (
                    sequence.input_ids, sequence.labels, sequence.position_ids, sequence.segment_of,
                )
            )  # fmt: skip
            assert (sequence.block_of[block.start : block.stop] == number).all()
            assert (targets[owners <= CONTEXT_SEGMENT] == IGNORED).all()
            for branch in range(CONTEXT_SEGMENT + 1, int(owners.max()) + 1):
                own = owners == branch
                row = int(targets[own][-1]) - 200
                seen = block.mask[own.nonzero()[-1, 0]]  # by the row's last token
                assert ids[seen].tolist() == contexts[row] + branches[row]
                assert positions[seen].tolist() == list(range(int(seen.sum())))
                assert targets[seen].tolist() == [IGNORED] * len(contexts[row]) + labels[row]
                found.append(row)
        assert sorted(found) == list(range(count))
        assert [block.start for block in sequence.blocks[1:]] == [
            block.stop for block in sequence.blocks[:-1]
        ]
        assert sequence.blocks[-1].stop == sequence.input_ids.shape[1] == len(sequence.block_of)


def test_a_context_is_repeated_where_a_block_is_full() -> None:
    context, other = list(range(10)), list(range(4))
    branches = [[1] * size for size in (3, 3, 4, 5, 1, 30, 2)]
    contexts = [context, context, other, context, context, context, other]
    sequence = packed(contexts, branches, branches, length=16)
    sizes = []
    for block in sequence.blocks:
        owners = sequence.segment_of[block.start : block.stop]
        sizes.append([int((owners == n).sum()) for n in range(int(owners.max()) + 1)])
    # 10 + 3 + 3 tokens fit; the fourth row begins anew; one of 30 never fits, and stands alone.
    assert sizes == [[10, 3, 3], [4, 4, 2], [10, 5, 1], [10, 30]]


def test_rows_keep_their_order_where_equal_contexts_are_adjacent() -> None:
    contexts, branches, labels = drawn(random.Random(0), 20)
    order = sorted(range(20), key=contexts.__getitem__)
    contexts, branches, labels = (
        [rows[row] for row in order] for rows in (contexts, branches, labels)
    )
    for length in (1, 45, 1000):
        found = packed(contexts, branches, labels, length).labels
        assert found[found >= 200].tolist() == [own[-1] for own in labels]


def test_padding_of_blocks_has_no_label_and_nothing_attends_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_packing, "PAD_MULTIPLE", 16)
    sequence = packed(*drawn(random.Random(0), 30), length=45)
    filled = 0
    for block in sequence.blocks:
        filling = sequence.segment_of[block.start : block.stop] == PADDING_SEGMENT
        filled += int(filling.sum())
        assert (block.stop - block.start) % 16 == 0
        assert filling.sum() < 16
        assert (sequence.labels[0, block.start : block.stop][filling] == IGNORED).all()
        assert not block.mask[~filling][:, filling].any()
        assert block.mask.diagonal().all()  # each token sees one at least, or there were no number
    assert filled > 0


def test_rows_are_padded_on_the_right_without_labels() -> None:
    sequence = padded([[1, 2, 3], [4, 5]], [[IGNORED, 2, 3], [IGNORED, 5]])
    assert sequence.input_ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert sequence.wanted.tolist() == [[0, 1, 3], [2, 3, 5]]  # the tokens before labels


# Loss and gradients


def questions() -> tuple[list[PromptTokens], list[list[int]]]:
    """Prompts over three contexts in mixed order, two of them shared, and answers."""
    rng = random.Random(1)

    def ids(size: int) -> list[int]:
        return [rng.randrange(1, 300) for _ in range(size)]

    contexts = {name: ids(size) for name, size in (("a", 25), ("b", 6), ("c", 14))}
    prompts = [
        PromptTokens([7, 8], contexts[name], ids(rng.randrange(3, 9))) for name in "aabacaca"
    ]
    return prompts, [[*ids(rng.randrange(1, 6)), 0] for _ in prompts]


def own_model(folder: Path, kind: str, mode: str) -> Any:
    """The model as a run has it, without dropout, its LoRA matrices B not zero."""
    model = load_model(folder, "tiny", {})
    if mode == "lora":
        targets = TARGETS.get(kind, LLAMA_TARGETS)
        model = add_lora(model, {**LORA, "target_modules": targets})
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def plain_model(folder: Path, own: Any, attention: str) -> Any:
    """A model of the same weights that plain transformers and PEFT made."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    if isinstance(own, PeftModel):
        config = own.peft_config["default"]
        plain = get_peft_model(plain, LoraConfig(
            task_type="CAUSAL_LM", r=config.r, lora_alpha=config.lora_alpha,
            target_modules=config.target_modules, fan_in_fan_out=config.fan_in_fan_out,
        ))  # fmt: skip
        plain.load_state_dict(own.state_dict())
    return plain.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def by_rows(
    model: Any, prompts: list[PromptTokens], answers: list[list[int]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss over the answers and its gradients: a call a row, the loss is the model's."""
    losses = []
    for part, answer in zip(prompts, answers, strict=True):
        labels = [IGNORED] * len(part.prompt) + answer
        ids = torch.tensor([part.prompt + answer])
        loss = model(input_ids=ids, labels=torch.tensor([labels])).loss * len(answer)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), gradients(model)


def by_sequence(model: Any, sequence: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The same, all at once."""
    needed, targets = sequence.wanted
    logits = model(**sequence.model_inputs(needed), use_cache=False).logits[0]
    loss = cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    loss.backward()
    return loss.item(), gradients(model)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two gradients, as a share of their norm."""
    assert one.keys() == other.keys()
    first, second = (torch.cat([x[name].flatten() for name in one]) for x in (one, other))
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_separate_rows(
    kind: str, mode: str, attention: str, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = request.getfixturevalue(kind)
    prompts, answers = questions()
    own = own_model(folder, kind, mode)
    loss, expected = by_rows(plain_model(folder, own, attention), prompts, answers)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    monkeypatch.setattr(packed_rows, "ROW_LENGTH", 100)
    monkeypatch.setattr(packed_rows, "LENGTH_MULTIPLE", 8)
    monkeypatch.setattr(packed_rows, "LABELS_MULTIPLE", 16)
    made = [sequences(prompts, answers, True, length) for length in (None, 1, 60, 1000)]
    in_rows = [sequences(prompts, answers, True, length, True) for length in (1, 60, 1000)]
    assert all(rows.tokens.shape[1] > 1 for rows in in_rows)
    blocks = []
    for sequence in (*made, *in_rows):  # padded; none shares; some share; all that can do
        own.zero_grad()
        given, found = by_sequence(own, sequence)
        assert given == pytest.approx(loss, rel=1e-5)
        assert distance(found, expected) < 1e-5
        for name, gradient in expected.items():
            # The gradient of a key's bias is zero but for rounding: only the whole has a scale.
            scale = max(gradient.norm().item(), 1e-2 * max(g.norm() for g in expected.values()))
            assert (found[name] - gradient).norm() < 1e-5 * scale, name
        blocks.append(len(sequence.blocks) if isinstance(sequence, Packed) else 0)
    assert blocks == [0, 8, 4, 3, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_a_sequence_changes_nothing(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_packing, "PAD_MULTIPLE", 16)
    model = own_model(request.getfixturevalue(kind), kind, "full")
    sequence = sequences(*questions(), True, 50)
    assert isinstance(sequence, Packed)
    filling = sequence.segment_of == PADDING_SEGMENT
    other = sequence._replace(input_ids=sequence.input_ids.masked_fill(filling, 99))
    with torch.no_grad():
        one, two = (model(**s.model_inputs()).logits[0] for s in (sequence, other))
    assert torch.equal(one[~filling], two[~filling])
    assert not torch.equal(one[filling], two[filling])


# Attention of low precision


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the keys of each attention that is computed as products of matrices."""
    seen: list[torch.Size] = []
    original = attention._products

    def attend(query: Any, key: Any, value: Any, mask: Any, scaling: Any) -> Any:
        seen.append(key.shape)
        return original(query, key, value, mask, scaling)

    monkeypatch.setattr(attention, "_products", attend)
    return seen


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_by_matrix_products_equals_the_fused_kernel(groups: int) -> None:
    torch.manual_seed(0)
    branches = [[4] * 5, [5] * 9, [6]]
    mask = packed([[1, 2, 3]] * 3, branches, branches, 100).blocks[0].mask
    query = torch.randn(1, 4, len(mask), 8)
    key, value = torch.randn(2, 1, 4 // groups, len(mask), 8)
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    fused, _ = sdpa_attention_forward(
        module, query, key, value, mask[None, None], dropout=0.0, scaling=0.3
    )
    assert torch.allclose(attention._products(query, key, value, mask, 0.3), fused, atol=1e-5)


def calls_of(sequence: Packed) -> int:
    """One for what attends apart in a block, and one for the rest, where there are such."""
    sizes = [block.stop - block.start for block in sequence.blocks]
    pairs = zip(sequence.blocks, sizes, strict=True)
    return sum((b.causal_rows > 0) + (b.causal_rows < n) for b, n in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_by_matrix_products_in_bfloat16_is_close_to_float32(
    kind: str, request: pytest.FixtureRequest, products: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = own_model(request.getfixturevalue(kind), kind, "lora")
    sequence = sequences(*questions(), True, 50)
    assert isinstance(sequence, Packed)
    loss, expected = by_sequence(model, sequence)
    assert products == []
    for small, calls in ((attention.MATMUL_ATTENTION_LIMIT, 2 * calls_of(sequence)), (8, 0)):
        monkeypatch.setattr(attention, "MATMUL_ATTENTION_LIMIT", small)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            given, found = by_sequence(model, sequence)
        assert len(products) == calls
        assert given == pytest.approx(loss, rel=2e-2)
        assert given != loss
        assert distance(found, expected) < 0.1
        products.clear()


@pytest.mark.parametrize("tiles", [True, False])
def test_without_gradients_a_processor_with_tiles_attends_by_the_fused_kernel(
    tiles: bool, gpt2_folder: Path, products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    model = own_model(gpt2_folder, "gpt2_folder", "lora")
    sequence = sequences(*questions(), True, 50)
    assert isinstance(sequence, Packed)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**sequence.model_inputs(), use_cache=False)
    assert len(products) == (0 if tiles else 2 * calls_of(sequence))


def test_attention_with_dropout_uses_the_fused_kernel_and_drops(
    gpt2_folder: Path, products: list[torch.Size]
) -> None:
    model = load_model(
        gpt2_folder, "tiny", {"attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ).train()
    sequence = sequences(*questions(), True, 50)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(by_sequence(model, sequence)[0])
    assert products == []
    assert losses[0] == losses[1] != losses[2]
