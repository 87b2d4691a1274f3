"""The lean operators as a technique: with LoRA, in every order, and the private parts of libraries they stand on."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import edgetune.lean
from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply, finalize
from edgetune.core.inputs import call
from edgetune.core.technique import Technique
from edgetune.lean.frozen import Hook
from edgetune.lean.low_rank import find_fitting_layers
from edgetune.lean.operators import LeanOperators
from edgetune.lean.saved import saved_bytes
from edgetune.lean.technique import Lean
from edgetune.quant.nf4 import NF4
from edgetune.sparse.update import SparseUpdate
from support.laws import LINEARS, bert, cnn, fit, llama, logits, loss_of, mlp, pictures, tokens, vectors

torch.set_num_threads(1)

ADAPTERS = {"bert": LoRA(rank=2, targets=LINEARS), "llama": LoRA(rank=2, targets=("*_proj",))}
BUILD: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama}


def steady(model: nn.Module) -> nn.Module:
    """Without dropout, in training mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model.train()


def trained_adapter(name: str, techniques: Sequence[Technique], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with these techniques, and its adapters away from their start, where half of the gradients are zero."""
    model = apply(steady(BUILD[name]().to(dtype)), techniques).train()
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    return model


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(call(model, inputs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-7, name


def hooks_of(model: nn.Module) -> list[Hook]:
    every = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook.__self__ for hook in every if isinstance(getattr(hook, "__self__", None), Hook)]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_lora_saves_less_than_half_at_equal_gradients(name: str) -> None:
    """Of tiny models; `make bench-sparse` has the figures of real ones."""
    plain, model = (trained_adapter(name, [*more, ADAPTERS[name]]) for more in ([], [Lean()]))
    assert 2 * saved_bytes(model, tokens(), loss_of) <= saved_bytes(plain, tokens(), loss_of)
    assert len(list(find_fitting_layers(model))) == sum(1 for key in model.state_dict() if ".lora_A." in key) > 0
    assert_same(gradients(model, tokens()), gradients(plain, tokens()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(gradients(other, tokens()), gradients(model, tokens()), 0)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "change",
    [
        {"dora": True}, {"rslora": True}, {"skip": ("*.up_proj",)}, {"skip": ("*.gate_proj",)},
        {"skip": ("*.down_proj",)}, {"targets": ("*_proj", "lm_head")}, {"targets": ("*.q_proj", "*.v_proj")},
        {"also_train": ("*.norm", "*layernorm")},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_adapter_has_equal_gradients(change: dict[str, Any]) -> None:
    adapter = ADAPTERS["llama"].model_copy(update=change)
    plain, model = (trained_adapter("llama", [*more, adapter]) for more in ([], [Lean()]))
    assert_same(gradients(model, tokens()), gradients(plain, tokens()), 3e-5)
    assert saved_bytes(model, tokens(), loss_of) < saved_bytes(plain, tokens(), loss_of)


def test_dropout_of_an_adapter_keeps_a_seed() -> None:
    """Against the derivative by differences, since its masks are others than PyTorch's."""
    adapter = ADAPTERS["bert"].model_copy(update={"dropout": 0.3})
    model = trained_adapter("bert", [Lean(), adapter], torch.float64)
    plain = trained_adapter("bert", [adapter], torch.float64)
    assert 2 * saved_bytes(model, tokens(), loss_of) <= saved_bytes(plain, tokens(), loss_of)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return loss_of(call(model, tokens()))

    losses = {round(loss_of(call(model, tokens())).item(), 6) for _ in range(3)}
    assert len(losses) == 3  # it does drop
    loss().backward()
    generator, epsilon = torch.Generator().manual_seed(1), 1e-6
    for name, parameter in model.named_parameters():
        if parameter.grad is None or ".layer.0." not in name:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            parameter.data.add_(sign * epsilon * direction)
            values.append(loss().item())
            parameter.data.sub_(sign * epsilon * direction)
        assert (values[0] - values[1]) / (2 * epsilon) == pytest.approx(
            float((parameter.grad * direction).sum()), rel=1e-4, abs=1e-6
        ), name


def test_a_head_under_the_adapters_and_the_loss_inside_the_model() -> None:
    ids = tokens()
    inside = {**ids, "labels": ids["input_ids"]}
    plain, model = (trained_adapter("llama", [*more, ADAPTERS["llama"]]) for more in ([], [Lean()]))
    for each in (plain, model):
        each.zero_grad()
        call(each, inside).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "techniques",
    [
        [Lean(), ADAPTERS["bert"]], [ADAPTERS["bert"], Lean()], [Lean(), Lean()],
        [Lean(), SparseUpdate(scheme="last-1")],
        [SparseUpdate(scheme="last-1"), Lean(activations="8bit")],
        [Lean(activations="8bit"), SparseUpdate(scheme="last-1"), LoRA(rank=2, targets=("*.0.*.query",)), Lean()],
        [NF4(block_size=32), Lean(), ADAPTERS["bert"]],
    ],
    ids=lambda techniques: "-".join(t.name for t in techniques),
)  # fmt: skip
def test_in_every_order_the_hooks_are_put_on_once_and_all_come_off(techniques: list[Technique]) -> None:
    model = apply(bert(), techniques)
    roots = [hook for hook in hooks_of(model) if isinstance(hook, LeanOperators)]
    assert len(roots) == 1
    asked = [t.activations for t in techniques if isinstance(t, (Lean, SparseUpdate))]
    assert roots[0].asked == asked
    fit(model, tokens())
    model = finalize(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not [name for module in model.modules() for name in vars(module) if name in ("forward", "edgetune_head")]


def test_the_order_with_lora_changes_nothing() -> None:
    one, other = (
        trained_adapter("bert", [Lean(), ADAPTERS["bert"]]),
        trained_adapter("bert", [ADAPTERS["bert"], Lean()]),
    )
    assert saved_bytes(one, tokens(), loss_of) == saved_bytes(other, tokens(), loss_of)
    assert_same(gradients(one, tokens()), gradients(other, tokens()), 0)


def test_the_precision_asked_for_last_counts_while_it_is_open() -> None:
    def saved(*techniques: Technique) -> int:
        return saved_bytes(apply(bert(), techniques), tokens(), loss_of)

    sparse, fewer = SparseUpdate(scheme="last-1"), SparseUpdate(scheme="last-1", activations="8bit")
    assert saved(sparse, Lean(activations="8bit")) == saved(fewer) < saved(sparse) == saved(fewer, Lean())
    assert saved(Lean(activations="8bit"), sparse) == saved(sparse)
    model = apply(bert(), [Lean(activations="8bit"), sparse])
    model = sparse.finalize(model)  # lean alone is left, with its own precision
    assert saved_bytes(model, tokens(), loss_of) == saved(Lean(activations="8bit"))


def test_batch_norms_in_training_mode_use_the_batch_also_where_their_weight_is_frozen() -> None:
    plain, model = cnn(), apply(cnn(), Lean())
    for each in (plain, model):
        each.train()
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    got, expected = (gradients(each, pictures()) for each in (model, plain))
    for name in ("stem.weight", "blocks.1.pointwise.weight", "classifier.weight"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.state_dict()["norm.running_mean"], plain.state_dict()["norm.running_mean"])


def test_what_trains_is_looked_at_in_every_forward() -> None:
    model, plain = apply(mlp(), Lean()), mlp()
    for frozen in (["blocks.0", "stem"], ["blocks.2"], []):
        for each in (model, plain):
            each.requires_grad_(True)
            for name in frozen:
                each.get_submodule(name).requires_grad_(False)
        assert_same(gradients(model, vectors()), gradients(plain, vectors()))


def test_a_checkpointed_layer_runs_the_same_twice() -> None:
    plain, model = (trained_adapter("llama", [*more, ADAPTERS["llama"]]) for more in ([], [Lean()]))
    for layer in model.model.layers:
        run = layer.forward
        layer.forward = lambda *args, run=run, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)
    assert_same(gradients(model, tokens()), gradients(plain, tokens()))


def test_a_compiled_block_has_the_same_gradients() -> None:
    plain, model = (trained_adapter("llama", [*more, ADAPTERS["llama"]]) for more in ([], [Lean()]))
    model.model.layers[0].mlp.compile(backend="eager")
    for _ in range(2):
        assert_same(gradients(model, tokens()), gradients(plain, tokens()))


def test_a_layer_whose_adapter_is_off_or_hooked_is_left_to_peft() -> None:
    model = trained_adapter("llama", [Lean(), ADAPTERS["llama"]])
    layers = list(find_fitting_layers(model))
    layers[0].enable_adapters(False)
    layers[1].lora_A["default"].register_forward_hook(lambda *_: None)
    layers[2].base_layer.weight.requires_grad_(True)
    assert list(find_fitting_layers(model)) == layers[3:]
    with torch.no_grad():
        expected = logits(trained_adapter("llama", [ADAPTERS["llama"]]).eval(), tokens())
    layers[0].enable_adapters(True)
    torch.testing.assert_close(logits(model, tokens()), expected)


PRIVATE = {  # what edgetune/lean uses of torch that torch does not promise to keep, and what for
    "torch._C._dynamo.eval_frame._FrameAction.SKIP": "keep a compiler from compiling a hook by itself",
    "torch._C._dynamo.eval_frame._FrameAction.DEFAULT": "keep a compiler from compiling a hook by itself",
    "torch._C._dynamo.eval_frame._FrameExecStrategy": "keep a compiler from compiling a hook by itself",
    "torch._C._dynamo.eval_frame.set_code_exec_strategy": "keep a compiler from compiling a hook by itself",
    "torch._C._autograd._top_saved_tensors_default_hooks": "know a checkpointed function from within",
    "torch._C._get_tracing_state": "stay idle while an exporter traces",
    "torch.overrides._get_current_function_mode_stack": "find the operators in whose reach code runs",
    "torch.utils._python_dispatch.TorchDispatchMode": "see which weights a forward reads",
    "torch.nn.modules.batchnorm._BatchNorm": "know every batch norm",
    "torch.nn.Linear(1, 1)._parameters": "a weight, whatever a property of the class gives",
    "torch.nn.Linear(1, 1)._forward_pre_hooks": "take our hooks off",
    "torch.nn.Linear(1, 1)._forward_hooks": "take our hooks off",
    "torch.nn.Linear(1, 1)._backward_hooks": "leave a layer with hooks of others to peft",
    "torch.nn.Linear(1, 1)._forward_pre_hooks_with_kwargs": "take our hooks off",
    "torch.nn.Linear(1, 1)._forward_hooks_always_called": "take our hooks off",
    "torch.zeros(1)._version": "notice a change in place",
    "torch.zeros(1)._base": "know a view",
    "torch.zeros(1).to_sparse()._indices": "count the bytes of a sparse tensor, as it is stored",
    "torch.zeros(1).to_sparse()._values": "count the bytes of a sparse tensor, as it is stored",
    "torch.zeros(1).untyped_storage()._cdata": "know the memory of a weight",
    "torch.ops.aten.add.Tensor._schema": "name the operator that reads a weight",
    "torch.ops.aten._softmax_backward_data": "backward of softmax",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "attention over long rows",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "attention over long rows",
    "torch.ops.aten.gelu_backward": "backward of an activation",
    "torch.ops.aten.silu_backward": "backward of an activation",
    "torch.ops.aten.hardswish_backward": "backward of an activation",
    "torch.ops.aten.threshold_backward.grad_input": "backward of ReLU into memory that is there",
    "torch.ops.aten.native_layer_norm_backward": "backward of a layer norm",
    "torch.nn.functional.multi_head_attention_forward.__globals__['has_torch_function']": "see into torch's attention",
}  # fmt: skip
ELSEWHERE = {
    "torch.ops.mkldnn._linear_pointwise": "oneDNN's linear; edgetune.lean.onednn goes without where it is gone"
}


def test_the_private_parts_of_torch_are_there() -> None:
    gone = []
    for path, purpose in PRIVATE.items():
        try:
            eval(path, {"torch": torch})
        except (AttributeError, KeyError) as error:
            gone.append(f"{path} ({purpose}): {error}")
    assert not gone, f"torch {torch.__version__} lacks what edgetune/lean uses; adapt edgetune/lean:\n" + "\n".join(
        gone
    )


def test_a_checkpoint_is_known_by_the_module_of_its_hooks() -> None:
    from edgetune.lean.frozen import in_checkpoint

    inside: list[bool] = []

    def function(x: Tensor) -> Tensor:
        inside.append(in_checkpoint())
        return functional.relu(x)

    checkpoint(function, torch.zeros(1, requires_grad=True), use_reentrant=False)
    assert inside == [True], "torch.utils.checkpoint packs its tensors elsewhere now; adapt in_checkpoint"
    assert not in_checkpoint()


def test_no_other_private_part_of_torch_is_used() -> None:
    """By name: everything with an underscore that edgetune/lean reads and does not define itself is in the table."""
    named = " ".join((*PRIVATE, *ELSEWHERE))
    unknown = set()
    for path in Path(edgetune.lean.__path__[0]).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [alias.name for alias in node.names] + (node.module or "").split(".")
            for name in names:
                private = name.startswith("_") and not name.endswith("__") and name not in own
                if private and name not in named:
                    unknown.add(f"{path.name}: {name}")
    assert not unknown, f"private parts that no line of PRIVATE names: {sorted(unknown)}"
