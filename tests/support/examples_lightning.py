"""A Lightning module. Only the lines marked `# edgetune` are added."""

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import edgetune as et  # edgetune


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        rows, labels = batch
        loss = functional.cross_entropy(self.net(rows), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


torch.manual_seed(0)
rows = torch.randn(512, 16)
loader = DataLoader(TensorDataset(rows, rows[:, :4].argmax(1)), batch_size=32, shuffle=True)
model = Classifier()
techniques = [et.SparseUpdate(scheme={"net.4": "full"}), et.LoRA(rank=8, targets=["net.2"])]  # edgetune
model = et.apply(model, techniques)  # edgetune

quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", default_root_dir="out", **quiet)
trainer.fit(model, loader)
model = et.finalize(model)  # edgetune

# A checkpoint was written before finalize: apply the same techniques, then load it.
again = et.apply(Classifier(), techniques)  # edgetune
again.load_state_dict(torch.load(trainer.checkpoint_callback.best_model_path)["state_dict"])  # edgetune
again = et.finalize(again)  # edgetune

print(f"loss {model.losses[0]:.2f} -> {model.losses[-1]:.2f}")
