"""One training of test_distributed.py, on one process or on each of several.

    torchrun --nproc-per-node 2 tests/support/distributed_worker.py FOLDER TRAINER TECHNIQUES...

Three updates on the same eight rows, however many processes share them; after the second everything is saved, and the
third is done by a fresh model that resumed. Then the model is finalized and, where there were several, exported. The
first process leaves `result.safetensors` in a folder for each of TECHNIQUES: the gradients of the first update, and the
trained tensors after the last one.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, RATE = 8, 0.5

sys.path.insert(0, str(Path(__file__).parents[1]))


def techniques_of(name: str) -> list[Any]:
    import edgetune as et

    lora = et.LoRA(rank=2, targets=["*.query", "*.value"], also_train=["classifier"])
    return {
        "lora": [lora],
        "sparse": [et.SparseUpdate(scheme={"*.layer.1": 0.25, "classifier": "full"})],
        "in-backward": [et.SparseUpdate(scheme="last-1")],
        "nf4-lora": [et.NF4(block_size=32), lora],
    }[name]


def prepared(techniques: str) -> nn.Module:
    import edgetune as et
    from support.laws import bert

    model = et.apply(bert().train(False), techniques_of(techniques))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a side path that is zero has no gradient on one of its sides
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():  # noise would differ between one process and two
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 48, (ROWS, 10), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(ROWS) % 3}


def mine(rank: int, world: int) -> dict[str, Tensor]:
    return {name: value[rank::world] for name, value in rows().items()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    from edgetune.core.holders import plain_name, unwrap_model

    inner = unwrap_model(model)
    return {plain_name(n): p.detach().clone() for n, p in inner.named_parameters() if p.requires_grad}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], backward: Any = None) -> None:
    loss = model(**batch).loss
    loss.backward() if backward is None else backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def with_ddp(techniques: str, folder: Path, rank: int, world: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from edgetune.train import optimizer as optimizers

    model, batch = prepared(techniques), mine(rank, world)
    before, optimizer = trained(model), sgd(model)
    in_backward, group = techniques == "in-backward", dist.group.WORLD if world > 1 else None

    def spread(module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module) if world > 1 and not in_backward else module

    def run(module: nn.Module, used: torch.optim.Optimizer) -> None:
        if not in_backward:
            return update(module, used, batch)
        with optimizers.stepping_in_backward(used, group):
            return module(**batch).loss.backward()

    wrapped = spread(model)
    run(wrapped, optimizer)
    gradients = gradients_from(before, trained(model))
    run(wrapped, optimizer)
    if rank == 0:
        torch.save((model.state_dict(), optimizer.state_dict()), folder / "saved.pt")
    if world > 1:
        dist.barrier()
    model = prepared(techniques)
    state, of_optimizer = torch.load(folder / "saved.pt", weights_only=False)
    model.load_state_dict(state)
    optimizer = sgd(model)
    optimizer.load_state_dict(of_optimizer)
    run(spread(model), optimizer)
    return model, gradients


def gradients_from(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first step of SGD was taken along."""
    return {name: (before[name] - after[name]) / RATE for name in before}


def with_accelerate(techniques: str, folder: Path, rank: int, world: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from accelerate import Accelerator

    batch = mine(rank, world)
    accelerator = Accelerator(cpu=True)
    model = prepared(techniques)
    before = trained(model)
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    update(wrapped, optimizer, batch, accelerator.backward)
    gradients = gradients_from(before, trained(model))
    update(wrapped, optimizer, batch, accelerator.backward)
    accelerator.save_state(str(folder / "accelerate"))
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    model = prepared(techniques)
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    accelerator.load_state(str(folder / "accelerate"))
    update(wrapped, optimizer, batch, accelerator.backward)
    return accelerator.unwrap_model(wrapped), gradients


def with_trainer(techniques: str, folder: Path, rank: int, world: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = rows()
    examples = [{name: value[i] for name, value in data.items()} for i in range(ROWS)]

    class First(TrainerCallback):  # type: ignore[misc]
        after: dict[str, Tensor] | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            First.after = First.after or trained(kwargs["model"])

    def trainer(model: nn.Module, steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=steps, save_steps=2, save_strategy="steps", use_cpu=True,
            per_device_train_batch_size=ROWS // world, learning_rate=RATE, lr_scheduler_type="constant",
            # transformers takes BERT for a model that divides its loss by the items of all processes, which it does not
            average_tokens_across_devices=False,
            max_grad_norm=0.0, report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=examples, optimizers=(sgd(model), None), callbacks=[First()])

    model = prepared(techniques)
    before = trained(model)
    trainer(model, 2).train()
    gradients = gradients_from(before, First.after or {})
    model = prepared(techniques)
    trainer(model, 3).train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2"))
    return model, gradients


def with_lightning(techniques: str, folder: Path, rank: int, world: int) -> tuple[nn.Module, dict[str, Tensor]]:
    import lightning
    from torch.utils.data import DataLoader

    data = rows()
    examples = [{name: value[i] for name, value in data.items()} for i in range(ROWS)]

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.net, self.after = model, None

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.net(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

        def on_train_batch_end(self, *_: Any) -> None:
            self.after = self.after or trained(self.net)

    def trainer(steps: int) -> Any:
        return lightning.Trainer(
            max_steps=steps, accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip

    loader = DataLoader(examples, batch_size=ROWS // world)
    module = Module(prepared(techniques))
    before, fitting = trained(module.net), trainer(2)
    fitting.fit(module, loader)
    fitting.save_checkpoint(folder / "lightning.ckpt")
    gradients = gradients_from(before, module.after or {})
    module = Module(prepared(techniques))
    trainer(3).fit(module, loader, ckpt_path=folder / "lightning.ckpt", weights_only=False)
    return module.net, gradients


def with_fsdp2(folder: Path, rank: int) -> None:
    """A sharded model trains, and what cannot be done with one is refused by name."""
    from torch.distributed.fsdp import fully_shard

    import edgetune as et

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model, packed = prepared("lora"), prepared("nf4-lora")
    before = trained(model)
    for each in (model, packed):
        fully_shard(each, mesh=mesh)
    update(model, sgd(model), mine(rank, 2))
    moved = [not torch.equal(before[n], p.full_tensor()) for n, p in model.named_parameters() if p.requires_grad]
    assert all(moved), moved
    batch = {name: value[:1] for name, value in rows().items() if name != "labels"}
    refused = []
    for attempt in (
        lambda: et.apply(model, techniques_of("sparse")),
        lambda: et.finalize(model),
        lambda: et.export(model, batch, folder / "m.pte"),
        lambda: et.save_adapter(model, folder / "adapter"),
        lambda: packed(**batch),
    ):
        try:
            attempt()
            refused.append(0)
        except et.EdgetuneError as error:
            refused.append(int("shard" in str(error)))
    if rank == 0:
        save_file({"refused": torch.tensor(refused)}, folder / "result.safetensors")


TRAINERS = {"ddp": with_ddp, "accelerate": with_accelerate, "trainer": with_trainer, "lightning": with_lightning}


def main(folder: Path, trainer: str, *techniques: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    for kind in techniques:
        (folder / kind).mkdir(exist_ok=True)
        with_fsdp2(folder / kind, rank) if trainer == "fsdp2" else run(folder / kind, trainer, kind, rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(folder: Path, trainer: str, techniques: str, rank: int, world: int) -> None:
    """One training, and its result."""
    import edgetune as et

    model, gradients = TRAINERS[trainer](techniques, folder, rank, world)
    final = trained(model)
    if rank == 0:
        batch = {name: value[:1] for name, value in rows().items() if name != "labels"}
        with torch.no_grad():
            open_logits = copy.deepcopy(model).eval()(**batch).logits
        model = et.finalize(model.eval())
        with torch.no_grad():
            plain_logits = model(**batch).logits
        tensors = {f"gradient.{n}": t for n, t in gradients.items()} | {f"final.{n}": t for n, t in final.items()}
        tensors |= {"logits.open": open_logits, "logits.plain": plain_logits}
        if world > 1:
            tensors["logits.program"] = et.export(model, batch, folder / "m.pte").run(batch)[0]
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
