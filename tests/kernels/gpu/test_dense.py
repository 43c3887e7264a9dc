"""Dense operations: what is installed, and how the answers of libraries are read. The libraries themselves need a GPU:
in their places stand functions that compute, and answer in their order of axes and with their padding."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from ringserve_kernels.gpu.dense import OPERATIONS, TORCH_FLASH, DenseOperation
from torch import Tensor

BY_NAME = {operation.name: operation for operation in OPERATIONS}
SCALE = 0.25


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[N, K, R, D] -> o, lse [N, K, R]."""
    scores = q @ k.transpose(2, 3) * scale
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def tokens_first(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, ...]:
    """As flash-attn: [N, tokens, heads, D]; lse [N, heads, tokens]; more values behind, as some versions have."""
    assert options.pop("softmax_scale") == SCALE and all(options.values()), options
    o, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), SCALE)
    return o.transpose(1, 2), lse, torch.empty(0)


def module(name: str, **functions: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(functions, __path__=[])
    return made


@pytest.mark.parametrize("name, modules", [
    ("fa2", {"flash_attn": tokens_first}), ("fa3", {"flash_attn_interface": tokens_first}),
    ("fa4", {"flash_attn": None, "flash_attn.cute": tokens_first})])
def test_libraries_that_put_tokens_first(name: str, modules: dict[str, Callable[..., object] | None],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    for path, function in modules.items():
        monkeypatch.setitem(sys.modules, path, module(path, flash_attn_func=function))
    check(BY_NAME[name])


def aten(q: Tensor, k: Tensor, v: Tensor, *_: object, scale: float) -> tuple[Tensor, ...]:
    return *attention(q, k, v, scale), torch.empty(0), torch.empty(0)


def trailing(*arguments: Tensor, scale: float) -> tuple[Tensor, ...]:
    o, lse, *rest = aten(*arguments, scale=scale)
    return o, lse.unsqueeze(-1), *rest


def padded(*arguments: Tensor, scale: float) -> tuple[Tensor, ...]:
    o, lse, *rest = aten(*arguments, scale=scale)
    return o, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), *rest


@pytest.mark.parametrize("name, operation, answer", [
    ("flash", "_scaled_dot_product_flash_attention", aten),
    ("cudnn", "_scaled_dot_product_cudnn_attention", aten),
    ("cudnn", "_scaled_dot_product_cudnn_attention", trailing),
    ("efficient", "_scaled_dot_product_efficient_attention", padded)])
def test_operations_of_torch(name: str, operation: str, answer: Callable[..., object],
                             monkeypatch: pytest.MonkeyPatch) -> None:
    schema = getattr(torch.ops.aten, operation).default._schema

    def answering(*arguments: Tensor, **options: float) -> object:
        positional = [a for a in schema.arguments if not a.kwarg_only]
        assert len(arguments) <= len(positional) and set(options) <= {a.name for a in schema.arguments}
        required = [a.name for a in positional[len(arguments):] if not a.has_default_value()]
        assert not required, f"{operation} is called without {required}"
        return answer(*arguments, **options)

    monkeypatch.setattr(torch.ops.aten, operation, answering)
    check(BY_NAME[name])


def check(operation: DenseOperation) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 16, generator=generator, dtype=torch.float64) for tokens in (45, 70, 70))
    o, lse = operation.run(q, k, v, SCALE)
    expected_o, expected_lse = attention(q, k, v, SCALE)
    torch.testing.assert_close(o, expected_o)
    torch.testing.assert_close(lse, expected_lse)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BY_NAME["fa2"].missing((9, 0)) == "flash-attn is not installed"
    assert BY_NAME["fa3"].missing((10, 0)) == "needs sm_90 and before sm_100"
    assert BY_NAME["cudnn"].missing((7, 5)) == "needs sm_80"
    assert TORCH_FLASH.missing((9, 0)) is None
    monkeypatch.setattr("ringserve_kernels.gpu.dense.importlib.util.find_spec", lambda _: object())
    assert BY_NAME["fa2"].missing((9, 0)) is None
    assert BY_NAME["fa2"].version == "unknown"
    assert TORCH_FLASH.version == torch.__version__
